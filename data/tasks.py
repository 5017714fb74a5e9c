"""Tasks by name: a generated task, or a JSON-lines file of problems.

`load_problems` is what `--train_data`, `--eval_data` and `--data` go through. The names:

    chain-12             chains of 12 steps modulo 97, for the embedded policy    data/chains.py
    chain-12-below-4e-4  those whose solution it gives a probability below 4e-4
    english-3            arithmetic in English with 3 operations                  data/english.py
    english-2-4          the same with 2 to 4 operations
    path/to/file         problems as JSON lines                                   data/problems.py

A hard set is chosen by the probability that the untrained embedded policy (data/policy) gives the
one right response, so chance selects nothing. For a set of what another model does not solve, see
`eval.py benchmark`.

Left out: downloads. `data/prepare.py` makes files of public sets.

Try it alone:  python -m data.tasks                    # one problem of each generated task
               python -m data.tasks english-2-4        # problems of one task or file
               python -m data.tasks chain-12-below-1e-2 chain-12-below-4e-4 chain-12-below-1e-5
"""

import re
import sys
from pathlib import Path

import torch

from data.chains import MAX_STEPS, generate_chains, true_response
from data.english import generate_english
from data.faults import UserError
from data.policies import EMBEDDED, encode_question, load_policy
from data.problems import Problem, read_problems

# For messages and help texts.
GENERATED = (
    "chain-K (K steps, for the embedded policy), chain-K-below-P (hard ones) or english-K-L "
    "(K to L steps in English)"
)


def load_problems(source: str, seed: int, n: int = 4096) -> list[Problem]:
    """Returns n problems of a generated task, or all problems of a JSON-lines file.

    `seed` is the random seed of generated problems; a file ignores `seed` and `n`. A hard set holds
    those of n chains that are hard enough. Raises UserError for an unknown name, or with file and line of the first bad problem.
    """
    chain = re.fullmatch(r"chain-(\d+)(?:-below-([\d.]+(?:e-?\d+)?))?", source)
    if chain:
        steps = int(chain[1])
        if not 1 <= steps <= MAX_STEPS:
            raise UserError(
                f"{source}: the embedded policy knows chains of 1 to {MAX_STEPS} steps; "
                "ask for one of those"
            )
        chains = generate_chains(steps, n, seed)
        return hard_chains(chains, float(chain[2]), source) if chain[2] else chains
    english = re.fullmatch(r"english-(\d+)(?:-(\d+))?", source)
    if english:
        low = int(english[1])
        high = int(english[2] or low)
        return generate_english(low, high, n, seed)
    if not Path(source).is_file():
        raise UserError(
            f"{source}: no such data file; "
            "give a JSON-lines file, or a generated task (chain-12 or english-2-4, say)"
        )
    return read_problems(source)


def hard_chains(chains: list[Problem], below: float, source: str) -> list[Problem]:
    """Returns the chains, all of one length, that the embedded policy solves less often than that.

    Raises UserError if there are none."""
    probabilities = pass_probabilities(chains)
    hard = [problem for problem, p in zip(chains, probabilities) if p < below]
    if not hard:
        easiest = f"the smallest probability of {len(chains)} chains is {min(probabilities):.1g}"
        raise UserError(f"{source}: no chain is that hard; {easiest}")
    return hard


@torch.inference_mode()
def pass_probabilities(chains: list[Problem], batch: int = 256) -> list[float]:
    """Returns the probability that the embedded policy gives each chain's one right response.

    The chains all have the same number of steps, so their texts have the same number of tokens."""
    model, tokenizer = load_policy(EMBEDDED)
    probabilities = []
    for start in range(0, len(chains), batch):
        rows = []
        for problem in chains[start : start + batch]:
            prompt = encode_question(tokenizer, problem)
            response = tokenizer(true_response(problem.question))["input_ids"]
            rows.append(prompt + response)
        ids = torch.tensor(rows)  # [batch, L]
        logits = model(ids).logits  # [batch, L, V]
        logps = logits[:, len(prompt) - 1 : -1].log_softmax(-1)
        target = ids[:, len(prompt) :, None]
        probabilities += logps.gather(2, target).sum((1, 2)).exp().tolist()
    return probabilities


def demo(sources: list[str]) -> None:
    """Prints how many problems each source has, and its first one."""
    for source in sources:
        problems = load_problems(source, seed=0)
        first = problems[0]
        print(f"{source}: {len(problems)} problems; the first: {first.question} -> {first.answer}")


if __name__ == "__main__":
    try:
        demo(sys.argv[1:] or ["chain-4", "chain-12", "english-3", "english-2-4"])
    except UserError as fault:
        sys.exit(f"tasks.py: {fault}")
