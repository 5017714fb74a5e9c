"""Runs model-written Python programs against tests, where they can neither do harm nor cheat.

Each run is a process of its own, in its own session, with an empty environment and an empty
working directory that is removed afterwards. Before the program starts, the process gives up
  - CPU time, memory, open files, and size of files and output beyond limits; the parent also kills
    its process group at a wall-clock limit;
  - files (Landlock): it reads only Python and the system's libraries and writes only its working
    directory, so it sees no data set and no other test;
  - system calls (seccomp): no new processes (threads are fine), no signals to others, no sockets,
    no ptrace, no mounts, no execve;
  - network devices (a network namespace), where the kernel allows it; `isolation` says whether.
A machine without Landlock or seccomp (Linux 5.13 on x86-64 or aarch64) runs no programs at all.

The expected results never enter the program's process. Outputs and returned values come back as
text and Python literals (`ast.literal_eval`) and are compared outside. Tests that are code
themselves (asserts) run in a second sandbox, whose `candidate` asks the first one.

Left out: other languages, and tests that need an interactive judge.

Try it alone:  python -m data.sandbox        # what isolates here; right, wrong and hostile programs
"""

import ast
import ctypes
import errno
import json
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# This file runs as the sandboxed process too, with `python -I`: it can import the standard
# library only.

SECONDS = 6.0  # wall clock per test, and CPU time
PROGRAM_SECONDS = 60.0  # wall clock of all tests of a program; tests that do not get a turn fail
MEMORY = 1 << 30  # bytes of address space
OUTPUT = 1 << 20  # bytes of a file, and of output


# ------------------------------------------------------- inside: numbers of the kernel's interface

ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # machine -> AUDIT_ARCH_*

# System calls that fail with EPERM: name -> number on each machine.
DENIED = {
    # new processes and programs
    "fork": {"x86_64": 57},
    "vfork": {"x86_64": 58},
    "execve": {"x86_64": 59, "aarch64": 221},
    "execveat": {"x86_64": 322, "aarch64": 281},
    # signals
    "kill": {"x86_64": 62, "aarch64": 129},
    "tkill": {"x86_64": 200, "aarch64": 130},
    "tgkill": {"x86_64": 234, "aarch64": 131},
    "pidfd_send_signal": {"x86_64": 424, "aarch64": 424},
    "pidfd_open": {"x86_64": 434, "aarch64": 434},
    "rt_sigqueueinfo": {"x86_64": 129, "aarch64": 138},
    "rt_tgsigqueueinfo": {"x86_64": 297, "aarch64": 240},
    # the memory of other processes
    "ptrace": {"x86_64": 101, "aarch64": 117},
    "process_vm_readv": {"x86_64": 310, "aarch64": 270},
    "process_vm_writev": {"x86_64": 311, "aarch64": 271},
    # network
    "socket": {"x86_64": 41, "aarch64": 198},
    "socketpair": {"x86_64": 53, "aarch64": 199},
    "connect": {"x86_64": 42, "aarch64": 203},
    "bind": {"x86_64": 49, "aarch64": 200},
    # namespaces and mounts
    "unshare": {"x86_64": 272, "aarch64": 97},
    "setns": {"x86_64": 308, "aarch64": 268},
    "mount": {"x86_64": 165, "aarch64": 40},
    # large parts of the kernel that no program here needs
    "io_uring_setup": {"x86_64": 425, "aarch64": 425},
    "bpf": {"x86_64": 321, "aarch64": 280},
    "perf_event_open": {"x86_64": 298, "aarch64": 241},
    # limits and priorities of other processes, keys
    "prlimit64": {"x86_64": 302, "aarch64": 261},
    "setpriority": {"x86_64": 141, "aarch64": 140},
    "keyctl": {"x86_64": 250, "aarch64": 219},
}
CLONE = {"x86_64": 56, "aarch64": 220}  # allowed for threads only
CLONE3 = 435  # on both machines, like the next three
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446

# Flags of clone and unshare.
CLONE_THREAD = 0x00010000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

# Options of prctl.
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2

# Landlock, first version.
LANDLOCK_RULE_PATH_BENEATH = 1
EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
READ = READ_FILE | READ_DIR
EVERYTHING = (1 << 13) - 1  # all 13 rights
RIGHTS_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE  # the others exist for directories only

# Instructions of seccomp's filter, a BPF program: (code, jump if true, jump if false, operand).
BPF_LOAD = 0x20  # BPF_LD | BPF_W | BPF_ABS: loads 32 bits of seccomp_data
BPF_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
BPF_IF_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
BPF_IF_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
BPF_RETURN = 0x06  # BPF_RET | BPF_K
CALL_NUMBER, CALL_ARCH, FIRST_ARGUMENT = 0, 4, 16  # offsets in seccomp_data, in bytes
X32_BIT = 0x40000000  # numbers from here on are calls of the x32 interface
RETURN_ALLOW = 0x7FFF0000
RETURN_KILL = 0x80000000
RETURN_ERROR = 0x00050000  # plus the errno


