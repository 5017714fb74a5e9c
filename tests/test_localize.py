"""Localization: parsing, prompts, fallbacks, and localizers against the truth."""

import numpy as np
import pytest

from conftest import Enumerable, Letters
from data.driver import run_programs
from data.faults import counters
from data.problems import Problem
from data.thoughts import Vocabulary
from localize import by_oracle, by_random, by_self, localization_prompt, parse_localization
from rollout import Rollout, Task, resets


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed{3}", (3, "self")),
        (r"\boxed{ 3 }", (3, "self")),
        (r"I thought \boxed{2} but no: \boxed{4}", (4, "self")),
        (r"\boxed{Step 2}", (2, "self")),
        (r"\boxed{\text{2}}", (2, "self")),
        (r"\boxed{thought 5.}", (5, "self")),
        (r"Step 4 is fine, step 5 is wrong, \boxed{5", (5, "self")),
        ("The error is in Step 2.", (2, "self")),
        ("step 1 ok; Thought 3 wrong", (3, "self")),
        (r"\boxed{0}", (None, "no_error")),
        (r"\boxed{-1}", (None, "no_error")),
        (r"\boxed{none}", (None, "no_error")),
        (r"\boxed{No error}", (None, "no_error")),
        (r"\boxed{6}", (None, "out_of_range")),
        (r"\boxed{999999999}", (None, "out_of_range")),
        (r"\boxed{99999999999999999999}", (None, "unparsable")),
        (r"\boxed{-3}", (None, "out_of_range")),
        (r"\boxed{2 or 3}", (None, "unparsable")),
        (r"\boxed{2.5}", (None, "unparsable")),
        (r"\boxed{two}", (None, "unparsable")),
        (r"\boxed{}", (None, "unparsable")),
        ("no idea", (None, "unparsable")),
        ("", (None, "unparsable")),
        ("steps 3", (None, "unparsable")),
        ("٣ \\boxed{٣}", (None, "unparsable")),
        (r"step 2 is wrong, but \boxed{__import__('os')}", (None, "unparsable")),
        ("\\boxed{" * 3000 + "2", (None, "unparsable")),
    ],
)
def test_parsing(text, answer):
    assert parse_localization(text, H=5) == answer


def drive(generator, answers=()):
    """Sends canned texts to a localizer and returns its result."""
    answers, message = iter(answers), None
    try:
        while True:
            requests = generator.send(message)
            message = [
                [Rollout(0, r.purpose, r.prompt_ids, [1], [0.0], [1], "eos", text=next(answers))]
                for r in requests
            ]
    except StopIteration as done:
        return done.value


def seed_of(H):
    return Rollout(
        0,
        "base",
        [0],
        list(range(1, H + 1)),
        [0.0] * H,
        list(range(1, H + 1)),
        "answer",
        reward=0.0,
    )


def plain_task(fallback="random", template=None):
    task = Enumerable(2, 2, set()).task(localize_fallback=fallback, localize_tokens=9)
    return task


@pytest.mark.parametrize(
    "fault, text", [("unparsable", "?"), ("out_of_range", r"\boxed{9}"), ("no_error", r"\boxed{0}")]
)
@pytest.mark.parametrize("fallback", ["random", "first", "skip"])
def test_every_fallback_is_counted(policy, fault, text, fallback):
    (task,) = policy.tasks(4, 1, localize_fallback=fallback)
    ((h, how),) = drive(by_self(task, [seed_of(5)]), [text])
    assert how == fault and counters[f"localize_{fault}"] == 1
    assert {"random": h in range(1, 6), "first": h == 1, "skip": h is None}[fallback]


def test_skipped_seeds_give_their_suffixes_to_the_base_group(policy):
    tasks = policy.tasks(6, 8, localize_fallback="skip")
    for task in tasks:
        task.localize = lambda task, seeds: iter_return([(None, "no_error")] * len(seeds))
    buffers = run_programs([resets(t) for t in tasks], policy.engine).results
    for buffer in buffers:
        assert len(buffer) == 8 and {r.group[1] for r in buffer} == {0}
    assert counters["no_seed"] == 8


def iter_return(value):
    return value
    yield


