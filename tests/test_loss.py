"""The loss: advantages and weights by hand, expected gradients by enumeration, invariances.

The expected gradient of a method is computed over ALL outcomes of its program on a tiny policy, and
compared with the gradient of what the method claims to ascend. Then the gradient of a real step is
computed in many ways (micro-batches, order, padding, processes): it must stay the same.
"""

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import FalconH1Config, MambaConfig, MistralConfig, MistralForCausalLM

import loss
from conftest import Enumerable, settings
from data.contexts import can_share, hidden_of_shared_contexts
from data.driver import run_programs
from data.metrics import Update, step_metrics, sums_of, update_metrics
from loss import (
    Scored,
    Tokens,
    Weighted,
    backward,
    body_and_head,
    collate,
    hidden_of_rows,
    micro_batches,
    set_advantages,
    surrogate,
    through_head,
    token_weights,
    weigh,
)
from methods import vineppo
from rollout import Rollout, grouped, grpo, resets

# --------------------------------------------------------------------------- advantages and weights


def rollout_of(reward, group, prefix=(), tokens=(1,)):
    token_ids = [*prefix, *tokens]
    return Rollout(
        problem=0,
        purpose="base",
        prompt_ids=[0],
        token_ids=token_ids,
        logps=[-1.0] * len(token_ids),
        thought_ends=[len(token_ids)],
        finish="answer",
        prefix_len=len(prefix),
        reward=float(reward),
        group=group,
    )


def test_advantages_stay_inside_their_group():
    base = [rollout_of(reward, (0, 0)) for reward in (1, 0, 0, 0)]
    suffix = [rollout_of(reward, (0, 1), prefix=[5]) for reward in (1, 1, 0, 0)]
    flat = [rollout_of(1, (1, 0)) for _ in range(4)]
    set_advantages(base + suffix + flat)
    assert [round(r.advantages[0], 4) for r in base] == [1.7321, -0.5774, -0.5774, -0.5774]
    assert [r.advantages for r in suffix] == [[1], [1], [-1], [-1]]
    assert [r.advantages for r in flat] == [[0]] * 4


def test_a_group_of_two_states_is_refused():
    with pytest.raises(ValueError, match="mixes two states"):
        set_advantages([rollout_of(1, (0, 1), prefix=[5]), rollout_of(0, (0, 1))])


def test_a_group_with_some_advantages_is_refused():
    group = [rollout_of(reward, (0, 0)) for reward in (1, 0, 0)]
    group[1].advantages = [0.5]
    with pytest.raises(ValueError, match="sets the advantages of some, but not of all"):
        set_advantages(group)


def test_advantages_that_a_program_sets_are_kept():
    """They need no common state, and other groups get the default."""
    first, second = rollout_of(1, (0, 0), prefix=[5]), rollout_of(0, (0, 0))
    first.advantages, second.advantages = [0.25], [-3.0]
    default = [rollout_of(reward, (0, 1)) for reward in (1, 0)]
    set_advantages([first, second, *default])
    advantages = [r.advantages for r in (first, second, *default)]
    assert advantages == [[0.25], [-3.0], [1.0], [-1.0]]


def test_token_weights():
    rollout = rollout_of(1, (0, 1), prefix=[5, 6], tokens=[7, 8, 9])
    rollout.advantages = [1.5]
    assert token_weights(rollout, 8) == [0, 0, 0.0625, 0.0625, 0.0625]
    by_response = token_weights(rollout, 8, length="response")
    assert by_response == [0, 0, 1.5 / 40, 1.5 / 40, 1.5 / 40]
    assert token_weights(rollout, 8, mask_prefix=False) == [1.5 / 40] * 5
    assert token_weights(rollout, 8, mask_prefix=False, length="response") == [1.5 / 40] * 5


def three_thoughts(**changed):
    """5 tokens in thoughts of 2, 1 and 2 tokens, with advantages 1, -2 and 0.5."""
    rollout = rollout_of(1, (0, 0), tokens=[5, 6, 7, 8, 9])
    return replace(rollout, thought_ends=[2, 3, 5], advantages=[1.0, -2.0, 0.5], **changed)


A = np.array([1, 1, -2, 0.5, 0.5])  # of its tokens
WHOLE, SUFFIX, LAST = np.ones(5), np.array([0, 0, 1, 1, 1]), np.array([0, 0, 0, 1, 1])


