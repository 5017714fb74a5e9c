"""The runs of the study: which method reaches what, at what cost, on the embedded task.

    python -m tests.study default --jobs 2     # trains what is missing of a slice, or of several
    python -m tests.study_tables               # what the finished runs say so far

The plan is in tests/study.md, that of SmolLM2's slices in tests/language.md. A slice is a list of
arms on one set of problems with some seeds. Every finished run becomes one line of
tests/study.jsonl, which is committed, so a study can be spread over days and machines. `sweep`
comes first: it gives every arm its learning rate. A run that was cut off is resumed.

Left out: runs on other machines at once (two runners of one slice train the same runs).

Try it alone:  python -m tests.study sweep --minutes 1
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from threading import Lock

import numpy as np
from tqdm import tqdm

from data.curves import final, finished_problems, purposes_of
from data.faults import UserError
from data.runs import Run, read_run
from data.tasks import load_problems
from data.verifiers import DELIMITER

ROOT = Path(__file__).resolve().parent.parent
LINES = Path(__file__).with_suffix(".jsonl")
SAMPLES = 8  # responses of a benchmark to a problem
END = 10  # steps at each end of a run, for what a run begins and ends with

# -------------------------------------------------------------------------------------------- plan


@dataclass
class Arm:
    """What is compared: a script with its flags, and whose sweep gives the learning rate."""

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
    "srpo response length": Arm("--method srpo --length response", "srpo"),
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
    # What may better it.
    "walk latest": Arm("--method tests/better.py:latest --base 4", "walk"),
    "walk kept": Arm("--method tests/better.py:kept --base 4", "walk"),
    "walk by mean": Arm("--method tests/better.py:by_mean --base 4", "walk"),
    "walk rewarded reviews": Arm(
        "--method tests/better.py:rewarded_reviews --base 4 --localize_temperature 1", "walk"
    ),
    "walk 24 rounds": Arm("--method walk --rounds 24", "walk"),
    "walk 4 rounds": Arm("--method walk --rounds 4", "walk"),
    "walk base 2": Arm("--method walk --base 2", "walk"),
    "walk base 1": Arm("--method walk --base 1", "walk"),
    "walk warm": Arm("--method walk", "walk", "tests/warm.py"),
    "walk clipped twice": Arm("--method walk --updates 2 --clip 0.2", "walk"),
    # Others' methods, at GRPO's rate but for VinePPO.
    "corrections": Arm("--method tests/methods.py:corrections", "grpo"),
    # A step of VinePPO samples seven times as many tokens for a prompt: so it has fewer prompts,
    # and a rate of its own.
    "vineppo": Arm(
        "--method tests/methods.py:vineppo --base 4 --oracle_samples 2 --prompts_per_step 8"
    ),
    "spo_tree": Arm("--method tests/methods.py:spo_tree --length step", "grpo"),
    # The paper's ablations, at SRPO's rate.
    "srpo 2x4": Arm("--method srpo --split 2x4", "srpo"),
    "srpo unmasked": Arm("--method srpo --mask_prefix false", "srpo"),
    "srpo exact": Arm("--method srpo --localizer verifier", "srpo"),
    # Steps of a fixed length along the plain gradient; their "learning rate" is that length.
    "grpo sgd": Arm("--method grpo", script="tests/sgd.py"),
    "walk sgd": Arm("--method walk", script="tests/sgd.py"),
}


@dataclass(frozen=True)
class Setup:
    """What all runs of a slice share, whatever their arm: flags."""

    train: str  # of srpo.py
    benchmark: str  # of eval.py benchmark, after the last step; "": none


EMBEDDED = Setup("--eval_every 10 --save_every 20", "--problems 256")
SWEEP = Setup(EMBEDDED.train, "")
# Of the policy that data/warm_start.py makes in smollm2/; the plan: tests/language.md.
LIMITS = "--max_thoughts 9 --max_tokens_per_thought 32 --localize_tokens 256"
ENGLISH_STEPS = (
    f"--model smollm2 --dtype bfloat16 --prompts_per_step 8 --micro_batch 8 {LIMITS} "
    "--eval_every 12 --eval_problems 32 --save_every 2"
)
SMOLLM2 = Setup(
    f"{ENGLISH_STEPS} --lora_rank 8",  # needs peft
    f"--problems 96 --dtype float32 {LIMITS}",  # bf16 would round merged adapters away
)
SMOLLM2_PILOTS = Setup(SMOLLM2.train, f"--problems 64 --dtype float32 {LIMITS}")
ALL_WEIGHTS = Setup(ENGLISH_STEPS, f"--problems 64 --dtype bfloat16 {LIMITS}")  # the first pilots


@dataclass
class Slice:
    """Runs that belong together."""

    arms: list[str]
    data: str
    seeds: range
    steps: int
    setup: Setup = EMBEDDED
    lr: float | None = None  # of all its arms; None: each has that of its sweep
    table: str = ""  # where its results stand, beside those of other slices; "": by data


CONTROLS = (
    "walk half, walk at random, true solution, success alone, walk exact, chained groups, no walk, "
    "more samples"
).split(", ")
BETTER = (
    "walk, walk latest, walk kept, walk by mean, walk rewarded reviews, walk 24 rounds, "
    "walk base 2, walk base 1"
).split(", ")
CHOSEN = ["walk", "walk latest", "walk warm", "walk base 2"]
CLIPPED = ["grpo clipped twice", "srpo clipped twice", "srpo 1x8"]
OTHERS = ["srpo response length", "srpo 1x8", "vineppo", "spo_tree", "corrections"]
ABLATIONS = ["srpo 2x4", "srpo unmasked", "srpo exact"]
HARD = "chain-12-below-4e-4"
ENGLISH = "english-4-5"


def fixed_length(length: float) -> Slice:
    """One run each of GRPO and the walk whose steps have this length; it stands for the rate."""
    table = f"Steps of length {length:g} along the plain gradient"
    return Slice(["grpo sgd", "walk sgd"], "chain-12", range(1), 60, lr=length, table=table)


def pilots(lr: float, setup: Setup = SMOLLM2_PILOTS) -> Slice:
    """Short runs of SmolLM2 that choose the learning rate; each rate has a table of its own."""
    trained = "all weights" if setup is ALL_WEIGHTS else "adapters"
    return Slice(
        ["grpo", "walk 4 rounds"],
        ENGLISH,
        range(100, 101),
        6,
        setup,
        lr=lr,
        table=f"SmolLM2, pilots of {trained} at {lr:g}",
    )


def pretrained(arm: str, steps: int) -> Slice:
    """The runs of SmolLM2 that count; all arms generate as many tokens, so their steps differ."""
    return Slice([arm], ENGLISH, range(3), steps, SMOLLM2, lr=1e-4, table="SmolLM2")


SLICES = {
    "sweep": Slice(["grpo", "walk", "srpo", "rrpo"], "chain-12", range(100, 102), 40, SWEEP),
    "hard": Slice(["srpo", "walk"], HARD, range(5), 60),
    "hard-grpo": Slice(["grpo"], HARD, range(5), 120),
    "default": Slice(["grpo", "srpo", "walk", "rrpo"], "chain-12", range(5), 60),
    "ideas": Slice(BETTER, HARD, range(100, 102), 40, table="Ideas on the hard set"),
    "better-hard": Slice(
        CHOSEN, HARD, range(5, 10), 60, table="Ideas on the hard set, fresh seeds"
    ),
    "sweep-clipped": Slice(CLIPPED, "chain-12", range(100, 102), 40, SWEEP),
    "sweep-vineppo": Slice(["vineppo"], "chain-12", range(100, 102), 40, SWEEP),
    "default-clipped": Slice(CLIPPED[:2], "chain-12", range(5), 60),
    "hard-clipped": Slice(["grpo clipped twice"], HARD, range(5), 120),
    "controls-hard": Slice(CONTROLS, HARD, range(3), 60),
    "walk-clipped": Slice(["walk clipped twice"], "chain-12", range(5), 60),
    "hard-walk-clipped": Slice(["walk clipped twice"], HARD, range(5), 60),
    "hard-corrections": Slice(["corrections"], HARD, range(5), 60),
    "difficulty-3e-3": Slice(["srpo", "walk"], "chain-12-below-3e-3", range(3), 60),
    "difficulty-3e-3-grpo": Slice(["grpo"], "chain-12-below-3e-3", range(3), 120),
    "difficulty-2e-2": Slice(["srpo", "walk"], "chain-12-below-2e-2", range(3), 60),
    "difficulty-2e-2-grpo": Slice(["grpo"], "chain-12-below-2e-2", range(3), 120),
    "controls": Slice(["walk at random", "no walk"], "chain-12", range(3), 60),
    "ablations": Slice(ABLATIONS, "chain-12", range(3), 60),
    "others": Slice(OTHERS, "chain-12", range(3), 60),
    "sgd-0.1": fixed_length(0.1),
    "sgd-0.2": fixed_length(0.2),
    "smollm2-pilots-5e-5": pilots(5e-5, ALL_WEIGHTS),
    "smollm2-pilots-2.5e-5": pilots(2.5e-5, ALL_WEIGHTS),
    "smollm2-pilots-1e-5": pilots(1e-5, ALL_WEIGHTS),
    "smollm2-pilots-1e-4": pilots(1e-4),
    "smollm2-pilots-3e-4": pilots(3e-4),
    "smollm2-grpo": pretrained("grpo", 24),
    "smollm2-srpo": pretrained("srpo", 23),
    "smollm2-walk": pretrained("walk 4 rounds", 24),
}
GRID = [2.5e-4, 5e-4, 1e-3]  # learning rates of every arm; longer where the best is at an end
SWEEP_SEEDS = 2

# -------------------------------------------------------------------------------------------- runs


@dataclass
class Job:
    """One training run, done or to do. Its key names its run directory; a key runs once."""

    slice: str
    arm: str
    data: str
    seed: int
    steps: int
    lr: float

    @property
    def key(self) -> str:
        """Arms of one name must keep their flags: the key does not hold them."""
        name = f"{self.arm}-{self.data}-lr{self.lr:g}-{self.steps}-{self.seed}"
        return name.replace(" ", "-")


@dataclass
class Point:
    """An evaluation along a run: what was spent until then, and what was reached."""

    step: int
    generated: int  # tokens of all kinds
    trained: int  # tokens in the loss
    verifier_calls: int
    seconds: float  # by the clock, without evaluations
    pass_rate: float  # held-out


@dataclass
class Result(Job):
    """What is kept of a run: one line of study.jsonl. Lists of two: first and last ten steps."""

    commit: str  # of the last start, where the run was resumed
    date: str
    cpu_seconds: float | None  # of training and its evaluations; None: it was resumed
    curve: list[Point]
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
    # Of the benchmark; None: there was none, or the line is older.
    right: list[int] | None = None  # right responses to each held-out problem, of 8
    certified: int | None = None  # right responses whose every step checks
    distinct: int | None = None  # different texts among the right responses to a problem, summed


def read_results(path: Path) -> list[Result]:
    if not path.exists():
        return []
    results = []
    for line in path.read_text(encoding="utf-8").splitlines():
        result = Result(**json.loads(line))
        result.curve = [Point(**point) for point in result.curve]
        results.append(result)
    return results


@dataclass
class Untrained:
    """A benchmark of the policy from which runs start, on the problems of their seed."""

    seed: int
    right: list[int]  # these three as in Result
    certified: int
    distinct: int

    @property
    def pass_rate(self) -> float:
        return float(np.mean(self.right)) / SAMPLES

    @property
    def pass_at_8(self) -> float:
        return float(np.mean([n > 0 for n in self.right]))


def read_untrained(path: Path) -> list[Untrained]:
    return [Untrained(**json.loads(line)) for line in path.read_text().splitlines()]


def run_slices(args) -> None:
    """Trains what is missing of some slices, and appends a line for each finished run."""
    deadline = time.time() + 60 * args.minutes
    while True:
        results = read_results(args.lines)
        done = {result.key for result in results}
        todo = {}
        for name in args.slices:
            for job in jobs_of(name, results):
                if job.key not in done:
                    todo[job.key] = job
        if not todo or time.time() > deadline:
            print(f"{' '.join(args.slices)}: {len(todo)} runs are missing")
            return
        # All arms of a seed first: slices that are cut short are paired.
        run_jobs(sorted(todo.values(), key=lambda job: job.seed), deadline, args)


def jobs_of(name: str, results: list[Result]) -> list[Job]:
    """All runs of a slice; of a sweep those that are known to be needed by now."""
    part = SLICES[name]
    jobs = []
    for seed in part.seeds:
        for arm in part.arms:
            if part.lr:
                rates = [part.lr]
            elif name.startswith("sweep"):
                rates = grid_of(arm, results)
            else:
                rates = [best_rate(arm, results)]
            jobs += [Job(name, arm, part.data, seed, part.steps, lr) for lr in rates]
    return jobs


def run_jobs(todo: list[Job], deadline: float, args) -> None:
    """Runs jobs side by side; none starts after the deadline. Raises UserError where one fails:
    none starts then, and those under way end and are kept."""
    lock = Lock()

    def run_and_keep(job: Job) -> None:
        result = run_job(job, deadline, args)
        if result is not None:
            with lock, args.lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(result)) + "\n")

    with ThreadPoolExecutor(args.jobs) as pool:
        running = [pool.submit(run_and_keep, job) for job in todo]
        try:
            for finished in tqdm(as_completed(running), total=len(todo), unit="run"):
                finished.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_job(job: Job, deadline: float, args) -> Result | None:
    """Trains and benchmarks one run. None: it is too late to start."""
    if time.time() > deadline:
        return None
    folder = args.out / job.key
    args.out.mkdir(parents=True, exist_ok=True)
    resumed = (folder / "config.json").exists()
    started_from = commit()
    cpu_seconds = run_command(train_command(job, folder, resumed), folder)
    setup = SLICES[job.slice].setup
    if setup.benchmark:
        benchmark = [sys.executable, "eval.py", "benchmark", "--engine", "hf", "--n", str(SAMPLES)]
        benchmark += ["--model", str(folder / "checkpoints" / f"step_{job.steps}")]
        benchmark += ["--data", job.data, "--temperature", "1", "--seed", str(job.seed)]
        benchmark += [*setup.benchmark.split(), "--out", str(folder / "benchmark")]
        run_command(benchmark, folder)
    return result_of(job, read_run(folder), started_from, None if resumed else cpu_seconds)


def train_command(job: Job, folder: Path, resume: bool) -> list[str]:
    arm = ARMS[job.arm]
    command = [sys.executable, arm.script]
    if resume:
        return [*command, "--resume", str(folder)]
    command += ["--engine", "hf", "--train_data", job.data, "--eval_data", job.data]
    command += ["--steps", str(job.steps), "--seed", str(job.seed), "--lr", str(job.lr)]
    command += ["--rollouts_every", "0", *SLICES[job.slice].setup.train.split()]
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


def result_of(job: Job, run: Run, started_from: str, cpu_seconds: float | None) -> Result:
    """Sums up a finished run. started_from: the commit."""
    lines = [line for line in run.lines if line["step"] > 0]
    tokens, seconds = Counter(), Counter()
    for line in lines:
        tokens.update(line["tokens"])
        seconds.update(line["seconds"])
    pass_rate, pass_at_8 = final(run)
    return Result(
        **asdict(job),
        commit=started_from,
        date=date.today().isoformat(),
        cpu_seconds=None if cpu_seconds is None else round(cpu_seconds, 1),
        curve=curve_of(run),
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
        walks=[walks_of(lines[:END]), walks_of(lines[-END:])],
        **successes_of(job.data, job.seed, run.folder / "benchmark"),
    )


def successes_of(data: str, seed: int, benchmark: Path) -> dict:
    """What the right responses of a benchmark are like; see the last fields of Result."""
    files = [path for path in benchmark.glob("*.jsonl") if not path.name.startswith("unsolved-")]
    if not files:
        return {}
    problems = {problem.index: problem for problem in load_problems(data, 10**6 + seed)}
    right, certified, distinct = [], 0, 0
    for index, responses in sorted(finished_problems(files[0], SAMPLES).items()):
        texts = [response["text"] for response in responses if response["reward"] == 1]
        right.append(len(texts))
        distinct += len(set(texts))
        certified += sum(problems[index].check_steps(thoughts_of(text)) is None for text in texts)
    return {"right": right, "certified": certified, "distinct": distinct}


def thoughts_of(text: str) -> list[str]:
    return [thought for thought in re.split(f"(?<={DELIMITER})", text) if thought]


def curve_of(run: Run) -> list[Point]:
    """The evaluations that all runs of a slice have; a run that was stopped has others, too."""
    every, last = run.config["eval_every"], run.lines[-1]["step"]
    points = []
    calls = 0
    for line in run.lines:
        calls += line.get("verifier_calls", 0)
        planned = line["step"] in (0, last) or (every and line["step"] % every == 0)
        if planned and line.get("eval_pass_rate") is not None:
            seconds = round(line["seconds_total"], 1)
            spent = line["total_tokens"], line["trained_total"], calls, seconds
            points.append(Point(line["step"], *spent, line["eval_pass_rate"]))
    return points


def mean_of(lines: list[dict], key: str) -> float | None:
    """Mean of the values that are known; None if none is."""
    known = [line[key] for line in lines if line[key] is not None]
    return round(float(np.mean(known)), 5) if known else None


def ends(lines: list[dict], key: str) -> list[float | None]:
    """Means over the first and over the last ten steps."""
    return [mean_of(lines[:END], key), mean_of(lines[-END:], key)]


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
    grid = list(GRID)
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


# ---------------------------------------------------------------------------------- command line


def main(argv: list[str]) -> None:
    listed = f"slices: {', '.join(SLICES)}"
    parser = argparse.ArgumentParser(description=run_slices.__doc__, epilog=listed)
    parser.add_argument("slices", nargs="+", choices=SLICES, metavar="slice")
    parser.add_argument("--lines", type=Path, default=LINES, help="where the results are kept")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--minutes", type=float, default=10**6, help="no run starts after them")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="run directories")
    run_slices(parser.parse_args(argv))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        print(f"study: {fault}", file=sys.stderr)
        sys.exit(2)
