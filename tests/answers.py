r"""Answers whose verdict is known: a table written by hand, and wrong answers made from real ones.

The table: tests/pairs/author.jsonl is by the author of the graders; tests/pairs/blind.jsonl, more
than half of it all, is by somebody who had not seen them. Both were written before the graders were
changed to fit. One pair a line:

    {"kind": "math", "class": "period", "reference": "5", "boxed": "5.", "right": true, "why": ...}

The wrong answers: `wrong_answers` changes the references of public sets in ten ways, each of which
makes them wrong, such as the number plus 1 or an interval with its other bracket.

Left out: wrong answers of other kinds than math; their graders compare words and integers.

Try it alone:  SRPO_DATA=folder python -m tests.answers   # grades all, prints what is decided wrong
"""

import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data import prepare
from data.faults import counters
from data.problems import Problem

PAIRS = Path(__file__).parent / "pairs"
SOURCES = ("author", "blind")
DATA = Path(os.environ.get("SRPO_DATA", "nowhere"))
FILES = {  # set -> its file in the folder of copies, for the references of kind math
    "math500": "math/test.jsonl",  # the layout of MATH-500, here all of MATH's test set
    "olympiadbench": "math_evals/olympiadbench.jsonl",
    "aime24": "math_evals/aime24.jsonl",
    "theoremqa": "theoremqa/theoremqa_test.json",
    "gsm8k": "gsm8k/test.jsonl",
}
PER_WAY = 1200  # wrong answers of one way, at most


@dataclass(frozen=True)
class Pair:
    """A reference, what stands in a response's box, and whether that is right."""

    kind: str
    group: str
    reference: str
    boxed: str
    right: bool
    why: str

    def is_accepted(self) -> bool:
        problem = Problem(0, "?", self.reference, self.kind)
        return problem.grade(f"so it is \\boxed{{{self.boxed}}}") == 1.0