@pytest.mark.parametrize(
    "changed, settings, expected",
    [
        (dict(), dict(), A / (4 * 5)),
        (dict(), dict(length="response"), A / (4 * 5)),
        (dict(), dict(length="step", n_tokens=9), A / 9),
        # The thoughts of a masked prefix are ignored.
        (dict(prefix_len=2), dict(), SUFFIX * A / (4 * 3)),
        (dict(prefix_len=2), dict(length="response"), SUFFIX * A / (4 * 5)),
        (dict(prefix_len=2), dict(length="step", n_tokens=9), SUFFIX * A / 9),
        (dict(prefix_len=2), dict(mask_prefix=False), A / (4 * 5)),
        # What was sampled (cost) and what is trained (credit) are two things.
        (dict(prefix_len=2, trained_from=0), dict(), A / (4 * 5)),
        (dict(prefix_len=2, trained_from=0), dict(length="step", n_tokens=9), A / 9),
        (dict(trained_from=3), dict(), LAST * A / (4 * 2)),
        (dict(trained_from=3), dict(mask_prefix=False), A / (4 * 5)),
        (dict(trained_from=5), dict(), 0 * WHOLE),
        (dict(trained_from=5), dict(length="step"), 0 * WHOLE),
    ],
)
def test_advantages_are_spread_over_the_tokens_of_their_thoughts(changed, settings, expected):
    assert token_weights(three_thoughts(**changed), 4, **settings) == pytest.approx(expected)


def test_clipping_follows_the_advantage_of_each_thought():
    tokens = collate([Weighted(three_thoughts(), list(A), [True] * 5)], pad_id=0).chosen
    assert tokens.weights.tolist() == A.tolist()
    logps = tokens.old_logps.clone().requires_grad_()
    surrogate(logps, tokens, clip=0.2).backward()
    assert torch.allclose(logps.grad, -tokens.weights)
    # Every token has become more likely: only where that is wrong is there still a gradient.
    moved = (tokens.old_logps + 0.5).requires_grad_()
    surrogate(moved, tokens, clip=0.2).backward()
    assert torch.allclose(moved.grad, torch.tensor([0, 0, 2 * np.exp(0.5), 0, 0]).float())


def test_every_rollout_has_the_same_say_whatever_its_group():
    """Prompts with groups of 4, 5 and 8, and a flat one of 4, which counts in N."""
    step = []
    for slot, size in enumerate((4, 5, 8, 4)):
        for i in range(size):
            rollout = rollout_of(0, (slot, 0), tokens=[1] * (i + 1))
            rollout.advantages = [0.0 if slot == 3 else (-1.0) ** i]
            step.append(rollout)
    say = [0.0] * 4
    for item in weigh(step, settings()):
        say[item.rollout.group[0]] += np.abs(item.weights).sum()
    assert say == pytest.approx([4 / 21, 5 / 21, 8 / 21, 0])
    # By tokens: 10, 15, 36 and 10 of them are trained.
    say = [0.0] * 4
    for item in weigh(step, settings(length="step")):
        say[item.rollout.group[0]] += np.abs(item.weights).sum()
    assert say == pytest.approx([10 / 71, 15 / 71, 36 / 71, 0])


# ---------------------------------------------------------------- what was sampled, what is trained


@pytest.fixture(scope="module")
def letters():
    return Enumerable(V=3, H=3, correct={(0, 1, 2)}, rng_key=3)


def letters_rollout(letters, response, advantages, **changed):
    """A rollout of the enumerable policy: its log-probs are the trainer's."""
    request = letters.task().request("base", 1)
    rollout = replace(letters.rollout(request, response), group=(0, 0), **changed)
    rollout.advantages = advantages
    return rollout


def test_a_trained_token_without_advantage_is_in_the_batch(letters, monkeypatch):
    """An entropy bonus or a KL term of a fork must reach it."""
    rollouts = [
        letters_rollout(letters, (0, 1, 2), [0.0, 1.0, 0.0]),
        letters_rollout(letters, (2, 1, 0), [0.0, 0.0, 0.0], prefix_len=1),
    ]
    batch = collate(weigh(rollouts, settings()), pad_id=0)
    assert batch.trained.tolist() == [[True] * 3, [True, True, False]]
    assert batch.chosen.weights.tolist() == pytest.approx([0, 1 / 6, 0, 0, 0])
    exact = torch.cat([letters.logps((0, 1, 2)), letters.logps((2, 1, 0))[1:]])
    expected = gradient(letters.model, (exact[[0, 2, 3, 4]] ** 2).sum())

    def of_fork(logps, tokens, clip, shape):
        return (logps[tokens.weights == 0] ** 2).sum()

    monkeypatch.setattr(loss, "surrogate", of_fork)
    letters.model.zero_grad()
    hidden, scored = body_and_head(letters.model, batch, settings())
    hidden.backward(scored.hidden_grad)
    assert torch.allclose(scored.logps, exact, atol=1e-5)
    assert_close(torch.cat([p.grad.flatten() for p in letters.model.parameters()]), expected)


