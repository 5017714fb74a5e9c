"""Arithmetic in English, with the exact truth of every step: tasks `english-K` and `english-K-L`.

    Ana has 14 apples. Ana buys 9 more. Then Ana gives away 5. How many apples does Ana have now?

    Ana buys 9 more: 14 + 9 = 23 apples.</thought>
    Ana gives away 5: 23 - 5 = 18 apples.</thought>
    The answer is \\boxed{18}.</thought>

A problem has K to L operations. Half of the problems are stories like this one, half are bare
sums. They are for policies that read English; data/warm_start.py makes one.

How thoughts are judged. A problem has a path of true values: here 14, 23, 18. The checker follows
the thoughts along this path and keeps the place that they have reached, at first the start. Each
number that a thought states after an `=` must be one of these:
  - the next true value, however it is computed;
  - the current value again, or one further along the path (two steps in one thought), if its
    equation is the true one of that value, or if no plain `a + b` stands before the `=`.
Anything else is wrong. So is 14 + 4 = 18: it hits a later true value by a wrong equation. A boxed
answer must be the last true value, and the last thought must box one. Hence every response with a
wrong answer has a first wrong thought.

Left out: true equations off the path, such as 5 + 9 = 14. They count as wrong. Numbers that do not
stand behind a "=", such as "14 plus 9 is 24", are not read.

Try it alone:  python -m data.english        # problems with solutions, and reviews of wrong ones
"""

import re
from dataclasses import dataclass

import numpy as np

from data.faults import UserError
from data.problems import Problem
from data.verifiers import DELIMITER, last_boxed, tidied

