"""Curves, tables and statistics of what was measured: training runs and benchmarks.

Runs with the same name and number of steps differ only in their random seed: they share one curve
and one table row. Intervals over seeds are Student's, over problems normal or bootstrap ones (which
say nothing where all problems are alike), and those of other shares Wilson's.

Left out: significance tests, and corrections for the number of comparisons.

Try it alone:  python eval.py curves RUN_DIR [RUN_DIR...]
"""

import math
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.faults import UserError
from data.lines import parse, read_json, read_text, write_lines
from data.problems import Problem
from data.runs import Run, name_of, read_run
from data.verifiers import KINDS

Named = dict[str, list[Run]]  # runs by name, one for each random seed

# A step line's keys for the horizontal axis: (label, divisor)
AXES = {
    "step": ("gradient steps", 1),
    "total_tokens": ("tokens generated in training, millions", 1e6),
    "trained_total": ("tokens in the loss, millions", 1e6),
    "seconds_total": ("training time without evaluations, seconds", 1),
}

# What a step spends its seconds on besides sampling, whose phases are the purposes of a method
WORK = ("grade", "wait", "train", "sync")

# Colours of advantages, the same in every picture and in data/report.html; fit for the colour-blind
POSITIVE, NEGATIVE = "#2166ac", "#b2182b"


def by_name(folders: list[Path]) -> Named:
    """Reads run directories and groups them by name. Raises UserError for one that is no run."""
    runs = [read_run(folder) for folder in without_twins(folders)]
    for run in runs:
        check_run(run)
    named = {}
    for name, run in zip(names_of(runs), runs):
        named.setdefault(name, []).append(run)
    return named


def without_twins(folders: list[Path]) -> list[Path]:
    """Each folder once, as it was named first."""
    by_place = {}
    for folder in map(Path, folders):
        by_place.setdefault(folder.resolve(), folder)
    return list(by_place.values())


def names_of(runs: list[Run]) -> list[str]:
    """A name for each run; runs share one if they differ in nothing but their random seed.

    Where runs have different numbers of steps, their names say so. Runs that also have the same
    seed are no two samples of one method: their names end with their folders.
    """
    steps_of = defaultdict(set)  # name -> the numbers of steps that its runs have
    for run in runs:
        steps_of[name_of(run)].add(str(run.config.get("steps")))
    names = []
    for run in runs:
        name = name_of(run)
        if len(steps_of[name]) > 1:
            name += f" steps={run.config.get('steps')}"
        names.append(name)
    seeds = [str(run.config.get("seed")) for run in runs]
    same = Counter(zip(names, seeds))
    distinct = []
    for name, seed, run in zip(names, seeds, runs):
        if same[name, seed] > 1:
            name += f" in {run.folder.resolve()}"
        distinct.append(name)
    return distinct


# What is read of a step line: numbers, or objects of numbers
NUMBERS = (
    "eval_pass_rate pass_base pass_suffix localized_exact trained_tokens response_tokens"
).split()
TABLES = ("tokens", "seconds", "counters", "eval_counters", "localized", "finish")
HUGE = 1e300  # an integer of a file may have thousands of digits, which no float holds


def check_run(run: Run) -> None:
    """Raises UserError for a run without step lines, and for what cannot be drawn of one."""
    if not has_types(run.config, {"name": str}) and not has_types(run.config, {"method": str}):
        raise UserError(f"{run.folder}/config.json: names no method; restore it")
    path = run.folder / "metrics.jsonl"
    for number, line in enumerate(run.lines, 1):
        if not is_step_line(line):
            raise UserError(f"{path}, line {number}: no step line of srpo.py; remove it")
    if not run.lines:
        raise UserError(f"{path}: holds no step line yet")


def is_step_line(line: dict) -> bool:
    values = [line.get(name) for name in NUMBERS]
    for name in TABLES:
        table = line.get(name, {})
        if not isinstance(table, dict):
            return False
        values += table.values()
    if not has_types(line, {"step": int, "total_tokens": int}):
        return False
    values += [line["step"], line["total_tokens"]]
    return all(x is None or isinstance(x, int | float) and not abs(x) > HUGE for x in values)


def evaluations(lines: list[dict]) -> list[dict]:
    """The step lines that hold a held-out pass rate."""
    return [line for line in lines if line.get("eval_pass_rate") is not None]