@pytest.mark.parametrize("length", ["trained", "response", "step"])
@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_a_step_that_trains_nothing_has_no_gradient(letters, length, clip):
    cfg = settings(length=length, clip=clip, off_policy_shape=0.1)
    masked = [letters_rollout(letters, (0, 1, 2), [1.0] * 3, trained_from=3) for _ in range(2)]
    flat = [letters_rollout(letters, (0, 1, 2), [0.0] * 3) for _ in range(2)]
    for rollouts, tokens in ((masked, 0), (flat, 6)):
        letters.model.zero_grad()
        sums = backward(letters.model, weigh(rollouts, cfg), 0, cfg)
        assert sums.tokens == tokens
        assert sums.loss == sums.gap_prefix == 0
        assert sums.gap_max < 1e-5
        for p in letters.model.parameters():
            assert p.grad is None or not p.grad.any()


def base_and_whole(task):
    """A program: the continuation of a base rollout joins the base group as a whole response."""
    (base,) = yield [task.request("base", 3)]
    (again,) = yield [task.request("again", 1, base[0], 3)]
    again[0].trained_from = 0
    return task.in_group(0, base + again)


def test_a_response_sampled_after_a_prefix_joins_the_base_group(policy):
    """It costs what was sampled of it, once, and is trained from its first token on."""
    tasks = policy.tasks(4, 3)
    sampled = run_programs([base_and_whole(task) for task in tasks], policy.engine)
    rollouts = []
    for buffer in sampled.results:
        rollouts += buffer
    joined = [rollout for rollout in rollouts if rollout.purpose == "again"]
    assert len(sampled.generated) == len(rollouts) == 12
    for i, rollout in enumerate(rollouts):
        rollout.reward = float(i % 4 == 3)
    set_advantages(rollouts)  # one state: the prompt
    assert len(grouped(rollouts)) == 3
    for rollout in joined:
        assert rollout.prefix_len > 0
        assert rollout.advantages[0] == rollout.advantages[-1] == pytest.approx(3**0.5)

    line = step_metrics(rollouts, sampled.generated, tasks)
    assert line["tokens"]["again"] == sum(len(r.token_ids) - r.prefix_len for r in joined)
    assert line["masked_share"] == 0
    assert line["pass_base"] == 0  # i.i.d. rollouts only: the joined ones were searched for
    assert line["pass_suffix"] is None

    items = weigh(rollouts, settings())
    batch = collate(items, 0)
    assert len(batch.contexts) == 3
    assert all(all(item.trained) and item.start == 0 for item in items)
    sums = backward(policy.model, items, 0, settings())
    assert sums.tokens == sum(len(rollout.token_ids) for rollout in rollouts)
    assert sums.prefix_tokens == sum(rollout.prefix_len for rollout in joined)
    assert sums.gap_max < 1e-4


# ------------------------------------------------------------------------------------- off-policy


def off_policy_pair(letters):
    """One rollout on policy, and one that was sampled from the prompt [0, 1], for another one."""
    on_policy = letters_rollout(letters, (0, 1, 2), [1.0] * 3)
    off = letters_rollout(letters, (2, 1, 0), [0.5, 0.5, -1.0], prompt_ids=[0, 1])
    off.logps, off.trained_prompt = [-5.0] * 3, letters.prompt
    return [on_policy, off]


@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_off_policy_tokens_stay_out_of_the_gap(letters, clip):
    cfg = settings(clip=clip)
    rollouts = off_policy_pair(letters)
    items = weigh(rollouts, cfg)
    assert [item.context for item in items] == [(0,), (0,)]
    batch = collate(items, pad_id=0)
    assert batch.contexts.tolist() == [[0]]
    assert batch.chosen.off_policy.tolist() == [False] * 3 + [True] * 3
    sums = backward(letters.model, items, 0, cfg)
    assert (sums.tokens, sums.off_policy_tokens, sums.prefix_tokens) == (6, 3, 0)
    assert sums.gap < 1e-5 and sums.gap_max < 1e-5 and sums.gap_prefix == 0
    numbers = update_metrics(Update(sums, grad_norm=1.0))
    assert numbers["off_policy_tokens"] == 3
    assert numbers["gap"] == pytest.approx(sums.gap / 3)


def test_only_off_policy_tokens(letters):
    """A step without one on-policy token has no gap, and nothing divides by zero."""
    _, off = off_policy_pair(letters)
    sums = backward(letters.model, weigh([off], settings()), 0, settings())
    numbers = update_metrics(Update(sums, grad_norm=1.0))
    assert numbers["gap"] == numbers["gap_max"] == 0 and numbers["gap_prefix"] is None


