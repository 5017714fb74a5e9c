"""Runs model-written Python programs against tests, where they can neither do harm nor cheat.

A program runs in namespaces of its own that bubblewrap (`bwrap`) makes: it sees no other process,
no network, no shared memory, no device, and no file but Python's own and the system's libraries.
Nothing there can be written; environment variables are new. Nothing outlives this process:
bubblewrap dies with its parent, and all that is inside with bubblewrap. What namespaces do not
limit (CPU time, memory, output, new processes, system calls that take memory which no limit counts)
a program's process gives up itself, before it starts: see data/inside.py.

A machine where this does not work runs no programs at all, and `isolation` says why in one line:
  - no bubblewrap or no libseccomp: `apt-get install bubblewrap libseccomp2`
  - a container that may not make user namespaces, such as Docker's and Kubernetes' default:
    start Docker with `--security-opt seccomp=unconfined --security-opt apparmor=unconfined`
  - a host that restricts them: Ubuntu 24.04 (`kernel.apparmor_restrict_unprivileged_userns=1`, and
    no AppArmor profile for bwrap), `kernel.unprivileged_userns_clone=0`,
    `user.max_user_namespaces=0`
  - anything but Linux 5.3 or newer

The expected results never enter a program's sandbox. Outputs, and returned values in canonical
form, come back as bytes of limited length and are compared here as bytes and words: nothing that a
program sends is parsed in this process. Tests that are code (asserts) run in a second sandbox,
whose `candidate` asks the first one. Printed numbers may differ a little in their decimals,
returned ones may not.

Left out: other languages, tests that need an interactive judge, files that programs write (an empty
file costs the kernel memory that no limit counts), and a limit on threads besides that on memory.

Try it alone:  python -m data.sandbox        # what isolates here; right, wrong and hostile programs
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from data import inside
from data.faults import count
from data.inside import HEADER, OUTPUT, PASSED, READY, canonical

SECONDS = 6.0  # wall clock of a test, and its CPU time
PROGRAM_SECONDS = 60.0  # wall clock of all tests of a program; tests that do not get a turn fail
START_SECONDS = 20.0  # wall clock that a sandbox may take besides: a busy machine starts slowly


# ------------------------------------------------------------------------------ running programs

NAMESPACES = "--unshare-user --unshare-all --uid 1000 --gid 1000 --cap-drop ALL"
LIFE = "--die-with-parent --new-session --as-pid-1"
LIBRARIES = "/usr/lib /usr/lib64 /usr/local/lib /lib /lib64 /etc/alternatives /etc/ld.so.cache"


def command() -> list[str]:
    """Returns bubblewrap's command line (`man bwrap`). Raises OSError where it is missing."""
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise OSError("bubblewrap is missing (apt-get install bubblewrap)")
    words = [bubblewrap, *NAMESPACES.split(), *LIFE.split()]
    readable = LIBRARIES.split()
    for prefix in (sys.base_prefix, sys.prefix):
        readable += [f"{prefix}/lib", f"{prefix}/lib64", f"{prefix}/pyvenv.cfg"]
    for path in readable:
        words += ["--ro-bind-try", path, path]
    words += ["--ro-bind", os.path.realpath(sys.executable), sys.executable]
    words += ["--ro-bind", inside.__file__, "/inside.py"]
    # No devices: a program of root's could change their mode for the whole machine.
    words += ["--dir", "/empty", "--chdir", "/empty", "--remount-ro", "/"]
    return [*words, sys.executable, "-s", "-P", "/inside.py"]


def environment() -> dict[str, str]:
    """Returns all environment variables of a program: none of this process's."""
    return {
        "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib",  # without /proc, $ORIGIN is not known
        "PYTHONHASHSEED": "0",  # the same reward every time
        "OPENBLAS_NUM_THREADS": "1",  # each of its threads takes memory
        "OMP_NUM_THREADS": "1",
    }


@dataclass
class Result:
    """What one input of a program led to."""

    status: int
    """exit status; negative: ended by that signal"""

    output: bytes
    """what it printed or returned: at most OUTPUT bytes"""


