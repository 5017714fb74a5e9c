"""What runs inside the sandbox: a small server that runs one program on several inputs.

data/sandbox.py starts this file as process 1 of new namespaces, made by bubblewrap. The server
reads one message and runs the program once for each input, every time in a fresh copy of itself
(a fork). The copy first gives up
  - CPU time, memory, open files, and size of files and output, beyond limits;
  - system calls (seccomp, by libseccomp): no new processes (threads are fine), no new namespaces,
    no kernel memory that outlives a call (System V, keys), none of the kernel's large interfaces.
The server survives its copies: nobody inside can kill process 1 or read its memory.

A copy works in one of four modes:
    script  runs a whole program; the result is what it prints
    call    calls a function once; the result is the returned value's canonical form
    serve   calls a function as often as a judge asks
    judge   runs tests that are code, in a sandbox of their own; `candidate` asks a serving program

A program shares its interpreter with `call` and `serve`: it can replace every function there, read
every frame (and so its other inputs), and write what it likes where results are written. So nothing
there knows what is expected or decides anything: all that a program can send is an answer, right or
wrong. It can also end or slow down its own server, which ends its own tests.

Left out: programs that start programs or write files, results that are no plain values (iterators,
objects), tests that pass functions.

This file imports the standard library only. It is started by data/sandbox.py, never by hand.
"""

import builtins
import ctypes
import errno
import gc
import json
import os
import resource
import select
import signal
import struct
import sys
import time
import types
from collections.abc import Mapping, Set
from functools import cache

OUTPUT = 1 << 20  # bytes of a file, and of a result
MEMORY = 1 << 30  # bytes of address space
READY = b"ready"  # the server's first bytes
PASSED = b"passed"  # the result of a judge

# System calls that fail with EPERM.
DENIED = [
    # new processes, new namespaces (in which a program would have rights again)
    *("fork", "vfork", "unshare"),
    # memory that no limit counts
    *("shmget", "semget", "msgget", "socket", "add_key", "request_key", "keyctl"),
    # large parts of the kernel that no program here needs
    *("io_uring_setup", "bpf", "perf_event_open", "userfaultfd"),
]
CLONE_THREAD = 0x00010000

# libseccomp's actions and comparison.
ALLOW = 0x7FFF0000
FAIL = 0x00050000  # plus the errno
MASKED_EQUAL = 7

PR_SET_DUMPABLE = 4

LEVELS = 100  # containers inside each other, at most

HEADER = struct.Struct("=iI")  # before each result: exit status, length in bytes


# ------------------------------------------------------------------------------------ the server


def main() -> None:
    """Reads a message from standard input and answers with one result for each of its inputs."""
    with open(0, "rb", closefd=False) as file:
        message = json.loads(file.read())
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 gets no signal that has no handler
    if os.getpid() != 1:
        raise SystemExit("not process 1 of a namespace of its own")
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # no tracing, no reading of its memory
    filtered = call_filter()
    gc.freeze()  # copies do not tidy up what they share: 2 ms less for each
    end = time.monotonic() + message["all_seconds"]
    results = open(1, "wb", closefd=False)
    results.write(READY)
    results.flush()
    for given in message["inputs"]:
        seconds = min(message["seconds"], end - time.monotonic())
        if seconds <= 0:
            break  # inputs that do not get a turn have no result
        status, result = run_copy(message, given, seconds, filtered)
        results.write(HEADER.pack(status, len(result)) + result)
        results.flush()


def run_copy(message: dict, given, seconds: float, filtered) -> tuple[int, bytes]:
    """Runs one input in a copy of this process. Returns (exit status, result).

    The result is at most OUTPUT bytes. The status is -9 if the copy had to be killed.
    """
    # Files in memory, not pipes: a pipe that nobody reads would block its writer.
    stdin = os.memfd_create("stdin")
    result = os.memfd_create("result")
    if message["mode"] == "script":
        with open(stdin, "wb", closefd=False) as file:
            file.write(given.encode("utf-8", "replace"))
        os.lseek(stdin, 0, os.SEEK_SET)
    copy = os.fork()
    if copy == 0:
        give_up(filtered, seconds, stdin)
        MODES[message["mode"]](message, given, result)
        sys.exit()
    handle = os.pidfd_open(copy)
    for fd in message["links"]:
        os.close(fd)  # a judge must see the end of a program that has ended
    select.select([handle], [], [], seconds)  # until it ends, or that long
    os.kill(copy, signal.SIGKILL)  # nothing to one that has ended
    _, status = os.waitpid(copy, 0)
    written = os.pread(result, OUTPUT, 0)
    for fd in (stdin, result, handle):
        os.close(fd)
    return os.waitstatus_to_exitcode(status), written


