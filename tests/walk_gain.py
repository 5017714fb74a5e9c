"""What the walk gains by: the weight that it gives a prompt, or the successes that it finds?

With enough rounds and an exact localizer the walk ascends log P of each prompt's pass rate P
(tests/test_walk.py): hard prompts weigh 1/P, where GRPO's weight is bounded. And it finds a success
for most prompts, where a group of GRPO mostly has none. This file takes the two apart, on policies
small enough to simulate: one logit for each fact, problems of STEPS facts, no luck.

    sampling  GRPO's groups of 8, or the walk's (4, doubled where they differ, walked from if wrong)
    weight    c(P) of GRPO or of the walk: advantages of a prompt are multiplied by the ratio of
              the two, so that the expected gradient of a prompt is the other method's

Same weight, other sampling: the expected gradient stays, its noise changes.

Left out: shared weights (all facts are learned apart), and a localizer that errs.

Try it alone:  python -m tests.walk_gain    # half a minute of one core; prints the table
"""

import argparse
from dataclasses import dataclass
from itertools import product

import numpy as np

STEPS = 12  # facts of a problem
FACTS = 600
PROMPTS = 32  # a step
ROUNDS = 12
TARGET = 0.5
LONGEST = 600  # steps
# Of each logit with Adam; the length of a step in all logits with the plain, normalised gradient.
# Larger rates are faster for all: without luck and shared weights nothing is ever unlearned.
RATES = {"Adam": 0.1, "plain gradient": 4.0}


def weights_of_groups(P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(c of GRPO's groups of 8, c of the walk's groups); the expected gradient is c grad P.

    Sums over a group, not means: both methods train at most 8 rollouts of a prompt."""
    grpo = np.zeros_like(P)
    doubled = np.zeros_like(P)
    for rewards in product([0.0, 1.0], repeat=8):
        r = np.array(rewards)
        if r.std() == 0:
            continue
        successes = r.sum()
        advantages = (r - r.mean()) / r.std()
        score = advantages[r == 1].sum() / P - advantages[r == 0].sum() / (1 - P)
        chance = P**successes * (1 - P) ** (8 - successes)
        grpo += chance * score
        if 0 < r[:4].sum() < 4:
            doubled += chance * score
    found = 2 / P + 2 / (1 - P)  # advantage 2 of the success, -1/2 of each of four failures
    return grpo, doubled + (1 - P) ** 4 * found


# c at these pass rates; between them it is interpolated.
GRID = np.logspace(-9, -1e-6, 500)
C_GRPO, C_WALK = weights_of_groups(GRID)


def factor(sampling: str, weight: str, P: float) -> float:
    """What takes one method's weight of a prompt to the other's."""
    if sampling == weight:
        return 1.0
    ratio = np.interp(P, GRID, C_WALK / C_GRPO)
    return ratio if weight == "walk" else 1 / ratio


@dataclass
class Drawn:
    """Responses to one problem: which steps are right, and the advantage of each response."""

    right: np.ndarray  # [n, STEPS] bool
    advantages: np.ndarray  # [n]
    thoughts: int  # generated


def respond(p: np.ndarray, n: int, rng) -> np.ndarray:
    return rng.random((n, len(p))) < p


def drawn(right: np.ndarray, thoughts: int) -> Drawn:
    rewards = right.all(1).astype(float)
    std = rewards.std()
    advantages = (rewards - rewards.mean()) / std if std > 0 else np.zeros(len(rewards))
    return Drawn(right, advantages, thoughts)


def draw_grpo(p: np.ndarray, rng) -> Drawn:
    return drawn(respond(p, 8, rng), 8 * STEPS)


def draw_walk(p: np.ndarray, rng) -> Drawn:
    """As rollout.walk, with an exact localizer; a localization counts as half a response."""
    base = respond(p, 4, rng)
    rewards = base.all(1)
    thoughts = 4 * STEPS
    if rewards.all():
        return drawn(base, thoughts)
    if rewards.any():
        return drawn(np.concatenate([base, respond(p, 4, rng)]), 8 * STEPS)
    in_hand = base[0]
    for _ in range(ROUNDS):
        h = in_hand.argmin()
        in_hand = np.concatenate([in_hand[:h], respond(p[h:], 1, rng)[0]])
        thoughts += STEPS - h + STEPS // 2
        if in_hand.all():
            return drawn(np.concatenate([base, in_hand[None]]), thoughts)
    return drawn(base, thoughts)


@dataclass
class Ended:
    """Where a run reached the target; None: it did not."""

    steps: int | None
    thoughts: int


@dataclass
class Setting:
    """One cell of the table."""

    low: float  # the facts' chances to be right are uniform between low
    high: float  # and high
    sampling: str  # grpo or walk
    weight: str  # grpo or walk
    optimizer: str


def run(setting: Setting, seed: int) -> Ended:
    """Trains until the pass rate of held-out problems reaches the target."""
    rng = np.random.default_rng([seed, 11])
    lr = RATES[setting.optimizer]
    p = rng.uniform(setting.low, setting.high, FACTS)
    logits = np.log(p / (1 - p))
    held_out = rng.integers(FACTS, size=(512, STEPS))
    moments = np.zeros((2, FACTS))
    thoughts = 0
    for step in range(1, LONGEST + 1):
        gradient = np.zeros(FACTS)
        p = 1 / (1 + np.exp(-logits))
        for facts in rng.integers(FACTS, size=(PROMPTS, STEPS)):
            batch = (draw_walk if setting.sampling == "walk" else draw_grpo)(p[facts], rng)
            thoughts += batch.thoughts
            score = batch.right - p[facts]
            scale = factor(setting.sampling, setting.weight, p[facts].prod())
            np.add.at(gradient, facts, scale * batch.advantages @ score)
        if setting.optimizer == "Adam":
            moments[0] = 0.9 * moments[0] + 0.1 * gradient
            moments[1] = 0.999 * moments[1] + 0.001 * gradient**2
            size = np.sqrt(moments[1] / (1 - 0.999**step)) + 1e-8
            logits = logits + lr * moments[0] / (1 - 0.9**step) / size
        else:
            logits = logits + lr * gradient / (np.linalg.norm(gradient) + 1e-8)
        p = 1 / (1 + np.exp(-logits))
        if p[held_out].prod(1).mean() >= TARGET:
            return Ended(step, thoughts)
    return Ended(None, thoughts)


def cell(setting: Setting, seeds: int) -> str:
    """Mean steps and thousand thoughts to the target."""
    runs = [run(setting, seed) for seed in range(seeds)]
    if not all(ended.steps for ended in runs):
        return f"not in {LONGEST} steps"
    steps = [ended.steps for ended in runs]
    thoughts = [ended.thoughts / 1000 for ended in runs]
    return f"{np.mean(steps):.0f} ± {np.std(steps):.0f} / {np.mean(thoughts):.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    print(f"steps / thousand generated thoughts to a pass rate of {TARGET}, {args.seeds} seeds\n")
    print("| facts | optimizer | sampling | GRPO's weight | the walk's weight |")
    print("|---|---|---|---|---|")
    for low, high in ((0.35, 0.90), (0.50, 0.95), (0.70, 0.99)):
        for optimizer, sampling in product(RATES, ("grpo", "walk")):
            row = [f"U({low}, {high})", optimizer, sampling]
            for weight in ("grpo", "walk"):
                row.append(cell(Setting(low, high, sampling, weight, optimizer), args.seeds))
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
