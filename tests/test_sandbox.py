"""The sandbox: right programs pass; hostile ones neither do harm nor earn a reward.

Every attack checks that it was stopped, not only that it failed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, needs_sandbox
from data import sandbox
from data.faults import UserError, counters
from data.inside import canonical, decode, encode
from data.problems import Problem, read_problems
from data.sandbox import fault_of_tests, isolation, passes_check, run, share_passed

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


def script(source, stdin="", seconds=5.0):
    """Runs a whole program once: its result."""
    [result] = run("script", [stdin], seconds, source=source)
    return result


# -------------------------------------------------------------------------- refused machines


@needs_sandbox
def test_this_machine_isolates():
    assert isolation() == "sandbox: bubblewrap, seccomp"


def fake_bubblewrap(folder, text):
    """Writes a bwrap that is a shell script."""
    path = folder / "bwrap"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


NO_NAMESPACES = "echo 'bwrap: No permissions to create new namespace' >&2; exit 1"
NOT_LOCKED_IN = 'while [ "$1" != "-s" ]; do python=$1; shift; done; exec "$python" "$@"'


@pytest.mark.parametrize(
    "bubblewrap, complaint",
    [
        (None, r"bubblewrap is missing \(apt-get install bubblewrap\)"),
        (NO_NAMESPACES, r"does not work here \(bwrap: No permissions to create new namespace\)"),
        ("exit 0", r"does not work here \(it ended without a word\)"),
        (NOT_LOCKED_IN, "does not work here"),
        (NOT_LOCKED_IN.replace("exec", f"cd {ROOT}; exec") + "/../data/inside.py", "does not work"),
    ],
)
def test_other_machines_are_refused(tmp_path, monkeypatch, bubblewrap, complaint):
    """Where bubblewrap is missing or does not work no program runs, and every one earns 0."""
    if bubblewrap:
        fake_bubblewrap(tmp_path, bubblewrap)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match=complaint):
        isolation()
    counters.clear()
    for tests in ({"stdin": [["", ""]]}, CALL, CHECK):
        assert share_passed("def f(x): return 2 * x", tests) == 0
    assert counters["sandbox_failed"] == 3


@needs_sandbox
def test_it_says_what_it_is():
    command = [sys.executable, "-m", "data.sandbox"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "sandbox: bubblewrap, seccomp" in done.stdout


# ---------------------------------------------------------------------------------- right and wrong


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
ASYNCIO = """
import asyncio
async def main():
    await asyncio.sleep(0)
    print(2 * int(input()))
