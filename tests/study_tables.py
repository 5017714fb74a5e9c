"""What the runs of the study say: tables, verdicts and pictures. The runs: tests/study.py.

    python -m tests.study_tables            # prints the tables
    python -m tests.study_tables --renew    # renews tests/study.md and the pictures, too

Left out: corrections for the number of comparisons (each is printed with its interval).

Try it alone:  python -m tests.study_tables
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from data.curves import Interval, interval, markdown, pyplot, renew, t_interval
from data.faults import UserError
from tests.study import (
    ARMS,
    END,
    HARD,
    LINES,
    ROOT,
    SAMPLES,
    SLICES,
    SWEEP_SEEDS,
    Result,
    Untrained,
    read_results,
    read_untrained,
    swept,
)

TARGET = 0.3  # held-out pass rate
PICTURES = ROOT / "data" / "pictures"
UNTRAINED = ROOT / "tests" / "untrained.jsonl"  # SmolLM2's, by seed; see language.md

# -------------------------------------------------------------------------------------- statistics


@dataclass
class Reach:
    """When a run reached the target. Where it did not: its whole cost, a lower bound."""

    reached: bool
    steps: float
    tokens: float  # generated
    cpu: float  # seconds; nan: unknown, as the run was resumed


def reach(result: Result, target: float = TARGET) -> Reach:
    """Linear between evaluations. The run must start below the target."""
    a_clock_second = cpu_of_a_second(result)
    for before, after in pairwise(result.curve):
        if before.pass_rate < target <= after.pass_rate:
            part = (target - before.pass_rate) / (after.pass_rate - before.pass_rate)
            return Reach(
                reached=True,
                steps=between(before.step, after.step, part),
                tokens=between(before.generated, after.generated, part),
                cpu=between(before.seconds, after.seconds, part) * a_clock_second,
            )
    last = result.curve[-1]
    return Reach(False, last.step, last.generated, last.seconds * a_clock_second)


def cpu_of_a_second(result: Result) -> float:
    """CPU seconds of a run for each second of its steps by the clock, which a busy machine slows.

    The CPU seconds of its start and its evaluations are spread over the steps.
    """
    if result.cpu_seconds is None:
        return np.nan
    return result.cpu_seconds / result.curve[-1].seconds


def between(before: float, after: float, part: float) -> float:
    return before + part * (after - before)


def rates_at_equal(what: str, a: Result, b: Result) -> tuple[float, float]:
    """Held-out pass rates when both have spent what the cheaper run has at its end.

    Linear between evaluations. what: as in `column`, such as generated tokens, or cpu.
    """
    spent = min(column(a, what)[-1], column(b, what)[-1])
    rate_a = np.interp(spent, column(a, what), column(a, "pass_rate"))
    rate_b = np.interp(spent, column(b, what), column(b, "pass_rate"))
    return float(rate_a), float(rate_b)


def column(result: Result, name: str) -> np.ndarray:
    """One number of each evaluation of a run, a field of Point, or cpu (seconds): [evaluations]."""
    if name == "cpu":
        return column(result, "seconds") * cpu_of_a_second(result)
    return np.array([getattr(point, name) for point in result.curve])


@dataclass
class Compared:
    """What two arms differ by: a number for each seed."""

    values: list[float]
    is_ratio: bool = False
    # Of each value: ">" it is a lower bound, "<" an upper one, "?" neither, "" itself.
    marks: list[str] = field(default_factory=list)

    @property
    def bound(self) -> str:
        """The mark of all values together."""
        kinds = set(self.marks) - {""}
        return "".join(kinds) if len(kinds) < 2 else "?"

    def interval(self) -> Interval:
        """Mean over seeds and its 95% interval; of ratios the geometric mean.

        Where values are bounds, the interval has no end on their open side.
        """
        value, low, high = t_interval(np.log(self.values) if self.is_ratio else self.values)
        if self.bound in ("<", "?"):
            low = -np.inf
        if self.bound in (">", "?"):
            high = np.inf
        ends = Interval(value, low, high)
        return Interval(*np.exp(ends)) if self.is_ratio else ends

    def __str__(self) -> str:
        if not self.values:
            return ""
        digits = 2 if self.is_ratio else 3
        if self.bound == "?":
            return "-"
        if not self.bound:
            return in_words(self.values, self.interval(), digits)
        if len(self.values) < 3:
            marked = [f"{m} {v:.{digits}f}".strip() for m, v in zip(self.marks, self.values)]
            return ", ".join(marked)
        _, low, high = self.interval()
        end = low if self.bound == ">" else high
        return f"{self.bound} {end:.{digits}f}"


def in_words(values: list[float], measured: Interval, digits: int = 3) -> str:
    """`0.582 (0.558 to 0.606)`; of one or two seeds the values, as an interval says nothing."""
    if len(values) < 3:
        return ", ".join(f"{value:.{digits}f}" for value in values)
    return between_ends(measured, digits)


def between_ends(measured: Interval, digits: int = 3) -> str:
    value, low, high = (f"{x:.{digits}f}" for x in measured)
    return f"{value} ({low} to {high})"


def rates_in_words(rates: list[float], reached: list[bool]) -> str:
    """Pass rates of an arm. Where only some of its runs learn, a mean says nothing: all values."""
    if any(reached) and not all(reached):
        return ", ".join(f"{rate:.3f}" for rate in rates)
    value, low, high = t_interval(rates)
    return in_words(rates, Interval(value, max(0.0, low), high))


@dataclass
class Pair:
    """Two arms on one set, compared seed by seed: the same problems in the same order.

    Benchmarks of the untrained policy can stand for an arm, but where training is compared.
    """

    first: list[Result] | list[Untrained]
    second: list[Result] | list[Untrained]

    def matched(self) -> list[tuple]:
        """The two runs of each seed that both have."""
        second = {result.seed: result for result in self.second}
        return [(a, second[a.seed]) for a in self.first if a.seed in second]

    def difference(self) -> Compared:
        """Pass rate of the first minus that of the second, both at their ends."""
        return Compared([a.pass_rate - b.pass_rate for a, b in self.matched()])

    def at_8(self) -> Compared:
        """Pass@8 of the first minus that of the second. Every run must have a benchmark."""
        return Compared([a.pass_at_8 - b.pass_at_8 for a, b in self.matched()])

    def at_8_over_problems(self) -> Interval:
        """The same over the problems of all seeds, as in `over_problems`."""
        differences = []  # [seeds x problems]
        for a, b in self.matched():
            for ours, theirs in zip(a.right, b.right, strict=True):
                differences.append(float(ours > 0) - float(theirs > 0))
        return interval(differences, resamples=10_000)

    def at_equal(self, what: str) -> Compared:
        """The same along training, where the arm that spent less has ended. what: generated or cpu.

        Runs whose CPU seconds are unknown do not count there.
        """
        differences = []
        for a, b in self.matched():
            rate_a, rate_b = rates_at_equal(what, a, b)
            if not np.isnan(rate_a - rate_b):
                differences.append(rate_a - rate_b)
        return Compared(differences)

    def over_problems(self) -> Interval:
        """The first's pass rate minus the second's, over the held-out problems of all seeds.

        A bootstrap interval of paired differences: it takes the runs as given, so it says nothing
        about other seeds. Every run must have a benchmark.
        """
        differences = []  # [seeds x problems]
        for a, b in self.matched():
            for ours, theirs in zip(a.right, b.right, strict=True):
                differences.append((ours - theirs) / SAMPLES)
        return interval(differences, resamples=10_000)

    def saving(self, what: str) -> Compared:
        """How many times as much the second spends until the target. what: a field of Reach."""
        ratios, marks = [], []
        for a, b in self.matched():
            ours, theirs = reach(a), reach(b)
            ratio = getattr(theirs, what) / getattr(ours, what)
            if np.isnan(ratio):
                continue
            ratios.append(ratio)
            if ours.reached:
                marks.append("" if theirs.reached else ">")
            else:
                marks.append("<" if theirs.reached else "?")
        return Compared(ratios, is_ratio=True, marks=marks)


# ---------------------------------------------------------------------------------------- tables


def table_of(result: Result) -> str:
    """The table that a run stands in, by its slice. A sweep has one of its own."""
    if result.slice.startswith("sweep"):
        return "sweep"
    return SLICES[result.slice].table or result.data


def in_table(results: list[Result], table: str) -> dict[str, list[Result]]:
    """The runs of one table, by arm, in the order of ARMS."""
    named = {}
    for arm in ARMS:
        mine = [r for r in results if r.arm == arm and table_of(r) == table]
        if mine:
            named[arm] = sorted(mine, key=lambda result: result.seed)
    return named


def sweep_rows(results: list[Result]) -> list[dict]:
    """Mean pass rate at the end of the sweep by arm and rate; the best so far is marked."""
    rows = []
    rates = sorted({r.lr for r in results if r.slice.startswith("sweep")})
    for arm in ARMS:
        mine = swept(arm, results)
        if not mine:
            continue
        best = max(mine, key=lambda rate: np.mean(mine[rate]))
        row = {f"pass rate after {SLICES['sweep'].steps} steps": arm}
        for rate in rates:
            row[f"{rate:g}"] = ""
            if rate in mine:
                mark = "**" if rate == best else ""
                row[f"{rate:g}"] = f"{mark}{np.mean(mine[rate]):.3f}{mark}"
                if len(mine[rate]) < SWEEP_SEEDS:
                    row[f"{rate:g}"] += f" ({len(mine[rate])} of {SWEEP_SEEDS} seeds)"
        rows.append(row)
    return rows


def seeds_of(mine: list[Result]) -> str:
    return "1 seed" if len(mine) == 1 else f"{len(mine)} seeds"


def described(arm: str, mine: list[Result]) -> str:
    return f"{arm}, {seeds_of(mine)}, {mine[0].steps} steps, {mine[0].lr:g}"


def outcome_rows(named: dict[str, list[Result]]) -> list[dict]:
    """What each arm reaches, beside GRPO, the walk or the first arm; variants of the walk, and
    corrections, also beside the walk."""
    rows = []
    usual = next((arm for arm in ("grpo", "walk") if arm in named), list(named)[0])
    beside_walk = usual == "grpo" and any(ARMS[arm].rate_of == "walk" for arm in named)
    for arm, mine in named.items():
        reached = [reach(result).reached for result in mine]
        rates = [result.pass_rate for result in mine]
        row = {
            "arm": described(arm, mine),
            "pass@1 (95%)": rates_in_words(rates, reached),
            "pass@8": mean_of_known([r.pass_at_8 for r in mine]),
            f"reached {TARGET}": f"{sum(reached)} of {len(mine)}",
        }
        others = [] if arm == usual else named[usual]
        row |= comparison(Pair(mine, others), usual)
        if beside_walk:
            like_it = ARMS[arm].rate_of == "walk" or arm == "corrections"
            others = named.get("walk", []) if like_it else []
            row["minus walk's"] = str(Pair(mine, others).difference())
        rows.append(row)
    return rows


def comparison(pair: Pair, usual: str) -> dict[str, str]:
    """The cells that compare an arm with the usual one; empty where they share no seed."""
    difference = str(pair.difference())
    lengths = {b.steps for a, b in pair.matched() if b.steps != a.steps}
    if lengths:
        difference += f"; {usual} after {max(lengths)}"
    return {
        f"minus {usual}'s": difference,
        "at equal tokens": str(pair.at_equal("generated")),
        "at equal CPU s": str(pair.at_equal("cpu")),
        f"{usual}'s steps / its": str(pair.saving("steps")),
        f"{usual}'s tokens / its": str(pair.saving("tokens")),
        f"{usual}'s CPU s / its": str(pair.saving("cpu")),
    }


def cost_rows(named: dict[str, list[Result]]) -> list[dict]:
    """What each arm spends, and how it goes: means over seeds."""
    rows = []
    for arm, mine in named.items():
        cpu = [r.cpu_seconds for r in mine if r.cpu_seconds is not None]
        walks = np.sum([r.walks for r in mine], axis=0)  # [2 ends, found and failed]
        if mine[0].steps <= END:
            walks = walks[:1]
        rows.append(
            {
                "arm": arm,
                "M generated": f"{np.mean([sum(r.tokens.values()) for r in mine]) / 1e6:.2f}",
                "by purpose": by_purpose(mine),
                "M trained": f"{np.mean([r.trained_tokens for r in mine]) / 1e6:.2f}",
                "verifier calls": f"{np.mean([r.verifier_calls for r in mine]):,.0f}",
                "CPU s": f"{np.mean(cpu):.0f}" if cpu else "",
                "flat groups": both_ends(mine, "flat_groups"),
                "entropy, nats": both_ends(mine, "entropy", 3),
                "exact h*": both_ends(mine, "exact"),
                "clean prefix": both_ends(mine, "clean"),
                "right after clean, erroneous": after_prefixes(mine),
                "walks that found": ", then ".join(share_found(end) for end in walks if end.sum()),
            }
        )
    return rows


def benchmark_rows(named: dict[str, list[Result]]) -> list[dict]:
    """What the last checkpoints reach, and what their right responses are like, beside the first
    arm and the untrained policy. For runs whose evaluations on the way are too small to tell when
    they reached something.

    Every run must have a benchmark.
    """
    usual = list(named)[0]
    seeds = {result.seed for result in named[usual]}
    untrained = [one for one in read_untrained(UNTRAINED) if one.seed in seeds]
    rows = []
    if untrained:
        rows.append(benchmark_row("untrained", untrained, {usual: [], "untrained": []}))
    for arm, mine in named.items():
        others = {usual: [] if arm == usual else named[usual], "untrained": untrained}
        rows.append(benchmark_row(described(arm, mine), mine, others))
    return rows


def benchmark_row(
    name: str,
    mine: list[Result] | list[Untrained],
    others: dict[str, list[Result] | list[Untrained]],
) -> dict:
    """One line of `benchmark_rows`. others: what is subtracted; [] leaves its cells empty."""
    right = sum(sum(one.right) for one in mine)
    solved = sum(np.count_nonzero(one.right) for one in mine)
    rates = [one.pass_rate for one in mine]
    row = {"arm": name, "pass@1 (95%)": rates_in_words(rates, [True] * len(rates))}
    for other, theirs in others.items():
        pair = Pair(mine, theirs)
        row[f"minus {other}'s, over seeds"] = str(pair.difference())
        over_problems = between_ends(pair.over_problems()) if pair.matched() else ""
        row[f"minus {other}'s, over problems"] = over_problems
    row["pass@8"] = mean_of_known([one.pass_at_8 for one in mine])
    pair = Pair(mine, others["untrained"])
    row["pass@8 minus untrained's, over seeds"] = str(pair.at_8())
    over_problems = between_ends(pair.at_8_over_problems()) if pair.matched() else ""
    row["pass@8 minus untrained's, over problems"] = over_problems
    row["right responses"] = f"{right:,}"
    row["every step checks"] = share_of(sum(one.certified for one in mine), right)
    texts = share_of(sum(one.distinct for one in mine), solved)
    row["different texts of a solved problem"] = texts
    return row


def share_of(part: int, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else ""


def mean_of_known(values: list[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.{digits}f}" if known else ""


def by_purpose(mine: list[Result]) -> str:
    """Shares of generated tokens, where there is more than one purpose."""
    sums = Counter()
    for result in mine:
        sums.update(result.tokens)
    whole = sum(sums.values())
    shares = [f"{purpose} {n / whole:.2f}" for purpose, n in sums.items() if n]
    return ", ".join(shares) if len(shares) > 1 else ""


def after_prefixes(mine: list[Result]) -> str:
    """Mean rewards of what continues a clean prefix, and an erroneous one."""
    clean = mean_of_known([result.right_after_clean for result in mine], 2)
    erroneous = mean_of_known([result.right_after_erroneous for result in mine], 2)
    return f"{clean or '-'}, {erroneous or '-'}" if clean or erroneous else ""


def both_ends(mine: list[Result], name: str, digits: int = 2) -> str:
    """`0.72 to 0.09`: means over seeds of the first and of the last ten steps; `0.72`: of all steps
    of runs that are no longer."""
    known = [getattr(result, name) for result in mine if None not in getattr(result, name)]
    if not known:
        return ""
    first, last = np.mean(known, axis=0)
    if mine[0].steps <= END:
        return f"{first:.{digits}f}"
    return f"{first:.{digits}f} to {last:.{digits}f}"


def share_found(end: np.ndarray) -> str:
    found, failed = end
    return f"{found / (found + failed):.2f} of {found + failed:,}"


# ---------------------------------------------------------------------------------------- claims


@dataclass
class Claim:
    """A statement about two arms: a measured number lies between low and high."""

    text: str
    first: str
    second: str
    table: str = "chain-12"
    # end, equal tokens, equal CPU s: the difference of pass rates there.
    # steps, tokens: the ratio until 0.3.
    by: str = "end"
    low: float = 0.0
    high: float = np.inf
    primary: bool = False  # one of the plan's eight


IDEAS = "Ideas on the hard set, fresh seeds"


def primaries(name: str, arm: str) -> list[Claim]:
    """What the plan compares first: an arm and GRPO, on both sets, by pass rate and by tokens."""
    above = f"{name} ends above GRPO"
    fewer = f"{name} needs fewer tokens than GRPO (times)"
    return [
        Claim(above, arm, "grpo", primary=True),
        Claim(fewer, arm, "grpo", by="tokens", low=1, primary=True),
        Claim(
            f"{name} is above GRPO at equal tokens", arm, "grpo", HARD, "equal tokens", primary=True
        ),
        Claim(fewer, arm, "grpo", HARD, "tokens", low=1, primary=True),
    ]


CLAIMS = [
    *primaries("SRPO", "srpo"),
    *primaries("ours: the walk", "walk"),
    Claim("SRPO's 60 steps end above GRPO's 120", "srpo", "grpo", HARD),
    Claim("ours: the walk's 60 steps end above GRPO's 120", "walk", "grpo", HARD),
    Claim("ours: the walk is above GRPO at equal CPU seconds", "walk", "grpo", by="equal CPU s"),
    Claim("... both clipped", "walk clipped twice", "grpo clipped twice", by="equal CPU s"),
    Claim("... on the hard set", "walk", "grpo", HARD, "equal CPU s"),
    Claim("SRPO ends above RRPO", "srpo", "rrpo"),
    Claim("RRPO ends within 0.05 of GRPO", "rrpo", "grpo", low=-0.05, high=0.05),
    Claim("SRPO needs half of GRPO's steps or fewer (times)", "srpo", "grpo", by="steps", low=2),
    Claim("... and half of its tokens (times)", "srpo", "grpo", by="tokens", low=2),
    Claim("1x4 ends above 2x4", "srpo", "srpo 2x4"),
    Claim("1x4 ends above 1x8", "srpo", "srpo 1x8"),
    Claim("masking the prefix helps", "srpo", "srpo unmasked"),
    Claim("one update ends above two clipped ones", "srpo", "srpo clipped twice"),
    Claim("ours: the exact localizer helps", "srpo exact", "srpo"),
    Claim("ours: SRPO ends above GRPO, both clipped", "srpo clipped twice", "grpo clipped twice"),
    Claim("ours: the walk ends above GRPO clipped twice", "walk", "grpo clipped twice"),
    Claim("... both clipped twice", "walk clipped twice", "grpo clipped twice"),
    Claim("... and it gains by the second update", "walk clipped twice", "walk"),
    Claim(
        "... above GRPO clipped twice at equal tokens",
        "walk",
        "grpo clipped twice",
        HARD,
        "equal tokens",
    ),
    Claim("... above iterated corrections there", "walk", "corrections", HARD, "equal tokens"),
    Claim("... needs fewer tokens than they (times)", "walk", "corrections", HARD, "tokens", low=1),
    Claim("... ends above them", "walk", "corrections", HARD),
    Claim("walk latest needs fewer tokens (times)", "walk latest", "walk", IDEAS, "tokens", low=1),
    Claim("walk warm needs fewer tokens (times)", "walk warm", "walk", IDEAS, "tokens", low=1),
    Claim("walk base 2 needs fewer tokens (times)", "walk base 2", "walk", IDEAS, "tokens", low=1),
]


def claim_rows(results: list[Result]) -> list[dict]:
    """Each claim whose two arms were run, with its number and the verdict."""
    rows = []
    for claim in CLAIMS:
        named = in_table(results, claim.table)
        pair = Pair(named.get(claim.first, []), named.get(claim.second, []))
        if not pair.matched():
            continue
        compared = measured(claim, pair)
        said = "neither learns" if neither_learns(pair, claim) else verdict(compared, claim)
        rows.append(
            {
                "claim": f"**{claim.text}**" if claim.primary else claim.text,
                "runs": claim.table,
                "measured (95%)": str(compared),
                "verdict": said,
            }
        )
    return rows


def measured(claim: Claim, pair: Pair) -> Compared:
    if claim.by == "end":
        return pair.difference()
    if claim.by == "equal tokens":
        return pair.at_equal("generated")
    if claim.by == "equal CPU s":
        return pair.at_equal("cpu")
    return pair.saving(claim.by)


SMALL = 0.05  # a difference of pass rates, and
NEAR = 1.15  # a ratio of costs, either way: within them two arms do not differ


def verdict(compared: Compared, claim: Claim) -> str:
    """Whether the interval lies inside the claim's bounds, outside, or across one of them.

    "no difference" comes before the others, by the plan: two arms are alike within small bounds.
    """
    if len(compared.values) < 3:
        return "undecided"
    _, low, high = compared.interval()
    alike = (1 / NEAR, NEAR) if compared.is_ratio else (-SMALL, SMALL)
    claims_more = claim.high == np.inf  # than that they are alike
    if claims_more and alike[0] < low and high < alike[1]:
        return "no difference"
    if claim.low < low and high <= claim.high:
        return "seen here"
    if high < claim.low or low > claim.high:
        return "not so here"
    return "undecided"


FLOOR = 0.02  # pass rate


def neither_learns(pair: Pair, claim: Claim) -> bool:
    """Whether no run of the two is off the floor: at its end, or where the claim compares earlier,
    when the shorter of its pair ends."""
    rates = []
    for a, b in pair.matched():
        if claim.by == "end":
            rates += [a.pass_rate, b.pass_rate]
        else:
            rates += rates_at_equal("generated", a, b)
    return max(rates) < FLOOR


# -------------------------------------------------------------------------------------- difficulty


def difficulty_rows(results: list[Result]) -> list[dict]:
    """How many times as much GRPO spends until the target as the walk and SRPO, by set."""
    rows = []
    for data in dict.fromkeys(part.data for part in SLICES.values()):
        named = in_table(results, data)
        grpo = named.get("grpo", [])
        if not grpo:
            continue
        before = np.mean([result.curve[0].pass_rate for result in grpo])
        row = {"set": data, "untrained pass rate": f"{before:.4f}"}
        for arm in ("walk", "srpo"):
            pair = Pair(named.get(arm, []), grpo)
            for what in ("steps", "tokens"):
                row[f"grpo's {what} / {arm}'s"] = str(pair.saving(what))
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------- pictures

DRAWN = {
    "grpo": "#4d4d4d",
    "grpo clipped twice": "#7570b3",
    "srpo": "#d95f02",
    "walk": "#1b7837",
    "walk clipped twice": "#7fbf7b",
}
PANELS = {HARD: "hard set: untrained pass rates below 0.0004", "chain-12": "default set"}
AXES = {  # fields of Point: label, divisor
    "step": ("steps", 1),
    "generated": ("million generated tokens, of all kinds", 1e6),
    "trained": ("million tokens in the loss", 1e6),
    "verifier_calls": ("thousand verifier calls", 1e3),
    "cpu": ("CPU seconds, transformers engine", 1),
}


def drawn_sets(results: list[Result]) -> list[str]:
    return [data for data in PANELS if set(in_table(results, data)) & set(DRAWN)]


def draw_headline(results: list[Result], out: Path) -> None:
    """Held-out pass rate by generated tokens on the hard and the default set: every run."""
    sets = drawn_sets(results)
    plt = pyplot()
    size = (5.5 * len(sets) + 1, 3.6)
    figure, panels = plt.subplots(1, len(sets), figsize=size, squeeze=False, layout="constrained")
    for panel, data in zip(panels[0], sets):
        named = in_table(results, data)
        for arm, color in DRAWN.items():
            if arm in named:
                draw_runs(panel, named[arm], f"{arm}, {seeds_of(named[arm])}", color)
        label_panel(panel, "generated", PANELS[data])
        panel.legend(loc="best", fontsize=8)
    figure.savefig(out, dpi=120)
    plt.close(figure)


def draw_runs(panel, mine: list[Result], label: str, color: str) -> None:
    """Every run, and their mean: a mean of runs of which some never learn says little alone."""
    divisor = AXES["generated"][1]
    for result in mine:
        x = column(result, "generated") / divisor
        panel.plot(x, column(result, "pass_rate"), color=color, alpha=0.4, linewidth=0.8)
    x = np.mean([column(result, "generated") for result in mine], axis=0) / divisor
    rates = np.mean([column(result, "pass_rate") for result in mine], axis=0)
    panel.plot(x, rates, color=color, linewidth=2.2, label=label)


def draw_costs(results: list[Result], out: Path) -> None:
    """Mean pass rate with Student's 95% band over seeds, against each cost; a row for each set."""
    sets = drawn_sets(results)
    plt = pyplot()
    size = (3.4 * len(AXES), 3.2 * len(sets))
    figure, grid = plt.subplots(
        len(sets), len(AXES), figsize=size, sharey="row", squeeze=False, layout="constrained"
    )
    for row, data in zip(grid, sets):
        named = in_table(results, data)
        for panel, axis in zip(row, AXES):
            for arm, color in DRAWN.items():
                if arm in named:
                    draw_band(panel, named[arm], axis, f"{arm}, {seeds_of(named[arm])}", color)
            label_panel(panel, axis, PANELS[data] if axis == "step" else "")
        row[2].legend(loc="lower right", fontsize=8)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def draw_band(panel, mine: list[Result], axis: str, label: str, color: str) -> None:
    x = np.mean([column(result, axis) for result in mine], axis=0) / AXES[axis][1]
    rates = np.array([column(result, "pass_rate") for result in mine])  # [seeds, evaluations]
    bands = [t_interval(list(at_once)) for at_once in rates.T]
    panel.plot(x, [band.value for band in bands], color=color, label=label)
    low = [max(0.0, band.low) for band in bands]
    panel.fill_between(x, low, [band.high for band in bands], color=color, alpha=0.15, linewidth=0)


