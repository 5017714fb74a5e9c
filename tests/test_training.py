"""What srpo.py makes of the parts that other files test: the update, the order of the problems, the
random numbers, the warnings.

Left out: whole runs (test_run.py) and two processes (test_processes.py).
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_run import TINY, lines_of, run_here
from transformers import AutoModelForCausalLM, GraniteConfig

import srpo
from conftest import POLICY, settings
from data import parallel
from data.driver import run_programs
from data.faults import UserError
from data.metrics import Clock
from data.policies import check_head, load_policy, longest_sequence
from data.runs import Progress
from loss import backward, set_advantages, weigh
from rollout import HFEngine, grpo
from tests import sgd, warm

# ------------------------------------------------------------------------------------------ update


def graded(policy, rewards):
    """A group for each row of rewards, with its advantages."""
    tasks = policy.tasks(4, len(rewards))
    rollouts = []
    groups = run_programs([grpo(task) for task in tasks], policy.engine).results
    for group, of_group in zip(groups, rewards):
        for rollout, reward in zip(group, of_group):
            rollout.reward = reward
            rollouts.append(rollout)
    set_advantages(rollouts)
    return rollouts


@pytest.mark.parametrize("updates, clip, grad_clip", [(1, 0.0, 1e9), (2, 0.2, 0.02)])
def test_an_update_is_the_plain_loop(policy, updates, clip, grad_clip):
    """Flat groups count in N, the gradient is clipped, each of --updates is a step of its own."""
    rollouts = graded(policy, [[1.0, 0, 0, 0], [0.0] * 4, [1.0, 1.0, 0, 0]])
    cfg = settings(updates=updates, clip=clip, grad_clip=grad_clip)
    ours, plain = copy.deepcopy(policy.model), copy.deepcopy(policy.model)
    run = SimpleNamespace(
        cfg=cfg,
        model=ours,
        tokenizer=policy.tokenizer,
        engine=HFEngine(ours, policy.tokenizer),
        optimizer=torch.optim.SGD(ours.parameters(), lr=5.0),  # AdamW has no scale
        device=torch.device("cpu"),
        progress=Progress(),
    )
    update = srpo.update_policy(run, rollouts, Clock())

    optimizer = torch.optim.SGD(plain.parameters(), lr=5.0)
    norms = []
    for _ in range(updates):
        optimizer.zero_grad()
        sums = backward(plain, weigh(rollouts, cfg), policy.tokenizer.pad_token_id, cfg)
        norms.append(torch.nn.utils.clip_grad_norm_(plain.parameters(), cfg.grad_clip).item())
        optimizer.step()
    assert update.grad_norm == pytest.approx(norms[-1], rel=1e-3)
    assert min(norms) > 0.02
    assert update.sums.loss == pytest.approx(sums.loss, abs=1e-5)
    for mine, its in zip(ours.parameters(), plain.parameters()):
        assert torch.allclose(mine, its, atol=1e-5)


def length_of_step(out):
    """(Euclidean, largest) change of the weights in one step of a run."""
    before = load_policy(POLICY)[0].state_dict()
    after = load_policy(out / "checkpoints" / "step_1")[0].state_dict()
    changes = torch.cat([(after[key] - before[key]).flatten() for key in before])
    return changes.norm().item(), changes.abs().max().item()


def test_the_optimizers_of_the_study(tmp_path, monkeypatch):
    """sgd.py makes steps of the length --lr; warm.py's first one is a tenth of AdamW's."""
    monkeypatch.setattr(torch.optim, "AdamW", sgd.fixed_length)
    flags = [*TINY, "--method", "grpo", "--steps", "1", "--rollouts_every", "0"]
    run_here(*flags, "--lr", "0.1", "--out_dir", tmp_path / "sgd")
    assert length_of_step(tmp_path / "sgd")[0] == pytest.approx(0.1, rel=1e-3)
    monkeypatch.setattr(torch.optim, "AdamW", warm.WarmAdamW)
    run_here(*flags, "--lr", "1e-3", "--out_dir", tmp_path / "warm")
    assert length_of_step(tmp_path / "warm")[1] == pytest.approx(1e-4, rel=0.05)


# ---------------------------------------------------------------------- problems and random numbers


def test_every_epoch_is_a_new_permutation():
    orders = []
    for run_seed in (0, 1):
        places = [srpo.data_order(50, position, run_seed) for position in range(150)]
        orders += [places[:50], places[50:100], places[100:]]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6


def test_random_numbers_are_of_seed_step_and_slot(policy):
    problems = [task.problem for task in policy.tasks(3, 2)]
    prompts = [task.prompt_ids for task in policy.tasks(3, 2)]
    problem_set = srpo.ProblemSet(problems, prompts)

    def drawn(seed, step, slot, place=0):
        cfg = settings(seed=seed, localizer="random")
        run = SimpleNamespace(cfg=cfg, engine=policy.engine, context=384)
        return problem_set.task(run, place, step, slot).rng.random()

    assert drawn(0, 1, 2) == drawn(0, 1, 2) == drawn(0, 1, 2, place=1)
    assert len({drawn(0, 1, 2), drawn(3, 1, 2), drawn(0, 3, 2), drawn(0, 1, 3)}) == 4


def test_all_evaluations_use_the_same_random_numbers(tmp_path):
    """A policy that does not change has one held-out pass rate."""
    flags = ["--lr", "0", "--eval_every", "1", "--eval_problems", "64", "--eval_samples", "2"]
    run_here(*TINY, *flags, "--out_dir", tmp_path / "run")
    rates = [line["eval_pass_rate"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")]
    assert len(rates) == 3 and len(set(rates)) == 1 and 0 < rates[0] < 1


# --------------------------------------------------------------------------- what a run warns about


@pytest.mark.parametrize("method", ["grpo", "walk"])
def test_a_run_without_variance_warns(method, capsys):
    said = []
    bar = SimpleNamespace(write=said.append)
    run = SimpleNamespace(cfg=settings(method=method), flat_steps=0)
    for step in range(2, 12):
        trained = 9 if step == 5 else 0
        srpo.warn(run, bar, {"step": step, "trained_tokens": trained, "thoughts": 3.0})
    (warning,) = said  # after the flat steps 6 to 10
    assert "no group had variance for 5 steps" in warning
    assert ("--method walk" in warning) == (method == "grpo")


def test_data_that_misleads_is_warned_of(tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "Is it so?", "answer": "yes", "kind": "yes_no"}\n')
    cfg = srpo.parse(["--train_data", str(data), "--eval_data", str(data), "--top_p", "0.9"])
    srpo.load_data(cfg)
    said = capsys.readouterr().out
    assert "--top_p below 1 biases the gradient" in said
    assert "1 of 1 held-out problems are trained on" in said
    assert "1 of 1 training problems can be guessed (yes_no)" in said
    srpo.load_data(srpo.parse(["--train_data", "chain-3", "--eval_data", "chain-12"]))
    assert capsys.readouterr().out == ""


def test_models_that_the_loss_cannot_train_are_refused():
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        logits_scaling=8.0,
    )
    with pytest.raises(UserError, match="changes the logits after its head"):
        check_head(AutoModelForCausalLM.from_config(config), "granite")
    config.logits_scaling = 1.0
    model = AutoModelForCausalLM.from_config(config)
    check_head(model, "granite")
    model.config.max_position_embeddings = 0
    with pytest.raises(UserError, match="max_position_embeddings in its config.json is 0"):
        longest_sequence(model, "granite")


def test_a_process_of_several_ends_with_torchrun(monkeypatch):
    """See test_runs.py for what the call does."""
    called = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel, "end_with_parent", lambda: called.append(True))
    parallel.connect()
    assert called


def test_the_default_group_sizes():
    assert srpo.parse(["--method", "walk"]).base == 4
    assert srpo.parse(["--method", "grpo"]).base == 8
    cfg = srpo.parse([])
    assert (cfg.base, cfg.prefixes, cfg.suffixes) == (4, 1, 4)
    assert np.isclose(cfg.lr, 5e-4)
