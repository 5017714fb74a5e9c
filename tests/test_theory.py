"""tests/theory.py, on small sizes: its exact numbers against brute force with the project's own programs, advantages and weights, its simulations
against enumeration."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import theory
from conftest import settings
from loss import set_advantages, token_weights
from rollout import Rollout, grpo, resets
from theory import Chain, J, N, measure, policy_advantage, step_size

# ------------------------------------------------------------------------------------------------- lesson 1


def test_policy_advantage_is_the_slope_of_improvement():
    for oracle in (False, True):
        mean, _ = policy_advantage(0.25, oracle)
        assert mean == pytest.approx(theory.DELTA * (1 if oracle else 0.25))
        first_order = (J(0.25, 1e-6, oracle) - J(0.25, 0.0)) / 1e-6
        assert first_order == pytest.approx(theory.H * mean * (0.25 if oracle else 1), rel=1e-4)


def test_exact_exponents():
    rr, caro = ([policy_advantage(p, oracle) for p in theory.RATES] for oracle in (False, True))
    gains = [
        [J(p, step_size(mean), oracle) - J(p, 0.0) for p, (mean, _) in zip(theory.RATES, found)]
        for oracle, found in ((False, rr), (True, caro))
    ]
    samples = [[variance / mean**2 for mean, variance in found] for found in (rr, caro)]
    assert theory.slope(np.divide(*gains[::-1])) == pytest.approx(-1, abs=0.02)
    assert theory.slope(np.divide(*samples)) == pytest.approx(-2, abs=0.02)


@pytest.mark.parametrize("oracle", [False, True])
def test_a_conservative_step_improves_as_much_as_it_guarantees(oracle):
    for p in theory.RATES:
        mean, _ = policy_advantage(p, oracle)
        guaranteed = theory.H * mean**2 / (4 * (theory.H - 1)) * (p if oracle else 1)
        assert J(p, step_size(mean), oracle) - J(p, 0.0) >= guaranteed > 0
        assert (J(p, np.linspace(0, step_size(mean), 9), oracle) >= J(p, 0.0) - 1e-12).all()


def test_simulated_rewards_and_advantages_agree_with_enumeration():
    rng, p, n = np.random.default_rng(0), 0.5, 200_000
    for alpha in (0.0, 1.0):
        reward = theory.rewards(theory.first_states(n, p, rng), p, rng, alpha=alpha).mean()
        assert abs(reward - J(p, alpha)) < 5 * 0.5 / n**0.5
    for oracle in (False, True):
        states, drawn = theory.visited(n, p, rng, oracle)
        X = theory.rewards(states, p, rng, greedy=True) - theory.rewards(states, p, rng)
        mean, variance = policy_advantage(p, oracle)
        assert abs(X.mean() - mean) < 5 * (variance / n) ** 0.5
        assert X.var() == pytest.approx(variance, rel=0.02)
        assert drawn >= n / p * 0.95 if oracle else drawn == n


def test_samples_to_the_right_sign_agree_with_the_exact_variance():
    for oracle in (False, True):
        mean, variance = policy_advantage(0.25, oracle)
        sizes, sums, calls = theory.sampled_advantage(0.25, oracle, 400, np.random.default_rng(1))
        needed = theory.samples_needed(sizes, theory.right_signs(sums).mean(0))
        assert needed == pytest.approx(theory.Z**2 * variance / mean**2, rel=0.6)
        assert (calls > 3.5) == oracle


# ------------------------------------------------------------------------------------------------- lesson 2


class Coins:
    """Samples chains of K one-token thoughts, each right (1) with probability p, for the project's programs."""

    def __init__(self, p, q, seed, **changed):
        self.p, self.rng = p, np.random.default_rng(seed)
        self.task = SimpleNamespace(
            cfg=settings(**changed),
            slot=0,
            request=lambda purpose, n, seed=None, h=1: (n, seed.prefix(h) if seed else []),
            localize=self.localize,
        )
        self.q = q

    def localize(self, task, seeds):
        truth = [seed.token_ids.index(0) + 1 for seed in seeds]
        return [
            (t if self.rng.random() < self.q else int(self.rng.integers(theory.K)) + 1, "test")
            for t in truth
        ]
        yield

    def play(self, program):
        """(buffer, thoughts generated) of one prompt."""
        made, answer = 0, None
        generator = program(self.task)
        while True:
            try:
                requests = generator.send(answer)
            except StopIteration as done:
                return done.value, made
            answer = []
            for n, prefix in requests:
                draws = (self.rng.random((n, theory.K - len(prefix))) < self.p).astype(int).tolist()
                tokens = [prefix + d for d in draws]
                answer.append(
                    [
                        Rollout(
                            0,
                            "test",
                            [9],
                            t,
                            [0.0] * theory.K,
                            list(range(1, theory.K + 1)),
                            "thoughts",
                            prefix_len=len(prefix),
                            reward=float(all(t)),
                        )
                        for t in tokens
                    ]
                )
                made += n * (theory.K - len(prefix))

    def gradient(self, buffer, normalize=True):
        """[2, K] with respect to the logits of the thoughts before the first error (it included) and after it."""
        set_advantages(buffer, normalize)
        out = np.zeros((2, theory.K))
        for r in buffer:
            scores = np.array(token_weights(r, len(buffer))) * (np.array(r.token_ids) - self.p)
            error = r.token_ids.index(0) + 1 if 0 in r.token_ids else theory.K
            out[0, :error] += scores[:error]
            out[1, error:] += scores[error:]
        return out


