"""Problems by name."""

import json
import re
from pathlib import Path

from data.chains import MAX_STEPS, generate_chains
from data.faults import UserError
from data.problems import Problem
from data.verifiers import ANSWERS, GRADERS, has_tests

GENERATED = "chain-K (K steps, for the embedded policy) or english-K-L (K to L steps in English)"  # for messages


def load_problems(source: str, seed: int, n: int = 4096) -> list[Problem]:
    """Problems from a generated task (n of them; see GENERATED) or from a JSON-lines file (all of them, keys `question`, `answer`, `kind`).

    `seed` only matters for generated problems. Raises UserError naming file and line of the first thing that is wrong."""
    if re.fullmatch(r"chain-\d+", source):
        steps = int(source.removeprefix("chain-"))
        if not 1 <= steps <= MAX_STEPS:
            raise UserError(
                f"{source}: the embedded policy knows chains of 1 to {MAX_STEPS} steps; ask for one of those"
            )
        return generate_chains(steps, n, seed)
    if found := re.fullmatch(r"english-(\d+)(?:-(\d+))?", source):
        from data.english import generate_english

        return generate_english(int(found[1]), int(found[2] or found[1]), n, seed)
    path = Path(source)
    if not path.is_file():
        raise UserError(
            f"{source}: no such data file; give a JSON-lines file, or a generated task (chain-12 or english-2-4, say)"
        )
    problems = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as fault:
        raise UserError(
            f"{source}: not UTF-8 text ({fault.reason} at byte {fault.start}); save it as UTF-8 JSON lines"
        )
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as fault:
            raise UserError(
                f"{source}, line {number}: not JSON ({fault.msg}); each line must be one object"
            )
        if not isinstance(record, dict):
            raise UserError(
                f"{source}, line {number}: not a JSON object; each line needs question, answer and kind"
            )
        code = record.get("kind") == "code"
        for key in ("question", "kind") if code else ("question", "answer", "kind"):
            if (
                not isinstance(record.get(key), (str, int) if key == "answer" else str)
                or record[key] == ""
            ):
                raise UserError(
                    f"{source}, line {number}: field {key!r} is missing or empty; each line needs question, answer and kind"
                )
        if record["kind"] not in GRADERS and not code:
            raise UserError(
                f"{source}, line {number}: unknown kind {record['kind']!r}; use one of {', '.join(GRADERS)}, code"
            )
        if code and not has_tests(record.get("tests")):
            raise UserError(
                f"{source}, line {number}: field 'tests' of a code problem is missing or empty; see share_passed in data/sandbox.py"
            )
        answer = str(record.get("answer", "")).strip()
        pattern, wrong = ANSWERS.get(record["kind"], (r".*", ""))
        if not re.fullmatch(pattern, answer, re.ASCII | re.S):
            raise UserError(f"{source}, line {number}: answer {answer[:40]!r} {wrong}")
        problems.append(
            Problem(
                len(problems), record["question"], answer, record["kind"], tests=record.get("tests")
            )
        )
    if not problems:
        raise UserError(
            f"{source}: holds no problems; write one JSON object a line with question, answer and kind"
        )
    return problems
