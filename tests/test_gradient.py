"""The look into one step's gradient: credit of thoughts, and the commands on small sizes."""

import gradient
import numpy as np
import pytest

import loss
from data.driver import run_programs
from data.faults import UserError
from rollout import grpo


def test_thought_signals_are_weights_times_surprise(policy):
    (task,) = policy.tasks(4, 1, base=8)
    (group,) = run_programs([grpo(task)], policy.engine).results
    for i, rollout in enumerate(group):
        rollout.reward = float(i < 2)
    loss.set_advantages(group)
    rollout = group[0]
    rollout.prefix_len = rollout.thought_ends[0]  # as if its first thought were a shared prefix
    signals = gradient.thought_signals(rollout, 8)
    assert signals[0] is None and len(signals) == len(rollout.thought_ends)
    weight = rollout.advantages[1] / (8 * (len(rollout.token_ids) - rollout.prefix_len))
    logps = rollout.logps[rollout.thought_ends[0] : rollout.thought_ends[1]]
    assert signals[1] == pytest.approx(np.mean([weight * (1 - np.exp(logp)) for logp in logps]))


def test_signal_runs(capsys):
    command = "signal --data chain-3 --repeats 2 --prompts 4 --variants grpo".split()
    gradient.main([*command, "srpo 1x4"])
    out = capsys.readouterr().out
    assert "| grpo |" in out and "| srpo 1x4 |" in out


def test_signal_says_what_it_cannot_measure(tmp_path):
    with pytest.raises(UserError, match="--repeats must be at least 2"):
        gradient.main(["signal", "--repeats", "1"])
    data = tmp_path / "problems.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": "2", "kind": "integer"}\n')
    few = ["signal", "--data", str(data), "--repeats", "2", "--prompts", "1"]
    with pytest.raises(UserError, match="has 1 problems, not 2: each of --repeats takes"):
        gradient.main(few)
    data.write_text(data.read_text() * 2)
    with pytest.raises(UserError, match="needs a step checker"):
        gradient.main([*few, "--variants", "srpo 1x4 verifier"])


def test_anatomy_runs(tmp_path):
    gradient.main(["anatomy", "--data", "chain-4", "--out", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").stat().st_size > 10_000
    command = "anatomy --data chain-12 --problems 1 --out".split()
    with pytest.raises(UserError, match="raise --problems"):
        gradient.main([*command, str(tmp_path / "b.png")])
