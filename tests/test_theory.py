"""The numbers of tests/theory.py and tests/tabular.py, checked on small sizes.

Exact numbers are compared with brute force through the project's own programs, advantages and token
weights, and so are simulated methods; simulations of lesson 1 are compared with enumeration.

Left out: the whole map of lesson 3 and the whole dial of lesson 4. A test draws a corner of each.

Try it alone:  python -m pytest -q tests/test_theory.py
"""

import json
from dataclasses import dataclass
from itertools import islice

import numpy as np
import pytest
import torch

import theory
from conftest import settings
from loss import set_advantages, token_weights
from rollout import Rollout, Task, grpo, resets, walk
from tests import luck, tabular
from tests.tabular import Method
from theory import Chain, J, K, N, Split, measure, policy_advantage, step_size

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
        self.asked = 0  # localizations
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
        self.asked += len(seeds)
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


# ----------------------------------------------------------- lessons 3 and 4: tests/tabular.py


TABULAR = {
    "grpo": Case(grpo, {"base": 8, "prefixes": 0}, None),
    "first": Case(resets, {"base": 4}, None),
    "deepest": Case(deepest, {"base": 4}, None),
    "walk": Case(walk, {"base": 4, "prefixes": 0, "rounds": tabular.ROUNDS}, None),
}


@pytest.mark.parametrize("name", TABULAR)
def test_simulated_methods_agree_with_the_projects_programs_and_loss(name):
    """Means of generated thoughts, of trained rollouts and of the gradient, and its variance.

    A step of one problem for each of 4000 policies, beside 1000 prompts of the project's program.
    Within 5 standard errors.
    """
    case = TABULAR[name]
    q = 0.6
    p = 0.05 ** (1 / K)
    coins = Coins(p, q, 0, **case.changed)
    played = []  # a row for each prompt
    for _ in range(1000):
        asked = coins.asked
        buffer, generated = coins.play(case.program)
        generated += (coins.asked - asked) * tabular.REVIEW
        played.append([generated, len(buffer), *coins.gradient(buffer).sum(0)])
    method = Method(name, q)
    drawn = draw(np.full((4000, 1, K), p), method)
    gradient = (tabular.weights(drawn) * (drawn.right - p)).sum(2)  # [4000, 1, K]
    simulated = np.concatenate([drawn.thoughts, drawn.trained, gradient[:, 0]], 1)
    check_same_moments(np.array(played), simulated)


def draw(p, method, rng_key=1):
    return tabular.PROGRAMS[method.program](p, method, np.random.default_rng(rng_key))


def check_same_moments(a, b):
    """Means and second moments of two samples [n, ...] are within 5 standard errors."""
    for power in (1, 2):
        x, y = a**power, b**power
        error = np.sqrt(x.var(0) / len(x) + y.var(0) / len(y))
        assert (np.abs(x.mean(0) - y.mean(0)) <= 5 * error + 1e-9).all()


@pytest.mark.parametrize("program", ["first", "deepest"])
def test_exact_resets_keep_a_right_prefix_of_a_failure(program):
    drawn = draw(np.full((3, 40, 12), 0.8), Method(program, 1.0))
    base, suffixes = drawn.right[:, :, :4], drawn.right[:, :, 4:]
    h = drawn.start[:, :, 4:]
    kept = np.arange(12) < h[..., None]
    assert suffixes[kept].all()
    error = np.where(base.all(-1), -1, base.argmin(-1))  # [3, 40, 4] of failures
    failed = error >= 0
    place = error.argmax(-1) if program == "deepest" else failed.argmax(-1)
    expected = np.take_along_axis(error, place[..., None], -1)
    assert (h == np.maximum(expected, 0)).all()
    reviews = failed.sum(-1) if program == "deepest" else failed.any(-1)
    spent = 4 * 12 + 4 * (12 - h[..., 0]) + reviews * tabular.REVIEW
    assert (drawn.thoughts == spent).all()


def test_luck_is_the_share_of_wrong_responses_that_are_rewarded():
    rng = np.random.default_rng(0)
    right = tabular.respond(np.full((1, 5000, 12), 0.9), 8, rng)
    whole = right.all(-1)
    assert (tabular.rewarded(right, Method(), rng) == whole).all()
    lucky = tabular.rewarded(right, Method(luck=0.1), rng)
    assert lucky[whole].all()
    assert lucky[~whole].mean() == pytest.approx(0.1, abs=0.01)


def test_a_walk_ends_at_a_lucky_response():
    p = np.full((1, 400, 12), 0.1)  # nothing is found but by luck
    assert not draw(p, Method("walk", 1.0)).advantages.any()
    drawn = draw(p, Method("walk", 1.0, luck=0.05))
    found = np.isclose(drawn.advantages[..., -1], 2)
    trained = drawn.advantages.any(-1)
    doubled = drawn.trained == 8
    assert found.any()
    assert (trained == (found | doubled)).all()
    assert not drawn.right[found][:, -1].all(-1).any()


