"""The numbers of tests/theory.py, checked on small sizes.

Exact numbers are compared with brute force through the project's own programs, advantages and token
weights; simulations are compared with enumeration.

Left out: the whole map of lesson 3, which takes minutes. The last test draws a corner of it.

Try it alone:  python -m pytest -q tests/test_theory.py
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import theory
from conftest import settings
from loss import set_advantages, token_weights
from rollout import Rollout, Task, grpo, resets
from theory import LENGTH, Chain, J, K, Method, N, Split, measure, policy_advantage, step_size

# ---------------------------------------------------------------------------------- lesson 1


def test_policy_advantage_is_the_slope_of_improvement():
    for oracle in (False, True):
        mean, _ = policy_advantage(0.25, oracle)
        changed_states = 0.25 if oracle else 1  # share of the states where the mixture acts
        assert mean == pytest.approx(theory.DELTA * (1 if oracle else 0.25))
        first_order = (J(0.25, 1e-6, oracle) - J(0.25, 0.0)) / 1e-6
        assert first_order == pytest.approx(theory.H * mean * changed_states, rel=1e-4)


def test_exact_exponents():
    gains = {False: [], True: []}  # by oracle, for every p
    samples = {False: [], True: []}
    for oracle in (False, True):
        for p in theory.RATES:
            mean, variance = policy_advantage(p, oracle)
            gains[oracle].append(theory.improvement(p, mean, oracle))
            samples[oracle].append(variance / mean**2)
    better = np.divide(gains[True], gains[False])
    fewer = np.divide(samples[False], samples[True])
    assert theory.slope(better) == pytest.approx(-1, abs=0.02)
    assert theory.slope(fewer) == pytest.approx(-2, abs=0.02)


@pytest.mark.parametrize("oracle", [False, True])
def test_a_conservative_step_improves_as_much_as_it_guarantees(oracle):
    for p in theory.RATES:
        mean, _ = policy_advantage(p, oracle)
        guaranteed = theory.H * mean**2 / (4 * (theory.H - 1))
        if oracle:
            guaranteed *= p
        assert theory.improvement(p, mean, oracle) >= guaranteed > 0
        smaller_steps = np.linspace(0, step_size(mean), 9)
        assert (J(p, smaller_steps, oracle) >= J(p, 0.0) - 1e-12).all()


def test_simulated_rewards_and_advantages_agree_with_enumeration():
    rng = np.random.default_rng(0)
    p = 0.5
    n = 200_000
    for alpha in (0.0, 1.0):
        start = theory.first_states(n, p, rng)
        reward = theory.rewards(start, p, rng, alpha=alpha).mean()
        assert abs(reward - J(p, alpha)) < 5 * 0.5 / n**0.5
    for oracle in (False, True):
        states, drawn = theory.visited(n, p, rng, oracle)
        X = theory.rewards(states, p, rng, greedy=True) - theory.rewards(states, p, rng)
        mean, variance = policy_advantage(p, oracle)
        assert abs(X.mean() - mean) < 5 * (variance / n) ** 0.5
        assert X.var() == pytest.approx(variance, rel=0.02)
        if oracle:
            assert drawn >= n / p * 0.95
        else:
            assert drawn == n


def test_samples_to_the_right_sign_agree_with_the_exact_variance():
    for oracle in (False, True):
        mean, variance = policy_advantage(0.25, oracle)
        found = theory.sampled_advantage(0.25, oracle, 400, np.random.default_rng(1))
        needed = theory.samples_needed(found.sizes, theory.right_signs(found.sums).mean(0))
        assert needed == pytest.approx(theory.Z**2 * variance / mean**2, rel=0.6)
        assert (found.calls > 3.5) == oracle


# ---------------------------------------------------------------------------------- lesson 2


class Coins:
    """Plays the project's programs on chains of K one-token thoughts.

    A thought is right (1) with probability p. The localizer is right with probability q.
    """

    def __init__(self, p, q, rng_key, **changed):
        self.p = p
        self.q = q
        self.rng = np.random.default_rng(rng_key)
        self.task = Task(
            problem=None,
            prompt_ids=[],
            slot=0,
            cfg=settings(**changed),
            vocabulary=None,
            localize=self.localize,
            rng=self.rng,
            context=99,
        )
        self.task.request = self.request

    def request(self, purpose, n, seed=None, h=1, how=None):
        """A request of this policy: (n, prefix)."""
        return n, seed.prefix(h) if seed else []

    def localize(self, task, seeds):
        yield from ()  # a localizer is a generator; this one samples nothing
        found = []
        for seed in seeds:
            h = seed.token_ids.index(0) + 1
            if self.rng.random() >= self.q:
                h = int(self.rng.integers(K)) + 1
            found.append((h, "test"))
        return found

    def play(self, program):
        """(buffer, thoughts generated) of one prompt."""
        generated = 0
        answer = None
        generator = program(self.task)
        while True:
            try:
                requests = generator.send(answer)
            except StopIteration as done:
                return done.value, generated
            answer = []
            for n, prefix in requests:
                answer.append(self.sample(n, prefix))
                generated += n * (K - len(prefix))

    def sample(self, n, prefix):
        draws = self.rng.random((n, K - len(prefix))) < self.p
        return [rollout_of(prefix + row, len(prefix)) for row in draws.astype(int).tolist()]

    def gradient(self, buffer):
        """[2, K] with respect to the logits of thoughts: up to the first error, and after it."""
        set_advantages(buffer, True)
        out = np.zeros((2, K))
        for rollout in buffer:
            residuals = np.array(rollout.token_ids) - self.p
            scores = np.array(token_weights(rollout, len(buffer))) * residuals
            failed = 0 in rollout.token_ids
            error = rollout.token_ids.index(0) + 1 if failed else K
            out[0, :error] += scores[:error]
            out[1, error:] += scores[error:]
        return out


def rollout_of(tokens, prefix_len, reward=None, group=None):
    """A Rollout of one-token thoughts; its reward is 1 where all are right."""
    return Rollout(
        problem=0,
        purpose="test",
        prompt_ids=[9],
        token_ids=tokens,
        logps=[0.0] * len(tokens),
        thought_ends=list(range(1, len(tokens) + 1)),
        finish="thoughts",
        prefix_len=prefix_len,
        reward=float(all(tokens)) if reward is None else reward,
        group=group,
    )


def deepest(task):
    """The program of the idea "deepest": localizes all failures, resets the largest h*."""
    (base,) = yield [task.request("base", task.cfg.base)]
    failures = [rollout for rollout in base if rollout.reward < 1]
    if not failures:
        (more,) = yield [task.request("base", N - len(base))]
        return in_group(0, base + more)
    found = yield from task.localize(task, failures)
    reset_indices = [h for h, _ in found]
    h = max(reset_indices)
    seed = failures[reset_indices.index(h)]  # ties: the earlier rollout
    (suffixes,) = yield [task.request("suffix", N - len(base), seed, h)]
    return in_group(0, base) + in_group(1, suffixes)


def in_group(k, rollouts):
    for rollout in rollouts:
        rollout.group = (0, k)
    return rollouts


@dataclass
class Case:
    """A method of lesson 2 beside the project's program for it."""

    program: object
    changed: dict  # settings
    split: Split | None  # None: GRPO


