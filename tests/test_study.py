"""The study: its statistics on made numbers, its commands on small sizes with real runs."""

import dataclasses

import numpy as np
import pytest
from test_eval import make_run

import loss
import study
from data import curves, runs
from data.driver import run_programs
from data.faults import UserError
from rollout import grpo
from srpo import parse


def test_variants_are_different_settings_of_one_size():
    seen = []
    for name, flags in study.STUDY.items():
        cfg = parse(flags.split())
        assert cfg.base + cfg.prefixes * cfg.suffixes == 8, name
        assert cfg not in seen, name
        seen.append(cfg)


def test_claims_and_panels_name_variants_that_exist():
    outcome_fields = [field.name for field in dataclasses.fields(study.Outcome)]
    for claim in study.CLAIMS:
        assert claim.first in study.STUDY and claim.second in study.STUDY
        assert claim.measure in outcome_fields
        assert claim.second_measure is None or claim.second_measure in outcome_fields
    for panel in study.PANELS:
        for curve in panel.curves:
            assert curve.variant in study.STUDY
    assert set(study.SIGNAL_VARIANTS + study.DRAWN_VARIANTS) <= set(study.STUDY)
    assert {study.tuned_variant(name) for name in study.STUDY} <= set(study.STUDY)


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(200):
        mean, low, high = curves.interval(rng.normal(3.0, 1.0, 20), resamples=400)
        assert low <= mean <= high
        hits.append(low <= 3.0 <= high)
    assert 0.88 <= np.mean(hits) <= 0.99


def test_pairing_removes_what_seeds_share():
    seeds = np.arange(8.0)
    together = study.estimate(np.stack([seeds + 0.1, seeds], 1), study.difference)
    assert together.value == pytest.approx(0.1)
    assert (together.low, together.high) == pytest.approx((0.1, 0.1))


def test_claims(tmp_path):
    """SRPO reaches 0.5 in half the steps, RRPO equals GRPO, and the verifier's seeds disagree."""
    named = {"grpo": [], "rrpo 1x4": [], "srpo 1x4": [], "srpo 1x4 verifier": []}
    for seed in range(4):
        disagreeing = 0.8 + 0.1 * (-1) ** seed
        rates = {
            "grpo": (0.0, 0.1, 0.2, 0.3, 0.6),
            "rrpo 1x4": (0.0, 0.1, 0.2, 0.3, 0.61),
            "srpo 1x4": (0.0, 0.6, 0.7, 0.8, 0.8),
            "srpo 1x4 verifier": (0.0, 0.6, 0.7, 0.8, disagreeing),
        }
        for name, members in named.items():
            folder = make_run(tmp_path / f"{name}-{seed}", seed, rates[name])
            members.append(runs.read_run(folder))
    outcomes = {}
    for name, members in named.items():
        outcomes[name] = [study.outcome(run, 0.5) for run in members]
    finals = [outcomes[name][0].final for name in ("grpo", "rrpo 1x4", "srpo 1x4")]
    assert finals == [0.6, 0.61, 0.8]

    verdicts = {}
    for row in study.claim_rows(outcomes, 0.5):
        verdicts[row["claim"]] = row["verdict"]
    assert verdicts["SRPO ends above RRPO"] == "reproduced"
    assert verdicts["SRPO ends above GRPO"] == "reproduced"
    assert verdicts["RRPO ends about where GRPO does (within 0.05)"] == "reproduced"
    assert verdicts["SRPO reaches 0.5 in half the steps of GRPO or fewer (ratio)"] == "reproduced"
    assert verdicts["ours: the exact localizer ends above the policy's own"] == "unclear"
    assert "1x4 ends above 2x4" not in verdicts  # 2x4 was not run

    rows = study.against_grpo_rows(outcomes, 0.5)
    (row,) = [row for row in rows if row["against grpo, 95% interval"] == "srpo 1x4"]
    assert row["final pass rate, difference"] == "0.200 (0.200 to 0.200)"
    grpo_steps = curves.first_reach(named["grpo"][0].lines, 0.5, "step")
    srpo_steps = curves.first_reach(named["srpo 1x4"][0].lines, 0.5, "step")
    times = f"{grpo_steps / srpo_steps:.3f}"
    assert row["steps to 0.5: grpo / it"] == f"{times} ({times} to {times})"
    assert row["seeds that reached 0.5"] == "4 of 4"


