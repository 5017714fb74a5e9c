"""Sampling: thought boundaries, exact reset states, unbiased base groups, and the engine against plain forwards."""

import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import Enumerable, Letters
from data.driver import run_programs
from data.english import draw
from data.faults import counters
from data.thoughts import ThoughtTracker, Vocabulary
from data.verifiers import DELIMITER
from localize import by_random, by_verifier
from loss import chosen_logps, collate
from rollout import Engine, HFEngine, Request, Rollout, grpo, resets


def track(
    tokenizer,
    ids,
    max_thoughts=20,
    max_tokens_per_thought=99,
    max_tokens=999,
    prefix=(),
    prefix_ends=(),
):
    request = Request(
        0,
        "base",
        [],
        1,
        0,
        max_tokens,
        1.0,
        1.0,
        list(prefix),
        [],
        list(prefix_ends),
        max_thoughts,
        max_tokens_per_thought,
    )
    tracker = ThoughtTracker(Vocabulary(tokenizer), request)
    for token in ids:
        assert tracker.finish is None, "a token after the end"
        tracker.push(token)
    return tracker.thought_ends, tracker.finish


E = object()  # the eos token
BOX = r"\boxed{7}"


@pytest.mark.parametrize(
    "pieces, ends, finish",
    [
        (["a", "</thought>", "b", "</thought>"], [2, 4], None),  # the delimiter is one token
        (["a", "</", "th", "ought", ">", "b"], [5], None),  # several tokens
        (list("a</thought>b"), [11], None),  # one token per character
        (["a</thou", "ght>b", "c"], [2], None),  # starts and ends inside tokens
        (["a</thought>", "</thought>"], [1, 2], None),  # an empty thought
        (
            ["a</thought></", "thought>"],
            [1, 2],
            None,
        ),  # the next delimiter starts inside the token that ends this one
        (
            ["a</thought>b</thought>c", "d</thought>"],
            [1, 2],
            None,
        ),  # two in one token: one boundary, thoughts are tokens
        (["a</thought", "</thought>"], [2], None),  # a broken one first
        (["a</thought >", "b<//thought>", "</THOUGHT>"], [], None),  # look-alikes
        (["x > y", "}", ">"], [], None),
        (["a</thought>", "b", E], [1, 3], "eos"),
        (["a</thought>", E], [1, 2], "eos"),  # ending is a thought too: it can be the wrong one
        ([E], [1], "eos"),
        (
            ["a</thought>", BOX, " so", "</thought>"],
            [1, 4],
            "answer",
        ),  # on to the end of the thought that holds the box
        (["a", r"\boxed{", "7", "}", "</thought>"], [5], "answer"),
        (
            ["a", r"\boxed{\frac{1", "}{2}", "</thought>", "b}", "</thought>"],
            [4, 6],
            "answer",
        ),  # closed in a later thought
        (["a}</thought>", "b{}</thought>"], [1, 2], None),  # braces, no box
        (["a", r"\boxed{7", "</thought>", "b"], [3], None),  # never closed
        ([BOX, E], [2], "eos"),
        (
            ["<0x3E>", "a</thought", "<0x3E>"],
            [],
            None,
        ),  # the names of byte tokens are not their text
    ],
)
def test_boundaries_on_hard_tokenizations(pieces, ends, finish):
    vocabulary = ["<pad>", "<eos>"] + sorted({p for p in pieces if p is not E})
    tokenizer = Letters(vocabulary, eos=1)
    got_ends, got_finish = track(tokenizer, [1 if p is E else vocabulary.index(p) for p in pieces])
    assert (got_ends, got_finish) == (ends, finish)


def test_budgets():
    tokenizer = Letters(["<pad>", "a", "</thought>"])
    assert track(tokenizer, [1] * 6, max_tokens_per_thought=3) == ([3, 6], None)
    assert track(tokenizer, [1, 2, 1, 1, 1, 1], max_tokens_per_thought=4) == ([2, 6], None)
    assert track(tokenizer, [1, 2] * 2, max_thoughts=2) == ([2, 4], "thoughts")
    assert track(tokenizer, [1, 2, 1], max_tokens=3) == ([2, 3], "length")
    assert track(tokenizer, [1, 2], max_thoughts=2, prefix=[1, 1, 2], prefix_ends=[3]) == (
        [3, 5],
        "thoughts",
    )  # the prefix counts
    assert track(tokenizer, [1, 2], max_tokens=2, prefix=[1, 2], prefix_ends=[2]) == (
        [2, 4],
        "length",
    )  # its tokens do not