def label_panel(panel, axis: str, title: str) -> None:
    panel.set(title=title, xlabel=AXES[axis][0], ylim=(0, 0.9))
    if title:
        panel.set_ylabel("held-out pass rate")
    panel.grid(alpha=0.3)


# ------------------------------------------------------------------------------------ command line


def report(results: list[Result]) -> str:
    """All tables, as Markdown."""
    commits = ", ".join(sorted({result.commit for result in results}))
    parts = [f"{len(results)} runs, of commits {commits}.", markdown(sweep_rows(results))]
    for table in dict.fromkeys(part.table or part.data for part in SLICES.values()):
        named = in_table(results, table)
        if named:
            rows_of = benchmark_rows if table.startswith("SmolLM2") else outcome_rows
            parts += [f"### {table}", markdown(rows_of(named)), markdown(cost_rows(named))]
    difficulty = difficulty_rows(results)
    if difficulty:
        parts += ["### By difficulty", markdown(difficulty)]
    claims = claim_rows(results)
    if claims:
        parts += ["### Claims", markdown(claims)]
    return "\n\n".join(parts)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Prints what the finished runs say.")
    parser.add_argument("--lines", type=Path, default=LINES, help="where the results are kept")
    parser.add_argument("--renew", action="store_true", help="renew tests/study.md and pictures")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="where --renew draws")
    parser.add_argument("--page", type=Path, default=LINES.with_suffix(".md"), help="of --renew")
    args = parser.parse_args(argv)
    results = read_results(args.lines)
    if not results:
        raise UserError(f"{args.lines}: holds no run yet; python -m tests.study sweep")
    print(report(results))
    if args.renew:
        renew(args.page, "tests/study_tables.py", report(results))
        draw_headline(results, args.pictures / "study.png")
        draw_costs(results, args.pictures / "study_costs.png")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        print(f"study_tables: {fault}", file=sys.stderr)
        sys.exit(2)