@pytest.mark.parametrize("shape", [0.0, 0.1])
def test_off_policy_tokens_are_trained_under_the_other_prompt(letters, shape):
    """The gradient is that of w log pi, or of w p / (p + s), with p under the trained prompt."""
    w = torch.tensor([0.5, 0.5, -1.0]) / 6
    off = letters.logps((2, 1, 0))
    p = off.exp()
    terms = w * p / (p + shape) if shape else w * off
    ascended = (letters.logps((0, 1, 2)) / 6).sum() + terms.sum()
    expected = -gradient(letters.model, ascended)
    cfg = settings(off_policy_shape=shape)
    letters.model.zero_grad()
    sums = backward(letters.model, weigh(off_policy_pair(letters), cfg), 0, cfg)
    found = torch.cat([p.grad.flatten() for p in letters.model.parameters()])
    assert_close(found, expected)
    assert sums.loss == pytest.approx(-ascended.item(), abs=1e-5)


def test_off_policy_terms_by_hand():
    """w = 1: the derivative by log p is w, or w p s / (p + s)^2. The sampler's log-probs do not
    count."""
    rollout = replace(three_thoughts(), trained_prompt=[3], logps=[-9.0] * 5)
    item = Weighted(rollout, [1.0] * 5, [True, True, False, False, False])
    batch = collate([item], pad_id=0)
    assert batch.contexts.tolist() == [[3]]
    p = torch.tensor([0.5, 0.9])
    for clip in (0.0, 0.2):
        logps = p.log().requires_grad_()
        surrogate(logps, batch.chosen, clip).backward()
        assert torch.allclose(logps.grad, torch.tensor([-1.0, -1.0]))
        logps = p.log().requires_grad_()
        loss_of_shaped = surrogate(logps, batch.chosen, clip, shape=0.1)
        assert loss_of_shaped.item() == pytest.approx(-(0.5 / 0.6 + 0.9 / 1.0))
        loss_of_shaped.backward()
        assert torch.allclose(logps.grad, torch.tensor([-0.05 / 0.36, -0.09]))


# ------------------------------------------------------------------- expected gradients, enumerated


def gradient(model, scalar):
    """The gradient of a scalar, as one vector."""
    model.zero_grad()
    scalar.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@dataclass(frozen=True)
class Group:
    """What decides which gradient a group gives."""

    state: tuple  # tokens of its prefix
    is_reset: bool
    size: int  # G
    n_rollouts: int  # N, of the whole buffer


@dataclass
class Expected:
    """A method's expectations over all outcomes of its program."""

    scalar: torch.Tensor  # its gradient is minus the expected gradient of the loss
    groups: dict[Group, float]  # how often each comes up
    prefix_weight: float  # sum of |weights| on prefix tokens


def expectation(toy, start_program, mask_prefix=True):
    """Sums probability x token weight x log-prob over all outcomes."""
    weights, groups, prefix_weight = {}, {}, 0.0
    for outcome in toy.run_all(start_program):
        buffer = outcome.rollouts
        set_advantages(buffer, normalize=False)
        for rollout in buffer:
            w = np.array(token_weights(rollout, len(buffer), mask_prefix))
            prefix_weight += np.abs(w[: rollout.prefix_len]).sum()
            response = tuple(rollout.token_ids)
            weights[response] = weights.get(response, 0) + outcome.probability * w
        for (_, k), members in grouped(buffer).items():
            state = tuple(members[0].token_ids[: members[0].prefix_len])
            group = Group(state, k > 0, len(members), len(buffer))
            groups[group] = groups.get(group, 0.0) + outcome.probability
    scalar = 0.0
    for response, w in weights.items():
        scalar = scalar + (torch.from_numpy(w).float() * toy.logps(response)).sum()
    return Expected(scalar, groups, prefix_weight)


def claimed(toy, groups):
    """What a method claims to ascend, a scalar.

    A group of G of N rollouts at a state s with k thoughts to go adds G/N (1 - 1/G) 1/k V(s), with
    the states' frequencies held fixed. 1 - 1/G: a rollout is part of its own baseline.
    """
    total = 0.0
    for group, frequency in groups.items():
        G, N = group.size, group.n_rollouts
        thoughts_to_go = toy.H - len(group.state)
        share = frequency * (G / N) * (1 - 1 / G) / thoughts_to_go
        total = total + share * toy.value(group.state)
    return total


def fixed(h):
    """A localizer that always says h."""

    def localize(task, seeds):
        yield from ()
        return [(h, "fixed")] * len(seeds)

    return localize


def by_first_letter(task, seeds):
    yield from ()
    return [(2 if seed.token_ids[0] == 0 else 1, "letter") for seed in seeds]


def assert_close(a, b):
    assert b.norm() > 1e-3
    assert (a - b).norm() < 1e-4 * b.norm()


def test_grpo_ascends_the_pass_rate():
    toy = Enumerable(V=3, H=2, correct={(0, 1), (1, 2), (2, 2)}, rng_key=3)
    expected = expectation(toy, lambda: grpo(toy.task(base=2)))
    assert expected.groups == {Group((), False, 2, 2): pytest.approx(1, abs=1e-5)}
    ascended = claimed(toy, expected.groups)
    assert_close(gradient(toy.model, expected.scalar), gradient(toy.model, ascended))


