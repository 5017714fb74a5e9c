"""The loss: advantages and weights by hand, expected gradients by enumeration, and gradients that do not depend on how they are computed."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from conftest import Enumerable, settings
from data.driver import run_programs
from loss import Batch, backward, chosen_logps, collate, set_advantages, surrogate, token_weights
from rollout import Rollout, grouped, grpo, resets


def rollout(reward, group, prefix=(), tokens=(1,)):
    tokens = [*prefix, *tokens]
    return Rollout(
        0,
        "base",
        [0],
        tokens,
        [-1.0] * len(tokens),
        [len(tokens)],
        "answer",
        prefix_len=len(prefix),
        reward=float(reward),
        group=group,
    )


def test_advantages_stay_inside_their_group():
    base = [rollout(r, (0, 0)) for r in (1, 0, 0, 0)]
    suffix = [rollout(r, (0, 1), prefix=[5]) for r in (1, 1, 0, 0)]
    flat = [rollout(1, (1, 0)) for _ in range(4)]
    set_advantages(base + suffix + flat)
    assert [round(r.advantage, 4) for r in base] == [1.7321, -0.5774, -0.5774, -0.5774]
    assert [r.advantage for r in suffix] == [1, 1, -1, -1]
    assert [r.advantage for r in flat] == [0, 0, 0, 0]


def test_a_group_of_two_states_is_refused():
    with pytest.raises(ValueError, match="mixes two states"):
        grouped([rollout(1, (0, 1), prefix=[5]), rollout(0, (0, 1))])


def test_token_weights():
    r = rollout(1, (0, 1), prefix=[5, 6], tokens=[7, 8, 9])
    r.advantage = 1.5
    assert token_weights(r, 8) == [0, 0, 0.0625, 0.0625, 0.0625]
    assert (
        token_weights(r, 8, mask_prefix=False)
        == [1.5 / 40] * 5
        == token_weights(r, 8, mask_prefix=False, length="response")
    )
    assert token_weights(r, 8, length="response") == [0, 0, 1.5 / 40, 1.5 / 40, 1.5 / 40]


# ------------------------------------------------------------------------------------------- expected gradients, enumerated


def gradient(model, scalar):
    model.zero_grad()
    scalar.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def expected_loss(toy, program_of, mask_prefix=True):
    """(-) expected loss as one differentiable scalar: sum over all outcomes of probability x token weight x log-prob."""
    weights, prefix_weight, states = {}, 0.0, {}
    for buffer, probability in toy.run_all(program_of):
        set_advantages(buffer, normalize=False)
        for r in buffer:
            w = np.array(token_weights(r, len(buffer), mask_prefix))
            prefix_weight += np.abs(w[: r.prefix_len]).sum()
            response = tuple(r.token_ids)
            weights[response] = weights.get(response, 0) + probability * w
        for (_, k), members in grouped(buffer).items():
            state = tuple(members[0].token_ids[: members[0].prefix_len])
            key = (state, k > 0, len(members), len(buffer))
            states[key] = states.get(key, 0.0) + probability
    scalar = sum(
        (torch.from_numpy(w).float() * toy.logps(response)).sum() for response, w in weights.items()
    )
    return scalar, states, prefix_weight


def claimed(toy, states):
    """What a method claims to ascend: for each group of G of N rollouts at a state s with k thoughts to go, G/N (1 - 1/G) 1/k V(s),
    with the states' frequencies held fixed (1 - 1/G because a rollout is part of its own baseline)."""
    total = 0.0
    for (state, _, G, N), frequency in states.items():
        total = total + frequency * (G / N) * (1 - 1 / G) / (toy.H - len(state)) * toy.value(state)
    return total


def fixed(h):
    def localize(task, seeds):
        return [(h, "fixed")] * len(seeds)
        yield

    return localize


def by_first_letter(task, seeds):
    return [(2 if seed.token_ids[0] == 0 else 1, "letter") for seed in seeds]
    yield


def test_grpo_ascends_the_pass_rate():
    toy = Enumerable(V=3, H=2, correct={(0, 1), (1, 2), (2, 2)}, seed=3)
    scalar, states, _ = expected_loss(toy, lambda: grpo(toy.task(base=2)))
    assert states == {((), False, 2, 2): pytest.approx(1, abs=1e-5)}
    assert_close(gradient(toy.model, scalar), gradient(toy.model, claimed(toy, states)))


