"""The study: its statistics on made numbers, its commands on small sizes with real runs."""

import json

import numpy as np
import pytest
import study
from test_eval import make_run

import loss
from data import curves, runs
from data.faults import UserError
from srpo import parse


def test_variants_are_named_as_their_runs_are():
    for name, flags in study.STUDY.items():
        assert runs.name_of(vars(parse(flags.split()))) == name


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
    together = curves.interval(
        np.stack([seeds + 0.1, seeds], 1), lambda x: x[:, 0].mean() - x[:, 1].mean()
    )
    assert together == pytest.approx((0.1, 0.1, 0.1))


def test_claims(tmp_path):
    """SRPO is made to reach 0.5 in half the steps, RRPO to equal GRPO: the table says so, and says "unclear" where seeds disagree."""
    finals = {"grpo": 0.6, "rrpo 1x4": 0.61, "srpo 1x4": 0.8}
    runs = []
    for seed in range(4):
        runs.append(
            make_run(tmp_path / f"g{seed}", seed, (0.0, 0.1, 0.2, 0.3, 0.6), "grpo", prefixes=0)
        )
        runs.append(make_run(tmp_path / f"r{seed}", seed, (0.0, 0.1, 0.2, 0.3, 0.61), "rrpo"))
        runs.append(make_run(tmp_path / f"s{seed}", seed, (0.0, 0.6, 0.7, 0.8, 0.8)))
        runs.append(
            make_run(
                tmp_path / f"d{seed}",
                seed,
                (0.0, 0.6, 0.7, 0.8, 0.8 + 0.1 * (-1) ** seed),
                seed_choice="deepest",
            )
        )
    named = curves.by_name(runs)
    assert {
        name: members[0][2][-1]["eval_pass_rate"]
        for name, members in named.items()
        if name in finals
    } == finals
    verdict = {
        row.split(" | ")[0][2:]: row.split(" | ")[2][:-2]
        for row in study.claims_table(named, 0.5).splitlines()[2:]
    }
    assert verdict["SRPO ends above RRPO"] == verdict["SRPO ends above GRPO"] == "reproduced"
    assert verdict["RRPO ends about where GRPO does (within 0.05)"] == "reproduced"
    assert verdict["SRPO reaches 0.5 in half the steps of GRPO or fewer (ratio)"] == "reproduced"
    assert verdict["ours: the deepest seed ends above the first"] == "unclear"
    assert "1x4 ends above 2x4" not in verdict
    row = next(
        row for row in study.against_grpo(named, 0.5).splitlines() if row.startswith("| srpo 1x4 |")
    )
    steps = [
        curves.first_reach(members[0][2], 0.5, "step")
        for members in (named["grpo"], named["srpo 1x4"])
    ]
    assert "| 0.200 (0.200 to 0.200) | {0:.3f} ({0:.3f} to {0:.3f}) |".format(
        steps[0] / steps[1]
    ) in row and row.endswith("| 4 of 4 |")


def test_costs_are_summed_over_phases(tmp_path):
    table = curves.cost_table(curves.by_name([make_run(tmp_path / "r", 0, (0.0, 0.1))]))
    assert (
        "| per step | seconds | base | train |" in table
        and "| srpo 1x4 | 4.00 | 1.00 | 3.00 |" in table
    )


def test_study_trains_goes_on_and_concludes(tmp_path, capsys):
    """Two real runs; the same command again does nothing anew; a third seed is added to them."""
    common = ["study", "--out", str(tmp_path), "--data", "chain-2", "--variants", "grpo", "srpo 1x4", "--steps", "2", "--eval_every", "1", "--prompts_per_step", "4",
              "--grid", "0.001", "--target", "0.9", "--jobs", "2", "--benchmark_problems", "16", "--flags", "--eval_problems 16 --max_thoughts 3"]  # fmt: skip
    study.main([*common, "--seeds", "1"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.log")}
    assert sorted(path.name for path in before) == ["before.log", "grpo-0.log", "srpo-1x4-0.log"]
    study.main([*common, "--seeds", "1"])
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.log")}
    text = (tmp_path / "study.md").read_text()
    assert "| per step | seconds |" in text
    (claim,) = [row for row in text.splitlines() if row.startswith("| SRPO ends above GRPO |")]
    assert claim.endswith("(nan to nan) | unclear |")  # one seed cannot tell
    assert (tmp_path / "study.png").stat().st_size > 10_000 and (
        tmp_path / "ablations.png"
    ).stat().st_size > 10_000
    configs = [
        json.loads((tmp_path / name / "config.json").read_text())
        for name in ("grpo-0", "srpo-1x4-0")
    ]
    assert [c["method"] for c in configs] == ["grpo", "srpo"] and all(
        c["lr"] == 0.001 and c["steps"] == 2 and c["max_thoughts"] == 3 for c in configs
    )
    assert "Before training: pass rate 0." in text
    with pytest.raises(UserError, match="other settings"):
        study.main([*common, "--seeds", "1", "--steps", "3"])


def test_a_failing_run_stops_the_study_and_names_its_log(tmp_path):
    with pytest.raises(UserError, match="before.log"):
        study.main(
            [
                "study",
                "--out",
                str(tmp_path),
                "--data",
                "chain-99",
                "--variants",
                "grpo",
                "--seeds",
                "1",
                "--grid",
                "0.001",
            ]
        )


def test_thought_signals_are_weights_times_surprise(policy):
    (task,) = policy.tasks(4, 1, base=8)
    (group,) = study.run_programs([study.PROGRAMS["grpo"](task)], policy.engine).results
    for i, r in enumerate(group):
        r.reward = float(i < 2)
    loss.set_advantages(group)
    r = group[0]
    r.prefix_len = r.thought_ends[0]  # as if its first thought were a shared prefix
    signals = study.thought_signals(r, 8)
    assert signals[0] is None and len(signals) == len(r.thought_ends)
    n = len(r.token_ids) - r.prefix_len
    span = range(r.thought_ends[0], r.thought_ends[1])
    assert signals[1] == pytest.approx(
        np.mean([r.advantage / (8 * n) * (1 - np.exp(r.logps[t])) for t in span])
    )


def test_signal_and_anatomy_run(tmp_path, capsys):
    study.main(
        [
            "signal",
            "--data",
            "chain-3",
            "--repeats",
            "2",
            "--prompts",
            "4",
            "--variants",
            "grpo",
            "srpo 1x4",
        ]
    )
    out = capsys.readouterr().out
    assert "| grpo |" in out and "| srpo 1x4 |" in out
    study.main(["anatomy", "--data", "chain-4", "--out", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").stat().st_size > 10_000
    with pytest.raises(UserError, match="raise --problems"):
        study.main(
            ["anatomy", "--data", "chain-12", "--problems", "1", "--out", str(tmp_path / "b.png")]
        )
