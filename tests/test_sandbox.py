"""The sandbox: right programs pass; hostile ones neither do harm nor earn a reward.

Every attack checks that it was stopped, not only that it failed.
"""

import glob
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from conftest import ROOT
from data import sandbox
from data.sandbox import call_function, isolation, passes_asserts, run_script, share_passed

DOUBLE = {"stdin": [["2\n", "4\n"], ["5\n", "10\n"], ["7\n", "14"], ["0\n", "0\n"]]}
CALL = {"call": "f", "cases": [[[2], 4], [[5], 10], [[[1]], [1, 1]]]}
CHECK = {
    "call": "f",
    "setup": "def f(x):\n    pass\n",
    "check": """
def check(candidate):
    assert candidate(2) == 4
    assert candidate(5) == 10
""",
}


def test_this_machine_isolates():
    assert "Landlock, seccomp" in isolation()


MANY_IMPORTS_AND_A_THREAD = """
import threading, math, collections, heapq, re, itertools, functools, typing, random, string, bisect
threading.stack_size(1 << 26)
t = threading.Thread(target=lambda: print(2 * int(input())))
t.start(); t.join()
"""
NUMPY = """
import numpy as np
print(int(np.array([1, 1]) @ np.array([1, 1])) * int(input()))
"""
METHOD = """
class Solution:
    def f(self, x):
        print('noise'); return x * 2
"""


@pytest.mark.parametrize(
    "program, tests, share",
    [
        ("print(2 * int(input()))", DOUBLE, 1),
        ("import sys\nfor line in sys.stdin: print(2 * int(line), end=' \\n\\n')", DOUBLE, 1),
        ("print(4)", DOUBLE, 0.25),
        ("print(2 * int(input())); raise SystemExit(3)", DOUBLE, 0),
        ("print(2 * int(input()) or 1)", DOUBLE, 0.75),
        (MANY_IMPORTS_AND_A_THREAD, DOUBLE, 1),
        (NUMPY, DOUBLE, 1),
        ("def f(x): return x * 2", CALL, 1),
        (METHOD, CALL, 1),
        ("def f(x): return x + 2", CALL, 1 / 3),
        ("def f(x): return (1, 1) if x == [1] else 2 * x", CALL, 1),
        ("def g(x): return x * 2", CALL, 0),
        ("def f(x): return x * 2", CHECK, 1),
        ("def f(x): return 4", CHECK, 0),
        ("def f(x", DOUBLE, 0),
        ("def f(x", CALL, 0),
        ("def f(x", CHECK, 0),
        ("", DOUBLE, 0),
        ("\ud800\x00", DOUBLE, 0),
    ],
)
def test_programs(program, tests, share):
    assert share_passed(program, tests, seconds=5) == pytest.approx(share)


def test_a_program_has_limited_time_for_all_its_tests(monkeypatch):
    """Tests that do not get a turn fail; those that passed before count."""
    monkeypatch.setattr(sandbox, "PROGRAM_SECONDS", 3.0)
    slow = "n = int(input())\nwhile n: pass\nprint(0)"
    cases = [["0", "0"]] + [["1", "0"]] * 50 + [["0", "0"]]
    start = time.monotonic()
    assert share_passed(slow, {"stdin": cases}, seconds=1) == 1 / 52
    assert time.monotonic() - start < 20


def test_large_arguments_and_results():
    """Larger than a pipe holds; also for a program that never reads them."""
    numbers = list(range(100_000))
    assert call_function("def f(x): return x[::-1]", "f", [numbers]) == numbers[::-1]
    assert run_script("print(input()[::-1])", "ab" * 200_000)[1] == "ba" * 200_000 + "\n"
    endless = "while True: pass"
    start = time.monotonic()
    assert share_passed(endless, {"call": "f", "cases": [[[numbers], 1]]}, seconds=1) == 0
    assert share_passed(endless, {"stdin": [["1" * 400_000, "1"]]}, seconds=1) == 0
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(
    "printed, expected, same",
    [
        ("0.30000000000000004\n", "0.3", True),
        ("1 2 \n3\n\n", "1 2\n3", True),
        ("", "\n", True),
        ("0.31", "0.3", False),
        ("12", "1 2", False),
        ("1\n2", "1 2", False),
        ("nan", "0.5", False),
        ("1.0", "1", False),
    ],
)
def test_numbers_and_blanks(printed, expected, same):
    assert sandbox.same_output(printed, expected) is same


# ---------------------------------------------------------------------------------------- attacks