CASES = {
    "grpo": Case(grpo, {"base": 8, "prefixes": 0}, None),
    "first": Case(resets, {"base": 4}, Split(4, "first")),
    "deepest": Case(deepest, {"base": 4}, Split(4, "deepest")),
    "fresh": Case(resets, {"base": 0, "suffixes": 8, "seed_source": "fresh"}, Split(0, "first")),
}


@pytest.mark.parametrize("name", CASES)
def test_exact_gradients_agree_with_the_projects_programs_and_loss(name):
    """All moments agree within 5 standard errors of 1000 prompts.

    Moments: mean and variance for each thought, variance along g, noise behind the error, and
    generated thoughts.
    """
    case = CASES[name]
    P = 0.3
    n = 1000
    q = 0.6
    chain = Chain(P)
    exact = measure(chain.resets(q, case.split) if case.split else chain.group(0, N))
    coins = Coins(P ** (1 / K), q, 0, **case.changed)
    gradients = []
    thoughts = []
    for _ in range(n):
        buffer, generated = coins.play(case.program)
        assert len(buffer) == N
        gradients.append(coins.gradient(buffer))
        thoughts.append(generated)
    on, off = np.stack(gradients, 1)  # [n, K] each
    uphill = on.sum(1) / K**0.5  # along g

    assert exact.total == pytest.approx(1)
    check_mean(np.array(thoughts), exact.thoughts)
    check_mean(on, exact.mean)
    check_mean((on - exact.mean) ** 2, np.diag(exact.cov))
    check_mean((uphill - uphill.mean()) ** 2, exact.cov.mean() * K)
    check_mean((off**2).sum(1), exact.off)


