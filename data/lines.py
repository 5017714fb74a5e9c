"""Files of JSON: read whole and checked, written whole or not at all.

Files come from anywhere. What no other part of the project could use is refused here, in one line
with file and line number: text that is not UTF-8, what is not JSON, nesting too deep to be read,
integers of thousands of digits, and halves of surrogate pairs, which no tokenizer takes. A byte
order mark at the start of a file is skipped.

A line ends at a line feed and nowhere else: texts in it may hold U+2028, U+2029 and U+0085, at
which `str.splitlines` would cut.

Left out: reading line by line. Data files fit into memory; rollouts.jsonl, which may not, is read
in data/report.py.

Try it alone:  python -m data.lines problems.jsonl       # how many lines, and the first value
"""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryFile

from data.faults import UserError


def parse(text: str | bytes, place: str | Path, halves: bool = False):
    """Returns the value of a JSON text. Raises UserError; `place` says where the text stands.

    halves: its texts may hold halves of surrogate pairs.
    """
    try:
        value = json.loads(text)
        if not halves:
            json.dumps(value, ensure_ascii=False).encode()  # fails where there is one
    except json.JSONDecodeError as fault:
        reason = f"not JSON ({fault.msg})"
    except UnicodeEncodeError:
        reason = "holds half a surrogate pair (\\ud800 to \\udfff), which is no character"
    except UnicodeDecodeError:
        reason = "not UTF-8 text"
    except RecursionError:
        reason = "nested too deeply to be read"
    except ValueError:
        reason = "holds an integer of too many digits"
    else:
        return value
    raise UserError(f"{place}: {reason}")


def parse_lines(text: str, source: str | Path) -> list[tuple[int, object]]:
    """Returns (line number from 1, value) of every line that is not blank."""
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            values.append((number, parse(line, f"{source}, line {number}")))
    return values


def read_text(path: str | Path) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror})")
    except UnicodeDecodeError as fault:
        raise UserError(
            f"{path}: not UTF-8 text ({fault.reason} at byte {fault.start}); save it as UTF-8"
        )


def read_json(path: str | Path):
    """Returns the value of a file that holds one JSON value."""
    return parse(read_text(path), path)


def read_lines(path: str | Path) -> list[tuple[int, object]]:
    """Returns (line number from 1, value) of every line of a file that is not blank."""
    return parse_lines(read_text(path), path)


def check_writable(folder: Path) -> None:
    """Raises UserError if no file can be written there. Leaves at most empty parent folders."""
    try:
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
        if is_new:
            folder.rmdir()
    except OSError as fault:
        raise UserError(f"cannot write to {folder} ({fault.strerror}); choose another --out")


def write_text(path: Path, text: str) -> None:
    """Writes a file under another name and renames it: it is whole or not there."""
    unfinished = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as fault:
        raise UserError(f"cannot write {path} ({fault.strerror}); choose another place")


def write_lines(path: Path, records: list[dict]) -> None:
    """Writes JSON lines, whole or not at all."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_text(path, "".join(lines))


def demo(paths: list[str]) -> None:
    for path in paths:
        values = read_lines(path)
        print(f"{path}: {len(values)} lines; the first: {values[:1]}")


if __name__ == "__main__":
    try:
        demo(sys.argv[1:])
    except UserError as fault:
        sys.exit(f"lines.py: {fault}")
