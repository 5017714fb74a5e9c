"""The study: which method reaches what, at what cost, on the embedded task. Plan: tests/study.md.

    python -m tests.study run default --jobs 2     # trains what is missing of a slice
    python -m tests.study tables                   # what the finished runs say so far

A slice is a list of arms on one set of problems with some seeds. Every finished run becomes one
line of tests/study.jsonl, which is committed, so a study can be spread over days and machines.
`sweep` comes first: it gives every arm its learning rate. A run that was cut off is resumed.

Left out: corrections for the number of comparisons (each is printed with its interval).

Try it alone:  python -m tests.study tables
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.curves import Interval, evaluations, final, markdown, purposes_of, pyplot, renew
from data.faults import UserError
from data.runs import Run, read_run

ROOT = Path(__file__).resolve().parent.parent
LINES = Path(__file__).with_suffix(".jsonl")

# -------------------------------------------------------------------------------------------- plan


@dataclass
class Arm:
    """What is compared: flags of srpo.py, and which arm's sweep gives the learning rate."""

    flags: str
    rate_of: str | None = None  # None: its own
    script: str = "srpo.py"


ARMS = {
    "grpo": Arm("--method grpo"),
    # Clipping needs two updates per buffer: with one the ratio is 1, and nothing is clipped.
    "grpo clipped twice": Arm("--method grpo --updates 2 --clip 0.2"),
    "rrpo": Arm("--method rrpo"),
    "srpo": Arm("--method srpo"),
    "srpo clipped twice": Arm("--method srpo --updates 2 --clip 0.2"),
    "srpo 1x8": Arm("--method srpo --split 1x8"),
    "srpo response length": Arm("--method srpo --length response"),
    "walk": Arm("--method walk"),
    # What the walk gains by: one thing changed in each.
    "no walk": Arm("--method walk --rounds 0", "walk"),
    "walk at random": Arm("--method walk --localizer random", "walk"),
    "walk exact": Arm("--method walk --localizer verifier", "walk"),
    "walk half": Arm("--method tests/arms.py:walk_half --base 4", "walk"),
    "success alone": Arm("--method tests/arms.py:success_alone --base 4", "walk"),
    "true solution": Arm("--method tests/arms.py:true_solution --base 4", "walk"),
    "chained groups": Arm("--method tests/arms.py:chained_groups --base 4", "walk"),
    "more samples": Arm("--method tests/arms.py:more_samples --base 4", "walk"),
    "corrections": Arm("--method tests/methods.py:corrections"),
    # A step of VinePPO samples seven times as many tokens for a prompt: so it has fewer prompts.
    "vineppo": Arm(
        "--method tests/methods.py:vineppo --base 4 --oracle_samples 2 --prompts_per_step 8"
    ),
    "spo_tree": Arm("--method tests/methods.py:spo_tree --length step"),
    # The paper's ablations, at SRPO's rate.
    "srpo 2x4": Arm("--method srpo --split 2x4", "srpo"),
    "srpo unmasked": Arm("--method srpo --mask_prefix false", "srpo"),
    "srpo exact": Arm("--method srpo --localizer verifier", "srpo"),
    # Steps of a fixed length along the plain gradient; their "learning rate" is that length.
    "grpo sgd": Arm("--method grpo", script="tests/sgd.py"),
    "walk sgd": Arm("--method walk", script="tests/sgd.py"),
}


@dataclass
class Slice:
    """Runs that belong together."""

    arms: list[str]
    data: str
    seeds: range
    steps: int