class Sandbox:
    """A program in its sandbox, which ends with the `with` block.

    mode: see data/inside.py. inputs: one result comes back for each; seconds: the limit of each.
    links: file descriptors that the program inherits. parts: what the mode needs besides.
    """

    def __init__(self, mode: str, inputs: list, seconds: float, links: tuple = (), **parts):
        limits = {"seconds": seconds, "all_seconds": PROGRAM_SECONDS}
        message = {"mode": mode, "inputs": inputs, "links": links, **limits, **parts}
        self.process = subprocess.Popen(
            command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            cwd="/",
            pass_fds=links,
            start_new_session=True,  # Ctrl-C in a terminal does not reach it
        )
        self.timer = threading.Timer(PROGRAM_SECONDS + START_SECONDS, self.process.kill)
        self.timer.daemon = True
        self.timer.start()
        with suppress(BrokenPipeError):  # `wait_until_ready` says why
            self.process.stdin.write(json.dumps(message).encode())
            self.process.stdin.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.timer.cancel()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with suppress(BrokenPipeError):
                pipe.close()

    def wait_until_ready(self) -> None:
        """Raises OSError where the program cannot start."""
        if self.process.stdout.read(len(READY)) != READY:
            lines = self.process.stderr.read(OUTPUT).decode("utf-8", "replace").splitlines()
            reason = lines[-1] if lines else "it ended without a word"
            raise OSError(f"bubblewrap does not work here ({reason})")

    def result(self) -> Result | None:
        """Waits for the result of the next input. None: it did not get a turn."""
        header = self.process.stdout.read(HEADER.size)
        if len(header) < HEADER.size:
            if self.process.wait() != 0:
                count("sandbox_died")
            return None
        status, length = HEADER.unpack(header)
        return Result(status, self.process.stdout.read(min(length, OUTPUT)))


def run(mode: str, inputs: list, seconds: float = SECONDS, **parts) -> Iterator[Result]:
    """Runs a program and yields one result for each input, fewer if the time is over."""
    with Sandbox(mode, inputs, seconds, **parts) as sandbox:
        sandbox.wait_until_ready()
        for _ in inputs:
            result = sandbox.result()
            if result is None:
                return
            yield result


def passes_check(source: str, tests: dict, seconds: float = SECONDS) -> bool:
    """Returns whether `check(candidate)` of the tests goes through with the program's function.

    The tests run in a judge's sandbox; its `candidate` calls the program's through two pipes.
    """
    serving = {"source": source, "name": tests["call"]}
    judging = {"setup": tests.get("setup", ""), "check": tests["check"], "name": tests["call"]}
    with ExitStack() as ended:
        with two_pipes() as (calls, answers):
            links = (calls.read, answers.write)
            program = ended.enter_context(Sandbox("serve", [None], seconds, links, **serving))
            links = (calls.write, answers.read)
            judge = ended.enter_context(Sandbox("judge", [None], seconds, links, **judging))
        program.wait_until_ready()
        judge.wait_until_ready()
        verdict = judge.result()
    return verdict is not None and verdict.output == PASSED


@dataclass
class Pipe:
    """A pipe's two file descriptors."""

    read: int
    write: int


@contextmanager
def two_pipes() -> Iterator[tuple[Pipe, Pipe]]:
    """Opens two pipes for sandboxes that start in the `with` block; this process keeps no end."""
    pipes = Pipe(*os.pipe()), Pipe(*os.pipe())
    try:
        yield pipes
    finally:
        for pipe in pipes:
            os.close(pipe.read)
            os.close(pipe.write)


# --------------------------------------------------------------------------- comparing with tests


def share_passed(source: str, tests: dict, seconds: float = SECONDS) -> float:
    """Returns the share of tests that a program passes, in [0, 1].

    `tests` has one of three forms:
        {"stdin": [[input, output], ...]}                  a whole program
        {"call": name, "cases": [[[args], result], ...]}   a function, or a method of Solution
        {"call": name, "check": code, "setup": code}       code defines check(candidate)
    `setup` is code that the tests may use besides, such as the problem's prompt.
    """
    try:
        if "check" in tests:
            return float(passes_check(source, tests, seconds))
        if "stdin" in tests:
            return share_printed(source, tests["stdin"], seconds)
        return share_returned(source, tests["call"], tests["cases"], seconds)
    except OSError:  # this machine has too little left to start a sandbox
        count("sandbox_failed")
        return 0.0


