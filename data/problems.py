"""Problems and their verifiers: where a rollout's reward comes from.

A `Problem` is a question, a reference answer, and the kind of verifier that grades it. Two sources:
  - a JSON-lines file, one object a line with `question`, `answer` and `kind`, as `data/prepare.py` writes them for public sets;
  - the embedded task `chain-K`: K steps of arithmetic modulo 97, generated, with the exact truth of every step; `english-K-L`, the like
    in English, is in data/english.py.

The reward of a response is 1.0 or 0.0, from the content of its LAST `\\boxed{}`; for kind "code" it is the share of tests that its last
fenced program passes. One function per kind (GRADERS):
  integer  the same integer                        choice   the same letter                    text  the reference is contained in the box
  math     equal for the `math-verify` library     yes_no   yes or true, no or false           code  tests, in data/sandbox.py
Model-written text is never evaluated in this process: mathematics goes to a separate process that is killed at its time limit (the
library's own limit uses SIGALRM, which only works on the main thread), programs to the sandbox. A timeout or an unparsable answer is
a 0 with a name in `counters`, never a hang and never an exception.

Left out: rewards from a judge model, and partial credit outside code.

Try it alone:  python -m data.problems        # prints one problem, its true thoughts, and grades a right and a wrong answer
"""

import json
import os
import re
import threading
from collections import Counter
from concurrent.futures import TimeoutError
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Callable

import numpy as np

DELIMITER = "</thought>"
counters: Counter = Counter()  # named grading faults (no box, not an integer, timeout, ...), read and cleared by every step line


_counting = threading.Lock()


def count(fault: str) -> None:
    with _counting:  # slow verifiers run in threads
        counters[fault] += 1


class UserError(Exception):
    """Something the user can mend; the message is one line that says what was wrong and what to do."""


@dataclass
class Problem:
    """One question with its verifier.

    index: position in its data set, the problem's only key (texts may repeat); question: str; answer: reference answer, str;
    kind: a key of GRADERS, or "code"; tests: of kind "code", see `sandbox.share_passed`; check_steps: optional, list of H thought texts -> 1-based index of the first wrong one, or None
    where all are right (exact step-level truth; only `--localizer verifier` and measurements look at it)."""

    index: int
    question: str
    answer: str
    kind: str
    check_steps: Callable[[list[str]], int | None] | None = None
    tests: dict | None = None

    @property
    def slow(self) -> bool:
        """Whether grading waits for another process: then several responses are graded at once, while sampling goes on."""
        return self.kind in ("code", "math")

    def grade(self, response: str) -> float:
        """Reward of a response, in [0, 1]: 1.0 if the content of its last box is the answer, else 0.0; code: the share of tests passed."""
        if self.kind == "code":
            return grade_code(response, self.tests)
        boxed = last_boxed(response)
        if boxed is None:
            count("no_box")
            return 0.0
        return GRADERS[self.kind](boxed, self.answer)


# ---------------------------------------------------------------------------------------------------------------- verifiers