CONTROLS = (
    "walk half, more samples, walk at random, true solution, success alone, walk exact, no walk, "
    "chained groups"
).split(", ")
CLIPPED = ["grpo clipped twice", "srpo clipped twice", "srpo 1x8"]
LATER = ["srpo response length", "corrections", "vineppo", "spo_tree"]
HARD = "chain-12-below-4e-4"
SLICES = {
    "sweep": Slice(["grpo", "walk", "srpo", "rrpo"], "chain-12", range(100, 102), 40),
    "hard": Slice(["srpo", "walk"], HARD, range(5), 60),
    "hard-grpo": Slice(["grpo"], HARD, range(5), 120),
    "sweep-clipped": Slice(CLIPPED, "chain-12", range(100, 102), 40),
    "default-clipped": Slice(CLIPPED[:2], "chain-12", range(5), 60),
    "controls-hard": Slice(CONTROLS, HARD, range(3), 60),
    "default": Slice(["grpo", "srpo", "walk", "rrpo"], "chain-12", range(5), 60),
    "controls": Slice(CONTROLS, "chain-12", range(3), 60),
    "difficulty-3e-3": Slice(["srpo", "walk"], "chain-12-below-3e-3", range(5), 60),
    "difficulty-3e-3-grpo": Slice(["grpo"], "chain-12-below-3e-3", range(5), 120),
    "difficulty-2e-2": Slice(["srpo", "walk"], "chain-12-below-2e-2", range(5), 60),
    "difficulty-2e-2-grpo": Slice(["grpo"], "chain-12-below-2e-2", range(5), 120),
    "sweep-later": Slice(LATER, "chain-12", range(100, 102), 40),
    "others": Slice([*LATER, "srpo 1x8"], "chain-12", range(3), 60),
    "others-hard": Slice(["corrections", "grpo clipped twice"], HARD, range(3), 60),
    "ablations": Slice(["srpo 2x4", "srpo unmasked", "srpo exact"], "chain-12", range(3), 60),
    "sweep-sgd": Slice(["grpo sgd", "walk sgd"], "chain-12", range(100, 102), 40),
    "sgd": Slice(["grpo sgd", "walk sgd"], "chain-12", range(1), 60),
}
GRID = [2.5e-4, 5e-4, 1e-3]  # learning rates of every arm; longer where the best is at an end
SGD_GRID = [0.05, 0.1, 0.2]  # lengths of steps
SWEEP_SEEDS = 2
TARGET = 0.3  # held-out pass rate
BENCHMARK = 256  # held-out problems, 8 responses each

# -------------------------------------------------------------------------------------------- runs


@dataclass
class Job:
    """One run: which, and for which slice."""

    slice: str
    arm: str
    data: str
    seed: int
    steps: int
    lr: float

    @property
    def key(self) -> str:
        """Names its run directory."""
        name = f"{self.arm}-{self.data}-lr{self.lr:g}-{self.steps}-{self.seed}"
        return name.replace(" ", "-")


@dataclass
class Result(Job):
    """What is kept of a run: one line of study.jsonl. Lists of two: first and last ten steps."""

    commit: str
    date: str
    cpu_seconds: float | None  # of training and its evaluations; None: it was resumed
    curve: list[list[float]]  # [step, generated tokens so far, held-out pass rate]
    pass_rate: float  # at the end: of a benchmark; in a sweep, of the last evaluation
    pass_at_8: float | None
    tokens: dict[str, int]  # generated, by purpose
    trained_tokens: int
    verifier_calls: int
    seconds: dict[str, float]  # by phase, by the clock
    flat_groups: list[float]
    entropy: list[float | None]  # nats
    exact: list[float | None]  # share of resets at the first wrong thought
    clean: list[float | None]  # share of resets with a clean prefix
    right_after_clean: float | None  # pass rate of continuations
    right_after_erroneous: float | None
    walks: list[list[int]]  # [found, failed] in the first and in the last ten steps


def read_results(path: Path) -> list[Result]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Result(**json.loads(line)) for line in lines]


def command_run(args) -> None:
    """Trains what is missing of a slice, and appends a line for each finished run."""
    deadline = time.time() + 60 * args.minutes
    while True:
        results = read_results(args.lines)
        done = {result.key for result in results}
        todo = [job for job in jobs_of(args.slice, results) if job.key not in done]
        if not todo or time.time() > deadline:
            print(f"{args.slice}: {len(todo)} runs are missing")
            return
        run_jobs(todo, deadline, args)