def test_boundaries_of_a_real_byte_level_tokenizer():
    """Wherever the tokens fall, a thought ends with the first token after which its text holds a delimiter."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    corpus = ["so x>\n\nthe é thought>\n\n</thought>\n\nand √2 </th ought>\n"] * 50
    raw.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=["<eos>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
    text = "one é√ 2>1</thought>\n\ntwo\n</thought></thought>x</thought \n>y日本</thought>tail"
    ids = tokenizer(text)["input_ids"]
    assert any(
        DELIMITER[-1] in tokenizer.decode([i]) and tokenizer.decode([i]) != ">" for i in ids
    )  # ">" does merge with what is around it
    expected = []
    for end in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[:end])
        if whole.count(DELIMITER) > tokenizer.decode(ids[: end - 1]).count(DELIMITER):
            expected.append(end)
    assert len(expected) == 4
    assert track(tokenizer, ids) == (expected, None)


# ------------------------------------------------------------------------------------------------------------- reset states


@pytest.mark.parametrize("split", [(4, 1, 4), (0, 2, 4), (0, 1, 8)])
@pytest.mark.parametrize("seed_source", ["base", "fresh"])
@pytest.mark.parametrize("seed_choice", ["first", "deepest"])
def test_reset_states_are_exact_and_groups_are_pure(policy, split, seed_source, seed_choice):
    base, prefixes, suffixes = split
    tasks = policy.tasks(
        6,
        12,
        "random",
        base=base,
        prefixes=prefixes,
        suffixes=suffixes,
        seed_source=seed_source,
        seed_choice=seed_choice,
    )
    sampled = run_programs([resets(t) for t in tasks], policy.engine)
    buffers, generated = sampled.results, sampled.generated
    seen_suffix = 0
    for task, buffer in zip(tasks, buffers):
        assert len(buffer) == 8
        groups = {}
        for r in buffer:
            groups.setdefault(r.group, []).append(r)
        for (slot, k), members in groups.items():
            assert slot == task.slot
            if k == 0:
                assert all(r.prefix_len == 0 and r.seed is None for r in members)
                continue
            seed, h = members[0].seed, members[0].reset
            seen_suffix += 1
            assert len(members) == suffixes
            assert seed.reward == 0 and seed.prompt_ids == task.prompt_ids
            assert (seed.purpose == "base") == (
                seed_source == "base" and base > 0 and seed in buffer
            )
            for r in members:
                assert r.seed is seed and r.reset == h
                assert r.prefix_len == ([0] + seed.thought_ends)[h - 1]
                assert r.token_ids[: r.prefix_len] == seed.token_ids[: r.prefix_len]
                assert r.logps[: r.prefix_len] == seed.logps[: r.prefix_len]
                assert r.thought_ends[: h - 1] == seed.thought_ends[: h - 1]
                assert len(r.logps) == len(r.token_ids) == r.thought_ends[-1]
    assert seen_suffix >= 6
    trained = {id(r) for buffer in buffers for r in buffer}
    assert trained <= {id(r) for r in generated}
    if seed_source == "fresh" and base:
        assert all(
            r.seed is None or id(r.seed) not in trained for buffer in buffers for r in buffer
        )


def test_deepest_takes_the_largest_reset_index(policy):
    first, deepest = ([], [])
    for choice, depths in (("first", first), ("deepest", deepest)):
        tasks = policy.tasks(12, 32, "verifier", seed_choice=choice)
        buffers = run_programs([resets(t) for t in tasks], policy.engine).results
        for task, buffer in zip(tasks, buffers):
            h = next((r.reset for r in buffer if r.reset), None)
            if h is None:
                continue
            depths.append(h)
            failures = [r for r in buffer if r.group[1] == 0 and r.reward == 0]
            if choice == "deepest" and failures:
                assert h == max(
                    task.problem.check_steps(r.thoughts(policy.tokenizer)) for r in failures
                )
    assert np.mean(deepest) > np.mean(first) + 1


def test_without_a_failure_it_is_plain_grpo(policy):
    tasks = policy.tasks(1, 6, base=4)
    for task in tasks:
        task.problem.grade = lambda text: 1.0
    sampled = run_programs([resets(t) for t in tasks], policy.engine)
    buffers, generated = sampled.results, sampled.generated
    for buffer in buffers:
        assert len(buffer) == 8 and {r.group[1] for r in buffer} == {0}
    assert counters["no_seed"] == 6
    assert Counter(r.purpose for r in generated) == {"base": 48, "seed": 48}


# ----------------------------------------------------------------------------------------------------------------- unbiased


@pytest.mark.parametrize("seed_source", ["base", "fresh"])
@pytest.mark.parametrize("localizer", [by_random, by_verifier])
def test_base_group_is_unbiased_by_enumeration(seed_source, localizer):
    """Over all outcomes, expected base reward / expected number of base rollouts = the pass rate, exactly."""
    toy = Enumerable(V=2, H=2, correct={(0, 1), (1, 1)}, seed=1)

    def program():
        task = toy.task(
            localizer, base=2, prefixes=1, suffixes=2, seed_source=seed_source, max_seed_draws=1
        )
        task.problem.check_steps = lambda thoughts: 2 if thoughts[0] == "a" else 1
        return resets(task)

    reward = number = total = 0.0
    for buffer, probability in toy.run_all(program):
        base = [r for r in buffer if r.group[1] == 0]
        reward += probability * sum(r.reward for r in base)
        number += probability * len(base)
        total += probability
    assert total == pytest.approx(1, abs=1e-5)
    assert reward / number == pytest.approx(float(toy.value()), abs=1e-5)


@pytest.mark.parametrize("seed_source", ["base", "fresh"])
def test_base_group_is_unbiased_on_the_embedded_policy(policy, seed_source):
    tasks = policy.tasks(3, 400, "random", seed_source=seed_source)
    rewards = run_programs(
        [grpo(t) for t in policy.tasks(3, 400, seed=0, base=8)], policy.engine
    ).results
    pass_rate = np.mean([[r.reward for r in buffer] for buffer in rewards])
    assert 0.2 < pass_rate < 0.8  # where taking a failure out of the group would show
    buffers = run_programs([resets(t) for t in tasks], policy.engine).results
    base = [r.reward for buffer in buffers for r in buffer if r.group[1] == 0]
    error = (
        np.sqrt(pass_rate * (1 - pass_rate) * (1 / len(base) + 1 / 3200)) * 1.5
    )  # rollouts of one problem are alike
    assert abs(np.mean(base) - pass_rate) < 4 * error


def histogram(sampled, responses):
    counts = Counter(tuple(r.token_ids) for r in sampled)
    assert set(counts) <= set(responses)
    return np.array([counts[r] for r in responses]) / len(sampled)


def test_thought_by_thought_and_one_pass_are_the_same_distribution():
    toy = Enumerable(V=3, H=3, correct=set(), seed=2)
    exact = np.array([np.exp(sum(toy.all_logps[r])) for r in toy.responses])
    n = 6000
    task = toy.task()
    (one_pass,) = toy.engine.sample([task.request("base", n)])
    rows = toy.engine.sample([task_step(task, n, [])])[0]
    for _ in range(2):  # every row goes on from its own first thoughts
        rows = [
            group[0] for group in toy.engine.sample([task_step(task, 1, r.token_ids) for r in rows])
        ]
    common = exact * n > 20  # of the others only the total is near normal
    pool = lambda p: np.append(p[common], p[~common].sum())  # noqa: E731
    for sampled in (one_pass, rows):
        z = (pool(histogram(sampled, toy.responses)) - pool(exact)) / np.sqrt(
            pool(exact) * (1 - pool(exact)) / n
        )
        assert common.sum() > 5 and np.abs(z).max() < 4.5


def task_step(task, n, prefix):
    """A request for exactly one more thought after `prefix`."""
    request = task.request("base", n)
    request.prefix_ids, request.prefix_ends = list(prefix), list(range(1, len(prefix) + 1))
    request.prefix_logps = [0.0] * len(prefix)
    request.max_thoughts = len(prefix) + 1
    return request


# ------------------------------------------------------------------------------------------------------------------- engine


def trainer_logps(model, rollouts, temperature=1.0):
    batch = collate(rollouts, [[1.0] * len(r.token_ids) for r in rollouts], pad_id=0)
    with torch.no_grad():
        logps, _ = chosen_logps(model, batch, temperature)
    return logps, batch.old_logps


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_engine_log_probs_equal_the_trainers(policy, temperature):
    """Prefix and suffix: also the resumed prefix gives what one forward over the whole sequence gives."""
    tasks = policy.tasks(7, 12, "random", temperature=temperature) + policy.tasks(
        3, 5, "random", temperature=temperature
    )
    for slot, task in enumerate(tasks):
        task.slot = slot
    buffers = run_programs([resets(t) for t in tasks], policy.engine).results
    rollouts = [r for buffer in buffers for r in buffer]
    assert any(r.prefix_len for r in rollouts)
    logps, sampled = trainer_logps(policy.model, rollouts, temperature)
    assert (logps - sampled).abs().max() < 1e-4


def test_heads_that_share_keys_and_values(policy):
    """Sampling attends by groups of heads, training as transformers does: the same log-probs, for prompts of unlike lengths."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **policy.model.config.to_dict()
        | {
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "initializer_range": 0.3,
        }
    )
    model = LlamaForCausalLM(config).eval()
    assert model.config._attn_implementation == "sdpa"
    engine = HFEngine(model, policy.tokenizer)
    assert model.config._attn_implementation == "grouped"
    requests = [
        task.request("base", 4)
        for n in (3, 9)
        for task in policy.tasks(n, 2, max_thoughts=3, max_tokens_per_thought=8)
    ]
    rollouts = [r for group in engine.sample(requests) for r in group]
    model.set_attn_implementation("sdpa")
    logps, sampled = trainer_logps(model, rollouts)
    assert (logps - sampled).abs().max() < 1e-4


