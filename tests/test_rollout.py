"""Sampling: thought boundaries, reset states, unbiased base groups, and the engine.

Boundaries are checked on hard tokenizations, the base group by enumeration, and the engine against
plain forwards of the same model.
"""

import copy
import itertools
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
)

from conftest import Enumerable, Letters, settings
from data.contexts import keep_rows, sampling_cache
from data.driver import run_programs
from data.faults import UserError, counters
from data.programs import trained_rollouts
from data.thoughts import ThoughtTracker, Vocabulary
from data.verifiers import DELIMITER
from localize import by_random, by_verifier
from loss import Weighted, body_and_head, collate
from rollout import (
    Engine,
    HFEngine,
    Request,
    Rollout,
    draw,
    grouped,
    grpo,
    records_of,
    resets,
)

# --------------------------------------------------------------------------------------- boundaries


def request_of(**changed):
    """A request for one response of at most 9 tokens, not cut into thoughts unless told."""
    usual = dict(
        problem=0,
        purpose="base",
        prompt_ids=[1],
        n=1,
        rng_key=0,
        max_tokens=9,
        temperature=1.0,
        top_p=1.0,
    )
    return Request(**(usual | changed))


def track(vocabulary, ids, **changed):
    """(thought ends, finish) of these tokens."""
    limits = dict(max_thoughts=20, max_tokens_per_thought=99, max_tokens=999)
    tracker = ThoughtTracker(vocabulary, request_of(**(limits | changed)))
    for token in ids:
        assert tracker.finish is None, "a token after the end"
        tracker.push(token)
    return tracker.thought_ends, tracker.finish


E = object()  # the eos token
BOX = r"\boxed{7}"

# (pieces of the response, thought ends, finish)
HARD = [
    # the delimiter is one token
    (["a", "</thought>", "b", "</thought>"], [2, 4], None),
    # several tokens
    (["a", "</", "th", "ought", ">", "b"], [5], None),
    # one token per character
    (list("a</thought>b"), [11], None),
    # it starts and ends inside tokens
    (["a</thou", "ght>b", "c"], [2], None),
    # an empty thought
    (["a</thought>", "</thought>"], [1, 2], None),
    # the next delimiter starts inside the token that ends this one
    (["a</thought></", "thought>"], [1, 2], None),
    # two in one token: one boundary, because thoughts are made of whole tokens
    (["a</thought>b</thought>c", "d</thought>"], [1, 2], None),
    # a broken one first
    (["a</thought", "</thought>"], [2], None),
    # look-alikes
    (["a</thought >", "b<//thought>", "</THOUGHT>"], [], None),
    (["x > y", "}", ">"], [], None),
    # the tokens after the last delimiter are a thought too: it can be the wrong one
    (["a</thought>", "b", E], [1, 3], "eos"),
    (["a</thought>", E], [1, 2], "eos"),
    ([E], [1], "eos"),
    # an answer goes on to the end of the thought that holds the box
    (["a</thought>", BOX, " so", "</thought>"], [1, 4], "answer"),
    (["a", r"\boxed{", "7", "}", "</thought>"], [5], "answer"),
    # a box that is closed in a later thought
    (["a", r"\boxed{\frac{1", "}{2}", "</thought>", "b}", "</thought>"], [4, 6], "answer"),
    # braces, no box
    (["a}</thought>", "b{}</thought>"], [1, 2], None),
    # a box that is never closed
    (["a", r"\boxed{7", "</thought>", "b"], [3], None),
    ([BOX, E], [2], "eos"),
    # the names of byte tokens are not their text
    (["<0x3E>", "a</thought", "<0x3E>"], [], None),
]


@pytest.mark.parametrize("pieces, ends, finish", HARD)
def test_boundaries_on_hard_tokenizations(pieces, ends, finish):
    texts = {piece for piece in pieces if piece is not E}
    vocabulary = ["<pad>", "<eos>", *sorted(texts)]
    tokenizer = Letters(vocabulary, eos=1)
    ids = [1 if piece is E else vocabulary.index(piece) for piece in pieces]
    assert track(Vocabulary(tokenizer), ids) == (ends, finish)


