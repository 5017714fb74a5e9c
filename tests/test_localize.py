"""Localization: parsing, prompts, fallbacks, and localizers against the truth."""

import signal

import numpy as np
import pytest

from conftest import Enumerable, Letters
from data.driver import run_programs
from data.faults import counters
from data.problems import Problem
from data.thoughts import Vocabulary
from localize import (
    by_oracle,
    by_random,
    by_self,
    first_drop,
    localization_prompt,
    named_in,
    parse_localization,
    prefix_values,
    reviewed,
)
from rollout import Rollout, Task, grouped, resets

# ------------------------------------------------------------------------------------------ parsing


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed{3}", (3, "self")),
        (r"\boxed{ 3 }", (3, "self")),
        (r"I thought \boxed{2} but no: \boxed{4}", (4, "self")),
        (r"\boxed{Step 2}", (2, "self")),
        (r"\boxed{\text{2}}", (2, "self")),
        (r"\boxed{thought 5.}", (5, "self")),
        (r"Step 4 is fine, step 5 is wrong, \boxed{5", (None, "unparsable")),
        ("The error is in Step 2.", (None, "unparsable")),
        ("I find no error in step 2.", (None, "unparsable")),
        (r"\boxed{Thought 3 and 4}", (None, "unparsable")),
        (r"\boxed{Thought 3/4}", (None, "unparsable")),
        (r"\boxed{Step 3–5}", (None, "unparsable")),
        (r"\boxed{Thought 3: 4 + 5 = 8}", (3, "self")),
        (r"\boxed{Step 3, 4 + 5 = 8}", (3, "self")),
        (r"\boxed{0}", (None, "no_error")),
        (r"\boxed{-1}", (None, "no_error")),
        (r"\boxed{none}", (None, "no_error")),
        (r"\boxed{No error}", (None, "no_error")),
        (r"\boxed{All steps are correct}", (None, "no_error")),
        (r"\boxed{[Thought 3]}", (3, "self")),
        (r"\boxed{Step 3 is not correct}", (3, "self")),
        (r"\boxed{\text{No. 3}}", (3, "self")),
        (r"\boxed{step 2 or step 3}", (None, "unparsable")),
        (r"\boxed{not correct}", (None, "unparsable")),
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
        (r"\boxed{  \text{  Step   #  4  }  .}", (4, "self")),
    ],
)
def test_parsing(text, answer):
    assert parse_localization(text, H=5) == answer


