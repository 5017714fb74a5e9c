"""How lucky is a guess on a problem set? Two guesses that read no question, by kind.

    most frequent  always the answer that most problems have
    another's      the answer of another problem, drawn at random

A verifier without luck rewards neither. What luck does to resets: tests/theory.py, lesson 4.

Left out: guesses that read the question (one of its numbers, the likelier option), which hit more
often; answers that are equal but written differently count as different; kind code.

Try it alone:  python -m data.prepare csqa && python -m tests.luck problems/csqa.jsonl
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from data.faults import UserError
from data.problems import Problem, read_problems


@dataclass
class Luck:
    """Of the problems of one kind in one set."""

    problems: int
    different: int  # answers
    frequent: str  # the most frequent answer
    hits_frequent: float  # share of problems that it is right on
    hits_another: float  # chance that two problems have the same answer


def luck_of(answers: list[str]) -> Luck:
    counted = Counter(answer.lower() for answer in answers)
    n = len(answers)
    frequent, most = counted.most_common(1)[0]
    same = sum(k * (k - 1) for k in counted.values())  # ordered pairs of problems
    return Luck(n, len(counted), frequent, most / n, same / max(1, n * (n - 1)))


def kind_of(problem: Problem) -> str:
    """The kind; kind math in two parts."""
    if problem.kind != "math":
        return problem.kind
    return "math, integers" if re.fullmatch(r"-?\d+", problem.answer) else "math, others"


def luck_by_kind(problems: list[Problem]) -> dict[str, Luck]:
    answers = {}
    for problem in problems:
        if problem.kind != "code":
            answers.setdefault(kind_of(problem), []).append(problem.answer)
    return {kind: luck_of(answers[kind]) for kind in sorted(answers)}


def main(files: list[str]) -> None:
    if not files:
        raise UserError("name files that data.prepare wrote: python -m tests.luck FILE.jsonl ...")
    print("| set | kind | problems | different answers | most frequent answer | another's |")
    print("|---|---|---|---|---|---|")
    for file in files:
        for kind, luck in luck_by_kind(read_problems(file)).items():
            cells = [Path(file).stem, kind, luck.problems, luck.different]
            cells += [f"{luck.hits_frequent:.3f} (`{luck.frequent}`)", f"{luck.hits_another:.3f}"]
            print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as fault:
        print(f"luck.py: {fault}", file=sys.stderr)
        sys.exit(2)
