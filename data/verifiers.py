"""Verifiers: one grader for each kind of answer."""

import os
import re
from concurrent.futures import TimeoutError
from functools import cache

from data.faults import UserError, count

DELIMITER = "</thought>"


def boxed_spans(text: str) -> list[tuple[int, int]]:
    """Spans (start of content, end of content) in characters of every closed `\\boxed{...}`, outermost only, braces balanced.

    >>> text = r"so \\boxed{\\frac{1}{2}} or \\boxed{3"
    >>> [text[a:b] for a, b in boxed_spans(text)]
    ['\\\\frac{1}{2}']
    """
    closed, opened = (
        [],
        [],
    )  # opened: start of each open brace's content, None for one that is no box
    for found in re.finditer(
        r"\\boxed\{|\\[{}]|[{}]", text
    ):  # `\{` and `\}` are printed braces, not groups; one pass, whatever the text
        if found.group() == "}" and opened:
            start = opened.pop()
            if start is not None:
                closed.append((start, found.start()))
        elif found.group() == "{":
            opened.append(None)
        elif found.group() == "\\boxed{":
            opened.append(found.end())
    spans: list[tuple[int, int]] = []
    for span in sorted(closed):
        if not spans or span[0] > spans[-1][1]:  # not inside the one before
            spans.append(span)
    return spans


def last_boxed(text: str) -> str | None:
    """Content of the last closed `\\boxed{}` of a response, stripped; None if there is none."""
    spans = boxed_spans(text)
    return text[spans[-1][0] : spans[-1][1]].strip() if spans else None


def grade_integer(boxed: str, answer: str) -> float:
    """1.0 if both are the same integer. Only an optional sign and up to 1000 ASCII digits (with thousands commas) count as one."""
    if not re.fullmatch(r"[+-]?(\d{1,1000}|\d{1,3}(,\d{3}){1,300})", boxed, re.ASCII):
        count("not_an_integer")
        return 0.0
    return float(int(boxed.replace(",", "")) == int(answer.replace(",", "")))


MATH_SECONDS = 5.0  # wall-clock limit of one math-verify comparison


def _math_equal(boxed: str, answer: str) -> float:
    """Runs in the worker process: 1.0, 0.0, or -1.0 where parse() found only text in a wrong answer. Limits are off: the caller kills us."""
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(
        logging.ERROR
    )  # it warns at every call that its own limits are off
    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    got = parse(f"\\boxed{{{boxed}}}", parsing_timeout=None)
    if verify(gold, got, timeout_seconds=None):
        return 1.0
    return 0.0 if any(not isinstance(found, str) for found in got) else -1.0


@cache
def _math_pool():
    import multiprocessing

    from pebble import ProcessPool

    return ProcessPool(max_workers=os.cpu_count(), context=multiprocessing.get_context("spawn"))


def grade_math(boxed: str, answer: str, seconds: float = MATH_SECONDS) -> float:
    """1.0 if math-verify finds the two LaTeX expressions equal. Works on any thread; the worker is killed after `seconds`."""
    from pebble import ProcessExpired

    if len(boxed) > 2000:
        count("math_too_long")
        return 0.0
    _math_pool().schedule(
        _math_equal, args=("1", "1")
    ).result()  # start-up (importing sympy) is not the answer's fault
    try:
        reward = _math_pool().schedule(_math_equal, args=(boxed, answer), timeout=seconds).result()
    except TimeoutError:
        count("math_timeout")
        return 0.0
    except (ProcessExpired, MemoryError, RecursionError):
        count("math_crash")
        return 0.0
    if reward < 0:
        count("math_unparsable")
        return 0.0
    return reward


def unwrapped(boxed: str) -> str:
    r"""Without LaTeX's text commands, dollars, and a final period: `\text{ (B) }.` -> `(B)`."""
    bare = boxed.strip().strip("$").strip()
    while len(bare) < 1000 and (
        found := re.fullmatch(
            r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{(.*)\}\s*\.?", bare, re.S
        )
    ):
        bare = found.group(1).strip()
    return bare.removesuffix(".").strip()


def grade_choice(boxed: str, answer: str) -> float:
    """1.0 if the box names the letter: `B`, `(b)`, `\\text{B}`, `Option B`, or `B` with its text (`B. bank`, `B: bank`, `(B) bank`)."""
    letter = r"\(?([A-Za-z])\)?"
    found = re.fullmatch(
        rf"(?:(?:option|choice|answer)\s*:?\s*)?{letter}(?:\s*[.:)]\s*.*)?|\(([A-Za-z])\)\s.*",
        unwrapped(boxed)[:500],
        re.S | re.I,
    )
    if not found:
        count("not_a_choice")
        return 0.0
    return float((found.group(1) or found.group(2)).upper() == answer.strip("() ").upper())


def grade_yes_no(boxed: str, answer: str) -> float:
    """1.0 if the box says the same of yes (true) and no (false)."""
    said = {"yes": True, "true": True, "no": False, "false": False}
    word = unwrapped(boxed).lower()
    if word not in said:
        count("not_yes_or_no")
        return 0.0
    return float(said[word] == said[answer.strip().lower()])


def grade_text(boxed: str, answer: str) -> float:
    """1.0 if the normalised reference is contained in the normalised box, whole words, in a box not much longer (listing answers earns none)."""
    words = lambda text: " ".join(re.findall(r"[^\W_]+|[^\w\s]", text.casefold()))  # noqa: E731
    box, reference = words(unwrapped(boxed)), words(unwrapped(answer))
    if not reference or len(box) > 2 * len(reference) + 100:
        count("text_too_long")
        return 0.0
    return float(f" {reference} " in f" {box} ")


def grade_code(response: str, tests: dict) -> float:
    """Share of tests passed by the last fenced block of a response, run in the sandbox. "correct" (--correct 1) is all of them."""
    from data.sandbox import share_passed

    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", response.replace(DELIMITER, ""), re.S)
    if not blocks:
        count("no_code")
        return 0.0
    return share_passed(blocks[-1], tests)


def sandbox_or_refusal() -> str:
    """One line on what isolates programs on this machine. Raises UserError where they cannot be run safely."""
    from data.sandbox import isolation

    try:
        return isolation()
    except OSError as fault:
        raise UserError(
            f"problems of kind code cannot be graded on this machine: {fault}; use other problems, or another machine"
        )


GRADERS = {
    "integer": grade_integer,
    "math": grade_math,
    "choice": grade_choice,
    "yes_no": grade_yes_no,
    "text": grade_text,
}


ANSWERS = {  # what an answer of each kind must look like: (pattern, what is wrong otherwise)
    "integer": (r"[+-]?\d[\d,]*", 'is not an integer; use kind "math" for expressions'),
    "choice": (r"\(?[A-Za-z]\)?", "is not a letter"),
    "yes_no": (r"(?i:yes|no|true|false)", "is not yes, no, true or false"),
}


def has_tests(tests) -> bool:
    return isinstance(tests, dict) and bool(
        tests.get("stdin") or tests.get("call") and (tests.get("cases") or tests.get("check"))
    )


# ---- shim until the rewritten verifiers land
from types import SimpleNamespace
ENDINGS = {"choice": "Put the letter of the right choice in \\boxed{}.", "yes_no": "Put the final answer, yes or no, in \\boxed{}.", "code": "End with the whole program in one ```python block."}
KINDS = {k: SimpleNamespace(ending=ENDINGS.get(k, "Put the final answer in \\boxed{}.")) for k in [*GRADERS, "code"]}
def check_machine(problems):
    return sandbox_or_refusal() if any(p.kind == "code" for p in problems) else None
