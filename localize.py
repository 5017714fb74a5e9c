"""Localization: which thought of an incorrect rollout was the first wrong one (SRPO step 3).

A localizer is a generator (task, seeds) -> [(h*, how)], one pair for each seed: h* in 1..H is the first thought to sample again, `how`
names where it came from. It yields sampling requests like any program (rollout.py), so all problems of a step are localized together.

  self      the policy itself is shown the problem and its own numbered thoughts, is told that the final answer is wrong (never the
            right one), and names the first wrong step in `\\boxed{N}`: this is SRPO
  random    h* uniform over 1..H: this is RRPO
  verifier  the task's exact step checker: the upper bound, only for tasks that have one
  oracle    a Monte-Carlo credit-assignment oracle: the value of every prefix from m continuations; the first thought that loses more
            than tau of it. Reads only final rewards, and costs H x m continuations

Departures from the released code: an answer that cannot be parsed, is out of range, or says "no error" is a named counter, and what
happens then is `--localize_fallback` (random: that seed becomes RRPO; first: h* = 1; skip: the seed is dropped), never silently step 1.
Left out: few-shot prompts and agreement of several localization samples.

Try it alone:  python localize.py        # the embedded policy reviews some of its own failures; the truth is printed beside its answer
"""

import re

from data.faults import UserError, counters
from data.verifiers import DELIMITER, last_boxed
from rollout import Request, Rollout, Task, encode_prompt, locate_token

INSTRUCTION = """The solution below was written for the problem below. Its thoughts are numbered. {verdict}

Problem:
{question}

Solution:
{thoughts}

Find the first thought that contains the error from which {what} originates: not a later thought in which an earlier error
only becomes visible. Check the thoughts in order. End your reply with the number of that one thought in a box: \\boxed{{N}}, with N
from 1 to {H}{unless}."""
WRONG = dict(
    verdict="Its final answer is WRONG.", what="the wrong answer", unless=""
)  # SRPO's setting
UNKNOWN = dict(
    verdict="It may be right or wrong.",
    what="all that is wrong",
    unless=", or \\boxed{0} if there is no error",
)  # for measurements


def review(question: str, thoughts: list[str], setting: dict = WRONG) -> str:
    """The text that asks for the first wrong one of H thoughts, which are shown from 1 to H without their delimiters."""
    thoughts = [t.replace(DELIMITER, "").strip() or "(empty)" for t in thoughts]
    numbered = "\n".join(f"[Thought {h}] {thought}" for h, thought in enumerate(thoughts, 1))
    return INSTRUCTION.format(question=question, thoughts=numbered, H=len(thoughts), **setting)


def localization_prompt(task: Task, seed: Rollout, setting: dict = WRONG) -> list[int]:
    """Token ids that ask the policy for the first wrong thought of `seed`.

    Terse form: prompt + response + <locate>, on token ids as they were sampled. Otherwise the instruction above, through the chat
    template where the tokenizer has one. The reference answer is in none of them."""
    tokenizer = task.vocabulary.tokenizer
    if (locate := locate_token(tokenizer)) is not None:
        return seed.prompt_ids + seed.token_ids + [locate]
    return encode_prompt(
        tokenizer, review(task.problem.question, seed.thoughts(tokenizer), setting)
    )


def parse_localization(text: str, H: int) -> tuple[int | None, str]:
    """(h*, "self") from the last `\\boxed{N}`, else from the last "step N" or "thought N"; (None, fault) with one of the faults
    unparsable, out_of_range, no_error (the policy says 0, -1 or "none").

    >>> parse_localization("1: fine. Step 3 drops the sign, so \\\\boxed{3}", H=5)
    (3, 'self')
    """
    boxed = last_boxed(text)
    said = (
        re.fullmatch(
            r"(?:\\text\{)?\s*(?:(?:step|thought)\s*)?#?\s*([+-]?[0-9]{1,9})\s*\}?\s*\.?",
            boxed,
            re.I,
        )
        if boxed is not None
        else None
    )
    if said is None and boxed is not None and re.search(r"\b(no|none|correct)\b", boxed, re.I):
        return None, "no_error"
    if said is None and boxed is None:
        said = next(
            reversed(list(re.finditer(r"\b(?:step|thought)\s*#?\s*([0-9]{1,9})\b", text, re.I))),
            None,
        )
    if said is None:
        return None, "unparsable"
    n = int(said.group(1))
    if n in (0, -1):
        return None, "no_error"
    return (n, "self") if 1 <= n <= H else (None, "out_of_range")


# ---------------------------------------------------------------------------------------------------------------- localizers