@pytest.mark.parametrize("localize", [fixed(1), fixed(2), by_first_letter])
@pytest.mark.parametrize("split", [(2, 1, 2), (0, 2, 2), (0, 1, 2)])
def test_reset_methods_ascend_the_values_of_their_states(localize, split):
    """Every group's expected gradient is that of its own state's value.

    Seeds are fresh here: their draws are independent of the base group.
    """
    base, prefixes, suffixes = split
    numbers = dict(base=base, prefixes=prefixes, suffixes=suffixes, max_seed_draws=prefixes)
    toy = Enumerable(V=2, H=2, correct={(0, 1), (1, 1)}, rng_key=5)
    expected = expectation(toy, lambda: resets(toy.task(localize, seed_source="fresh", **numbers)))
    assert expected.prefix_weight == 0.0
    assert any(group.is_reset for group in expected.groups)
    ascended = claimed(toy, expected.groups)
    assert_close(gradient(toy.model, expected.scalar), gradient(toy.model, ascended))


SMALL = dict(base=2, prefixes=1, suffixes=2, max_seed_draws=0)  # seeds from the base group only


@pytest.mark.parametrize("localize", [fixed(1), fixed(2), by_first_letter])
def test_seeds_from_the_base_group_leave_its_gradient_unbiased(localize):
    """Seeds are read from the base group, the default: both parts follow their formulas.

    Where nobody fails, no draws are made and the top-up makes a group of 4 whose first two are
    known to be right. Its gradient is still along that of the pass rate.
    """
    toy = Enumerable(V=2, H=2, correct={(0, 1), (1, 1)}, rng_key=5)
    expected = expectation(toy, lambda: resets(toy.task(localize, **SMALL)))
    assert expected.prefix_weight == 0.0
    J = toy.value()
    j = J.item()
    # The first two rollouts as if in a group of two: nothing where both are right ...
    base = 0.5 * 0.5 / toy.H * J
    # ... and the cases in which both are.
    both_right = j**2 * (2 * (1 - j) / 2 / j + 2 * 3 / 4) / 4 / toy.H * J
    suffix = {group: p for group, p in expected.groups.items() if group.is_reset}
    ascended = base + both_right + claimed(toy, suffix)
    assert_close(gradient(toy.model, expected.scalar), gradient(toy.model, ascended))


def test_without_the_prefix_mask_the_prefix_is_trained():
    toy = Enumerable(V=2, H=2, correct={(0, 1), (1, 1)}, rng_key=5)
    expected = expectation(toy, lambda: resets(toy.task(fixed(2), **SMALL)), mask_prefix=False)
    assert expected.prefix_weight > 0.01


def exact_advantages(toy, task):
    """A program: VinePPO with exact values. A(s, a) = V(s a) - V(s) for every thought."""
    (base,) = yield [task.request("base", 2)]
    for rollout in base:
        response = tuple(rollout.token_ids)
        values = [toy.value(response[:h]).item() for h in range(toy.H + 1)]
        rollout.advantages = [after - before for before, after in zip(values, values[1:])]
    return task.in_group(0, base)


def sum_over_states(toy):
    """sum_s d(s) sum_a pi(a|s) A(s, a) log pi(a|s) / H, with d, pi and A held fixed."""
    total = 0.0
    for h in range(toy.H):
        for state in product(range(toy.V), repeat=h):
            value = toy.value(state).item()
            for a in range(toy.V):
                logps = toy.logps((*state, a))
                reached = logps.sum().exp().item()  # d(s) pi(a|s)
                advantage = toy.value((*state, a)).item() - value
                total = total + reached * advantage * logps[-1] / toy.H
    return total


def test_advantages_of_thoughts_ascend_the_pass_rate():
    """With exact values the expected gradient is the policy gradient, state by state."""
    toy = Enumerable(V=3, H=2, correct={(0, 1), (1, 2), (2, 2)}, rng_key=3)
    expected = expectation(toy, lambda: exact_advantages(toy, toy.task()))
    found = gradient(toy.model, expected.scalar)
    assert_close(found, gradient(toy.model, sum_over_states(toy)))
    assert_close(found, gradient(toy.model, toy.value() / toy.H))


# ----------------------------------------------------------------------- invariance of the gradient


@pytest.fixture(scope="module")
def step(policy):
    """A real step of the embedded policy with variance, several lengths and prefixes."""
    tasks = policy.tasks(4, 6, "random") + policy.tasks(7, 6, "random", seed=1)
    for slot, task in enumerate(tasks):
        task.slot = slot
    rollouts = []
    for buffer in run_programs([resets(task) for task in tasks], policy.engine).results:
        rollouts += buffer
    for i, rollout in enumerate(rollouts):  # rewards of our own: every group has variance
        rollout.reward = float(i % 3 == 0)
    set_advantages(rollouts)
    assert len({len(rollout.token_ids) for rollout in rollouts}) > 1
    assert any(rollout.prefix_len for rollout in rollouts)
    return rollouts