def check_mean(samples, expected):
    """The mean over samples [n, ...] is within 5 standard errors of what is expected."""
    error = np.abs(samples.mean(0) - expected)
    assert (error <= 5 * samples.std(0) / len(samples) ** 0.5 + 1e-9).all()


def test_grpo_without_std_ascends_the_pass_rate():
    """Its expected gradient is (1 - 1/G) 1/K times the gradient of P.

    That gradient is P (1 - p) for every thought. The factor 1 - 1/G is there because a rollout is
    part of its own baseline.
    """
    chain = Chain(0.2)
    mean = measure(chain.group(0, N, normalize=False)).mean
    expected = (1 - 1 / N) / K * 0.2 * (1 - chain.p)
    assert mean == pytest.approx(expected * np.ones(K))


@pytest.mark.parametrize("split", theory.SPLITS.values(), ids=list(theory.SPLITS))
def test_an_exact_localizer_has_more_signal_than_chance(split):
    for P in (0.01, 0.04):
        snr, along = theory.relative(P, 1.0, split)
        snr_random, along_random = theory.relative(P, 0.0, split)
        assert snr > snr_random
        assert along > 1 > along_random


# ---------------------------------------------------------------------------------- lesson 3


@dataclass
class Step:
    """One simulated step of two policies."""

    truth: torch.Tensor  # [B, FACTS]
    probs: torch.Tensor  # [B, FACTS, STATES]
    base: theory.Rollouts
    suffixes: theory.Rollouts
    spent: torch.Tensor  # [B] generated thoughts


def small_step(q, choice="first"):
    truth, logits = theory.start_policies(0.8, 0.97, [0, 1])
    probs = logits.softmax(-1)
    method = Method(4, q, choice)
    problem_rng = theory.generator(2)
    rng = theory.generator(3)
    (base, suffixes), spent = theory.one_step(probs, truth, method, problem_rng, rng)
    return Step(truth, probs, base, suffixes, spent)


@pytest.mark.parametrize("choice", theory.CHOICES)
def test_simulated_resets_keep_the_prefix_and_train_the_suffix(choice):
    step = small_step(1.0, choice)
    base = step.base
    suffixes = step.suffixes
    wrong = step.truth.flatten()[base.facts] != base.states
    failed = wrong.any(-1).any(-1)  # [B, P]
    trained = (suffixes.weights != 0).any(-1).any(-1)  # [B, P]
    reset = trained & failed
    assert reset.any()

    # The four suffixes have all thoughts before the first trained one in common.
    in_common = (suffixes.states == suffixes.states[:, :, :1]).all(2).long()
    prefix_in_common = in_common.cumprod(-1).sum(-1)  # [B, P] thoughts
    h = (suffixes.weights != 0).any(2).float().argmax(-1)  # [B, P] the first trained thought
    assert (h[reset] <= prefix_in_common[reset]).all()

    # These thoughts are those of a base rollout, and an exact localizer leaves no error in them.
    is_suffix = torch.arange(LENGTH) >= h[..., None, None]
    same_as_base = (suffixes.states[:, :, :1] == base.states) | is_suffix
    assert same_as_base.all(-1).any(-1)[reset].all()
    right = step.truth.flatten()[suffixes.facts] == suffixes.states
    assert (right | is_suffix)[reset].all()

    full = 2 * 4 * LENGTH * theory.PROMPTS
    assert (step.spent < full).all()
    assert (step.spent > full / 2).all()