def jobs_of(name: str, results: list[Result]) -> list[Job]:
    """All runs of a slice; of a sweep those that are known to be needed by now."""
    part = SLICES[name]
    jobs = []
    for seed in part.seeds:  # all arms of a seed first: a slice that is cut short is paired
        for arm in part.arms:
            if name.startswith("sweep"):
                rates = grid_of(arm, results)
            else:
                rates = [best_rate(arm, results)]
            jobs += [Job(name, arm, part.data, seed, part.steps, lr) for lr in rates]
    return jobs


def run_jobs(todo: list[Job], deadline: float, args) -> None:
    """Runs jobs side by side; none starts after the deadline. Raises UserError where one fails."""
    with ThreadPoolExecutor(args.jobs) as pool:
        running = [pool.submit(run_job, job, deadline, args) for job in todo]
        try:
            for finished in tqdm(as_completed(running), total=len(todo), unit="run"):
                result = finished.result()
                if result is not None:
                    with args.lines.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(result)) + "\n")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_job(job: Job, deadline: float, args) -> Result | None:
    """Trains and benchmarks one run. None: it is too late to start."""
    if time.time() > deadline:
        return None
    folder = args.out / job.key
    args.out.mkdir(parents=True, exist_ok=True)
    resumed = (folder / "config.json").exists()
    cpu_seconds = run_command(train_command(job, folder, resumed), folder)
    if job.slice.startswith("sweep"):
        return result_of(job, read_run(folder), None if resumed else cpu_seconds)
    benchmark = [sys.executable, "eval.py", "benchmark", "--engine", "hf", "--n", "8"]
    benchmark += ["--model", str(folder / "checkpoints" / f"step_{job.steps}")]
    benchmark += ["--data", job.data, "--temperature", "1", "--seed", str(job.seed)]
    benchmark += ["--problems", str(args.benchmark_problems), "--out", str(folder / "benchmark")]
    run_command(benchmark, folder)
    return result_of(job, read_run(folder), None if resumed else cpu_seconds)


def train_command(job: Job, folder: Path, resume: bool) -> list[str]:
    arm = ARMS[job.arm]
    command = [sys.executable, arm.script]
    if resume:
        return [*command, "--resume", str(folder)]
    command += ["--engine", "hf", "--train_data", job.data, "--eval_data", job.data]
    command += ["--steps", str(job.steps), "--seed", str(job.seed), "--lr", str(job.lr)]
    command += ["--eval_every", "10", "--save_every", "20", "--rollouts_every", "0"]
    return [*command, *arm.flags.split(), "--out_dir", str(folder)]


def run_command(command: list[str], folder: Path) -> float:
    """Runs a command on one thread; its output goes to FOLDER.log. Returns its CPU seconds."""
    log = folder.with_name(folder.name + ".log")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("a") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise UserError(f"{folder} failed; see {log}")
    return usage.ru_utime + usage.ru_stime


def result_of(job: Job, run: Run, cpu_seconds: float | None) -> Result:
    """Sums up a finished run."""
    lines = [line for line in run.lines if line["step"] > 0]
    tokens, seconds = Counter(), Counter()
    for line in lines:
        tokens.update(line["tokens"])
        seconds.update(line["seconds"])
    curve = []
    for line in evaluations(run.lines):
        curve.append([line["step"], line["total_tokens"], line["eval_pass_rate"]])
    pass_rate, pass_at_8 = final(run)
    return Result(
        **asdict(job),
        commit=commit(),
        date=date.today().isoformat(),
        cpu_seconds=None if cpu_seconds is None else round(cpu_seconds, 1),
        curve=curve,
        pass_rate=round(pass_rate, 5),
        pass_at_8=None if np.isnan(pass_at_8) else round(pass_at_8, 5),
        tokens={purpose: tokens[purpose] for purpose in purposes_of(lines)},
        trained_tokens=sum(line["trained_tokens"] for line in lines),
        verifier_calls=sum(line["verifier_calls"] for line in lines),
        seconds={phase: round(s, 1) for phase, s in seconds.items()},
        flat_groups=ends(lines, "flat_groups"),
        entropy=ends(lines, "entropy"),
        exact=ends(lines, "localized_exact"),
        clean=ends(lines, "localized_clean"),
        right_after_clean=mean_of(lines, "pass_suffix_clean"),
        right_after_erroneous=mean_of(lines, "pass_suffix_erroneous"),
        walks=[walks_of(lines[:10]), walks_of(lines[-10:])],
    )