def test_budgets():
    vocabulary = Vocabulary(Letters(["<pad>", "a", "</thought>"]))
    assert track(vocabulary, [1] * 6, max_tokens_per_thought=3) == ([3, 6], None)
    assert track(vocabulary, [1, 2, 1, 1, 1, 1], max_tokens_per_thought=4) == ([2, 6], None)
    assert track(vocabulary, [1, 2] * 2, max_thoughts=2) == ([2, 4], "thoughts")
    assert track(vocabulary, [1, 2, 1], max_tokens=3) == ([2, 3], "length")
    # The prefix counts as thoughts, but not as generated tokens.
    prefix = dict(prefix_ids=[1, 1, 2], prefix_ends=[3])
    assert track(vocabulary, [1, 2], max_thoughts=2, **prefix) == ([3, 5], "thoughts")
    prefix = dict(prefix_ids=[1, 2], prefix_ends=[2])
    assert track(vocabulary, [1, 2], max_tokens=2, **prefix) == ([2, 4], "length")


@pytest.fixture(scope="module")
def byte_level():
    """A real byte-level BPE tokenizer. Its tokens cross words, lines and delimiters."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    corpus = ["so x>\n\nthe é thought>\n\n</thought>\n\nand √2 </th ought>\n"] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")


def true_ends(tokenizer, ids, delimiter):
    """The ends of all tokens after which the text so far holds one more delimiter."""
    ends, found = [], 0
    for end in range(1, len(ids) + 1):
        now = tokenizer.decode(ids[:end]).count(delimiter)
        if now > found:
            ends.append(end)
        found = now
    return ends


def test_boundaries_of_a_real_byte_level_tokenizer(byte_level):
    """A thought ends with the first token after which its text holds a delimiter."""
    text = "one é√ 2>1</thought>\n\ntwo\n</thought></thought>x</thought \n>y日本</thought>tail"
    ids = byte_level(text)["input_ids"]
    pieces = [byte_level.decode([token]) for token in ids]
    # ">" does merge with what is around it.
    assert any(DELIMITER[-1] in piece and piece != DELIMITER[-1] for piece in pieces)
    expected = true_ends(byte_level, ids, DELIMITER)
    assert len(expected) == 4
    assert track(Vocabulary(byte_level), ids) == (expected, None)


@pytest.mark.parametrize("delimiter", ["</thought>\n", "</thought>¶", "¶", "。"])
@pytest.mark.parametrize("thoughts", [["one é√ 2>1", "日本 two\n", "", "</thought >y"], ["a"] * 5])
def test_other_delimiters(byte_level, delimiter, thoughts):
    """One that ends in a line break, or in a character that is several tokens, cuts as exactly."""
    vocabulary = Vocabulary(byte_level, delimiter=delimiter)
    assert vocabulary.closers
    ids = byte_level(delimiter.join([*thoughts, "tail"]))["input_ids"]
    expected = true_ends(byte_level, ids, delimiter)
    assert len(expected) == len(thoughts)
    assert track(vocabulary, ids) == (expected, None)


def test_a_line_break_as_part_of_the_delimiter():
    """It may be a token of its own, end a token, or merge with what follows."""
    pieces = ["<pad>", "a", "</thought>", "\n", "</thought>\n", "\nb", "c</thought"]
    vocabulary = Vocabulary(Letters(pieces), delimiter="</thought>\n")
    assert vocabulary.closers == {3, 4, 5}
    ids = [1, 2, 3, 1, 4, 1, 2, 5, 2, 1, 3, 6, 3]
    assert track(vocabulary, ids) == ([3, 5, 8], None)


# ------------------------------------------------------------------------------------- reset states


@pytest.mark.parametrize("split", [(4, 1, 4), (0, 2, 4), (0, 1, 8)])
@pytest.mark.parametrize("seed_source", ["base", "fresh"])
def test_reset_states_are_exact_and_groups_are_pure(policy, split, seed_source):
    base, prefixes, suffixes = split
    numbers = dict(base=base, prefixes=prefixes, suffixes=suffixes)
    tasks = policy.tasks(6, 12, "random", seed_source=seed_source, **numbers)
    sampled = run_programs([resets(task) for task in tasks], policy.engine)
    suffix_groups = 0
    for task, buffer in zip(tasks, sampled.results):
        assert len(buffer) == 8
        for (slot, k), members in grouped(buffer).items():
            assert slot == task.slot
            if k == 0:
                assert all(r.prefix_len == 0 and r.seed is None for r in members)
                continue
            suffix_groups += 1
            assert len(members) == suffixes
            seed = members[0].seed
            assert seed.reward == 0 and seed.prompt_ids == task.prompt_ids
            from_base = seed_source == "base" and base > 0 and seed in buffer
            assert (seed.purpose == "base") == from_base
            for rollout in members:
                assert rollout.seed is seed and rollout.reset == members[0].reset
                assert rollout.localized == "random"
                assert_continues_its_seed(rollout)
    assert suffix_groups >= 6
    trained = list_all(sampled.results)
    trained_ids = {id(rollout) for rollout in trained}
    assert trained_ids <= {id(rollout) for rollout in sampled.generated}
    if seed_source == "fresh" and base:
        assert not any(id(rollout.seed) in trained_ids for rollout in trained if rollout.seed)


def assert_continues_its_seed(rollout):
    """Everything before thought h* is the seed's, and everything after it is whole."""
    seed, h, shared = rollout.seed, rollout.reset, rollout.prefix_len
    assert shared == [0, *seed.thought_ends][h - 1]
    assert rollout.token_ids[:shared] == seed.token_ids[:shared]
    assert rollout.logps[:shared] == seed.logps[:shared]
    assert rollout.thought_ends[: h - 1] == seed.thought_ends[: h - 1]
    assert len(rollout.logps) == len(rollout.token_ids) == rollout.thought_ends[-1]