def test_simulated_weights_are_those_of_the_project():
    """Each prompt of a simulated step, as Rollouts through set_advantages and token_weights."""
    step = small_step(0.5)
    wrong = step.truth.flatten()[step.base.facts] != step.base.states
    failed = wrong.any(-1).any(-1)  # [B, P]
    compared = 0
    for b, i in np.ndindex(failed.shape):
        base_weights = step.base.weights[b, i]  # [n, LENGTH]
        suffix_weights = step.suffixes.weights[b, i]
        # A flat group has no weights, so neither h nor its rewards can be read from them.
        if not failed[b, i] or not base_weights.any() or not suffix_weights.any():
            continue
        h = int(suffix_weights.any(0).float().argmax())
        rollouts = as_rollouts(step.base.states[b, i], base_weights, 0, (0, 0))
        rollouts += as_rollouts(step.suffixes.states[b, i], suffix_weights, h, (0, 1))
        set_advantages(rollouts)
        expected = torch.tensor([token_weights(r, N * theory.PROMPTS) for r in rollouts])
        simulated = torch.cat([base_weights, suffix_weights])
        torch.testing.assert_close(simulated, expected, rtol=1e-4, atol=1e-7)
        compared += 1
    assert compared > 3


def as_rollouts(chains, chain_weights, prefix_len, group):
    """Rollouts of chains [n, LENGTH]. A positive weight says that the reward is 1."""
    rollouts = []
    for tokens, weights in zip(chains.tolist(), chain_weights):
        reward = float(weights.sum() > 0)
        rollouts.append(rollout_of(tokens, prefix_len, reward, group))
    return rollouts


def test_closed_form_gradient_is_that_of_the_surrogate():
    step = small_step(0.8)
    buffer = [step.base, step.suffixes]
    theta = step.probs.log().requires_grad_(True)
    logps = theta.log_softmax(-1).view(-1, theory.STATES)
    objective = 0.0
    for rollouts in buffer:
        objective = objective + (rollouts.weights * logps[rollouts.facts, rollouts.states]).sum()
    objective.backward()
    ascent = theory.ascent(step.probs, buffer)
    torch.testing.assert_close(ascent, theta.grad, atol=1e-7, rtol=1e-4)


def test_pass_rate_is_exact():
    truth, logits = theory.start_policies(0.8, 0.95, [0])
    probs = logits.softmax(-1)
    ops = torch.randint(theory.OPS, (1, 3, LENGTH), generator=theory.generator(1))
    first = torch.arange(theory.STATES).repeat(1, 3)  # every first state for each of the three
    ops_of_first = ops.repeat_interleave(theory.STATES, 1)
    answer = theory.answers(truth, ops_of_first, first)
    problems = theory.Problems(ops_of_first, first, answer)
    rollouts = theory.sample(probs.cumsum(-1)[0], problems, 200, theory.generator(2))
    right = theory.rewards_of(rollouts, problems)
    error = abs(right.mean() - theory.pass_rate(probs, truth, ops)[0])
    assert error < 5 * right.std() / right.numel() ** 0.5


def test_same_seed_same_numbers_and_training_learns():
    first = small_training(0)
    again = small_training(0)
    other = small_training(5)
    assert np.array_equal(first, again)
    assert not np.array_equal(first[0], other[0])
    assert (first[-1] > first[0] + 0.1).all()


def small_training(run_seed):
    """Pass rates [evaluations, 1, 2]."""
    run_seeds = [run_seed, run_seed + 1]
    method = Method(base=4, q=1.0)
    return theory.train((0.7, 0.99), "plain gradient", (1700.0,), run_seeds, 6, method).rates


def test_command_line_prints_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(theory, "RATES", theory.RATES[:2])
    monkeypatch.setattr(theory, "REGIMES", theory.REGIMES[-1:])
    monkeypatch.setattr(theory, "QS", (0.0, 0.8, 1.0))
    monkeypatch.setattr(theory, "ACCURACIES", [0.0, 1.0])
    monkeypatch.setattr(theory, "STARTS", [0.04, 0.15])
    theory.main(["--seeds", "2", "--steps", "4", "--out", str(tmp_path / "theory.png")])
    out = capsys.readouterr().out
    assert "| samples, RR / CARO | -2 | -2.0" in out
    assert "**AdamW, start 0.1" in out
    assert "When are resets worth it" in out
    assert (tmp_path / "theory.png").stat().st_size > 20_000


@pytest.mark.parametrize("wrong", [["--out", "nowhere/theory.png"], ["--seeds", "0"]])
def test_command_line_refuses_before_it_works(wrong, capsys):
    with pytest.raises(SystemExit):
        theory.main(wrong)
    assert "## 1." not in capsys.readouterr().out