def boxed_spans(text: str) -> list[tuple[int, int]]:
    """Spans (start of content, end of content) in characters of every closed `\\boxed{...}`, outermost only, braces balanced.

    >>> text = r"so \\boxed{\\frac{1}{2}} or \\boxed{3"
    >>> [text[a:b] for a, b in boxed_spans(text)]
    ['\\\\frac{1}{2}']
    """
    closed, opened = [], []  # opened: start of each open brace's content, None for one that is no box
    for found in re.finditer(r"\\boxed\{|\\[{}]|[{}]", text):  # `\{` and `\}` are printed braces, not groups; one pass, whatever the text
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

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every call that its own limits are off
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
    _math_pool().schedule(_math_equal, args=("1", "1")).result()  # start-up (importing sympy) is not the answer's fault
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
    while len(bare) < 1000 and (found := re.fullmatch(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{(.*)\}\s*\.?", bare, re.S)):
        bare = found.group(1).strip()
    return bare.removesuffix(".").strip()


def grade_choice(boxed: str, answer: str) -> float:
    """1.0 if the box names the letter: `B`, `(b)`, `\\text{B}`, `Option B`, or `B` with its text (`B. bank`, `B: bank`, `(B) bank`)."""
    letter = r"\(?([A-Za-z])\)?"
    found = re.fullmatch(rf"(?:(?:option|choice|answer)\s*:?\s*)?{letter}(?:\s*[.:)]\s*.*)?|\(([A-Za-z])\)\s.*", unwrapped(boxed)[:500], re.S | re.I)
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
        raise UserError(f"problems of kind code cannot be graded on this machine: {fault}; use other problems, or another machine")


GRADERS = {"integer": grade_integer, "math": grade_math, "choice": grade_choice, "yes_no": grade_yes_no, "text": grade_text}
ANSWERS = {  # what an answer of each kind must look like: (pattern, what is wrong otherwise)
    "integer": (r"[+-]?\d[\d,]*", "is not an integer; use kind \"math\" for expressions"),
    "choice": (r"\(?[A-Za-z]\)?", "is not a letter"),
    "yes_no": (r"(?i:yes|no|true|false)", "is not yes, no, true or false"),
}

# ------------------------------------------------------------------------------------------------------------- the chain task

MODULUS = 97  # prime, so every operation below is a bijection: a wrong chain stays wrong unless a second error undoes the first
OPERATIONS = [f"+{b}" for b in range(2, 10)] + [f"-{b}" for b in range(2, 10)] + [f"*{b}" for b in range(2, 6)]
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
    return f"mod{MODULUS} " + " ".join(f"{i}: {op}" for i, op in enumerate(operations, 1)) + f" start {start} ."


def chain_problem(index: int, start: int, operations: list[str]) -> Problem:
    truth = chain_thoughts(start, operations)

    def check_steps(thoughts: list[str]) -> int | None:
        for i, thought in enumerate(thoughts):
            if i >= len(truth) or thought.replace(DELIMITER, "").split() != truth[i].split():
                return i + 1
        return None if len(thoughts) == len(truth) else len(thoughts)  # stopped early: its last thought should not have been last

    return Problem(index, chain_question(start, operations), last_boxed(truth[-1]), "integer", check_steps)


def generate_chains(steps: int, n: int, seed: int) -> list[Problem]:
    """n problems of `steps` operations each (the difficulty dial), a function of the seed."""
    rng = np.random.default_rng([seed, steps])
    return [
        chain_problem(i, int(rng.integers(MODULUS)), [OPERATIONS[j] for j in rng.integers(len(OPERATIONS), size=steps)])
        for i in range(n)
    ]


# ------------------------------------------------------------------------------------------------------------------- loading


GENERATED = "chain-K (K steps, for the embedded policy) or english-K-L (K to L steps in English)"  # for messages


def load_problems(source: str, seed: int, n: int = 4096) -> list[Problem]:
    """Problems from a generated task (n of them; see GENERATED) or from a JSON-lines file (all of them, keys `question`, `answer`, `kind`).

    `seed` only matters for generated problems. Raises UserError naming file and line of the first thing that is wrong."""
    if re.fullmatch(r"chain-\d+", source):
        steps = int(source.removeprefix("chain-"))
        if not 1 <= steps <= MAX_STEPS:
            raise UserError(f"{source}: the embedded policy knows chains of 1 to {MAX_STEPS} steps; ask for one of those")
        return generate_chains(steps, n, seed)
    if found := re.fullmatch(r"english-(\d+)(?:-(\d+))?", source):
        from data.english import generate_english

        return generate_english(int(found[1]), int(found[2] or found[1]), n, seed)
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{source}: no such data file; give a JSON-lines file, or a generated task (chain-12 or english-2-4, say)")
    problems = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as fault:
        raise UserError(f"{source}: not UTF-8 text ({fault.reason} at byte {fault.start}); save it as UTF-8 JSON lines")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as fault:
            raise UserError(f"{source}, line {number}: not JSON ({fault.msg}); each line must be one object")
        if not isinstance(record, dict):
            raise UserError(f"{source}, line {number}: not a JSON object; each line needs question, answer and kind")
        code = record.get("kind") == "code"
        for key in ("question", "kind") if code else ("question", "answer", "kind"):
            if not isinstance(record.get(key), (str, int) if key == "answer" else str) or record[key] == "":
                raise UserError(f"{source}, line {number}: field {key!r} is missing or empty; each line needs question, answer and kind")
        if record["kind"] not in GRADERS and not code:
            raise UserError(f"{source}, line {number}: unknown kind {record['kind']!r}; use one of {', '.join(GRADERS)}, code")
        if code and not has_tests(record.get("tests")):
            raise UserError(f"{source}, line {number}: field 'tests' of a code problem is missing or empty; see share_passed in data/sandbox.py")
        answer = str(record.get("answer", "")).strip()
        pattern, wrong = ANSWERS.get(record["kind"], (r".*", ""))
        if not re.fullmatch(pattern, answer, re.ASCII | re.S):
            raise UserError(f"{source}, line {number}: answer {answer[:40]!r} {wrong}")
        problems.append(Problem(len(problems), record["question"], answer, record["kind"], tests=record.get("tests")))
    if not problems:
        raise UserError(f"{source}: holds no problems; write one JSON object a line with question, answer and kind")
    return problems


def has_tests(tests) -> bool:
    return isinstance(tests, dict) and bool(tests.get("stdin") or tests.get("call") and (tests.get("cases") or tests.get("check")))


if __name__ == "__main__":
    problem = generate_chains(steps=4, n=1, seed=0)[0]
    print(problem.question, "->", problem.answer)
    print("reward of the right answer:", problem.grade(f"\\boxed{{ {problem.answer} }}"), "of a wrong one:", problem.grade("\\boxed{ 97 }"))
