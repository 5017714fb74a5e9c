"""A look into the gradient of one step: how much of it is signal, and which thoughts get credit.

    python -m tests.gradient signal                      # signal and noise, by method
    python -m tests.gradient anatomy --out anatomy.png   # credit of each thought: GRPO and SRPO

Nothing is trained. `tests/theory.py` computes the signal of one prompt exactly, without a network.

Left out: the walk, whose gradient is biased (tests/test_walk.py has its expectation).

Try it alone:  python -m tests.gradient signal --data chain-3 --repeats 4 --prompts 8
"""

import argparse
import math
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data.curves import NEGATIVE, POSITIVE, interval, markdown, pyplot
from data.driver import Sampled, run_programs
from data.faults import UserError
from data.metrics import is_flat
from data.policies import encode_question, load_policy
from data.problems import Problem
from data.tasks import GENERATED, load_problems
from data.verifiers import DELIMITER
from localize import LOCALIZERS, check_localizer
from loss import backward, set_advantages, token_weights, weigh
from rollout import PROGRAMS, HFEngine, Rollout, Task, grouped
from srpo import Config, parse

# Flags of srpo.py by name. Every variant trains 8 rollouts per prompt.
VARIANTS = {
    "grpo": "--method grpo",
    "rrpo 1x4": "--method rrpo",
    "srpo 1x4": "--method srpo",
    "srpo 1x8": "--method srpo --split 1x8",
    "srpo 2x4": "--method srpo --split 2x4",
    "srpo 1x4 verifier": "--method srpo --localizer verifier",
    "srpo 1x4 response length": "--method srpo --length response",  # ours
}

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
    return parse([*VARIANTS[name].split(), "--model", model])


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
    n = args.repeats * args.prompts
    problems = load_problems(args.data, seed=10**6 + args.seed, n=n)
    if len(problems) < n:
        raise UserError(
            f"{args.data} has {len(problems)} problems, not {n}: each of --repeats takes --prompts "
            "of its own; lower one of them"
        )
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
    # Not with the reference of the same repeat, whose prompts are the same
    others = (reference.sum(0) - reference) / (len(reference) - 1)
    products = (gradients * others).sum(1).numpy()  # [repeats]
    reference_square = squared_mean(reference)
    reference_norm = math.sqrt(reference_square) if reference_square > 0 else math.nan

    def cosine(pairs: np.ndarray) -> float:
        return pairs[:, 0].mean() / math.sqrt(pairs[:, 1].mean()) / reference_norm

    value, low, high = interval(np.stack([products, squares], axis=1), cosine)
    base_variance = mean_of([step.base_variance for step in steps])
    alignment = "-" if np.isnan(value) else f"{value:.3f} ({low:.3f} to {high:.3f})"
    return {
        "method": name,
        "tokens a step": f"{np.mean([step.tokens for step in steps]):,.0f}",
        "groups with variance: base": number_or_dash(base_variance),
        "suffix": number_or_dash(mean_of([step.suffix_variance for step in steps])),
        "suffix pass rate": number_or_dash(mean_of([step.suffix_pass_rate for step in steps])),
        "h*, mean": number_or_dash(mean_of([step.reset for step in steps]), digits=1),
        "signal / noise": f"{signal / (squares.mean() - signal):.3f}",
        "alignment with the gradient of the pass rate": alignment,
    }


def mean_of(values: list) -> float:
    """Mean of the values that are known (neither None nor nan); nan if none is."""
    known = [value for value in values if value is not None and not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


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


def add_signal(commands) -> None:
    usual = parse([])
    help = "signal and noise of one step's gradient, by method, before training"
    sub = commands.add_parser("signal", help=help)
    sub.set_defaults(command=command_signal)
    add_policy(sub, usual)
    add_variants(sub, list(VARIANTS))
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
        choices=VARIANTS,
        default=usual,
        metavar="NAME",
        help=f"of: {', '.join(VARIANTS)}",
    )


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gradient", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_signal(commands)
    add_anatomy(commands)
    args = parser.parse_args(argv)
    args.command(args)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        print(f"gradient: {fault}", file=sys.stderr)
        sys.exit(2)
