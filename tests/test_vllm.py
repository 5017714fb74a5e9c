"""The vLLM engine, a real one on the CPU, against the transformers engine on the same weights. Run where vLLM is installed (README, Test it).

One engine is shared by the tests: vLLM does not take two in a process. What needs another model or several processes runs in a subprocess."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from test_rollout import trainer_logps
from test_run import lines_of

from conftest import POLICY, ROOT
from data.driver import run_programs
from rollout import HFEngine, grpo, make_engine, resets

if "REQUIRE_OPTIONAL" not in os.environ:  # the gate sets it: there these tests may not be skipped
    pytest.importorskip("vllm", reason="vLLM is not installed; see Install in README.md")


@pytest.fixture(scope="module")
def vllm(policy):
    return make_engine("vllm", POLICY, policy.model, policy.tokenizer, context=384, max_rows=64)


@pytest.fixture
def restored(policy, vllm):
    """The embedded weights again after a test that changes them."""
    yield
    vllm.sync(policy.model.named_parameters())


def greedy(policy, **changed):
    return [
        task.request("base", 1)
        for task in policy.tasks(12, 12, temperature=0.0, **changed)
        + policy.tasks(3, 12, temperature=0.0, **changed)
    ]


def flat(groups):
    return [rollout for group in groups for rollout in group]


def shape(rollouts):
    return [(r.token_ids, r.thought_ends, r.finish, r.text, r.prefix_len) for r in rollouts]


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
    ours, theirs = (
        flat(engine.sample(greedy(policy, **changed))) for engine in (policy.engine, vllm)
    )
    assert shape(theirs) == shape(ours)
    assert max(abs(a - b) for r, s in zip(ours, theirs) for a, b in zip(r.logps, s.logps)) < 1e-3


def test_stops_at_the_end_of_the_context(policy, vllm):
    (task,) = policy.tasks(6, 1, temperature=0.0)
    task.context = len(task.prompt_ids) + 5
    ours, theirs = (
        flat(engine.sample([task.request("base", 1)])) for engine in (policy.engine, vllm)
    )
    assert shape(theirs) == shape(ours) and theirs[0].finish == "length"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_the_trainers(policy, vllm, temperature):
    """Base rollouts, seeds, localization answers and suffixes from resumed prefixes, at the sampling temperature."""
    tasks = policy.tasks(7, 16, "self", temperature=temperature, localize_temperature=temperature)
    sampled = run_programs([resets(task) for task in tasks], vllm)
    buffers, generated = sampled.results, sampled.generated
    rollouts = flat(buffers)
    assert {"base", "suffix", "localization"} <= {r.purpose for r in generated} and any(
        r.prefix_len for r in rollouts
    )
    logps, sampled = trainer_logps(policy.model, generated, temperature)
    assert (logps - sampled).abs().max() < 2e-3
    for r in rollouts:
        if r.prefix_len:
            assert (
                r.token_ids[: r.prefix_len] == r.seed.token_ids[: r.prefix_len]
                and r.logps[: r.prefix_len] == r.seed.logps[: r.prefix_len]
            )


def test_samples_are_a_function_of_the_request(policy, vllm):
    requests = [task.request("base", 4) for task in policy.tasks(6, 8)]
    ids = lambda groups: [[r.token_ids for r in group] for group in groups]  # noqa: E731
    together, again = ids(vllm.sample(requests)), ids(vllm.sample(requests))
    apart = [ids(vllm.sample([request]))[0] for request in requests]
    assert together == again == apart
    assert len({tuple(row) for row in together[0]}) > 1


def test_samples_the_policys_distribution(policy, vllm):
    """The first answers of both engines come with the same frequencies: pass rates agree within their noise."""
    rates = []
    for engine in (policy.engine, vllm):
        buffers = run_programs(
            [grpo(task) for task in policy.tasks(2, 150, base=4)], engine
        ).results
        rates.append(sum(r.reward for r in flat(buffers)) / 600)
    assert 0.1 < rates[0] < 0.9 and abs(rates[0] - rates[1]) < 4 * (2 * 0.25 / 600) ** 0.5


def perturbed(policy, amount):
    model = copy.deepcopy(policy.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(amount * p.std(correction=0) * torch.randn(p.shape, generator=generator))
    return model


def test_sync_and_the_cache_reset_it_needs(policy, vllm, restored, monkeypatch):
    """After a sync greedy samples are those of the new weights. With the old prefix cache left in place the same check fails."""
    tasks = policy.tasks(12, 12, temperature=0.0)
    seeds = flat(vllm.sample([task.request("base", 1) for task in tasks]))
    requests = [
        task.request("suffix", 1, seed, 8) for task, seed in zip(tasks, seeds)
    ]  # prefixes longer than a block of the cache
    old = shape(flat(vllm.sample(requests)))
    model = perturbed(policy, 0.6)
    new = shape(flat(HFEngine(model, policy.tokenizer).sample(requests)))
    assert sum(a != b for a, b in zip(old, new)) > 6  # the perturbation shows

    monkeypatch.setattr(vllm.llm, "reset_prefix_cache", lambda: True)
    vllm.sync(model.named_parameters())
    assert shape(flat(vllm.sample(requests))) != new
    monkeypatch.undo()

    vllm.sync(model.named_parameters())
    assert shape(flat(vllm.sample(requests))) == new


TIED = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from conftest import Policy
from test_vllm import flat, greedy, perturbed, shape
from rollout import HFEngine, load_policy, make_engine

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
tied.save_pretrained({folder!r}); policy.tokenizer.save_pretrained({folder!r})
policy.model, _ = load_policy({folder!r})
engine = make_engine("vllm", {folder!r}, policy.model, policy.tokenizer, context=384, max_rows=64)
requests = greedy(policy, max_tokens_per_thought=2, max_thoughts=6)
new = perturbed(policy, 0.5)
samples = lambda engine: shape(flat(engine.sample(requests)))
hf_old, hf_new = samples(HFEngine(policy.model, policy.tokenizer)), samples(HFEngine(new, policy.tokenizer))
assert samples(engine) == hf_old != hf_new
engine.sync(new.named_parameters())
assert samples(engine) == hf_new
print("tied weights agree")
"""


