"""Runs model-written Python programs against tests, where they can do no harm and cannot see what is expected of them.

Each run is a process of its own: own session, empty environment, an empty working directory that is removed, and before the program starts
  - limits on CPU time, memory, open files, and the size of files and of output; the parent kills the process group at the wall-clock limit;
  - Landlock: reads only Python and the system's libraries, writes only its working directory (so no data set, no other test);
  - seccomp: no new processes (threads are fine), no signals to others, no sockets, no ptrace, no mounts, no execve;
  - a network namespace without any device, where the kernel lets an unprivileged process have one (`isolation` says).
A machine without Landlock or seccomp (Linux 5.13, x86-64 or aarch64) does not run programs at all: `isolation` raises.

The expected results never enter the program's process: outputs and returned values come back as text and Python literals (`ast.literal_eval`)
and are compared outside. Tests that are code themselves (asserts) run in a second sandbox, whose `candidate` asks the first one.

Left out: other languages, and tests that need an interactive judge.

Try it alone:  python -m data.sandbox        # what isolates here; a right, a wrong and a hostile program
"""

import ast
import ctypes
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SECONDS = 6.0  # wall clock per test, and CPU time
PROGRAM_SECONDS = 60.0  # wall clock of all tests of a program together; the tests that do not come to their turn are failed
MEMORY = 1 << 30  # bytes of address space
OUTPUT = 1 << 20  # bytes of a file, and of output


# ------------------------------------------------------------------------------------------- inside: giving up what is not needed

# arch token of seccomp, and the numbers of system calls
ARCHES = {
    "x86_64": (0xC000003E, dict(
        clone=56, clone3=435, denied=[57, 58, 59, 322, 62, 200, 234, 424, 434, 129, 297, 101, 310, 311, 41, 53, 42, 49, 272, 308, 165, 425, 321, 298, 302, 141, 250],
        landlock=444, prctl=157)),
    "aarch64": (0xC00000B7, dict(
        clone=220, clone3=435, denied=[221, 281, 129, 130, 131, 424, 434, 138, 240, 117, 270, 271, 198, 199, 203, 200, 97, 268, 40, 425, 280, 241, 261, 140, 219],
        landlock=444, prctl=167)),
}  # fmt: skip
NEW_USER, NEW_NET, THREAD = 0x10000000, 0x40000000, 0x10000
READ, WRITE_FILE, EVERYTHING = (
    0b1100,
    0b10,
    (1 << 13) - 1,
)  # Landlock, first version: read file and directory; write a file; all 13 rights


def libc_call(name: str, *args) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = getattr(libc, name)(*args)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def lock_files(readable: list[str], writable: list[str]) -> None:
    """Landlock: from here on only these folders and files. Raises OSError where the kernel has no Landlock."""
    call = ARCHES[os.uname().machine][1]["landlock"]
    handled = ctypes.create_string_buffer(struct.pack("=Q", EVERYTHING))
    rules = libc_call("syscall", call, handled, 8, 0)
    for path, rights in (
        [(p, READ) for p in readable]
        + [(p, READ | WRITE_FILE) for p in writable[1:]]
        + [(writable[0], EVERYTHING)]
    ):
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH)
            if not os.path.isdir(path):
                rights &= 0b111  # execute, write, read
            libc_call(
                "syscall",
                call + 1,
                rules,
                1,
                ctypes.create_string_buffer(struct.pack("=Qi", rights, fd)),
                0,
            )
            os.close(fd)
    libc_call("syscall", call + 2, rules, 0)
    os.close(rules)


