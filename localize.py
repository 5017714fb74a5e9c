"""Localization: which thought of an incorrect rollout is the first wrong one (SRPO step 3).

A localizer is a generator (task, seeds) -> [(h*, how)], one pair for each seed: h* in 1..H is the
first thought to sample again, or None (the seed is not used); `how` says how h* was found. A
localizer yields requests like any program (rollout.py), so all problems of a step are localized
together.

  self      SRPO: the policy reads the problem and its own numbered thoughts, and is told that its
            final answer is wrong (never the right one); it names its first wrong thought in
            `\\boxed{N}`. The embedded policy reads its response and a <locate> token instead
  random    RRPO: h* uniform over 1..H
  verifier  the task's exact step checker: an upper bound, only for tasks that have one
  oracle    the paper's credit-assignment oracle by Monte Carlo: the value of every prefix from m
            continuations; h* is the first thought that lowers the value by more than tau. It reads
            only final rewards, and costs H x m continuations

Departures from the authors' release: an answer that has no readable box, is out of range, or says
"no error" is counted by its fault, and `--localize_fallback` says what happens then (random: that
seed becomes RRPO; first: h* = 1; skip: the seed is dropped). It never silently becomes step 1.
Left out: few-shot prompts, and a vote of several localization answers.

Try it alone:  python localize.py    # the embedded policy reviews its failures, beside the truth
"""

import re
from dataclasses import dataclass
from typing import Generator

from data.chains import generate_chains
from data.driver import run_programs
from data.faults import UserError, counters
from data.policies import encode_prompt, load_policy, locate_token
from data.verifiers import DELIMITER, last_boxed
from rollout import HFEngine, Rollout, Task, grpo, make_tasks

# A backslash at the end of a line joins it with the next: the policy reads a paragraph as one line.
INSTRUCTION = """\
The solution below was written for the problem below. Its thoughts are numbered. {verdict}

Problem:
{question}

Solution:
{thoughts}

Find the first wrong thought: the one that makes the error, \
not a later one in which an earlier error only becomes visible. \
Check the thoughts in order. \
End your reply with the number of that one thought in a box: \\boxed{{N}}, \
with N from 1 to {H}{unless}."""
WRONG = {  # SRPO: the policy is told that its answer is wrong
    "verdict": "Its final answer is WRONG.",
    "unless": "",
}
UNKNOWN = {  # for measurements: it is not told, and the response may be right
    "verdict": "It may be right or wrong.",
    "unless": ", or \\boxed{0} if there is no error",
}


def review_text(question: str, thoughts: list[str], setting: dict = WRONG) -> str:
    """The text that asks for the first wrong one of H thoughts, shown without their delimiters."""
    numbered = []
    for h, thought in enumerate(thoughts, 1):
        shown = thought.replace(DELIMITER, "").strip() or "(empty)"
        numbered.append(f"[Thought {h}] {shown}")
    return INSTRUCTION.format(
        question=question, thoughts="\n".join(numbered), H=len(thoughts), **setting
    )


def localization_prompt(task: Task, rollout: Rollout, setting: dict = WRONG) -> list[int]:
    """Token ids that ask the policy for the first wrong thought of `rollout`.

    A terse policy (it has a <locate> token, see data/policies.py) reads prompt + response +
    <locate>, as sampled; `setting` does not reach it. Other policies read the instruction above.
    Neither prompt holds the reference answer.
    """
    tokenizer = task.vocabulary.tokenizer
    locate = locate_token(tokenizer)
    if locate is not None:
        return rollout.prompt_ids + rollout.token_ids + [locate]
    text = review_text(task.problem.question, rollout.thoughts(tokenizer), setting)
    return encode_prompt(tokenizer, text)