@pytest.mark.parametrize("localize", [fixed(1), fixed(2), by_first_letter])
@pytest.mark.parametrize("split", [(2, 1, 2), (0, 2, 2), (0, 1, 2)])
def test_reset_methods_ascend_the_values_of_their_states(localize, split):
    """Fresh seeds, whose draws are independent of the base group: every group's expected gradient is its own state's."""
    base, prefixes, suffixes = split
    toy = Enumerable(V=2, H=2, correct={(0, 1), (1, 1)}, seed=5)
    task = dict(
        base=base,
        prefixes=prefixes,
        suffixes=suffixes,
        seed_source="fresh",
        max_seed_draws=prefixes,
    )
    scalar, states, prefix_weight = expected_loss(toy, lambda: resets(toy.task(localize, **task)))
    assert prefix_weight == 0.0
    assert any(reset for _, reset, _, _ in states)
    assert_close(gradient(toy.model, scalar), gradient(toy.model, claimed(toy, states)))


@pytest.mark.parametrize("localize", [fixed(1), fixed(2), by_first_letter])
def test_seeds_from_the_base_group_leave_its_gradient_unbiased(localize):
    """Seed read from the base group (the default): base part and suffix part by the formula; where nobody failed, no draws are made and
    the top-up makes a group of 4 whose first two are known to be right. Its gradient is still along that of the pass rate."""
    toy = Enumerable(V=2, H=2, correct={(0, 1), (1, 1)}, seed=5)
    scalar, states, prefix_weight = expected_loss(
        toy, lambda: resets(toy.task(localize, base=2, prefixes=1, suffixes=2, max_seed_draws=0))
    )
    assert prefix_weight == 0.0
    J = toy.value()
    j = J.item()
    suffix = {key: p for key, p in states.items() if key[1]}
    # the first two rollouts as if in a group of two (zero where both are right), then the cases in which both are
    base = 0.5 * 0.5 / toy.H * J
    both_right = j**2 * (2 * (1 - j) / 2 / j + 2 * 3 / 4) / 4 / toy.H * J
    assert_close(
        gradient(toy.model, scalar), gradient(toy.model, base + both_right + claimed(toy, suffix))
    )


def test_without_the_prefix_mask_the_prefix_is_trained():
    toy = Enumerable(V=2, H=2, correct={(0, 1), (1, 1)}, seed=5)
    _, _, prefix_weight = expected_loss(
        toy,
        lambda: resets(toy.task(fixed(2), base=2, prefixes=1, suffixes=2, max_seed_draws=0)),
        mask_prefix=False,
    )
    assert prefix_weight > 0.01


def assert_close(a, b):
    assert b.norm() > 1e-3
    assert (a - b).norm() < 1e-4 * b.norm()


# ----------------------------------------------------------------------------------------------- invariance of the gradient


@pytest.fixture(scope="module")
def step(policy):
    """A real step of the embedded policy with variance, several lengths and prefixes."""
    tasks = policy.tasks(4, 6, "random") + policy.tasks(7, 6, "random", seed=1)
    for slot, task in enumerate(tasks):
        task.slot = slot
    buffers = run_programs([resets(t) for t in tasks], policy.engine).results
    rollouts = [r for buffer in buffers for r in buffer]
    for i, r in enumerate(rollouts):  # rewards of our own: every group has variance
        r.reward = float(i % 3 == 0)
    set_advantages(rollouts)
    assert len({len(r.token_ids) for r in rollouts}) > 1 and any(r.prefix_len for r in rollouts)
    return rollouts


def gradients(policy, compute):
    policy.model.zero_grad()
    compute()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters()])


@pytest.fixture(scope="module")
def reference(policy, step):
    return gradients(
        policy, lambda: backward(policy.model, step, len(step), 0, settings(micro_batch=1000))
    )


@pytest.mark.parametrize("micro_batch, chunk", [(1, 4096), (7, 64), (1000, 10)])
def test_gradient_does_not_depend_on_micro_batch_or_chunk(
    policy, step, reference, micro_batch, chunk
):
    got = gradients(
        policy,
        lambda: backward(
            policy.model, step, len(step), 0, settings(micro_batch=micro_batch, chunk=chunk)
        ),
    )
    assert (got - reference).abs().max() < 1e-5 and reference.abs().max() > 1e-3


def test_gradient_does_not_depend_on_row_order_or_parts(policy, step, reference):
    shuffled = [step[i] for i in np.random.default_rng(0).permutation(len(step))]

    def in_parts():
        for part in (shuffled[:10], shuffled[10:11], shuffled[11:]):
            backward(policy.model, part, len(step), 0, settings(micro_batch=5))

    assert (gradients(policy, in_parts) - reference).abs().max() < 1e-5


