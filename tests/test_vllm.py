"""The vLLM engine, a real one on the CPU, against the transformers engine on the same weights. Run
where vLLM is installed (README, Test it).

One engine is shared by the tests: vLLM does not take two in a process. What needs another model or
several processes runs in a subprocess."""

import copy
import json
import os
import subprocess
import sys
from itertools import chain

import pytest
import torch
from test_rollout import trainer_logps
from test_run import lines_of

from conftest import POLICY, ROOT
from data.chains import generate_chains
from data.driver import run_programs
from data.lines import write_lines
from rollout import HFEngine, grpo, make_engine, resets

if "REQUIRE_OPTIONAL" not in os.environ:  # the gate sets it: there these tests may not be skipped
    pytest.importorskip("vllm", reason="vLLM is not installed; see Run it in README.md")


@pytest.fixture(scope="module")
def vllm(policy):
    return make_engine("vllm", POLICY, policy.model, policy.tokenizer, context=384, max_rows=64)


@pytest.fixture
def restored(policy, vllm):
    """The embedded weights again after a test that changes them."""
    yield
    vllm.sync(policy.model.named_parameters())


def greedy(policy, **changed):
    """One greedy response to each of some long and some short problems."""
    long = policy.tasks(12, 12, temperature=0.0, **changed)
    short = policy.tasks(3, 12, temperature=0.0, **changed)
    return [task.request("base", 1) for task in long + short]


def sample(engine, requests):
    return list(chain(*engine.sample(requests)))


def shape(rollouts):
    return [(r.token_ids, r.thought_ends, r.finish, r.text, r.prefix_len) for r in rollouts]


def largest_gap(ours, theirs):
    """The largest difference between log-probs of the same tokens, nats."""
    ours = torch.tensor(list(chain(*(rollout.logps for rollout in ours))))
    theirs = torch.tensor(list(chain(*(rollout.logps for rollout in theirs))))
    return (ours - theirs).abs().max()


# -------------------------------------------------------------------------------- the same rollouts


@pytest.mark.parametrize(
    "changed",
    [
        {},
        dict(max_thoughts=3),
        dict(max_tokens_per_thought=4),
        dict(max_tokens_per_thought=5, max_thoughts=2),
    ],
    ids=str,
)
def test_greedy_parity_boundaries_and_stops(policy, vllm, changed):
    ours = sample(policy.engine, greedy(policy, **changed))
    theirs = sample(vllm, greedy(policy, **changed))
    assert shape(theirs) == shape(ours)
    assert largest_gap(ours, theirs) < 1e-3


def test_stops_at_the_end_of_the_context(policy, vllm):
    (task,) = policy.tasks(6, 1, temperature=0.0)
    task.context = len(task.prompt_ids) + 5
    ours = sample(policy.engine, [task.request("base", 1)])
    theirs = sample(vllm, [task.request("base", 1)])
    assert shape(theirs) == shape(ours)
    assert theirs[0].finish == "length"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_the_trainers(policy, vllm, temperature):
    """Base rollouts, seeds, localization answers and suffixes from resumed prefixes, at the
    sampling temperature."""
    tasks = policy.tasks(7, 16, "self", temperature=temperature, localize_temperature=temperature)
    sampled = run_programs([resets(task) for task in tasks], vllm)
    purposes = {rollout.purpose for rollout in sampled.generated}
    assert {"base", "suffix", "localization"} <= purposes
    trainers, samplers = trainer_logps(policy.model, sampled.generated, temperature)
    assert (trainers - samplers).abs().max() < 2e-3
    resumed = [rollout for rollout in chain(*sampled.results) if rollout.prefix_len]
    assert resumed
    for r in resumed:
        assert r.token_ids[: r.prefix_len] == r.seed.token_ids[: r.prefix_len]
        assert r.logps[: r.prefix_len] == r.seed.logps[: r.prefix_len]


