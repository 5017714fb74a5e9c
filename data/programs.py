"""Programs by name: finding the one of --method, and checking what it returns.

A method is a generator function (rollout.py). Its name is one of `rollout.PROGRAMS`, or
MODULE:FUNCTION, or FILE.py:FUNCTION. Neither of the last two needs a change to this project.

Left out: arguments for programs. They read the settings (`task.cfg`), and have constants of their
own.

Try it alone:  python -m data.programs FILE.py:FUNCTION    # loads it, and says what is wrong
"""

import importlib.util
import inspect
import math
import os
import sys
from pathlib import Path
from typing import Callable

from data.driver import Sampled
from data.faults import UserError
from rollout import PROGRAMS, Rollout, grouped


def load_program(method: str) -> Callable:
    """The program of --method: one of PROGRAMS, MODULE:FUNCTION, or FILE.py:FUNCTION.

    Raises UserError with one line that says what is wrong.
    """
    if method in PROGRAMS:
        return PROGRAMS[method]
    source, colon, name = method.rpartition(":")
    if not colon:
        raise UserError(
            f"--method {method}: no such method; use {', '.join(PROGRAMS)}, "
            "MODULE:FUNCTION or FILE.py:FUNCTION"
        )
    try:
        if source.endswith(".py"):
            # Under a name of its own: a file called rollout.py must not replace ours.
            spec = importlib.util.spec_from_file_location(f"{Path(source).stem} (--method)", source)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
        else:
            sys.path.append(os.getcwd())
            module = importlib.import_module(source)
    except (ImportError, OSError, SyntaxError, TypeError, ValueError) as fault:
        raise UserError(f"--method {method}: cannot import it ({type(fault).__name__}: {fault})")
    function = getattr(module, name, None)
    if not inspect.isgeneratorfunction(function):
        raise UserError(
            f"--method {method}: {name} is no generator function of {source}; a program yields "
            "lists of requests and returns rollouts (README, Your own credit-assignment idea)"
        )
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        raise UserError(f"--method {method}: {name} must take one argument, the task")
    return function


def source_of(program: Callable) -> str:
    """The text of the file that a program is in; --resume compares it."""
    return Path(inspect.getsourcefile(program)).read_text("latin-1")  # which decodes every file


def trained_rollouts(method: str, sampled: Sampled) -> list[Rollout]:
    """What the programs of a step returned, in one list. The others lose their group.

    method: its name, for the message. Raises UserError for what cannot be trained.
    """
    known = {id(rollout) for rollout in sampled.generated}
    rollouts = []
    for returned in sampled.results:
        if not isinstance(returned, list) or not returned:
            raise UserError(
                f"--method {method} returned {returned!r:.60}: "
                "return a list of at least one rollout"
            )
        for rollout in returned:
            complaint = complaint_about(rollout, known)
            if complaint:
                raise UserError(f"--method {method} returned {complaint}")
            known.remove(id(rollout))
        for members in grouped(returned).values():
            complaint = complaint_about_group(members)
            if complaint:
                raise UserError(f"--method {method} {complaint}")
        rollouts += returned
    for rollout in sampled.generated:
        if id(rollout) in known:  # not returned: not trained
            rollout.group = None
    return rollouts


def complaint_about_group(members: list[Rollout]) -> str | None:
    without = [rollout.advantages is None for rollout in members]
    if any(without) and not all(without):
        return "set advantages of some rollouts of a group: set all or none"
    state = members[0].trained_state()
    if all(without) and any(rollout.trained_state() != state for rollout in members):
        return "put two states into one group: give each reset state a group of its own"
    return None


def complaint_about(rollout, known: set[int]) -> str | None:
    """What keeps a rollout from being trained, and what to do; None if nothing does."""
    if not isinstance(rollout, Rollout):
        return f"{rollout!r:.60} in its list: return the rollouts that were sampled"
    if id(rollout) not in known:
        return "a rollout twice, or a copy of one: return each sampled one itself, once"
    if rollout.group is None:
        return "a rollout without a group: put it into one with task.in_group(0, rollouts)"
    if rollout.advantages is None and rollout.reward is None:
        return "a rollout without reward and advantages: set its advantages, one for each thought"
    if rollout.advantages is not None:
        return complaint_about_advantages(rollout.advantages, len(rollout.thought_ends))
    return None


def complaint_about_advantages(advantages, H: int) -> str | None:
    if not isinstance(advantages, list):
        return f"advantages {advantages!r:.40}: set a list, one for each of {H} thoughts"
    if len(advantages) != H:
        return f"{len(advantages)} advantages for {H} thoughts: set one for each thought"
    if not all(map(math.isfinite, advantages)):
        return f"advantages that are not finite: {advantages!r:.60}"
    return None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m data.programs FILE.py:FUNCTION")
    try:
        print(load_program(sys.argv[1]))
    except UserError as fault:
        sys.exit(f"programs.py: {fault}")