def test_a_response_does_not_depend_on_what_else_is_in_the_batch(policy):
    tasks = policy.tasks(5, 6)
    requests = [t.request("base", 3) for t in tasks]
    together = policy.engine.sample(requests)
    policy.engine.max_rows = 4
    apart = [policy.engine.sample([r])[0] for r in requests]
    policy.engine.max_rows = 512
    ids = lambda groups: [[r.token_ids for r in group] for group in groups]  # noqa: E731
    assert ids(together) == ids(apart)
    assert len({tuple(r.token_ids) for r in together[0]}) > 1


def test_greedy_equals_transformers_generate(policy):
    tasks = policy.tasks(5, 4, temperature=0.0)
    for task, (ours,) in zip(tasks, policy.engine.sample([t.request("base", 1) for t in tasks])):
        out = policy.model.generate(
            torch.tensor([task.prompt_ids]), do_sample=False, max_new_tokens=len(ours.token_ids)
        )
        assert out[0, len(task.prompt_ids) :].tolist() == ours.token_ids


def test_draw_inverts_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    u = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    B = len(u)
    for temperature, top_p, p in (
        (1.0, 1.0, logits[0].softmax(-1)),
        (0.5, 1.0, (logits[0] / 0.5).softmax(-1)),
    ):
        tokens, logps = draw(
            logits.expand(B, -1), torch.full((B,), temperature), torch.full((B,), top_p), u
        )
        assert torch.allclose(torch.bincount(tokens, minlength=4) / B, p, atol=2e-4)
        assert torch.allclose(logps, p.log()[tokens], atol=1e-5)
    tokens, logps = draw(
        logits.expand(B, -1), torch.ones(B), torch.full((B,), 0.8), u
    )  # 2 has 0.64, 1 has 0.24: the nucleus
    assert set(tokens.tolist()) == {1, 2}
    assert torch.allclose(
        logps, logits[0].log_softmax(-1)[tokens], atol=1e-5
    )  # of the whole policy
    tokens, _ = draw(logits.expand(B, -1), torch.zeros(B), torch.ones(B), u)
    assert set(tokens.tolist()) == {2}