def mean_of(lines: list[dict], key: str) -> float | None:
    """Mean of the values that are known; None if none is."""
    known = [line[key] for line in lines if line[key] is not None]
    return round(float(np.mean(known)), 5) if known else None


def ends(lines: list[dict], key: str) -> list[float | None]:
    """Means over the first and over the last ten steps."""
    return [mean_of(lines[:10], key), mean_of(lines[-10:], key)]


def walks_of(lines: list[dict]) -> list[int]:
    found = sum(line["walk"]["found"] for line in lines)
    return [found, sum(line["walk"]["failed"] for line in lines)]


def commit() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


# ------------------------------------------------------------------------------------------- sweep


def swept(arm: str, results: list[Result]) -> dict[float, list[float]]:
    """Pass rates at the end of an arm's sweep runs, by learning rate."""
    rates = {}
    for result in results:
        if result.arm == arm and result.slice.startswith("sweep"):
            rates.setdefault(result.lr, []).append(result.pass_rate)
    return dict(sorted(rates.items()))


def grid_of(arm: str, results: list[Result]) -> list[float]:
    """The learning rates to try: the grid, longer where the best of the complete sweep is an end.

    A rate counts when all its seeds are there.
    """
    grid = list(SGD_GRID if arm.endswith("sgd") else GRID)
    rates = swept(arm, results)
    while all(len(rates.get(rate, [])) == SWEEP_SEEDS for rate in grid):
        best = max(grid, key=lambda rate: np.mean(rates[rate]))
        if best == grid[0]:
            grid.insert(0, best / 2)
        elif best == grid[-1]:
            grid.append(best * 2)
        else:
            break
    return grid


def best_rate(arm: str, results: list[Result]) -> float:
    """An arm's learning rate: the best mean pass rate of its sweep.

    Raises UserError where the sweep is not complete.
    """
    arm = ARMS[arm].rate_of or arm
    grid, rates = grid_of(arm, results), swept(arm, results)
    if any(len(rates.get(rate, [])) < SWEEP_SEEDS for rate in grid):
        raise UserError(f"the sweep of {arm} is not complete; run a sweep that has it first")
    return max(grid, key=lambda rate: np.mean(rates[rate]))


# ------------------------------------------------------------------------------------- statistics

# Quantiles of Student's t for a two-sided 95% interval, by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def t_interval(values: list[float]) -> Interval:
    """Mean over seeds and Student's 95% interval; the bounds are nan for one seed."""
    values = np.array(values, float)
    if len(values) < 2:
        return Interval(values.mean(), np.nan, np.nan)
    half = T95[len(values) - 1] * values.std(ddof=1) / np.sqrt(len(values))
    return Interval(values.mean(), values.mean() - half, values.mean() + half)


def in_words(measured: Interval, digits: int = 3) -> str:
    """`0.582 (0.558 to 0.606)`."""
    value, low, high = (f"{x:.{digits}f}" for x in measured)
    return value if low == "nan" else f"{value} ({low} to {high})"


@dataclass
class Reach:
    """When a run reached the target. Where it did not: its whole cost, a lower bound."""

    reached: bool
    steps: float
    tokens: float  # generated