def list_all(groups):
    """One list of all rollouts of all groups."""
    rollouts = []
    for group in groups:
        rollouts += group
    return rollouts


def always_right(text):
    return 1.0


def test_without_a_failure_it_is_plain_grpo(policy):
    tasks = policy.tasks(1, 6, base=4, max_seed_draws=6)
    for task in tasks:
        task.problem.grade = always_right
    sampled = run_programs([resets(task) for task in tasks], policy.engine)
    for task, buffer in zip(tasks, sampled.results):
        assert len(buffer) == 8
        assert set(grouped(buffer)) == {(task.slot, 0)}
    assert counters["no_reset"] == 6
    assert Counter(r.purpose for r in sampled.generated) == {"base": 24, "seed": 36, "more": 24}


def test_thoughts_are_the_text_that_was_graded(policy):
    """Also with a tokenizer that tidies blanks by default: `41 .` would become `41.`."""
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.clean_up_tokenization_spaces = True
    (task,) = policy.tasks(2, 1)
    ids = task.prompt_ids
    assert " ." in policy.tokenizer.decode(ids)
    rollout = Rollout(0, "base", ids, ids, [0.0] * len(ids), [len(ids)], "eos")
    assert rollout.thoughts(tokenizer) == [task.vocabulary.decode(ids)]


def test_a_finished_row_that_stays_takes_no_position_beyond_the_model(policy):
    """Learned positions end with the context: a row that is over must not ask for the next one."""
    config = GPT2Config(
        vocab_size=len(policy.tokenizer), n_positions=16, n_embd=32, n_layer=1, n_head=1
    )
    engine = HFEngine(GPT2LMHeadModel(config), policy.tokenizer)
    long = request_of(prompt_ids=[1] * 12, n=1, max_tokens=4)
    short = request_of(prompt_ids=[1] * 2, n=9, max_tokens=14)
    (first,), others = engine.sample([long, short])
    assert len(first.token_ids) <= 4 and max(len(r.token_ids) for r in others) > 4


# ----------------------------------------------------------------------------------------- unbiased


def base_rewards(buffer):
    """Rewards of the rollouts of a buffer's base group."""
    return [rollout.reward for rollout in buffer if rollout.group[1] == 0]


@pytest.mark.parametrize("seed_source", ["base", "fresh"])
@pytest.mark.parametrize("localizer", [by_random, by_verifier])
def test_base_group_is_unbiased_by_enumeration(seed_source, localizer):
    """Expected base reward / expected number of base rollouts is the pass rate, exactly."""
    toy = Enumerable(V=2, H=2, correct={(0, 1), (1, 1)}, rng_key=1)
    numbers = dict(base=2, prefixes=1, suffixes=2, max_seed_draws=1)

    def first_wrong(thoughts):
        return 2 if thoughts[0] == "a" else 1

    def start_program():
        task = toy.task(localizer, seed_source=seed_source, **numbers)
        task.problem.check_steps = first_wrong
        return resets(task)

    reward = number = total = 0.0
    for outcome in toy.run_all(start_program):
        rewards = base_rewards(outcome.rollouts)
        reward += outcome.probability * sum(rewards)
        number += outcome.probability * len(rewards)
        total += outcome.probability
    assert total == pytest.approx(1, abs=1e-5)
    assert reward / number == pytest.approx(toy.value().item(), abs=1e-5)


