"""What the walk gains by: the weight that it gives a prompt, or the successes that it finds?

With enough rounds and an exact localizer the walk ascends log P of each prompt's pass rate P
(tests/test_walk.py): hard prompts weigh 1/P, where GRPO's weight is bounded. And it finds a success
for most prompts, where a group of GRPO mostly has none. This file takes the two apart, on policies
small enough to simulate (tests/tabular.py), with an exact localizer and no luck.

    sampling  GRPO's groups of 8, or the walk's (4, doubled where they differ, walked from if wrong)
    weight    c(P) of GRPO or of the walk: advantages of a prompt are multiplied by the ratio of
              the two, so that the expected gradient of a prompt is the other method's

Same weight, other sampling: the expected gradient stays, its noise changes.

Left out: shared weights, and a localizer that errs (lesson 3 of tests/theory.py has that one).

Try it alone:  python -m tests.walk_gain    # seconds; prints the table
"""

import argparse
from dataclasses import dataclass
from itertools import product

import numpy as np

from tests.tabular import Ended, Method, train, until

TARGET = 0.5
LONGEST = 600  # steps
# Of each logit with AdamW; the length of a step in all logits with plain steps of fixed length.
# Larger rates are faster for all: without luck and shared weights nothing is ever unlearned.
RATES = {"AdamW": 0.1, "fixed length": 4.0}


def weights_of_groups(P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(c of GRPO's groups of 8, c of the walk's groups); the expected gradient is c grad P.

    Sums over a group, not means: the mean over the rollouts of a step scales all prompts alike."""
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


def factor(sampling: str, weight: str, P: np.ndarray) -> np.ndarray:
    """What takes one method's weight of prompts to the other's."""
    if sampling == weight:
        return np.ones_like(P)
    ratio = np.interp(P, GRID, C_WALK / C_GRPO)
    return ratio if weight == "walk" else 1 / ratio


@dataclass
class Setting:
    """One cell of the table."""

    low: float  # the facts' chances to be right are uniform between low
    high: float  # and high
    sampling: str  # grpo or walk
    weight: str  # grpo or walk
    optimizer: str


def run(setting: Setting, seeds: int) -> Ended:
    """Trains until the pass rate reaches the target."""

    def to_the_other(P):
        return factor(setting.sampling, setting.weight, P)

    regime = (setting.low, setting.high)
    method = Method(setting.sampling, q=1.0)
    lr = RATES[setting.optimizer]
    training = train(regime, setting.optimizer, lr, list(range(seeds)), method, to_the_other)
    return until(training, TARGET, LONGEST)


def cell(setting: Setting, seeds: int) -> str:
    """Mean steps and thousand thoughts to the target."""
    ended = run(setting, seeds)
    if not ended.reached:
        return f"not in {LONGEST} steps"
    steps = ended.steps
    return f"{steps.mean():.0f} ± {steps.std(ddof=1):.0f} / {ended.thoughts.mean() / 1000:.0f}"


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