def reviewed(task: Task, rollouts: list[Rollout], setting: dict = WRONG):
    """One review of each rollout by the policy, at `localize_temperature`: [(h* or None, how, the answer or None where the prompt does not fit)]."""
    cfg = task.cfg
    prompts = [localization_prompt(task, rollout, setting) for rollout in rollouts]
    requests = [
        Request(
            task.problem.index,
            "localization",
            p,
            1,
            int(task.rng.integers(2**62)),
            max_tokens=min(cfg.localize_tokens, task.context - len(p)),
            temperature=cfg.localize_temperature,
            top_p=1.0,
        )  # fmt: skip
        for p in prompts
        if len(p) < task.context
    ]
    answers = iter((yield requests) if requests else ())
    found = []
    for rollout, prompt in zip(rollouts, prompts):
        answer = next(answers)[0] if len(prompt) < task.context else None
        h, how = (
            parse_localization(answer.text, len(rollout.thought_ends))
            if answer
            else (None, "too_long")
        )
        if h is None and not (setting is UNKNOWN and how == "no_error"):
            counters[f"localize_{how}"] += 1
        found.append((h, how, answer))
    return found


def by_self(task: Task, seeds: list[Rollout]):
    """SRPO: the policy names the first wrong thought of each seed; where it names none, `--localize_fallback` says what happens."""
    found = []
    for seed, (h, how, seed.localization) in zip(seeds, (yield from reviewed(task, seeds))):
        found.append((fallback(task, seed) if h is None else h, how))
    return found


def fallback(task: Task, seed: Rollout) -> int | None:
    """h* where the policy gave none: `random` is uniform over 1..H, `first` is 1, `skip` is None (the seed is not used)."""
    kind = task.cfg.localize_fallback
    return {"random": int(task.rng.integers(len(seed.thought_ends))) + 1, "first": 1, "skip": None}[
        kind
    ]


def by_random(task: Task, seeds: list[Rollout]):
    """RRPO: h* ~ Uniform{1..H}."""
    return [(int(task.rng.integers(len(seed.thought_ends))) + 1, "random") for seed in seeds]
    yield  # a generator like the others, that asks for nothing


def by_verifier(task: Task, seeds: list[Rollout]):
    """The exact first wrong thought, from the task's step checker. A seed without a wrong step (its answer was cut off) restarts at H."""
    tokenizer = task.vocabulary.tokenizer
    return [
        (task.problem.check_steps(seed.thoughts(tokenizer)) or len(seed.thought_ends), "verifier")
        for seed in seeds
    ]
    yield


def by_oracle(task: Task, seeds: list[Rollout]):
    """Credit-assignment oracle (CPI-CARO) by Monte Carlo: V(s_h) = mean reward of m continuations of thoughts 1..h, V(s_H) = the
    seed's own reward; h* is the first h with V(s_h) - V(s_{h-1}) < -tau, else the h that loses most."""
    cfg = task.cfg
    requests = [
        task.request("oracle", cfg.oracle_samples, seed, h)
        for seed in seeds
        for h in range(1, len(seed.thought_ends) + 1)
    ]
    answers = iter((yield requests))
    found = []
    for seed in seeds:
        values = [
            sum(r.reward for r in next(answers)) / cfg.oracle_samples for _ in seed.thought_ends
        ] + [seed.reward]
        gains = [
            after - before for before, after in zip(values, values[1:])
        ]  # A(s_{h-1}, y_h), h = 1..H
        below = [h for h, gain in enumerate(gains, 1) if gain < -cfg.oracle_tau]
        counters["oracle_none_below_tau"] += not below
        found.append((below[0] if below else 1 + gains.index(min(gains)), "oracle"))
    return found


LOCALIZERS = {"self": by_self, "random": by_random, "verifier": by_verifier, "oracle": by_oracle}


def check_localizer(name: str, problems, source: str) -> None:
    """Raises UserError where the localizer needs what the problems do not have."""
    if name == "verifier" and any(p.check_steps is None for p in problems):
        raise UserError(
            f"--localizer verifier needs a step checker, which {source} does not have; use --localizer self or oracle"
        )


if __name__ == "__main__":
    from pathlib import Path

    from data.chains import generate_chains
    from eval import evaluate, make_tasks
    from rollout import HFEngine, load_policy, run_programs

    model, tokenizer = load_policy(Path(__file__).resolve().parent / "data" / "policy")
    engine = HFEngine(model, tokenizer)
    tasks = make_tasks(
        generate_chains(steps=12, n=8, seed=1),
        tokenizer,
        engine,
        model.config.max_position_embeddings,
    )
    failures = [
        (task, group[0])
        for task, group in zip(tasks, evaluate(tasks, engine, 1)["groups"])
        if group[0].reward == 0
    ]
    sampled = run_programs([by_self(task, [seed]) for task, seed in failures], engine)
    found, answers = sampled.results, sampled.generated
    for (task, seed), ((h, how),), answer in zip(failures, found, answers):
        print(
            f"truth {task.problem.check_steps(seed.thoughts(tokenizer))}, policy {h} ({how}): {answer.text}"
        )
