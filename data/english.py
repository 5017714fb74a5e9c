"""Arithmetic in English with the exact truth of every step: `english-K`, or `english-K-L` for K to L operations.

    Ana has 14 apples. Ana buys 9 more. Then Ana gives away 5. How many apples does Ana have now?

    Ana buys 9 more: 14 + 9 = 23 apples.</thought>
    Ana gives away 5: 23 - 5 = 18 apples.</thought>
    The answer is \\boxed{18}.</thought>

Half of the problems are stories like this one, half are bare sums. They are for policies that read English: `data/warm_start.py` makes one.

A thought is right if what it says is the next of the true values (14, 23, 18), or the equation of another one from there on (it may say one
again, or take two steps); a later value that it hits by a wrong equation (14 + 4 = 18) is wrong, as is another answer in the box. So every
response that ends wrong has a first wrong thought. Left out: true equations off that path (5 + 9 = 14, say), which count as wrong.

Try it alone:  python -m data.english        # one problem of each form, with its thoughts, and a review of a wrong solution
"""

import re
from dataclasses import dataclass

import numpy as np

from data.faults import UserError
from data.problems import Problem
from data.verifiers import DELIMITER, last_boxed

MAX_OPERATIONS = 12
NAMES = (
    "Ana",
    "Ben",
    "Chen",
    "Dara",
    "Eli",
    "Femi",
    "Gita",
    "Hugo",
    "Ines",
    "Jun",
    "Kofi",
    "Lena",
    "Mira",
    "Nils",
    "Omar",
    "Pia",
)
THINGS = (
    "apples",
    "books",
    "cards",
    "coins",
    "marbles",
    "pencils",
    "stamps",
    "stickers",
    "shells",
    "balloons",
)
EVENTS = {  # what happens to a number of things, {b} of them
    "+": ("buys {b} more", "finds {b} more", "gets {b} more from a friend", "picks up {b} more"),
    "-": ("gives away {b}", "loses {b}", "sells {b}", "puts {b} aside"),
    "*": ("makes it {b} times as many", "multiplies them by {b} in a trade"),
    "/": (
        "shares them equally among {b} people and keeps one share",
        "splits them into {b} equal piles and keeps one pile",
    ),
}
ORDERS = {"+": "Add {b}.", "-": "Subtract {b}.", "*": "Multiply by {b}.", "/": "Divide by {b}."}


@dataclass
class English:
    """One problem: a start, K operations (operator, operand), and how it is told.

    name, thing: of a story, "" for a bare sum; events: what is done in each operation, in words."""

    start: int
    operations: list[tuple[str, int]]
    events: list[str]
    name: str = ""
    thing: str = ""

    @property
    def values(self) -> list[int]:
        """The path of true values, K + 1 of them: the start, and what is there after each operation."""
        path = [self.start]
        for operator, b in self.operations:
            path.append(
                {"+": path[-1] + b, "-": path[-1] - b, "*": path[-1] * b, "/": path[-1] // b}[
                    operator
                ]
            )
        return path

    @property
    def equations(self) -> list[str]:
        """`14 + 9 = 23` for each operation."""
        return [
            f"{a} {operator} {b} = {c}"
            for a, (operator, b), c in zip(self.values, self.operations, self.values[1:])
        ]

    @property
    def question(self) -> str:
        if not self.name:
            return f"Start with {self.start}. {' '.join(self.events)} What is the result?"
        told = [
            f"{'Then ' if k else ''}{self.name} {event}." for k, event in enumerate(self.events)
        ]
        return f"{self.name} has {self.start} {self.thing}. {' '.join(told)} How many {self.thing} does {self.name} have now?"

    def solution(self) -> list[str]:
        """The K + 1 right thoughts, the last with the box, without delimiters."""
        if self.name:
            told = [
                f"{self.name} {event}: {equation} {self.thing}."
                for event, equation in zip(self.events, self.equations)
            ]
        else:
            told = [
                f"{event.removesuffix('.')}: {equation}."
                for event, equation in zip(self.events, self.equations)
            ]
        return told + [f"The answer is \\boxed{{{self.values[-1]}}}."]

    def judge(self, thoughts: list[str]) -> list[tuple[str, str, bool]]:
        """(what a thought should say, what it says, whether that is right) of each of H thoughts up to the first wrong one."""
        path, at, judged = [str(value) for value in self.values], 0, []
        for h, thought in enumerate(thoughts, 1):
            should, says, right, boxed = "no number is needed", "none", True, last_boxed(thought)
            for equation, says in said(thought):
                places = [
                    k
                    for k in range(at, len(path))
                    if path[k] == says and (k == at + 1 or equation in ("", *self.sides(k)))
                ]
                right = bool(places)
                at = places[0] if right else min(at + 1, len(path) - 1)
                should = self.equations[max(at, 1) - 1]
                if not right:
                    break
            if right and (boxed or h == len(thoughts)):  # an answer, or the end without one
                should, says, right = (
                    f"the answer is {path[-1]}",
                    boxed or "nothing",
                    boxed == path[-1],
                )
            judged.append((should, says, right))
            if not right:
                break
        return judged

    def sides(self, k: int) -> list[str]:
        """What may stand before the `=` of true value k, as `said` writes it: 14+9, 9+14."""
        if k == 0:
            return []
        a, (operator, b) = self.values[k - 1], self.operations[k - 1]
        return [f"{a}{operator}{b}"] + [f"{b}{operator}{a}"] * (operator in "+*")

    def check_steps(self, thoughts: list[str]) -> int | None:
        """1-based index of the first wrong thought; None where all are right and the last one boxes the answer."""
        judged = self.judge(thoughts)
        return None if judged[-1][2] else len(judged)

    def review(self, thoughts: list[str]) -> str:
        """A review of thoughts with an error, as `localize.parse_localization` reads it: each thought up to the first wrong one, and its number."""
        lines = [
            f"[Thought {h}] {should}, it says {says}: {'right' if right else 'wrong'}."
            for h, (should, says, right) in enumerate(self.judge(thoughts), 1)
        ]
        return "\n".join(lines) + f"\n\\boxed{{{len(lines)}}}"

    def problem(self, index: int) -> Problem:
        return Problem(index, self.question, str(self.values[-1]), "integer", self.check_steps)