asyncio.run(main())
"""
DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Pair:
    x: int
def f(x): return Pair(x * 2).x
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
        ("print(2 * int(open(0).read()))", DOUBLE, 1),
        ("print(4)", DOUBLE, 0.25),
        ("print(2 * int(input())); raise SystemExit(3)", DOUBLE, 0),
        ("print(2 * int(input()) or 1)", DOUBLE, 0.75),
        (MANY_IMPORTS_AND_A_THREAD, DOUBLE, 1),
        (NUMPY, DOUBLE, 1),
        (ASYNCIO, DOUBLE, 1),
        (DATACLASS, CALL, 1),
        ("def f(x): return x * 2", CALL, 1),
        (METHOD, CALL, 1),
        ("def f(x): return x + 2", CALL, 1 / 3),
        ("def f(x): return (1, 1) if x == [1] else 2 * x", CALL, 1),
        ("def g(x): return x * 2", CALL, 0),
        ("def f(x): return x * 2", CHECK, 1),
        (METHOD, CHECK, 1),
        ("def f(x): return 4", CHECK, 0),
        ("def f(x", DOUBLE, 0),
        ("def f(x", CALL, 0),
        ("def f(x", CHECK, 0),
        ("", DOUBLE, 0),
        ("\ud800\x00", DOUBLE, 0),
    ],
)
@needs_sandbox
def test_programs(program, tests, share):
    assert share_passed(program, tests, seconds=5) == pytest.approx(share)


RETURNED = [
    ("from collections import *\ndef f(): return Counter('aab')", {"a": 2, "b": 1}, True),
    (
        "from collections import *\ndef f():\n d = defaultdict(list); d[1] += [2]; return d",
        {"1": [2]},
        True,
    ),
    ("from collections import *\ndef f(): return OrderedDict(b=1, a=2)", {"a": 2, "b": 1}, True),
    ("import numpy as np\ndef f(): return [np.int64(3), np.float32(0.5)]", [3, 0.5], True),
    ("import numpy as np\ndef f(): return np.arange(3), np.bool_(True)", [[0, 1, 2], True], True),
    ("def f(): return float('inf'), -float('inf')", [float("inf"), -float("inf")], True),
    ("import enum\nclass E(str, enum.Enum):\n A = 'a'\ndef f(): return E.A", "a", True),
    ("import enum\nclass E(enum.IntEnum):\n A = 1\ndef f(): return E.A", 1, True),
    ("from collections import namedtuple\ndef f(): return namedtuple('P', 'x')(1)", [1], True),
    ("def f(): return 2.0, True, None, 10**20", [2, 1, None, 10**20], True),
    ("def f(): return 1", True, True),
    ("def f(): return 1e300", int(1e300), True),
    ("def f(): return [1, 2]", [2, 1], False),
    ("def f(): return '1'", 1, False),
    ("def f(): return {1, 2}", [1, 2], False),
    ("def f(): return 0.1 + 0.2", 0.3, False),
    ("def f(): return {'a': 2}", {"a": 2, "b": 1}, False),
    ("def f(): return None", False, False),
    ("def f(): return (x for x in [1])", [1], False),
]


@pytest.mark.parametrize("program, expected, right", RETURNED)
@needs_sandbox
def test_results_are_compared_by_value(program, expected, right):
    assert share_passed(program, {"call": "f", "cases": [[[], expected]]}) == right


RAISES = """
def check(candidate):
    try:
        candidate(-1)
    except ValueError as fault:
        assert "negative" in str(fault)
    else:
        raise AssertionError
    assert candidate(4) == 2
"""
# A judge of a public set, which takes any fault: it runs inside, not here.
RAISES_SOMETHING = "def check(c):\n try: c(-1)\n except Exception: return\n raise AssertionError"
KEYWORDS = "def check(candidate):\n assert candidate(1, y=[2], z={'a': (3,)}) == (1, [2], (3,))"
VALUES = """
import math
def check(candidate):
    assert candidate('counter') == {'a': 2, 'b': 1}
    assert candidate('sets') == {frozenset({1}), frozenset()}
    assert candidate('keys') == {1, 2}
    assert candidate('odd') == (1j, b'x', -math.inf, None, 10 ** 5000)
    assert math.isnan(candidate('nan'))
    assert candidate('numpy') == [3, 0.5]
"""
VALUES_PROGRAM = """
import collections, math
import numpy as np
def f(what):
    return {
        'counter': collections.Counter('aab'),
        'sets': {frozenset({1}), frozenset()},
        'keys': {1: 0, 2: 0}.keys(),
        'odd': (1j, b'x', -math.inf, None, 10 ** 5000),
        'nan': math.nan,
        'numpy': [np.int64(3), np.float32(0.5)],
    }[what]