class Reader(Letters):
    """Letters that remembers the text it was asked to encode."""

    def __call__(self, text):
        self.text = text
        return {"input_ids": [0, 1]}

    def apply_chat_template(self, messages, **_):
        self.text = "USER " + messages[0]["content"]
        return [0, 1]


@pytest.mark.parametrize("template", [None, "a template"])
def test_english_prompt_shows_numbered_thoughts_and_not_the_answer(template):
    tokenizer = Reader(
        ["x", "first</thought>", "second</thought>", "</thought>", r"\boxed{13}</thought>"]
    )
    tokenizer.chat_template = template
    task = Task(
        Problem(0, "What is 5+7?", "SECRET", "integer"),
        [0],
        0,
        None,
        Vocabulary(tokenizer),
        None,
        np.random.default_rng(0),
        99,
    )
    localization_prompt(
        task, Rollout(0, "base", [0], [1, 2, 3, 4], [0.0] * 4, [1, 2, 3, 4], "answer", reward=0.0)
    )
    assert tokenizer.text.startswith("USER ") == (template is not None)
    for part in (
        "What is 5+7?",
        "[Thought 1] first\n[Thought 2] second\n[Thought 3] (empty)\n[Thought 4] \\boxed{13}",
        "WRONG",
        "from 1 to 4",
    ):
        assert part in tokenizer.text
    assert "SECRET" not in tokenizer.text and "</thought>" not in tokenizer.text


def test_random_localizer_is_uniform():
    task = plain_task()
    found = drive(by_random(task, [seed_of(4)] * 4000))
    counts = np.bincount([h for h, _ in found], minlength=5)
    assert counts[0] == 0 and len(counts) == 5
    assert abs(counts[1:] - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def test_verifier_localizer_finds_the_true_first_error(policy):
    tasks = policy.tasks(6, 24)
    buffers = run_programs([resets(t) for t in tasks], policy.engine).results
    suffixes = [(t, r) for t, buffer in zip(tasks, buffers) for r in buffer if r.reset]
    assert suffixes
    for task, r in suffixes:
        thoughts = r.seed.thoughts(policy.tokenizer)
        assert task.problem.check_steps(thoughts) == r.reset
        assert (
            task.problem.check_steps(thoughts[: r.reset - 1] + ["x"]) == r.reset
        )  # everything before it is right


def test_self_localization_beats_chance_without_the_truth(policy):
    tasks = policy.tasks(12, 96, localizer="self")
    for task in tasks:
        task.truth, task.problem.check_steps = task.problem.check_steps, None  # nothing may look
    buffers = run_programs([resets(t) for t in tasks], policy.engine).results
    seeds = {
        id(r.seed): (t, r) for t, buffer in zip(tasks, buffers) for r in buffer if r.reset
    }.values()
    exact = [t.truth(r.seed.thoughts(policy.tokenizer)) == r.reset for t, r in seeds]
    assert len(exact) > 60 and np.mean(exact) > 0.8  # chance is 1/13


def test_oracle_equals_enumeration():
    """With many continuations the oracle's h* is the first thought whose exact advantage is below -tau."""
    toy = Enumerable(
        V=3, H=3, correct={(0, 0, 0), (0, 1, 2), (1, 1, 1), (2, 0, 1), (0, 2, 2)}, seed=4
    )
    checked = 0
    for response in toy.responses:
        if response in toy.correct:
            continue
        values = [toy.value(response[:h]).item() for h in range(3)] + [0.0]
        gains = [b - a for a, b in zip(values, values[1:])]
        tau = 0.08
        if any(abs(gain + tau) < 0.04 for gain in gains) or min(gains) > -tau:
            continue  # too close to call by sampling
        truth = next(h for h, gain in enumerate(gains, 1) if gain < -tau)
        task = toy.task(oracle_samples=1500, oracle_tau=tau)
        seed = Rollout(0, "base", [0], list(response), [0.0] * 3, [1, 2, 3], "thoughts", reward=0.0)
        sampled = run_programs([by_oracle(task, [seed])], toy.engine)
        (result,), generated = sampled.results, sampled.generated
        assert result == [(truth, "oracle")]
        assert len(generated) == 3 * 1500
        checked += 1
    assert checked >= 5