def lock_calls() -> None:
    """seccomp: the denied system calls fail with EPERM. Raises OSError where the kernel has no seccomp."""
    arch, calls = ARCHES[os.uname().machine]
    load, equal, at_least, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, unknown, kill = (
        0x7FFF0000,
        0x00050001,
        0x00050026,
        0x80000000,
    )  # EPERM = 1, ENOSYS = 38 (then threads use clone)
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, arch),
        (give, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),
        (give, 0, 0, deny),
    ]
    program += [(equal, 0, 1, calls["clone3"]), (give, 0, 0, unknown)]
    for number in calls["denied"]:
        program += [(equal, 0, 1, number), (give, 0, 0, deny)]
    program += [
        (equal, 0, 3, calls["clone"]),
        (load, 0, 0, 16),
        (bits, 1, 0, THREAD),
        (give, 0, 0, deny),
        (give, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    filter = ctypes.create_string_buffer(struct.pack("=H6xQ", len(program), ctypes.addressof(code)))
    libc_call("prctl", 22, 2, filter)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def lock(memory: int, seconds: float) -> None:
    """Everything together, for the rest of this process's life."""
    cwd = os.getcwd()
    if hasattr(ctypes.CDLL(None), "unshare"):
        ctypes.CDLL(None).unshare(
            NEW_USER | NEW_NET
        )  # may fail: sockets are denied below all the same
    for what, most in ((resource.RLIMIT_CPU, int(seconds) + 1), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, OUTPUT), (resource.RLIMIT_NOFILE, 64),
                       (resource.RLIMIT_CORE, 0)):  # fmt: skip
        resource.setrlimit(what, (most, most))
    libc_call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    python = [sys.prefix, sys.base_prefix, *(p for p in sys.path if os.path.isdir(p))]
    lock_files(
        [*python, "/usr", "/lib", "/lib64", "/bin", "/dev/urandom", "/dev/zero"], [cwd, "/dev/null"]
    )
    lock_calls()


def literal(value) -> str:
    """repr of a value that `ast.literal_eval` reads back as the same. Raises ValueError for anything else."""
    text = repr(value)
    if ast.literal_eval(text) != value:
        raise ValueError("not a literal")
    return text


def inside(mode: str, memory: str, seconds: str, arguments: str) -> None:
    """The process's own main. Modes: `script` is the program with the test's stdin; `serve` answers calls of its function; `judge` runs tests."""
    source, *rest = json.loads(
        sys.stdin.buffer.read(int(arguments))
        if mode != "script"
        else Path("program.json").read_text()
    )
    if mode == "script":
        os.remove("program.json")
    sys.setrecursionlimit(100_000)
    scope = {"__name__": "__main__" if mode == "script" else "solution"}
    lock(int(memory), float(seconds))
    if mode == "script":
        exec(compile(source, "program", "exec"), scope)
    elif mode == "serve":
        name, read, write = rest
        asked, answers = os.fdopen(read), os.fdopen(write, "w")
        exec(compile(source, "program", "exec"), scope)
        function = (
            scope[name]
            if name in scope or "Solution" not in scope
            else getattr(scope["Solution"](), name)
        )
        for line in asked:
            answers.write(literal(function(*ast.literal_eval(line))).replace("\n", " ") + "\n")
            answers.flush()
    else:
        tests, name, read, write, token = rest
        answers, asks = os.fdopen(read), os.fdopen(write, "w")

        def candidate(*args):
            asks.write(literal(args).replace("\n", " ") + "\n")
            asks.flush()
            line = answers.readline()
            if not line:
                raise RuntimeError("the program ended")
            return ast.literal_eval(line)

        exec(compile(source, "setup", "exec"), scope)
        scope[name] = candidate
        exec(compile(tests, "tests", "exec"), scope)
        scope["check"](candidate)
        print(token)


# --------------------------------------------------------------------------------------------------- outside: running and comparing


class Process:
    """A sandboxed process. fds: file descriptors that it keeps besides its own output file."""

    def __init__(
        self,
        mode: str,
        message: list,
        stdin: str | None = None,
        fds=(),
        memory: int = MEMORY,
        seconds: float = SECONDS,
    ):
        self.folder = tempfile.mkdtemp(prefix="program-")
        self.output = tempfile.TemporaryFile()
        body = json.dumps(message).encode("utf-8", "surrogatepass")
        given = tempfile.TemporaryFile()
        if mode == "script":
            Path(self.folder, "program.json").write_bytes(body)
            given.write((stdin or "").encode("utf-8", "replace"))
        else:
            given.write(body)
        given.seek(0)
        command = [
            sys.executable,
            "-I",
            "-u",
            str(Path(__file__).resolve()),
            mode,
            str(memory),
            str(seconds),
            str(len(body)),
        ]
        self.process = subprocess.Popen(
            command,
            stdin=given,
            stdout=self.output,
            stderr=subprocess.DEVNULL,
            env={},
            cwd=self.folder,
            start_new_session=True,
            pass_fds=tuple(fds),
        )
        given.close()

    def end(self, seconds: float) -> tuple[int | None, str]:
        """(exit status, None if it had to be killed; at most OUTPUT bytes of what it printed). Removes all that it left."""
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended, and nothing else was in its session
        self.process.wait()
        self.output.seek(0)
        text = self.output.read(OUTPUT).decode("utf-8", "replace")
        self.output.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return status, text


def run_script(
    source: str, stdin: str, seconds: float = SECONDS, memory: int = MEMORY
) -> tuple[int | None, str]:
    """A whole program with its stdin: (exit status or None if killed, stdout)."""
    return Process("script", [source], stdin, memory=memory, seconds=seconds).end(seconds)


def call_function(
    source: str, name: str, args: list, seconds: float = SECONDS, memory: int = MEMORY
):
    """What `name` (a function, or a method of class Solution) of a program returns for the args. Raises ValueError where it returns no literal."""
    with (
        tempfile.TemporaryFile() as asked,
        tempfile.TemporaryFile() as answers,
    ):  # files: a pipe that nobody reads would block us or it
        asked.write(literal(tuple(args)).replace("\n", " ").encode() + b"\n")
        asked.seek(0)
        fds = (asked.fileno(), answers.fileno())
        Process("serve", [source, name, *fds], fds=fds, seconds=seconds, memory=memory).end(seconds)
        answers.seek(0)
        line = answers.read(OUTPUT).split(b"\n")[0]
    try:
        return ast.literal_eval(line.decode("utf-8", "replace"))
    except (SyntaxError, ValueError, MemoryError, RecursionError) as fault:
        raise ValueError(f"no literal came back ({type(fault).__name__})")


def passes_asserts(
    source: str, name: str, setup: str, tests: str, seconds: float = SECONDS, memory: int = MEMORY
) -> bool:
    """Whether `check(candidate)` of the tests goes through with the program's function. `setup` is what the tests may use besides (a prompt)."""
    (asked, ask), (answers, answer) = os.pipe(), os.pipe()
    program = Process(
        "serve", [source, name, asked, answer], fds=(asked, answer), seconds=seconds, memory=memory
    )
    token = os.urandom(16).hex()
    judge = Process(
        "judge",
        [setup, tests, name, answers, ask, token],
        fds=(answers, ask),
        seconds=seconds,
        memory=memory,
    )
    for fd in (asked, ask, answers, answer):
        os.close(fd)
    status, said = judge.end(seconds)
    program.end(0)
    return status == 0 and said.splitlines()[-1:] == [token]


def share_passed(source: str, tests: dict, seconds: float = SECONDS) -> float:
    """Share of tests that a program passes, in [0, 1]. `tests`: {"stdin": [[input, output], ...]}, {"call": name, "cases": [[[args], result], ...]},
    or {"check": code that defines check(candidate), "call": name, "setup": code}."""
    if "check" in tests:
        return float(
            passes_asserts(source, tests["call"], tests.get("setup", ""), tests["check"], seconds)
        )
    cases, passed, end = tests.get("stdin") or tests["cases"], 0, time.monotonic() + PROGRAM_SECONDS
    for given, expected in cases:
        if time.monotonic() > end:
            break
        if "stdin" in tests:
            passed += same_output(run_script(source, given, seconds), expected)
            continue
        try:
            passed += plain(call_function(source, tests["call"], given, seconds)) == plain(expected)
        except ValueError:
            pass  # no literal came back: failed
    return passed / len(cases)


def same_output(run: tuple[int | None, str], expected: str) -> bool:
    """Line by line, without trailing blanks; numbers that are equal as numbers are equal. A program that fails has no output."""
    status, printed = run
    ours, theirs = (
        [line.split() for line in text.rstrip().splitlines()] for text in (printed, expected)
    )
    return (
        status == 0
        and len(ours) == len(theirs)
        and all(len(a) == len(b) and all(map(same_word, a, b)) for a, b in zip(ours, theirs))
    )


def same_word(a: str, b: str) -> bool:
    if a == b:
        return True
    try:
        return (
            len(a) < 100
            and abs(float(a) - float(b)) <= 1e-9 * max(1.0, abs(float(b)))
            and ("." in b or "e" in b)
        )
    except ValueError:
        return False


def plain(value):
    """Tuples as lists, as JSON has it."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def isolation() -> str:
    """One line on what isolates programs here, for start-up. Raises OSError where they cannot be isolated."""
    if os.uname().machine not in ARCHES or not hasattr(ctypes.CDLL(None), "unshare"):
        raise OSError(f"no sandbox for {os.uname().machine} on {sys.platform}")
    probe = "import os\ntry:\n    os.kill(os.getppid(), 0)\n    print('weak')\nexcept PermissionError:\n    print(os.readlink('/proc/self/ns/net') if 0 else 'locked')"
    status, said = run_script(probe, "")
    if (status, said.strip()) != (0, "locked"):
        raise OSError("Landlock or seccomp is missing (Linux 5.13 has both)")
    child = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import ctypes, sys; sys.exit(-ctypes.CDLL(None).unshare({NEW_USER | NEW_NET}))",
        ]
    ).returncode
    return "sandbox: Landlock, seccomp" + (
        ", network namespace"
        if child == 0
        else "; no network namespace here, sockets are denied all the same"
    )


if __name__ == "__main__" and len(sys.argv) > 1:
    inside(*sys.argv[1:])
elif __name__ == "__main__":
    print(isolation())
    double = {"stdin": [["2\n", "4\n"], ["5\n", "10\n"]]}
    for program in (
        "print(2 * int(input()))",
        "print(4)",
        "while True: pass",
        "import socket; socket.socket()",
        "print(open('/etc/passwd').read())",
    ):
        print(share_passed(program, double, seconds=2), program)