def whole_step(policy, step, rank=0, ranks=1, **changed):
    """`backward` over all rollouts of the step, or over one process's part of them."""
    cfg = settings(**changed)
    return backward(policy.model, weigh(step, cfg), 0, cfg, rank=rank, ranks=ranks)


def gradients(policy, compute, *args, **kwargs):
    """The gradient, as one vector, that compute(...) adds up."""
    policy.model.zero_grad()
    compute(*args, **kwargs)
    return torch.cat([p.grad.flatten() for p in policy.model.parameters()])


@pytest.fixture(scope="module")
def reference(policy, step):
    vector = gradients(policy, whole_step, policy, step, micro_batch=1000)
    assert vector.abs().max() > 1e-3
    return vector


def assert_same(vector, reference):
    assert (vector - reference).abs().max() < 1e-5


@pytest.mark.parametrize("micro_batch, chunk", [(1, 4096), (7, 64), (1000, 10)])
def test_gradient_does_not_depend_on_micro_batch_or_chunk(
    policy, step, reference, micro_batch, chunk
):
    sizes = dict(micro_batch=micro_batch, chunk=chunk)
    assert_same(gradients(policy, whole_step, policy, step, **sizes), reference)


def test_gradient_does_not_depend_on_row_order_or_parts(policy, step, reference):
    cfg = settings(micro_batch=5)
    items = weigh(step, cfg)
    shuffled = [items[i] for i in np.random.default_rng(0).permutation(len(items))]

    def in_parts():
        for part in (shuffled[:10], shuffled[10:11], shuffled[11:]):
            backward(policy.model, part, 0, cfg)

    assert_same(gradients(policy, in_parts), reference)


@pytest.mark.parametrize("ranks, micro_batch", [(2, 3), (5, 19), (7, 1000)])
def test_gradient_is_the_sum_over_processes(policy, step, reference, ranks, micro_batch):
    """Whatever their number, also where it does not divide the rows; all run as many forwards."""
    forwards, parts = [], []

    def of_all():
        for rank in range(ranks):
            runs = []

            def note(*_, runs=runs):
                runs.append(1)

            handle = policy.model.base_model.register_forward_hook(note)
            parts.append(whole_step(policy, step, rank, ranks, micro_batch=micro_batch))
            handle.remove()
            forwards.append(len(runs))

    assert_same(gradients(policy, of_all), reference)
    assert len(set(forwards)) == 1
    alone = whole_step(policy, step)
    for name in ("loss", "tokens", "entropy", "gap"):
        total = sum(getattr(part, name) for part in parts)
        assert total == pytest.approx(getattr(alone, name), abs=1e-4, rel=1e-4)


def test_gradient_has_the_same_bits_each_time_with_two_threads(policy, step):
    """Also where the gradients of several rows of one state add up in it."""
    torch.set_num_threads(2)
    try:
        first, *others = [
            gradients(policy, whole_step, policy, step, micro_batch=1000) for _ in range(3)
        ]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("pad_id, extra", [(0, 1), (3, 9)])
def test_gradient_does_not_depend_on_padding(policy, step, reference, pad_id, extra):
    batch = collate(weigh(step, settings()), pad_id)
    left, right = (extra, 0), (0, extra)
    longer = replace(
        batch,
        contexts=pad(batch.contexts, left, value=pad_id),
        contexts_mask=pad(batch.contexts_mask, left),
        tokens=pad(batch.tokens, right, value=pad_id),
        tokens_mask=pad(batch.tokens_mask, right),
        trained=pad(batch.trained, right),
    )

    def compute():
        hidden, scored = body_and_head(policy.model, longer, settings())
        hidden.backward(scored.hidden_grad)

    assert_same(gradients(policy, compute), reference)


def test_shared_states_give_the_gradient_of_whole_rows(policy, step, reference, monkeypatch):
    """Whole rows run where a layer keeps something else than keys and values."""
    widths = []

    def note(module, args, kwargs, out):
        widths.append(len(kwargs["input_ids"]))

    def cannot(model):
        return False

    monkeypatch.setattr(loss, "can_share", cannot)
    handle = policy.model.base_model.register_forward_hook(note, with_kwargs=True)
    assert_same(gradients(policy, whole_step, policy, step, micro_batch=7), reference)
    handle.remove()
    assert sum(widths) == len(step)  # no state ran by itself


def test_shared_states_where_layers_run_again_in_the_backward(policy, step, reference, monkeypatch):
    """--grad_checkpointing."""
    for layer in policy.model.base_model.layers:
        again = partial(checkpoint, layer.forward, use_reentrant=False)
        monkeypatch.setattr(layer, "forward", again)
    assert_same(gradients(policy, whole_step, policy, step, micro_batch=7), reference)


