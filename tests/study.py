"""The evidence: a study of the paper's claims, and a look into the gradient of one step.

    python -m tests.study study --out runs/study      # train all variants, judge the paper's claims
    python -m tests.study signal                      # signal and noise of one step's gradient
    python -m tests.study anatomy --out anatomy.png   # which thoughts get credit: GRPO and SRPO

`study` trains GRPO, RRPO and SRPO with the paper's splits, localizers and ablations (STUDY below).
All variants train the same number of rollouts per step, and every method gets the same sweep of
learning rates. Each claim of the paper is then compared with a 95% interval over seeds. The two
variants of a claim are paired: they use the same seeds.

Left out: significance tests beyond intervals, corrections for the number of claims (each is printed
with its interval), and any task but the one that --data names (run the study again for another).

Try it alone:  python -m tests.study signal --data chain-3 --repeats 4 --prompts 8
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.curves import (
    AXES,
    NEGATIVE,
    POSITIVE,
    Named,
    cost_table,
    draw_curves,
    final,
    first_reach,
    interval,
    markdown,
    pyplot,
    results_table,
    spread,
)
from data.driver import Sampled, run_programs
from data.faults import UserError
from data.metrics import PURPOSES, is_flat
from data.policies import encode_question, load_policy
from data.problems import Problem
from data.runs import Run, read_run
from data.tasks import GENERATED, load_problems
from data.verifiers import DELIMITER
from localize import LOCALIZERS, check_localizer
from loss import backward, set_advantages, token_weights, weigh
from rollout import PROGRAMS, HFEngine, Rollout, Task, grouped
from srpo import Config, parse

ROOT = Path(__file__).resolve().parent.parent

# -------------------------------------------------------------------------------------- variants

# Flags of srpo.py by name. Every variant trains 8 rollouts per prompt.
STUDY = {
    "grpo": "--method grpo",
    "rrpo 1x4": "--method rrpo",
    "srpo 1x4": "--method srpo",
    "srpo 2x4": "--method srpo --split 2x4",
    "srpo 1x8": "--method srpo --split 1x8",
    "srpo 1x4 verifier": "--method srpo --localizer verifier",
    "srpo 1x4 oracle": "--method srpo --localizer oracle --oracle_samples 2",
    "srpo 1x4 unmasked": "--method srpo --mask_prefix false",
    "srpo 1x4 response length": "--method srpo --length response",  # ours
    # Clipping needs two updates per buffer: with one the ratio is 1, and nothing is clipped.
    "srpo 1x4 2 updates": "--method srpo --updates 2",
    "srpo 1x4 clipped 2 updates": "--method srpo --updates 2 --clip 0.2",
    "grpo clipped 2 updates": "--method grpo --updates 2 --clip 0.2",
}
SIGNAL_VARIANTS = [
    "grpo",
    "rrpo 1x4",
    "srpo 1x4",
    "srpo 1x8",
    "srpo 2x4",
    "srpo 1x4 verifier",
    "srpo 1x4 response length",
]
DRAWN_VARIANTS = [  # in study.png; more curves would hide each other
    "grpo",
    "rrpo 1x4",
    "srpo 1x4",
    "srpo 1x4 verifier",
    "srpo 1x4 clipped 2 updates",
    "grpo clipped 2 updates",
]
GRID = [2.5e-4, 5e-4, 1e-3]  # learning rates of the sweep, the same for every method


def tuned_variant(name: str) -> str:
    """The variant whose learning rate this one takes: the plain form of its method."""
    method = name.split()[0]
    if method == "grpo":
        return "grpo"
    return f"{method} 1x4"


# ----------------------------------------------------------------------------------------- study

STUDY_CAPTION = """\
*The last points of these curves are held-out evaluations during training. The final pass rates in
the tables and claims are benchmarks of the last checkpoints: {problems} held-out problems, 8
samples each.*"""


def command_study(args) -> None:
    """Trains all variants with all seeds and writes study.md, study.png and ablations.png to --out.

    Finished runs are reused: the same command continues where it stopped, and can raise --seeds.
    Raises UserError if --out holds a study with other settings, or if a run fails."""
    keep_settings(args)
    before = args.out / "before"
    start = Job(before, [benchmark_command(args, args.model, before, run_seed=0)])
    run_jobs([start], side_by_side=1, title="before training")
    sweep = sweep_learning_rates(args)
    named = train_variants(args, sweep)
    outcomes = {}
    for name, runs in named.items():
        outcomes[name] = [outcome(run, args.target) for run in runs]
    drawn = {name: named[name] for name in DRAWN_VARIANTS if name in named}
    draw_curves(drawn, args.out / "study.png", tuple(AXES))
    draw_ablations(named, outcomes, args.out / "ablations.png")

    sections = [headline(args), "![Held-out pass rate along training](study.png)"]
    sections.append(STUDY_CAPTION.format(problems=args.benchmark_problems))
    if len(args.grid) > 1:
        sections.append(
            f"Learning rates: pass rate after {args.sweep_steps} steps, {args.sweep_seeds} seeds "
            "(not those of the study)"
        )
        sections.append(markdown(sweep_rows(sweep)))
    sections.append(results_table(named, args.target))
    against = against_grpo_rows(outcomes, args.target)
    if against:
        sections.append(markdown(against))
    sections.append(cost_table(named))
    claims = claim_rows(outcomes, args.target)
    if claims:
        sections.append(markdown(claims))
    text = "\n\n".join(sections) + "\n"
    (args.out / "study.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"{args.out}/study.md, study.png, ablations.png")


# Arguments that a study may change when it continues; the others are kept in settings.json.
MAY_CHANGE = ("out", "command", "seeds", "variants", "target", "jobs")


def keep_settings(args) -> None:
    """Writes settings.json to --out; raises UserError if another study is there."""
    settings = {key: value for key, value in vars(args).items() if key not in MAY_CHANGE}
    path = args.out / "settings.json"
    args.out.mkdir(parents=True, exist_ok=True)
    if path.exists() and json.loads(path.read_text()) != settings:
        raise UserError(
            f"{args.out} holds a study with other settings; choose another --out "
            "(only --seeds, --variants, --target and --jobs may change)"
        )
    path.write_text(json.dumps(settings))


def sweep_learning_rates(args) -> dict[str, dict[float, list[float]]]:
    """Final pass rates of short runs, one for each sweep seed, by method and learning rate.

    A grid of one learning rate needs no runs: its list is empty."""
    methods = list(dict.fromkeys(tuned_variant(name) for name in args.variants))
    if len(args.grid) == 1:
        return {method: {args.grid[0]: []} for method in methods}
    sweep = {}
    jobs = []
    for method in methods:
        sweep[method] = {}
        for lr in args.grid:
            sweep[method][lr] = []
            for run_seed in range(100, 100 + args.sweep_seeds):  # not those of the study
                folder = args.out / "sweep" / f"{method}-{lr:g}-{run_seed}".replace(" ", "-")
                sweep[method][lr].append(folder)
                jobs.append(run_job(args, folder, method, lr, run_seed, args.sweep_steps))
    run_jobs(jobs, args.jobs, "learning rates")
    for rates in sweep.values():
        for lr, folders in rates.items():
            rates[lr] = [final_pass_rate(read_run(folder)) for folder in folders]
    return sweep


def best_learning_rate(rates: dict[float, list[float]]) -> float:
    """The learning rate with the highest mean pass rate; the only one where there is one."""
    if len(rates) == 1:
        return next(iter(rates))
    means = {lr: np.mean(values) for lr, values in rates.items()}
    return max(means, key=means.get)


def train_variants(args, sweep: dict[str, dict[float, list[float]]]) -> Named:
    """Trains every variant with every seed and returns the runs by variant.

    An ablation takes the learning rate of its method, divided by its updates per buffer."""
    folders = {name: [] for name in args.variants}
    jobs = []
    for run_seed in range(args.seeds):  # all variants of a seed first: a study cut short is paired
        for name in args.variants:
            lr = best_learning_rate(sweep[tuned_variant(name)])
            lr = lr / parse(STUDY[name].split()).updates
            folder = args.out / f"{name}-{run_seed}".replace(" ", "-")
            folders[name].append(folder)
            jobs.append(run_job(args, folder, name, lr, run_seed, args.steps))
    run_jobs(jobs, args.jobs, "study")
    named = {}
    for name in args.variants:
        named[name] = [read_run(folder) for folder in folders[name]]
    return named


def headline(args) -> str:
    """What was run, and the pass rate before training."""
    path = args.out / "before" / "benchmark" / "results.json"
    (start,) = json.loads(path.read_text())["results"].values()
    return (
        f"{args.seeds} seeds, {args.steps} steps of {args.prompts_per_step} prompts x 8 trained "
        f"rollouts on {args.data}, {args.jobs} runs of one thread side by side on "
        f"{os.cpu_count()} cores\n"
        f"Before training: pass rate {start['mean']:.3f} ± {start['half']:.3f} (half a 95% "
        f"interval over {start['problems']} problems), pass@8 {start['pass_at']['8']:.3f}"
    )


def sweep_rows(sweep: dict[str, dict[float, list[float]]]) -> list[dict]:
    """The sweep as table rows: one for each method, one column for each learning rate."""
    rows = []
    for method, rates in sweep.items():
        row = {"method": method}
        for lr, values in rates.items():
            row[f"{lr:g}"] = spread(values, ".3f")
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------ jobs


@dataclass
class Job:
    """A run directory and the commands that fill it; the last one writes its benchmark."""

    folder: Path
    commands: list[list[str]]


def run_job(args, folder: Path, name: str, lr: float, run_seed: int, steps: int) -> Job:
    """Trains a variant, then benchmarks its last checkpoint. A run that was cut off is resumed."""
    train = [sys.executable, str(ROOT / "srpo.py")]
    if (folder / "config.json").exists():
        train += ["--resume", str(folder)]
    else:
        train += STUDY[name].split()
        train += ["--lr", str(lr), "--steps", str(steps), "--seed", str(run_seed)]
        train += ["--train_data", args.data, "--eval_data", args.data, "--engine", "hf"]
        train += ["--prompts_per_step", str(args.prompts_per_step)]
        train += ["--eval_every", str(args.eval_every), "--save_every", "25"]
        train += args.flags.split()
        train += ["--model", args.model, "--out_dir", str(folder)]
    checkpoint = folder / "checkpoints" / f"step_{steps}"
    return Job(folder, [train, benchmark_command(args, checkpoint, folder, run_seed)])


def benchmark_command(args, model: Path | str, folder: Path, run_seed: int) -> list[str]:
    """Command that writes pass@1 and pass@8 of a policy at T = 1 to FOLDER/benchmark."""
    cfg = parse(args.flags.split())  # responses may get as long as in training
    command = [sys.executable, str(ROOT / "eval.py"), "benchmark"]
    command += ["--model", str(model), "--data", args.data, "--engine", "hf"]
    command += ["--n", "8", "--temperature", "1", "--seed", str(run_seed)]
    command += ["--problems", str(args.benchmark_problems), "--out", str(folder / "benchmark")]
    command += ["--max_thoughts", str(cfg.max_thoughts)]
    command += ["--max_tokens_per_thought", str(cfg.max_tokens_per_thought)]
    command += ["--max_rows", str(cfg.max_rows)]
    return command


def run_jobs(jobs: list[Job], side_by_side: int, title: str) -> None:
    """Runs all jobs that have no benchmark yet. Raises UserError for the first that fails."""
    todo = []
    for job in jobs:
        if not (job.folder / "benchmark" / "results.json").exists():
            todo.append(job)
    if not todo:
        return
    with ThreadPoolExecutor(side_by_side) as pool:
        running = [pool.submit(run_commands, job) for job in todo]
        bar = tqdm(as_completed(running), total=len(todo), desc=title, unit="run")
        try:
            for finished in bar:
                finished.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_commands(job: Job) -> None:
    """Runs the commands of a job, one after the other; their output goes to FOLDER.log."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    log = job.folder.parent / f"{job.folder.name}.log"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # jobs share the cores
    for command in job.commands:
        with log.open("a") as file:
            done = subprocess.run(command, stdout=file, stderr=file, env=environment)
        if done.returncode != 0:
            raise UserError(f"{job.folder} failed; see {log}")