@pytest.mark.parametrize("seed_source", ["base", "fresh"])
def test_base_group_is_unbiased_on_the_embedded_policy(policy, seed_source):
    plain = policy.tasks(3, 400, base=8)
    samples = run_programs([grpo(task) for task in plain], policy.engine).results
    pass_rate = np.mean([base_rewards(buffer) for buffer in samples])
    # Between these, taking a failure out of the group would show.
    assert 0.2 < pass_rate < 0.8
    tasks = policy.tasks(3, 400, "random", seed_source=seed_source)
    rewards = []
    for buffer in run_programs([resets(task) for task in tasks], policy.engine).results:
        rewards += base_rewards(buffer)
    error = np.sqrt(pass_rate * (1 - pass_rate) * (1 / len(rewards) + 1 / 3200))
    error *= 1.5  # rollouts of one problem are alike
    assert abs(np.mean(rewards) - pass_rate) < 4 * error


def test_thought_by_thought_and_one_pass_are_the_same_distribution():
    toy = Enumerable(V=3, H=3, correct=set(), rng_key=2)
    exact = np.array([np.exp(sum(toy.all_logps[response])) for response in toy.responses])
    n = 6000
    task = toy.task()
    (one_pass,) = toy.engine.sample([task.request("base", n)])
    (by_thought,) = toy.engine.sample([one_more_thought(task, n, [])])
    for _ in range(2):  # every row goes on from its own first thoughts
        requests = [one_more_thought(task, 1, rollout.token_ids) for rollout in by_thought]
        by_thought = list_all(toy.engine.sample(requests))
    common = exact * n > 20  # of the others only the total is near normal
    assert common.sum() > 5
    expected = pooled(exact, common)
    for rollouts in (one_pass, by_thought):
        shares = pooled(histogram(rollouts, toy.responses), common)
        z = (shares - expected) / np.sqrt(expected * (1 - expected) / n)
        assert np.abs(z).max() < 4.5


def histogram(rollouts, responses):
    """The share of each response."""
    counts = Counter(tuple(rollout.token_ids) for rollout in rollouts)
    assert set(counts) <= set(responses)
    return np.array([counts[response] for response in responses]) / len(rollouts)


def pooled(shares, common):
    """The shares of the common responses, and that of all others together."""
    return np.append(shares[common], shares[~common].sum())


def one_more_thought(task, n, prefix):
    """A request for exactly one more thought after `prefix`, which has one-token thoughts."""
    request = task.request("base", n)
    request.prefix_ids = list(prefix)
    request.prefix_logps = [0.0] * len(prefix)
    request.prefix_ends = list(range(1, len(prefix) + 1))
    request.max_thoughts = len(prefix) + 1
    return request


# ------------------------------------------------------------------------------------------- engine


def trainer_logps(model, rollouts, temperature=1.0):
    """(the trainer's log-probs, the sampler's) of all response tokens."""
    items = []
    for rollout in rollouts:
        n = len(rollout.token_ids)
        items.append(Weighted(rollout, [1.0] * n, [True] * n))
    batch = collate(items, pad_id=0)
    _, scored = body_and_head(model, batch, settings(temperature=temperature))
    return scored.logps, batch.chosen.old_logps


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_engine_log_probs_equal_the_trainers(policy, temperature):
    """Also those of a shared prefix equal what one forward over the whole sequence gives."""
    tasks = policy.tasks(7, 12, "random", temperature=temperature)
    tasks += policy.tasks(3, 5, "random", temperature=temperature)
    for slot, task in enumerate(tasks):
        task.slot = slot
    rollouts = list_all(run_programs([resets(task) for task in tasks], policy.engine).results)
    assert any(rollout.prefix_len for rollout in rollouts)
    logps, sampled = trainer_logps(policy.model, rollouts, temperature)
    assert (logps - sampled).abs().max() < 1e-4


def test_heads_that_share_keys_and_values(policy):
    """A model whose query heads share key and value heads samples with the trainer's log-probs."""
    heads = dict(num_attention_heads=6, num_key_value_heads=2, head_dim=16, initializer_range=0.3)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(policy.model.config.to_dict() | heads))).eval()
    limits = dict(max_thoughts=3, max_tokens_per_thought=8)
    tasks = policy.tasks(3, 2, **limits) + policy.tasks(9, 2, **limits)
    assert len({len(task.prompt_ids) for task in tasks}) > 1
    engine = HFEngine(model, policy.tokenizer)
    rollouts = list_all(engine.sample([task.request("base", 4) for task in tasks]))
    logps, sampled = trainer_logps(model, rollouts)
    assert (logps - sampled).abs().max() < 1e-4


def test_the_cache_is_not_copied_for_a_new_token(policy):
    cache = sampling_cache(policy.model.config)
    copies = set()
    with torch.inference_mode():
        for _ in range(10):
            policy.model(input_ids=torch.tensor([[5, 6], [7, 8]]), past_key_values=cache)
            copies.add(cache.layers[0].keys.data_ptr())
    assert len(copies) == 1 and cache.layers[0].keys.shape[2] == 20