def reach(result: Result, target: float = TARGET) -> Reach:
    """Linear between evaluations."""
    for (step0, tokens0, rate0), (step1, tokens1, rate1) in pairwise(result.curve):
        if rate0 < target <= rate1:
            part = (target - rate0) / (rate1 - rate0)
            steps = step0 + part * (step1 - step0)
            return Reach(True, steps, tokens0 + part * (tokens1 - tokens0))
    return Reach(False, *result.curve[-1][:2])


def rate_at(result: Result, tokens: float) -> float:
    """The held-out pass rate when so many tokens are generated, linear between evaluations."""
    curve = np.array(result.curve)
    return float(np.interp(tokens, curve[:, 1], curve[:, 2]))


@dataclass
class Saving:
    """How many times as much the second arm spends until the target."""

    ratio: Interval  # geometric mean over seeds
    bound: str  # ">" if a run of the second never got there, "<" of the first, "?" of both, or ""

    def __str__(self) -> str:
        if self.bound == "?":
            return "-"
        if self.bound:
            return f"{self.bound} {self.ratio.value:.2f}"
        return in_words(self.ratio, 2)


@dataclass
class Pair:
    """Two arms on one set, compared seed by seed."""

    first: list[Result]
    second: list[Result]

    def matched(self) -> list[tuple[Result, Result]]:
        """The two runs of each seed that both have."""
        second = {result.seed: result for result in self.second}
        return [(a, second[a.seed]) for a in self.first if a.seed in second]

    def difference(self) -> Interval:
        """Pass rate of the first minus that of the second."""
        return t_interval([a.pass_rate - b.pass_rate for a, b in self.matched()])

    def at_equal_tokens(self) -> Interval:
        """The same along training, where the arm that spent less has ended."""
        differences = []
        for a, b in self.matched():
            tokens = min(a.curve[-1][1], b.curve[-1][1])
            differences.append(rate_at(a, tokens) - rate_at(b, tokens))
        return t_interval(differences)

    def saving(self, what: str) -> Saving:
        """what: steps or tokens, a field of Reach."""
        logs = []
        first_missed = second_missed = False
        for a, b in self.matched():
            ours, theirs = reach(a), reach(b)
            first_missed |= not ours.reached
            second_missed |= not theirs.reached
            logs.append(np.log(getattr(theirs, what) / getattr(ours, what)))
        ratio = Interval(*np.exp(t_interval(logs)))
        if first_missed and second_missed:
            return Saving(ratio, "?")
        if second_missed:
            return Saving(ratio, ">")
        return Saving(ratio, "<" if first_missed else "")


# ---------------------------------------------------------------------------------------- tables


def on_set(results: list[Result], data: str) -> dict[str, list[Result]]:
    """The runs that count on one set of problems, by arm, in the order of ARMS."""
    named = {}
    for arm in ARMS:
        mine = [r for r in results if r.arm == arm and r.data == data]
        mine = [r for r in mine if not r.slice.startswith("sweep")]
        if mine:
            named[arm] = sorted(mine, key=lambda result: result.seed)
    return named


def sweep_rows(results: list[Result]) -> list[dict]:
    """Mean pass rate at the end of the sweep by arm and rate; the chosen one is marked."""
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


def outcome_rows(named: dict[str, list[Result]]) -> list[dict]:
    """What each arm reaches, beside GRPO."""
    rows = []
    grpo = named.get("grpo", [])
    for arm, mine in named.items():
        pair = Pair(mine, grpo)
        reached = len([result for result in mine if reach(result).reached])
        beside = bool(pair.matched()) and arm != "grpo"
        rows.append(
            {
                "arm": f"{arm}, {seeds_of(mine)}, {mine[0].steps} steps, {mine[0].lr:g}",
                "pass@1 (95%)": in_words(t_interval([r.pass_rate for r in mine])),
                "pass@8": f"{np.mean([r.pass_at_8 for r in mine]):.3f}",
                "minus grpo's": in_words(pair.difference()) if beside else "",
                "at equal tokens": in_words(pair.at_equal_tokens()) if beside else "",
                f"reached {TARGET}": f"{reached} of {len(mine)}",
                "grpo's steps / its": str(pair.saving("steps")) if beside else "",
                "grpo's tokens / its": str(pair.saving("tokens")) if beside else "",
            }
        )
    return rows


