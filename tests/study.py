"""The evidence: the study of the paper's claims, and what one step's gradient is made of. Run it as a module:

    python -m tests.study study --out runs/study            # every variant, every seed; resumable; study.md and pictures
    python -m tests.study signal                            # signal and noise of one step's gradient, by method, before training
    python -m tests.study anatomy --out anatomy.png         # which thoughts get credit on one problem, under GRPO and under SRPO

The study trains GRPO, RRPO and SRPO with every split, localizer and ablation of the paper at the same number of trained rollouts, after one
sweep of learning rates with the same grid for each method, and holds each claim of the paper against a paired interval over seeds.

Left out: significance tests beyond intervals, corrections for the number of claims, and any task but the one that --data names.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.curves import (
    AXES,
    PHASES,
    Named,
    cost_table,
    draw_curves,
    final,
    first_reach,
    interval,
    pyplot,
    results_table,
    spread,
)
from data.faults import UserError
from data.runs import read_run
from data.tasks import GENERATED, load_problems
from data.verifiers import DELIMITER
from localize import LOCALIZERS
from loss import backward, grouped, set_advantages, token_weights
from rollout import PROGRAMS, HFEngine, Task, encode_question, load_policy, run_programs
from srpo import parse

ROOT = Path(__file__).resolve().parent.parent

# --------------------------------------------------------------------------------------------------------------------- study

STUDY = {  # name_of: flags of srpo.py. All train 8 rollouts a prompt
    "grpo": "--method grpo",
    "rrpo 1x4": "--method rrpo",
    "srpo 1x4": "--method srpo",
    "srpo 2x4": "--method srpo --split 2x4",
    "srpo 1x8": "--method srpo --split 1x8",
    "srpo 1x4 verifier": "--method srpo --localizer verifier",
    "srpo 1x4 oracle": "--method srpo --localizer oracle --oracle_samples 2",
    "srpo 1x4 deepest": "--method srpo --seed_choice deepest",
    "srpo 1x4 unmasked": "--method srpo --mask_prefix false",
    "srpo 1x4 response length": "--method srpo --length response",  # ours
    "srpo 1x4 2 updates": "--method srpo --updates 2",
    "srpo 1x4 clipped 2 updates": "--method srpo --updates 2 --clip 0.2",  # with one update the ratio is 1: clipping would change nothing
    "grpo clipped 2 updates": "--method grpo --updates 2 --clip 0.2",
}
GRID = (
    2.5e-4,
    5e-4,
    1e-3,
)  # learning rates, the same for every method; ablations take their method's, divided by their updates for each buffer


def command_study(args) -> None:
    """Trains all variants with all seeds, two or more side by side, and writes study.md and pictures to --out. What is there is kept: the same
    command goes on where it stopped, and `--seeds` can be raised."""
    settings = {
        key: getattr(args, key)
        for key in (
            "model",
            "data",
            "steps",
            "prompts_per_step",
            "eval_every",
            "grid",
            "sweep_seeds",
            "sweep_steps",
            "benchmark_problems",
            "flags",
        )
    }
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / "settings.json").exists() and json.loads(
        (args.out / "settings.json").read_text()
    ) != settings:
        raise UserError(
            f"{args.out} holds a study with other settings; choose another --out (only --seeds, --variants, --target and --jobs may change)"
        )
    (args.out / "settings.json").write_text(json.dumps(settings))
    run_jobs(
        [(args.out / "before", [measure(args, args.model, args.out / "before", 0)])],
        1,
        "before training",
    )
    tuned = lambda name: {"grpo": "grpo", "rrpo": "rrpo 1x4"}.get(name.split()[0], "srpo 1x4")  # noqa: E731  (the method that its learning rate comes from)
    methods = list(dict.fromkeys(map(tuned, args.variants)))
    sweep = {(name, lr): [job(args, args.out / "sweep" / f"{name}-{lr:g}-{seed}".replace(" ", "-"), f"{STUDY[name]} --lr {lr}", seed, args.sweep_steps) for seed in range(100, 100 + args.sweep_seeds)]
             for name in methods for lr in args.grid if len(args.grid) > 1}  # fmt: skip
    run_jobs([job for jobs in sweep.values() for job in jobs], args.jobs, "learning rates")
    rates = {
        key: [final(folder, read_run(folder)[1])[0] for folder, _ in jobs]
        for key, jobs in sweep.items()
    }
    best = {
        name: max(args.grid, key=lambda lr: np.mean(rates.get((name, lr), 0))) for name in methods
    }
    rate = {name: best[tuned(name)] / parse(STUDY[name].split()).updates for name in args.variants}
    runs = {
        name: [
            job(
                args,
                args.out / f"{name}-{seed}".replace(" ", "-"),
                f"{STUDY[name]} --lr {rate[name]}",
                seed,
                args.steps,
            )
            for seed in range(args.seeds)
        ]
        for name in args.variants
    }
    run_jobs(
        [jobs[seed] for seed in range(args.seeds) for jobs in runs.values()], args.jobs, "study"
    )
    named = {
        name: [(folder, *read_run(folder)) for folder, _ in jobs] for name, jobs in runs.items()
    }
    draw_curves(
        {
            name: named[name]
            for name in (
                "grpo",
                "rrpo 1x4",
                "srpo 1x4",
                "srpo 1x4 verifier",
                "srpo 1x4 clipped 2 updates",
                "grpo clipped 2 updates",
            )
            if name in named
        },
        args.out / "study.png",
        tuple(AXES),
    )
    draw_diagnostics(named, args.out / "ablations.png")
    start = json.loads((args.out / "before" / "benchmark" / "results.json").read_text())["results"][
        Path(args.data).stem
    ]
    lines = [f"{args.seeds} seeds, {args.steps} steps of {args.prompts_per_step} prompts x 8 trained rollouts on {args.data}, {args.jobs} runs of one thread side by side on {os.cpu_count()} cores",
             f"Before training: pass rate {start['mean']:.3f} ± {start['half']:.3f} (half a 95% interval over {start['problems']} problems), pass@8 {start['pass_at']['8']:.3f}"]  # fmt: skip
    if sweep:
        lines += [
            "",
            f"Learning rates, held-out pass rate after {args.sweep_steps} steps, {args.sweep_seeds} seeds (not those of the study):",
            "",
            "| |" + "".join(f" {lr:g} |" for lr in args.grid),
            "|---" * (1 + len(args.grid)) + "|",
        ]
        lines += [
            f"| {name} |" + "".join(f" {spread(rates[name, lr], '.3f')} |" for lr in args.grid)
            for name in methods
        ]
    lines += [
        "",
        results_table(named, args.target),
        "",
        against_grpo(named, args.target),
        "",
        cost_table(named),
        "",
        claims_table(named, args.target),
    ]
    (args.out / "study.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    print(f"\n{args.out}/study.md, study.png, ablations.png")


def job(args, folder: Path, flags: str, seed: int, steps: int) -> tuple[Path, list[list[str]]]:
    """(run directory, commands that make it: the training, and a benchmark of its last checkpoint)."""
    common = (f"--steps {steps} --seed {seed} --train_data {args.data} --eval_data {args.data} --prompts_per_step {args.prompts_per_step} --engine hf "
              f"--eval_every {args.eval_every} --save_every 25 {args.flags}")  # fmt: skip
    new = [*flags.split(), *common.split(), "--model", args.model, "--out_dir", str(folder)]
    train = [
        sys.executable,
        str(ROOT / "srpo.py"),
        *(["--resume", str(folder)] if (folder / "config.json").exists() else new),
    ]
    return folder, [train, measure(args, folder / "checkpoints" / f"step_{steps}", folder, seed)]


def measure(args, model, folder: Path, seed: int) -> list[str]:
    """The command that benchmarks a policy, pass@1 and pass@8 at T = 1, into FOLDER/benchmark."""
    limits = vars(parse(args.flags.split()))
    return [sys.executable, str(ROOT / "eval.py"), "benchmark", "--model", str(model), "--data", args.data, "--n", "8", "--temperature", "1", "--problems",
            str(args.benchmark_problems), "--seed", str(seed), "--engine", "hf", "--out", str(folder / "benchmark"),
            *(part for key in ("max_thoughts", "max_tokens_per_thought", "max_rows") for part in (f"--{key}", str(limits[key])))]  # fmt: skip


def run_jobs(jobs: list[tuple[Path, list[list[str]]]], side_by_side: int, name: str) -> None:
    """Runs the commands of the jobs that are not finished. What they print is in FOLDER.log. Raises UserError for the first that fails."""
    todo = [
        (folder, commands)
        for folder, commands in jobs
        if not (folder / "benchmark" / "results.json").exists()
    ]
    if not todo:
        return

    def run(folder: Path, commands: list[list[str]]) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.parent / f"{folder.name}.log"
        for command in commands:
            with log.open("a") as file:
                done = subprocess.run(
                    command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}
                )
            if done.returncode:
                raise UserError(f"{folder} failed; see {log}")

    with ThreadPoolExecutor(side_by_side) as pool:
        running = [pool.submit(run, *item) for item in todo]
        try:
            for finished in tqdm(
                as_completed(running), total=len(running), desc=name, unit="run", dynamic_ncols=True
            ):
                finished.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def last(run: Path, lines: list[dict]) -> float:
    """Final pass rate of a run."""
    return final(run, lines)[0]


def difference(pairs: np.ndarray) -> float:  # [seeds, 2]
    return pairs[:, 0].mean() - pairs[:, 1].mean()


def ratio(pairs: np.ndarray) -> float:
    return pairs[:, 0].mean() / pairs[:, 1].mean()


def reached(key: str, target: float):
    """(run, lines) -> the value of `key` at which the target was reached; that of the last step where it was not, which is then a lower bound."""
    return lambda run, lines: np.nan_to_num(first_reach(lines, target, key), nan=lines[-1][key])


def against_grpo(named: Named, target: float) -> str:
    """Every variant beside GRPO, paired by seed: final pass rate minus GRPO's, and how many times fewer steps and tokens it needs to the target."""
    rows = [
        f"| against grpo, 95% interval | final pass rate, difference | steps to {target}: grpo / it | generated tokens: grpo / it | seeds that reached {target} |",
        "|---" * 5 + "|",
    ]
    for name in named:
        if name != "grpo" and "grpo" in named:
            read = (
                (last, lambda x: -difference(x)),
                (reached("step", target), ratio),
                (reached("total_tokens", target), ratio),
            )
            pairs = [
                [(value(*g[::2]), value(*x[::2])) for g, x in zip(named["grpo"], named[name])]
                for value, _ in read
            ]
            cells = [
                "{:.3f} ({:.3f} to {:.3f})".format(*interval(pair, statistic))
                for pair, (_, statistic) in zip(pairs, read)
            ]
            count = sum(
                not np.isnan(first_reach(lines, target, "step")) for _, _, lines in named[name]
            )
            rows.append(f"| {name} | {' | '.join(cells)} | {count} of {len(named[name])} |")
    return "\n".join(rows)


