"""Tasks by name: a generated task, or a JSON-lines file of problems.

`load_problems` is what `--train_data`, `--eval_data` and `--data` go through. The names:

    chain-12       chains of 12 steps modulo 97, for the embedded policy      data/chains.py
    english-3      arithmetic in English with 3 operations                    data/english.py
    english-2-4    the same with 2 to 4 operations
    path/to/file   problems as JSON lines                                     data/problems.py

Left out: downloads. `data/prepare.py` makes files of public sets.

Try it alone:  python -m data.tasks                    # one problem of each generated task
               python -m data.tasks english-2-4        # problems of one task or file
"""

import os
import re
import sys

from data.chains import MAX_STEPS, generate_chains
from data.english import generate_english
from data.faults import UserError
from data.problems import Problem, read_problems

# For messages and help texts.
GENERATED = "chain-K (K steps, for the embedded policy) or english-K-L (K to L steps in English)"


def load_problems(source: str, seed: int, n: int = 4096) -> list[Problem]:
    """Returns n problems of a generated task, or all problems of a JSON-lines file.

    `seed` is the random seed of generated problems; a file ignores `seed` and `n`.
    Raises UserError for an unknown name, or with file and line of the first bad problem.
    """
    if re.fullmatch(r"chain-\d{1,9}", source):
        steps = int(source.removeprefix("chain-"))
        if not 1 <= steps <= MAX_STEPS:
            raise UserError(
                f"{source}: the embedded policy knows chains of 1 to {MAX_STEPS} steps; "
                "ask for one of those"
            )
        return generate_chains(steps, n, seed)
    english = re.fullmatch(r"english-(\d{1,9})(?:-(\d{1,9}))?", source)
    if english:
        low = int(english[1])
        high = int(english[2] or low)
        return generate_english(low, high, n, seed)
    if not os.path.isfile(source):  # False for a name that no file can have, not an error
        raise UserError(
            f"{source}: no such data file; "
            "give a JSON-lines file, or a generated task (chain-12 or english-2-4, say)"
        )
    return read_problems(source)


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
