"""Tasks by name: a generated task, or a JSON-lines file of problems.

`load_problems` is what `--train_data`, `--eval_data` and `--data` go through. The names:

    chain-12             chains of 12 steps modulo 97, for the embedded policy    data/chains.py
    chain-12-below-4e-4  those that it solves less often than that           data/hard_chains.py
    english-3            arithmetic in English with 3 operations                  data/english.py
    english-2-4          the same with 2 to 4 operations
    path/to/file         problems as JSON lines                                   data/problems.py

A generated problem that stands in a file (`eval.py benchmark` writes those that a policy never
solved) is generated again when it is read, for its step checker.

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
from data.hard_chains import hard_chains
from data.problems import Origin, Problem, read_problems

# For messages and help texts.
GENERATED = (
    "chain-K (K steps, for the embedded policy), chain-K-below-P (hard ones) or english-K-L "
    "(K to L steps in English)"
)


def load_problems(source: str, seed: int, n: int = 4096) -> list[Problem]:
    """Returns n problems of a generated task (of a hard set all), or all of a JSON-lines file.

    `seed` is the random seed of generated problems; a file ignores `seed` and `n`.
    Raises UserError for an unknown name, or with file and line of the first bad problem.
    """
    problems = generate(source, seed, n)
    if problems is not None:
        return problems
    if not os.path.isfile(source):
        raise UserError(
            f"{source[:200]}: no such data file; "
            "give a JSON-lines file, or a generated task (chain-12 or english-2-4, say)"
        )
    problems = read_problems(source)
    restore_step_checks(problems, source)
    return problems


CHAIN = r"chain-(\d{1,4})(?:-below-(\d{1,3}(?:\.\d{1,9})?(?:e-\d{1,2})?))?"
ENGLISH = r"english-(\d{1,4})(?:-(\d{1,4}))?"


def generate(source: str, seed: int, n: int = 4096) -> list[Problem] | None:
    """Returns n problems of a generated task, each with its origin; None for another name.

    A hard set has a size of its own."""
    chain = re.fullmatch(CHAIN, source)
    english = re.fullmatch(ENGLISH, source)
    if chain:
        steps, below = int(chain[1]), chain[2]
        if not 1 <= steps <= MAX_STEPS:
            raise UserError(
                f"{source}: the embedded policy knows chains of 1 to {MAX_STEPS} steps; "
                "ask for one of those"
            )
        if below is None:
            problems = generate_chains(steps, n, seed)
        else:
            problems = hard_chains(steps, float(below), seed).problems
    elif english:
        low = int(english[1])
        high = int(english[2] or low)
        problems = generate_english(low, high, n, seed)
    else:
        return None
    for problem in problems:
        problem.origin = Origin(source, seed, problem.index)
    return problems


def restore_step_checks(problems: list[Problem], source: str) -> None:
    """Gives the generated problems of a file their step checkers again, in place.

    Each is generated once more, and must come out as the file has it.
    """
    generated = {}
    for problem in problems:
        origin = problem.origin
        if origin is None:
            continue
        key = (origin.task, origin.seed)
        if key not in generated:
            try:
                generated[key] = generate(*key) or []
            except UserError as fault:
                raise UserError(f"{source}, problem {problem.index + 1}: {fault}")
        again = generated[key][origin.index : origin.index + 1]
        if not again or again[0].to_json() != problem.to_json():
            raise UserError(
                f"{source}: problem {problem.index + 1} is not number {origin.index} of "
                f"{origin.task[:40]} with seed {origin.seed}, as its field 'generated' says; "
                "remove that field (it then has no step checker)"
            )
        problem.check_steps = again[0].check_steps


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