def read_table(source: str) -> list[Pair]:
    """Reads the pairs of one source: author or blind."""
    pairs = []
    for line in (PAIRS / f"{source}.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        pairs.append(Pair(group=record.pop("class"), **record))
    return pairs


# --------------------------------------------------------- wrong answers, from right ones
#
# Each way takes an answer, and returns a wrong one, or None where it does not apply.

NUMBER = r"-?\d+(?:\.\d+)?"


def plus_one(answer: str) -> str | None:
    """72 -> 73, 2.5 -> 3.5; in an expression the last integer, as in \\sqrt{2} -> \\sqrt{3}."""
    if re.fullmatch(NUMBER, answer):
        whole, point, part = answer.partition(".")
        return f"{int(whole) + 1}{point}{part}" if int(whole) >= 0 and whole != "-0" else None
    found = list(re.finditer(r"(?<![\d.,])\d{1,6}(?![\d.,])", answer))
    if not found or "text" in answer or re.search(r"e[+-]\d", answer):
        return None
    last = found[-1]
    return f"{answer[: last.start()]}{int(last.group()) + 1}{answer[last.end() :]}"


def sign(answer: str) -> str | None:
    """72 -> -72, -\\frac{1}{2} -> \\frac{1}{2}."""
    if not re.fullmatch(rf"{NUMBER}|-?\\d?frac\{{\d+\}}\{{\d+\}}|-?\d*\\sqrt\{{\d+\}}", answer):
        return None
    if not re.search("[1-9]", answer):
        return None
    return answer[1:] if answer.startswith("-") else f"-{answer}"


def times_ten(answer: str) -> str | None:
    """72 -> 720, 2.5 -> 25."""
    if not re.fullmatch(NUMBER, answer) or not re.search("[1-9]", answer):
        return None
    whole, _, part = answer.partition(".")
    if not part:
        return f"{whole}0"
    return f"{whole}{part[:1]}.{part[1:] or '0'}"


def plain(answer: str) -> str:
    """Returns an answer without LaTeX's sizes of brackets."""
    return re.sub(r"\\left(?![a-z])|\\right(?![a-z])", "", answer).strip()


def items(answer: str) -> list[str] | None:
    """Returns the items of `(1, 2)`, `[1, 2)` or `1, 2`; None if it is no such list."""
    inside = plain(answer)
    if inside[:1] in "([" and inside[-1:] in ")]":
        inside = inside[1:-1]
    if re.search(r"[()\[\]]|text|matrix|cup|\\\{|\\!|\d,\d{3}|\{,\}", inside) or "," not in inside:
        return None
    return [item.strip() for item in inside.split(",")]


def is_interval(answer: str) -> bool:
    inside = plain(answer)
    parts = items(answer)
    closed = inside[:1] == "[" or inside[-1:] == "]" or "infty" in inside
    bracketed = inside[:1] in ("(", "[") and inside[-1:] in (")", "]")
    return parts is not None and len(parts) == 2 and bracketed and closed


def permuted(answer: str) -> str | None:
    """(3, -2) -> (-2, 3)."""
    parts = items(answer)
    if (
        parts is None
        or plain(answer)[:1] != "("
        or is_interval(answer)
        or len(set(parts)) < len(parts)
    ):
        return None
    return f"({', '.join(parts[1:] + parts[:1])})"


def reversed_interval(answer: str) -> str | None:
    """[1, 2) -> [2, 1)."""
    parts = items(answer)
    if not is_interval(answer) or parts[0] == parts[1]:
        return None
    inside = plain(answer)
    return f"{inside[0]}{parts[1]}, {parts[0]}{inside[-1]}"


def bracket(answer: str) -> str | None:
    """[1, 2) -> (1, 2); the first end that is not infinite."""
    if not is_interval(answer):
        return None
    inside = plain(answer)
    other = {"[": "(", "(": "[", "]": ")", ")": "]"}
    first, last = items(answer)
    if "infty" not in first:
        return other[inside[0]] + inside[1:]
    if "infty" not in last:
        return inside[:-1] + other[inside[-1]]
    return None


def as_inequality(answer: str) -> str:
    """(1, 4] -> 1 < x \\le 4, and [3, \\infty) -> x \\ge 3; other answers stay."""
    if not is_interval(answer):
        return answer
    low, high = items(answer)
    from_low = "<" if plain(answer)[0] == "(" else r"\le"
    to_high = "<" if plain(answer)[-1] == ")" else r"\le"
    if "infty" in high:
        return f"x {from_low.replace('<', '>').replace('le', 'ge')} {low}"
    return f"x {to_high} {high}" if "infty" in low else f"{low} {from_low} x {to_high} {high}"


RELATION = r"[<>]|\\[lg]eq?(?![a-z])"


def inequality(answer: str) -> str | None:
    """x < 3 -> x > 3, in every place; of an interval, its inequality."""
    other = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\leq": r"\geq", r"\geq": r"\leq"}
    right = as_inequality(answer)
    changed = re.sub(RELATION, lambda sign: other[sign.group()], right)
    return changed if changed != right and "text" not in right else None


def strictness(answer: str) -> str | None:
    """x < 3 -> x \\le 3; the first relation; of an interval, its inequality."""
    other = {"<": r"\le ", ">": r"\ge ", "l": "<", "g": ">"}
    right = as_inequality(answer)
    found = re.search(RELATION, right)
    if not found or "text" in right:
        return None
    return right[: found.start()] + other[found.group().strip("\\")[0]] + right[found.end() :]


def item_dropped(answer: str) -> str | None:
    """1, 2, 3 -> 1, 2."""
    parts = items(answer)
    if parts is None or is_interval(answer) or parts[-1] in parts[:-1]:
        return None
    fewer = ", ".join(parts[:-1])
    return f"({fewer})" if plain(answer)[:1] == "(" else fewer


WAYS = {
    "plus one": plus_one,
    "sign": sign,
    "times ten": times_ten,
    "permuted tuple": permuted,
    "reversed interval": reversed_interval,
    "bracket": bracket,
    "inequality": inequality,
    "strictness": strictness,
    "item dropped": item_dropped,
}


def references() -> list[str]:
    """Returns the references of kind math of all files, each once."""
    answers = []
    for name, file in FILES.items():
        for record in prepare.convert_records(name, prepare.read_local(DATA / file)):
            if record["kind"] == "math":
                answers.append(record["answer"])
    return list(dict.fromkeys(answers))


def wrong_answers() -> Iterator[Pair]:
    """Yields wrong answers made from the references, of each way at most PER_WAY, seeded."""
    answers = references()
    rng = random.Random(0)
    for way, change in WAYS.items():
        pairs = []
        for answer in answers:
            wrong = change(answer)
            if wrong is not None and wrong != answer:
                pairs.append(Pair("math", way, answer, wrong, False, way))
        rng.shuffle(pairs)
        yield from pairs[:PER_WAY]
    for answer in rng.sample(answers, 2 * PER_WAY):
        other = rng.choice(answers)
        if bare(other) != bare(answer):
            yield Pair("math", "another answer", answer, other, False, "another problem's answer")


def bare(answer: str) -> str:
    """Returns an answer without a name before it, its unit, or the form of a number."""
    value = answer.rpartition("=")[2].replace("dfrac", "frac")
    value = re.sub(r"\\text.*|\\%|%|\\\$|\\!|\^\\circ|[{}\s]", "", value)
    return f"{float(value)}" if re.fullmatch(NUMBER, value) else value


# -------------------------------------------------------------------------------- the command


def decided_otherwise(pairs: list[Pair]) -> list[Pair]:
    return [pair for pair in pairs if pair.is_accepted() != pair.right]


def report(title: str, pairs: list[Pair]) -> None:
    """Grades pairs, prints those that are decided otherwise than written, and the counts."""
    start = time.perf_counter()
    counters.clear()
    failed = decided_otherwise(pairs)
    for pair in failed:
        verdict = "refused" if pair.right else "accepted"
        print(f"  {verdict}: {pair.kind}, {pair.reference!r} against {pair.boxed!r} ({pair.why})")
    of_group = Counter(pair.group for pair in pairs)
    failed_of_group = Counter(pair.group for pair in failed)
    counts = [f"{name} {failed_of_group[name]} of {n}" for name, n in of_group.items()]
    seconds = time.perf_counter() - start
    print(f"{title}: {len(failed)} of {len(pairs)} ({len(failed) / len(pairs):.2%}) decided wrong")
    print(f"  {', '.join(counts)}; {seconds:.0f} s; counted: {dict(counters)}")


def main() -> None:
    for source in SOURCES:
        report(f"table, {source}", read_table(source))
    if DATA.is_dir():
        report("wrong answers from real ones", list(wrong_answers()))
    else:
        print("no wrong answers from real ones: SRPO_DATA names no folder")


if __name__ == "__main__":
    sys.exit(main())