def test_closed_form_gradient_is_that_of_the_surrogate():
    rng = np.random.default_rng(0)
    logits = torch.tensor(tabular.start_logits(0.5, 0.9, [0, 1]), requires_grad=True)
    facts = rng.integers(tabular.FACTS, size=(2, 8, 12))
    policy = np.arange(2)[:, None, None]
    p = torch.sigmoid(logits)[policy, facts]
    drawn = draw(p.detach().numpy(), Method("first", 0.8))
    chosen = torch.where(torch.tensor(drawn.right), p[:, :, None], 1 - p[:, :, None])
    (torch.tensor(tabular.weights(drawn)) * chosen.log()).sum().backward()
    ascent = tabular.ascent(drawn, p.detach().numpy(), facts)
    torch.testing.assert_close(torch.tensor(ascent), logits.grad, atol=1e-7, rtol=1e-4)


def test_pass_rate_is_exact():
    logits = tabular.start_logits(0.7, 0.99, [0])
    rng = np.random.default_rng(0)
    facts = rng.integers(tabular.FACTS, size=(20_000, tabular.LENGTH))
    right = (rng.random(facts.shape) < tabular.sigmoid(logits[0])[facts]).all(1)
    error = right.std() / len(right) ** 0.5
    assert abs(right.mean() - tabular.pass_rate(logits)[0]) < 5 * error


def test_same_seed_same_numbers_and_training_learns():
    first = small_training([0, 1])
    again = small_training([0, 1])
    other = small_training([5, 6])
    assert np.array_equal(first[-1].rates, again[-1].rates)
    assert not np.array_equal(first[0].rates, other[0].rates)
    assert (first[-1].rates > first[0].rates + 0.1).all()
    assert (first[-1].thoughts > 0).all() and not first[0].thoughts.any()


def small_training(run_seeds):
    training = tabular.train((0.7, 0.99), "AdamW", 0.2, run_seeds, Method("walk", 1.0))
    return list(islice(training, 6))


def made_up():
    """Two runs: one gets to 0.5 at step 1, the other at step 3. A step costs 10 and 20 thoughts."""
    for step, rates in enumerate([(0.1, 0.1), (0.6, 0.2), (0.3, 0.4), (0.7, 0.5), (0.8, 0.9)]):
        yield tabular.Now(step, np.array(rates), step * np.array([10.0, 20.0]))


def test_until_a_target_and_at_a_budget():
    ended = tabular.until(made_up(), 0.5, longest=4)
    assert ended.steps.tolist() == [1, 3]
    assert ended.thoughts.tolist() == [10, 60]
    assert ended.reached and ended.start == pytest.approx(0.1)
    cut = tabular.until(made_up(), 0.5, longest=2)
    assert not cut.reached and cut.steps.tolist() == [1, 2]
    assert tabular.rates_at(made_up(), 30, longest=4) == pytest.approx([0.7, 0.3])


def test_command_line_prints_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(theory, "RATES", theory.RATES[:2])
    monkeypatch.setattr(theory, "REGIMES", theory.REGIMES[-1:])
    monkeypatch.setattr(theory, "LUCK_REGIMES", theory.REGIMES[-1:])
    monkeypatch.setattr(theory, "QS", (0.0, 0.8, 1.0))
    monkeypatch.setattr(theory, "LUCKS", (0.0, 0.01, 0.1))
    monkeypatch.setattr(theory, "RATE_FACTORS", (1,))
    monkeypatch.setattr(theory, "ACCURACIES", [0.0, 1.0])
    monkeypatch.setattr(theory, "STARTS", [0.04, 0.15])
    theory.main(["--seeds", "2", "--steps", "4", "--out", str(tmp_path / "theory.png")])
    out = capsys.readouterr().out
    assert "| samples, RR / CARO | -2 | -2.0" in out
    assert "**AdamW, start 0.1" in out
    assert "| AdamW, start 0.1" in out  # the signs of lesson 4
    assert "When are resets worth it" in out
    assert (tmp_path / "theory.png").stat().st_size > 20_000


@pytest.mark.parametrize("wrong", [["--out", "nowhere/theory.png"], ["--seeds", "0"]])
def test_command_line_refuses_before_it_works(wrong, capsys):
    with pytest.raises(SystemExit):
        theory.main(wrong)
    assert "## 1." not in capsys.readouterr().out


# ------------------------------------------------------------------------------ tests/luck.py


def test_luck_of_a_set(tmp_path, capsys):
    answers = ["B", "b", "A", "C"]
    lines = [{"question": "?", "answer": answer, "kind": "choice"} for answer in answers]
    lines += [{"question": "?", "answer": answer, "kind": "math"} for answer in ("7", "x", "x")]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    luck.main([path])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == [
        "| some | choice | 4 | 3 | 0.500 (`b`) | 0.167 |",  # 2 of 12 ordered pairs
        "| some | math, integers | 1 | 1 | 1.000 (`7`) | 0.000 |",
        "| some | math, others | 2 | 1 | 1.000 (`x`) | 1.000 |",
    ]