def share_printed(source: str, cases: list, seconds: float) -> float:
    """cases: [[input, output], ...]"""
    results = run("script", [given for given, _ in cases], seconds, source=source)
    right = [prints(result, expected) for result, (_, expected) in zip(results, cases)]
    return sum(right) / len(cases)


def share_returned(source: str, name: str, cases: list, seconds: float) -> float:
    """cases: [[[args], result], ...]"""
    results = run("call", [args for args, _ in cases], seconds, source=source, name=name)
    right = [result.output == canonical(expected) for result, (_, expected) in zip(results, cases)]
    return sum(right) / len(cases)


def prints(result: Result, expected: str) -> bool:
    """Returns whether a program ended without an error and printed the expected output."""
    return result.status == 0 and same_output(result.output.decode("utf-8", "replace"), expected)


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


# ------------------------------------------------------------------------------- checking tests


def fault_of_tests(tests) -> str | None:
    """Returns what is wrong with the tests of a problem, or None; see `share_passed`."""
    forms = [
        (("stdin",), check_stdin),
        (("call", "cases"), check_cases),
        (("call", "check"), check_code),
        (("call", "check", "setup"), check_code),
    ]
    if not isinstance(tests, dict) or not tests:
        return "must be an object with stdin, or call and cases, or call and check"
    for fields, check in forms:
        if set(tests) == set(fields):
            return check(tests)
    fields = ", ".join(sorted(map(str, tests)))
    return f"holds {fields}; it needs stdin, or call and cases, or call and check"


def check_pairs(pairs, what: str) -> str | None:
    if not isinstance(pairs, list) or not pairs:
        return f"needs a list of pairs [{what}] that is not empty"
    for number, pair in enumerate(pairs, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            return f"case {number} is no pair [{what}]"
    return None


def check_stdin(tests: dict) -> str | None:
    wrong = check_pairs(tests["stdin"], "input, output")
    if wrong:
        return wrong
    for number, pair in enumerate(tests["stdin"], 1):
        if not all(isinstance(text, str) for text in pair):
            return f"case {number}: input and output must be text"
    return None


def check_cases(tests: dict) -> str | None:
    wrong = check_name(tests["call"]) or check_pairs(tests["cases"], "[arguments], result")
    if wrong:
        return wrong
    for number, (args, expected) in enumerate(tests["cases"], 1):
        if not isinstance(args, list):
            return f"case {number}: the arguments must be a list"
        try:
            canonical([args, expected])
        except ValueError as fault:
            return f"case {number}: {fault}"
    return None


def check_code(tests: dict) -> str | None:
    wrong = check_name(tests["call"])
    if wrong:
        return wrong
    for field in ("check", "setup"):
        code = tests.get(field, "")
        if not isinstance(code, str):
            return f"{field} must be text"
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as fault:
            return f"{field} is no Python code ({fault})"
        defined = [part.name for part in tree.body if isinstance(part, ast.FunctionDef)]
        if field == "check" and "check" not in defined:
            return "check must define the function check(candidate)"
    return None


def check_name(name) -> str | None:
    if not isinstance(name, str) or not name.isidentifier():
        return "call must be the name of a function"
    return None


# ----------------------------------------------------------------------------- what isolates here

PROBE = """
import os
assert os.listdir(".") == [] and not os.path.exists("/etc/passwd")
for attack in (lambda: os.fork(), lambda: open("/new", "w")):
    try:
        attack()
    except OSError:
        continue
    raise SystemExit("free")
print("locked")
"""


def isolation() -> str:
    """Returns one line on what isolates programs here. Raises OSError where they would be free."""
    if sys.platform != "linux":
        raise OSError(f"no sandbox on {sys.platform}")
    results = run("script", [""], source=PROBE)
    if [result.output for result in results] != [b"locked\n"]:
        raise OSError("a program in bubblewrap is not locked in")
    return "sandbox: bubblewrap, seccomp"


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
        print(share_passed(program, double, seconds=0.5), program)


if __name__ == "__main__":
    try:
        demo()
    except OSError as fault:
        sys.exit(f"sandbox.py: {fault}")
