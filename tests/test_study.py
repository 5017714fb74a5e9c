"""The study: its arms, its statistics on made numbers, and a real run."""

import inspect
import json
from dataclasses import asdict, replace
from itertools import chain

import numpy as np
import pytest
import torch
from sgd import FixedLength
from test_eval import make_run
from warm import WarmAdamW

from conftest import ROOT
from data import curves, runs
from data.driver import run_programs
from data.faults import UserError
from data.metrics import step_metrics
from data.programs import load_program, trained_rollouts
from localize import parse_localization
from loss import set_advantages
from srpo import parse
from tests import study, study_tables

MADE = study.Result(
    slice="default",
    arm="grpo",
    data="chain-12",
    seed=0,
    steps=20,
    lr=5e-4,
    commit="0",
    date="2026-11-24",
    cpu_seconds=1.0,
    curve=[study.Point(0, 0, 0, 0, 0.0, 0.0), study.Point(10, 100, 50, 8, 1.0, 0.2)]
    + [study.Point(20, 200, 80, 16, 3.0, 0.4)],
    pass_rate=0.4,
    pass_at_8=0.8,
    tokens={"base": 200},
    trained_tokens=100,
    verifier_calls=10,
    seconds={"base": 1.0},
    flat_groups=[0.5, 0.1],
    entropy=[0.1, 0.05],
    exact=[None, None],
    clean=[None, None],
    right_after_clean=None,
    right_after_erroneous=None,
    walks=[[0, 0], [0, 0]],
)


def made(arm: str, rates: list[float], **changes) -> list[study.Result]:
    """Runs of one arm that end at these pass rates: one for each seed."""
    results = []
    for seed, rate in enumerate(rates):
        start, middle, end = MADE.curve
        curve = [start, replace(middle, pass_rate=rate / 2), replace(end, pass_rate=rate)]
        if changes.get("slice") == "hard":
            changes["data"] = study.HARD
        changes |= {"arm": arm, "seed": seed, "pass_rate": rate, "curve": curve}
        results.append(replace(MADE, **changes))
    return results


# ------------------------------------------------------------------------------------------- plan


def test_arms_are_different_settings():
    seen = []
    for name, arm in study.ARMS.items():
        cfg = parse(arm.flags.split())
        assert (arm.script, cfg) not in seen, name
        seen.append((arm.script, cfg))
        assert arm.rate_of is None or arm.rate_of in study.ARMS


def test_slices_name_arms_that_a_sweep_covers():
    swept = set()
    for name, part in study.SLICES.items():
        assert set(part.arms) <= set(study.ARMS), name
        if name.startswith("sweep"):
            swept |= set(part.arms)
    for name, part in study.SLICES.items():
        for arm in part.arms:
            assert part.lr or (study.ARMS[arm].rate_of or arm) in swept, (name, arm)
    for claim in study_tables.CLAIMS:
        assert claim.first in study.ARMS and claim.second in study.ARMS


def test_a_slice_may_give_the_rate():
    job, other = study.jobs_of("smollm2-pilots-5e-5", [])  # without any sweep
    assert job.lr == other.lr == 5e-5 and (job.arm, other.arm) == ("grpo", "walk 4 rounds")
    command = study.train_command(job, study.ROOT / "run", resume=False)
    cfg = parse(command[2:])
    assert (cfg.model, cfg.dtype, cfg.lr, cfg.steps) == ("smollm2", "bfloat16", 5e-5, 6)
    assert cfg.lora_rank == 0
    job, _ = study.jobs_of("smollm2-pilots-1e-4", [])
    assert parse(study.train_command(job, study.ROOT / "run", resume=False)[2:]).lora_rank == 8


def test_the_plan_says_how_large_a_benchmark_is():
    plan = (ROOT / "tests" / "study.md").read_text()
    assert study.EMBEDDED.benchmark == "--problems 256"
    assert "pass rate of the last checkpoint (256 held-out problems x 8" in plan


# -------------------------------------------------------------------------------------- controls