def run(program, seconds=3.0):
    """Runs an attack: (exit status, what it printed). It must end in time."""
    start = time.monotonic()
    status, printed = run_script(program, "", seconds)
    assert time.monotonic() - start < seconds + 5
    return status, printed.strip()


def attempt(code):
    """Writes a program that prints "done", or the name of the exception that stopped it."""
    lines = ["try:"]
    lines += [f"    {line}" for line in code.splitlines()]
    lines += [
        "    print('done')",
        "except BaseException as fault:",
        "    print(type(fault).__name__)",
    ]
    return "\n".join(lines) + "\n"


def outcome(code):
    """Runs an attempt; returns what it printed."""
    return run(attempt(code))[1]


IGNORE_SIGNALS = """
import signal
for s in range(1, 32):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
"""


def test_infinite_loops_end():
    assert run("while True: pass", 1)[0] != 0
    assert run("import time\ntime.sleep(60)", 1)[0] is None  # no CPU time: the wall clock
    assert run(IGNORE_SIGNALS, 1)[0] != 0


@pytest.mark.parametrize(
    "fork",
    [
        "import os\nos.fork()",
        "import ctypes\nassert ctypes.CDLL(None).fork() >= 0",
        "import subprocess\nsubprocess.run(['ls'])",
        "import os\nos.execv('/bin/ls', ['ls'])",
        "import os\nos.posix_spawn('/bin/ls', ['ls'], {})",
        "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
    ],
)
def test_no_new_processes(fork):
    status, printed = run(attempt(fork))
    assert status == 0
    assert printed in ("PermissionError", "BlockingIOError", "AssertionError")


FORK_BOMB = """
import os
while True:
    try: os.fork()
    except OSError: pass
"""
THREAD_BOMB = """
import threading, time
while True:
    try: threading.Thread(target=time.sleep, args=(99,)).start()
    except RuntimeError: pass
"""


def command_line(path):
    """Of a process in /proc; empty if it has just ended."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def test_a_fork_bomb_leaves_nothing():
    run(FORK_BOMB, 1)
    run(THREAD_BOMB, 1)
    commands = [command_line(path) for path in glob.glob("/proc/[0-9]*/cmdline")]
    assert not [command for command in commands if b"data/sandbox.py" in command]


def test_memory_and_output_are_bounded():
    assert outcome("x = bytearray(4 << 30)") == "MemoryError"
    assert run("x = []\nwhile True: x.append(bytes(1 << 24))")[0] != 0
    status, printed = run("import sys\nwhile True: sys.stdout.write('x' * 65536)")
    assert status != 0
    assert len(printed) <= sandbox.OUTPUT
    buffered = "f = open('big', 'wb')\nf.write(b'x' * (2 << 20))"
    unbuffered = "f = open('big', 'wb', 0)\nf.write(b'x' * (2 << 20))\nf.write(b'x')"
    assert "OSError" in run(buffered)[1] or run(unbuffered)[0] != 0


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    own = "import os\nprint(dict(os.environ))\n"
    parents = attempt("print(open(f'/proc/{os.getppid()}/environ').read())")
    status, printed = run(own + parents)
    assert status == 0
    assert "hunter2" not in printed
    assert "PermissionError" in printed


def test_no_file_outside_is_read(tmp_path):
    (tmp_path / "data.jsonl").write_text("the expected answers")
    for path in (tmp_path / "data.jsonl", ROOT / "README.md", "/etc/passwd", "/proc/1/cmdline"):
        assert outcome(f"print(open({str(path)!r}).read())") == "PermissionError", path
    for path in ("/root", "/tmp"):
        assert outcome(f"import os\nprint(os.listdir({path!r}))") == "PermissionError", path


def test_no_file_outside_is_written(tmp_path):
    before = set(glob.glob(tempfile.gettempdir() + "/program-*"))
    data = tmp_path / "data.jsonl"
    data.write_text("the expected answers")
    attacks = [
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(data)!r}, 'a')",
        "open('/tmp/new', 'w')",
        "open('../new', 'w')",
        f"import os\nos.remove({str(data)!r})",
        f"import os\nos.mkdir({str(tmp_path / 'd')!r})",
        "import os\nos.symlink('/etc', 'link'); os.listdir('link')",
        "import os\nos.rename('/usr/bin/env', 'env')",
    ]
    for attack in attacks:
        stopped = ("PermissionError", "OSError", "FileNotFoundError")
        assert outcome(attack) in stopped, attack
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
    assert data.read_text() == "the expected answers"
    own_file = "open('mine', 'w').write('x'); print(open('mine').read())"
    assert outcome(own_file).split() == ["x", "done"]
    assert set(glob.glob(tempfile.gettempdir() + "/program-*")) <= before


@pytest.mark.parametrize("kind", ["AF_INET", "AF_INET6", "AF_UNIX"])
def test_no_sockets(kind):
    assert outcome(f"import socket\nsocket.socket(socket.{kind})") == "PermissionError"


def test_the_parent_lives():
    for target in ("os.getppid()", "-1", "0", "1", str(os.getpid())):
        assert outcome(f"import os\nos.kill({target}, 9)") == "PermissionError"
    kill_group = "import os\nos.killpg(os.getpgid(os.getppid()), 9)"
    assert outcome(kill_group) == "PermissionError"
    trace = "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0"
    assert outcome(trace) == "AssertionError"
    slow_down = "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)"
    assert outcome(slow_down) == "PermissionError"
    limit = "import resource as r, os\nr.prlimit(os.getppid(), r.RLIMIT_NOFILE, (3, 3))"
    assert outcome(limit) == "PermissionError"


@pytest.mark.parametrize(
    "early", ["raise SystemExit(0)", "import os\nos._exit(0)", "import sys\nsys.exit()"]
)
def test_ending_early_earns_nothing(early):
    indented = early.replace("\n", "\n    ")
    for tests in (DOUBLE, CALL, CHECK):
        assert share_passed(early, tests) == 0
        assert share_passed(f"def f(x):\n    {indented}", tests) == 0


EXPECTED = 8315313370291
HUNT = """
import gc, sys, os
def look():
    found = []
    frame = sys._getframe()
    while frame:
        found += [repr(v) for v in list(frame.f_locals.values()) + list(frame.f_globals.values())]
        frame = frame.f_back
    found += [repr(o)[:2000] for o in gc.get_objects() if isinstance(o, (str, list, tuple, dict))]
    for fd in range(3, 64):
        try: found.append(repr(os.pread(fd, 4096, 0)))
        except OSError: pass
    return any("".join(["83153", "13370291"]) in f for f in found)
