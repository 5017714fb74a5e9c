"""Problems: a question, its reference, and how a response is graded; read from JSON lines.

A data file holds one object a line, as `data/prepare.py` writes them for public sets:

    {"question": "What is 6 * 7?", "answer": "42", "kind": "integer"}

`kind` is a key of `verifiers.KINDS`. Kind "code" has `tests` instead of an answer; their three
forms are described at `sandbox.share_passed`. Problems that are generated instead come from
data/chains.py and data/english.py; data/tasks.py finds either by name.

Left out: other file formats. `data/prepare.py` converts public sets to this one.

Try it alone:  python -m data.problems        # grades two responses, and refuses a bad record
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.faults import UserError
from data.verifiers import KINDS


@dataclass
class Problem:
    """One question with its reference answer and verifier."""

    index: int
    """position in its data set; the only key of a problem, since texts may repeat"""

    question: str

    answer: str
    """reference answer; "" for kind code"""

    kind: str
    """a key of verifiers.KINDS"""

    check_steps: Callable[[list[str]], int | None] | None = None
    """H thoughts -> 1-based index of the first wrong one, None if all are right. Exact truth that
    only generated problems have; only `--localizer verifier` and measurements look at it."""

    tests: dict | None = None
    """of kind code: see sandbox.share_passed"""

    @property
    def slow(self) -> bool:
        """True if grading waits for another process."""
        return KINDS[self.kind].slow

    def grade(self, response: str) -> float:
        """Returns the reward of a response, in [0, 1]."""
        kind = KINDS[self.kind]
        return kind.grade(response, getattr(self, kind.reference))


def read_problems(path: Path | str) -> list[Problem]:
    """Reads all problems of a JSON-lines file; blank lines are skipped.

    Raises UserError with file and line of the first thing that is wrong.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as fault:
        raise UserError(
            f"{path}: not UTF-8 text ({fault.reason} at byte {fault.start}); "
            "save it as UTF-8 JSON lines"
        )
    problems = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as fault:
            raise UserError(
                f"{path}, line {number}: not JSON ({fault.msg}); each line must be one object"
            )
        complaint = check_record(record)
        if complaint:
            raise UserError(f"{path}, line {number}: {complaint}")
        problem = Problem(
            index=len(problems),
            question=record["question"],
            answer=str(record.get("answer", "")).strip(),
            kind=record["kind"],
            tests=record.get("tests"),
        )
        problems.append(problem)
    if not problems:
        raise UserError(
            f"{path}: holds no problems; "
            "write one JSON object a line with question, answer and kind"
        )
    return problems


def check_record(record) -> str | None:
    """Returns what is wrong with one line's JSON value, or None."""
    if not isinstance(record, dict):
        return "not a JSON object; each line needs question, answer and kind"
    for field in ("question", "kind"):
        if not isinstance(record.get(field), str) or record[field] == "":
            return f"field {field!r} is missing or empty; each line needs question, answer and kind"
    if record["kind"] not in KINDS:
        return f"unknown kind {record['kind']!r}; use one of {', '.join(KINDS)}"
    return KINDS[record["kind"]].check_reference(record)


def demo() -> None:
    """Grades a right and a wrong response, and refuses a bad record."""
    problem = Problem(index=0, question="What is 6 * 7?", answer="42", kind="integer")
    print(problem)
    for response in (r"6 * 7 = 42</thought> \boxed{42}", r"6 + 7 = 13</thought> \boxed{13}"):
        print(f"reward {problem.grade(response)}: {response}")
    bad = {"question": "What is 6 * 7?", "answer": "forty-two", "kind": "integer"}
    print(f"{bad} is refused: {check_record(bad)}")


if __name__ == "__main__":
    demo()