@pytest.mark.parametrize(
    "name", ["walk_half", "success_alone", "true_solution", "chained_groups", "more_samples"]
)
def test_a_control_trains_what_it_says(policy, name):
    """On problems that the policy seldom solves, with everything that a control may need."""
    program = load_program(f"tests/arms.py:{name}")
    tasks = policy.tasks(6, 8, base=4, rounds=8, localize_fallback="random")
    sampled = run_programs([program(task) for task in tasks], policy.engine)
    rollouts = trained_rollouts(name, sampled)
    for task, mine in zip(tasks, sampled.results):
        base = [r for r in mine if r.purpose == "base"]
        others = [r for r in mine if r.purpose != "base"]
        assert len(base) == 4
        if not all(task.failed(rollout) for rollout in base):
            assert {rollout.purpose for rollout in others} <= {"more"}
            continue
        if name in ("walk_half", "success_alone"):
            assert all(r.reward == 1 and r.trained_from == 0 for r in others) and len(others) <= 1
        if name == "success_alone" and others:
            assert others[0].advantages[0] == pytest.approx(2)  # of 1, 0, 0, 0, 0
            assert all(not any(r.advantages) for r in base)
        if name == "true_solution":
            (truth,) = others
            assert truth.reward == 1 and truth.trained_from == 0
            assert task.first_wrong(truth) is None
        if name == "chained_groups":
            assert len(others) % 4 == 0 and all(r.trained_from is None for r in others)
            assert all(task.failed(r) for r in others[:-4])  # a success ends it
        if name == "more_samples":
            assert all(task.failed(r) for r in others[:-1]) and len(others) <= 8
    assert any(r.reward == 1 for r in rollouts)


def test_half_of_the_resets_are_at_random(policy):
    program = load_program("tests/arms.py:walk_half")
    tasks = policy.tasks(8, 16, base=4, rounds=8, localize_fallback="random")
    generated = run_programs([program(task) for task in tasks], policy.engine).generated
    hows = [rollout.localized for rollout in generated if rollout.purpose == "walk"]
    at_random = hows.count("random") / len(hows)
    assert len(hows) > 40 and 0.25 < at_random < 0.75


# ------------------------------------------------------------------------------ ideas for the walk

HARD_TASKS = dict(
    localizer="self", base=4, rounds=12, localize_fallback="random", localize_temperature=1.0
)


def sample_idea(policy, name: str, tasks):
    """What an idea trains for each task, and all that it sampled."""
    program = load_program(f"tests/better.py:{name}")
    sampled = run_programs([program(task) for task in tasks], policy.engine)
    trained_rollouts(name, sampled)  # refuses what cannot be trained
    return sampled


def test_the_latest_failure_is_walked_first(policy):
    """The first reset is of the failure whose review names the latest thought."""
    tasks = policy.tasks(8, 12, **HARD_TASKS)
    sampled = sample_idea(policy, "latest", tasks)
    deeper = 0
    for task, mine in zip(tasks, sampled.results):
        base = [r for r in mine if r.purpose == "base"]
        if not all(task.failed(rollout) for rollout in base):
            continue
        walked = [r for r in sampled.generated if r.purpose == "walk"]
        (first,) = [r for r in walked if any(r.seed is b for b in base)]
        named = {id(b): parse_localization(b.localization.text, 13)[0] or 0 for b in base}
        if all(named.values()):
            assert first.reset == max(named.values())
            deeper += first.reset > named[id(base[0])]
    assert deeper > 0


def test_an_unfinished_walk_goes_on(policy):
    tasks = policy.tasks(6, 12, **HARD_TASKS | {"rounds": 1})
    better = inspect.getmodule(load_program("tests/better.py:kept"))
    run_programs([better.kept(task) for task in tasks], policy.engine)
    unfinished = dict(better.UNFINISHED)
    assert unfinished
    again = run_programs([better.kept(task) for task in tasks], policy.engine)
    went_on = [r for r in again.generated if any(r.seed is u for u in unfinished.values())]
    assert went_on and not any(r.seed is b for r in went_on for b in again.generated)
    for rollout in went_on:
        assert rollout.purpose == "walk" and rollout.trained_from in (None, 0)


def test_advantages_by_the_mean(policy):
    tasks = policy.tasks(8, 8, **HARD_TASKS)
    groups = sample_idea(policy, "by_mean", tasks).results
    seen = set()
    for members in groups:
        right = sum(rollout.reward for rollout in members)
        for rollout in members:
            n = len(members)
            expected = (n / right if rollout.reward else 0) - 1 if right else 0
            assert rollout.advantages == pytest.approx([expected] * len(rollout.thought_ends))
        seen.add(right)
    assert len(seen) > 1