@pytest.mark.parametrize("config", [FalconH1Config(), MambaConfig()])
def test_states_are_not_shared_where_a_layer_keeps_more_than_keys_and_values(config):
    """State spaces, alone or beside attention."""
    assert not can_share(SimpleNamespace(config=config))


def test_shared_states_of_sliding_windows():
    """A window shorter than the context: sharing gives the log-probs and gradient of whole rows."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=3,
        initializer_range=0.3,
    )
    model = MistralForCausalLM(config)
    assert can_share(model)
    items = []
    for i in range(4):
        rollout = rollout_of(i, (0, i // 2), prefix=[5, 6, 7] + [8] * (i // 2), tokens=[9, 10, i])
        prefix = rollout.prefix_len
        weights = [0.0] * prefix + [0.1 * (i + 1)] * 3
        items.append(Weighted(rollout, weights, [False] * prefix + [True] * 3))
    batch = collate(items, pad_id=0)
    assert len(batch.contexts) == 2
    shared = hidden_of_shared_contexts(model, batch)[batch.trained]
    whole = hidden_of_rows(model, batch)[batch.trained]
    assert torch.allclose(shared, whole, atol=1e-5)
    direction = torch.randn_like(whole)
    g_shared = gradient(model, (shared * direction).sum())
    assert_close(g_shared, gradient(model, (whole * direction).sum()))


@pytest.mark.parametrize("program", [grpo, resets, vineppo])
def test_tokens_in_the_trainer_are_those_of_the_formula(policy, program):
    """Each prompt or reset state once, and each token that is trained once.

    So nothing is run again for each row: not the prompt, not a prefix.
    """
    in_trainer, computed = [], []

    def note(module, args, kwargs, out):
        in_trainer.append(int(kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :].sum()))
        computed.append(kwargs["input_ids"].numel())

    tasks = policy.tasks(4, 4, "verifier", base=4 if program is resets else 8)
    rollouts = []
    for buffer in run_programs([program(task) for task in tasks], policy.engine).results:
        rollouts += buffer
    set_advantages(rollouts)
    states = set()  # a reset to the first thought shares the prompt with the base group
    per_rollout = 0
    for rollout in rollouts:
        prompt_ids, prefix = rollout.trained_state()
        states.add(tuple(prompt_ids + prefix))
        per_rollout += len(rollout.token_ids) - len(prefix)
    once = sum(map(len, states))
    handle = policy.model.base_model.register_forward_hook(note, with_kwargs=True)
    sums = whole_step(policy, rollouts, micro_batch=1000)
    assert sum(in_trainer) == once + per_rollout
    assert sums.tokens == per_rollout
    computed.clear()
    whole_step(policy, rollouts, micro_batch=8)
    handle.remove()
    assert sum(computed) <= 1.05 * (once + per_rollout)  # padding too


def test_long_responses_do_not_pad_the_short_ones_of_their_group():
    """Computed tokens, padding included, stay near the real ones; each rollout runs once.

    Long contexts are not run again for that.
    """

    def items_of(prompt_length):
        items = []
        for i in range(64):
            n = 200 if i % 8 == 0 else 20
            prompt_ids = [1 + i // 8] * prompt_length
            rollout = Rollout(0, "base", prompt_ids, [5] * n, [0.0] * n, [n], "eos")
            rollout.group = (i // 8, 0)
            items.append(Weighted(rollout, [0.1] * n, [True] * n))
        return items

    def tokens_and_rows(items, ranks=1):
        batches = []
        for rank in range(ranks):
            for part in micro_batches(items, 8 // ranks, rank, ranks):
                batches.append(collate(part, pad_id=0))
        tokens = sum(b.contexts.numel() + b.tokens.numel() for b in batches)
        return tokens, sum(len(b.tokens) for b in batches)

    short_prompts, long_prompts = items_of(4), items_of(4000)
    real = 8 * 200 + 56 * 20
    for ranks in (1, 2):
        tokens, rows = tokens_and_rows(short_prompts, ranks)
        assert rows == 64
        assert tokens <= 1.1 * (8 * 4 + real)  # whole groups: 64 rows of 200
    tokens, _ = tokens_and_rows(long_prompts)
    assert tokens == 8 * 4000 + 64 * 200


def test_the_head_runs_only_on_trained_tokens(policy, step):
    """Never on prompts or masked prefixes, never on more than a chunk at once.

    Rollouts without weight are left out, as srpo.py does, and what a group has in common is run
    once (twice where micro-batches part it).
    """
    rows, bodies, passes = [], [], []

    def note_head(module, args, out):
        rows.append(len(args[0]))
        passes.append("forward")

    def note_head_backward(module, by_input, by_output):
        passes.append("backward")

    def note_body(module, args, kwargs, out):
        bodies.append(len(kwargs["input_ids"]))

    without, others = step[:20], step[20:]
    flat = [replace(r, advantages=[0.0] * len(r.thought_ends)) for r in without]
    cfg = settings(micro_batch=16, chunk=32)
    items = [item for item in weigh(flat + others, cfg) if any(item.weights)]
    head = policy.model.lm_head.register_forward_hook(note_head)
    head_backward = policy.model.lm_head.register_full_backward_hook(note_head_backward)
    body = policy.model.base_model.register_forward_hook(note_body, with_kwargs=True)
    sums = backward(policy.model, items, 0, cfg)
    head.remove()
    head_backward.remove()
    body.remove()
    weighted = sum(rollout.generated for rollout in others)
    assert sums.tokens == weighted
    assert sum(rows) == weighted  # once
    assert max(rows) <= 32
    # The logits of a chunk are done with before those of the next are made.
    assert passes == ["forward", "backward"] * len(rows)
    states, own = bodies[::2], bodies[1::2]  # of each micro-batch: its states, then its rows
    assert sum(own) == len(others)
    assert sum(states) <= len({rollout.group for rollout in others}) + len(states)


@pytest.mark.parametrize("clip, shape, chunk", [(0, 0, 3), (0.2, 0, 4), (0.2, 0.1, 0)])
def test_the_head_in_chunks_is_plain_autograd(clip, shape, chunk):
    """Log-probs, entropies, loss and gradients, also with a bias and a temperature."""
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 11)
    hidden = (3 * torch.randn(8, 4)).requires_grad_()
    tokens = Tokens(
        ids=torch.arange(8),
        weights=torch.randn(8),
        old_logps=-2 * torch.rand(8),
        in_prefix=torch.zeros(8, dtype=torch.bool),
        off_policy=torch.arange(8) % 4 == 3,
    )
    whole = (head(hidden) / 0.7).log_softmax(-1)
    logps = whole[torch.arange(8), tokens.ids]
    expected = surrogate(logps, tokens, clip, shape)
    wanted = torch.autograd.grad(expected, [hidden, *head.parameters()])
    cfg = settings(temperature=0.7, clip=clip, off_policy_shape=shape, chunk=chunk)
    scored = through_head(head, hidden, tokens, cfg)
    assert torch.allclose(scored.loss, expected)
    assert torch.allclose(scored.logps, logps, atol=1e-6)
    assert torch.allclose(scored.entropies, -(whole.exp() * whole).sum(-1), atol=1e-6)
    for found, gradient in zip([scored.hidden_grad, head.weight.grad, head.bias.grad], wanted):
        assert torch.allclose(found, gradient, atol=1e-6)


def test_clipped_surrogate():
    """On policy it has REINFORCE's gradient; off policy it is flat where the ratio moved enough."""
    tokens = Tokens(
        ids=torch.zeros(5),
        weights=torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0]),
        old_logps=torch.full((5,), -1.0),
        in_prefix=torch.zeros(5, dtype=torch.bool),
        off_policy=torch.zeros(5, dtype=torch.bool),
    )
    # The ratios are 1, 1.65, 1.65, 0.61 and 0.61.
    logps = torch.tensor([-1.0, -0.5, -0.5, -1.5, -1.5], requires_grad=True)
    surrogate(logps, tokens, clip=0.2).backward()
    ratio = (logps - tokens.old_logps).exp().detach()
    assert torch.allclose(logps.grad, torch.tensor([-1.0, 0.0, ratio[2], 0.0, -ratio[4]]))


