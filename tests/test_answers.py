"""Graders: a table of right and wrong answers, wrong ones made from real ones, and the workers.

The table and the generator are in tests/answers.py. Here a seeded sample of the generated answers
is graded, about 5 seconds of CPU time; the whole is graded by

    SRPO_DATA=folder python -m tests.answers
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from queue import LifoQueue

import pytest

from conftest import ROOT
from data import mathematics, verifiers
from data.faults import UserError, counters
from data.problems import Problem
from tests.answers import DATA, SOURCES, WAYS, decided_otherwise, read_table, wrong_answers

# What the graders decide otherwise than the table says: (reference, boxed) -> the reason.
EXPLAINED = {
    (
        "2,4,3",
        "2,3,4",
    ): "a list without brackets is the set of solutions in MATH and OlympiadBench, where any order "
    "is right; nothing in the answer tells a sequence from it",
    (
        r"(-\infty,-2]\cup[4,\infty)",
        r"x \le -2 \text{ or } x \ge 4",
    ): "math-verify reads inequalities joined by 'or' as a list, not as a union",
}


def test_the_table_is_decided_as_written():
    pairs = [pair for source in SOURCES for pair in read_table(source)]
    failed = {(pair.reference, pair.boxed) for pair in decided_otherwise(pairs)}
    assert failed == set(EXPLAINED)
    assert len(failed) <= 0.01 * len(pairs)
    assert not {"math_timeout", "math_crash"} & set(counters)


def test_the_table_has_its_sizes():
    blind = read_table("blind")
    pairs = blind + read_table("author")
    assert len(pairs) >= 400
    assert len(blind) >= len(pairs) / 2
    assert min(Counter(pair.group for pair in pairs).values()) >= 20
    assert len({(pair.kind, pair.reference, pair.boxed) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize(
    "reference, right, wrong",
    [
        ("0, 0", ["0,0", "(0, 0)", "[0, 0]"], ["0", "0, 0, 0", "0, 1"]),  # to the library a set
        ("18", ["18 oranges", r"18\text{ ounces}", "18 miles per hour"], ["18 million", "18x"]),
        ("25", ["25^\\circ C", r"\approx 25"], ["25_8 + 1", r"25\text{ thousand}"]),
        ("0.0011_{2}", ["0.0011_2"], ["0.0011_{3}"]),
        ("60 km/h", ["60"], [r"60\text{ m/s}"]),
        (r"\frac{-1 \pm \sqrt{5}}{2}", [r"\frac{\sqrt{5}-1}{2}, \frac{-1-\sqrt{5}}{2}"], ["1"]),
    ],
)
def test_more_answers(reference, right, wrong):
    for boxed in right:
        assert verifiers.grade_math(boxed, reference) == 1, boxed
    for boxed in wrong:
        assert verifiers.grade_math(boxed, reference) == 0, boxed


real = pytest.mark.skipif(
    not DATA.is_dir(),
    reason="needs copies of the public files, in the folder that SRPO_DATA names; "
    "the repository does not hold them",
)


@real
def test_wrong_answers_made_from_real_ones_are_refused():
    wrong = list(wrong_answers())
    assert len(wrong) >= 6000
    assert set(WAYS) < {pair.group for pair in wrong}
    assert wrong == list(wrong_answers())
    sample = random.Random(0).sample(wrong, 500)
    accepted = decided_otherwise(sample)
    assert len(accepted) <= 0.003 * len(sample), accepted


def test_the_same_text_is_right_before_any_library_is_asked(monkeypatch):
    monkeypatch.setattr(mathematics, "idle", None)  # no workers
    for reference in ("5", r"x \in \{?", "√2 or so", r"\frac{"):
        for boxed in (reference, f" {reference}. ", f"${reference}$", f"\\text{{{reference}}}"):
            if boxed.count("{") == boxed.count("}") or boxed == reference:
                assert verifiers.grade_math(boxed, reference) == 1


# ------------------------------------------------------------------------------------- the workers


def run_script(tmp_path, text: str) -> subprocess.Popen:
    """Starts a Python script, as a user starts one, with the project on its path."""
    path = tmp_path / "script.py"
    path.write_text(text)
    return subprocess.Popen(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stdout=subprocess.PIPE,
        text=True,
    )


def children(pid: int) -> list[int]:
    """Process ids of all that a process started and that still run."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in path.read_text().split()]
    return found


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