def test_reviews_are_rewarded_by_what_their_resets_gained(policy):
    tasks = policy.tasks(6, 24, **HARD_TASKS)
    sampled = sample_idea(policy, "rewarded_reviews", tasks)
    set_advantages(list(chain(*sampled.results)))
    taught = 0
    for mine in sampled.results:
        reviews = [r for r in mine if r.purpose == "localization"]
        if not reviews:
            continue
        assert len(reviews) == 4 and len({tuple(r.prompt_ids) for r in reviews}) == 1
        advantages = [review.advantages[0] for review in reviews]
        assert sum(advantages) == pytest.approx(0, abs=1e-6)
        taught += max(advantages) > 0
    assert taught > 0
    step_metrics(list(chain(*sampled.results)), sampled.generated, tasks)  # has room for them


# ------------------------------------------------------------------------------------ statistics


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = {"t": [], "bootstrap": []}
    for _ in range(400):
        _, low, high = study_tables.t_interval(rng.normal(3.0, 1.0, 5))
        hits["t"].append(low <= 3.0 <= high)
    for _ in range(200):
        _, low, high = curves.interval(rng.normal(3.0, 1.0, 20), resamples=400)
        hits["bootstrap"].append(low <= 3.0 <= high)
    assert 0.92 <= np.mean(hits["t"]) <= 0.98
    assert 0.88 <= np.mean(hits["bootstrap"]) <= 0.99


def test_pairing_removes_what_seeds_share():
    pair = study_tables.Pair(made("walk", [0.5, 0.6, 0.9]), made("grpo", [0.4, 0.5, 0.8]))
    assert pair.difference().interval() == pytest.approx((0.1, 0.1, 0.1))


def test_pairs_of_problems(tmp_path, monkeypatch):
    """What one seed gains and another loses is zero, with an interval over problems."""
    untrained = tmp_path / "untrained.jsonl"
    untrained.write_text("")
    monkeypatch.setattr(study_tables, "UNTRAINED", untrained)
    ours = made("walk", [0.5, 0.5], right=[4, 8, 0, 5], certified=15, distinct=6)
    theirs = made("grpo", [0.5, 0.5], right=[3, 7, 0, 4], certified=10, distinct=4)
    theirs[1].right, ours[1].right = ours[1].right, theirs[1].right
    one = study_tables.Pair(ours[:1], theirs[:1]).over_problems()
    assert one.value == pytest.approx(3 / 32) and 0 < one.low < one.high <= 1 / 8
    both = study_tables.Pair(ours, theirs).over_problems()
    assert both.value == pytest.approx(0) and both.low < 0 < both.high

    first, second = study_tables.benchmark_rows({"grpo": theirs, "walk": ours})
    assert first["minus grpo's, over problems"] == first["minus untrained's, over seeds"] == ""
    assert second["minus grpo's, over problems"] == study_tables.between_ends(both)
    assert second["right responses"] == "31" and second["every step checks"] == f"{30 / 31:.3f}"
    assert second["different texts of a solved problem"] == "2.000"

    # Seed 0 has 4, 8, 0 and 5 right, now beside 1, 5, 0 and 3; of seed 7 there is no run.
    lines = []
    for seed in (0, 7):
        before = study.Untrained(seed, right=[1, 5, 0, 3], certified=6, distinct=4)
        lines.append(json.dumps(asdict(before)) + "\n")
    untrained.write_text("".join(lines))
    ours[0].pass_rate, ours[0].pass_at_8 = 17 / 32, 3 / 4
    before, after = study_tables.benchmark_rows({"walk": ours[:1]})
    assert (before["pass@1 (95%)"], before["pass@8"]) == ("0.281", "0.750")
    assert (before["every step checks"], before["right responses"]) == ("0.667", "9")
    assert after["minus untrained's, over seeds"] == "0.250"
    assert after["minus untrained's, over problems"].startswith("0.250 (")
    assert after["pass@8 minus untrained's, over seeds"] == "0.000"


def test_reach_is_linear_between_evaluations_and_a_lower_bound():
    reach = study_tables.reach(MADE, target=0.3)
    assert (reach.reached, reach.steps, reach.tokens) == (True, 15, 150)
    assert reach.cpu == pytest.approx(2 * 1.0 / 3)  # the run's one CPU second took 3 by the clock
    reach = study_tables.reach(MADE, target=0.9)
    assert reach == study_tables.Reach(False, steps=20, tokens=200, cpu=1.0)