"""
ROOT_OF = "def f(x):\n if x < 0: raise {}\n return x ** 0.5"
OWN_CLASS = "class Mine(ValueError): pass\n" + ROOT_OF.format("Mine('negative')")


@pytest.mark.parametrize(
    "program, check, right",
    [
        (VALUES_PROGRAM, VALUES, True),
        ("def f(x, y, z): return x, y, z['a']", KEYWORDS, True),
        ("def f(x, y): return x, y", KEYWORDS, False),
        (ROOT_OF.format("ValueError('negative')"), RAISES, True),
        (OWN_CLASS, RAISES, True),
        (ROOT_OF.format("KeyError('negative')"), RAISES, False),
        (ROOT_OF.format("SystemExit"), RAISES_SOMETHING, False),
        (ROOT_OF.format("UnicodeDecodeError('a', b'', 0, 1, 'b')"), RAISES_SOMETHING, True),
        ("import os\ndef f(x): os._exit(0)", RAISES_SOMETHING, False),
        ("def f(x): return 1", RAISES_SOMETHING, False),
        ("def f(x): return (y for y in [x])", RAISES_SOMETHING, False),
    ],
)
@needs_sandbox
def test_checks_may_use_keywords_and_expect_exceptions(program, check, right):
    tests = {"call": "f", "check": check}
    assert passes_check(program, tests, seconds=3) is right


def test_codecs_agree_with_python():
    values = [1, -0.5, "é\ud800", None, [1, (2,)], {"a": {1: {2}}}, (), frozenset({(1,)}), b"\x00"]
    for value in values:
        back = decode(encode(value))
        assert back == value and type(back) is type(value)
    assert canonical((1.0, -0.0)) == canonical([True, 0])
    with pytest.raises(ValueError, match="no plain value"):
        canonical(object())
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        canonical(deep)


@needs_sandbox
def test_a_program_has_limited_time_for_all_its_tests(monkeypatch):
    """Tests that do not get a turn fail; those that passed before count."""
    monkeypatch.setattr(sandbox, "PROGRAM_SECONDS", 2.5)
    slow = "n = int(input())\nwhile n: pass\nprint(0)"
    cases = [["0", "0"]] + [["1", "0"]] * 50 + [["0", "0"]]
    assert share_passed(slow, {"stdin": cases}, seconds=1) == 1 / 52


@needs_sandbox
def test_large_arguments_and_results():
    """Larger than a pipe holds; also for a program that never reads them."""
    numbers = list(range(100_000))
    case = [[numbers], numbers[::-1]]
    assert share_passed("def f(x): return x[::-1]", {"call": "f", "cases": [case]}) == 1
    result = script("print(input()[::-1])", "ab" * 200_000)
    assert result.output == b"ba" * 200_000 + b"\n"
    assert script("print(len(input()))", "1" * 3_000_000).output == b"3000000\n"
    endless = "while True: pass"
    assert share_passed(endless, {"call": "f", "cases": [[[numbers], 1]]}, seconds=0.3) == 0
    assert share_passed(endless, {"stdin": [["1" * 400_000, "1"]]}, seconds=0.3) == 0
    assert share_passed(endless, CHECK, seconds=0.3) == 0


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


# --------------------------------------------------------------------------------- malformed tests

DEEP = "[" * 200 + "]" * 200
MALFORMED = [
    (None, "must be an object with stdin"),
    ([], "must be an object with stdin"),
    ({}, "must be an object with stdin"),
    ({"stdin": []}, "needs a list of pairs"),
    ({"stdin": "1 2"}, "needs a list of pairs"),
    ({"stdin": [["1", "2"], ["1"]]}, "case 2 is no pair"),
    ({"stdin": ["12"]}, "case 1 is no pair"),
    ({"stdin": [["1", 2]]}, "case 1: input and output must be text"),
    ({"call": "f"}, "holds call; it needs"),
    ({"stdin": [["1", "2"]], "call": "f"}, "holds call, stdin; it needs"),
    ({"call": "f", "cases": [[1, 2]]}, "case 1: the arguments must be a list"),
    ({"call": "f", "cases": [[[1]]]}, "case 1 is no pair"),
    ({"call": "f", "cases": {"1": 2}}, "needs a list of pairs"),
    ({"call": 1, "cases": [[[1], 2]]}, "call must be the name of a function"),
    ({"call": "f x", "cases": [[[1], 2]]}, "call must be the name of a function"),
    ({"call": "f", "cases": [[[1], eval(DEEP)]]}, "case 1: nested too deeply"),
    ({"call": "f", "check": 1}, "check must be text"),
    ({"call": "f", "check": "assert candidate(1)"}, "must define the function check"),
    ({"call": "f", "check": "def check(c: pass"}, "check is no Python code"),
    ({"call": "f", "check": "def check(c): pass\0"}, "check is no Python code"),
    ({"call": "f", "check": CHECK["check"], "setup": ["x"]}, "setup must be text"),
    ({"call": "f", "check": CHECK["check"], "setup": "def"}, "setup is no Python code"),
    ({"call": "f", "check": CHECK["check"], "stpu": ""}, "holds call, check, stpu"),
]


def test_malformed_tests_are_refused_when_they_are_read(tmp_path):
    """With file and line: none of them reaches a program."""
    for number, (tests, complaint) in enumerate(MALFORMED):
        assert complaint in fault_of_tests(tests), tests
        path = tmp_path / f"{number}.jsonl"
        right = {"question": "?", "kind": "code", "tests": DOUBLE}
        lines = [json.dumps(right), json.dumps(right | {"tests": tests})]
        path.write_text("\n".join(lines))
        with pytest.raises(UserError, match=f"{number}.jsonl, line 2: field 'tests' .*"):
            read_problems(path)
    for tests in (DOUBLE, CALL, CHECK, {"call": "f", "check": CHECK["check"]}):
        assert fault_of_tests(tests) is None


# ---------------------------------------------------------------------------------------- attacks


ATTEMPT = """
import ctypes, errno, os, sys

