"""Problems: a question, its reference, and how a response is graded; read from JSON lines.

A data file holds one object a line, as `data/prepare.py` writes them for public sets:

    {"question": "What is 6 * 7?", "answer": "42", "kind": "integer"}

`kind` is a key of `verifiers.KINDS`. Kind "code" has `tests` instead of an answer; their three
forms are described at `sandbox.share_passed`. Problems that are generated instead come from
data/chains.py and data/english.py; data/tasks.py finds either by name. A generated problem in a
file has a field `generated` (Origin), by which data/tasks.py finds its step checker again.

Left out: other file formats. `data/prepare.py` converts public sets to this one.

Try it alone:  python -m data.problems        # grades two responses, and refuses a bad record
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from data.faults import UserError
from data.lines import read_lines
from data.verifiers import KINDS


@dataclass(frozen=True)
class Origin:
    """Where a generated problem comes from: problem `index` of a task drawn with `seed`."""

    task: str
    seed: int
    index: int


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

    origin: Origin | None = None
    """of a generated problem"""

    @property
    def slow(self) -> bool:
        """True if grading waits for another process."""
        return KINDS[self.kind].slow

    def grade(self, response: str) -> float:
        """Returns the reward of a response, in [0, 1]."""
        kind = KINDS[self.kind]
        return kind.grade(response, getattr(self, kind.reference))

    def to_json(self) -> dict:
        """Its line in a data file, which reads back as the same problem."""
        reference = KINDS[self.kind].reference
        record = {"question": self.question, reference: getattr(self, reference), "kind": self.kind}
        if self.origin:
            record["generated"] = asdict(self.origin)
        return record


def read_problems(path: Path | str) -> list[Problem]:
    """Reads all problems of a JSON-lines file; blank lines are skipped.

    Raises UserError with file and line of the first thing that is wrong. A problem with an origin
    has no step checker yet: see tasks.load_problems.
    """
    problems = []
    for number, record in read_lines(path):
        complaint = check_record(record)
        if complaint:
            raise UserError(f"{path}, line {number}: {complaint}")
        origin = record.get("generated")
        problem = Problem(
            index=len(problems),
            question=record["question"],
            answer=str(record.get("answer", "")).strip(),
            kind=record["kind"],
            tests=record.get("tests"),
            origin=Origin(**origin) if origin else None,
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
        if not isinstance(record.get(field), str) or not record[field].strip():
            return f"field {field!r} is missing or empty; each line needs question, answer and kind"
    if record["kind"] not in KINDS:
        return f"unknown kind {record['kind'][:40]!r}; use one of {', '.join(KINDS)}"
    return check_origin(record) or KINDS[record["kind"]].check_reference(record)


def check_origin(record: dict) -> str | None:
    """Returns what is wrong with a record's field `generated`, or None; most have none."""
    origin = record.get("generated")
    if origin is None:
        return None
    if isinstance(origin, dict) and origin.keys() == {"task", "seed", "index"}:
        numbers = (origin["seed"], origin["index"])
        natural = all(type(number) is int and number >= 0 for number in numbers)
        if natural and isinstance(origin["task"], str):
            return None
    return "field 'generated' needs task (a text), seed and index (integers from 0), nothing else"


def digest(problems: list[Problem]) -> str:
    """Returns 8 hexadecimal digits that tell lists of problems apart by all that is graded."""
    content = [[p.question, p.kind, p.answer, p.tests] for p in problems]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


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