# ---------------------------------------------------------------------------------------- claims


@dataclass
class Outcome:
    """What one run achieved, and what it cost."""

    final: float  # pass rate at the end
    reached: bool  # whether the held-out pass rate reached the target
    steps: float  # to the target; where it was not reached all steps, a lower bound
    tokens: float  # generated, to the target; a lower bound likewise
    sampling: float  # seconds spent sampling
    clean: float  # pass rate of suffixes after a prefix without an error; nan: none was seen
    erroneous: float  # pass rate of suffixes after a prefix with an error; nan: none was seen


def outcome(run: Run, target: float) -> Outcome:
    """Reads a run's outcome from its benchmark and its step lines."""
    steps = first_reach(run.lines, target, "step")
    tokens = first_reach(run.lines, target, "total_tokens")
    reached = not np.isnan(steps)
    if not reached:
        steps = run.lines[-1]["step"]
        tokens = run.lines[-1]["total_tokens"]
    sampling = 0.0
    for line in run.lines:
        for phase in PURPOSES:
            sampling += line.get("seconds", {}).get(phase, 0)
    return Outcome(
        final=final_pass_rate(run),
        reached=reached,
        steps=steps,
        tokens=tokens,
        sampling=sampling,
        clean=mean_of([line.get("pass_suffix_clean") for line in run.lines]),
        erroneous=mean_of([line.get("pass_suffix_erroneous") for line in run.lines]),
    )