# At most 9 blanks in each place: without a limit the time grows with the square of their number.
BOXED_STEP = re.compile(  # the content of a box: 3, Step 3, No. 3, \text{Thought #3}
    r"(?:\\text\{)?\s{0,9}(?:(?:step|thought|no\.)\s{0,9})?#?\s{0,9}"
    r"([+-]?[0-9]{1,9})\s{0,9}\}?\s{0,9}\.?",
    re.IGNORECASE,
)
# "Step 3 is not correct" and "Step 3, 4 + 5 = 8", but not "step 3 and 4".
SPOKEN_STEP = re.compile(
    r"\b(?:step|thought)\s{0,9}#?\s{0,9}([0-9]{1,9})\b"
    r"(?!\s{0,9}(?:[,/&–-]|and|or|to|through)\s{0,9}[0-9]{1,9}\b(?!\s{0,9}[-+*/=]))",
    re.IGNORECASE,
)
# "none", "no error"
NO_ERROR = re.compile(r"\b(no|none|(?<!not )correct)\b", re.IGNORECASE)


def parse_localization(text: str, H: int) -> tuple[int | None, str]:
    """(h*, "self") from an answer, or (None, fault): unparsable, out_of_range or no_error.

    Reads the last `\\boxed{N}`, which may name one step in words; an answer without a box is
    unparsable. no_error: the policy says 0, -1 or "none".

    >>> parse_localization("1: fine. Step 3 drops the sign, so \\\\boxed{3}", H=5)
    (3, 'self')
    """
    boxed = last_boxed(text)
    if boxed is None:
        return None, "unparsable"
    found = BOXED_STEP.fullmatch(boxed)
    numbers = [found[1]] if found else SPOKEN_STEP.findall(boxed)
    if not numbers and NO_ERROR.search(boxed):
        return None, "no_error"
    if len(numbers) != 1:
        return None, "unparsable"
    h = int(numbers[0])
    if h in (0, -1):
        return None, "no_error"
    if not 1 <= h <= H:
        return None, "out_of_range"
    return h, "self"


def named_in(answer: Rollout, H: int) -> tuple[int | None, str]:
    """parse_localization of a sampled answer; cut_off: it was too long, and has no box."""
    if answer.finish == "length" and last_boxed(answer.text) is None:
        return None, "cut_off"
    return parse_localization(answer.text, H)


# -------------------------------------------------------------------------------------- localizers


@dataclass
class Review:
    """What the policy said about a rollout. h: the thought that it names, 1-based, or None."""

    h: int | None
    how: str  # "self", a fault of named_in, or "too_long": the prompt does not fit
    answer: Rollout | None  # None: too_long


def reviewed(task: Task, rollouts: list[Rollout], setting: dict = WRONG) -> Generator:
    """Asks the policy to review each rollout; returns a Review for each."""
    requests = {}  # by number of the rollout
    for i, rollout in enumerate(rollouts):
        prompt_ids = localization_prompt(task, rollout, setting)
        if len(prompt_ids) < task.context:
            requests[i] = task.ask("localization", prompt_ids)
    groups = yield list(requests.values())
    answers = {i: answer for i, (answer,) in zip(requests, groups)}
    reviews = []
    for i, rollout in enumerate(rollouts):
        answer = answers.get(i)
        h, how = None, "too_long"
        if answer is not None:
            h, how = named_in(answer, len(rollout.thought_ends))
        allowed = setting == UNKNOWN and how == "no_error"  # then "no error" is a proper answer
        if h is None and not allowed:
            counters[f"localize_{how}"] += 1
        reviews.append(Review(h, how, answer))
    return reviews


def by_self(task: Task, seeds: list[Rollout]) -> Generator:
    """SRPO: the policy names h*, else the fallback does. Its answer becomes seed.localization."""
    reviews = yield from reviewed(task, seeds)
    found = []
    for seed, review in zip(seeds, reviews):
        seed.localization = review.answer
        h = fallback(task, seed) if review.h is None else review.h
        found.append((h, review.how))
    return found


def fallback(task: Task, seed: Rollout) -> int | None:
    """h* where the policy named none, by --localize_fallback; None: the seed is not used."""
    # Always drawn: runs with different fallbacks then use the same random numbers afterwards.
    at_random = uniform_thought(task, seed)
    if task.cfg.localize_fallback == "random":
        return at_random
    if task.cfg.localize_fallback == "first":
        return 1
    return None


