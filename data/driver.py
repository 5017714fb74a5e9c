"""The driver: runs the programs of all problems of a step together.

A program is a generator: it yields a list of requests, is sent a list of n graded rollouts for
each, and returns what it likes (rollout.py). Everything that the programs wait for goes to one
engine. With vLLM, which streams, a program goes on as soon as its own answers are there; with hf
all go on together, so that the next batch is large. Slow graders run in threads, beside sampling;
where processes share an engine (--tp), sampling waits for them.

Left out: several engines in one process.

Try it alone:  python rollout.py    # one program; `python localize.py` runs several
"""

import os
from collections import Counter
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.pool import ThreadPool
from time import perf_counter
from typing import Callable, Generator, Iterable

from data.faults import counters
from data.parallel import gather


@dataclass
class Sampled:
    """What the programs of one step returned, and what it cost."""

    results: list  # each program's return value
    generated: list  # every rollout that was sampled, by program
    seconds: Counter  # of this process, by purpose; also "grade" and "wait" (for other processes)


def run_programs(programs: list[Generator], engine) -> Sampled:
    """Runs all programs together, and gives each the rollouts that it asks for.

    With several processes each runs its engine's share of the programs; all get the results of all.
    Seconds of sampling are the engine's: it shares each of its steps between the rows that are in
    it, so they add up to the time that passed, also where purposes overlap.
    """
    counted_before = counters.copy()
    driver = Driver(engine)
    for i in range(engine.share, len(programs), engine.shares):
        driver.start(i, programs[i])
    while driver.in_flight:
        driver.sample()
        driver.deliver()
    seconds = driver.seconds + engine.seconds
    start = perf_counter()
    mine = Done(driver.results, driver.generated, counters - counted_before)
    merged = merge(gather(mine if engine.reports else Done()))  # --tp: one process of each engine
    seconds["wait"] = perf_counter() - start
    counters.clear()  # then every process counts what all of them counted
    counters.update(counted_before + merged.counted)
    results, generated = [], []
    for i in range(len(programs)):
        results.append(merged.results[i])
        generated += merged.generated[i]
    return Sampled(results, generated, seconds)


@dataclass
class Done:
    """What one process has done: results and rollouts by program, and what it counted."""

    results: dict[int, object] = field(default_factory=dict)
    generated: dict[int, list] = field(default_factory=dict)
    counted: Counter = field(default_factory=Counter)


def merge(parts: list[Done]) -> Done:
    whole = Done()
    for part in parts:
        whole.results.update(part.results)
        whole.generated.update(part.generated)
        whole.counted.update(part.counted)
    return whole


@dataclass
class InFlight:
    """A request that the engine has: request number `place` of those that program `i` waits for."""

    i: int
    place: int
    request: object  # rollout.Request
    rollouts: list | None = None  # None while it is sampled
    rewards: list[Future] = field(default_factory=list)  # of slow graders

    @property
    def graded(self) -> bool:
        return self.rollouts is not None and all(reward.done() for reward in self.rewards)