def final_pass_rate(run: Run) -> float:
    """Benchmarked pass rate of the last checkpoint."""
    return final(run)[0]


def mean_of(values: list) -> float:
    """Mean of the values that are known (neither None nor nan); nan if none is."""
    known = [value for value in values if value is not None and not np.isnan(value)]
    if not known:
        return float("nan")
    return float(np.mean(known))


def difference(pairs: np.ndarray) -> float:
    """Mean of the first column minus mean of the second; pairs [seeds, 2]."""
    return pairs[:, 0].mean() - pairs[:, 1].mean()


def ratio(pairs: np.ndarray) -> float:
    """Mean of the first column over mean of the second; pairs [seeds, 2]."""
    return pairs[:, 0].mean() / pairs[:, 1].mean()


@dataclass
class Estimate:
    """A statistic and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def estimate(pairs: np.ndarray, statistic: Callable) -> Estimate:
    """Paired bootstrap over the rows of `pairs` [n, 2]; the bounds are nan for one row."""
    value, low, high = interval(pairs, statistic)
    return Estimate(value, low, high)


@dataclass
class Claim:
    """A statement about two variants: statistic(first, second) lies between low and high.

    By default the first variant ends above the second."""

    text: str
    first: str
    second: str
    measure: str = "final"  # a field of Outcome
    second_measure: str | None = None  # of the second variant, where it is another one
    statistic: Callable = difference
    low: float = 0.0
    high: float = math.inf


CLAIMS = [
    Claim("SRPO ends above RRPO", "srpo 1x4", "rrpo 1x4"),
    Claim("SRPO ends above GRPO", "srpo 1x4", "grpo"),
    Claim(
        "RRPO ends about where GRPO does (within 0.05)", "rrpo 1x4", "grpo", low=-0.05, high=0.05
    ),
    Claim(
        "SRPO reaches {target} in half the steps of GRPO or fewer (ratio)",
        "grpo",
        "srpo 1x4",
        measure="steps",
        statistic=ratio,
        low=2,
    ),
    Claim(
        "... and at half of all generated tokens (ratio)",
        "grpo",
        "srpo 1x4",
        measure="tokens",
        statistic=ratio,
        low=2,
    ),
    Claim(
        "a clean prefix is corrected about twice as often as an erroneous one "
        "(ratio, at least 1.5)",
        "srpo 1x4",
        "srpo 1x4",
        measure="clean",
        second_measure="erroneous",
        statistic=ratio,
        low=1.5,
    ),
    Claim("1x4 ends above 2x4", "srpo 1x4", "srpo 2x4"),
    Claim("1x4 ends above 1x8", "srpo 1x4", "srpo 1x8"),
    Claim("masking the prefix helps", "srpo 1x4", "srpo 1x4 unmasked"),
    Claim(
        "unclipped ends above clipped (two updates each)",
        "srpo 1x4 2 updates",
        "srpo 1x4 clipped 2 updates",
    ),
    Claim(
        "ours: SRPO ends above GRPO, both clipped with two updates",
        "srpo 1x4 clipped 2 updates",
        "grpo clipped 2 updates",
    ),
    Claim(
        "resets cost more sampling time than GRPO (ratio)",
        "srpo 1x4",
        "grpo",
        measure="sampling",
        statistic=ratio,
        low=1,
    ),
    Claim(
        "ours: dividing by the length of the whole response helps",
        "srpo 1x4 response length",
        "srpo 1x4",
    ),
    Claim("ours: the exact localizer ends above the policy's own", "srpo 1x4 verifier", "srpo 1x4"),
]


def claim_rows(outcomes: dict[str, list[Outcome]], target: float) -> list[dict]:
    """Table rows: each claim whose variants were run, its measured number and the verdict."""
    rows = []
    for claim in CLAIMS:
        if claim.first not in outcomes or claim.second not in outcomes:
            continue
        pairs = paired(
            outcomes[claim.first],
            outcomes[claim.second],
            claim.measure,
            claim.second_measure or claim.measure,
        )
        if measurable(pairs, claim.statistic):
            measured = estimate(pairs, claim.statistic)
            number = str(measured) + missed_note(claim, outcomes)
            judged = verdict(measured, claim)
        else:
            number = "too rare to measure"
            judged = "unclear"
        rows.append(
            {
                "claim": claim.text.format(target=target),
                "measured, 95% interval": number,
                "verdict": judged,
            }
        )
    return rows


def paired(
    first: list[Outcome], second: list[Outcome], measure: str, second_measure: str
) -> np.ndarray:
    """Numbers of two variants, paired by seed: [seeds, 2]."""
    pairs = []
    for a, b in zip(first, second):
        pairs.append([getattr(a, measure), getattr(b, second_measure)])
    return np.array(pairs, dtype=float)


def measurable(pairs: np.ndarray, statistic: Callable) -> bool:
    """False where a number is missing, or where a ratio would divide by zero."""
    if not np.isfinite(pairs).all():
        return False
    return statistic is not ratio or bool((pairs[:, 1] > 0).all())


def verdict(measured: Estimate, claim: Claim) -> str:
    """Reproduced: the interval lies inside the claim's bounds. Not reproduced: it lies outside."""
    if claim.low < measured.low and measured.high < claim.high:
        return "reproduced"
    if measured.high < claim.low or measured.low > claim.high:
        return "not reproduced"
    return "unclear"  # also for one seed, whose interval is nan


