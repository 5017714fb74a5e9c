r"""Verifiers: how each kind of problem is asked for, graded and checked.

The reward of a response comes from the content of its LAST `\boxed{}`, compared with the reference
answer; kind "code" has no box but a fenced program, which is run against tests. Rewards are 1.0 or
0.0; only code gives a share in between. `KINDS` holds everything that depends on the kind:

    integer   the same integer                      yes_no  yes or true, no or false
    integers  the same integers, in the same order  text    the same words
    math      equal for the `math-verify` library   code    the share of tests passed
    choice    the same letter

A new kind is one grading function and one entry of KINDS; no other file changes.

This process never evaluates text that a model wrote. Mathematics goes to a worker process that ends
at its time limit (data/mathematics.py, with what it cannot decide), programs go to the sandbox
(data/sandbox.py). A timeout or an answer that cannot be read is a reward of 0 with a name in
`faults.counters`, never a hang or an exception.

Limits: an answer that begins with the article A is choice A. Beside a long reference of kind text,
a box that denies it earns the reward (`not`, and the reference).

Left out: rewards from a judge model (not reproducible), and partial credit outside code.

Try it alone:  python -m data.verifiers        # grades good and bad answers of every kind
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from textwrap import dedent

from data import mathematics
from data.faults import UserError, count, counters
from data.sandbox import fault_of_tests, isolation, share_passed

DELIMITER = "</thought>"  # ends every thought of a response


# ------------------------------------------------------------------------- finding the answer


def boxed_spans(text: str) -> list[tuple[int, int]]:
    """Finds the content of every closed `\\boxed{...}`: (start, end) in characters.

    A box inside a box is part of the outer one. Braces balance; `\\{` and `\\}` are printed braces
    and do not count. One pass: the time grows with the length of the text, whatever it holds.

    >>> text = r"so \\boxed{\\frac{1}{2}} or \\boxed{3"
    >>> [text[start:end] for start, end in boxed_spans(text)]
    ['\\\\frac{1}{2}']
    """
    closed = []
    opened: list[int | None] = []  # of each open brace: start of its box's content, None: no box
    for brace in re.finditer(r"\\boxed\{|\\[{}]|[{}]", text):
        if brace.group() == "\\boxed{":
            opened.append(brace.end())
        elif brace.group() == "{":
            opened.append(None)
        elif brace.group() == "}" and opened:
            start = opened.pop()
            if start is not None:
                closed.append((start, brace.start()))
    outermost: list[tuple[int, int]] = []
    for start, end in sorted(closed):
        if not outermost or start > outermost[-1][1]:
            outermost.append((start, end))
    return outermost


def last_boxed(response: str) -> str | None:
    """Returns the stripped content of a response's last closed `\\boxed{}`, or None."""
    spans = boxed_spans(response)
    if not spans:
        return None
    start, end = spans[-1]
    return response[start:end].strip()


PYTHON = ("python", "python3", "py")


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """Returns the closed ``` blocks of a text, in order: the tag of each, and what stands in it.

    A block begins behind a ``` that at most a tag follows on its line. It ends with the next ``` at
    the beginning or at the end of a line. If `python` follows that one, the next block begins.
    """
    blocks = []
    tag, body = None, []  # of the open block; None: there is none
    for line in text.split("\n"):
        if tag is None:
            _, fence, after = line.partition("```")
            if fence and "`" not in after:
                tag, body = after.strip().lower(), []
        elif line.strip().startswith("```"):
            blocks.append((tag, "\n".join(body)))
            after = line.strip().removeprefix("```").strip().lower()
            tag, body = (after, []) if after in PYTHON else (None, [])
        elif line.rstrip().endswith("```"):
            body.append(line.rstrip().removesuffix("```"))
            blocks.append((tag, "\n".join(body)))
            tag = None
        else:
            body.append(line)
    return blocks


def last_program(response: str) -> str | None:
    """Returns the last closed ``` block of a response that is tagged as Python, or None.

    If no block is, the last one without a tag counts. Delimiters are removed first, and by
    `textwrap.dedent` the indentation that all its lines share.
    """
    tagged = untagged = None
    for tag, body in fenced_blocks(response.replace(DELIMITER, "")):
        if tag in PYTHON:
            tagged = body
        elif not tag:
            untagged = body
    found = untagged if tagged is None else tagged
    return None if found is None else dedent(found)


def has_box(response: str) -> bool:
    return last_boxed(response) is not None


def has_fence(response: str) -> bool:
    return "```" in response


# ------------------------------------------------------- grading: (what was found, the reference)

INTEGER = r"[+-]?(\d{1,1000}|\d{1,3}(,\d{3}){1,300})"


