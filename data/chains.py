"""The chain task: K steps of arithmetic modulo 97, with the exact truth of every step.

    question   mod97 1: +7 2: *3 start 41 .
    thoughts   1: +7 = 48</thought>   2: *3 = 47</thought>   \\boxed{ 48 47 }</thought>

The answer is the list of all K values, so a response with a wrong value cannot earn a reward by
luck. The last value alone is one number of 97: a wrong chain would hit it once in a hundred.

This is the task of the embedded policy (data/policy, made by data/build_policy.py). The number of
steps K is the difficulty. A chain is generated, so the first wrong thought of a rollout is known
exactly, and so is whether a localizer names it.

97 is prime, so every operation is a bijection: a wrong value stays wrong to the end of the chain,
unless a second error happens to undo the first. The box still holds the wrong values between them.

Left out: solutions in another form. A thought is right only if it reads as in `chain_thoughts`.

Try it alone:  python -m data.chains        # a problem, its true thoughts, a wrong one found
"""

import numpy as np

from data.problems import Problem
from data.verifiers import DELIMITER, last_boxed

MODULUS = 97
MAX_STEPS = 24  # step labels in the embedded policy's vocabulary


def all_operations() -> list[str]:
    """Lists the 20 operations: +2 to +9, -2 to -9, *2 to *5."""
    operations = [f"+{b}" for b in range(2, 10)]
    operations += [f"-{b}" for b in range(2, 10)]
    operations += [f"*{b}" for b in range(2, 6)]
    return operations


OPERATIONS = all_operations()


def apply(operation: str, value: int) -> int:
    """Returns the true result of one step: `apply("*3", 41) == 26` (modulo 97)."""
    b = int(operation[1:])
    if operation[0] == "+":
        return (value + b) % MODULUS
    if operation[0] == "-":
        return (value - b) % MODULUS
    return (value * b) % MODULUS


def chain_thoughts(start: int, operations: list[str]) -> list[str]:
    """Returns the K + 1 true thoughts: K steps and the boxed values, without delimiters.

    >>> chain_thoughts(41, ["+7", "*3"])
    ['1: +7 = 48', '2: *3 = 47', '\\\\boxed{ 48 47 }']
    """
    thoughts = []
    values = []
    value = start
    for number, operation in enumerate(operations, 1):
        value = apply(operation, value)
        thoughts.append(f"{number}: {operation} = {value}")
        values.append(str(value))
    thoughts.append(f"\\boxed{{ {' '.join(values)} }}")
    return thoughts


def chain_question(start: int, operations: list[str]) -> str:
    """Writes the question: `mod97 1: +7 2: *3 start 41 .`"""
    steps = [f"{number}: {operation}" for number, operation in enumerate(operations, 1)]
    return f"mod{MODULUS} {' '.join(steps)} start {start} ."


def true_response(question: str) -> str:
    """Returns the one right response to a question, as text with delimiters."""
    _, *words, _, start, _ = question.split()  # mod97 1: +7 2: *3 start 41 .
    thoughts = chain_thoughts(int(start), words[1::2])
    return "".join(f"{thought} {DELIMITER} " for thought in thoughts)


def chain_problem(index: int, start: int, operations: list[str]) -> Problem:
    """Makes one problem, with the check of its thoughts."""
    truth = chain_thoughts(start, operations)

    def check_steps(thoughts: list[str]) -> int | None:
        """Returns the 1-based index of the first thought that is not the true one, or None."""
        for h, thought in enumerate(thoughts, 1):
            if h > len(truth):
                return h
            if thought.replace(DELIMITER, "").split() != truth[h - 1].split():
                return h
        if len(thoughts) < len(truth):
            return len(thoughts)  # it ends too early: its last thought should not be the last
        return None

    return Problem(
        index=index,
        question=chain_question(start, operations),
        answer=last_boxed(truth[-1]),
        kind="integers",
        check_steps=check_steps,
    )


def generate_chains(steps: int, n: int, seed: int) -> list[Problem]:
    """Generates n problems of `steps` operations each; the random seed determines them."""
    rng = np.random.default_rng([seed, steps])
    problems = []
    for index in range(n):
        start = int(rng.integers(MODULUS))
        chosen = rng.integers(len(OPERATIONS), size=steps)
        operations = [OPERATIONS[k] for k in chosen]
        problems.append(chain_problem(index, start, operations))
    return problems


def demo() -> None:
    """Prints a problem and its true thoughts, and finds the wrong thought of a response."""
    start, operations = 41, ["+7", "*3", "-5"]
    problem = chain_problem(0, start, operations)
    print(problem.question, "->", problem.answer)
    truth = chain_thoughts(start, operations)
    wrong = [truth[0], "2: *3 = 50", "3: -5 = 45", "\\boxed{ 48 50 45 }"]
    for thoughts in (truth, wrong):
        response = f"{DELIMITER} ".join(thoughts)
        print(response)
        print(f"  reward {problem.grade(response)}, first wrong: {problem.check_steps(thoughts)}")


if __name__ == "__main__":
    demo()