def missed_note(claim: Claim, outcomes: dict[str, list[Outcome]]) -> str:
    """Says how many runs never reached the target of a claim about time; else nothing."""
    if claim.measure not in ("steps", "tokens"):
        return ""
    runs = outcomes[claim.first] + outcomes[claim.second]
    missed = len([run for run in runs if not run.reached])
    if missed == 0:
        return ""
    return f"; {missed} runs did not reach it and count as the last step"


def against_grpo_rows(outcomes: dict[str, list[Outcome]], target: float) -> list[dict]:
    """Table rows: every variant beside GRPO, paired by seed.

    Ratios above 1 say that the variant needs fewer steps or tokens than GRPO."""
    rows = []
    grpo = outcomes.get("grpo")
    for name, variant in outcomes.items():
        if name == "grpo" or grpo is None:
            continue
        finals = paired(variant, grpo, "final", "final")
        steps = paired(grpo, variant, "steps", "steps")
        tokens = paired(grpo, variant, "tokens", "tokens")
        reached = len([run for run in variant if run.reached])
        rows.append(
            {
                "against grpo, 95% interval": name,
                "final pass rate, difference": str(estimate(finals, difference)),
                f"steps to {target}: grpo / it": str(estimate(steps, ratio)),
                "generated tokens: grpo / it": str(estimate(tokens, ratio)),
                f"seeds that reached {target}": f"{reached} of {len(variant)}",
            }
        )
    return rows


# ------------------------------------------------------------------------------------- ablations


@dataclass
class Curve:
    """One number of a variant's step lines, drawn along training."""

    variant: str
    key: str
    color: str
    label: str | None = None  # None: not in the legend
    style: str = "-"


@dataclass
class Panel:
    """Curves that share their axes."""

    title: str
    curves: list[Curve]
    top: float | None = 1.0  # of the y axis; None: as high as the curves
    one_minus: bool = False  # draw 1 - value


PANELS = [
    Panel(
        "h* is the first wrong thought (dashed: or before)",
        [
            Curve("srpo 1x4", "localized_exact", "C2", "srpo 1x4"),
            Curve("srpo 1x4", "localized_clean", "C2", style="--"),
            Curve("rrpo 1x4", "localized_exact", "C1", "rrpo 1x4"),
            Curve("rrpo 1x4", "localized_clean", "C1", style="--"),
        ],
    ),
    Panel(
        "srpo 1x4: pass rate in training",
        [
            Curve("srpo 1x4", "pass_base", "C0", "base groups"),
            Curve("srpo 1x4", "pass_suffix_clean", "C2", "suffixes of a clean prefix"),
            Curve("srpo 1x4", "pass_suffix_erroneous", "C3", "suffixes of an erroneous prefix"),
        ],
    ),
    Panel(
        "share of groups with variance",
        [
            Curve("grpo", "zero_variance_base", "C0", "grpo: groups of 8"),
            Curve("srpo 1x4", "zero_variance_base", "C2", "srpo 1x4: base groups of 4"),
            Curve("srpo 1x4", "zero_variance_suffix", "C8", "srpo 1x4: suffix groups of 4"),
            Curve("srpo 1x8", "zero_variance_suffix", "C5", "srpo 1x8: suffix groups of 8"),
            Curve("rrpo 1x4", "zero_variance_suffix", "C1", "rrpo 1x4: suffix groups of 4"),
        ],
        one_minus=True,
    ),
    Panel(
        "reset depth, h* / H",
        [
            Curve("srpo 1x4", "reset_depth", "C2", "srpo 1x4"),
            Curve("srpo 1x4 verifier", "reset_depth", "C3", "srpo 1x4 verifier"),
            Curve("rrpo 1x4", "reset_depth", "C1", "rrpo 1x4"),
        ],
    ),
    Panel(
        "entropy of trained tokens, nats",
        [
            Curve("grpo", "entropy", "C0", "grpo"),
            Curve("srpo 1x4", "entropy", "C2", "srpo 1x4"),
            Curve("rrpo 1x4", "entropy", "C1", "rrpo 1x4"),
        ],
        top=None,
    ),
]