def test_gaps_are_absolute_and_apart():
    """Of sampled tokens, of a kept prefix; off-policy tokens have none."""
    tokens = Tokens(
        ids=torch.zeros(4),
        weights=torch.zeros(4),
        old_logps=torch.full((4,), -1.0),
        in_prefix=torch.tensor([False, False, True, False]),
        off_policy=torch.tensor([False, False, False, True]),
    )
    logps = tokens.old_logps + torch.tensor([0.5, -0.25, -0.75, 9.0])
    sums = sums_of(Scored(logps, torch.zeros(4), torch.tensor(0.0), torch.zeros(4, 1)), tokens)
    assert (sums.gap, sums.gap_prefix, sums.gap_max) == (0.75, 0.75, 0.75)
    assert (sums.tokens, sums.prefix_tokens, sums.off_policy_tokens) == (4, 1, 1)


def test_entropy_and_gap_are_reported(policy, step):
    sums = whole_step(policy, step)
    assert 0 < sums.entropy / sums.tokens < np.log(policy.model.config.vocab_size)
    assert sums.gap_max < 1e-4
    assert sums.prefix_tokens == 0
    sums = whole_step(policy, step, mask_prefix=False)
    assert sums.gap_max < 1e-4
    assert sums.prefix_tokens == sum(rollout.prefix_len for rollout in step)