def run_python(*args, **kwargs):
    done = subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, timeout=400, **kwargs
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def test_sync_of_tied_embeddings(tmp_path):
    script = TIED.format(tests=str(ROOT / "tests"), root=str(ROOT), folder=str(tmp_path / "tied"))
    assert "tied weights agree" in run_python("-c", script)


STEPS = "--engine vllm --steps 2 --prompts_per_step 5 --train_data chain-5 --eval_data chain-5 --eval_problems 6 --eval_samples 1 --max_rows 64 --save_every 1"


def test_auto_takes_vllm_and_a_run_resumes(tmp_path):
    """A whole run samples with vLLM on policy: at every step the sampler's log-probs are the trainer's, also after a resume."""
    out = tmp_path / "run"
    said = run_python(ROOT / "srpo.py", *STEPS.replace("vllm", "auto").split(), "--out_dir", out)
    assert "engine: vllm (vLLM imports and constructs here)" in said
    run_python(ROOT / "srpo.py", "--resume", out, "--steps", 3)
    lines = lines_of(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(line["gap_max"] is None or line["gap_max"] < 2e-3 for line in lines[1:]) and any(
        line["gap_max"] for line in lines[1:]
    )


def with_a_fourth_head(model, folder):
    """The same policy with one more attention head that adds nothing: its three heads cannot be split between two processes."""
    wide = copy.deepcopy(model.config)
    wide.update(dict(num_attention_heads=4, num_key_value_heads=4, head_dim=32))
    wider = type(model)(wide)
    weights = model.state_dict()
    for name, p in wider.named_parameters():
        padding = [
            x
            for have, want in zip(reversed(weights[name].shape), reversed(p.shape))
            for x in (0, want - have)
        ]
        p.data = torch.nn.functional.pad(weights[name], padding)
    ids = torch.arange(9)[None]
    assert torch.allclose(wider(ids).logits, model(ids).logits, atol=1e-5)
    wider.save_pretrained(folder)


@pytest.mark.parametrize("tp, lora_rank", [(1, 8), (2, 0)])
def test_two_processes(tmp_path, policy, tp, lora_rank):
    """Sharded trainer, vLLM in each process (with adapters, merged) or one by tensor parallelism over both: sampling stays on policy."""
    with_a_fourth_head(policy.model, tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "run"
    settings = [
        *STEPS.split(),
        "--model",
        tmp_path / "model",
        "--lr",
        "1e-3",
        "--tp",
        tp,
        "--lora_rank",
        lora_rank,
        "--out_dir",
        out,
    ]
    run_python("-m", "torch.distributed.run", "--nproc_per_node=2", ROOT / "srpo.py", *settings)
    lines = lines_of(out / "metrics.jsonl")
    assert len(lines) == 3 and json.loads((out / "config.json").read_text())["tp"] == tp
    assert all(line["gap_max"] is None or line["gap_max"] < 2e-3 for line in lines[1:]) and any(
        line["gap_max"] for line in lines[1:]
    )
