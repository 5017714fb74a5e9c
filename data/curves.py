"""Curves and tables of runs."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from data.runs import name_of, read_run

Named = dict[
    str, list[tuple[Path, dict, list[dict]]]
]  # name: [(folder, settings, step lines)], one for each seed


def by_name(runs: list[Path]) -> Named:
    """Runs that differ only in their seed share a name; it says learning rate, data or model where the runs differ in them."""
    read = [(Path(run), *(lambda x: (x.config, x.lines))(read_run(Path(run)))) for run in runs]
    varied = [
        key
        for key in ("lr", "train_data", "model")
        if len({config.get(key) for _, config, _ in read}) > 1
    ]
    named = defaultdict(list)
    for run, config, lines in read:
        named[" ".join([config.get('name','x'), *(f"{key} {config.get(key)}" for key in varied)])].append(
            (run, config, lines)
        )
    return dict(named)


def interval(
    values, statistic=lambda x: x.mean(0), resamples: int = 4000
) -> tuple[float, float, float]:
    """(statistic, 2.5% and 97.5% of its bootstrap) over the first axis of `values`: seeds, with everything that is paired by seed in a row.
    The bounds are nan for one seed, which says nothing about others."""
    values = np.asarray(values, float)
    if len(values) == 1:
        return statistic(values), np.nan, np.nan
    picks = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    drawn = np.array([statistic(values[pick]) for pick in picks])
    return (statistic(values), *np.percentile(drawn, (2.5, 97.5), axis=0))


AXES = {"step": ("step", 1), "total_tokens": ("million generated tokens, all purposes", 1e6), "trained_total": ("million trained tokens", 1e6),
        "seconds_total": ("seconds, without evaluations", 1)}  # fmt: skip


def draw_curves(named: Named, out: Path, axes=("step", "total_tokens")) -> None:
    """Held-out pass rate against each of `axes` (keys of AXES); with several seeds of a name, their mean and its 95% interval."""
    plt = pyplot()
    figure, panels = plt.subplots(
        len(axes) // 2, 2, figsize=(10, 1.9 * len(axes)), sharey=True, layout="constrained"
    )
    panels = panels.ravel()
    for color, (name, members) in zip(
        plt.rcParams["axes.prop_cycle"].by_key()["color"] * 9, named.items()
    ):
        evaluations = [[x for x in lines if "eval_pass_rate" in x] for _, _, lines in members]
        shared = min(map(len, evaluations))
        mean, low, high = interval(
            [[x["eval_pass_rate"] for x in points[:shared]] for points in evaluations]
        )
        for panel, key in zip(panels, axes):
            x = (
                np.mean([[x[key] for x in points[:shared]] for points in evaluations], 0)
                / AXES[key][1]
            )
            panel.plot(
                x,
                mean,
                color=color,
                label=name if len(members) == 1 else f"{name} ({len(members)} seeds)",
                marker="o",
                markersize=3,
            )
            if len(members) > 1:
                panel.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    if (
        len(named) == 1 and len(members) == 1
    ):  # one run: its training rates too, which have a point at every step
        for key, label in (("pass_base", "base groups"), ("pass_suffix", "suffix groups")):
            seen = [x for x in members[0][2] if x["step"] > 0 and x[key] is not None]
            for panel, axis in zip(panels, axes):
                panel.plot(
                    [x[axis] / AXES[axis][1] for x in seen],
                    [x[key] for x in seen],
                    label=f"{label} (training)",
                    linewidth=0.8,
                    alpha=0.6,
                )
    for panel, axis in zip(panels, axes):
        panel.set(xlabel=AXES[axis][0])
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="held-out pass rate", ylim=(0, None))
    panels[0].legend(fontsize=8, loc="upper left")
    figure.savefig(out, dpi=130)
    plt.close(figure)


def pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def first_reach(lines: list[dict], target: float, key: str) -> float:
    """Value of `key` at which the held-out pass rate first reaches target, linear between evaluations; nan if it never does."""
    points = [(x[key], x["eval_pass_rate"]) for x in lines if "eval_pass_rate" in x]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y0 < target <= y1:
            return x0 + (x1 - x0) * (target - y0) / (y1 - y0)
    return float("nan")


def final(run: Path, lines: list[dict]) -> tuple[float, float]:
    """(pass rate, pass@8) after a run: from its benchmark where `study` made one, else the last held-out rate and nan."""
    if (run / "benchmark" / "results.json").exists():
        (result,) = json.loads((run / "benchmark" / "results.json").read_text())["results"].values()
        return result["mean"], result["pass_at"]["8"]
    return [x["eval_pass_rate"] for x in lines if "eval_pass_rate" in x][-1], float("nan")


def spread(values, form: str) -> str:
    """mean ± standard deviation over seeds; how many did not get there."""
    values = np.array(values, float)
    reached = values[~np.isnan(values)]
    if not len(reached):
        return "-"
    missing = f" ({len(values) - len(reached)} not)" if len(reached) < len(values) else ""
    return f"{reached.mean():{form}} ± {reached.std(ddof=1) if len(reached) > 1 else 0:{form}}{missing}"


def results_table(named: Named, target: float) -> str:
    rows = [
        f"| method | seeds | lr | steps | M tokens | final pass rate | pass@8 | steps to {target} | M tokens to {target} | exact h*, first and last 10 steps |",
        "|---" * 10 + "|",
    ]
    for name, members in named.items():
        ends = [
            [
                x["localized_exact"]
                for _, _, lines in members
                for x in lines[part]
                if x.get("localized_exact") is not None
            ]
            for part in (slice(1, 11), slice(-10, None))
        ]
        finals = [final(run, lines) for run, _, lines in members]
        rows.append(
            f"| {name} | {len(members)} | {members[0][1].get('lr', '-')} | {np.mean([lines[-1]['step'] for _, _, lines in members]):.0f} "
            f"| {spread([lines[-1]['total_tokens'] / 1e6 for _, _, lines in members], '.2f')} | {spread([f[0] for f in finals], '.3f')} | {spread([f[1] for f in finals], '.3f')} "
            f"| {spread([first_reach(lines, target, 'step') for _, _, lines in members], '.0f')} | {spread([first_reach(lines, target, 'total_tokens') / 1e6 for _, _, lines in members], '.2f')} "
            f"| {', '.join(f'{np.mean(end):.2f}' for end in ends) if all(ends) else '-'} |"
        )  # fmt: skip
    return "\n".join(rows)


PHASES = ("base", "seed", "localization", "suffix", "oracle", "grade", "wait", "train", "sync")


def cost_table(named: Named) -> str:
    """Seconds by phase, sampling speed and tokens of a step: medians over seeds, so that a run beside other work does not count, of means over steps."""
    used = [
        phase
        for phase in PHASES
        if any(
            x.get("seconds", {}).get(phase, 0) > 0.005
            for members in named.values()
            for _, _, lines in members
            for x in lines
        )
    ]
    rows = [
        "| per step | seconds |"
        + "".join(f" {phase} |" for phase in used)
        + " tokens generated | tokens/s sampling | tokens trained | response, tokens |",
        "|---" * (6 + len(used)) + "|",
    ]
    for name, members in named.items():
        mean = lambda read: np.median(
            [np.mean([read(x) for x in lines if "seconds" in x]) for _, _, lines in members]
        )  # noqa: E731
        shares = [mean(lambda x: x["seconds"].get(phase, 0)) for phase in used]
        tokens, sampling = (
            mean(lambda x: sum(x.get("tokens", {}).values())),
            mean(lambda x: sum(x["seconds"].get(phase, 0) for phase in PHASES[:5])),
        )
        rows.append(f"| {name} | {mean(lambda x: sum(x['seconds'].values())):.2f} |" + "".join(f" {s:.2f} |" if s else " |" for s in shares)
                    + f" {tokens:,.0f} | {tokens / max(sampling, 1e-9):,.0f} | {mean(lambda x: x.get('trained_tokens', 0)):,.0f} | {mean(lambda x: x.get('response_tokens', 0)):.0f} |")  # fmt: skip
    return "\n".join(rows)
