"""What can go wrong: errors that the user can mend, and counters of named faults.

Two ways to report trouble, used by every other file:
  - `UserError` stops the run. Its message is one line; the command prints it, not a traceback.
  - `count(fault)` notes a fault that a run survives: a response without a box, a grading timeout,
    an unusable localization. `counters` holds the totals; a run writes those of each step, and
    those of each evaluation.

Left out: logging levels. A fault either stops the run or is counted.

This file imports nothing of the project, so every file may import it.
"""

import threading
from collections import Counter

counters: Counter = Counter()  # name of a fault -> how often it happened in this process
_lock = threading.Lock()


class UserError(Exception):
    """An error that the user can mend: one line that says what is wrong and what to do.

    It stays one line where a name or a fault in it holds line breaks.
    """

    def __str__(self) -> str:
        return super().__str__().replace("\n", "\\n")


def count(fault: str) -> None:
    """Adds one to the counter of a fault. Safe from threads: slow graders run in some."""
    with _lock:
        counters[fault] += 1