def grade_integer(boxed: str, answer: str) -> float:
    """Returns 1.0 if both are the same integer.

    A sign and up to 1000 ASCII digits count as an integer, or up to 903 with thousands commas.
    """
    found = tidied(boxed)
    if not re.fullmatch(INTEGER, found, re.ASCII):
        count("not_an_integer")
        return 0.0
    return float(int(found.replace(",", "")) == int(answer.replace(",", "")))


def grade_integers(boxed: str, answer: str) -> float:
    """Returns 1.0 if both list the same integers in the same order.

    Blanks or commas stand between them, so `1,000` is the list of 1 and 0; brackets may stand
    around them. Each has a sign or none and up to 1000 ASCII digits.
    """
    # A thin space is a blank here, and a comma never stands between thousands.
    apart = boxed.replace("\\,", " ").replace("{,}", ",")
    bare = re.sub(r"^\\?[(\[{](.*?)\\?[)\]}]$", r"\1", tidied(apart))
    found = bare.replace(",", " ").split()
    if not found or not all(re.fullmatch(r"[+-]?\d{1,1000}", item, re.ASCII) for item in found):
        count("not_integers")
        return 0.0
    wanted = answer.replace(",", " ").split()
    return float([int(item) for item in found] == [int(item) for item in wanted])


LONGEST_BOX = 2000  # characters; longer ones are not compared as numbers or mathematics


def tidied(boxed: str) -> str:
    """Returns the box as `mathematics.tidy` writes it; "" if it is too long."""
    return mathematics.tidy(boxed) if len(boxed) <= LONGEST_BOX else ""


def grade_math(boxed: str, answer: str, seconds: float = mathematics.SECONDS) -> float:
    """Returns 1.0 if the two LaTeX expressions are equal, as data/mathematics.py decides.

    Works on any thread: a worker process compares, and ends after `seconds` of CPU time.
    """
    if len(boxed) > LONGEST_BOX:
        count("math_too_long")
        return 0.0
    verdict = mathematics.ask_worker(boxed, answer, seconds)
    if verdict in ("unparsable", "timeout", "crash"):
        count(f"math_{verdict}")
    return float(verdict == "equal")


def grade_choice(boxed: str, answer: str) -> float:
    r"""Returns 1.0 if the box names the letter of the right choice, alone or with its text.

    Read as B: `B`, `(b)`, `\text{B}`, `Option B`, and B with its text (`B. bank`, `B bank`,
    `\textbf{(B)}\ 5`). Not read: `A, B`, `A or B`, `(A) (B) (C)`, `A. 5, B. 6`.
    """
    letter, rest = letter_of(unwrapped(boxed)[:500])
    if not letter or names_letters(rest, like=letter):
        count("not_a_choice")
        return 0.0
    return float(letter.upper() == answer.strip("() ").upper())


ANNOUNCED = r"(?:(?i:option|choice|answer)\s*:?\s*)?"
LETTERS = (
    r"\(([A-Za-z])\)",  # (b)
    r"([A-Za-z])(?=\s*[.:),-]|$)",  # b, or b) bank
    r"([A-Z])(?=\s)",  # B bank
)


def letter_of(text: str) -> tuple[str, str]:
    """Returns the letter with which a text begins, or "", and what follows it."""
    for pattern in LETTERS:
        found = re.match(ANNOUNCED + pattern, text)
        if found:
            return found[1], text[found.end() :]
    return "", text


def names_letters(rest: str, like: str) -> bool:
    """True if what follows a choice names another one: `, C`, `or C`, `5 (C) 6`, `5, C. 6`.

    like: the letter before it; small ones name choices only where that one is small.
    """
    letter = "[A-J]" if like.isupper() else "[a-j]"
    another = rf"(?<!\S)\({letter}\)|[,;]\s*{letter}[.):](?=\s|$)"
    if re.match(r"\W*(?:or|and|vs)\b", rest) or re.search(another, rest):
        return True
    return re.fullmatch(rf"[\W_]*(?:(?:{letter}|or|and)\b[\W_]*)+", rest) is not None


def grade_yes_no(boxed: str, answer: str) -> float:
    """Returns 1.0 if box and reference agree: yes is true, no is false.

    More may stand behind a sign, as in `Yes, because 7 is prime`, without these four words.
    """
    meaning = {"yes": True, "true": True, "no": False, "false": False}
    text = unwrapped(boxed).lower()
    said = [word for word in re.findall(r"\w+", text) if word in meaning]
    if len(said) != 1 or not re.match(said[0] + r"\s*(?:$|[,.;:!(—–]| -)", text):
        count("not_yes_or_no")
        return 0.0
    return float(meaning[said[0]] == meaning[answer.strip().lower()])