# ------------------------------------------------------ inside: giving up what no program needs


def libc_call(name: str, *args) -> int:
    """Calls a function of the C library. Raises OSError where it returns a negative number."""
    libc = ctypes.CDLL(None, use_errno=True)
    value = getattr(libc, name)(*args)
    if value < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return value


def lock(memory: int, seconds: float) -> None:
    """Gives up everything that the header lists, for the rest of this process's life."""
    # May fail where the kernel grants no namespace: seccomp denies sockets all the same.
    ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)
    lock_resources(memory, seconds)
    libc_call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # the next two need it
    lock_files()
    lock_calls()


def lock_resources(memory: int, seconds: float) -> None:
    """Limits memory (bytes), CPU time, files and output."""
    import resource  # Unix only; this file can be imported anywhere

    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: OUTPUT,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
    }
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))


def lock_files() -> None:
    """Landlock: leaves Python and the system readable, and the working directory writable.

    Raises OSError where the kernel has no Landlock.
    """
    python = [sys.prefix, sys.base_prefix]
    python += [path for path in sys.path if os.path.isdir(path)]
    system = ["/usr", "/lib", "/lib64", "/bin", "/dev/urandom", "/dev/zero"]
    handled = ctypes.create_string_buffer(struct.pack("=Q", EVERYTHING))
    rules = libc_call("syscall", LANDLOCK_CREATE_RULESET, handled, 8, 0)
    for path in python + system:
        allow_path(rules, path, READ)
    allow_path(rules, "/dev/null", READ | WRITE_FILE)
    allow_path(rules, os.getcwd(), EVERYTHING)
    libc_call("syscall", LANDLOCK_RESTRICT_SELF, rules, 0)
    os.close(rules)


def allow_path(rules: int, path: str, rights: int) -> None:
    """Adds a rule for a file, or for a directory and all in it; a missing path needs none."""
    if not os.path.exists(path):
        return
    if not os.path.isdir(path):
        rights &= RIGHTS_OF_FILES
    fd = os.open(path, os.O_PATH)
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, fd))
    libc_call("syscall", LANDLOCK_ADD_RULE, rules, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
    os.close(fd)


def lock_calls() -> None:
    """seccomp: makes the DENIED system calls fail, and clone unless it makes a thread.

    Raises OSError where the kernel has no seccomp.
    """
    machine = platform.machine()
    deny = (BPF_RETURN, 0, 0, RETURN_ERROR + errno.EPERM)
    # Any other architecture (32-bit calls) has other numbers: the process is killed.
    program = [
        (BPF_LOAD, 0, 0, CALL_ARCH),
        (BPF_IF_EQUAL, 1, 0, ARCHES[machine]),
        (BPF_RETURN, 0, 0, RETURN_KILL),
        (BPF_LOAD, 0, 0, CALL_NUMBER),
        (BPF_IF_AT_LEAST, 0, 1, X32_BIT),
        deny,
    ]
    # The arguments of clone3 lie in memory that a filter cannot read. "No such call" makes the
    # C library use clone.
    program += [
        (BPF_IF_EQUAL, 0, 1, CLONE3),
        (BPF_RETURN, 0, 0, RETURN_ERROR + errno.ENOSYS),
    ]
    for numbers in DENIED.values():
        if machine in numbers:
            program += [(BPF_IF_EQUAL, 0, 1, numbers[machine]), deny]
    program += [
        (BPF_IF_EQUAL, 0, 3, CLONE[machine]),
        (BPF_LOAD, 0, 0, FIRST_ARGUMENT),
        (BPF_IF_ANY_BIT, 1, 0, CLONE_THREAD),
        deny,
        (BPF_RETURN, 0, 0, RETURN_ALLOW),
    ]
    instructions = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    code = ctypes.create_string_buffer(instructions)
    length_and_address = struct.pack("=H6xQ", len(program), ctypes.addressof(code))
    filter_program = ctypes.create_string_buffer(length_and_address)
    libc_call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, filter_program)


# ------------------------------------------------------------- inside: the process's own main


def inside(mode: str, memory: str, seconds: str) -> None:
    """Locks this process, then runs a program in one of three modes: script, serve, judge."""
    message = json.loads(Path(MESSAGE).read_text())
    os.remove(MESSAGE)
    sys.setrecursionlimit(100_000)
    lock(int(memory), float(seconds))
    if mode == "script":
        exec(compile(message["source"], "program", "exec"), {"__name__": "__main__"})
    elif mode == "serve":
        serve(message)
    else:
        judge(message)