METHODS = {
    "grpo": (dict(base=8, prefixes=0), grpo, lambda chain: chain.group(0, N)),
    "first": (dict(base=4), resets, lambda chain: chain.resets(0.6, 4, "first")),
    "deepest": (
        dict(base=4, seed_choice="deepest"),
        resets,
        lambda chain: chain.resets(0.6, 4, "deepest"),
    ),
    "fresh": (
        dict(base=0, suffixes=8, seed_source="fresh"),
        resets,
        lambda chain: chain.resets(0.6, 0, "first"),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_exact_gradients_agree_with_the_projects_programs_and_loss(name):
    """Mean, variance of each thought's gradient, noise behind the error and generated thoughts, within 5 standard errors."""
    changed, program, terms = METHODS[name]
    P, n = 0.3, 1000
    coins = Coins(P ** (1 / theory.K), 0.6, 0, **changed)
    gradients, thoughts = [], []
    for _ in range(n):
        buffer, made = coins.play(program)
        assert len(buffer) == N
        gradients.append(coins.gradient(buffer))
        thoughts.append(made)
    found, (on, off), thoughts = (
        measure(terms(Chain(P))),
        np.stack(gradients, 1),
        np.array(thoughts),
    )
    assert found["total"] == pytest.approx(1)
    assert (np.abs(on.mean(0) - found["mean"]) < 5 * on.std(0) / n**0.5).all()
    assert abs(thoughts.mean() - found["thoughts"]) <= 5 * thoughts.std() / n**0.5 + 1e-9
    uphill = on.sum(1) / theory.K**0.5  # along g
    for samples, exact in [
        ((on - found["mean"]) ** 2, np.diag(found["cov"])),
        ((uphill - uphill.mean()) ** 2, found["cov"].mean() * theory.K),
        ((off**2).sum(1), found["off"]),
    ]:
        assert (np.abs(samples.mean(0) - exact) < 5 * samples.std(0) / n**0.5).all()


def test_grpo_without_std_ascends_the_pass_rate():
    """Its expected gradient is (1 - 1/G) 1/K times the gradient of P, P (1 - p) for every thought: a rollout is part of its own baseline."""
    chain = Chain(0.2)
    mean = measure(chain.group(0, N, normalize=False))["mean"]
    assert mean == pytest.approx((1 - 1 / N) / theory.K * 0.2 * (1 - chain.p) * np.ones(theory.K))


@pytest.mark.parametrize("split", theory.SPLITS.values())
def test_an_exact_localizer_has_more_signal_than_chance(split):
    for P in (0.01, 0.04):
        (snr, along), (snr_random, along_random) = (
            theory.relative(P, 1.0, split),
            theory.relative(P, 0.0, split),
        )
        assert snr > snr_random and along > along_random
        assert along > 1 > along_random


# ------------------------------------------------------------------------------------------------- lesson 3


def small_step(q, choice="first", base=4, seed=0):
    truth, logits = theory.start_policies(0.8, 0.97, [seed, seed + 1])
    probs = logits.softmax(-1)
    rng = [torch.Generator().manual_seed(seed + i) for i in (2, 3)]
    return truth, probs, *theory.one_step(probs, truth, q, base, choice, *rng)


@pytest.mark.parametrize("choice", ["first", "deepest"])
def test_simulated_resets_keep_the_prefix_and_train_the_suffix(choice):
    truth, probs, ((used, states, w), (used_s, suffixes, w_s)), spent = small_step(1.0, choice)
    shared = (
        (suffixes == suffixes[:, :, :1]).all(2).long().cumprod(-1).sum(-1)
    )  # [B, P] thoughts that the four have in common
    h = (w_s != 0).any(2).float().argmax(-1)  # first trained thought
    trained = (w_s != 0).any(-1).any(-1)
    wrong = truth.flatten()[used] != states
    failed = wrong.any(-1).any(-1)
    assert (trained & failed).any() and (h[trained & failed] <= shared[trained & failed]).all()
    suffix = torch.arange(theory.LENGTH) >= h[..., None, None]
    of_a_base_rollout = ((suffixes[:, :, :1] == states) | suffix).all(-1).any(-1)
    assert of_a_base_rollout[trained & failed].all()
    right = (truth.flatten()[used_s] == suffixes) | suffix
    assert right[trained & failed].all()  # an exact localizer: no error in the prefix
    full = 2 * 4 * theory.LENGTH * theory.PROMPTS
    assert (spent < full).all() and (spent > full / 2).all()


def test_simulated_weights_are_those_of_the_project():
    """Each prompt of a simulated step, as Rollouts through set_advantages and token_weights."""
    truth, _, parts, _ = small_step(0.5)
    (used, states, w), (used_s, suffixes, w_s) = parts
    compared = 0
    for b, i in np.ndindex(w.shape[:2]):
        h = int((w_s[b, i] != 0).any(0).float().argmax()) if (w_s[b, i] != 0).any() else None
        wrong = (truth.flatten()[used[b, i]] != states[b, i]).any(-1)
        if h is None or not wrong.any() or not (w[b, i] != 0).any():
            continue
        as_rollouts = [Rollout(0, "test", [0], chain.tolist(), [], [], "thoughts", prefix_len=h * k, group=(0, k), reward=float(v.sum() > 0))
                       for k, (chains, weight) in enumerate(((states, w), (suffixes, w_s))) for chain, v in zip(chains[b, i], weight[b, i])]  # fmt: skip
        set_advantages(
            as_rollouts
        )  # a positive weight is a right answer, where the group has both kinds
        expected = torch.tensor([token_weights(r, N * theory.PROMPTS) for r in as_rollouts])
        torch.testing.assert_close(torch.cat([w[b, i], w_s[b, i]]), expected, rtol=1e-4, atol=1e-7)
        compared += 1
    assert compared > 3


def test_closed_form_gradient_is_that_of_the_surrogate():
    _, probs, buffer, _ = small_step(0.8)
    theta = probs.log().requires_grad_(True)
    logps = theta.log_softmax(-1).view(-1, theory.STATES)
    sum((weight * logps[used, states]).sum() for used, states, weight in buffer).backward()
    torch.testing.assert_close(theory.ascent(probs, buffer), theta.grad, atol=1e-7, rtol=1e-4)


def test_pass_rate_is_exact():
    truth, logits = theory.start_policies(0.8, 0.95, [0])
    probs, ops = (
        logits.softmax(-1),
        torch.randint(
            theory.OPS, (1, 3, theory.LENGTH), generator=torch.Generator().manual_seed(1)
        ),
    )
    rng, first = torch.Generator().manual_seed(2), torch.arange(theory.STATES).repeat(1, 3)
    ops_each = ops.repeat_interleave(theory.STATES, 1)
    states, _ = theory.sample(probs.cumsum(-1)[0], ops_each, first, 200, rng)
    answer = first
    for k in range(theory.LENGTH):
        answer = truth.flatten()[theory.facts(ops_each[:, :, k], answer)]
    right = (states[..., -1] == answer[..., None]).float()
    assert (
        abs(right.mean() - theory.pass_rate(probs, truth, ops)[0])
        < 5 * right.std() / right.numel() ** 0.5
    )


def test_same_seed_same_numbers_and_training_learns():
    first, again, other = (
        theory.train((0.7, 0.99), "plain gradient", (1700.0,), [s, s + 1], 6, base=4, q=1.0)[3]
        for s in (0, 0, 5)
    )
    assert torch.equal(first, again) and not torch.equal(first[0], other[0])
    assert (first[-1] > first[0] + 0.1).all()


def test_command_line_prints_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(theory, "RATES", theory.RATES[:2])
    monkeypatch.setattr(theory, "REGIMES", theory.REGIMES[-1:])
    monkeypatch.setattr(theory, "QS", (0.0, 0.8, 1.0))
    monkeypatch.setattr(theory, "ACCURACIES", [0.0, 1.0])
    monkeypatch.setattr(theory, "STARTS", [0.04, 0.15])
    theory.main(["--seeds", "2", "--steps", "4", "--out", str(tmp_path / "theory.png")])
    out = capsys.readouterr().out
    assert (
        "| samples, RR / CARO | -2 | -2.0" in out
        and "**AdamW, start 0.1" in out
        and "When are resets worth it" in out
    )
    assert (tmp_path / "theory.png").stat().st_size > 20_000