def test_rows_that_leave_take_their_padding_along(policy):
    """The next logits of the rows that stay are what they were."""
    ids = torch.tensor([[4, 5, 6, 7, 8], [0, 0, 4, 5, 6], [0, 0, 0, 7, 8]])
    mask = torch.tensor([[1] * 5, [0] * 2 + [1] * 3, [0] * 3 + [1] * 2])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    stay = torch.tensor([1, 2])
    logits = []
    with torch.inference_mode():
        for leave in (False, True):
            cache = sampling_cache(policy.model.config)
            cached = dict(past_key_values=cache, attention_mask=mask)
            policy.model(input_ids=ids, position_ids=positions, **cached)
            kept = keep_rows(cache, mask, stay) if leave else mask
            rows = stay if leave else torch.arange(3)
            cached["attention_mask"] = torch.cat([kept, kept.new_ones(len(rows), 1)], 1)
            new = dict(input_ids=ids[rows, -1:], position_ids=positions[rows, -1:] + 1)
            logits.append(policy.model(**new, **cached).logits[:, -1])
    assert kept.tolist() == [[1, 1, 1], [0, 1, 1]] and cache.get_seq_length() == 4
    assert torch.allclose(logits[0][stay], logits[1], atol=1e-5)


def token_ids_of(groups):
    """The token ids of each rollout, by group."""
    tokens = []
    for group in groups:
        tokens.append([rollout.token_ids for rollout in group])
    return tokens


def test_a_response_does_not_depend_on_what_else_is_in_the_batch(policy):
    requests = [task.request("base", 3) for task in policy.tasks(5, 6)]
    together = token_ids_of(policy.engine.sample(requests))
    small_batches = HFEngine(policy.model, policy.tokenizer, max_rows=4)
    apart = []
    for request in requests:
        apart += token_ids_of(small_batches.sample([request]))
    assert together == apart
    assert token_ids_of(small_batches.sample(requests)) == together
    first, *others = together[0]
    assert any(other != first for other in others)


def test_a_copy_in_bfloat16_keeps_positions(policy):
    """Only the weights get the type: rounded rotary frequencies would be another policy."""
    engine = HFEngine(policy.model, policy.tokenizer, 512, torch.device("cpu"), torch.bfloat16)
    assert {weight.dtype for weight in engine.model.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in policy.model.parameters()} == {torch.float32}
    buffers = dict(engine.model.named_buffers())
    assert buffers
    for name, buffer in policy.model.named_buffers():
        assert torch.equal(buffers[name], buffer) and buffers[name].dtype == buffer.dtype


def test_greedy_equals_transformers_generate(policy):
    tasks = policy.tasks(5, 4, temperature=0.0)
    groups = policy.engine.sample([task.request("base", 1) for task in tasks])
    for task, (ours,) in zip(tasks, groups):
        prompt = torch.tensor([task.prompt_ids])
        out = policy.model.generate(prompt, do_sample=False, max_new_tokens=len(ours.token_ids))
        assert out[0, len(task.prompt_ids) :].tolist() == ours.token_ids


TINY = dict(
    hidden_size=48,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,
)
CONVOLUTIONS = Lfm2Config(num_hidden_layers=3, full_attn_idxs=[1], **TINY)
STATE_SPACES = FalconH1Config(
    num_hidden_layers=2,
    head_dim=12,
    mamba_d_ssm=32,
    mamba_n_heads=4,
    mamba_d_head=8,
    mamba_n_groups=1,
    mamba_d_state=8,
    **TINY,
)


WINDOWS = MistralConfig(num_hidden_layers=2, sliding_window=8, **TINY)


@pytest.mark.parametrize("config", [CONVOLUTIONS, STATE_SPACES, WINDOWS])
def test_models_whose_layers_keep_more_than_keys_and_values(policy, config):
    """Greedy equals `generate` where contexts differ in length and rows leave the batch, and
    log-probs are the trainer's."""
    config = copy.deepcopy(config)
    config.update({"vocab_size": policy.model.config.vocab_size, "tie_word_embeddings": True})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    engine = HFEngine(model, policy.tokenizer)
    limits = dict(max_thoughts=2, max_tokens_per_thought=8)
    for temperature in (0.0, 1.0):
        tasks = policy.tasks(3, 4, temperature=temperature, **limits)
        tasks += policy.tasks(9, 4, temperature=temperature, **limits)
        groups = engine.sample([task.request("base", 2) for task in tasks])
        lengths = {len(rollout.token_ids) for rollout in list_all(groups)}
        if temperature:
            assert len(lengths) > 1
            logps, sampled = trainer_logps(model, list_all(groups))
            assert (logps - sampled).abs().max() < 1e-4
            continue
        for task, group in zip(tasks, groups):
            prompt = torch.tensor([task.prompt_ids])
            asked = dict(do_sample=False, max_new_tokens=len(group[0].token_ids))
            out = model.generate(prompt, eos_token_id=None, pad_token_id=0, **asked)
            for rollout in group:
                assert out[0, len(task.prompt_ids) :].tolist() == rollout.token_ids