# ---------------------------------------------------------------------------------- statistics


class Interval(NamedTuple):
    """A statistic and its 95% interval: numbers, or arrays of one shape."""

    value: float
    low: float
    high: float


def mean_of_rows(values: np.ndarray) -> float:
    return values.mean(0)


def interval(values, statistic=mean_of_rows, resamples: int = 4000) -> Interval:
    """A statistic of `values` [rows, ...] with its 95% bootstrap interval over rows.

    A row is a problem, or a seed. Put everything that is paired by it into one row. With one row
    the bounds are nan: it says nothing about others."""
    values = np.asarray(values, float)
    n = len(values)
    if n == 1:
        return Interval(statistic(values), np.nan, np.nan)
    rng = np.random.default_rng(0)
    resampled = [statistic(values[rng.integers(n, size=n)]) for _ in range(resamples)]
    low, high = np.percentile(resampled, (2.5, 97.5), axis=0)
    return Interval(statistic(values), low, high)


# Quantiles of Student's t for a two-sided 95% interval, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def t_interval(values) -> Interval:
    """Mean of `values` [seeds, ...] and Student's 95% interval; the bounds are nan for one seed."""
    values = np.asarray(values, float)
    mean, freedom = values.mean(0), len(values) - 1
    if freedom == 0:
        return Interval(mean, np.nan, np.nan)
    quantile = T95.get(freedom, 1.96 + 2.4 / freedom + 2.8 / freedom**2)  # within 0.002 from 10 on
    half = quantile * values.std(0, ddof=1) / np.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def half_interval(values: np.ndarray) -> float:
    """Half of the normal 95% interval of a mean; nan for one value."""
    if len(values) < 2:
        return float("nan")
    return float(1.96 * values.std(ddof=1) / math.sqrt(len(values)))