def uniform_thought(task: Task, seed: Rollout) -> int:
    return int(task.rng.integers(len(seed.thought_ends))) + 1


def by_random(task: Task, seeds: list[Rollout]) -> Generator:
    """RRPO: h* ~ Uniform{1..H}."""
    yield from ()  # makes it a generator like the others: one that asks for nothing
    return [(uniform_thought(task, seed), "random") for seed in seeds]


def by_verifier(task: Task, seeds: list[Rollout]) -> Generator:
    """The exact first wrong thought, from the task's step checker.

    A seed without a wrong step (its answer was cut off) restarts at its last thought.
    """
    yield from ()  # as in by_random
    return [(task.first_wrong(seed) or len(seed.thought_ends), "verifier") for seed in seeds]


def prefix_values(task: Task, rollouts: list[Rollout], purpose: str = "oracle") -> Generator:
    """Monte-Carlo values of every prefix of each rollout: returns lists [V(s_0), ..., V(s_H)].

    V(s_h) is the mean reward of `oracle_samples` continuations of thoughts 1..h, V(s_H) the
    rollout's own reward. A state that several rollouts share is sampled once.
    """
    requests = {}  # by state
    for rollout in rollouts:
        for h in range(1, len(rollout.thought_ends) + 1):
            state = tuple(rollout.prompt_ids + rollout.prefix(h))
            if state not in requests:
                requests[state] = task.request(purpose, task.cfg.oracle_samples, rollout, h)
    groups = yield list(requests.values())
    value = {}
    for state, group in zip(requests, groups):
        if not group:
            raise ValueError("a prefix leaves no room in the context for a continuation")
        value[state] = sum(r.reward for r in group) / len(group)
    values = []
    for rollout in rollouts:
        states = range(1, len(rollout.thought_ends) + 1)
        before = [value[tuple(rollout.prompt_ids + rollout.prefix(h))] for h in states]
        values.append([*before, rollout.reward])
    return values


def by_oracle(task: Task, seeds: list[Rollout]) -> Generator:
    """The credit-assignment oracle of CPI-CARO, by Monte Carlo.

    h* is the first h with V(s_h) - V(s_{h-1}) < -tau; if there is none, the h with the largest drop
    (counter oracle_none_below_tau).
    """
    values = yield from prefix_values(task, seeds)
    return [(first_drop(of_seed, task.cfg.oracle_tau), "oracle") for of_seed in values]


def first_drop(values: list[float], tau: float) -> int:
    """First h whose advantage A(s_{h-1}, y_h) = V(s_h) - V(s_{h-1}) is below -tau."""
    advantages = [after - before for before, after in zip(values, values[1:])]
    for h, advantage in enumerate(advantages, 1):
        if advantage < -tau:
            return h
    counters["oracle_none_below_tau"] += 1
    return 1 + advantages.index(min(advantages))


# Add your own here, and its name to the setting `localizer` in srpo.py.
LOCALIZERS = {"self": by_self, "random": by_random, "verifier": by_verifier, "oracle": by_oracle}


def check_localizer(name: str, problems, source: str) -> None:
    """Raises UserError where the localizer needs what the problems do not have."""
    if name == "verifier" and any(p.check_steps is None for p in problems):
        raise UserError(
            f"--localizer verifier needs a step checker, which {source} does not have; "
            "use --localizer self or oracle"
        )


def demo() -> None:
    model, tokenizer = load_policy("embedded")
    engine = HFEngine(model, tokenizer)
    tasks = make_tasks(generate_chains(steps=12, n=8, seed=1), engine, context=384, base=1)
    responses = run_programs([grpo(task) for task in tasks], engine).results
    failures = [(task, r) for task, (r,) in zip(tasks, responses) if task.failed(r)]
    reviews = run_programs([reviewed(task, [r]) for task, r in failures], engine).results
    for (task, rollout), (review,) in zip(failures, reviews):
        truth = task.first_wrong(rollout)
        print(f"truth {truth}, policy {review.h} ({review.how}): {review.answer.text}")


if __name__ == "__main__":
    demo()