def said(thought: str) -> list[tuple[str, str]]:
    """(a plain `a + b` that stands before it or "", the number) for each number that a thought says something is equal to.

    >>> said("so 14 + 9 = 23. Then 23 - 5 - 1 = $1,018.50.")
    [('14+9', '23'), ('', '1018.50')]
    """
    found = re.findall(
        r"(?:([-+*/]\s*)?(\d+)\s*([-+*/])\s*(\d+)\s*)?=\s*\\?\$?\s*(-?\d+(?:,\d{3})*(?:\.\d+)?)",
        thought.replace(DELIMITER, ""),
    )
    return [
        ("" if longer else a + operator + b, number.replace(",", ""))
        for longer, a, operator, b, number in found
    ]


def draw(rng: np.random.Generator, low: int, high: int) -> English:
    """One problem of `low` to `high` operations; its values stay between 1 and 99."""
    operations = int(rng.integers(low, high + 1))
    start = value = int(rng.integers(3, 31))
    chosen = []
    while len(chosen) < operations:
        operator = "++--*/"[rng.integers(6)]
        b = int(rng.integers(2, 16) if operator in "+-" else rng.integers(2, 5))
        after = {"+": value + b, "-": value - b, "*": value * b, "/": value // b}[operator]
        if 1 <= after <= 99 and (operator != "/" or value % b == 0):
            chosen.append((operator, b))
            value = after
    told = ORDERS if rng.random() < 0.5 else EVENTS
    pick = lambda forms: forms if isinstance(forms, str) else forms[rng.integers(len(forms))]  # noqa: E731
    events = [pick(told[operator]).format(b=b) for operator, b in chosen]
    who = (
        {}
        if told is ORDERS
        else {"name": NAMES[rng.integers(len(NAMES))], "thing": THINGS[rng.integers(len(THINGS))]}
    )
    return English(start, chosen, events, **who)


def generate_english(low: int, high: int, n: int, seed: int) -> list[Problem]:
    """n problems of `low` to `high` operations, a function of the seed. Raises UserError for numbers of operations that it does not have."""
    if not 1 <= low <= high <= MAX_OPERATIONS:
        raise UserError(
            f"english-{low}-{high}: problems have 1 to {MAX_OPERATIONS} operations, the smaller number first; ask for english-2-4, say"
        )
    rng = np.random.default_rng([seed, low, high])
    return [draw(rng, low, high).problem(i) for i in range(n)]


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    for english in (draw(rng, 3, 3) for _ in range(4)):
        thoughts = english.solution()
        wrong = [
            thoughts[0],
            re.sub(r"= (\d+)", lambda found: f"= {int(found[1]) + 1}", thoughts[1]),
            *thoughts[2:],
        ]
        print(english.question, *thoughts, "", *wrong, "", english.review(wrong), "", sep="\n")