def draw_ablations(named: Named, outcomes: dict[str, list[Outcome]], out: Path) -> None:
    """Draws why a method ends where it does: differences to GRPO, and PANELS along training."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 3, figsize=(16, 8), layout="constrained")
    axes = axes.ravel()
    draw_differences(axes[0], outcomes)
    for axis, panel in zip(axes[1:], PANELS):
        for curve in panel.curves:
            draw_curve(axis, named.get(curve.variant, []), curve, panel.one_minus)
        axis.set(title=panel.title, xlabel="step", ylim=(0, panel.top))
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def draw_differences(axis, outcomes: dict[str, list[Outcome]]) -> None:
    """Draws each variant's final pass rate minus GRPO's, with its interval."""
    others = []
    if "grpo" in outcomes:
        others = [name for name in reversed(outcomes) if name != "grpo"]
    for y, name in enumerate(others):
        pairs = paired(outcomes[name], outcomes["grpo"], "final", "final")
        measured = estimate(pairs, difference)
        axis.plot([measured.low, measured.high], [y, y], color="C0", linewidth=2)
        axis.plot(measured.value, y, "o", color="C0")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(others)), labels=others)
    axis.set_title("final benchmark minus GRPO's, 95% interval")


WINDOW = 5  # steps that a point of ablations.png averages over


def draw_curve(axis, runs: list[Run], curve: Curve, one_minus: bool) -> None:
    """Draws means over all seeds and windows of steps, each at the middle of its window."""
    windows = defaultdict(list)  # values by window; window w has steps 5 w + 1 to 5 w + 5
    for run in runs:
        for line in run.lines:
            if line["step"] > 0 and line.get(curve.key) is not None:
                windows[(line["step"] - 1) // WINDOW].append(line[curve.key])
    xs = [WINDOW * w + 3 for w in sorted(windows)]
    ys = [np.mean(windows[w]) for w in sorted(windows)]
    if one_minus:
        ys = [1 - y for y in ys]
    if xs:
        style = {"color": curve.color, "label": curve.label, "linestyle": curve.style}
        axis.plot(xs, ys, marker="o", markersize=2, **style)


# ---------------------------------------------------------------------------------------- signal


@dataclass
class Policy:
    """A loaded policy and the engine that samples from it."""

    model: torch.nn.Module
    tokenizer: object
    engine: HFEngine
    context: int  # longest sequence, tokens


def open_policy(source: str) -> Policy:
    model, tokenizer = load_policy(source)
    context = model.config.get_text_config().max_position_embeddings
    return Policy(model, tokenizer, HFEngine(model, tokenizer), context)


def sample_step(policy: Policy, problems: list[Problem], cfg: Config, rng_key: list) -> Sampled:
    """Runs the program of cfg's method on every problem; random numbers depend on (key, slot)."""
    programs = []
    for slot, problem in enumerate(problems):
        task = Task(
            problem=problem,
            prompt_ids=encode_question(policy.tokenizer, problem),
            slot=slot,
            cfg=cfg,
            vocabulary=policy.engine.vocabulary,
            localize=LOCALIZERS[cfg.localizer],
            rng=np.random.default_rng([*rng_key, slot]),
            context=policy.context,
        )
        programs.append(PROGRAMS[cfg.method](task))
    return run_programs(programs, policy.engine)


def settings_of(name: str, model: str) -> Config:
    return parse([*STUDY[name].split(), "--model", model])


def command_signal(args) -> None:
    """Prints how much of one step's gradient is signal, for each method on the same prompts.

    Nothing is trained. Each method gives M = --repeats independent gradients g of one step, and

        signal / noise  =  |E g|^2 / E |g - E g|^2
        alignment       =  E <g, J'> / (sqrt(E |g|^2) |J'|)

    Alignment is the cosine of one step's gradient with the gradient J' of the pass rate; J' comes
    from base groups of its own, without the division by the std. |E g|^2 and |J'|^2 are means of
    products of different gradients, which makes them unbiased."""
    if args.repeats < 2:
        raise UserError(f"--repeats must be at least 2, not {args.repeats}, to measure any noise")
    policy = open_policy(args.model)
    # Generated problems of these seeds are held out: training uses seeds below 10**6.
    problems = load_problems(args.data, seed=10**6 + args.seed, n=args.repeats * args.prompts)
    for name in args.variants:
        check_localizer(settings_of(name, args.model).localizer, problems, args.data)

    reference = sample_gradients(args, policy, problems, "grpo", args.seed + 1, normalize=False)
    reference = stacked(reference)
    rows = []
    for name in args.variants:
        steps = sample_gradients(args, policy, problems, name, args.seed, normalize=True)
        rows.append(signal_row(name, steps, reference))
    print(
        f"{args.model} on {args.data}: {args.repeats} gradients of {args.prompts} prompts each, "
        "before any training"
    )
    print(markdown(rows))