def f(x): return look()
"""
HUNT_CHECK = f"""
def check(candidate):
    expected = {EXPECTED}
    assert candidate(2) is False
    assert expected == {EXPECTED}
"""


def test_expected_results_are_nowhere_in_the_process():
    """A program searches frames, objects and open files for the number that the tests expect."""
    assert call_function(HUNT, "f", [2]) is False
    assert call_function(HUNT, "f", [EXPECTED]) is True  # the hunt finds what is there
    assert share_passed(HUNT, {"call": "f", "cases": [[[2], EXPECTED], [[3], False]]}) == 0.5
    assert passes_asserts(HUNT, "f", "", HUNT_CHECK)


EQUAL_TO_ALL = """
class Yes:
    def __eq__(self, other): return True
    def __repr__(self): return '4'
def f(x): return Yes()
"""  # comes back as 4, which is right on one case only
BROKEN_MODULES = """
import builtins
builtins.print = lambda *a: None
import sys
sys.modules['ast'] = None
def f(x): return 3
"""
DEEP_LIST = """
x = []
for i in range(100000): x = [x]
def f(_): return x
"""
WRITES_TO_STDOUT = """
import os
os.write(1, b'4\\n10\\n'); os.close(1)
def f(x): return None
"""
WRITES_TO_ALL_FILES = """
import os
for fd in range(3, 20):
    try: os.write(fd, b'4\\n' * 9)
    except OSError: pass
def f(x): return None
"""


@pytest.mark.parametrize(
    "program",
    [
        EQUAL_TO_ALL,
        "def f(x): return type('T', (int,), {'__eq__': lambda a, b: True})(1)",
        "def f(x): return {}.__class__",
        "def f(x): raise AssertionError",
        BROKEN_MODULES,
        "def f(x):\n    while True: print('x' * 1000)",
        "def f(x): return '(' * 100000",
        DEEP_LIST,
        WRITES_TO_STDOUT,
        WRITES_TO_ALL_FILES,
    ],
)
def test_forged_results(program):
    """Results come back as literals and are compared outside: a guess is right once, not always."""
    assert share_passed(program, CALL, seconds=3) < 1
    assert share_passed(program, CHECK, seconds=3) == 0


def test_a_machine_without_landlock_runs_nothing(monkeypatch):
    monkeypatch.setattr(sandbox, "ARCHES", {})
    with pytest.raises(OSError, match="no sandbox for"):
        isolation()


def test_it_says_what_it_is():
    command = [sys.executable, "-m", "data.sandbox"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "sandbox: Landlock, seccomp" in done.stdout