def test_responses_fit_into_the_context(policy):
    """A prompt that leaves little room gets a short response that ends by "length", not an error."""
    (task,) = policy.tasks(6, 1)
    task.context = len(task.prompt_ids) + 5
    ((rollout,),) = policy.engine.sample([task.request("base", 1)])
    assert (
        len(rollout.token_ids) == 5 and rollout.finish == "length" and rollout.thought_ends[-1] == 5
    )


def test_a_request_that_finishes_alone(policy):
    """A localization request has no thoughts: it runs to eos or to its budget."""
    prompt = policy.tasks(3, 1)[0].prompt_ids
    request = Request(
        0, "localization", prompt, 2, rng_key=1, max_tokens=7, temperature=1.0, top_p=1.0
    )
    for rollout in policy.engine.sample([request])[0]:
        assert (
            rollout.finish == "length"
            and len(rollout.token_ids) == 7
            and rollout.thought_ends == [7]
        )


def test_driver_returns_results_in_order_and_counts_everything(policy):
    def program(n):
        (a,) = yield [SimpleNamespace(**vars(policy.tasks(2, 1)[0].request("base", n)))]
        (b, c) = yield [SimpleNamespace(**vars(policy.tasks(2, 1)[0].request("suffix", 1)))] * 2
        return a + b + c

    def nothing():
        return []
        yield

    sampled = run_programs([program(1), nothing(), program(3)], policy.engine)
    results, generated, seconds = sampled.results, sampled.generated, sampled.seconds
    assert [len(r) for r in results] == [3, 0, 5] and len(generated) == 8
    assert seconds["base"] > 0 and seconds["suffix"] > 0
    assert all(isinstance(r, Rollout) and r.reward is not None for r in generated)