def claims_table(named: Named, target: float) -> str:
    """The paper's claims against this study: a claim is reproduced where the 95% interval of its number lies inside what it says, not
    reproduced where it lies outside, unclear where it does both. Intervals: paired bootstrap over seeds."""
    sampling = lambda run, lines: sum(
        x["seconds"].get(phase, 0) for x in lines if "seconds" in x for phase in PHASES[:5]
    )  # noqa: E731
    steps, tokens = reached("step", target), reached("total_tokens", target)

    def correction(key):  # mean over steps of the pass rate of suffixes from such a prefix
        return lambda run, lines: np.mean(
            [x[key] for x in lines if x.get(key) is not None] or [np.nan]
        )

    more, faster = (0, np.inf), (2, np.inf)
    clean, erroneous = correction("pass_suffix_clean"), correction("pass_suffix_erroneous")
    claims = [
        ("SRPO ends above RRPO", "srpo 1x4", last, "rrpo 1x4", last, difference, more),
        ("SRPO ends above GRPO", "srpo 1x4", last, "grpo", last, difference, more),
        ("RRPO ends about where GRPO does (within 0.05)", "rrpo 1x4", last, "grpo", last, difference, (-0.05, 0.05)),
        (f"SRPO reaches {target} in half the steps of GRPO or fewer (ratio)", "grpo", steps, "srpo 1x4", steps, ratio, faster),
        ("... and at half of all generated tokens (ratio)", "grpo", tokens, "srpo 1x4", tokens, ratio, faster),
        ("a clean prefix is corrected about twice as often as an erroneous one (ratio, at least 1.5)", "srpo 1x4", clean, "srpo 1x4", erroneous, ratio, (1.5, np.inf)),
        ("1x4 ends above 2x4", "srpo 1x4", last, "srpo 2x4", last, difference, more),
        ("1x4 ends above 1x8", "srpo 1x4", last, "srpo 1x8", last, difference, more),
        ("masking the prefix helps", "srpo 1x4", last, "srpo 1x4 unmasked", last, difference, more),
        ("unclipped ends above clipped (two updates each)", "srpo 1x4 2 updates", last, "srpo 1x4 clipped 2 updates", last, difference, more),
        ("ours: SRPO ends above GRPO, both clipped with two updates", "srpo 1x4 clipped 2 updates", last, "grpo clipped 2 updates", last, difference, more),
        ("resets cost more sampling time than GRPO (ratio)", "srpo 1x4", sampling, "grpo", sampling, ratio, (1, np.inf)),
        ("ours: dividing by the length of the whole response helps", "srpo 1x4 response length", last, "srpo 1x4", last, difference, more),
        ("ours: the exact localizer ends above the policy's own", "srpo 1x4 verifier", last, "srpo 1x4", last, difference, more),
        ("ours: the deepest seed ends above the first", "srpo 1x4 deepest", last, "srpo 1x4", last, difference, more),
    ]  # fmt: skip
    rows = ["| claim | measured, 95% interval | verdict |", "|---|---|---|"]
    for text, a, read_a, b, read_b, statistic, (low, high) in claims:
        if a in named and b in named:
            pairs = np.array(
                [(read_a(*x[::2]), read_b(*y[::2])) for x, y in zip(named[a], named[b])]
            )
            if not np.isfinite(pairs).all() or statistic is ratio and not (pairs[:, 1] > 0).all():
                rows.append(f"| {text} | too rare to measure | unclear |")
                continue
            value, least, most = interval(pairs, statistic)
            verdict = (
                "reproduced"
                if low < least and most < high
                else "not reproduced"
                if most < low or least > high
                else "unclear"
            )
            missed = (
                sum(
                    np.isnan(first_reach(lines, target, "step"))
                    for name in {a, b}
                    for _, _, lines in named[name]
                )
                if read_a in (steps, tokens)
                else 0
            )
            rows.append(
                f"| {text} | {value:.3f} ({least:.3f} to {most:.3f}){f'; {missed} runs did not reach it and count as the last step' if missed else ''} | {verdict} |"
            )
    return "\n".join(rows)