def draw_evenly(logits, temperature, top_p):
    """`draw` at 10,000 evenly spaced u, all from the same logits [V]."""
    B = 10_000
    u = (torch.arange(B, dtype=torch.float64) + 0.5) / B
    return draw(logits.expand(B, -1), torch.full((B,), temperature), torch.full((B,), top_p), u)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draw_inverts_the_distribution(temperature):
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    tokens, logps = draw_evenly(logits, temperature, top_p=1.0)
    p = (logits / temperature).softmax(-1)
    assert torch.allclose(torch.bincount(tokens, minlength=4) / len(tokens), p, atol=2e-4)
    assert torch.allclose(logps, p.log()[tokens], atol=1e-5)


def test_draw_from_a_nucleus():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    tokens, logps = draw_evenly(logits, 1.0, top_p=0.8)
    assert set(tokens.tolist()) == {1, 2}  # token 2 has 0.64, token 1 has 0.24
    # Log-probs are of the whole policy.
    assert torch.allclose(logps, logits.log_softmax(-1)[tokens], atol=1e-5)


def test_greedy_draw():
    tokens, _ = draw_evenly(torch.tensor([0.0, 1.0, 2.0, -1.0]), 0.0, top_p=1.0)
    assert set(tokens.tolist()) == {2}


def test_responses_fit_into_the_context(policy):
    """A prompt that leaves little room gets a short response that ends by "length"."""
    (task,) = policy.tasks(6, 1)
    task.context = len(task.prompt_ids) + 5
    ((rollout,),) = policy.engine.sample([task.request("base", 1)])
    assert len(rollout.token_ids) == 5
    assert rollout.finish == "length"
    assert rollout.thought_ends[-1] == 5


def test_a_request_says_where_its_rollouts_come_from(policy):
    (task,) = policy.tasks(5, 1)
    ((seed,),) = policy.engine.sample([task.request("base", 1)])
    H = len(seed.thought_ends)
    assert H > 2
    for h in (1, 2, H, H + 1):
        (rollouts,) = policy.engine.sample([task.request("again", 2, seed, h, "by hand")])
        shared = [0, *seed.thought_ends][h - 1]
        for rollout in rollouts:
            assert (rollout.seed, rollout.reset, rollout.localized) == (seed, h, "by hand")
            assert rollout.token_ids[:shared] == seed.token_ids[:shared]
            assert rollout.thought_ends[: h - 1] == seed.thought_ends[: h - 1]
            assert rollout.prefix_len == shared and rollout.generated > 0
    assert shared == len(seed.token_ids)  # h = H + 1: all of it


@pytest.mark.parametrize("beyond", [False, True])
def test_a_thought_that_is_not_there_is_an_error(policy, beyond):
    (task,) = policy.tasks(5, 1)
    ((seed,),) = policy.engine.sample([task.request("base", 1)])
    H = len(seed.thought_ends)
    h = H + 2 if beyond else 0
    with pytest.raises(ValueError, match=f"h = {h}: a response of {H} thoughts"):
        task.request("again", 1, seed, h)
    with pytest.raises(ValueError, match=f"has reset states 1 to {H + 1}"):
        seed.prefix(h)
    with pytest.raises(ValueError, match="give the seed, too"):
        task.request("again", 1, h=2)


def test_a_request_without_room_is_answered_by_nothing(policy):
    """Alone or beside others, whose answers stay in their places; each is counted."""

    def program(task):
        (base,) = yield [task.request("base", 2)]
        full = base[0].prompt_ids + base[0].token_ids
        task.context = len(full)
        (nothing,) = yield [task.request("more", 2, base[0], len(base[0].thought_ends) + 1)]
        before, some, after = yield [
            task.request("more", 2, prompt_ids=full),
            task.request("more", 3),
            task.request("more", 2, prompt_ids=[*full, 1]),
        ]
        review, none_at_all = yield [task.ask("review", full), task.ask("review", [*full, 1])]
        return [nothing, before, after, review, none_at_all], base + some

    (task,) = policy.tasks(3, 1)
    sampled = run_programs([program(task)], policy.engine)
    ((empty, rollouts),) = sampled.results
    assert empty == [[]] * 5
    assert len(rollouts) == 5 and sampled.generated == rollouts
    assert counters == {"no_room": 5}