MAX_OPERATIONS = 12
LARGEST = 99  # true values are 1 to 99
NAMES = "Ana Ben Chen Dara Eli Femi Gita Hugo Ines Jun Kofi Lena Mira Nils Omar Pia".split()
THINGS = "apples books cards coins marbles pencils stamps stickers shells balloons".split()
EVENTS = {  # what happens in a story to a number of things; b is the operand
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
class Judgement:
    """What the checker finds in one thought."""

    should: str
    """what the thought should say"""

    says: str
    """what it says"""

    right: bool


@dataclass
class English:
    """One problem: a start, K operations, and how they are told."""

    start: int

    operations: list[tuple[str, int]]
    """(operator, operand) of each operation"""

    events: list[str]
    """each operation in words"""

    name: str = ""
    """of the person in a story; "" for a bare sum"""

    thing: str = ""
    """what a story counts; "" for a bare sum"""

    @property
    def values(self) -> list[int]:
        """The path of K + 1 true values: the start, and the result of each operation."""
        path = [self.start]
        for operator, b in self.operations:
            path.append(result(path[-1], operator, b))
        return path

    @property
    def equations(self) -> list[str]:
        """The K true equations, such as `14 + 9 = 23`."""
        values = self.values
        equations = []
        for k, (operator, b) in enumerate(self.operations):
            equations.append(f"{values[k]} {operator} {b} = {values[k + 1]}")
        return equations

    @property
    def question(self) -> str:
        if not self.name:
            return f"Start with {self.start}. {' '.join(self.events)} What is the result?"
        sentences = [f"{self.name} has {self.start} {self.thing}."]
        for k, event in enumerate(self.events):
            then = "Then " if k > 0 else ""
            sentences.append(f"{then}{self.name} {event}.")
        sentences.append(f"How many {self.thing} does {self.name} have now?")
        return " ".join(sentences)

    def solution(self) -> list[str]:
        """Returns the K + 1 true thoughts, the last one with the box, without delimiters."""
        thoughts = []
        for event, equation in zip(self.events, self.equations):
            if self.name:
                thoughts.append(f"{self.name} {event}: {equation} {self.thing}.")
            else:
                thoughts.append(f"{event.removesuffix('.')}: {equation}.")
        thoughts.append(f"The answer is \\boxed{{{self.values[-1]}}}.")
        return thoughts

    def problem(self, index: int) -> Problem:
        return Problem(
            index=index,
            question=self.question,
            answer=str(self.values[-1]),
            kind="integer",
            check_steps=self.check_steps,
        )

    def check_steps(self, thoughts: list[str]) -> int | None:
        """Returns the 1-based index of the first wrong thought of H >= 1, or None.

        None means that all thoughts are right and the last one boxes the answer.
        """
        judged = self.judge(thoughts)
        if judged[-1].right:
            return None
        return len(judged)

    def review(self, thoughts: list[str]) -> str:
        """Writes the true review of thoughts with an error, for training a localizer.

        It goes through the thoughts up to the first wrong one, h*, and ends with `\\boxed{h*}`:
        the form that `localize.parse_localization` reads.
        """
        lines = []
        for h, judged in enumerate(self.judge(thoughts), 1):
            verdict = "right" if judged.right else "wrong"
            lines.append(f"[Thought {h}] {judged.should}, it says {judged.says}: {verdict}.")
        lines.append(f"\\boxed{{{len(lines)}}}")
        return "\n".join(lines)

    def judge(self, thoughts: list[str]) -> list[Judgement]:
        """Judges the thoughts in order, up to and with the first wrong one."""
        answer = str(self.values[-1])
        place = 0  # in the path of true values
        judgements = []
        for h, thought in enumerate(thoughts, 1):
            judged, place = self.judge_equations(thought, place)
            boxed = last_boxed(thought)
            if judged.right and (boxed or h == len(thoughts)):
                judged = Judgement(
                    f"the answer is {answer}", boxed or "nothing", tidied(boxed or "") == answer
                )
            judgements.append(judged)
            if not judged.right:
                break
        return judgements

    def judge_equations(self, thought: str, place: int) -> tuple[Judgement, int]:
        """Judges the numbers that a thought states; returns the new place in the path too."""
        judged = Judgement("no number is needed", "none", right=True)
        for equation, number in said(thought):
            reached = self.place_of(equation, number, place)
            if reached is None:
                due = min(place + 1, len(self.operations))
                return Judgement(self.equations[due - 1], number, right=False), place
            place = reached
            # The start has no equation of its own; the first one names it.
            judged = Judgement(self.equations[max(place, 1) - 1], number, right=True)
        return judged, place

    def place_of(self, equation: str, number: str, place: int) -> int | None:
        """Finds the place in the path, from the current one on, that a stated number reaches."""
        values = self.values
        for k in range(place, len(values)):
            is_next = k == place + 1
            is_true = equation == "" or equation in self.left_sides(k)
            if number == str(values[k]) and (is_next or is_true):
                return k
        return None

    def left_sides(self, k: int) -> list[str]:
        """Lists what may stand before the `=` of true value k: `14+9` and `9+14`, say."""
        if k == 0:
            return []
        a = self.values[k - 1]
        operator, b = self.operations[k - 1]
        sides = [f"{a}{operator}{b}"]
        if operator in "+*":
            sides.append(f"{b}{operator}{a}")
        return sides


def result(a: int, operator: str, b: int) -> int:
    """Returns the true result of one operation; `/` is exact in every problem."""
    if operator == "+":
        return a + b
    if operator == "-":
        return a - b
    if operator == "*":
        return a * b
    return a // b


STATED = re.compile(
    r"(?:([-+*/]\s*)?(\d+)\s*([-+*/])\s*(\d+)\s*)?"  # a + b; an operator before it: a longer sum
    r"="
    r"\s*\\?\$?\s*(-?\d+(?:,\d{3})*(?:\.\d+)?)"  # the number, perhaps in dollars
)


def said(thought: str) -> list[tuple[str, str]]:
    """Finds each number that a thought states after an `=`: (left side, number).

    The left side is a plain `a + b` without blanks, or "" where something else stands there.

    >>> said("so 14 + 9 = 23. Then 23 - 5 - 1 = $1,018.50.")
    [('14+9', '23'), ('', '1018.50')]
    """
    stated = []
    for longer, a, operator, b, number in STATED.findall(thought.replace(DELIMITER, "")):
        left = "" if longer else a + operator + b
        stated.append((left, number.replace(",", "")))
    return stated


def draw(rng: np.random.Generator, low: int, high: int) -> English:
    """Draws one problem of `low` to `high` operations; its values stay between 1 and 99."""
    n_operations = int(rng.integers(low, high + 1))
    start = int(rng.integers(3, 31))
    operations = []
    value = start
    while len(operations) < n_operations:
        operator = "++--*/"[rng.integers(6)]
        if operator in "+-":
            b = int(rng.integers(2, 16))
        else:
            b = int(rng.integers(2, 5))
        if operator == "/" and value % b != 0:
            continue
        after = result(value, operator, b)
        if 1 <= after <= LARGEST:
            operations.append((operator, b))
            value = after
    if rng.random() < 0.5:
        events = [ORDERS[operator].format(b=b) for operator, b in operations]
        return English(start, operations, events)
    events = []
    for operator, b in operations:
        forms = EVENTS[operator]
        events.append(forms[rng.integers(len(forms))].format(b=b))
    name = NAMES[rng.integers(len(NAMES))]
    thing = THINGS[rng.integers(len(THINGS))]
    return English(start, operations, events, name, thing)


def generate_english(low: int, high: int, n: int, seed: int) -> list[Problem]:
    """Generates n problems of `low` to `high` operations; the random seed determines them.

    Raises UserError for numbers of operations that the task does not have.
    """
    if not 1 <= low <= high <= MAX_OPERATIONS:
        raise UserError(
            f"english-{low}-{high}: problems have 1 to {MAX_OPERATIONS} operations, "
            "the smaller number first; ask for english-2-4, say"
        )
    rng = np.random.default_rng([seed, low, high])
    return [draw(rng, low, high).problem(index) for index in range(n)]


def demo() -> None:
    """Prints four problems, each with its solution and the review of a wrong one."""
    rng = np.random.default_rng(0)
    for _ in range(4):
        english = draw(rng, 3, 3)
        thoughts = english.solution()
        wrong = list(thoughts)
        wrong[1] = wrong[1].replace("= ", "= 1")  # a digit too many in the second result
        print(english.question, *thoughts, "", *wrong, "", english.review(wrong), "\n", sep="\n")


if __name__ == "__main__":
    demo()