def draw_diagnostics(named: Named, out: Path) -> None:
    """Why a method ends where it does: differences to GRPO, localization, corrections, groups with variance, depth of resets and entropy along training."""
    plt = pyplot()
    figure, ((a, b, c), (d, e, f)) = plt.subplots(2, 3, figsize=(16, 8), layout="constrained")
    others = [name for name in named if name != "grpo" and "grpo" in named]
    for y, name in enumerate(reversed(others)):
        value, low, high = interval(
            [(final(*x[::2])[0], final(*g[::2])[0]) for x, g in zip(named[name], named["grpo"])],
            lambda x: (x[:, 0] - x[:, 1]).mean(),
        )
        a.plot([low, high], [y, y], color="C0", linewidth=2)
        a.plot(value, y, "o", color="C0")
    a.axvline(0, color="black", linewidth=0.8)
    a.set(
        yticks=range(len(others)),
        yticklabels=reversed(others),
        title="final pass rate minus GRPO's, 95% interval",
    )

    def along(
        panel, name, key, label, color, read=lambda x: x, style="-"
    ):  # mean over seeds, over windows of five steps
        steps = [[x for x in lines if x["step"] > 0] for _, _, lines in named.get(name, [])]
        points = [
            [
                read(line[t][key])
                for line in steps
                for t in range(at, min(at + 5, len(line)))
                if line[t].get(key) is not None
            ]
            for at in range(0, max(map(len, steps), default=0), 5)
        ]
        seen = [(5 * k + 3, np.mean(values)) for k, values in enumerate(points) if values]
        panel.plot([s[0] for s in seen], [s[1] for s in seen], style, color=color, label=label)

    for name, color in (("srpo 1x4", "C2"), ("srpo 1x4 deepest", "C4"), ("rrpo 1x4", "C1")):
        along(b, name, "localized_exact", name, color)
        along(b, name, "localized_clean", None, color, style="--")
    along(c, "srpo 1x4", "pass_base", "base groups", "C0")
    along(c, "srpo 1x4", "pass_suffix_clean", "suffixes of a clean prefix", "C2")
    along(c, "srpo 1x4", "pass_suffix_erroneous", "suffixes of an erroneous prefix", "C3")
    for name, key, label, color in (("grpo", "base", "grpo: groups of 8", "C0"), ("srpo 1x4", "base", "srpo 1x4: base groups of 4", "C2"), ("srpo 1x4", "suffix", "srpo 1x4: suffix groups of 4", "C8"),
                                    ("srpo 1x8", "suffix", "srpo 1x8: suffix groups of 8", "C5"), ("rrpo 1x4", "suffix", "rrpo 1x4: suffix groups of 4", "C1")):  # fmt: skip
        along(d, name, f"zero_variance_{key}", label, color, read=lambda share: 1 - share)
    for name, color in (
        ("srpo 1x4", "C2"),
        ("srpo 1x4 deepest", "C4"),
        ("srpo 1x4 verifier", "C3"),
        ("rrpo 1x4", "C1"),
    ):
        along(e, name, "reset_depth", name, color)
    for name, color in (("grpo", "C0"), ("srpo 1x4", "C2"), ("rrpo 1x4", "C1")):
        along(f, name, "entropy", name, color)
    titles = (
        (b, "h* is the first wrong thought (dashed: or before)"),
        (c, "srpo 1x4: pass rate in training"),
        (d, "share of groups with variance"),
        (e, "reset depth, h* / H"),
        (f, "entropy of trained tokens, nats"),
    )
    for panel, title in titles:
        panel.set(title=title, xlabel="step", ylim=(0, None if panel is f else 1))
        panel.legend(fontsize=7)
    for panel in (a, b, c, d, e, f):
        panel.grid(alpha=0.3)
    figure.savefig(out, dpi=130)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------------ gradients