class Streaming(Engine):
    """An engine that finishes one request a call, and notes when each call was made."""

    streams, share, speaks = True, (0, 1), True

    def __init__(self):
        self.queue, self.calls = [], []

    def start(self, request):
        ticket = self.ticket()
        self.queue.append((ticket, request))
        return ticket

    def finished(self):
        ticket, request = self.queue.pop(0)
        self.calls.append((time.monotonic(), request.problem))
        return [
            (
                ticket,
                [
                    Rollout(request.problem, request.purpose, [1], [1], [0.0], [1], "eos", text="x")
                    for _ in range(request.n)
                ],
            )
        ]


def test_slow_grading_goes_on_while_others_sample():
    """The first problem's verifier waits until the last request has been sampled: only an overlap lets it end. Each goes on when it is graded."""
    engine, sampled_all, order = Streaming(), threading.Event(), []

    def slow(text):
        assert sampled_all.wait(20), "grading blocked sampling"
        return 1.0

    def program(i):
        grade = slow if i == 0 else lambda text: float(i)
        ((first,),) = yield [Request(i, "base", [1], 1, 0, 9, 1.0, 1.0, grade=grade, slow=i == 0)]
        order.append(i)
        ((second,),) = yield [Request(i, "suffix", [1], 1, 0, 9, 1.0, 1.0)]
        if i == 3:
            sampled_all.set()
        return [first.reward, second.reward]

    sampled = run_programs([program(i) for i in range(4)], engine)

    results, generated = sampled.results, sampled.generated
    assert results == [[1.0, None], [1.0, None], [2.0, None], [3.0, None]] and order == [1, 2, 3, 0]
    assert [r.problem for r in generated] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_verifier_that_fails_stops_the_run(policy):
    (task,) = policy.tasks(2, 1)
    request = task.request("base", 2)
    request.slow, request.grade = True, lambda text: 1 / 0

    def program():
        yield [request]

    with pytest.raises(ZeroDivisionError):
        run_programs([program()], policy.engine)