def test_a_given_response_can_be_a_seed(policy):
    """Such as a reference solution: its continuations are written without the number of a line."""

    def program(task):
        given = response_of(task.request("given", 1))
        given.prompt_ids = task.prompt_ids
        (base,) = yield [task.request("base", 2, given, 2)]
        return task.in_group(0, base)

    (task,) = policy.tasks(3, 1)
    sampled = run_programs([program(task)], policy.engine)
    for record in records_of(1, sampled.generated, [task]):
        assert record["seed"] is None and record["reset"] == 2
    assert [r.prefix_len for r in sampled.generated] == [1, 1]


def test_a_localization_answer_has_no_thoughts(policy):
    """It runs to eos or to its budget, and is not cut."""
    prompt = policy.tasks(3, 1)[0].prompt_ids
    changed = dict(purpose="localization", prompt_ids=prompt, n=2, rng_key=1, max_tokens=7)
    (rollouts,) = policy.engine.sample([request_of(**changed)])
    assert len(rollouts) == 2
    for rollout in rollouts:
        assert rollout.finish == "length"
        assert len(rollout.token_ids) == 7
        assert rollout.thought_ends == [7]


# ------------------------------------------------------------------------------------------- driver


def yields_no_list(task):
    yield task.request("base", 1)


def yields_no_requests(task):
    yield [task.prompt_ids]


def yields_nothing(task):
    yield


@pytest.mark.parametrize("program", [yields_no_list, yields_no_requests, yields_nothing])
def test_a_program_that_yields_something_else_is_named(policy, program):
    (task,) = policy.tasks(3, 1)
    complaint = f"program {program.__name__} yielded .* must yield a list of requests"
    with pytest.raises(TypeError, match=complaint):
        run_programs([program(task)], policy.engine)


def returns_nothing(task):
    yield [task.request("base", 2)]


def returns_no_rollout(task):
    yield [task.request("base", 2)]
    return []


def returns_groups(task):
    return (yield [task.request("base", 2)])


def returns_a_copy(task):
    (base,) = yield [task.request("base", 2)]
    return task.in_group(0, [replace(rollout) for rollout in base])


def returns_one_twice(task):
    (base,) = yield [task.request("base", 2)]
    return task.in_group(0, base) + [base[0]]


def sets_advantages_of_some(task):
    (base,) = yield [task.request("base", 2)]
    base[0].advantages = [1.0] * len(base[0].thought_ends)
    return task.in_group(0, base)


def leaves_a_group_unset(task):
    (base,) = yield [task.request("base", 2)]
    return base


def sets_too_few_advantages(task):
    (base,) = yield [task.request("base", 2)]
    base[0].advantages = [1.0]
    return task.in_group(0, base)


def mixes_two_states(task):
    (base,) = yield [task.request("base", 2)]
    (suffixes,) = yield [task.request("suffix", 2, base[0], 2)]
    return task.in_group(0, base + suffixes)


def leaves_a_review_without_advantages(task):
    (review,) = yield [task.ask("review", task.prompt_ids)]
    return task.in_group(0, review)


@pytest.mark.parametrize(
    "program, complaint",
    [
        (returns_nothing, "None: return a list of at least one rollout"),
        (returns_no_rollout, r"\[\]: return a list of at least one rollout"),
        (returns_groups, "in its list: return the rollouts that were sampled"),
        (returns_a_copy, "a rollout twice, or a copy of one: return each sampled one itself"),
        (returns_one_twice, "a rollout twice, or a copy of one: return each sampled one itself"),
        (sets_advantages_of_some, "advantages of some rollouts of a group: set all or none"),
        (leaves_a_group_unset, "without a group: put it into one with task.in_group"),
        (sets_too_few_advantages, r"1 advantages for \d+ thoughts: set one for each thought"),
        (leaves_a_review_without_advantages, "without reward and advantages: set its advantages"),
        (mixes_two_states, "two states into one group: give each reset state a group of its own"),
    ],
)
def test_a_program_that_returns_something_else_is_told(policy, program, complaint):
    (task,) = policy.tasks(3, 1)
    name = f"idea.py:{program.__name__}"
    with pytest.raises(UserError, match=f"^--method {name} (returned|set|put) .*{complaint}"):
        trained_rollouts(name, run_programs([program(task)], policy.engine))