def command_signal(args) -> None:
    """How much of one step's gradient is signal, for each method on the same prompts, without training: M independent gradients g of one step.

    signal / noise: |E g|^2 / E |g - E g|^2. alignment: E <g, J'> / (sqrt(E |g|^2) |J'|), the cosine of one step's gradient with the gradient J'
    of the pass rate (from other base groups, without the division by the std). Products of independent gradients keep all of it unbiased."""
    model, tokenizer = load_policy(args.model)
    engine, context = (
        HFEngine(model, tokenizer),
        model.config.get_text_config().max_position_embeddings,
    )
    problems = load_problems(args.data, seed=10**6 + args.seed, n=args.repeats * args.prompts)
    size = sum(p.numel() for p in model.parameters())
    kept = torch.from_numpy(
        np.random.default_rng(0).permutation(size)[:2_000_000]
    )  # of a large model a sample of the coordinates will do

    def gradients(flags: str, normalize: bool, seed: int):
        cfg = parse([*flags.split(), "--model", args.model])
        vectors, seen = [], []
        for m in tqdm(
            range(args.repeats),
            desc=flags,
            unit="step",
            leave=False,
            dynamic_ncols=True,
            disable=None,
        ):
            chosen = problems[m * args.prompts : (m + 1) * args.prompts] or problems[: args.prompts]
            tasks = [Task(p, encode_question(tokenizer, p), slot, cfg, engine.vocabulary, LOCALIZERS[cfg.localizer], np.random.default_rng([seed, m, slot]), context)
                     for slot, p in enumerate(chosen)]  # fmt: skip
            sampled = run_programs([PROGRAMS[cfg.method](task) for task in tasks], engine)
            buffers, generated = sampled.results, sampled.generated
            rollouts = [r for buffer in buffers for r in buffer]
            set_advantages(rollouts, normalize)
            model.zero_grad()
            backward(model, rollouts, len(rollouts), tokenizer.pad_token_id, cfg)
            vectors.append(
                -torch.cat(
                    [
                        torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                        for p in model.parameters()
                    ]
                )[kept]
            )
            groups = grouped(rollouts)
            variance = {
                k > 0: [
                    any(r.advantage for r in members)
                    for (_, j), members in groups.items()
                    if (j > 0) == (k > 0)
                ]
                for k in (0, 1)
            }
            resets = [members[0] for (_, k), members in groups.items() if k > 0]
            suffixes = [r.reward for r in rollouts if r.group[1] > 0]
            seen.append(
                [
                    sum(r.generated for r in generated),
                    *(
                        np.mean(v) if v else np.nan
                        for v in (
                            variance[False],
                            variance[True],
                            suffixes,
                            [r.reset for r in resets],
                        )
                    ),
                ]
            )
        return torch.stack(vectors).double(), [
            np.mean([x for x in column if not np.isnan(x)] or [np.nan]) for column in zip(*seen)
        ]

    def crossed(v) -> float:  # |E g|^2 from products of different gradients
        return float(((v.sum(0) ** 2).sum() - (v**2).sum()) / (len(v) * (len(v) - 1)))

    reference, _ = gradients(STUDY["grpo"], False, args.seed + 1)
    length = math.sqrt(max(crossed(reference), 1e-30))
    print(
        f"{args.model} on {args.data}: {args.repeats} gradients of {args.prompts} prompts each, before any training"
    )
    print(
        "| | tokens a step | groups with variance: base | suffix | suffix pass rate | h*, mean | signal / noise | alignment with the gradient of the pass rate, 95% |\n"
        + "|---" * 8
        + "|"
    )
    for name in args.variants:
        vectors, (tokens, base, suffix, rate, depth) = gradients(STUDY[name], True, args.seed)
        signal = crossed(vectors)
        squares, products = (vectors**2).sum(1).numpy(), (vectors @ reference.mean(0)).numpy()
        value, low, high = interval(
            np.stack([products, squares], 1),
            lambda x: x[:, 0].mean() / math.sqrt(x[:, 1].mean()) / length,
        )
        cells = ["-" if np.isnan(x) else f"{x:.3f}" for x in (base, suffix, rate)] + [
            "-" if np.isnan(depth) else f"{depth:.1f}"
        ]
        print(
            f"| {name} | {tokens:,.0f} | {' | '.join(cells)} | {signal / (squares.mean() - signal):.3f} | {value:.3f} ({low:.3f} to {high:.3f}) |",
            flush=True,
        )