@dataclass
class StepGradient:
    """The gradient of one step, and numbers of its rollouts; nan where there are no groups."""

    gradient: torch.Tensor  # [kept] of -loss, at a sample of the coordinates
    tokens: int  # generated
    base_variance: float  # share of base groups with variance
    suffix_variance: float  # share of suffix groups with variance
    suffix_pass_rate: float
    reset: float  # mean h* of the suffix groups


def sample_gradients(
    args, policy: Policy, problems: list[Problem], name: str, rng_seed: int, normalize: bool
) -> list[StepGradient]:
    """One gradient of a variant for each repeat, on prompts of its own."""
    cfg = settings_of(name, args.model)
    steps = []
    # disable=None: no bar where the output is no terminal
    for repeat in tqdm(range(args.repeats), desc=name, unit="step", leave=False, disable=None):
        start = repeat * args.prompts
        chosen = problems[start : start + args.prompts]
        if not chosen:  # a file with too few problems
            chosen = problems[: args.prompts]
        sampled = sample_step(policy, chosen, cfg, rng_key=[rng_seed, repeat])
        steps.append(step_gradient(policy, sampled, cfg, normalize))
    return steps


def step_gradient(policy: Policy, sampled: Sampled, cfg: Config, normalize: bool) -> StepGradient:
    """Advantages, loss and gradient of one step. Nothing is updated."""
    rollouts = []
    for buffer in sampled.results:
        rollouts += buffer
    set_advantages(rollouts, normalize)
    policy.model.zero_grad()
    items = [item for item in weigh(rollouts, cfg) if any(item.weights)]
    backward(policy.model, items, policy.tokenizer.pad_token_id, cfg)

    base_variance = []
    suffix_variance = []
    resets = []
    for (_, k), members in grouped(rollouts).items():
        if k == 0:
            base_variance.append(has_variance(members))
        else:
            suffix_variance.append(has_variance(members))
            resets.append(members[0].reset)
    return StepGradient(
        gradient=kept_gradient(policy.model),
        tokens=sum(rollout.generated for rollout in sampled.generated),
        base_variance=mean_of(base_variance),
        suffix_variance=mean_of(suffix_variance),
        suffix_pass_rate=mean_of([r.reward for r in rollouts if is_suffix(r)]),
        reset=mean_of(resets),
    )


def is_suffix(rollout: Rollout) -> bool:
    """Group 0 of a slot is its base group; the others belong to reset states."""
    return rollout.group[1] > 0


def has_variance(rollouts: list[Rollout]) -> bool:
    """Whether some thought has an advantage, so that there is something to learn from."""
    return not is_flat(rollouts)


@cache
def kept_coordinates(size: int) -> torch.Tensor:
    """Indices [kept] of the gradient's entries that are compared: a random sample is enough."""
    return torch.from_numpy(np.random.default_rng(0).permutation(size)[:2_000_000])


def kept_gradient(model: torch.nn.Module) -> torch.Tensor:
    """Gradient of -loss at the kept coordinates: [kept]."""
    parts = []
    for parameter in model.parameters():
        gradient = parameter.grad
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        parts.append(gradient.flatten())
    flat = torch.cat(parts)
    return -flat[kept_coordinates(len(flat))]


def stacked(steps: list[StepGradient]) -> torch.Tensor:
    """All gradients in double precision: [repeats, kept]."""
    return torch.stack([step.gradient for step in steps]).double()


def squared_mean(gradients: torch.Tensor) -> float:
    """Unbiased |E g|^2: the mean of <g_i, g_j> over all i != j; gradients [repeats, kept]."""
    n = len(gradients)
    all_products = (gradients.sum(0) ** 2).sum()
    own_products = (gradients**2).sum()
    return float((all_products - own_products) / (n * (n - 1)))


def signal_row(name: str, steps: list[StepGradient], reference: torch.Tensor) -> dict:
    """One table row of `signal`; reference [repeats, kept]: gradients of the pass rate."""
    gradients = stacked(steps)
    signal = squared_mean(gradients)
    squares = (gradients**2).sum(1).numpy()  # [repeats]
    products = (gradients @ reference.mean(0)).numpy()  # [repeats]
    reference_norm = math.sqrt(max(squared_mean(reference), 1e-30))

    def cosine(pairs: np.ndarray) -> float:
        return pairs[:, 0].mean() / math.sqrt(pairs[:, 1].mean()) / reference_norm

    alignment = estimate(np.stack([products, squares], axis=1), cosine)
    base_variance = mean_of([step.base_variance for step in steps])
    return {
        "method": name,
        "tokens a step": f"{np.mean([step.tokens for step in steps]):,.0f}",
        "groups with variance: base": number_or_dash(base_variance),
        "suffix": number_or_dash(mean_of([step.suffix_variance for step in steps])),
        "suffix pass rate": number_or_dash(mean_of([step.suffix_pass_rate for step in steps])),
        "h*, mean": number_or_dash(mean_of([step.reset for step in steps]), digits=1),
        "signal / noise": f"{signal / (squares.mean() - signal):.3f}",
        "alignment with the gradient of the pass rate, 95%": str(alignment),
    }


def number_or_dash(value: float, digits: int = 3) -> str:
    return "-" if np.isnan(value) else f"{value:.{digits}f}"


# --------------------------------------------------------------------------------------- anatomy