def test_savings_are_bounds_where_a_run_never_gets_there():
    fast, slow = made("walk", [0.8, 0.8, 0.8]), made("grpo", [0.4, 0.4, 0.4])
    never = made("grpo", [0.4, 0.1, 0.4])
    assert str(study_tables.Pair(fast, slow).saving("tokens")) == "2.00 (2.00 to 2.00)"
    assert str(study_tables.Pair(fast, never).saving("tokens")).startswith("> ")
    assert str(study_tables.Pair(never, fast).saving("tokens")).startswith("< ")
    assert str(study_tables.Pair(never, never).saving("tokens")) == "-"
    assert str(study_tables.Pair(fast, slow).at_equal("cpu")) == "0.400 (0.400 to 0.400)"
    for result in slow:
        result.cpu_seconds = None  # resumed: nobody knows
    assert str(study_tables.Pair(fast, slow).saving("cpu")) == ""
    assert str(study_tables.Pair(fast, slow).at_equal("cpu")) == ""
    assert str(study_tables.Pair(slow, fast).at_equal("cpu")) == ""


def test_one_or_two_seeds_have_no_interval():
    pair = study_tables.Pair(made("walk", [0.5, 0.7]), made("grpo", [0.4, 0.5]))
    assert str(pair.difference()) == "0.100, 0.200"
    claim = study_tables.Claim("above", "walk", "grpo")
    assert study_tables.verdict(pair.difference(), claim) == "undecided"


def test_claims():
    results = made("grpo", [0.4, 0.41, 0.4]) + made("rrpo", [0.4, 0.4, 0.41])
    results += made("srpo", [0.3, 0.31, 0.3]) + made("srpo 2x4", [0.1, 0.5, 0.3])
    results += made("srpo unmasked", [0.31, 0.3, 0.31]) + made("grpo", [0.1] * 3, slice="hard")
    results += made("walk", [0.8] * 3, slice="hard")
    verdicts = {row["claim"]: row["verdict"] for row in study_tables.claim_rows(results)}
    assert verdicts["**SRPO ends above GRPO**"] == "not so here"
    assert verdicts["RRPO ends within 0.05 of GRPO"] == "seen here"
    assert verdicts["1x4 ends above 2x4"] == "undecided"
    assert verdicts["masking the prefix helps"] == "no difference"
    fewer = "**ours: the walk needs fewer tokens than GRPO (times)**"
    assert verdicts[fewer] == "seen here"  # GRPO never gets there: a lower bound
    assert "1x4 ends above 1x8" not in verdicts  # 1x8 was not run


def test_a_bound_leaves_an_end_open():
    claim = study_tables.Claim("fewer", "walk", "grpo", by="tokens", low=1.5)
    for bound, ends, said in ((">", (1.8, np.inf), "seen here"), ("<", (0, 2.2), "undecided")):
        compared = study_tables.Compared([1.9, 2.0, 2.1], is_ratio=True, marks=["", bound, bound])
        _, *measured = compared.interval()
        assert measured == pytest.approx(ends, abs=0.1)
        assert study_tables.verdict(compared, claim) == said
    two = study_tables.Compared([1.06, 1.7], is_ratio=True, marks=["", ">"])
    assert str(two) == "1.06, > 1.70"


def test_where_only_some_runs_learn_all_are_printed():
    assert (
        study_tables.rates_in_words([0.5, 0.0, 0.4], [True, False, True]) == "0.500, 0.000, 0.400"
    )
    assert study_tables.rates_in_words([0.0, 0.0, 0.01], [False] * 3) == "0.003 (0.000 to 0.018)"
    floor = made("srpo", [0.0, 0.01, 0.0]) + made("grpo", [0.01, 0.0, 0.0])
    verdicts = {row["claim"]: row["verdict"] for row in study_tables.claim_rows(floor)}
    assert verdicts["**SRPO ends above GRPO**"] == "neither learns"


def test_sweep_extends_its_grid_until_the_best_is_inside():
    def with_rates(rates: dict[float, float]) -> list[study.Result]:
        results = []
        for lr, rate in rates.items():
            results += made("grpo", [rate, rate], slice="sweep", lr=lr)
        return results

    inside = with_rates({2.5e-4: 0.1, 5e-4: 0.3, 1e-3: 0.2})
    assert study.grid_of("grpo", inside) == study.GRID
    assert study.best_rate("grpo", inside) == 5e-4 == study.best_rate("grpo", inside)
    edge = with_rates({2.5e-4: 0.1, 5e-4: 0.2, 1e-3: 0.3})
    assert study.grid_of("grpo", edge) == [*study.GRID, 2e-3]
    with pytest.raises(UserError, match="sweep of grpo is not complete"):
        study.best_rate("grpo", edge)
    assert study.best_rate("grpo", edge + with_rates({2e-3: 0.2})) == 1e-3