def call(name, *args):
    number = ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name(name.encode())
    assert number >= 0
    whole = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    value = ctypes.CDLL(None, use_errno=True).syscall(number, *whole)
    if value < 0:
        raise OSError(ctypes.get_errno(), "")
    return value

text = ctypes.create_string_buffer(4096)
place = (ctypes.c_void_p * 2)(ctypes.addressof(text), 9)
try:
    exec(sys.stdin.read())
    print("done")
except OSError as fault:
    print(errno.errorcode.get(fault.errno, type(fault).__name__))
except BaseException as fault:
    print(repr(fault))
"""  # runs its input; prints "done", or what stopped it
NOT_ALLOWED = "EPERM EACCES ENOENT ESRCH EROFS".split()
ME = os.getpid()


def attempts(attacks, seconds=5.0):
    """Runs attacks, one after another: what each printed last, or its exit status."""
    outcomes = []
    for result in run("script", attacks, seconds, source=ATTEMPT):
        lines = result.output.decode().split()
        outcomes.append(lines[-1] if lines else result.status)
    return outcomes


ON_OTHER_PROCESSES = [
    f"os.kill({ME}, 9)",
    f"os.killpg({os.getpgid(0)}, 9)",
    f"call('ptrace', 16, {ME}, 0, 0)",
    f"call('process_vm_readv', {ME}, place, 1, place, 1, 0)",
    f"call('process_vm_writev', {ME}, place, 1, place, 1, 0)",
    f"call('pidfd_open', {ME}, 0)",
    f"call('kcmp', {ME}, {ME}, 0, 0, 0)",
    f"call('migrate_pages', {ME}, 8, text, text)",
    f"call('rt_sigqueueinfo', {ME}, 9, (ctypes.c_int * 32)(9, 0, -1))",
    f"os.sched_setaffinity({ME}, [0])",
    f"os.sched_setscheduler({ME}, os.SCHED_IDLE, os.sched_param(0))",
    f"os.sched_setparam({ME}, os.sched_param(0))",
    f"call('ioprio_set', 1, {ME}, 3 << 13)",
    f"os.setpriority(os.PRIO_PROCESS, {ME}, 19)",
    f"os.setpriority(os.PRIO_PGRP, {os.getpgid(0)}, 19)",
    f"import resource as r; r.prlimit({ME}, r.RLIMIT_NOFILE, (3, 3))",
    f"import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, {ME})",
    f"import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, -{os.getpgid(0)})",
    f"import fcntl; fcntl.fcntl(os.pipe()[0], 15, (ctypes.c_int * 2)(1, {ME}))",  # F_SETOWN_EX
    f"open('/proc/{ME}/mem', 'r+b')",
    f"open('/proc/{ME}/environ')",
    "open('/proc/1/environ')",
    "os.kill(-1, 9)",  # nobody else is there
    # the server: process 1 of the program's own namespace
    "call('ptrace', 16, 1, 0, 0)",
    "call('ptrace', 0x4206, 1, 0, 0)",
    "call('process_vm_readv', 1, place, 1, place, 1, 0)",
    "call('pidfd_getfd', call('pidfd_open', 1, 0), 1, 0)",
    "call('kcmp', 1, os.getpid(), 0, 0, 0)",
]
NEW_PROCESSES_AND_NAMESPACES = [
    "os.fork()",
    "call('fork')",
    "call('vfork')",
    "call('clone', 17, 0, 0, 0, 0)",
    "call('clone', 0x10000000 | 17, 0, 0, 0, 0)",  # a new user namespace
    "os.posix_spawn(sys.executable, ['python'], {})",
    "import subprocess; subprocess.run([sys.executable])",
    "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
    "os.execv('/bin/sh', ['sh'])",
    "call('unshare', 0x10000000)",
    "call('unshare', 0x20000)",
    "call('setns', call('pidfd_open', 1, 0), 0x10000000)",
    "call('mount', b'x', b'/empty', b'tmpfs', 0, 0)",
    "call('mount', b'', b'/', b'', 32 | 4096, 0)",  # remount it writable
    "call('umount2', b'/usr/lib', 2)",
    "call('pivot_root', b'/', b'/empty')",
    "call('fsopen', b'tmpfs', 0)",
    "call('open_tree', -100, b'/', 1)",
    "os.chroot('/empty')",
    "os.setgroups([])",
    "call('capset', (ctypes.c_uint * 2)(0x20080522, 0), (ctypes.c_uint * 6)(1 << 21, 1 << 21))",
    "call('prctl', 47, 2, 21, 0, 0)",  # raises an ambient capability
]
KERNEL = [
    "call('shmget', 1, 4096, 0o1600)",
    "call('semget', 1, 1, 0o1600)",
    "call('msgget', 1, 0o1600)",
    "call('add_key', b'user', b'x', b'data', 4, -3)",
    "call('request_key', b'user', b'x', 0, -3)",
    "call('keyctl', 0, -3, 0, 0, 0)",
    "call('io_uring_setup', 8, text)",
    "call('bpf', 0, text, 64)",
    "call('perf_event_open', text, 0, -1, -1, 0)",
    "call('userfaultfd', 0)",
    "call('syslog', 10, 0, 0)",
    "call('sethostname', b'x', 1)",
    "call('settimeofday', text, 0)",
    "call('acct', 0)",
    "call('swapoff', b'/x')",
    "call('fanotify_init', 0, 0)",
    "import socket; socket.socket(socket.AF_UNIX).bind(b'\\0abstract')",
    "import socket; socket.socket(socket.AF_INET)",
    "import socket; socket.socket(socket.AF_INET6)",
    "import socket; socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
]
NEW_FILES = [
    "open('mine', 'w')",
    "open('/tmp/new', 'w')",
    "open('/new', 'w')",
    "open('/dev/shm/new', 'w')",
    "open('/inside.py', 'a')",
    "for _ in range(20000): os.mkdir('d'); os.chdir('d')",
    "os.symlink('/etc', 'link')",
    "os.mkfifo('pipe')",
    "os.mknod('device', 0o60666, os.makedev(254, 0))",
    "open('/dev/tty', 'w')",
    "open('/dev/null', 'w')",
    "os.chmod('/usr/lib', 0o777)",
    "os.utime('/usr/lib')",
    "os.setxattr('/usr/lib', 'user.x', b'1')",
    "os.chmod(sys.executable, 0o777)",
    "os.rename('/inside.py', '/empty/x')",
    "os.link('/inside.py', '/empty/x')",
    "os.remove('/inside.py')",
]


@pytest.mark.parametrize(
    "attacks",
    [ON_OTHER_PROCESSES, NEW_PROCESSES_AND_NAMESPACES, KERNEL, NEW_FILES],
    ids=["processes", "namespaces", "kernel", "files"],
)
@needs_sandbox
def test_what_is_not_allowed(attacks):
    affinity = os.sched_getaffinity(0)
    policy = os.sched_getscheduler(0)
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    shared = [Path(f"/proc/sysvipc/{kind}").read_text() for kind in ("shm", "sem", "msg")]
    for attack, outcome in zip(attacks, attempts(attacks), strict=True):
        assert outcome in NOT_ALLOWED, attack
    assert os.sched_getaffinity(0) == affinity
    assert os.sched_getscheduler(0) == policy
    assert os.getpriority(os.PRIO_PROCESS, 0) == nice
    assert [Path(f"/proc/sysvipc/{kind}").read_text() for kind in ("shm", "sem", "msg")] == shared


@needs_sandbox
def test_no_file_outside_is_seen_or_changed(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("the expected answers")
    os.setxattr(data, "user.mine", b"1")
    before = data.stat()
    paths = [data, ROOT / "README.md", ROOT / "data", "/etc/passwd", "/usr/bin/env", "/proc/1/mem"]
    attacks = []
    for path in paths:
        name = repr(str(path))
        attacks += [
            f"open({name}).read()",
            f"open({name}, 'a')",
            f"os.listdir({name})",
            f"os.truncate({name}, 0)",
            f"os.chmod({name}, 0)",
            f"os.utime({name})",
            f"os.setxattr({name}, 'user.x', b'1')",
            f"os.removexattr({name}, 'user.mine')",
            f"os.link({name}, 'link')",
            f"os.remove({name})",
        ]
    for attack, outcome in zip(attacks, attempts(attacks), strict=True):
        reads = "read" in attack or "listdir" in attack
        assert outcome == "ENOENT" or (outcome == "EROFS" and not reads), attack
    assert data.read_text() == "the expected answers"
    assert (data.stat().st_mode, data.stat().st_mtime) == (before.st_mode, before.st_mtime)
    assert os.listxattr(data) == ["user.mine"]


TREE = """
import os
names = []
for folder, below, files in os.walk("/"):
    if folder in ("/", "/usr"):
        below[:] = set(below) - {"lib", "lib64"}
    if "site-packages" in below:
        below.remove("site-packages")
    names += files