def grade_text(boxed: str, answer: str) -> float:
    """Returns 1.0 if the box holds the same words as the reference, regardless of case.

    An article before them does not count. Beside a reference of six words and signs or more, the
    box may hold half as many others, such as `(balanced)` after an equation, but no sign of a
    calculation and no number next to it. Beside a shorter one it may hold none, for they could list
    every answer.
    """
    given = words(boxed)
    wanted = words(answer)
    spare = len(wanted) // 2 if len(wanted) >= 6 else 0
    if not wanted or len(given) > len(wanted) + spare:
        count("text_too_long")
        return 0.0
    for start in range(len(given) - len(wanted) + 1):
        end = start + len(wanted)
        beside = given[max(0, start - 1) : start] + given[end : end + 1]
        if given[start:end] == wanted and not any(map(calculates, beside)):
            return 1.0
    return 0.0


def calculates(word: str) -> bool:
    """True if a word next to an equation makes another one of it: `+ CO2`, `4 ...`."""
    return word in "+-*/^=" or word.isdigit()


SMALL_DIGITS = str.maketrans("₀₁₂₃₄₅₆₇₈₉⁺⁻", "0123456789+-")
CHEMISTRY = [  # (pattern, replacement), in this order
    (r"\\ce\s*\{([^{}]*)\}", r"\1"),
    (r"\\(?:x?(?:long)?(?:left)?right(?:arrow|harpoons)|to)(?![a-zA-Z])|-+>|=+>|[→⟶⇒⇌]", " = "),
    (r"\\[,;:! ]|~|\\q?quad(?![a-z])", " "),  # blanks
    (r"\^?\{(\d*[+-])\}|\^(\d*[+-])", r"\1\2"),  # charges
    (r"_\{?(\d+)\}?", r"\1"),
    (r"(?<![\w.)\]}])(\d+)(?=[A-Za-z(\[])", r"\1 "),  # numbers of molecules
]


def words(text: str) -> list[str]:
    """Returns the words and signs of a text in lower case, without an article before them.

    Chemistry: H_2 is H2, an arrow is =, and 2NaCl is 2 NaCl.
    """
    text = unwrapped(text).translate(SMALL_DIGITS)
    for pattern, replacement in CHEMISTRY:
        text = re.sub(pattern, replacement, text)
    found = re.findall(r"[^\W_]+|[^\w\s]", text.casefold().strip("\"'“”"))
    return found[1:] if len(found) > 1 and found[0] in ("a", "an", "the") else found


DEEPEST = 10  # commands inside commands: the time must not grow with the square of the length


def unwrapped(boxed: str) -> str:
    r"""Removes LaTeX's text commands, dollars and a final period: `\textbf{(B)}\ 5.` -> `(B) 5`."""
    text = boxed[:100_000]
    for _ in range(DEEPEST):
        text = re.sub(
            r"\\(?:text|math)(?:bf|rm|it)?\s*\{([^{}]*)\}|\\mbox\s*\{([^{}]*)\}", r"\1\2", text
        )
    return text.replace("$", "").replace("\\ ", " ").strip().removesuffix(".").strip()


# --------------------------------------------- checking a reference: record -> complaint, or None


def check_answer(record: dict) -> str | None:
    """Says what is wrong with a record's `answer` if it is missing, empty or no text or number."""
    answer = record.get("answer")
    if answer is None or str(answer).strip() == "":
        return "field 'answer' is missing or empty; each line needs question, answer and kind"
    if not isinstance(answer, (str, int, float)) or str(answer) in ("nan", "inf", "-inf"):
        return f"answer {str(answer)[:40]} is neither a text nor a finite number"
    return None


def check_form(record: dict, pattern: str, complaint: str) -> str | None:
    """Like `check_answer`; the answer must also match a pattern, else the complaint says so."""
    missing = check_answer(record)
    if missing:
        return missing
    answer = str(record["answer"]).strip()
    if not re.fullmatch(pattern, answer, re.ASCII):
        return f"answer {answer[:40]!r} {complaint}"
    return None


def check_integer(record: dict) -> str | None:
    complaint = (
        'is not an integer of at most 1000 digits; use kind "integers" for a list, '
        '"math" for expressions'
    )
    return check_form(record, INTEGER, complaint)


def check_integers(record: dict) -> str | None:
    complaint = (
        "is not a list of integers of at most 1000 digits; write them with blanks between, "
        'as in "3 -1 4"'
    )
    return check_form(record, r"[+-]?\d{1,1000}([\s,]+[+-]?\d{1,1000})*", complaint)


def check_choice(record: dict) -> str | None:
    return check_form(record, r"\(?[A-Za-z]\)?", "is not a letter")


def check_yes_no(record: dict) -> str | None:
    return check_form(record, r"(?i:yes|no|true|false)", "is not yes, no, true or false")


def check_tests(record: dict) -> str | None:
    """Says what is wrong with a record's `tests`; their three forms: see sandbox.share_passed."""
    wrong = fault_of_tests(record.get("tests"))
    return f"field 'tests' of a code problem {wrong}" if wrong else None


