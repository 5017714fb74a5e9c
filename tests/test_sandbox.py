"""The sandbox: right programs pass, and hostile ones neither do harm nor earn a reward. Every attack checks that it was stopped, not only that it failed."""

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
    "check": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(5) == 10\n",
}


def test_this_machine_isolates():
    assert "Landlock, seccomp" in isolation()


@pytest.mark.parametrize(
    "program, tests, share",
    [
        ("print(2 * int(input()))", DOUBLE, 1),
        ("import sys\nfor line in sys.stdin: print(2 * int(line), end=' \\n\\n')", DOUBLE, 1),
        ("print(4)", DOUBLE, 0.25),
        ("print(2 * int(input())); raise SystemExit(3)", DOUBLE, 0),
        ("print(2 * int(input()) or 1)", DOUBLE, 0.75),
        ("import threading, math, collections, heapq, re, itertools, functools, typing, random, string, bisect\n"
         "threading.stack_size(1 << 26)\nt = threading.Thread(target=lambda: print(2 * int(input())))\nt.start(); t.join()", DOUBLE, 1),
        ("import numpy as np\nprint(int(np.array([1, 1]) @ np.array([1, 1])) * int(input()))", DOUBLE, 1),
        ("def f(x): return x * 2", CALL, 1),
        ("class Solution:\n    def f(self, x):\n        print('noise'); return x * 2", CALL, 1),
        ("def f(x): return x + 2", CALL, 1 / 3),
        ("def f(x): return (1, 1) if x == [1] else 2 * x", CALL, 1),
        ("def g(x): return x * 2", CALL, 0),
        ("def f(x): return x * 2", CHECK, 1),
        ("def f(x): return 4", CHECK, 0),
        ("def f(x", DOUBLE, 0), ("def f(x", CALL, 0), ("def f(x", CHECK, 0), ("", DOUBLE, 0), ("\ud800\x00", DOUBLE, 0),
    ],
)  # fmt: skip
def test_programs(program, tests, share):
    assert share_passed(program, tests, seconds=5) == pytest.approx(share)


def test_a_program_has_limited_time_for_all_its_tests(monkeypatch):
    """What does not come to its turn is failed; what passed before counts."""
    monkeypatch.setattr(sandbox, "PROGRAM_SECONDS", 3.0)
    start = time.monotonic()
    slow = "n = int(input())\nwhile n: pass\nprint(0)"
    assert (
        share_passed(slow, {"stdin": [["0", "0"]] + [["1", "0"]] * 50 + [["0", "0"]]}, seconds=1)
        == 1 / 52
    )
    assert time.monotonic() - start < 20


def test_large_arguments_and_results():
    """Larger than a pipe holds; also for a program that never reads them."""
    numbers = list(range(100_000))
    assert call_function("def f(x): return x[::-1]", "f", [numbers]) == numbers[::-1]
    assert run_script("print(input()[::-1])", "ab" * 200_000)[1] == "ba" * 200_000 + "\n"
    start = time.monotonic()
    assert (
        share_passed("while True: pass", {"call": "f", "cases": [[[numbers], 1]]}, seconds=1) == 0
    )
    assert share_passed("while True: pass", {"stdin": [["1" * 400_000, "1"]]}, seconds=1) == 0
    assert time.monotonic() - start < 20


def test_numbers_and_blanks():
    same = lambda a, b: sandbox.same_output((0, a), b)  # noqa: E731
    assert same("0.30000000000000004\n", "0.3") and same("1 2 \n3\n\n", "1 2\n3") and same("", "\n")
    assert (
        not same("0.31", "0.3")
        and not same("12", "1 2")
        and not same("1\n2", "1 2")
        and not same("nan", "0.5")
        and not same("1.0", "1")
    )


# ------------------------------------------------------------------------------------------------------------------ attacks


def said(program, seconds=3.0, **more):
    start = time.monotonic()
    status, output = run_script(program, "", seconds, **more)
    assert time.monotonic() - start < seconds + 5
    return status, output


def attempt(code):
    """A program that says what the attack met."""
    return (
        "try:\n"
        + "".join(f"    {line}\n" for line in code.splitlines())
        + "    print('done')\nexcept BaseException as fault:\n    print(type(fault).__name__)\n"
    )


def test_infinite_loops_end():
    assert said("while True: pass", 1)[0] not in (0,)
    assert said("import time\ntime.sleep(60)", 1)[0] is None  # no CPU time: the wall clock
    assert (
        said(
            "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
            1,
        )[0]
        != 0
    )


@pytest.mark.parametrize(
    "fork", ["import os\nos.fork()", "import ctypes\nassert ctypes.CDLL(None).fork() >= 0", "import subprocess\nsubprocess.run(['ls'])", "import os\nos.execv('/bin/ls', ['ls'])",
             "import os\nos.posix_spawn('/bin/ls', ['ls'], {})", "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()"])  # fmt: skip
def test_no_new_processes(fork):
    status, output = said(attempt(fork))
    assert status == 0 and output.strip() in (
        "PermissionError",
        "BlockingIOError",
        "AssertionError",
    )


def test_a_fork_bomb_leaves_nothing():
    said("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", 1)
    said(
        "import threading, time\nwhile True:\n    try: threading.Thread(target=time.sleep, args=(99,)).start()\n    except RuntimeError: pass",
        1,
    )
    assert not [p for p in glob.glob("/proc/[0-9]*/cmdline") if b"data/sandbox.py" in read(p)]