@pytest.mark.parametrize(
    "text",
    [
        "step" + " " * 500_000 + "!",
        "thought #" + "\n" * 500_000 + "!",
        "\\boxed{step" + " " * 500_000 + "!}",
        "\\boxed{x" + " " * 500_000 + "}",
        "\\boxed{1" + " " * 500_000 + "!}",
        "step " * 100_000 + "!",
        "no" * 250_000,
        "\\boxed{" + "no" * 250_000 + "}",
    ],
)
def test_hostile_answers_are_parsed_at_once(text):
    """Time that grows with the square of the blanks would be hours; the alarm ends those."""

    def end(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    try:
        assert parse_localization(text, H=5) == (None, "unparsable")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def rollout_of(token_ids, finish="answer", text="", reward=0.0):
    """A response to the prompt [0] whose tokens are thoughts of their own."""
    H = len(token_ids)
    return Rollout(
        problem=0,
        purpose="base",
        prompt_ids=[0],
        token_ids=list(token_ids),
        logps=[0.0] * H,
        thought_ends=list(range(1, H + 1)),
        finish=finish,
        text=text,
        reward=reward,
    )


def drive(localizer, texts=()):
    """Answers a localizer's requests with canned texts and returns its result."""
    texts = iter(texts)
    answers = None
    while True:
        try:
            requests = localizer.send(answers)
        except StopIteration as done:
            return done.value
        answers = [[rollout_of([1], "eos", next(texts), reward=None)] for _ in requests]


# ---------------------------------------------------------------------------------------- fallbacks


@pytest.mark.parametrize(
    "fault, text", [("unparsable", "?"), ("out_of_range", r"\boxed{9}"), ("no_error", r"\boxed{0}")]
)
@pytest.mark.parametrize("fallback", ["random", "first", "skip"])
def test_every_fallback_is_counted(policy, fault, text, fallback):
    (task,) = policy.tasks(4, 1, localize_fallback=fallback)
    seeds = [rollout_of([1, 2, 3, 4, 5])] * 100
    found = drive(by_self(task, seeds), [text] * 100)
    assert {how for _, how in found} == {fault}
    assert counters[f"localize_{fault}"] == 100
    expected = {"random": {1, 2, 3, 4, 5}, "first": {1}, "skip": {None}}
    assert {h for h, _ in found} == expected[fallback]


def test_a_review_that_does_not_fit_is_counted_and_others_keep_theirs(policy):
    (task,) = policy.tasks(4, 1)
    long, short = rollout_of([1, 2, 3, 4]), rollout_of([1, 2])
    task.context = len(localization_prompt(task, long))  # no room for an answer
    reviews = drive(reviewed(task, [long, short]), [r"\boxed{2}"])
    assert [(review.h, review.how) for review in reviews] == [(None, "too_long"), (2, "self")]
    assert reviews[0].answer is None and counters == {"localize_too_long": 1}


def test_a_review_is_asked_at_its_own_settings(policy):
    (task,) = policy.tasks(4, 1, temperature=0.7, top_p=0.9, localize_tokens=5)
    request = task.ask("review", task.prompt_ids)
    assert (request.n, request.temperature, request.top_p, request.max_tokens) == (1, 0.3, 1.0, 5)
    assert request.max_thoughts is None and request.grade is None


def test_the_largest_drop_where_none_is_below_tau():
    assert first_drop([0.5, 0.45, 0.35, 0.30], tau=0.2) == 2
    assert counters == {"oracle_none_below_tau": 1}
    assert first_drop([0.5, 0.45, 0.15, 0.0], tau=0.2) == 2
    assert counters == {"oracle_none_below_tau": 1}


def test_an_answer_that_is_cut_off_names_no_step():
    """It has a fault of its own: more --localize_tokens may mend it."""
    text = "[Thought 1] right [Thought 2] ri"
    assert named_in(rollout_of([1], "length", text), H=5) == (None, "cut_off")
    assert named_in(rollout_of([1], "eos", text), H=5) == (None, "unparsable")
    assert named_in(rollout_of([1], "length", text + r" \boxed{4}"), H=5) == (4, "self")


def never_found(task, seeds):
    yield from ()
    return [(None, "no_error")] * len(seeds)


def test_skipped_seeds_give_their_suffixes_to_the_base_group(policy):
    tasks = policy.tasks(6, 8, localize_fallback="skip")
    for task in tasks:
        task.localize = never_found
    buffers = run_programs([resets(task) for task in tasks], policy.engine).results
    for task, buffer in zip(tasks, buffers):
        assert len(buffer) == 8
        assert set(grouped(buffer)) == {(task.slot, 0)}
    assert counters["no_reset"] == 8


# ------------------------------------------------------------------------------------------ prompts


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
    pieces = ["x", "first</thought>", "second</thought>", "</thought>", r"\boxed{13}</thought>"]
    tokenizer = Reader(pieces)
    tokenizer.chat_template = template
    task = Task(
        problem=Problem(0, "What is 5+7?", "SECRET", "integer"),
        prompt_ids=[0],
        slot=0,
        cfg=None,
        vocabulary=Vocabulary(tokenizer),
        localize=None,
        rng=np.random.default_rng(0),
        context=99,
    )
    localization_prompt(task, rollout_of([1, 2, 3, 4]))
    text = tokenizer.text
    assert text.startswith("USER ") == (template is not None)
    assert "What is 5+7?" in text
    assert "[Thought 1] first\n[Thought 2] second\n[Thought 3] (empty)\n" in text
    assert "(empty)\n[Thought 4] \\boxed{13}" in text
    assert "WRONG" in text
    assert "from 1 to 4" in text
    assert "SECRET" not in text
    assert "</thought>" not in text


# ------------------------------------------------------------------------------- against the truth


def test_random_localizer_is_uniform():
    task = Enumerable(V=2, H=2, correct=set()).task()
    seed = rollout_of([1, 2, 3, 4])
    found = drive(by_random(task, [seed] * 4000))
    counts = np.bincount([h for h, _ in found], minlength=5)
    assert counts[0] == 0 and len(counts) == 5
    assert abs(counts[1:] - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def test_verifier_localizer_finds_the_true_first_error(policy):
    tasks = policy.tasks(6, 24)
    buffers = run_programs([resets(task) for task in tasks], policy.engine).results
    checked = 0
    for task, buffer in zip(tasks, buffers):
        for rollout in buffer:
            if rollout.reset is None:
                continue
            h = rollout.reset
            thoughts = rollout.seed.thoughts(policy.tokenizer)
            assert task.problem.check_steps(thoughts) == h
            # Everything before it is right: a wrong thought in its place is the first wrong one.
            assert task.problem.check_steps(thoughts[: h - 1] + ["x"]) == h
            checked += 1
    assert checked


def test_self_localization_beats_chance_without_the_truth(policy):
    tasks = policy.tasks(12, 96, localizer="self")
    truths = [task.problem.check_steps for task in tasks]
    for task in tasks:
        task.problem.check_steps = None  # nothing may look
    buffers = run_programs([resets(task) for task in tasks], policy.engine).results
    exact = {}  # by seed
    for truth, buffer in zip(truths, buffers):
        for rollout in buffer:
            if rollout.reset is not None:
                thoughts = rollout.seed.thoughts(policy.tokenizer)
                exact[id(rollout.seed)] = truth(thoughts) == rollout.reset
    assert len(exact) > 60
    assert np.mean(list(exact.values())) > 0.8  # chance is 1/13


def test_prefix_values_equal_enumeration():
    """A state that responses share is sampled once; a whole response is worth its own reward."""
    correct = {(0, 0, 0), (0, 1, 2), (1, 1, 1), (2, 0, 1), (0, 2, 2)}
    toy = Enumerable(V=3, H=3, correct=correct, rng_key=4)
    samples = 1500
    task = toy.task(oracle_samples=samples)
    responses = [(0, 1, 2), (0, 1, 0), (0, 2, 1)]
    rollouts = [rollout_of(response, reward=response in correct) for response in responses]
    sampled = run_programs([prefix_values(task, rollouts, "value")], toy.engine)
    (values,) = sampled.results
    for response, estimates in zip(responses, values, strict=True):
        exact = [toy.value(response[:h]).item() for h in range(4)]
        assert estimates == pytest.approx(exact, abs=5 * 0.5 / np.sqrt(samples))
        assert estimates[3] == float(response in correct)
    assert values[0][:3] == values[1][:3]
    assert values[0][:2] == values[2][:2]
    states = {(), (0,), (0, 1), (0, 2)}
    assert len(sampled.generated) == len(states) * samples
    assert {rollout.purpose for rollout in sampled.generated} == {"value"}


def test_oracle_equals_enumeration():
    """With many continuations h* is the first thought whose exact advantage is below -tau."""
    correct = {(0, 0, 0), (0, 1, 2), (1, 1, 1), (2, 0, 1), (0, 2, 2)}
    toy = Enumerable(V=3, H=3, correct=correct, rng_key=4)
    tau, samples = 0.08, 1500
    checked = 0
    for response in toy.responses:
        if response in correct:
            continue
        values = [toy.value(response[:h]).item() for h in range(3)] + [0.0]
        advantages = np.diff(values)
        if abs(advantages + tau).min() < 0.04 or advantages.min() > -tau:
            continue  # too close to call by sampling
        truth = 1 + int(np.argmax(advantages < -tau))
        task = toy.task(oracle_samples=samples, oracle_tau=tau)
        seed = rollout_of(response, "thoughts")
        sampled = run_programs([by_oracle(task, [seed])], toy.engine)
        assert sampled.results == [[(truth, "oracle")]]
        assert len(sampled.generated) == 3 * samples
        checked += 1
    assert checked >= 5