def cost_rows(named: dict[str, list[Result]]) -> list[dict]:
    """What each arm spends, and how it goes: means over seeds."""
    rows = []
    for arm, mine in named.items():
        cpu = [r.cpu_seconds for r in mine if r.cpu_seconds is not None]
        walks = np.mean([r.walks for r in mine], axis=0)  # [2 ends, found and failed]
        rows.append(
            {
                "arm": arm,
                "M generated": f"{np.mean([sum(r.tokens.values()) for r in mine]) / 1e6:.2f}",
                "M trained": f"{np.mean([r.trained_tokens for r in mine]) / 1e6:.2f}",
                "verifier calls": f"{np.mean([r.verifier_calls for r in mine]):,.0f}",
                "CPU s": f"{np.mean(cpu):.0f}" if cpu else "",
                "flat groups": both_ends([r.flat_groups for r in mine]),
                "entropy, nats": both_ends([r.entropy for r in mine]),
                "exact h*": both_ends([r.exact for r in mine]),
                "walks that found": " to ".join(share_found(end) for end in walks if end.sum()),
            }
        )
    return rows


def both_ends(values: list[list[float | None]]) -> str:
    """`0.72 to 0.09`: means over seeds of the first and of the last ten steps."""
    known = [pair for pair in values if None not in pair]
    if not known:
        return ""
    first, last = np.mean(known, axis=0)
    return f"{first:.2f} to {last:.2f}"


def share_found(end: np.ndarray) -> str:
    found, failed = end
    return f"{found / (found + failed):.2f}"


# ---------------------------------------------------------------------------------------- claims


@dataclass
class Claim:
    """A statement about two arms: a measured number lies between low and high."""

    text: str
    first: str
    second: str
    saved: str = ""  # steps or tokens until the target; "": the difference of pass rates
    low: float = 0.0
    high: float = np.inf


CLAIMS = [
    Claim("SRPO ends above RRPO", "srpo", "rrpo"),
    Claim("SRPO ends above GRPO", "srpo", "grpo"),
    Claim("RRPO ends within 0.05 of GRPO", "rrpo", "grpo", low=-0.05, high=0.05),
    Claim("SRPO needs half of GRPO's steps or fewer (times)", "srpo", "grpo", "steps", low=2),
    Claim("... and half of its tokens (times)", "srpo", "grpo", "tokens", low=2),
    Claim("1x4 ends above 2x4", "srpo", "srpo 2x4"),
    Claim("1x4 ends above 1x8", "srpo", "srpo 1x8"),
    Claim("masking the prefix helps", "srpo", "srpo unmasked"),
    Claim("ours: the exact localizer helps", "srpo exact", "srpo"),
    Claim("ours: SRPO ends above GRPO, both clipped", "srpo clipped twice", "grpo clipped twice"),
    Claim("ours: the walk ends above GRPO", "walk", "grpo"),
]


def claim_rows(named: dict[str, list[Result]]) -> list[dict]:
    """Each claim whose two arms were run, with its number and the verdict."""
    rows = []
    for claim in CLAIMS:
        pair = Pair(named.get(claim.first, []), named.get(claim.second, []))
        if not pair.matched():
            continue
        if claim.saved:
            saving = pair.saving(claim.saved)
            number, judged = str(saving), verdict(saving.ratio, claim, saving.bound)
        else:
            number, judged = in_words(pair.difference()), verdict(pair.difference(), claim)
        rows.append({"claim": claim.text, "measured (95%)": number, "verdict": judged})
    return rows


def verdict(measured: Interval, claim: Claim, bound: str = "") -> str:
    """Whether the interval lies inside the claim's bounds, outside, or across one of them.

    bound: ">" if the number is a lower bound, which cannot refute a claim of at least `low`; "<" if
    it is an upper one, which cannot support it.
    """
    inside = claim.low < measured.low and measured.high < claim.high
    outside = measured.high < claim.low or measured.low > claim.high
    if inside and bound in ("", ">"):
        return "seen here"
    if outside and bound in ("", "<"):
        return "not so here"
    return "undecided"  # also for one seed, whose interval is nan