print(os.getcwd(), os.listdir("."), dict(os.environ))
print("srpo.py" in names, "test_sandbox.py" in names, [n for n in names if ".jsonl" in n])
"""


@needs_sandbox
def test_what_a_program_sees(monkeypatch):
    """Nothing of this process's environment, and no data set anywhere."""
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    seen, found = script(TREE).output.decode().splitlines()
    assert seen.startswith("/empty [] {") and "hunter2" not in seen
    assert found == "False False []"


IGNORE_SIGNALS = """
import signal
for s in range(1, 32):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
"""
SIGNALS_TO_ALL = """
import fcntl, os
for s in range(1, 65):
    try: os.kill(1, s)
    except OSError: pass
print("alive", flush=True)
r, w = os.pipe()
for target in (1, -1, os.getppid(), -os.getpgid(0), os.getpid()):
    for fd in (0, 1, 2, r, w):
        try:
            fcntl.fcntl(fd, fcntl.F_SETOWN, target)
            fcntl.fcntl(fd, 10, 9)  # F_SETSIG
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
        except OSError: pass
    os.write(w, b"x")
print("alive")
"""
THREAD_BOMB = """
import threading, time
threading.stack_size(1 << 15)
while True:
    try: threading.Thread(target=time.sleep, args=(99,)).start()
    except RuntimeError: pass
"""
CALLS_OF_32_BITS = """
import ctypes, mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write(bytes([0xB8, 2, 0, 0, 0, 0xCD, 0x80, 0xC3]))  # fork
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())
"""


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import os\nos.close(1); os.close(0)\nwhile True: pass",
        "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
        IGNORE_SIGNALS,
        THREAD_BOMB,
    ],
)
@needs_sandbox
def test_endless_programs_end(program):
    """And the next input gets its turn."""
    endless = f"stop = input()\nif stop: print('stopped'); raise SystemExit\n{program}"
    first, second = run("script", ["\n", "yes\n"], 1, source=endless)
    assert first.status == -9
    assert second.output == b"stopped\n"