def test_costs_are_summed_over_phases(tmp_path):
    run = runs.read_run(make_run(tmp_path / "r", 0, (0.0, 0.1)))
    table = curves.cost_table({"srpo 1x4": [run]})
    assert "| per step | seconds | base | train |" in table
    assert "| srpo 1x4 | 4.00 | 1.00 | 3.00 |" in table


COMMON = (
    "--data chain-2 --steps 2 --eval_every 1 --prompts_per_step 4 --grid 0.001 --target 0.9 "
    "--jobs 2 --benchmark_problems 16"
)


def test_study_trains_goes_on_and_concludes(tmp_path, capsys):
    """Two real runs; the same command again does nothing anew; other settings are refused."""
    command = ["study", "--out", str(tmp_path), "--seeds", "1", *COMMON.split()]
    command += ["--variants", "grpo", "srpo 1x4"]
    command += ["--flags", "--eval_problems 16 --max_thoughts 3"]
    study.main(command)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.log")}
    assert sorted(path.name for path in before) == ["before.log", "grpo-0.log", "srpo-1x4-0.log"]
    study.main(command)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.log")}
    text = (tmp_path / "study.md").read_text()
    assert "Before training: pass rate 0." in text
    assert "| per step | seconds |" in text
    assert "held-out evaluations during training" in text and "16 held-out problems" in text
    (claim,) = [row for row in text.splitlines() if row.startswith("| SRPO ends above GRPO |")]
    assert claim.endswith("(nan to nan) | unclear |")  # one seed cannot tell
    for picture in ("study.png", "ablations.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    for name, method in (("grpo-0", "grpo"), ("srpo-1x4-0", "srpo")):
        config = runs.read_run(tmp_path / name).config
        assert config["method"] == method and config["lr"] == 0.001
        assert config["steps"] == 2 and config["max_thoughts"] == 3
    with pytest.raises(UserError, match="other settings"):
        study.main([*command, "--steps", "3"])


def test_a_failing_run_stops_the_study_and_names_its_log(tmp_path):
    command = ["study", "--out", str(tmp_path), "--data", "chain-99", "--variants", "grpo"]
    command += ["--seeds", "1", "--grid", "0.001"]
    with pytest.raises(UserError, match="before.log"):
        study.main(command)


def test_sweep_chooses_the_rate_with_the_highest_mean():
    assert study.best_learning_rate({1e-3: [0.1, 0.4], 1e-4: [0.3, 0.3]}) == 1e-4
    assert study.best_learning_rate({1e-3: []}) == 1e-3  # nothing to choose: no runs


def test_thought_signals_are_weights_times_surprise(policy):
    (task,) = policy.tasks(4, 1, base=8)
    (group,) = run_programs([grpo(task)], policy.engine).results
    for i, rollout in enumerate(group):
        rollout.reward = float(i < 2)
    loss.set_advantages(group)
    rollout = group[0]
    rollout.prefix_len = rollout.thought_ends[0]  # as if its first thought were a shared prefix
    signals = study.thought_signals(rollout, 8)
    assert signals[0] is None and len(signals) == len(rollout.thought_ends)
    weight = rollout.advantages[1] / (8 * (len(rollout.token_ids) - rollout.prefix_len))
    logps = rollout.logps[rollout.thought_ends[0] : rollout.thought_ends[1]]
    assert signals[1] == pytest.approx(np.mean([weight * (1 - np.exp(logp)) for logp in logps]))


def test_signal_runs(capsys):
    command = "signal --data chain-3 --repeats 2 --prompts 4 --variants grpo".split()
    study.main([*command, "srpo 1x4"])
    out = capsys.readouterr().out
    assert "| grpo |" in out and "| srpo 1x4 |" in out


def test_signal_says_what_it_cannot_measure(tmp_path):
    with pytest.raises(UserError, match="--repeats must be at least 2"):
        study.main(["signal", "--repeats", "1"])
    data = tmp_path / "problems.jsonl"
    data.write_text('{"question": "1 + 1?", "answer": "2", "kind": "integer"}\n')
    with pytest.raises(UserError, match="needs a step checker"):
        study.main(["signal", "--data", str(data), "--variants", "srpo 1x4 verifier"])


def test_anatomy_runs(tmp_path):
    study.main(["anatomy", "--data", "chain-4", "--out", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").stat().st_size > 10_000
    command = "anatomy --data chain-12 --problems 1 --out".split()
    with pytest.raises(UserError, match="raise --problems"):
        study.main([*command, str(tmp_path / "b.png")])
