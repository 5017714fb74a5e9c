"""Hard chains: problems that the untrained embedded policy hardly ever solves.

`chain-12-below-4e-4` holds chains of 12 steps whose one right response has a probability below 4e-4
for the policy in data/policy. That probability is computed, not counted, so chance selects nothing.
(For a set of what another model does not solve, see `eval.py benchmark`.)

Scoring a whole response takes milliseconds, and few chains are hard. So each step is first scored
as the first step of another chain; only chains whose product is low are scored as a whole.

Left out: hard chains whose product is not low.

Try it alone:  python -m data.hard_chains 12 4e-4    # how many, and percentiles
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch

from data.chains import MODULUS, OPERATIONS, apply, chain_problem, true_response
from data.faults import UserError
from data.policies import EMBEDDED, encode_question, load_policy
from data.problems import Problem

SIZE = 1024  # chains in a hard set, at most
POOL = 2**18  # chains that they are chosen from, at most
BATCH = 128  # chains of one forward
STEP_TOKENS = 5  # `1: +7 = 48 </thought>`


@dataclass
class HardChains:
    """Problems, and the probability that the untrained policy solves each."""

    problems: list[Problem]
    probabilities: list[float]


def hard_chains(steps: int, below: float, seed: int) -> HardChains:
    """Draws chains and keeps the hard ones; the random seed determines them.

    Raises UserError if none of the pool is hard enough.
    """
    model, tokenizer = load_policy(EMBEDDED)
    rng = np.random.default_rng([seed, steps, 1])
    starts = rng.integers(MODULUS, size=POOL)
    operations = rng.integers(len(OPERATIONS), size=(POOL, steps))
    candidates = np.flatnonzero(guess(starts, operations, model, tokenizer) < below)
    hard = HardChains([], [])
    for first in range(0, len(candidates), BATCH):
        chains = []
        for i in candidates[first : first + BATCH]:
            words = [OPERATIONS[k] for k in operations[i]]
            chains.append(chain_problem(0, int(starts[i]), words))
        for problem, p in zip(chains, pass_probabilities(chains, model, tokenizer)):
            if p < below and len(hard.problems) < SIZE:
                problem.index = len(hard.problems)
                hard.problems.append(problem)
                hard.probabilities.append(p)
        if len(hard.problems) == SIZE:
            break
    if not hard.problems:
        raise UserError(
            f"none of {POOL} chains of {steps} steps is solved with a probability below {below}; "
            "ask for a larger one"
        )
    return hard


def guess(starts: np.ndarray, operations: np.ndarray, model, tokenizer) -> np.ndarray:
    """The product of the probabilities of a chain's steps, each as a first step: [pool].

    starts: [pool]; operations: [pool, steps], places in OPERATIONS."""
    chains = []
    result = np.zeros((len(OPERATIONS), MODULUS), int)
    for k, operation in enumerate(OPERATIONS):
        for value in range(MODULUS):
            result[k, value] = apply(operation, value)
            chains.append(chain_problem(0, value, [operation] * operations.shape[1]))
    step_p = pass_probabilities(chains, model, tokenizer, tokens=STEP_TOKENS)
    step_p = np.reshape(step_p, result.shape)
    product = np.ones(len(starts))
    value = starts
    for k in operations.T:
        product *= step_p[k, value]
        value = result[k, value]
    return product


@torch.inference_mode()
def pass_probabilities(chains: list[Problem], model, tokenizer, tokens=None) -> list[float]:
    """Returns the policy's probability of each chain's one right response, or its first tokens.

    The chains have the same number of steps, so their texts have the same number of tokens."""
    probabilities = []
    for first in range(0, len(chains), BATCH):
        rows = []
        for problem in chains[first : first + BATCH]:
            prompt = encode_question(tokenizer, problem)
            response = tokenizer(true_response(problem.question))["input_ids"]
            rows.append(prompt + response[:tokens])
        ids = torch.tensor(rows)  # [BATCH, L]
        logits = model(ids).logits[:, len(prompt) - 1 : -1]  # of the response's tokens
        logps = logits.log_softmax(-1).gather(2, ids[:, len(prompt) :, None])
        probabilities += logps.sum((1, 2)).exp().tolist()
    return probabilities


def demo(steps: int, below: float) -> None:
    """Prints how hard the set is, and its first problem."""
    hard = hard_chains(steps, below, seed=0)
    percentiles = np.percentile(hard.probabilities, [0, 25, 50, 75, 100])
    print(f"{len(hard.problems)} chains; probabilities at 0, 25, 50, 75, 100%: {percentiles}")
    print(hard.problems[0].question, "->", hard.problems[0].answer)


if __name__ == "__main__":
    try:
        steps, below = sys.argv[1:] or ("12", "4e-4")
        steps, below = int(steps), float(below)
    except ValueError:
        sys.exit("usage: python -m data.hard_chains STEPS BELOW, two numbers: 12 4e-4")
    try:
        demo(steps, below)
    except UserError as fault:
        sys.exit(f"hard_chains.py: {fault}")