def command_anatomy(args) -> None:
    """Which thoughts get credit on one problem, under GRPO and under SRPO: a picture of both trees, like the paper's "grad tree".

    The colour of a thought is the mean over its tokens of A / (|T| N) (1 - pi(y_t)), the derivative of -L with respect to the logit of the
    token that was sampled: a token that the policy was sure of gets none, whatever its weight."""
    model, tokenizer = load_policy(args.model)
    engine, context = (
        HFEngine(model, tokenizer),
        model.config.get_text_config().max_position_embeddings,
    )
    problems = load_problems(args.data, seed=10**6 + args.seed)[: args.problems]
    trees = []
    for flags in (
        STUDY["grpo"],
        STUDY["srpo 1x4"],
    ):  # the same random numbers: SRPO's base group is the first half of GRPO's
        cfg = parse([*flags.split(), "--model", args.model])
        tasks = [
            Task(
                p,
                encode_question(tokenizer, p),
                k,
                cfg,
                engine.vocabulary,
                LOCALIZERS[cfg.localizer],
                np.random.default_rng([args.seed, k]),
                context,
            )
            for k, p in enumerate(problems)
        ]
        buffers = run_programs([PROGRAMS[cfg.method](task) for task in tasks], engine).results
        for buffer in buffers:
            set_advantages(buffer)
        trees.append(buffers)

    def shown(
        k: int,
    ) -> bool:  # all three groups of this problem have something to learn from, and there are base failures and successes
        return all(
            any(r.advantage for r in buffer if (r.group[1] > 0) == suffix)
            for buffer, suffix in ((trees[0][k], False), (trees[1][k], False), (trees[1][k], True))
        )

    k = next((k for k in range(len(problems)) if shown(k)), None)
    if k is None:
        raise UserError(
            f"no problem of {len(problems)} has variance in all its groups; raise --problems, or take a policy with a higher pass rate"
        )
    draw_trees(tokenizer, problems[k], [trees[0][k], trees[1][k]], args.out)
    print(
        f"problem {problems[k].index}: {problems[k].question} -> {problems[k].answer}; drawn in {args.out}"
    )