@pytest.mark.parametrize("ranks, micro_batch", [(2, 3), (5, 19), (7, 1000)])
def test_gradient_is_the_sum_over_processes(policy, step, reference, ranks, micro_batch):
    """Whatever their number, and though the rows divide evenly by none of them; all run as many forwards, of rows of their own."""
    forwards, sums = [], []

    def of_all():
        for rank in range(ranks):
            runs = []
            handle = policy.model.base_model.register_forward_hook(
                lambda *_, runs=runs: runs.append(1)
            )
            sums.append(
                backward(
                    policy.model,
                    step,
                    len(step),
                    0,
                    settings(micro_batch=micro_batch),
                    rank=rank,
                    ranks=ranks,
                )
            )
            handle.remove()
            forwards.append(len(runs))

    assert (gradients(policy, of_all) - reference).abs().max() < 1e-5
    assert len(set(forwards)) == 1
    alone = backward(policy.model, step, len(step), 0, settings())
    for key in ("loss", "tokens", "entropy", "gap"):
        assert sum(s[key] for s in sums) == pytest.approx(alone[key], abs=1e-4, rel=1e-4)


def test_gradient_has_the_same_bits_each_time_with_two_threads(policy, step):
    """... of which each adds up its own part, also of what rows of one state send back to it."""
    torch.set_num_threads(2)
    try:
        compute = lambda: backward(policy.model, step, len(step), 0, settings(micro_batch=1000))  # noqa: E731
        first, *others = [gradients(policy, compute) for _ in range(3)]
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("pad_id, extra", [(0, 1), (3, 9)])
def test_gradient_does_not_depend_on_padding(policy, step, reference, pad_id, extra):
    def padded():
        batch = collate(step, [token_weights(r, len(step)) for r in step], pad_id, extra=extra)
        surrogate(chosen_logps(policy.model, batch, 1.0)[0], batch, clip=0).backward()

    assert (gradients(policy, padded) - reference).abs().max() < 1e-5


def test_shared_states_give_the_gradient_of_whole_rows(policy, step, reference, monkeypatch):
    """... which are what runs where a layer keeps something else than keys and values. Also where layers are run again in the backward."""
    compute = lambda: gradients(
        policy, lambda: backward(policy.model, step, len(step), 0, settings(micro_batch=7))
    )  # noqa: E731
    with monkeypatch.context() as patch:
        for layer in policy.model.base_model.layers:
            patch.setattr(layer, "forward", partial(checkpoint, layer.forward, use_reentrant=False))
        assert (compute() - reference).abs().max() < 1e-5
    monkeypatch.setattr(
        "loss.DynamicCache", lambda config: SimpleNamespace(layers=["of another kind"])
    )
    assert (compute() - reference).abs().max() < 1e-5


def test_the_head_runs_only_where_there_is_weight(policy, step):
    """Never on prompt or masked prefix tokens, never on more than a chunk at once; rollouts without advantage are not run, and what a
    group has in common is run once (twice where micro-batches part it)."""
    rows, bodies = [], []
    handles = [
        policy.model.lm_head.register_forward_hook(lambda m, args, out: rows.append(len(args[0]))),
        policy.model.base_model.register_forward_hook(
            lambda m, args, kwargs, out: bodies.append(len(kwargs["input_ids"])), with_kwargs=True
        ),
    ]
    saved = [r.advantage for r in step]
    for r in step[:20]:
        r.advantage = 0.0
    sums = backward(policy.model, step, len(step), 0, settings(micro_batch=16, chunk=32))
    for r, advantage in zip(step, saved):
        r.advantage = advantage
    for handle in handles:
        handle.remove()
    weighted = sum(len(r.token_ids) - r.prefix_len for r in step[20:])
    assert sums["tokens"] == weighted
    assert sum(rows) == 2 * weighted and max(rows) <= 32  # forward, and once more in the backward
    states, own = bodies[::2], bodies[1::2]
    assert sum(own) == len(step) - 20
    assert sum(states) <= len({r.group for r in step[20:]}) + len(states)


def test_clipped_surrogate():
    """On policy it has REINFORCE's gradient; off policy it is flat where the ratio has already moved enough."""
    batch = Batch(
        *[torch.zeros(1)] * 6,
        weights=torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0]),
        old_logps=torch.full((5,), -1.0),
        in_prefix=torch.zeros(5),
    )
    new = torch.tensor(
        [-1.0, -0.5, -0.5, -1.5, -1.5], requires_grad=True
    )  # ratios 1, 1.65, 1.65, 0.61, 0.61
    surrogate(new, batch, clip=0.2).backward()
    ratio = (new - batch.old_logps).exp().detach()
    assert torch.allclose(new.grad, torch.tensor([-1.0, 0.0, ratio[2], 0.0, -ratio[4]]))


def test_entropy_and_gap_are_reported(policy, step):
    sums = backward(policy.model, step, len(step), 0, settings())
    assert 0 < sums["entropy"] / sums["tokens"] < np.log(policy.model.config.vocab_size)
    assert sums["gap_max"] < 1e-4 and sums["prefix_tokens"] == 0
    sums = backward(policy.model, step, len(step), 0, settings(mask_prefix=False))
    assert sums["prefix_tokens"] == sum(r.prefix_len for r in step) and sums["gap_max"] < 1e-4