def command_anatomy(args) -> None:
    """Draws which thoughts get credit on one problem, under GRPO and under SRPO.

    The picture is like the paper's "grad tree". See `thought_signals` for what the colours mean.
    Raises UserError if no problem has something to learn from in all its groups."""
    policy = open_policy(args.model)
    problems = load_problems(args.data, seed=10**6 + args.seed)[: args.problems]
    # The same random numbers twice: SRPO's base group is the first half of GRPO's group.
    grpo_buffers = sample_buffers(policy, problems, "grpo", args)
    srpo_buffers = sample_buffers(policy, problems, "srpo 1x4", args)
    for problem, grpo, srpo in zip(problems, grpo_buffers, srpo_buffers):
        srpo_base = [rollout for rollout in srpo if not is_suffix(rollout)]
        srpo_suffixes = [rollout for rollout in srpo if is_suffix(rollout)]
        if has_variance(grpo) and has_variance(srpo_base) and has_variance(srpo_suffixes):
            grpo_rows = drawn_rows(grpo, problem, policy.tokenizer)
            srpo_rows = drawn_rows(srpo, problem, policy.tokenizer)
            draw_anatomy(grpo_rows, srpo_rows, args.out)
            print(
                f"problem {problem.index}: {problem.question} -> {problem.answer}; "
                f"drawn in {args.out}"
            )
            return
    raise UserError(
        f"no problem of {len(problems)} has variance in all its groups; raise --problems, or take "
        "a policy with a higher pass rate"
    )


def sample_buffers(policy: Policy, problems: list[Problem], name: str, args) -> list[list[Rollout]]:
    """The trained rollouts of each problem under a variant, with their advantages."""
    cfg = settings_of(name, args.model)
    buffers = sample_step(policy, problems, cfg, rng_key=[args.seed]).results
    for buffer in buffers:
        set_advantages(buffer)
    return buffers


@dataclass
class Row:
    """One response of the picture, thought by thought."""

    rollout: Rollout
    labels: list[str]  # [H] the last word of each thought
    signals: list[float | None]  # [H] from thought_signals
    wrong: int | None  # the first wrong thought, from 1; None: no error, or no step checker


def drawn_rows(buffer: list[Rollout], problem: Problem, tokenizer) -> list[Row]:
    """What the picture shows of each rollout of a buffer."""
    rows = []
    for rollout in buffer:
        thoughts = rollout.thoughts(tokenizer)
        labels = []
        for thought in thoughts:
            words = thought.replace(DELIMITER, "").replace("}", "").split()
            labels.append(words[-1][:5] if words else "")
        wrong = problem.check_steps(thoughts) if problem.check_steps else None
        rows.append(Row(rollout, labels, thought_signals(rollout, len(buffer)), wrong))
    return rows


def thought_signals(rollout: Rollout, n_rollouts: int) -> list[float | None]:
    """How strongly the step pushes each thought: [H], None for thoughts of a masked prefix.

    It is the mean over the thought's tokens of A / (|T| N) (1 - pi(y_t)), the derivative of -L
    with respect to the logit of the sampled token. A token that the policy was sure of gets
    nothing, whatever its weight. The sampler's log-probs are the policy's own (T = 1)."""
    weights = token_weights(rollout, n_rollouts)
    pushes = []
    for weight, logp in zip(weights, rollout.logps):
        pushes.append(weight * (1 - math.exp(logp)))
    signals = []
    start = 0
    for end in rollout.thought_ends:
        if end <= rollout.masked():
            signals.append(None)
        else:
            signals.append(float(np.mean(pushes[start:end])))
        start = end
    return signals


def draw_anatomy(grpo: list[Row], srpo: list[Row], out: Path) -> None:
    """Draws both buffers side by side: a line for each response, a box for each thought."""
    plt = pyplot()
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("credit", [NEGATIVE, "white", POSITIVE])
    strengths = []
    for row in grpo + srpo:
        strengths += [abs(signal) for signal in row.signals if signal is not None]
    scale = plt.cm.ScalarMappable(plt.Normalize(-max(strengths), max(strengths)), colors)
    width = max(len(row.labels) for row in grpo + srpo)

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 5.2), layout="constrained")
    figure.suptitle("Which thoughts one training step makes more likely (blue) or less (red)")
    left.set_title(f"GRPO: {len(grpo)} answers from scratch, compared with each other")
    right.set_title("SRPO: 4 answers from scratch, then 4 that continue a failed one (the seed)")
    draw_buffer(left, grpo, scale, width)
    draw_buffer(right, srpo, scale, width)
    figure.supxlabel(
        "A line is one answer; a box is one thought and shows its last word. Black frame: the "
        "first wrong thought. Grey: copied from the seed, not trained.\n"
        "A: the advantage, the reward compared with the answer's own group. A thought that the "
        "policy was sure of stays pale, whatever its advantage.",
        fontsize=9,
    )
    figure.colorbar(
        scale, ax=[left, right], label="gradient signal, mean of a thought", shrink=0.8, pad=0.01
    )
    figure.savefig(out, dpi=130)
    plt.close(figure)


def draw_buffer(axis, rows: list[Row], scale, width: int) -> None:
    """Draws the responses of one buffer, base group first, and marks seed and reset."""
    seeds = [row.rollout.seed for row in rows if is_suffix(row.rollout)]
    for i, row in enumerate(rows):
        y = -i
        if is_suffix(row.rollout):
            y -= 0.6  # a gap between the groups
        for h in range(1, len(row.labels) + 1):
            draw_thought(axis, row, h, y, scale)
        note = f"reward {row.rollout.reward:.0f}   A {advantage_range(row.rollout)}"
        if any(row.rollout is seed for seed in seeds):
            note += "   seed"
        axis.text(width + 0.1, y + 0.43, note, va="center", fontsize=8)
    if seeds:
        first_suffix = len(rows) - len(seeds)
        draw_reset(axis, rows[-1].rollout.reset, first_suffix, len(rows))
    axis.set(xlim=(-0.1, width + 3), ylim=(-len(rows) + 0.1, 1.1), xlabel="thought", yticks=[])
    numbers = range(1, width + 1)
    axis.set_xticks([h - 0.53 for h in numbers], labels=numbers)
    axis.spines[:].set_visible(False)