def draw_trees(tokenizer, problem, buffers, out: Path) -> None:
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(15, 4.6), layout="constrained")
    signals = [[thought_signals(r, len(buffer)) for r in buffer] for buffer in buffers]
    top = max(abs(s) for panel in signals for row in panel for s in row if s is not None)
    colors = plt.get_cmap("PuOr_r")
    width = max(len(r.thought_ends) for buffer in buffers for r in buffer)
    for panel, buffer, rows, title in zip(
        panels,
        buffers,
        signals,
        ("GRPO: one group of 8", "SRPO: a base group of 4, and 4 suffixes of a reset state"),
    ):
        seed = next((r.seed for r in buffer if r.seed is not None), None)
        for i, (r, row) in enumerate(zip(buffer, rows)):
            y = -i - 0.6 * (r.group[1] > 0)
            wrong = problem.check_steps(r.thoughts(tokenizer)) if problem.check_steps else None
            for h, (text, signal) in enumerate(zip(r.thoughts(tokenizer), row), 1):
                face = "0.85" if signal is None else colors(0.5 + 0.5 * signal / top)
                panel.add_patch(
                    plt.Rectangle(
                        (h - 1, y),
                        0.94,
                        0.86,
                        facecolor=face,
                        edgecolor="black" if h == wrong else "0.6",
                        linewidth=2 if h == wrong else 0.3,
                    )
                )
                words = text.replace(DELIMITER, "").replace("}", "").split()
                panel.text(
                    h - 0.53,
                    y + 0.43,
                    words[-1][:5] if words else "",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="0.5"
                    if signal is None
                    else "white"
                    if abs(signal) > 0.6 * top
                    else "black",
                )
            panel.text(
                width + 0.1,
                y + 0.43,
                f"reward {r.reward:.0f}   A {r.advantage:+.2f}" + ("   seed" if r is seed else ""),
                va="center",
                fontsize=8,
            )
        if seed is not None:
            reset = next(r.reset for r in buffer if r.seed is not None)
            panel.plot(
                [reset - 1.03] * 2,
                [-len(buffer) + 0.35, -len(buffer) / 2 + 0.3],
                color="C3",
                linewidth=2,
            )
            panel.text(
                reset - 1.03,
                -len(buffer) / 2 + 0.38,
                f"reset before thought {reset}",
                color="C3",
                fontsize=8,
                ha="center",
                va="bottom",
            )
        panel.set(
            xlim=(-0.1, width + 3),
            ylim=(-len(buffer) + 0.1, 1.1),
            title=title,
            yticks=[],
            xticks=[h - 0.53 for h in range(1, width + 1)],
            xticklabels=range(1, width + 1),
            xlabel="thought",
        )
        panel.spines[:].set_visible(False)
    scale = plt.cm.ScalarMappable(plt.Normalize(-top, top), colors)
    figure.colorbar(
        scale, ax=panels, label="mean gradient signal of a thought", shrink=0.8, pad=0.01
    )
    figure.savefig(out, dpi=130)
    plt.close(figure)