def serve(message: dict) -> None:
    """Runs a program, then answers calls of its function: one line of arguments, one result."""
    scope = {"__name__": "solution"}
    calls = os.fdopen(message["calls"])
    results = os.fdopen(message["results"], "w")
    exec(compile(message["source"], "program", "exec"), scope)
    name = message["name"]
    if "Solution" in scope and name not in scope:
        function = getattr(scope["Solution"](), name)
    else:
        function = scope[name]
    for line in calls:
        value = function(*ast.literal_eval(line))
        write_literal(results, value)


def judge(message: dict) -> None:
    """Runs tests that are code; prints the secret token if `check(candidate)` goes through."""
    scope = {"__name__": "solution"}
    calls = os.fdopen(message["calls"], "w")
    results = os.fdopen(message["results"])

    def candidate(*args):
        write_literal(calls, args)
        line = results.readline()
        if not line:
            raise RuntimeError("the program ended")
        return ast.literal_eval(line)

    exec(compile(message["setup"], "setup", "exec"), scope)
    scope[message["name"]] = candidate
    exec(compile(message["tests"], "tests", "exec"), scope)
    scope["check"](candidate)
    print(message["token"])


def literal(value) -> str:
    """Returns a value's repr on one line, if `ast.literal_eval` reads it back; else ValueError."""
    text = repr(value)
    if ast.literal_eval(text) != value:
        raise ValueError("not a literal")
    return text.replace("\n", " ")


def write_literal(file, value) -> None:
    file.write(literal(value) + "\n")
    file.flush()


# ------------------------------------------------------------------- outside: running programs

MESSAGE = "message.json"  # what a process reads from its directory, and removes, before it locks


class Process:
    """A sandboxed process.

    mode, message: see `inside`. stdin: the program's input. fds: file descriptors that the process
    inherits. memory in bytes, seconds of CPU time.
    """

    def __init__(
        self,
        mode: str,
        message: dict,
        stdin: str = "",
        fds: tuple[int, ...] = (),
        memory: int = MEMORY,
        seconds: float = SECONDS,
    ):
        self.folder = tempfile.mkdtemp(prefix="program-")
        self.output = tempfile.TemporaryFile()
        Path(self.folder, MESSAGE).write_text(json.dumps(message))
        command = [sys.executable, "-I", "-u", str(Path(__file__).resolve())]
        command += [mode, str(memory), str(seconds)]
        # Files, not pipes: a pipe that nobody reads would block the writer.
        with tempfile.TemporaryFile() as given:
            given.write(stdin.encode("utf-8", "replace"))
            given.seek(0)
            self.process = subprocess.Popen(
                command,
                stdin=given,
                stdout=self.output,
                stderr=subprocess.DEVNULL,
                env={},
                cwd=self.folder,
                start_new_session=True,
                pass_fds=fds,
            )

    def end(self, seconds: float) -> tuple[int | None, str]:
        """Waits, kills what is left, and removes it. Returns (exit status, output).

        The status is None if the process had to be killed after `seconds`. The output is at most
        OUTPUT bytes.
        """
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
    """Runs a whole program with its stdin. Returns (exit status, None if killed; stdout)."""
    process = Process("script", {"source": source}, stdin, memory=memory, seconds=seconds)
    return process.end(seconds)


def call_function(
    source: str, name: str, args: list, seconds: float = SECONDS, memory: int = MEMORY
):
    """Returns what a program's function returns for the args.

    `name` is a function of the program or a method of its class Solution. Raises ValueError where
    no literal comes back.
    """
    with tempfile.TemporaryFile() as calls, tempfile.TemporaryFile() as results:
        calls.write(literal(tuple(args)).encode() + b"\n")
        calls.seek(0)
        fds = (calls.fileno(), results.fileno())
        message = {"source": source, "name": name, "calls": fds[0], "results": fds[1]}
        process = Process("serve", message, fds=fds, memory=memory, seconds=seconds)
        process.end(seconds)
        results.seek(0)
        line = results.read(OUTPUT).split(b"\n")[0]
    try:
        return ast.literal_eval(line.decode("utf-8", "replace"))
    except (SyntaxError, ValueError, MemoryError, RecursionError) as fault:
        raise ValueError(f"no literal came back ({type(fault).__name__})")