# --------------------------------------------------------------------------------------- picture

DRAWN = {"grpo": "#4d4d4d", "srpo": "#d95f02", "walk": "#1b7837"}
PANELS = {HARD: "hard set: untrained pass rates below 0.0004", "chain-12": "default set"}


def draw(results: list[Result], out: Path) -> None:
    """Held-out pass rate by generated tokens on the hard and the default set."""
    sets = [data for data in PANELS if set(on_set(results, data)) & set(DRAWN)]
    plt = pyplot()
    size = (5.5 * len(sets) + 1, 3.6)
    figure, axes = plt.subplots(1, len(sets), figsize=size, squeeze=False, layout="constrained")
    for axis, data in zip(axes[0], sets):
        named = on_set(results, data)
        for arm, color in DRAWN.items():
            if arm in named:
                draw_arm(axis, named[arm], f"{arm}, {seeds_of(named[arm])}", color)
        axis.set(title=PANELS[data], xlabel="million generated tokens, of all kinds")
        axis.set_ylabel("held-out pass rate")
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left")
    figure.savefig(out, dpi=120)
    plt.close(figure)


def draw_arm(axis, mine: list[Result], label: str, color: str) -> None:
    """Every run, and their mean: a mean of runs of which some never learn says little alone."""
    curves = np.array([result.curve for result in mine])  # [seeds, evaluations, 3]
    for curve in curves:
        axis.plot(curve[:, 1] / 1e6, curve[:, 2], color=color, alpha=0.4, linewidth=0.8)
    mean = curves.mean(0)
    axis.plot(mean[:, 1] / 1e6, mean[:, 2], color=color, linewidth=2.2, label=label)


def report(results: list[Result]) -> str:
    """All tables, as Markdown."""
    commits = ", ".join(sorted({result.commit for result in results}))
    parts = [f"{len(results)} runs, of commits {commits}.", markdown(sweep_rows(results))]
    for data in dict.fromkeys(part.data for part in SLICES.values()):
        named = on_set(results, data)
        if named:
            parts += [f"### {data}", markdown(outcome_rows(named)), markdown(cost_rows(named))]
    claims = claim_rows(on_set(results, "chain-12"))
    if claims:
        parts += ["### Claims, on the default set", markdown(claims)]
    return "\n\n".join(parts)


def command_tables(args) -> None:
    """Prints what the finished runs say, and can renew tests/study.md and draw the picture."""
    results = read_results(args.lines)
    if not results:
        raise UserError(f"{args.lines}: holds no run yet; python -m tests.study run sweep")
    print(report(results))
    if args.renew:
        renew(ROOT / "tests" / "study.md", "tests/study.py", report(results))
    if args.picture:
        draw(results, args.picture)


# ---------------------------------------------------------------------------------- command line


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lines", type=Path, default=LINES, help="where the results are kept")
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help=command_run.__doc__)
    run.set_defaults(command=command_run)
    run.add_argument("slice", choices=SLICES)
    run.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    run.add_argument("--minutes", type=float, default=10**6, help="no run starts after them")
    run.add_argument("--out", type=Path, default=Path("runs/study"), help="run directories")
    run.add_argument("--benchmark_problems", type=int, default=BENCHMARK, help="of each run")
    tables = commands.add_parser("tables", help=command_tables.__doc__)
    tables.set_defaults(command=command_tables)
    tables.add_argument("--renew", action="store_true", help="renew the results of tests/study.md")
    tables.add_argument("--picture", type=Path, help="where to draw GRPO, SRPO and the walk")
    args = parser.parse_args(argv)
    args.command(args)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        print(f"study: {fault}", file=sys.stderr)
        sys.exit(2)