def returns_half_of_a_group(task):
    (base,) = yield [task.request("base", 4)]
    for rollout in base:
        rollout.advantages = [1.0] * len(rollout.thought_ends)
    return task.in_group(0, base)[:2]


def test_what_is_not_returned_has_no_group(policy):
    """The report and the metrics take a rollout with a group for a trained one."""
    tasks = policy.tasks(3, 3)
    sampled = run_programs([returns_half_of_a_group(task) for task in tasks], policy.engine)
    trained = trained_rollouts("half", sampled)
    assert len(trained) == 6
    for rollout in sampled.generated:
        assert (rollout.group is not None) == any(rollout is other for other in trained)


def test_driver_returns_results_in_order_and_counts_everything(policy):
    def request(purpose, n):
        (task,) = policy.tasks(2, 1)
        return task.request(purpose, n)

    def program(n):
        (first,) = yield [request("base", n)]
        second, third = yield [request("suffix", 1), request("suffix", 1)]
        return first + second + third

    def nothing():
        yield from ()
        return []

    sampled = run_programs([program(1), nothing(), program(3)], policy.engine)
    assert [len(result) for result in sampled.results] == [3, 0, 5]
    assert len(sampled.generated) == 8
    assert sampled.seconds["base"] > 0 and sampled.seconds["suffix"] > 0
    for rollout in sampled.generated:
        assert isinstance(rollout, Rollout) and rollout.reward is not None


def test_seconds_are_of_the_rows_that_are_in_a_step(policy, monkeypatch):
    """One second for each look at the clock: prefill by tokens read, then each token by rows."""
    clock = itertools.count()
    monkeypatch.setattr("rollout.perf_counter", lambda: float(next(clock)))
    long = request_of(purpose="base", max_tokens=6)
    short = request_of(purpose="localization", prompt_ids=[1, 2, 3], max_tokens=2, temperature=0.0)
    engine = HFEngine(policy.model, policy.tokenizer)
    engine.vocabulary.eos = set()  # each runs to its limit
    engine.sample([long, short])
    assert engine.seconds["base"] == pytest.approx(1 / 4 + 2 / 2 + 4)
    assert engine.seconds["localization"] == pytest.approx(3 / 4 + 2 / 2)


class Streaming(Engine):
    """An engine that completes one request a call."""

    streams = True

    def __init__(self):
        super().__init__()
        self.queue = []

    def start(self, request):
        ticket = self.ticket()
        self.queue.append((ticket, request))
        return ticket

    def finished(self):
        ticket, request = self.queue.pop(0)
        return [(ticket, [response_of(request) for _ in range(request.n)])]


def response_of(request):
    return Rollout(request.problem, request.purpose, [1], [1], [0.0], [1], "eos", text="x")


def test_slow_grading_goes_on_while_others_sample():
    """The first problem's grader waits for the last request to be sampled: grading must overlap.

    Each program goes on as soon as its own rollout is graded.
    """
    sampled_all = threading.Event()
    order = []

    def slow(text):
        assert sampled_all.wait(20), "grading blocked sampling"
        return 1.0

    def program(i):
        def quick(text):
            return float(i)

        grade = slow if i == 0 else quick
        ((first,),) = yield [request_of(problem=i, grade=grade, slow=i == 0)]
        order.append(i)
        ((second,),) = yield [request_of(problem=i, purpose="suffix")]
        if i == 3:
            sampled_all.set()
        return [first.reward, second.reward]

    sampled = run_programs([program(i) for i in range(4)], Streaming())
    assert sampled.results == [[1.0, None], [1.0, None], [2.0, None], [3.0, None]]
    assert order == [1, 2, 3, 0]
    assert [rollout.problem for rollout in sampled.generated] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_processes_that_share_an_engine_keep_step():
    """Slow graders are waited for, and the reporting process's rewards count on all."""

    class Shared(Streaming):
        lockstep = True

        def agreed(self, rewards):
            return [reward + 0.5 for reward in rewards]

    def slow(text):
        time.sleep(0.2)
        return 1.0

    order = []

    def program(i):
        ((first,),) = yield [request_of(problem=i, grade=slow, slow=i == 0)]
        order.append(i)
        return first.reward

    assert run_programs([program(i) for i in range(3)], Shared()).results == [1.5, 1.5, 1.5]
    assert order == [0, 1, 2]  # else the slow one would be last


def test_a_verifier_that_fails_stops_the_run(policy):
    def broken(text):
        return 1 / 0

    def program():
        (task,) = policy.tasks(2, 1)
        request = task.request("base", 2)
        request.slow, request.grade = True, broken
        yield [request]

    with pytest.raises(ZeroDivisionError):
        run_programs([program()], policy.engine)