GRADES = """
import heavy
from concurrent.futures import ThreadPoolExecutor
from data.verifiers import grade_math

if __name__ == "__main__":
    with ThreadPoolExecutor(8) as threads:
        rewards = list(threads.map(grade_math, ["1/2"] * 40, ["0.5"] * 40))
    print(sum(rewards), flush=True)
    input()
"""


def test_workers_are_few_and_import_nothing_of_the_program(tmp_path):
    (tmp_path / "heavy.py").write_text("print('imported', flush=True)")
    process = run_script(tmp_path, GRADES)
    printed = [process.stdout.readline(), process.stdout.readline()]
    assert printed == ["imported\n", "40.0\n"]
    workers = children(process.pid)
    assert 1 <= len(workers) <= mathematics.WORKERS
    for worker in workers:
        assert os.getsid(worker) != os.getsid(process.pid)  # Ctrl-C does not reach it
    process.kill()
    process.wait()


STUCK = """
from data.verifiers import grade_math

if __name__ == "__main__":
    grade_math("1/2", "0.5")
    print("started", flush=True)
    grade_math("9^{9^{9^9}}", "1", 2.0)
"""


def test_a_worker_ends_though_its_asker_is_killed_and_it_is_stuck(tmp_path):
    process = run_script(tmp_path, STUCK)
    assert process.stdout.readline() == "started\n"
    workers = children(process.pid)
    assert workers
    time.sleep(0.5)  # it computes now
    process.kill()
    process.wait()
    end = time.monotonic() + 120  # for a busy machine; it takes two seconds of CPU time
    while any(is_alive(worker) for worker in workers):
        assert time.monotonic() < end, "a worker outlives the process that started it"
        time.sleep(0.1)


def test_math_verify_that_does_not_start_is_one_clear_line(monkeypatch):
    """Before training: srpo.py and eval.py call check_machine first."""
    monkeypatch.setattr(mathematics, "idle", LifoQueue())
    mathematics.idle.put(mathematics.Worker())
    monkeypatch.setattr(mathematics.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="math-verify does not start here") as fault:
        verifiers.check_machine([Problem(0, "?", "1", "math")])
    assert "\n" not in str(fault.value)


def test_a_worker_that_is_gone_is_replaced():
    worker = mathematics.Worker()
    assert worker.ask("1/2", "0.5", 5.0) == "equal"
    worker.process.kill()
    worker.process.wait()
    assert worker.ask("1/2", "0.5", 5.0) == "equal"
    worker.process.kill()


def test_a_busy_machine_makes_no_timeout():
    """The limit is one of CPU time: a worker that gets no turn for a while has not used it."""
    worker = mathematics.Worker()
    assert worker.ask("1/2", "0.5", 5.0) == "equal"
    pid = worker.process.pid
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(2.0, os.kill, (pid, signal.SIGCONT)).start()
    assert worker.ask("1/4", "0.25", 1.0) == "equal"
    worker.process.kill()


INTERRUPTED = """
import threading
from types import SimpleNamespace
from data import driver

def never(text):
    threading.Event().wait()

rollouts = [SimpleNamespace(text="") for _ in range(100)]
request = SimpleNamespace(grade=never, slow=True)
driver.grade(driver.InFlight(0, 0, request, rollouts))
raise KeyboardInterrupt
"""


def test_an_interrupt_waits_for_no_grading(tmp_path):
    process = run_script(tmp_path, INTERRUPTED + "\n")
    try:
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in (1, -signal.SIGINT)