# ------------------------------------------------------------------------- what a copy gives up


def give_up(filtered, seconds: float, stdin: int) -> None:
    """Limits this process for the rest of its life; it reads stdin, and nobody reads it."""
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: OUTPUT,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 100,
    }
    for what, most in limits.items():
        resource.setrlimit(what, (most, most))
    noise = os.memfd_create("noise")
    os.dup2(stdin, 0)
    os.dup2(noise, 1)
    os.dup2(noise, 2)
    os.close(stdin)
    os.close(noise)
    if libseccomp().seccomp_load(filtered) != 0:
        raise SystemExit("seccomp: the kernel refuses the filter")
    sys.setrecursionlimit(100_000)
    sys.set_int_max_str_digits(0)


class Comparison(ctypes.Structure):
    """libseccomp's scmp_arg_cmp: a condition on an argument of a system call."""

    _fields_ = [
        ("argument", ctypes.c_uint),
        ("how", ctypes.c_int),
        ("mask", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
    ]


@cache
def libseccomp() -> ctypes.CDLL:
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    return library


def call_filter() -> ctypes.c_void_p:
    """Returns libseccomp's filter: DENIED calls fail, and clone unless it makes a thread."""
    library = libseccomp()
    filtered = ctypes.c_void_p(library.seccomp_init(ALLOW))

    def deny(name: str, error: int, *conditions: Comparison) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        several = (Comparison * len(conditions))(*conditions)
        action = FAIL + error
        wrong = library.seccomp_rule_add_array(filtered, action, number, len(several), several)
        if wrong:
            raise OSError(-wrong, f"seccomp: no rule for {name}")

    for name in DENIED:
        deny(name, errno.EPERM)
    deny("clone", errno.EPERM, Comparison(0, MASKED_EQUAL, CLONE_THREAD, 0))
    # The arguments of clone3 lie in memory that a filter cannot read. "No such call" makes the
    # C library use clone.
    deny("clone3", errno.ENOSYS)
    return filtered


# ------------------------------------------------------------------------------------- the modes


def script(message: dict, given: str, result: int) -> None:
    """Runs a whole program; what it prints is the result."""
    os.dup2(result, 1)
    load(message["source"], "__main__")


def call(message: dict, given: list, result: int) -> None:
    """Calls a program's function once; the canonical form of what it returns is the result."""
    function = find_function(load(message["source"], "solution"), message["name"])
    os.write(result, canonical(function(*given)))
    os._exit(0)  # a tidy end takes longer than most calls


def serve(message: dict, given: None, result: int) -> None:
    """Calls a program's function for a judge: one line of arguments, one line of answer."""
    calls_fd, answers_fd = message["links"]
    calls = os.fdopen(calls_fd)
    answers = os.fdopen(answers_fd, "w")
    function = find_function(load(message["source"], "solution"), message["name"])
    for line in calls:
        args, keywords = decode(json.loads(line))
        try:
            answer = {"value": function(*args, **keywords)}
        except Exception as fault:  # whatever the program raises is its answer to the judge
            answer = {"raised": builtin_name(fault), "text": str(fault)[:1000]}
        answers.write(json.dumps(encode(answer)) + "\n")
        answers.flush()


def judge(message: dict, given: None, result: int) -> None:
    """Runs tests that are code. The result is PASSED if `check(candidate)` goes through."""
    calls_fd, answers_fd = message["links"]
    calls = os.fdopen(calls_fd, "w")
    answers = os.fdopen(answers_fd)

    def candidate(*args, **keywords):
        calls.write(json.dumps(encode((args, keywords))) + "\n")
        calls.flush()
        line = answers.readline(OUTPUT)
        if not line:
            raise NoAnswer("the program has ended")
        answer = decode(json.loads(line))
        if "raised" in answer:
            raise same_exception(answer["raised"], answer["text"])
        return answer["value"]

    module = load(message["setup"], "solution")
    setattr(module, message["name"], candidate)
    exec(compile(message["check"], "check", "exec"), module.__dict__)
    module.check(candidate)
    os.write(result, PASSED)


MODES = {"script": script, "call": call, "serve": serve, "judge": judge}


def load(source: str, name: str) -> types.ModuleType:
    """Runs a program as a module of that name."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, "program", "exec"), module.__dict__)
    return module


def find_function(module: types.ModuleType, name: str):
    """Returns a function of a program, or a method of its class Solution."""
    if hasattr(module, "Solution") and not hasattr(module, name):
        return getattr(module.Solution(), name)
    return getattr(module, name)


# ------------------------------------------------------------------- values on their way through


class NoAnswer(BaseException):
    """Ends a judge. No Exception: no test can take it for the one that it expects."""


def builtin_name(fault: Exception) -> str:
    """Returns the name of the exception's nearest built-in class."""
    names = [kind.__name__ for kind in type(fault).__mro__ if hasattr(builtins, kind.__name__)]
    return names[0]


def same_exception(name: str, text: str) -> BaseException:
    """Returns an exception of a built-in class; whatever else a program sends ends the judge."""
    kind = getattr(builtins, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return NoAnswer(f"no exception: {name}")
    return kind.__new__(kind, text)  # not kind(text): some built-in ones need more arguments


def complex_number(parts: list) -> complex:
    return complex(*parts)


CONTAINERS = {
    "list": list,
    "tuple": tuple,
    "dict": dict,
    "frozenset": frozenset,
    "set": set,
    "bytes": bytes,
    "complex": complex_number,
}


def encode(value):
    """Writes a plain value as JSON can hold it: a container is [its kind, its items ...].

    What equals a plain value becomes one: Counter, OrderedDict, namedtuple, numpy's numbers.
    Raises ValueError for other objects.

    >>> encode((1, {"a": {2}}))
    ['tuple', 1, ['dict', ['tuple', 'a', ['set', 2]]]]
    """
    value = without_numpy(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    kinds = {
        "list": list,
        "tuple": tuple,
        "dict": Mapping,
        "frozenset": frozenset,
        "set": Set,
        "bytes": (bytes, bytearray),
    }
    for name, kind in kinds.items():
        if isinstance(value, kind):
            items = value.items() if name == "dict" else value
            return [name, *[encode(item) for item in items]]
    return scalar(value)


def decode(value):
    """Reads back what `encode` has written."""
    if not isinstance(value, list):
        return value
    name, *items = value
    return CONTAINERS[name]([decode(item) for item in items])


def canonical(value) -> bytes:
    """Writes a value so that equal values have equal bytes, as far as JSON can express them.

    Tuples are lists, 2.0 and True are 2 and 1, keys are text and sorted. Raises ValueError for
    what JSON does not know, and for more than LEVELS containers inside each other.

    >>> canonical({"b": (1.0, True), "a": None})
    b'{"a": null, "b": [1, 1]}'
    """
    return json.dumps(as_json(value, LEVELS), sort_keys=True).encode()


def as_json(value, levels: int):
    value = without_numpy(value)
    if levels == 0:
        raise ValueError("nested too deeply")
    if isinstance(value, (list, tuple)):
        return [as_json(item, levels - 1) for item in value]
    if isinstance(value, Mapping):
        return {as_key(key): as_json(item, levels - 1) for key, item in value.items()}
    value = scalar(value)
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def as_key(key) -> str:
    """Returns a key as JSON has it: 1 is "1"."""
    return scalar(key) if isinstance(key, str) else json.dumps(as_json(key, 1))


def scalar(value):
    """Returns a value that is no container as exactly a str, bool, int, float or None."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # of an Enum's member, str() is its name
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise ValueError(f"{type(value).__name__} is no plain value")


def without_numpy(value):
    """Returns numpy's numbers and arrays as Python's numbers and lists, others as they are."""
    if type(value).__module__ == "numpy":
        return value.tolist()
    return value


if __name__ == "__main__":
    main()