def read(path):
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def test_memory_and_output_are_bounded():
    assert said(attempt("x = bytearray(4 << 30)"))[1].strip() == "MemoryError"
    assert said("x = []\nwhile True: x.append(bytes(1 << 24))")[0] != 0
    status, output = said("import sys\nwhile True: sys.stdout.write('x' * 65536)")
    assert status != 0 and len(output) <= sandbox.OUTPUT
    assert (
        "OSError" in said("f = open('big', 'wb')\nf.write(b'x' * (2 << 20))")[1]
        or said("f = open('big', 'wb', 0)\nf.write(b'x' * (2 << 20))\nf.write(b'x')")[0] != 0
    )


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    status, output = said(
        "import os\nprint(dict(os.environ))\n"
        + attempt("print(open(f'/proc/{os.getppid()}/environ').read())")
    )
    assert status == 0 and "hunter2" not in output and "PermissionError" in output


def test_no_file_outside(tmp_path):
    before = set(glob.glob(tempfile.gettempdir() + "/program-*"))
    (tmp_path / "data.jsonl").write_text("the expected answers")
    for path in (
        tmp_path / "data.jsonl",
        ROOT / "README.md",
        "/etc/passwd",
        "/proc/1/cmdline",
        "/root",
        "/tmp",
    ):
        look = (
            f"import os\nprint(os.listdir({str(path)!r}))"
            if Path(path).is_dir()
            else f"print(open({str(path)!r}).read())"
        )
        assert said(attempt(look))[1].strip() == "PermissionError", path
    for write in (f"open({str(tmp_path / 'new')!r}, 'w')", f"open({str(tmp_path / 'data.jsonl')!r}, 'a')", "open('/tmp/new', 'w')", "open('../new', 'w')",
                  f"import os\nos.remove({str(tmp_path / 'data.jsonl')!r})", f"import os\nos.mkdir({str(tmp_path / 'd')!r})",
                  "import os\nos.symlink('/etc', 'link'); os.listdir('link')", "import os\nos.rename('/usr/bin/env', 'env')"):  # fmt: skip
        assert said(attempt(write))[1].strip() in (
            "PermissionError",
            "OSError",
            "FileNotFoundError",
        ), write
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"] and (
        tmp_path / "data.jsonl"
    ).read_text() == "the expected answers"
    assert said(attempt("open('mine', 'w').write('x'); print(open('mine').read())"))[1].split() == [
        "x",
        "done",
    ]
    assert set(glob.glob(tempfile.gettempdir() + "/program-*")) <= before


@pytest.mark.parametrize("kind", ["AF_INET", "AF_INET6", "AF_UNIX"])
def test_no_sockets(kind):
    assert (
        said(attempt(f"import socket\nsocket.socket(socket.{kind})"))[1].strip()
        == "PermissionError"
    )


def test_the_parent_lives():
    for target in ("os.getppid()", "-1", "0", "1", str(os.getpid())):
        assert said(attempt(f"import os\nos.kill({target}, 9)"))[1].strip() == "PermissionError"
    assert (
        said(attempt("import os\nos.killpg(os.getpgid(os.getppid()), 9)"))[1].strip()
        == "PermissionError"
    )
    assert (
        said(
            attempt(
                "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0"
            )
        )[1].strip()
        == "AssertionError"
    )
    assert (
        said(attempt("import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)"))[1].strip()
        == "PermissionError"
    )
    assert (
        said(
            attempt(
                "import resource, os\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (3, 3))"
            )
        )[1].strip()
        == "PermissionError"
    )


@pytest.mark.parametrize(
    "early", ["raise SystemExit(0)", "import os\nos._exit(0)", "import sys\nsys.exit()"]
)
def test_ending_early_earns_nothing(early):
    for tests in (DOUBLE, CALL, CHECK):
        assert share_passed(early, tests) == 0
        assert share_passed("def f(x):\n    " + early.replace("\n", "\n    "), tests) == 0


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


def test_expected_results_are_nowhere_in_the_process():
    """The program searches its frames, all objects and all open files for the number that the tests expect."""
    assert call_function(HUNT, "f", [2]) is False
    assert call_function(HUNT, "f", [8315313370291]) is True  # the hunt finds what is there
    assert share_passed(HUNT, {"call": "f", "cases": [[[2], 8315313370291], [[3], False]]}) == 0.5
    check = "def check(candidate):\n    expected = 8315313370291\n    assert candidate(2) is False\n    assert expected == 8315313370291"
    assert passes_asserts(HUNT, "f", "", check)


@pytest.mark.parametrize(
    "program",
    [
        "class Yes:\n    def __eq__(self, other): return True\n    def __repr__(self): return '4'\ndef f(x): return Yes()",  # is 4 only where 4 is right
        "def f(x): return type('T', (int,), {'__eq__': lambda a, b: True})(1)",
        "def f(x): return {}.__class__",
        "def f(x): raise AssertionError",
        "import builtins\nbuiltins.print = lambda *a: None\nimport sys\nsys.modules['ast'] = None\ndef f(x): return 3",
        "def f(x):\n    while True: print('x' * 1000)",
        "def f(x): return '(' * 100000",
        "x = []\nfor i in range(100000): x = [x]\ndef f(_): return x",
        "import os\nos.write(1, b'4\\n10\\n'); os.close(1)\ndef f(x): return None",
        "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'4\\n' * 9)\n    except OSError: pass\ndef f(x): return None",
    ],
)
def test_forged_results(program):
    """Whatever a program hands back is read as a literal and compared outside: it can be right on the case that it guesses, never on all."""
    assert share_passed(program, CALL, seconds=3) < 1
    assert share_passed(program, CHECK, seconds=3) == 0


def test_a_machine_without_landlock_runs_nothing(monkeypatch):
    monkeypatch.setattr(sandbox, "ARCHES", {})
    with pytest.raises(OSError, match="no sandbox for"):
        isolation()


def test_it_says_what_it_is():
    done = subprocess.run(
        [sys.executable, "-m", "data.sandbox"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "sandbox: Landlock, seccomp" in done.stdout