def advantage_range(rollout: Rollout) -> str:
    """The advantage of its trained thoughts, or the smallest and the largest of them."""
    trained = []
    for advantage, end in zip(rollout.advantages, rollout.thought_ends):
        if end > rollout.masked():
            trained.append(advantage)
    low, high = min(trained), max(trained)
    return f"{low:+.2f}" if low == high else f"{low:+.2f} to {high:+.2f}"


def draw_thought(axis, row: Row, h: int, y: float, scale) -> None:
    """Draws the box of thought h with its last word."""
    signal = row.signals[h - 1]
    if signal is None:
        face = "0.85"
        ink = "0.5"
    else:
        face = scale.to_rgba(signal)
        ink = "white" if abs(signal) > 0.6 * scale.norm.vmax else "black"
    edge = "0.6"
    line = 0.3
    if h == row.wrong:
        edge = "black"
        line = 2.0
    axis.add_patch(
        pyplot().Rectangle((h - 1, y), 0.94, 0.86, facecolor=face, edgecolor=edge, linewidth=line)
    )
    style = {"ha": "center", "va": "center", "fontsize": 8, "color": ink}
    axis.text(h - 0.53, y + 0.43, row.labels[h - 1], **style)


def draw_reset(axis, reset: int, first_suffix: int, n_rows: int) -> None:
    """Draws the line between the shared prefix and thought h* of the suffixes."""
    x = reset - 1.03
    style = {"color": "0.3", "linestyle": ":", "linewidth": 2}
    axis.plot([x, x], [-n_rows + 0.35, -first_suffix + 0.3], **style)
    text = f"reset: sampled again from thought {reset} on"
    axis.text(x, -first_suffix + 0.38, text, color="0.3", fontsize=8, ha="left", va="bottom")


# ---------------------------------------------------------------------------------- command line


def add_study(commands) -> None:
    usual = parse([])
    sub = commands.add_parser("study", help="train all variants, judge the paper's claims")
    sub.set_defaults(command=command_study)
    option = sub.add_argument
    help = "folder (1.5 GB); finished runs in it are reused"
    option("--out", type=Path, default=Path("runs/study"), help=help)
    option("--model", default=usual.model, help="folder or hub id")
    help = "task, for training and held-out problems"
    option("--data", default=usual.train_data, help=help)
    help = "more settings of srpo.py for every run, in one string, such as '--micro_batch 8'"
    option("--flags", default="", help=help)
    help = "held-out problems of the benchmark of each run's last checkpoint"
    option("--benchmark_problems", type=int, default=256, help=help)
    option("--seeds", type=int, default=8, help="of each variant, from 0")
    option("--steps", type=int, default=50, help="of each run")
    help = "problems per step"
    option("--prompts_per_step", type=int, default=usual.prompts_per_step, help=help)
    option("--eval_every", type=int, default=10, help="steps between evaluations")
    help = "pass rate of the time-to-target columns and claims"
    option("--target", type=float, default=0.3, help=help)
    add_variants(sub, list(STUDY))
    help = "learning rates of the sweep; one: no sweep"
    option("--grid", nargs="+", type=float, default=GRID, help=help)
    help = "seeds of the sweep, other ones than the study's"
    option("--sweep_seeds", type=int, default=4, help=help)
    option("--sweep_steps", type=int, default=30, help="steps of the sweep's runs")
    help = "runs side by side, one thread each"
    option("--jobs", type=int, default=os.cpu_count(), help=help)


def add_signal(commands) -> None:
    usual = parse([])
    help = "signal and noise of one step's gradient, by method, before training"
    sub = commands.add_parser("signal", help=help)
    sub.set_defaults(command=command_signal)
    add_policy(sub, usual)
    add_variants(sub, SIGNAL_VARIANTS)
    option = sub.add_argument
    option("--repeats", type=int, default=24, help="independent gradients of each method")
    help = "problems per gradient"
    option("--prompts", type=int, default=usual.prompts_per_step, help=help)


def add_anatomy(commands) -> None:
    help = "which thoughts get credit on one problem, under GRPO and under SRPO"
    sub = commands.add_parser("anatomy", help=help)
    sub.set_defaults(command=command_anatomy)
    add_policy(sub, parse([]))
    option = sub.add_argument
    help = "problems to look through for one whose groups all have variance"
    option("--problems", type=int, default=64, help=help)
    option("--out", type=Path, default=Path("anatomy.png"), help="picture to write")


def add_policy(sub, usual: Config) -> None:
    """Options of the commands that sample from one policy."""
    sub.add_argument("--model", default=usual.model, help="folder or hub id")
    help = f"JSON-lines file, or {GENERATED}"
    sub.add_argument("--data", default=usual.train_data, help=help)
    sub.add_argument("--seed", type=int, default=0, help="of problems and sampling")


def add_variants(sub, usual: list[str]) -> None:
    sub.add_argument(
        "--variants",
        nargs="+",
        choices=STUDY,
        default=usual,
        metavar="NAME",
        help=f"of: {', '.join(STUDY)}",
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.study", description="Experiments on the paper's claims."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_study(commands)
    add_signal(commands)
    add_anatomy(commands)
    args = parser.parse_args(argv)
    args.command(args)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        print(f"study: {fault}", file=sys.stderr)
        sys.exit(2)