# -------------------------------------------------------------------------------- the machine


def check_sandbox() -> str:
    """Returns one line on what isolates programs here. Raises UserError where nothing does."""
    try:
        return isolation()
    except OSError as fault:
        raise UserError(
            f"problems of kind code cannot be graded on this machine: {fault}; "
            "use other problems, or another machine"
        )


def check_mathematics() -> str:
    """Compares two numbers, and has nothing to print. Raises UserError where math-verify fails."""
    mathematics.ask_worker("0.5", "1/2")
    return ""


def check_machine(problems: list) -> str | None:
    """Checks that this machine can grade the problems, before any expensive work.

    Returns what to print about it, or None. Raises UserError where the machine lacks something.
    """
    lines = []
    for name, kind in KINDS.items():
        if kind.check_machine and any(problem.kind == name for problem in problems):
            lines.append(kind.check_machine())
    return "\n".join(filter(None, lines)) or None


# ---------------------------------------------------------------------------------- the kinds


@dataclass(frozen=True)
class Kind:
    """One kind of problem: how it is asked for, how a response is graded, what it needs."""

    compare: Callable[[str, str | dict], float]
    """what was found in the response, the problem's reference -> reward in [0, 1]"""

    ending: str = "Put the final answer in \\boxed{}."
    """last sentence of the instruction in the prompt"""

    find: Callable[[str], str | None] = last_boxed
    """response -> the part that is graded, or None"""

    not_found: str = "no_box"
    """name of the fault that is counted where `find` returns None"""

    answered: Callable[[str], bool] = has_box
    """response -> whether it holds an answer at all, for the statistics of eval.py"""

    reference: str = "answer"
    """the field of a problem that holds its reference: answer or tests"""

    check_reference: Callable[[dict], str | None] = check_answer
    """record of a JSON line -> what is wrong with its reference, or None"""

    slow: bool = False
    """grading waits for another process: several are graded at once while sampling goes on"""

    check_machine: Callable[[], str] | None = None
    """returns what to print, or raises UserError where the machine cannot grade this kind"""

    can_be_guessed: bool = False
    """few answers are possible, so a wrong response is often rewarded by luck"""

    def grade(self, response: str, reference: str | dict) -> float:
        """Returns the reward of a whole response, in [0, 1]."""
        found = self.find(response)
        if found is None:
            count(self.not_found)
            return 0.0
        return self.compare(found, reference)


KINDS = {
    "integer": Kind(grade_integer, check_reference=check_integer),
    "integers": Kind(
        grade_integers,
        ending="Put the list of integers in \\boxed{}, in order, with blanks between them.",
        check_reference=check_integers,
    ),
    "math": Kind(grade_math, slow=True, check_machine=check_mathematics),
    "choice": Kind(
        grade_choice,
        ending="Put the letter of the right choice in \\boxed{}.",
        check_reference=check_choice,
        can_be_guessed=True,
    ),
    "yes_no": Kind(
        grade_yes_no,
        ending="Put the final answer, yes or no, in \\boxed{}.",
        check_reference=check_yes_no,
        can_be_guessed=True,
    ),
    "text": Kind(grade_text),
    "code": Kind(
        share_passed,
        ending="End with the whole program in one ```python block.",
        find=last_program,
        not_found="no_code",
        answered=has_fence,
        reference="tests",
        check_reference=check_tests,
        slow=True,
        check_machine=check_sandbox,
    ),
}


def demo() -> None:
    """Grades a right, a wrong and an unreadable answer of every kind, and prints the faults."""
    double = {"stdin": [["2", "4"], ["3", "6"]]}
    examples = [
        ("integer", "1,000", [r"\boxed{1000}", r"\boxed{999}", r"\boxed{10^3}"]),
        ("integers", "3 -1 4", [r"\boxed{3, -1, 4}", r"\boxed{3 4 -1}", r"\boxed{three}"]),
        ("math", "0.5", [r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{3}}", r"\boxed{?}"]),
        ("choice", "B", [r"\boxed{(b) bank}", r"\boxed{A}", r"\boxed{A or B}"]),
        ("yes_no", "yes", [r"\boxed{True}", r"\boxed{No}", r"\boxed{maybe}"]),
        ("text", "2 H2O", [r"\boxed{\text{2 H2O}}", r"\boxed{H2O}", "2 H2O"]),
        ("code", double, ["```python\nprint(2 * int(input()))\n```", "```\nprint(4)\n```", "4"]),
    ]
    for name, reference, responses in examples:
        if name == "code":
            print(check_sandbox())
        for response in responses:
            counters.clear()
            reward = KINDS[name].grade(response, reference)
            print(f"{name:8} {reward:.1f}  {response!r}  {', '.join(counters)}")


if __name__ == "__main__":
    try:
        demo()
    except UserError as fault:
        sys.exit(f"verifiers.py: {fault}")