def thought_signals(rollout, n_rollouts: int) -> list[float | None]:
    """Mean over the tokens of each thought of weight (1 - pi); None for thoughts of a masked prefix. The sampler's log-probs are the policy's (T = 1)."""
    weights = token_weights(rollout, n_rollouts)
    starts = [0, *rollout.thought_ends[:-1]]
    signal = [w * (1 - math.exp(logp)) for w, logp in zip(weights, rollout.logps)]
    return [
        None if b <= rollout.prefix_len else float(np.mean(signal[a:b]))
        for a, b in zip(starts, rollout.thought_ends)
    ]


# --------------------------------------------------------------------------------------------------------------- command line


def add_commands(command) -> None:
    """Adds study, signal and anatomy to the commands of eval.py; command(function, help) makes a parser for one."""
    usual = parse([])
    sub = command(
        command_study,
        "trains every variant with every seed and holds the paper's claims against them",
    )
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("runs/study"),
        help="folder (1.5 GB); the same command goes on with what is there",
    )
    sub.add_argument("--model", default=usual.model, help="folder or hub id")
    sub.add_argument(
        "--data", default=usual.train_data, help="task, for training and held-out problems"
    )
    sub.add_argument(
        "--flags",
        default="",
        help="more settings of srpo.py for every run, in one string, such as '--micro_batch 8'",
    )
    sub.add_argument(
        "--benchmark_problems",
        type=int,
        default=256,
        help="held-out problems of the benchmark of each run's end",
    )
    sub.add_argument("--seeds", type=int, default=8, help="of each variant, from 0")
    sub.add_argument("--steps", type=int, default=50, help="of each run")
    sub.add_argument(
        "--prompts_per_step", type=int, default=usual.prompts_per_step, help="problems per step"
    )
    sub.add_argument("--eval_every", type=int, default=10, help="steps between evaluations")
    sub.add_argument(
        "--target",
        type=float,
        default=0.3,
        help="pass rate of the time-to-target columns and claims",
    )
    sub.add_argument(
        "--variants",
        nargs="+",
        choices=STUDY,
        default=list(STUDY),
        metavar="NAME",
        help=f"of: {', '.join(STUDY)}",
    )
    sub.add_argument(
        "--grid", nargs="+", type=float, default=list(GRID), help="learning rates of the sweep"
    )
    sub.add_argument(
        "--sweep_seeds", type=int, default=4, help="seeds of the sweep, other ones than the study's"
    )
    sub.add_argument("--sweep_steps", type=int, default=30, help="steps of the sweep's runs")
    sub.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs side by side, one thread each"
    )
    sub = command(
        command_signal, "signal and noise of one step's gradient, by method, before training"
    )
    sub.add_argument("--model", default=usual.model, help="folder or hub id")
    sub.add_argument("--data", default=usual.train_data, help=f"JSON-lines file, or {GENERATED}")
    sub.add_argument(
        "--variants",
        nargs="+",
        choices=STUDY,
        default=[
            "grpo",
            "rrpo 1x4",
            "srpo 1x4",
            "srpo 1x8",
            "srpo 2x4",
            "srpo 1x4 verifier",
            "srpo 1x4 deepest",
            "srpo 1x4 response length",
        ],
        metavar="NAME",
        help=f"of: {', '.join(STUDY)}",
    )
    sub.add_argument("--repeats", type=int, default=24, help="independent gradients of each method")
    sub.add_argument(
        "--prompts", type=int, default=usual.prompts_per_step, help="problems per gradient"
    )
    sub.add_argument("--seed", type=int, default=0, help="of problems and sampling")
    sub = command(
        command_anatomy, "which thoughts get credit on one problem, under GRPO and under SRPO"
    )
    sub.add_argument("--model", default=usual.model, help="folder or hub id")
    sub.add_argument("--data", default=usual.train_data, help=f"JSON-lines file, or {GENERATED}")
    sub.add_argument(
        "--problems",
        type=int,
        default=64,
        help="problems to look through for one whose groups all have variance",
    )
    sub.add_argument("--seed", type=int, default=0, help="of problems and sampling")
    sub.add_argument("--out", type=Path, default=Path("anatomy.png"), help="picture to write")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Experiments on the paper's claims.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function, help):
        sub = commands.add_parser(function.__name__.removeprefix("command_"), help=help)
        sub.set_defaults(function=function)
        return sub

    add_commands(command)
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        print(f"study: {fault}", file=sys.stderr)
        sys.exit(2)