def test_costs_are_summed_over_phases(tmp_path):
    run = runs.read_run(make_run(tmp_path / "r", 0, (0.0, 0.1)))
    table = curves.cost_table({"srpo 1x4": [run]})
    assert "| per step | seconds | base | train |" in table
    assert "| srpo 1x4 | 4.00 | 1.00 | 3.00 |" in table


# ------------------------------------------------------------------------------------- commands


def test_study_trains_goes_on_and_prints(tmp_path, capsys, monkeypatch):
    """A real run at the sweep's rate; it is not trained again, and resumed where it was cut off."""
    monkeypatch.setattr(study, "SWEEP_SEEDS", 1)
    monkeypatch.setattr(study, "grid_of", lambda arm, results: [1e-3])
    small = study.Setup("--eval_every 0", "--problems 8")
    part = study.Slice(["grpo"], "chain-2", range(1), 2, small)
    monkeypatch.setattr(study, "SLICES", {"sweep": part, "default": part})
    monkeypatch.setattr(study_tables, "SLICES", study.SLICES)
    monkeypatch.setattr(study_tables, "PANELS", {"chain-2": "two steps"})
    lines = tmp_path / "study.jsonl"
    (swept,) = made("grpo", [0.4], slice="sweep", lr=1e-3)
    lines.write_text(json.dumps(asdict(swept)) + "\n")
    where = ["--lines", str(lines), "--out", str(tmp_path / "runs")]
    study.main(["default", *where])
    _, result = study.read_results(lines)
    assert (result.steps, result.lr, result.arm) == (2, 1e-3, "grpo")
    first, last = result.curve
    assert (first.step, first.generated, last.step) == (0, 0, 2) and 0 <= result.pass_at_8 <= 1
    assert last.generated == sum(result.tokens.values()) and last.verifier_calls == 512
    assert last.trained == result.trained_tokens and last.seconds > 0
    assert result.cpu_seconds > 1 and result.verifier_calls == 512
    assert np.mean(result.right) / 8 == pytest.approx(result.pass_rate, abs=1e-4)
    assert result.certified == sum(result.right) > 0  # no luck: a right box certifies its steps
    assert result.distinct == sum(n > 0 for n in result.right)  # a chain has one right text
    study.main(["default", *where])  # nothing is missing
    assert len(study.read_results(lines)) == 2
    lines.write_text(lines.read_text().splitlines()[0] + "\n")  # as if it had been cut off
    study.main(["default", *where])
    again = study.read_results(lines)[1]
    assert again.curve == result.curve and again.cpu_seconds is None
    page = tmp_path / "study.md"
    page.write_text("Plan\n<!-- tests/study_tables.py -->\n<!-- /tests/study_tables.py -->\nEnd\n")
    pages = ["--page", str(page), "--pictures", str(tmp_path)]
    study_tables.main(["--lines", str(lines), "--renew", *pages])
    row = "| grpo, 1 seed, 2 steps, 0.001 |"
    assert row in capsys.readouterr().out and row in page.read_text()
    assert page.read_text().startswith("Plan\n") and page.read_text().endswith("\nEnd\n")
    for picture in ("study.png", "study_costs.png"):
        assert (tmp_path / picture).stat().st_size > 10_000
    assert json.loads(lines.read_text().splitlines()[1])["arm"] == "grpo"


def test_a_failing_run_stops_the_study_and_names_its_log(tmp_path, monkeypatch):
    broken = {"sweep": study.Slice(["grpo"], "chain-99", range(1), 1)}
    monkeypatch.setattr(study, "SLICES", broken)
    command = ["sweep", "--lines", str(tmp_path / "a"), "--out", str(tmp_path / "runs")]
    with pytest.raises(UserError, match=r"failed; see .*\.log"):
        study.main(command)


def test_a_warm_start_of_the_learning_rate():
    """AdamW's first update is lr sign(g): a tenth of it is taken, then two, until all of it is."""
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = WarmAdamW([p], lr=0.1, weight_decay=0)
    moved = []
    for _ in range(12):
        before = p.item()
        p.grad = torch.ones(1)
        optimizer.step()
        moved.append(before - p.item())
    expected = [0.01 * min(n, 10) for n in range(1, 13)]
    assert moved == pytest.approx(expected, rel=1e-3)


def test_steps_along_the_plain_gradient_have_a_fixed_length():
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    (p.sum() * 5 + q.sum()).backward()
    FixedLength([p, q], lr=0.1).step()
    moved = torch.cat([1 - p.detach(), 1 - q.detach()])
    assert moved.norm() == pytest.approx(0.1, rel=1e-5)
    assert (moved[0] / moved[3]).item() == pytest.approx(5, rel=1e-4)