@needs_sandbox
def test_signals_reach_nobody():
    first, second = run("script", ["", ""], source=SIGNALS_TO_ALL)
    assert first.output.startswith(b"alive\n") and first.output == second.output


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="machine code of x86-64")
@needs_sandbox
def test_calls_of_other_architectures_end_the_program():
    assert script(CALLS_OF_32_BITS).status == -signal.SIGSYS
    x32 = "import ctypes\nprint(ctypes.CDLL(None).syscall(0x40000000 + 57))"
    assert script(x32).status == -signal.SIGSYS


@needs_sandbox
def test_memory_and_output_are_bounded():
    grow = "x = []\nwhile True: x.append(bytes(1 << 24))"
    in_files = "while True: os.posix_fallocate(os.memfd_create('x'), 0, 1 << 20)"
    in_messages = (
        "import socket\na, b = socket.socketpair()\na.setblocking(False)\n"
        "while True: fd = os.memfd_create('x'); socket.send_fds(a, [b'x'], [fd]); os.close(fd)"
    )
    queue = "call('mq_open', b'x', 0o102, 0o600, 0)"
    attacks = {
        "x = bytearray(4 << 30)": "MemoryError()",
        grow: "MemoryError()",
        in_files: "EMFILE",
        in_messages: "ETOOMANYREFS",
        queue: "EMFILE",
        "fd = os.memfd_create('x'); os.write(fd, b'x' * (2 << 20)); os.write(fd, b'x')": "EFBIG",
        "os.ftruncate(os.memfd_create('x'), 2 << 20)": "EFBIG",
        "call('fallocate', os.memfd_create('x'), 1, 0, 9 << 20)": ("EFBIG"),
        "ctypes.string_at(0)": -signal.SIGSEGV,
    }
    for (attack, bound), outcome in zip(attacks.items(), attempts(list(attacks)), strict=True):
        assert outcome == bound, attack
    flood = script("import sys\nwhile True: sys.stdout.write('x' * 65536)")
    assert flood.status != 0 and len(flood.output) == sandbox.OUTPUT


