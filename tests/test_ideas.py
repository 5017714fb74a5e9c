"""Ideas that were written with the README alone, kept as a forker wrote them.

Each of ideas.py trains a step by `--method`, and its credit is what its author meant.
"""

import json
import re

import numpy as np

import srpo
from conftest import ROOT
from data.programs import load_program
from rollout import Rollout

IDEAS = ROOT / "tests" / "ideas.py"
SMALL = "--engine hf --steps 1 --prompts_per_step 4 --eval_problems 2 --eval_samples 1"
CHAINS = "--train_data chain-4 --eval_data chain-4 --rollouts_every 1"


def trained_by(name, out_dir, monkeypatch, *flags):
    """Runs an idea for a step: the rollouts that it returned, the logged ones, the step's line."""
    trained = []
    compare = srpo.set_advantages

    def keep(rollouts):
        trained.extend(rollouts)
        return compare(rollouts)

    monkeypatch.setattr(srpo, "set_advantages", keep)
    usual = [*SMALL.split(), *CHAINS.split(), "--out_dir", str(out_dir)]
    srpo.main(["--method", f"{IDEAS}:{name}", *usual, *flags])
    logged = [json.loads(line) for line in (out_dir / "rollouts.jsonl").read_text().splitlines()]
    logged = [line for line in logged if line["group"] is not None]
    assert [r.advantages for r in trained] == [line["advantages"] for line in logged]
    last = (out_dir / "metrics.jsonl").read_text().splitlines()[-1]
    return trained, json.loads(last)


def mean_surprisals(rollout):
    """-log p of the tokens of each thought, on average."""
    parts = np.split(-np.array(rollout.logps), rollout.thought_ends)
    assert len(parts.pop()) == 0, "the thoughts leave no token out"
    return [part.mean() for part in parts]


def test_entropy_reset_goes_back_to_the_least_sure_thought(tmp_path, monkeypatch):
    trained, step = trained_by("entropy_reset", tmp_path, monkeypatch)
    suffixes = [r for r in trained if r.purpose == "suffix"]
    assert len(trained) == 32 and suffixes
    assert {r.reset for r in suffixes} > {1}  # so that some prefix is masked
    for r in suffixes:
        assert r.seed.reward == 0 and r.seed.purpose == "base"
        assert r.reset == 1 + np.argmax(mean_surprisals(r.seed))
        kept = [0, *r.seed.thought_ends][r.reset - 1]
        assert r.prefix_len == kept and r.token_ids[:kept] == r.seed.token_ids[:kept]
        assert len({id(other.seed) for other in suffixes if other.group == r.group}) == 1
    tokens = 0
    for group in {r.group for r in trained}:
        members = [r for r in trained if r.group == group]
        rewards = np.array([r.reward for r in members])
        assert len(members) == 4
        for r, difference in zip(members, rewards - rewards.mean()):
            assert np.sign(r.advantages).tolist() == [np.sign(difference)] * len(r.thought_ends)
        if rewards.std() > 0:
            tokens += sum(r.generated for r in members)
    assert step["trained_tokens"] == tokens > 0 and step["grad_norm"] > 0
    assert step["localized"] == {"entropy": len(suffixes) // 4}


def test_entropy_reset_takes_the_mean_not_the_sum(policy):
    """A short thought of surprisal 3 beats a long one of 2 a token."""
    (task,) = policy.tasks(2, 1)
    program = load_program(f"{IDEAS}:entropy_reset")(task)
    (request,) = next(program)
    base = []
    for _ in range(request.n):
        tokens, logps = [5, 6, 7, 8, 9], [-2.0, -2.0, -2.0, -2.0, -3.0]
        record = Rollout(0, "base", task.prompt_ids, tokens, logps, [4, 5], "answer", reward=0.0)
        base.append(record)
    (request,) = program.send([base])
    assert request.reset == 2 and request.prefix_ids == [5, 6, 7, 8]


def test_entropy_reset_without_a_failure_is_grpo(tmp_path, monkeypatch):
    trained, step = trained_by("entropy_reset", tmp_path, monkeypatch, "--correct", "0")
    assert [r.group for r in trained] == [(slot, 0) for slot in range(4) for _ in range(8)]
    assert {r.purpose for r in trained} == {"base"} and step["tokens"]["suffix"] == 0
    for slot in range(4):
        rewards = np.array([r.reward for r in trained if r.group == (slot, 0)])
        advantages = np.array([r.advantages[0] for r in trained if r.group == (slot, 0)])
        assert np.allclose(advantages * rewards.std(), rewards - rewards.mean())
    assert step["trained_tokens"] > 0


def test_review_credit_blames_from_the_named_thought_on(tmp_path, monkeypatch):
    """Where the policy names no thought of the response, the fallback blames all of it."""
    flags = ["--localize_fallback", "first"]
    trained, step = trained_by("review_credit", tmp_path, monkeypatch, *flags)
    named = []
    for r in trained:
        H = len(r.thought_ends)
        if r.reward == 1:
            assert r.advantages == [1] * H and r.localization is None
            continue
        (number,) = re.findall(r"\\boxed\{ (\d+) \}", r.localization.text)
        h = int(number) if 1 <= int(number) <= H else 1
        assert r.advantages == [0] * (h - 1) + [-1] * (H - h + 1)
        named.append(h)
    assert len(trained) == 32 and 0 < len(named) < 32 and max(named) > 1
    assert step["tokens"]["localization"] > 0
    assert step["trained_tokens"] == sum(r.generated for r in trained)
    assert step["grad_norm"] > 0
