"""The chain task."""

import numpy as np

from data.problems import Problem
from data.verifiers import DELIMITER, last_boxed

MODULUS = 97  # prime, so every operation below is a bijection: a wrong chain stays wrong unless a second error undoes the first


OPERATIONS = (
    [f"+{b}" for b in range(2, 10)]
    + [f"-{b}" for b in range(2, 10)]
    + [f"*{b}" for b in range(2, 6)]
)


MAX_STEPS = 24  # step labels in the embedded policy's vocabulary


def apply(operation: str, value: int) -> int:
    """The truth of one step: `apply("*3", 41) == 26` (modulo 97)."""
    b = int(operation[1:])
    return {"+": value + b, "-": value - b, "*": value * b}[operation[0]] % MODULUS


def chain_thoughts(start: int, operations: list[str]) -> list[str]:
    """The right thoughts of a chain of K operations: K steps and the boxed answer, without delimiters.

    >>> chain_thoughts(41, ["+7", "*3"])
    ['1: +7 = 48', '2: *3 = 47', '\\\\boxed{ 47 }']
    """
    thoughts, value = [], start
    for i, operation in enumerate(operations, 1):
        value = apply(operation, value)
        thoughts.append(f"{i}: {operation} = {value}")
    return thoughts + [f"\\boxed{{ {value} }}"]


def chain_question(start: int, operations: list[str]) -> str:
    """`mod97 1: +7 2: *3 start 41 .`"""
    return (
        f"mod{MODULUS} "
        + " ".join(f"{i}: {op}" for i, op in enumerate(operations, 1))
        + f" start {start} ."
    )


def chain_problem(index: int, start: int, operations: list[str]) -> Problem:
    truth = chain_thoughts(start, operations)

    def check_steps(thoughts: list[str]) -> int | None:
        for i, thought in enumerate(thoughts):
            if i >= len(truth) or thought.replace(DELIMITER, "").split() != truth[i].split():
                return i + 1
        return (
            None if len(thoughts) == len(truth) else len(thoughts)
        )  # stopped early: its last thought should not have been last

    return Problem(
        index, chain_question(start, operations), last_boxed(truth[-1]), "integer", check_steps
    )


def generate_chains(steps: int, n: int, seed: int) -> list[Problem]:
    """n problems of `steps` operations each (the difficulty dial), a function of the seed."""
    rng = np.random.default_rng([seed, steps])
    return [
        chain_problem(
            i,
            int(rng.integers(MODULUS)),
            [OPERATIONS[j] for j in rng.integers(len(OPERATIONS), size=steps)],
        )
        for i in range(n)
    ]


if __name__ == "__main__":
    problem = generate_chains(steps=4, n=1, seed=0)[0]
    print(problem.question, "->", problem.answer)
    print(
        "reward of the right answer:",
        problem.grade(f"\\boxed{{ {problem.answer} }}"),
        "of a wrong one:",
        problem.grade("\\boxed{ 97 }"),
    )