def test_samples_are_a_function_of_the_request(policy, vllm):
    requests = [task.request("base", 4) for task in policy.tasks(6, 8)]

    def tokens(requests):
        return [rollout.token_ids for rollout in sample(vllm, requests)]

    together, again = tokens(requests), tokens(requests)
    apart = list(chain(*(tokens([request]) for request in requests)))
    assert together == again == apart
    first_request = {tuple(row) for row in together[:4]}
    assert len(first_request) > 1


def test_samples_the_policys_distribution(policy, vllm):
    """The pass rates of both engines agree within their noise."""
    rates = []
    for engine in (policy.engine, vllm):
        tasks = policy.tasks(2, 150, base=4)
        results = run_programs([grpo(task) for task in tasks], engine).results
        rates.append(sum(rollout.reward for rollout in chain(*results)) / 600)
    assert 0.1 < rates[0] < 0.9
    assert abs(rates[0] - rates[1]) < 4 * (2 * 0.25 / 600) ** 0.5


# -------------------------------------------------------------------------------------- new weights


def perturbed(policy, amount):
    model = copy.deepcopy(policy.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(amount * p.std(correction=0) * torch.randn(p.shape, generator=generator))
    return model


def test_sync_and_the_cache_reset_it_needs(policy, vllm, restored, monkeypatch):
    """After a sync greedy samples are those of the new weights. With the old prefix cache left in
    place the same check fails."""
    tasks = policy.tasks(12, 12, temperature=0.0)
    seeds = sample(vllm, [task.request("base", 1) for task in tasks])
    # prefixes longer than a block of the cache
    requests = [task.request("suffix", 1, seed, 8) for task, seed in zip(tasks, seeds)]
    old = shape(sample(vllm, requests))
    model = perturbed(policy, 0.6)
    new = shape(sample(HFEngine(model, policy.tokenizer), requests))
    assert sum(a != b for a, b in zip(old, new)) > 6  # the perturbation shows

    monkeypatch.setattr(vllm.llm, "reset_prefix_cache", lambda: True)
    vllm.sync(model.named_parameters())
    assert shape(sample(vllm, requests)) != new
    monkeypatch.undo()

    vllm.sync(model.named_parameters())
    assert shape(sample(vllm, requests)) == new


TIED = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from conftest import Policy
from data.policies import load_policy
from rollout import HFEngine, make_engine
from test_vllm import greedy, perturbed, sample, shape

policy = Policy()
config = policy.model.config
config.tie_word_embeddings = True
torch.manual_seed(0)
tied = type(policy.model)(config)
with torch.no_grad():
    for name, p in tied.named_parameters():
        if p.dim() == 2 and "embed" not in name:
            p.mul_(8)  # or it would only repeat its input
assert tied.lm_head.weight is tied.model.embed_tokens.weight
tied.save_pretrained({folder!r})
policy.tokenizer.save_pretrained({folder!r})

policy.model, _ = load_policy({folder!r})
engine = make_engine("vllm", {folder!r}, policy.model, policy.tokenizer, context=384, max_rows=64)
requests = greedy(policy, max_tokens_per_thought=2, max_thoughts=6)
new = perturbed(policy, 0.5)
hf_old = shape(sample(HFEngine(policy.model, policy.tokenizer), requests))
hf_new = shape(sample(HFEngine(new, policy.tokenizer), requests))
assert hf_old != hf_new
assert shape(sample(engine, requests)) == hf_old
engine.sync(new.named_parameters())
assert shape(sample(engine, requests)) == hf_new
print("tied weights agree")
"""


ADAPTERS = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from conftest import POLICY, Policy
from data.parallel import trained_weights
from data.policies import add_adapters
from rollout import HFEngine, make_engine
from test_vllm import greedy, sample, shape

policy = Policy()
torch.manual_seed(0)
add_adapters(policy.model, 4)
hf = HFEngine(policy.model, policy.tokenizer)
arguments = ["vllm", POLICY, policy.model, policy.tokenizer]
engine = make_engine(*arguments, context=384, max_rows=64, lora_rank=4)
requests = greedy(policy)
seen = [shape(sample(hf, requests))]
assert shape(sample(engine, requests)) == seen[0]
for update in range(2):
    for name, p in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    engine.sync(trained_weights(policy.model))
    seen.append(shape(sample(hf, requests)))
    assert shape(sample(engine, requests)) == seen[-1]
assert seen[0] != seen[1] != seen[2]
print("adapters agree")
"""


def run_python(*args):
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def test_sync_of_tied_embeddings(tmp_path):
    script = TIED.format(tests=str(ROOT / "tests"), root=str(ROOT), folder=str(tmp_path / "tied"))
    assert "tied weights agree" in run_python("-c", script)


def test_sync_of_adapters():
    """Each update replaces the one before."""
    script = ADAPTERS.format(tests=str(ROOT / "tests"), root=str(ROOT))
    assert "adapters agree" in run_python("-c", script)


# --------------------------------------------------------------------------------------- whole runs

STEPS = (
    "--steps 2 --prompts_per_step 5 --train_data chain-5 --eval_data chain-5 --eval_problems 6 "
    "--eval_samples 1 --max_rows 64 --save_every 1"
).split()


def assert_on_policy(steps):
    """At every step the sampler's log-probs are the trainer's."""
    gaps = [step["gap_max"] for step in steps if step["gap_max"] is not None]
    assert any(gaps)
    assert max(gaps) < 2e-3


def test_auto_takes_vllm_and_a_run_resumes(tmp_path):
    """A whole run samples with vLLM on policy, also after a resume."""
    out = tmp_path / "run"
    said = run_python(ROOT / "srpo.py", "--engine", "auto", *STEPS, "--out_dir", out)
    assert "engine: vllm (vLLM imports and constructs here)" in said
    said = run_python(ROOT / "srpo.py", "--resume", out, "--steps", 3)
    assert "engine: vllm (asked for)" in said
    before, *steps = lines_of(out / "metrics.jsonl")
    assert before["step"] == 0
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert_on_policy(steps)


def save_with_a_fourth_head(policy, folder):
    """The same policy with one more attention head that adds nothing: its three heads cannot be
    split between two processes."""
    model = policy.model
    config = copy.deepcopy(model.config)
    config.update(dict(num_attention_heads=4, num_key_value_heads=4, head_dim=32))
    wider = type(model)(config)
    weights = model.state_dict()
    for name, p in wider.named_parameters():
        p.data.zero_()
        corner = tuple(slice(size) for size in weights[name].shape)
        p.data[corner] = weights[name]
    ids = torch.arange(9)[None]
    assert torch.allclose(wider(ids).logits, model(ids).logits, atol=1e-5)
    wider.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def write_mathematics(path):
    """Chains of one step, as math-verify grades them."""
    lines = []
    for problem in generate_chains(steps=1, n=40, seed=0):
        lines.append({"question": problem.question, "answer": problem.answer, "kind": "math"})
    write_lines(path, lines)
    return path


@pytest.mark.parametrize("tp, lora_rank", [(1, 8), (2, 0), (2, 8)])
def test_two_processes(tmp_path, policy, tp, lora_rank):
    """Sharded trainer, vLLM in each process or one by tensor parallelism over both, with adapters
    and without: sampling stays on policy."""
    model, out = tmp_path / "model", tmp_path / "run"
    save_with_a_fourth_head(policy, model)
    flags = ["--engine", "vllm", *STEPS, "--model", model, "--lr", "1e-3", "--out_dir", out]
    flags += ["--tp", tp, "--lora_rank", lora_rank]
    if tp == 2:  # a slow grader, which would end at other times on each process
        flags += ["--train_data", write_mathematics(tmp_path / "math.jsonl")]
    run_python("-m", "torch.distributed.run", "--nproc_per_node=2", ROOT / "srpo.py", *flags)
    before, *steps = lines_of(out / "metrics.jsonl")
    assert len(steps) == 2
    assert json.loads((out / "config.json").read_text())["tp"] == tp
    assert_on_policy(steps)