@pytest.mark.parametrize(
    "early", ["raise SystemExit(0)", "import os\nos._exit(0)", "import sys\nsys.exit()"]
)
@needs_sandbox
def test_ending_early_earns_nothing(early):
    indented = early.replace("\n", "\n    ")
    for tests in (DOUBLE, CALL, CHECK):
        assert share_passed(early, tests) == 0
        assert share_passed(f"def f(x):\n    {indented}", tests) == 0


@needs_sandbox
def test_a_program_can_end_its_own_server_only():
    """The inputs that follow have no result; it is counted."""
    counters.clear()
    limit = "import resource as r\nprint(4)\nr.prlimit(1, r.RLIMIT_NOFILE, (0, 0))"
    assert share_passed(limit, {"stdin": [["", "4"]] * 3}) < 1
    assert counters["sandbox_died"] == 1


# ------------------------------------------------------------------------ hidden and forged results

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
    for fd in range(64):
        try: found.append(repr(os.pread(fd, 4096, 0)))
        except OSError: pass
    return any("".join(["83153", "13370291"]) in f for f in found)
def f(x): return look()
"""
HUNT_CHECK = f"""
def check(candidate):
    expected = {EXPECTED}
    assert candidate(2) is False
    assert candidate({EXPECTED}) is True
"""


@needs_sandbox
def test_expected_results_are_nowhere_in_the_process():
    """A program searches frames, objects and open files for the number that the tests expect."""
    assert share_passed(HUNT, {"call": "f", "cases": [[[2], EXPECTED], [[3], False]]}) == 0.5
    assert share_passed(HUNT, {"call": "f", "cases": [[[EXPECTED], True]]}) == 1  # it finds
    assert share_passed(HUNT, {"call": "f", "check": HUNT_CHECK}) == 1
    hunt = HUNT + "input()\nprint(look())"
    assert share_passed(hunt, {"stdin": [["2\n", str(EXPECTED)], ["3\n", "False"]]}) == 0.5


EQUAL_TO_ALL = """
class Yes:
    def __eq__(self, other): return True
    def __repr__(self): return '4'
def f(x): return Yes()
"""
BROKEN_MODULES = """
import builtins
builtins.print = lambda *a: None
import sys
sys.modules['ast'] = sys.modules['json'] = None
def f(x): return 3
"""
OWN_ENCODER = """
import sys
inside = sys.modules['__main__']
inside.canonical = lambda value: b'4'
inside.encode = lambda value: ['dict', ['tuple', 'value', 4]]
inside.PASSED = b'passed'
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
for fd in range(1, 20):
    try: os.write(fd, {junk})
    except OSError: pass