class Driver:
    """The running programs of one process, and the requests that they wait for."""

    def __init__(self, engine):
        self.engine = engine
        self.programs: dict[int, Generator] = {}
        self.results: dict[int, object] = {}  # by program
        self.generated: dict[int, list] = {}  # by program
        self.waiting: dict[int, list] = {}  # by program: for each request its rollouts, or None yet
        self.in_flight: dict[int, InFlight] = {}  # by ticket: sampled or graded now
        self.seconds = Counter()
        engine.seconds.clear()

    def start(self, i: int, program: Generator) -> None:
        self.programs[i] = program
        self.generated[i] = []
        self.advance(i, None)

    def advance(self, i: int, answers: list | None) -> None:
        """Sends program i its answers, and gives the engine what it asks for next."""
        while True:
            try:
                requests = self.programs[i].send(answers)
            except StopIteration as end:
                self.results[i] = end.value
                return
            check_requests(self.programs[i], requests)
            waiting = [None if request.max_tokens > 0 else [] for request in requests]
            counters["no_room"] += waiting.count([])
            if None in waiting:
                break
            answers = waiting  # there is nothing to sample: it goes on at once
        self.waiting[i] = waiting
        for place, request in enumerate(requests):
            if waiting[place] is None:
                self.in_flight[self.engine.start(request)] = InFlight(i, place, request)

    def sample(self) -> None:
        """Samples some requests to their end and grades them; waits if only graders still work."""
        finished = []
        if any(flight.rollouts is None for flight in self.in_flight.values()):
            finished = self.engine.finished()
        sampled = perf_counter()
        for ticket, rollouts in finished:
            flight = self.in_flight[ticket]
            flight.rollouts = rollouts
            grade(flight)
        if self.engine.lockstep:
            self.agree([self.in_flight[ticket] for ticket, _ in finished])
        flights = self.in_flight.values()
        if not self.engine.streams:
            # The next batch is larger if all of these problems go on together.
            wait_for(flights, ALL_COMPLETED)
        else:
            all_sampled = all(flight.rollouts is not None for flight in flights)
            if all_sampled and not any(flight.graded for flight in flights):
                wait_for(flights, FIRST_COMPLETED)
        self.seconds["grade"] += perf_counter() - sampled

    def agree(self, flights: list[InFlight]) -> None:
        """Waits for the rewards, and takes those of the process that reports.

        Processes that share an engine must give it the same requests at the same steps, also where
        a grader is slow, or times out on one of them.
        """
        rollouts = []
        for flight in flights:
            for rollout, reward in zip(flight.rollouts, flight.rewards):
                rollout.reward = reward.result()
            flight.rewards = []
            rollouts += flight.rollouts
        rewards = self.engine.agreed([rollout.reward for rollout in rollouts])
        for rollout, reward in zip(rollouts, rewards):
            rollout.reward = reward

    def deliver(self) -> None:
        """Sends graded rollouts to each program whose requests are all answered."""
        for ticket in [ticket for ticket, flight in self.in_flight.items() if flight.graded]:
            flight = self.in_flight.pop(ticket)
            for rollout, reward in zip(flight.rollouts, flight.rewards):
                rollout.reward = reward.result()
            self.waiting[flight.i][flight.place] = flight.rollouts
        ready = [i for i, answers in self.waiting.items() if None not in answers]
        for i in sorted(ready):
            answers = self.waiting.pop(i)
            for rollouts in answers:
                self.generated[i] += rollouts
            self.advance(i, answers)


def check_requests(program: Generator, requests) -> None:
    """Raises TypeError if a program yields anything but a list of requests."""
    if not isinstance(requests, list) or not all(hasattr(r, "prompt_ids") for r in requests):
        raise TypeError(
            f"program {program.__qualname__} yielded {requests!r:.80}: it must yield a list of "
            "requests, as task.request(...) makes them"
        )


def grade(flight: InFlight) -> None:
    """Grades rollouts at once, or starts to grade them in threads where the grader is slow."""
    request = flight.request
    if request.grade is None:
        return
    for rollout in flight.rollouts:
        if request.slow:
            flight.rewards.append(submit(request.grade, rollout.text))
        else:
            rollout.reward = request.grade(rollout.text)


def submit(grade: Callable[[str], float], text: str) -> Future:
    """Grades a text on one of the threads; its reward, or what it raises, comes with the future."""
    reward = Future()
    graders().apply_async(grade, (text,), {}, reward.set_result, reward.set_exception)
    return reward


@cache
def graders() -> ThreadPool:
    """Threads that wait for slow graders: sandboxed programs, math-verify's processes.

    Not a ThreadPoolExecutor: at Ctrl-C that would end only after all that is queued is graded.
    """
    return ThreadPool(os.cpu_count())


def wait_for(flights: Iterable[InFlight], until: str) -> None:
    pending = []
    for flight in flights:
        pending += [reward for reward in flight.rewards if not reward.done()]
    wait(pending, return_when=until)