def passes_asserts(
    source: str, name: str, setup: str, tests: str, seconds: float = SECONDS, memory: int = MEMORY
) -> bool:
    """Returns whether `check(candidate)` of the tests goes through with the program's function.

    `setup` is code that the tests may use besides, such as the problem's prompt. The tests run in
    a judge process; its `candidate` calls the program's process through two pipes.
    """
    calls_read, calls_write = os.pipe()
    results_read, results_write = os.pipe()
    program_message = {
        "source": source,
        "name": name,
        "calls": calls_read,
        "results": results_write,
    }
    program_fds = (calls_read, results_write)
    program = Process("serve", program_message, fds=program_fds, memory=memory, seconds=seconds)
    token = os.urandom(16).hex()  # the judge prints it last: a printed "passed" proves nothing
    judge_message = {
        "setup": setup,
        "tests": tests,
        "name": name,
        "calls": calls_write,
        "results": results_read,
        "token": token,
    }
    judge_fds = (calls_write, results_read)
    judge = Process("judge", judge_message, fds=judge_fds, memory=memory, seconds=seconds)
    for fd in program_fds + judge_fds:
        os.close(fd)
    status, printed = judge.end(seconds)
    program.end(0)
    return status == 0 and printed.splitlines()[-1:] == [token]


# ----------------------------------------------------------------- outside: comparing with tests


def share_passed(source: str, tests: dict, seconds: float = SECONDS) -> float:
    """Returns the share of tests that a program passes, in [0, 1].

    `tests` has one of three forms:
        {"stdin": [[input, output], ...]}                  a whole program
        {"call": name, "cases": [[[args], result], ...]}   a function, or a method of Solution
        {"call": name, "check": code, "setup": code}       code defines check(candidate)
    """
    if "check" in tests:
        setup = tests.get("setup", "")
        return float(passes_asserts(source, tests["call"], setup, tests["check"], seconds))
    cases = tests.get("stdin") or tests["cases"]
    end = time.monotonic() + PROGRAM_SECONDS
    passed = 0
    for given, expected in cases:
        if time.monotonic() > end:
            break
        if "stdin" in tests:
            right = script_passes(source, given, expected, seconds)
        else:
            right = call_passes(source, tests["call"], given, expected, seconds)
        passed += int(right)
    return passed / len(cases)


def script_passes(source: str, stdin: str, expected: str, seconds: float) -> bool:
    """Returns whether a program ends without an error and prints the expected output."""
    status, printed = run_script(source, stdin, seconds)
    return status == 0 and same_output(printed, expected)


def call_passes(source: str, name: str, args: list, expected, seconds: float) -> bool:
    """Returns whether a program's function returns the expected value."""
    try:
        value = call_function(source, name, args, seconds)
    except ValueError:
        return False  # no literal came back
    return plain(value) == plain(expected)


def same_output(printed: str, expected: str) -> bool:
    """Compares line by line and word by word; blanks at the end do not matter."""
    ours = printed.rstrip().splitlines()
    theirs = expected.rstrip().splitlines()
    if len(ours) != len(theirs):
        return False
    return all(same_line(our, their) for our, their in zip(ours, theirs))


def same_line(ours: str, theirs: str) -> bool:
    our_words = ours.split()
    their_words = theirs.split()
    if len(our_words) != len(their_words):
        return False
    return all(same_word(our, their) for our, their in zip(our_words, their_words))


def same_word(ours: str, theirs: str) -> bool:
    """Compares as text, or as numbers where the expected one is no integer: 0.30000001 for 0.3."""
    if ours == theirs:
        return True
    if len(ours) >= 100 or not ("." in theirs or "e" in theirs):
        return False
    try:
        difference = abs(float(ours) - float(theirs))
        return difference <= 1e-9 * max(1.0, abs(float(theirs)))
    except ValueError:
        return False


def plain(value):
    """Turns tuples into lists, as JSON has them."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


# ---------------------------------------------------------------------------- what isolates here

PROBE = """
import os
try:
    os.kill(os.getppid(), 0)
    print("weak")
except PermissionError:
    print("locked")
"""


def isolation() -> str:
    """Returns one line on what isolates programs here. Raises OSError where they would be free."""
    machine = platform.machine()
    if machine not in ARCHES or sys.platform != "linux":
        raise OSError(f"no sandbox for {machine} on {sys.platform}")
    status, printed = run_script(PROBE, "")
    if status != 0 or printed.strip() != "locked":
        raise OSError("Landlock or seccomp is missing (Linux 5.13 has both)")
    flags = CLONE_NEWUSER | CLONE_NEWNET
    unshare = f"import ctypes, sys; sys.exit(-ctypes.CDLL(None).unshare({flags}))"
    if subprocess.run([sys.executable, "-c", unshare]).returncode == 0:
        return "sandbox: Landlock, seccomp, network namespace"
    return "sandbox: Landlock, seccomp; no network namespace here, sockets are denied all the same"


def demo() -> None:
    """Prints what isolates here, and the share of tests that five programs pass."""
    print(isolation())
    double = {"stdin": [["2\n", "4\n"], ["5\n", "10\n"]]}
    programs = [
        "print(2 * int(input()))",
        "print(4)",
        "while True: pass",
        "import socket; socket.socket()",
        "print(open('/etc/passwd').read())",
    ]
    for program in programs:
        print(share_passed(program, double, seconds=2), program)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        inside(*sys.argv[1:])
    else:
        demo()