def f(x): return None
"""
JUNK = [
    r"b'4\n' * 9",
    r"b'{[]}\n'",
    r"b'1' + b'0' * 400 + b'+1j\n'",
    "b'passed'",
    r"b'[' * 800_000 + b'\n'",
    r"""b'["dict", ["tuple", "value", ["list", 4]]]\n'""",
    r"""b'["dict", ["tuple", "raised", "SystemExit"], ["tuple", "text", ""]]\n'""",
    "bytes(range(256)) * 4000",
    r"b'\x00\x00\x00\x00\xff\xff\xff\xff'",
]


@pytest.mark.parametrize(
    "program",
    [
        EQUAL_TO_ALL,
        "def f(x): return type('T', (int,), {'__eq__': lambda a, b: True})(1)",
        "def f(x): return {}.__class__",
        "def f(x): raise AssertionError",
        BROKEN_MODULES,
        OWN_ENCODER,
        "def f(x):\n    while True: print('x' * 1000)",
        "def f(x): return '(' * 900_000",
        DEEP_LIST,
        WRITES_TO_STDOUT,
        *[WRITES_TO_ALL_FILES.format(junk=junk) for junk in JUNK],
    ],
)
@needs_sandbox
def test_forged_results(program):
    """Results are bytes that are compared outside: a guess is right once, not always.

    Nothing that a program writes ends the run: grading returns a number.
    """
    assert Problem(0, "?", "", "code", tests=CALL).grade(f"```python\n{program}\n```") < 1
    assert share_passed(program, CHECK, seconds=2) == 0


# ------------------------------------------------------------------------------- nothing outlives


TRAINER = """
import sys
from data.sandbox import share_passed
endless = "while True: pass"
share_passed(endless, {tests}, seconds=50)
"""
STOPPED = """
import time
from data.driver import graders
from data.parallel import StopRequest
from data.sandbox import share_passed
stop = StopRequest()
for _ in range(50):
    graders().apply_async(share_passed, ["while True: pass", {tests}, 50])
while True: time.sleep(1)
"""


def descendants(pid):
    """The processes below a process, those of sandboxes among them."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def start(source, tests, least):
    """Starts a trainer; returns it and what runs below it once programs run."""
    command = [sys.executable, "-c", source.format(tests=tests)]
    trainer = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len(descendants(trainer.pid)) >= least)
    except (AssertionError, OSError):
        trainer.kill()
        raise
    return trainer, descendants(trainer.pid)


@pytest.mark.parametrize("tests, least", [({"stdin": [["", ""]]}, 3), (CHECK, 6)])
@needs_sandbox
def test_programs_end_with_a_killed_trainer(tests, least):
    """bubblewrap, the server and the program's process, of both sandboxes where tests are code."""
    trainer, below = start(TRAINER, tests, least)
    assert all(alive(pid) for pid in below)
    trainer.kill()
    trainer.wait()
    wait_until(lambda: not any(alive(pid) for pid in below))


@needs_sandbox
def test_a_second_interrupt_does_not_wait_for_programs():
    """Dozens of programs that would run for 50 seconds each are queued."""
    trainer, below = start(STOPPED, {"stdin": [["", ""]]}, 3)
    trainer.send_signal(signal.SIGINT)
    assert "stopping after this step" in trainer.stderr.readline() + trainer.stderr.readline()
    assert trainer.poll() is None
    trainer.send_signal(signal.SIGINT)
    assert trainer.wait(30) == -signal.SIGINT
    wait_until(lambda: not any(alive(pid) for pid in below))


@needs_sandbox
def test_nothing_stays_behind():
    """No process, no open file, no thread."""
    share_passed("print(4)", DOUBLE)
    before = len(os.listdir("/proc/self/fd"))
    others = set(descendants(os.getpid()))  # workers of other tests
    for tests in (DOUBLE, CALL, CHECK):
        share_passed("import os\nwhile True: pass", tests, seconds=0.2)
    assert len(os.listdir("/proc/self/fd")) == before
    wait_until(lambda: set(descendants(os.getpid())) <= others)