def mean_with_interval(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {half_interval(values):.3f}"


def wilson(right: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of the share right / n.

    >>> [round(x, 3) for x in wilson(5, 10)]
    [0.237, 0.763]
    """
    z = 1.96
    p = right / n
    scale = 1 + z * z / n
    middle = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def share(right: int, n: int) -> str:
    """right / n in words, with its 95% interval."""
    if n == 0:
        return "none"
    low, high = wilson(right, n)
    return f"{right / n:.3f} ({low:.3f} to {high:.3f}, {right} of {n})"


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from c right ones of n.

    1 - C(n-c, k) / C(n, k).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def spread(values, form: str) -> str:
    """Mean ± standard deviation over seeds, of those that are not nan (those that got there).

    Of one value alone: the value."""
    values = np.array(values, float)
    reached = values[~np.isnan(values)]
    if len(reached) == 0:
        return "-"
    text = f"{reached.mean():{form}}"
    if len(reached) > 1:
        text += f" ± {reached.std(ddof=1):{form}}"
    missing = len(values) - len(reached)
    return f"{text} ({missing} not)" if missing else text


def first_reach(lines: list[dict], target: float, key: str) -> float:
    """Value of `key` where the held-out pass rate first reaches `target`; nan if it never does.

    Linear between evaluations. A run that starts there has reached it at its first one."""
    points = evaluations(lines)
    if points and points[0]["eval_pass_rate"] >= target:
        return points[0][key]
    for before, after in pairwise(points):
        y0, y1 = before["eval_pass_rate"], after["eval_pass_rate"]
        if y0 < target <= y1:
            x0, x1 = before[key], after[key]
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    return float("nan")


def final(run: Run) -> tuple[float, float]:
    """(pass rate, pass@8) at the end of a run: from its benchmark, where the study made one.

    Otherwise the last held-out pass rate, and nan."""
    path = run.folder / "benchmark" / "results.json"
    if path.exists():
        content = read_json(path)
        try:
            (result,) = content["results"].values()
            return float(result["mean"]), float(result["pass_at"]["8"])
        except (AttributeError, KeyError, TypeError, ValueError) as fault:
            raise UserError(
                f"{path}: not the results of one data set with --n of 8 or more "
                f"({type(fault).__name__}: {fault}); remove it"
            )
    measured = evaluations(run.lines)
    return measured[-1]["eval_pass_rate"] if measured else float("nan"), float("nan")


def processbench_scores(labels: list[int], named: list[int | None]) -> dict[str, str]:
    """Accuracy on erroneous and on correct solutions, and F1, their harmonic mean (ProcessBench).

    Of all solutions together; the published average is the mean F1 of its four subsets.
    labels: 0-based first wrong step, -1 for none. named: 1-based step, 0 for "no error", None for
    no answer, which is wrong. An erroneous solution needs its exact step, a correct one 0."""
    erroneous, correct = [], []
    for label, h in zip(labels, named):
        hit = h is not None and h == label + 1
        if label >= 0:
            erroneous.append(hit)
        else:
            correct.append(hit)
    a = np.mean(erroneous) if erroneous else float("nan")
    b = np.mean(correct) if correct else float("nan")
    f1 = "none: it needs erroneous and correct solutions"
    if erroneous and correct:
        f1 = f"{2 * a * b / (a + b) if a + b else 0.0:.3f}"
    return {
        "accuracy on erroneous": share(sum(erroneous), len(erroneous)),
        "accuracy on correct": share(sum(correct), len(correct)),
        "F1": f1,
    }


def by_chance(lengths: list[int]) -> str:
    """Accuracy of naming one of H steps at random, for the given H."""
    chance = np.mean([1 / H for H in lengths]) if lengths else float("nan")
    return f"{chance:.3f}"


def markdown(rows: list[dict]) -> str:
    """A Markdown table with the first row's keys as its columns."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [str(row[name]) for name in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def renew(page: Path, mark: str, text: str) -> None:
    """Puts a text between the two marks of a page, `<!-- mark -->` and `<!-- /mark -->`."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    page.write_text(f"{before}{begin}{text}\n{end}{after}", encoding="utf-8")


# ------------------------------------------------------------------------------------- picture


def pyplot():
    """matplotlib.pyplot without a window; imported here, so that training starts without it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_curves(named: Named, out: Path, axes=("step", "total_tokens")) -> None:
    """Draws the held-out pass rate against each of `axes` (keys of AXES).

    Runs of one name are drawn as their mean over seeds, with its 95% interval. A single run has
    the first of the axes only, since it looks alike by all, and the pass rates of its training
    rollouts too."""
    runs = list(chain.from_iterable(named.values()))
    alone = len(runs) == 1
    if alone:
        axes = axes[:1]
    columns = min(2, len(axes))
    rows = math.ceil(len(axes) / columns)
    plt = pyplot()
    size = (4 + 3 * columns, 3.8 * rows)
    width = 60 * columns  # characters of a line in the legend
    figure, grid = plt.subplots(
        rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    panels = dict(zip(axes, grid.ravel()))
    for number, (name, members) in enumerate(named.items()):
        label = label_of(name, members)
        if alone:
            label = f"held-out, {label}"
        draw_mean(panels, textwrap.fill(label, width), members, f"C{number}")
    if alone:
        draw_training_rates(panels, runs[0])
    for axis, panel in panels.items():
        panel.set(xlabel=AXES[axis][0])
        panel.grid(alpha=0.3)
    first = panels[axes[0]]
    first.set(ylabel="pass rate" if alone else "held-out pass rate", ylim=(0, None))
    if "step" in panels:
        panels["step"].xaxis.get_major_locator().set_params(integer=True)
    lines, labels = first.get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=8, loc="outside lower left")
    legend_lines = sum(label.count("\n") + 1 for label in labels)
    figure.set_figheight(size[1] + 0.15 * legend_lines)  # inches
    # Without the format, matplotlib writes a name without a suffix elsewhere
    figure.savefig(out, dpi=130, format=out.suffix.removeprefix(".") or "png")
    plt.close(figure)


def label_of(name: str, members: list[Run]) -> str:
    """The name of runs, files without their folders, and how many seeds they are."""
    shown = re.sub(r"(^|[ =])[^ =]*/", r"\1", name)
    return f"{shown} ({len(members)} seeds)" if len(members) > 1 else shown


def draw_mean(panels: dict, label: str, members: list[Run], color: str) -> None:
    """The mean curve of the runs of one name, at the steps that all have. panels: by AXES' key."""
    several = len(members) > 1
    points = shared_points(members)
    rates = t_interval([column(one, "eval_pass_rate") for one in points])
    for axis, panel in panels.items():
        x = np.mean([column(one, axis) for one in points], axis=0) / AXES[axis][1]
        panel.plot(x, rates.value, color=color, label=label, marker="o", markersize=3)
        if several:
            low, high = np.clip(rates.low, 0, 1), np.clip(rates.high, 0, 1)
            panel.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def shared_points(members: list[Run]) -> list[list[dict]]:
    """For each run its evaluations at the steps that all have: a stop evaluates at its own step."""
    points = [evaluations(run.lines) for run in members]
    steps = [{point["step"] for point in one} for one in points]
    shared = set.intersection(*steps)
    kept = []
    for one in points:
        kept.append([point for point in one if point["step"] in shared])
    return kept


def draw_training_rates(panels: dict, run: Run) -> None:
    """The pass rates of one run's training rollouts, which have a point at every step."""
    for key, color in (("pass_base", "C1"), ("pass_suffix", "C2")):
        label = f"training, {key.removeprefix('pass_')} groups"
        steps = [line for line in run.lines if line["step"] > 0 and line.get(key) is not None]
        for axis, panel in panels.items():
            x = np.array(column(steps, axis)) / AXES[axis][1]
            panel.plot(x, column(steps, key), color=color, label=label, linewidth=0.8, alpha=0.7)


def column(lines: list[dict], key: str) -> list:
    return [line[key] for line in lines]


# ---------------------------------------------------------------------------------------- runs


def write_curves(folders: list[Path], out: Path, target: float) -> None:
    """Draws the learning curves of runs to `out`, and prints what they reached and cost."""
    named = by_name(folders)
    try:
        draw_curves(named, out)
    except (OSError, ValueError) as fault:  # ValueError: a suffix that is no format of pictures
        raise UserError(f"cannot write {out} ({fault}); choose another --out, such as curves.png")
    print(results_table(named, target))
    print("mean ± standard deviation over seeds; pass rates are of held-out problems;")
    print(f"until {target}: to that pass rate; (n not): n seeds did not reach it\n")
    print(cost_table(named))
    print("seconds of a step in total and by phase: those before grade are sampling, by purpose\n")
    print(f"drawn in {out} (band: Student's 95% interval of the mean over seeds)")


def results_table(named: Named, target: float) -> str:
    """What each name reached and what it cost: mean ± standard deviation over seeds."""
    rows = []
    for name, members in named.items():
        ends = [final(run) for run in members]
        tokens = [run.lines[-1]["total_tokens"] / 1e6 for run in members]
        steps_to = [first_reach(run.lines, target, "step") for run in members]
        tokens_to = [first_reach(run.lines, target, "total_tokens") / 1e6 for run in members]
        row = {
            "run": name,
            "seeds": len(members),
            "learning rate": members[0].config.get("lr", "-"),
            "steps": f"{np.mean([run.lines[-1]['step'] for run in members]):.0f}",
            "million tokens generated": spread(tokens, ".2f"),
            "final pass rate": spread([pass_rate for pass_rate, _ in ends], ".3f"),
            "final pass@8": spread([pass_at_8 for _, pass_at_8 in ends], ".3f"),
            f"steps until {target}": spread(steps_to, ".0f"),
            f"million tokens until {target}": spread(tokens_to, ".2f"),
            "first errors located exactly, first and last 10 steps": located_exactly(members),
        }
        rows.append(row)
    return markdown(rows)


def located_exactly(members: list[Run]) -> str:
    """Mean share of resets at the true first wrong thought, in the first and last ten steps."""
    first, last = [], []
    for run in members:
        first += run.lines[1:11]  # line 0 is the evaluation before training
        last += run.lines[-10:]
    means = []
    for lines in (first, last):
        known = [x["localized_exact"] for x in lines if x.get("localized_exact") is not None]
        if not known:
            return "-"
        means.append(f"{np.mean(known):.2f}")
    return ", ".join(means)


def cost_table(named: Named) -> str:
    """Seconds by phase, sampling speed and tokens of one training step.

    Means over steps, then medians over seeds: of three, one that shared its machine counts less."""
    lines = []
    for run in chain.from_iterable(named.values()):
        lines += run.lines
    phases = [*purposes_of(lines), *WORK]
    used = []
    for phase in phases:
        if any(spent(line, (phase,)) > 0.005 for line in lines):
            used.append(phase)
    rows = []
    for name, members in named.items():
        runs = [step_costs(run, phases) for run in members]
        cost = {}
        for key in runs[0]:
            cost[key] = np.median([one[key] for one in runs])
        row = {"per step": name, "seconds": f"{cost['seconds']:.2f}"}
        for phase in used:
            row[phase] = f"{cost[phase]:.2f}" if cost[phase] else ""
        row["tokens generated"] = f"{cost['generated']:,.0f}"
        speed = cost["generated"] / max(cost["sampling"], 1e-9)
        row["tokens per second of sampling"] = f"{speed:,.0f}"
        row["tokens in the loss"] = f"{cost['trained']:,.0f}"
        row["tokens of a response"] = f"{cost['response']:.0f}"
        rows.append(row)
    return markdown(rows)


def purposes_of(lines: list[dict]) -> list[str]:
    """What tokens were spent on in these steps, in order of appearance."""
    purposes = {}
    for line in lines:
        purposes |= line.get("tokens", {"base": 0})
    return list(purposes)


def step_costs(run: Run, phases: list[str]) -> dict[str, float]:
    """Means over the steps of one run: seconds (of all, of sampling, of each phase) and tokens."""
    # A run that was stopped before its first step has none.
    steps = [line for line in run.lines if "seconds" in line] or [{"seconds": {}}]
    costs = {
        "seconds": np.mean([sum(line["seconds"].values()) for line in steps]),
        "sampling": np.mean([spent(line, set(phases) - set(WORK)) for line in steps]),
        "generated": np.mean([sum(line.get("tokens", {}).values()) for line in steps]),
        "trained": np.mean([line.get("trained_tokens", 0) for line in steps]),
        "response": np.mean([line.get("response_tokens", 0) for line in steps]),
    }
    for phase in phases:
        costs[phase] = np.mean([spent(line, (phase,)) for line in steps])
    return costs


def spent(line: dict, phases: Iterable[str]) -> float:
    """Seconds that a step spent on the given phases."""
    seconds = line.get("seconds", {})
    return sum(seconds.get(phase, 0) for phase in phases)


# ---------------------------------------------------------------------------------- benchmarks

KS = (1, 2, 4, 8, 16, 32, 64)  # of pass@k


def response_record(problem, i: int, rollout, seconds: float) -> dict:
    """The line of SET.jsonl for the i-th response to a problem."""
    return {
        "problem": problem.index,
        "sample": i,
        "reward": rollout.reward,
        "finish": rollout.finish,
        "tokens": rollout.generated,
        "seconds": seconds,
        "answered": KINDS[problem.kind].answered(rollout.text),
        "text": rollout.text,
    }


# What a line of SET.jsonl holds
RESPONSE = {
    "problem": int,
    "sample": int,
    "reward": int | float,
    "finish": str,
    "tokens": int,
    "seconds": int | float,
    "answered": bool,
    "text": str,
}


def check_settings(out: Path, settings: dict) -> None:
    """Raises UserError where `out` holds a benchmark with other settings."""
    path = out / "settings.json"
    if path.exists() and read_json(path) != settings:
        raise UserError(
            f"{out} holds a benchmark with other settings or weights; choose another --out"
        )


def finished_problems(path: Path, samples: int) -> dict[int, list[dict]]:
    """Reads SET.jsonl: {problem: its responses}, of the problems that have all of them.

    Drops the lines of other problems from the file, and a last line that a kill cut in two."""
    if not path.exists():
        return {}
    *lines, torn = read_text(path).split("\n")
    found = {}
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number}"
        record = parse(line, place)
        if not has_types(record, RESPONSE):
            raise UserError(f"{place}: no response of this benchmark; remove it")
        found.setdefault(record["problem"], []).append(record)
    done = {problem: records for problem, records in found.items() if len(records) == samples}
    kept = list(chain.from_iterable(done.values()))
    if torn or len(kept) < len(lines):
        write_lines(path, kept)
    return done


def has_types(record, types: dict) -> bool:
    """Whether a JSON value is an object that has all of these fields, each of its type."""
    if not isinstance(record, dict):
        return False
    for name, wanted in types.items():
        if name not in record or not isinstance(record[name], wanted):
            return False
    return True


def unsolved(problems: list[Problem], done: dict[int, list[dict]]) -> list[Problem]:
    """The problems of which no response is right."""
    kept = []
    for problem in problems:
        if all(record["reward"] < 1 for record in done[problem.index]):
            kept.append(problem)
    return kept


def summary(done: dict[int, list[dict]], samples: int) -> dict:
    """The results of one data set, as results.json holds them.

    mean: mean@n, the share of right responses; half: half of its 95% interval over problems;
    pass_at: {k: pass@k}; tokens, seconds: per problem; truncated, unparsable: shares of responses
    that hit a length limit, or gave no answer; by_problem: {problem: its share of right ones}."""
    problems = sorted(done)
    rewards, records = [], []
    for p in problems:
        rewards.append([r["reward"] for r in done[p]])
        records += done[p]
    rewards = np.array(rewards)  # [problems, samples]
    right = rewards >= 1
    rates = right.mean(1)
    pass_at = {}
    for k in KS:
        if k <= samples:
            pass_at[k] = float(np.mean([pass_at_k(samples, int(c), k) for c in right.sum(1)]))
    return {
        "problems": len(problems),
        "mean": float(rates.mean()),
        "half": half_interval(rates) if len(rates) > 1 else None,
        "reward": float(rewards.mean()),
        "pass_at": pass_at,
        "tokens": sum(r["tokens"] for r in records) / len(problems),
        "seconds": sum(r["seconds"] for r in records) / len(problems),
        "truncated": float(np.mean([r["finish"] in ("length", "thoughts") for r in records])),
        "unparsable": float(np.mean([not r["answered"] for r in records])),
        "by_problem": {str(p): float(rate) for p, rate in zip(problems, rates)},
    }


def benchmark_table(results: dict, samples: int) -> str:
    rows = []
    for name, r in results.items():
        plus_minus = "" if r["half"] is None else f" ± {r['half']:.3f}"
        row = {
            "data set": name,
            "problems": r["problems"],
            f"mean@{samples}": f"{r['mean']:.3f}{plus_minus}",
        }
        for k, rate in r["pass_at"].items():
            if k > 1:
                row[f"pass@{k}"] = f"{rate:.3f}"
        row["mean reward"] = f"{r['reward']:.3f}"
        row["tokens"] = f"{r['tokens']:.0f}"
        row["seconds"] = f"{r['seconds']:.2f}"
        row["hit a length limit"] = f"{r['truncated']:.3f}"
        row["gave no answer"] = f"{r['unparsable']:.3f}"
        rows.append(row)
    return markdown(rows)


def compare(first: Path, second: Path) -> None:
    """Prints the paired difference of two results.json, with a bootstrap interval over problems."""
    a, b = read_rates(first), read_rates(second)
    shared = [name for name in a if name in b]
    if not shared:
        raise UserError(
            f"{first} and {second} share no problems: {', '.join(a)} against {', '.join(b)}; "
            "use the same --data, --problems and --seed"
        )
    for name in sorted(a.keys() ^ b.keys()):
        print(f"{name}: only {first if name in a else second} has it")
    rows = []
    for name in shared:
        x, y = a[name], b[name]
        if x.keys() != y.keys():
            raise UserError(f"{name}: {first} and {second} have results of different problems")
        gain = interval([y[p] - x[p] for p in x], resamples=10_000)
        row = {
            "data set": name,
            "problems": len(x),
            f"A = {first.parent.name}": f"{np.mean(list(x.values())):.3f}",
            f"B = {second.parent.name}": f"{np.mean(list(y.values())):.3f}",
            "B - A, 95% interval": f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})",
        }
        rows.append(row)
    print(markdown(rows))


def read_rates(path: Path) -> dict[str, dict[str, float]]:
    """Reads {data set: {problem: its share of right responses}} from a results.json."""
    content = read_json(path)
    results = content.get("results") if isinstance(content, dict) else None
    rates = {}
    if isinstance(results, dict):
        for name, result in results.items():
            rates[name] = result.get("by_problem") if isinstance(result, dict) else None
    if not rates or not all(map(are_rates, rates.values())):
        raise UserError(f"{path}: --compare needs two results.json of this command")
    return rates


def are_rates(rates) -> bool:
    """Whether a JSON value is an object of numbers, with at least one of them."""
    if not isinstance(rates, dict) or not rates:
        return False
    return all(isinstance(rate, (int, float)) for rate in rates.values())
