"""Solutions with labels: what `eval.py localization` measures a policy's reviews against.

A file holds one solution a line, as `data/prepare.py` writes ProcessBench:

    {"question": "What is 6 * 7 + 1?", "steps": ["6 * 7 = 42", "42 + 1 = 44"], "label": 1}

`label` is the 0-based index of the first wrong step, -1 where all are right.

Left out: labels of every step. Only the first wrong one counts.

Try it alone:  python -m data.labelled processbench.jsonl 20     # the labels of 20, drawn
"""

import os
import sys

import numpy as np

from data.faults import UserError
from data.lines import read_lines


def is_labelled(source: str) -> bool:
    """True for a file of solutions with labels, False for problems."""
    if not os.path.isfile(source):
        return False
    for _, record in read_lines(source)[:1]:
        return isinstance(record, dict) and "label" in record
    return False


def load_labelled(source: str) -> list[dict]:
    """Records with question, steps (H texts), and label: 0-based first wrong step, -1 for none.

    Raises UserError naming the first line that is something else.
    """
    records = []
    for number, record in read_lines(source):
        if not is_solution(record):
            raise UserError(
                f"{source}, line {number}: needs question (a text), steps (a list of texts) and "
                "label (-1, or a 0-based index into them)"
            )
        records.append(record)
    return records


def is_solution(record) -> bool:
    """Whether a JSON value is a solution with its label."""
    if not isinstance(record, dict) or not isinstance(record.get("question"), str):
        return False
    steps, label = record.get("steps"), record.get("label")
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        return False
    return type(label) is int and len(steps) > 0 and -1 <= label < len(steps)


def sample_labelled(records: list[dict], n: int | None, seed: int) -> list[dict]:
    """n records drawn at random, in their order; the share of erroneous ones stays as it is.

    n = None takes all. Public files are sorted: their first n would be nearly all erroneous.
    """
    if n is None or n >= len(records):
        return records
    erroneous = [k for k, record in enumerate(records) if record["label"] >= 0]
    correct = [k for k, record in enumerate(records) if record["label"] < 0]
    rng = np.random.default_rng(seed)
    n_erroneous = round(n * len(erroneous) / len(records))
    chosen = [*rng.permutation(erroneous)[:n_erroneous]]
    chosen += [*rng.permutation(correct)[: n - n_erroneous]]
    return [records[k] for k in sorted(chosen)]


if __name__ == "__main__":
    try:
        source, n = sys.argv[1:]
        n = int(n)
    except ValueError:
        sys.exit("usage: python -m data.labelled FILE N, where N is a number")
    try:
        print([record["label"] for record in sample_labelled(load_labelled(source), n, 0)])
    except UserError as fault:
        sys.exit(f"labelled.py: {fault}")
