"""When are resets worth it? Three lessons on chains that are small enough to compute.

  1  Conservative Policy Iteration, the paper's theory (after Kakade and Langford, 2002). A visited
     state is improvable with probability p. A credit-assignment oracle (CPI-CARO) needs 1/p^2 fewer
     samples than random resets (CPI-RR) and improves 1/p times as much per iteration.
  2  The gradient of one prompt: exact mean and variance of what GRPO, RRPO and SRPO estimate, with
     the advantages and token weights of loss.py.
  3  Training: steps and generated thoughts until the pass rate is 0.5, for several start pass rates
     and localizer accuracies, with AdamW and with plain gradient steps.

Lesson 1 is exact and simulated. Lesson 2 is exact. Lesson 3 is simulated.

Left out: the neural network. In lesson 3 every fact has a softmax of its own, so nothing
generalises, and the localizer is a fixed accuracy q that does not drift during training. Both keep
the map small enough to compute; the runs in tests/README.md have a network and a real localizer.

Departures from rollout.py:
  - "deepest" localizes every failure of the base group and resets the one whose named error comes
    last. It is an idea that was tried, and these lessons are its record: the paper takes the first
    failure, and so does rollout.py.
  - Where the base group has no failure, the prompt gets one GRPO group. rollout.py first looks for
    a seed among fresh draws.

This file is an experiment; tests/test_theory.py checks its numbers. All numbers are a function of
--seed.

Try it alone, from the repository root:
    python -m tests.theory --out theory.png               # all lessons, some minutes on one core
    python -m tests.theory --lesson 2 --out lesson2.png   # one lesson, seconds
"""

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

# ------------------------------------------------------- lesson 1: conservative policy iteration
#
# A chain makes H decisions. At an improvable state, action 1 (right) adds DELTA to the chance of
# reward and action 0 (wrong) takes DELTA away. At any other state the action changes nothing. The
# reward is 1 with probability 1/2 + DELTA * lead, so it is noisy for every p. The policy pi tosses
# a coin; the greedy policy always takes action 1.

H = 4  # decisions of a chain, the horizon
DELTA = 1 / 8  # advantage of action 1 at an improvable state
KAPPA = 0.5  # how strongly an action changes the chance that the next state is improvable
RATES = [2.0**-k for k in range(1, 7)]  # p, the chance that a visited state is improvable
CONFIDENCE = 0.9  # probability with which the estimated advantage has the right sign
Z = 1.2816  # the normal quantile of CONFIDENCE
RR_REPLICATES = 320  # independent estimates of CPI-RR in the simulation
CARO_REPLICATES = 2000  # independent estimates of CPI-CARO: its samples are fewer
BOOTSTRAPS = 500  # bootstrap resamples of the replicates

PATHS = np.array(list(product((0, 1), repeat=2 * H))).reshape(-1, 2, H)  # all L = 2^(2H) paths
IMPROVABLE = PATHS[:, 0]  # [L, H] 1 where the state before decision h is improvable
ACTION = PATHS[:, 1]  # [L, H] the action taken there
CHANGE = IMPROVABLE * (2 * ACTION - 1)  # [L, H] +1 right, -1 wrong, 0 where it does not matter
LEAD = CHANGE.cumsum(1)  # [L, H] right minus wrong actions up to and with decision h


def path_probability(p, alpha, oracle=False):
    """Probabilities [..., L] of all paths under the mixture (1 - alpha) pi + alpha greedy.

    alpha is [...]. With the oracle the mixture acts at improvable states only; elsewhere it is pi.
    The next state is improvable with probability p (1 - KAPPA) after action 1 and p (1 + KAPPA)
    after action 0: p under pi, less under a better policy. This shift of the visited states is why
    steps have to be conservative.
    """
    improvable = np.full(IMPROVABLE.shape, float(p))
    improvable[:, 1:] = p * (1 + KAPPA * (1 - 2 * ACTION[:, :-1]))
    shift = np.asarray(alpha, float)[..., None, None] / 2
    if oracle:
        shift = shift * IMPROVABLE
    state_chance = np.where(IMPROVABLE, improvable, 1 - improvable)
    action_chance = 0.5 + np.where(ACTION, shift, -shift)
    return (state_chance * action_chance).prod(-1)


def J(p, alpha, oracle=False):
    """Expected reward [...] of the mixture, summed over all paths."""
    return path_probability(p, alpha, oracle) @ (0.5 + DELTA * LEAD[:, -1])


def policy_advantage(p, oracle=False):
    """Exact (mean, variance) of X = r(action 1, then pi) - r(pi), both sampled from one state.

    The state is a visited one: h is uniform, and with the oracle it is improvable. The mean is the
    policy advantage E_{s ~ d_pi} E_{a ~ greedy} A_pi(s, a): p DELTA, with the oracle DELTA. Under
    pi the lead does not change on average, so V(s) = 1/2 + DELTA lead.
    """
    weight = path_probability(p, 0.0)[:, None] * np.ones((1, H))
    if oracle:
        weight = weight * IMPROVABLE
    weight = weight / weight.sum()  # [L, H]
    V = 0.5 + DELTA * (LEAD - CHANGE)  # before the decision
    Q = V + DELTA * IMPROVABLE
    mean = (weight * (Q - V)).sum()
    square = (weight * (Q * (1 - V) + V * (1 - Q))).sum()  # X^2 is 1 where the two rewards differ
    return mean, square - mean**2


def step_size(advantage):
    """The conservative alpha = A / (2 (H - 1)), for advantages A within [-1, 1].

    J' - J = alpha sum_h E_{s ~ d'_h} A(s). The states d'_h are those of d_h unless an earlier
    decision was changed, which has a probability of at most (h - 1) alpha. Hence

        J' - J >= alpha (H A - alpha H (H - 1))

    is largest at this alpha: H A^2 / (4 (H - 1)), with A = p DELTA for CPI-RR. The oracle changes
    improvable states only, so p multiplies both terms:

        J' - J >= p alpha (H DELTA - alpha H (H - 1)), largest at alpha = DELTA / (2 (H - 1)).
    """
    return np.clip(advantage, 0, 1) / (2 * (H - 1))


def improvement(p, advantage, oracle):
    """Exact J' - J of the conservative step that this (estimated) advantage asks for."""
    return J(p, step_size(advantage), oracle) - J(p, 0.0)


# The simulation draws 16-bit integers. This is fast, and exact: every probability in this lesson is
# a multiple of 2^-16.
UNIT = 2**16
PIECE = 2**18  # samples that are drawn at once: they stay in the processor's cache


@dataclass
class States:
    """n states of chains, each field [n]."""

    taken: np.ndarray  # decisions taken so far
    improvable: np.ndarray  # whether the next action matters
    lead: np.ndarray  # right minus wrong actions so far


def draw(n, rng):
    """n uniform 16-bit integers."""
    return rng.integers(0, UNIT, n, dtype=np.uint16)


def first_states(n, p, rng):
    """n states before the first decision."""
    improvable = draw(n, rng) < round(UNIT * p)
    return States(np.zeros(n, np.uint8), improvable, np.zeros(n, np.int8))


def walk(states, stop, p, rng, greedy=False, alpha=0.0):
    """Continues chains under pi until `stop` [n] decisions are taken; returns the new states.

    greedy: the first action is 1. alpha: under the mixture with the greedy policy instead of pi.
    """
    improvable = states.improvable
    lead = states.lead.copy()
    for k in range(H):
        active = (states.taken <= k) & (k < stop)
        right = draw(len(lead), rng) < round(UNIT / 2 * (1 + alpha))
        if greedy:
            right |= states.taken == k
        change = np.where(right, np.int8(1), np.int8(-1))
        lead += np.where(active & improvable, change, np.int8(0))
        after_right = np.uint16(UNIT * p * (1 - KAPPA))
        after_wrong = np.uint16(UNIT * p * (1 + KAPPA))
        next_improvable = draw(len(lead), rng) < np.where(right, after_right, after_wrong)
        improvable = np.where(active, next_improvable, improvable)
    return States(stop, improvable, lead)


def rewards(states, p, rng, greedy=False, alpha=0.0):
    """Rewards [n], 0 or 1, of chains that continue from these states to the end."""
    end = np.full_like(states.taken, H)
    lead = walk(states, end, p, rng, greedy, alpha).lead
    threshold = UNIT // 2 + int(UNIT * DELTA) * lead.astype(np.int32)
    return (draw(len(lead), rng) < threshold).astype(np.int8)


def visited(n, p, rng, oracle=False):
    """(n visited states of pi, how many states were drawn for them).

    With the oracle, states are drawn until n are improvable; every draw is one oracle call.
    """
    kept = []
    found = 0
    drawn = 0
    while found < n:
        size = n
        if oracle:
            size = min(int((n - found) / p * 1.05) + 16, 2**20)
        start = first_states(size, p, rng)
        stop = rng.integers(0, H, size, dtype=np.uint8)
        states = walk(start, stop, p, rng)
        if oracle:
            chosen = states.improvable
            states = States(states.taken[chosen], states.improvable[chosen], states.lead[chosen])
        kept.append(states)
        found += len(states.taken)
        drawn += size
    taken = np.concatenate([states.taken for states in kept])[:n]
    improvable = np.concatenate([states.improvable for states in kept])[:n]
    lead = np.concatenate([states.lead for states in kept])[:n]
    return States(taken, improvable, lead), drawn


@dataclass
class AdvantageSamples:
    """Estimates of the policy advantage from T growing numbers of samples."""

    sizes: np.ndarray  # [T] samples
    sums: np.ndarray  # [replicates, T] sum of X over so many samples
    calls: float  # oracle calls for each sample


def sampled_advantage(p, oracle, replicates, rng, least=8):
    """Estimates the policy advantage from more and more samples, growing by sqrt 2.

    Stops when the sign of the estimate is right in enough replicates.
    """
    sizes = []
    sums = []
    total = np.zeros(replicates)
    done = 0  # samples of each replicate
    drawn = 0
    while len(sums) < 4 or right_signs(sums[-1]).mean() < CONFIDENCE + 0.03:
        n = math.ceil(least * 2 ** (len(sizes) / 2))
        for at in range(done, n, PIECE // replicates):
            size = min(PIECE // replicates, n - at)
            states, draws = visited(size * replicates, p, rng, oracle)
            X = rewards(states, p, rng, greedy=True) - rewards(states, p, rng)
            total = total + X.reshape(replicates, size).sum(1)
            drawn += draws
        sizes.append(n)
        sums.append(total)
        done = n
    calls = drawn / (done * replicates) if oracle else 0.0
    return AdvantageSamples(np.array(sizes), np.stack(sums, 1), calls)


def right_signs(sums):
    """1 where the estimated advantage is positive, 1/2 where it is 0 (a coin toss), else 0."""
    return (np.sign(sums) + 1) / 2


def samples_needed(sizes, share):
    """Samples from which the share [T] of right signs stays at CONFIDENCE or above.

    Log-linear between two sizes.
    """
    below = np.flatnonzero(share[:-1] < CONFIDENCE)
    t = below[-1] if len(below) else 0
    rise = max(share[t + 1] - share[t], 1e-9)
    part = np.clip((CONFIDENCE - share[t]) / rise, 0, 1)
    return sizes[t] * (sizes[t + 1] / sizes[t]) ** part


def interval(values):
    """95% interval (low, high) of bootstrap values [B, ...]."""
    return np.percentile(values, [2.5, 97.5], axis=0)


def slope(ratios):
    """Exponent of p in ratios [..., P]: the slope of their log over log p."""
    x = np.log(RATES) - np.mean(np.log(RATES))
    return np.log(ratios) @ x / (x @ x)


@dataclass
class Estimate:
    """One quantity, exact and sampled. P: the p of RATES; one p has no such dimension."""

    exact: float | np.ndarray  # [P]
    sampled: float | np.ndarray  # [P]
    bootstraps: np.ndarray  # [B, P] the sampled value from B resamples of the replicates


@dataclass
class Iteration:
    """One iteration of CPI-RR or CPI-CARO at one p."""

    improvement: Estimate  # J' - J
    samples: Estimate  # samples to the right sign of the advantage
    calls: float  # oracle calls for these samples


@dataclass
class OracleGain:
    """What the oracle gains over random resets, for every p."""

    improvement: Estimate  # of CARO / of RR
    samples: Estimate  # of RR / of CARO


def iterate(p, oracle, replicates, rng):
    """One iteration of CPI-RR, or with the oracle CPI-CARO, exact and simulated."""
    mean, variance = policy_advantage(p, oracle)
    found = sampled_advantage(p, oracle, replicates, rng)
    signs = right_signs(found.sums)
    needed = samples_needed(found.sizes, signs.mean(0))
    t = np.abs(np.log(found.sizes / needed)).argmin()  # the size next to what is needed
    estimates = found.sums[:, t] / found.sizes[t]
    gains = improvement(p, estimates, oracle)  # each replicate steps by its own estimate
    gains_again = np.zeros(BOOTSTRAPS)
    needed_again = np.zeros(BOOTSTRAPS)
    for b in range(BOOTSTRAPS):
        counts = rng.multinomial(replicates, np.full(replicates, 1 / replicates))
        weight = counts / replicates
        gains_again[b] = weight @ gains
        needed_again[b] = samples_needed(found.sizes, weight @ signs)
    return Iteration(
        Estimate(improvement(p, mean, oracle), gains.mean(), gains_again),
        Estimate(Z**2 * variance / mean**2, needed, needed_again),
        found.calls * needed,
    )


def ratio(above, below):
    """above / below, two lists of P estimates, as one estimate over all p."""
    pairs = list(zip(above, below))
    return Estimate(
        np.array([a.exact / b.exact for a, b in pairs]),
        np.array([a.sampled / b.sampled for a, b in pairs]),
        np.stack([a.bootstraps / b.bootstraps for a, b in pairs], 1),
    )


def lesson1(run_seed):
    """Runs one iteration of CPI-RR and CPI-CARO for every p, and prints what the oracle gains."""
    rng = np.random.default_rng([run_seed, 1])
    rr = []
    caro = []
    for p in RATES:
        rr.append(iterate(p, False, RR_REPLICATES, rng))
        caro.append(iterate(p, True, CARO_REPLICATES, rng))
    gain = OracleGain(
        improvement=ratio([c.improvement for c in caro], [r.improvement for r in rr]),
        samples=ratio([r.samples for r in rr], [c.samples for c in caro]),
    )
    print_lesson1(rr, caro, gain)
    return gain


def print_lesson1(rr, caro, gain):
    print(
        f"\n## 1. Conservative Policy Iteration: {H} decisions, "
        f"advantage {DELTA} at improvable states\n"
    )
    print_head(
        ["p", "A of RR", "alpha RR / CARO", "J'-J of RR, CARO, exact", "CARO / RR", "sampled"]
        + ["samples of RR, CARO, exact", "RR / CARO", "sampled", "oracle calls of CARO"]
    )
    for i, p in enumerate(RATES):
        mean, _ = policy_advantage(p)
        better = gain.improvement
        fewer = gain.samples
        better_low, better_high = interval(better.bootstraps[:, i])
        fewer_low, fewer_high = interval(fewer.bootstraps[:, i])
        print_row(
            [
                f"1/{1 / p:.0f}",
                f"{mean:.4f}",
                f"{step_size(mean):.5f} / {step_size(DELTA):.5f}",
                f"{rr[i].improvement.exact:.2e}, {caro[i].improvement.exact:.2e}",
                f"{better.exact[i]:.2f}",
                f"{better.sampled[i]:.2f} ({better_low:.2f} to {better_high:.2f})",
                f"{rr[i].samples.exact:,.0f}, {caro[i].samples.exact:,.0f}",
                f"{fewer.exact[i]:,.0f}",
                f"{fewer.sampled[i]:,.0f} ({fewer_low:,.0f} to {fewer_high:,.0f})",
                f"{caro[i].calls:,.0f}",
            ]
        )
    print()
    print_head(["exponent of p", "theory", "exact", "sampled, 95% bootstrap interval"])
    print_exponent("improvement, CARO / RR", -1, gain.improvement)
    print_exponent("samples, RR / CARO", -2, gain.samples)
    print(
        "\nA sample is a pair of rewards from one state. Samples are counted until the sign of the "
        f"advantage is right with probability {CONFIDENCE}. Oracle calls are counted separately, "
        "1/p for each sample of CARO: if a call costs as much as a sample, CARO saves 1/p, not "
        "1/p^2."
    )


def print_exponent(what, theory, estimate):
    low, high = interval(slope(estimate.bootstraps))
    sampled = f"{slope(estimate.sampled):.2f} ({low:.2f} to {high:.2f})"
    print_row([what, str(theory), f"{slope(estimate.exact):.3f}", sampled])


def print_row(cells, indent=""):
    """One row of a Markdown table."""
    print(f"{indent}| {' | '.join(cells)} |", flush=True)


def print_head(cells, indent=""):
    """The head of a Markdown table."""
    print_row(cells, indent)
    print(f"{indent}|{'---|' * len(cells)}")


# ------------------------------------------------ lesson 2: the gradient of one prompt, exactly
#
# A chain has K thoughts, each right with probability p = P^(1/K); its reward is 1 where all are
# right. Thought k has one logit. After its first error a chain is at other states, with logits of
# their own, where nothing can be won: the scores there are pure noise, of variance p (1 - p) each.
# So a rollout is its first error j (from 0; j = K: none), and its scores u_j [K] are 1 - p before
# j, -p at j, and 0 after it.

K = 6  # thoughts of a chain
N = 8  # trained rollouts of a prompt
STARTS = [0.01, 0.04, 0.15, 0.5]  # P, the pass rate of the prompt
EXAMPLE_START = 0.04  # the one of STARTS that the text quotes
ACCURACIES = [0.0, 0.25, 0.5, 0.75, 1.0]  # q: how often the localizer is right; else random
FRESH_ROUND = 4  # fresh draws of a seed at once, as in rollout.py
FRESH_DRAWS = 8  # fresh draws of a seed at most, as in rollout.py


@dataclass(frozen=True)
class Split:
    """Splits the N rollouts of a prompt: `base` from the prompt, the rest are suffixes."""

    base: int  # 0: the seed is a fresh draw that is not trained
    choice: str  # of the seed among the failures: "first", or "deepest" (the last named error)


SPLITS = {
    "1x4": Split(4, "first"),
    "1x4 deepest": Split(4, "deepest"),
    "1x8, fresh seed": Split(0, "first"),
}


def advantages(right, size, normalize=True):
    """(advantage of right rollouts, of wrong ones) in a group of `size`: loss.set_advantages."""
    mean = right / size
    std = math.sqrt(mean * (1 - mean))
    if std < 1e-8:
        return 0.0, 0.0
    scale = std if normalize else 1.0
    return (1 - mean) / scale, -mean / scale


def binomial(n, k, p):
    """Probability of k successes in n."""
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


@dataclass
class Scores:
    """Distribution of the summed scores of independent failures."""

    mean: np.ndarray  # [K]
    cov: np.ndarray  # [K, K]
    off: float  # summed variance of the scores after the first error

    def __add__(self, other):
        return Scores(self.mean + other.mean, self.cov + other.cov, self.off + other.off)

    def times(self, n):
        """The sum of n independent ones."""
        return Scores(n * self.mean, n * self.cov, n * self.off)


@dataclass
class Term:
    """The gradient in one case, which fixes the advantages. Rollouts are independent in it.

    The gradient of a method is a mixture of such cases; see `measure`.
    """

    probability: float  # of this case
    mean: np.ndarray  # [K]
    cov: np.ndarray  # [K, K]
    off: float  # noise after the first error
    thoughts: float  # generated thoughts

    def followed_by(self, other):
        """Adds the part of the gradient that comes from the suffix group, in one of its cases."""
        return Term(
            self.probability * other.probability,
            self.mean + other.mean,
            self.cov + other.cov,
            self.off + other.off,
            self.thoughts + other.thoughts,
        )


class Chain:
    """The prompt of this lesson, and what each method estimates on it. Nothing is sampled."""

    def __init__(self, pass_rate, length="trained"):
        """length: the divisor of token weights, as in loss.token_weights."""
        p = pass_rate ** (1 / K)
        self.length = length
        self.p = p
        self.scores = np.tril(np.full((K + 1, K), 1 - p), -1)  # [K + 1, K] u_j
        self.scores[range(K), range(K)] = -p
        self.off = (K - 1.0 - np.arange(K)) * p * (1 - p)  # [K] noise after the first error j
        self.error = p ** np.arange(K) * (1 - p) / (1 - p**K)  # [K] first error of a failure

    def failure(self, h=0, among=1.0):
        """Scores of one failure, from thought h on.

        among: chance [K] with which a failure with first error j is considered at all.
        """
        late = np.arange(K) >= h
        weight = self.p ** np.arange(K) * late * among
        weight = weight / max(weight.sum(), 1e-300)
        u = self.scores[:K] * late
        mean = weight @ u
        cov = (u * weight[:, None]).T @ u - np.outer(mean, mean)
        return Scores(mean, cov, weight @ self.off)

    def group(self, h, size, passed=0, normalize=True) -> Iterator[Term]:
        """Cases of a group of `size` rollouts after a right prefix of h thoughts.

        The case is the number of right rollouts. The first `passed` are known to be right.
        """
        failure = self.failure(h)
        success = self.scores[K] * (np.arange(K) >= h)
        trained = K - h if self.length == "trained" else K
        for right in range(passed, size + 1):
            chance = binomial(size - passed, right - passed, self.p ** (K - h))
            a, b = advantages(right, size, normalize)
            a = a / (N * trained)  # loss.token_weights: A / (|T| N)
            b = b / (N * trained)
            wrong = failure.times(size - right)
            mean = right * a * success + b * wrong.mean
            yield Term(chance, mean, b**2 * wrong.cov, b**2 * wrong.off, size * (K - h))

    def resets(self, q, split: Split) -> Iterator[Term]:
        """Cases of rollout.resets, with one seed and a localizer of accuracy q."""
        named = q * np.eye(K) + (1 - q) / K  # [j, h] chance that thought h is named for error j
        if split.base == 0:
            yield from self.fresh_seed(named)
        else:
            yield from self.all_passed(split)
            yield from self.base_seed(named, split)

    def all_passed(self, split) -> Iterator[Term]:
        """Cases without a failure in the base group: one group of N, as in GRPO."""
        chance = self.p ** (K * split.base)
        for term in self.group(0, N, passed=split.base):
            term.probability *= chance
            yield term

    def base_seed(self, named, split) -> Iterator[Term]:
        """Cases in which the seed is a failure of the base group. It stays in that group."""
        P = self.p**K
        for right in range(split.base):
            a, b = advantages(right, split.base)
            a = a / (N * K)
            b = b / (N * K)
            failures = split.base - right
            # The place of the seed among the failures. For "first" it is 0.
            places = range(failures) if split.choice == "deepest" else range(1)
            for place, j, h in product(places, range(K), range(K)):
                chance, others = self.other_failures(named, h, place, failures, split.choice)
                chance *= binomial(split.base, right, P) * self.error[j] * named[j, h]
                wrong = Scores(self.scores[j], np.zeros((K, K)), self.off[j]) + others
                mean = right * a * self.scores[K] + b * wrong.mean
                base = Term(chance, mean, b**2 * wrong.cov, b**2 * wrong.off, K * split.base)
                for suffixes in self.suffix_group(j, h, N - split.base):
                    yield base.followed_by(suffixes)

    def other_failures(self, named, h, place, failures, choice):
        """(chance, scores) of the other failures, where the seed is at `place` and was named h.

        "first" learns nothing about them. "deepest": those sampled before the seed were named
        before h, those after it at most at h (ties go to the first).
        """
        if choice == "first":
            return 1.0, self.failure().times(failures - 1)
        before = named[:, :h].sum(1)  # [K] chance to be named before h, by first error
        at_most = named[:, : h + 1].sum(1)
        n_before = place
        n_after = failures - 1 - place
        chance = (self.error @ before) ** n_before * (self.error @ at_most) ** n_after
        scores_before = self.failure(0, before).times(n_before)
        scores_after = self.failure(0, at_most).times(n_after)
        return chance, scores_before + scores_after

    def fresh_seed(self, named) -> Iterator[Term]:
        """Cases in which the seed is a fresh draw that is not trained; all N are suffixes.

        Seeds are drawn in two rounds of FRESH_ROUND, the second where the first has no failure.
        """
        P = self.p**K
        nothing_found = P**FRESH_DRAWS
        for term in self.group(0, N):
            term.probability *= nothing_found
            term.thoughts += FRESH_DRAWS * K
            yield term
        second_round = P**FRESH_ROUND / (1 + P**FRESH_ROUND)  # given that a seed is found
        spent = FRESH_ROUND * K * (1 + second_round)
        for j, h in product(range(K), range(K)):
            chance = (1 - nothing_found) * self.error[j] * named[j, h]
            untrained = Term(chance, np.zeros(K), np.zeros((K, K)), 0.0, spent)
            for suffixes in self.suffix_group(j, h, N):
                yield untrained.followed_by(suffixes)

    def suffix_group(self, j, h, size) -> Iterator[Term]:
        """Cases of `size` suffixes from thought h of a seed whose first error is j.

        After the error all of them fail, and their advantages are zero.
        """
        if h <= j:
            yield from self.group(h, size)
        else:
            yield Term(1.0, np.zeros(K), np.zeros((K, K)), 0.0, size * (K - h))


@dataclass
class Signal:
    """Moments of the gradient of one prompt, and its signal-to-noise ratios.

    g is the unit gradient of the true pass rate: the diagonal. The signal is (mean . g)^2, since
    the mean gradient of a reset method is not the gradient of the pass rate. Twice the SNR is worth
    twice the prompts.
    """

    total: float  # summed probability of the cases: 1
    mean: np.ndarray  # [K]
    cov: np.ndarray  # [K, K]
    off: float  # noise after the first error
    thoughts: float  # generated thoughts
    snr: float  # noise: in all directions, and off. It limits plain gradient steps
    along: float  # noise: along g only. It says how surely one gradient points uphill


def measure(terms: Iterable[Term]) -> Signal:
    """Moments and signal-to-noise ratios of a mixture of cases."""
    terms = list(terms)
    w = np.array([term.probability for term in terms])
    means = np.array([term.mean for term in terms])
    covs = np.array([term.cov for term in terms])
    off = w @ np.array([term.off for term in terms])
    thoughts = w @ np.array([term.thoughts for term in terms])
    mean = w @ means
    within = np.einsum("t,tij->ij", w, covs)
    between = (means * w[:, None]).T @ means - np.outer(mean, mean)
    cov = within + between
    g = np.full(K, K**-0.5)
    signal = (mean @ g) ** 2
    snr = signal / (np.trace(cov) + off)
    return Signal(w.sum(), mean, cov, off, thoughts, snr, signal / (g @ cov @ g))


def relative(pass_rate, q, split, length="trained"):
    """(snr, along) of a reset method divided by those of GRPO."""
    reset = measure(Chain(pass_rate, length).resets(q, split))
    grpo = measure(Chain(pass_rate).group(0, N))
    return reset.snr / grpo.snr, reset.along / grpo.along


@dataclass
class PromptGradients:
    """Results of lesson 2."""

    snr: dict[str, np.ndarray]  # split -> [ACCURACIES, STARTS], relative to GRPO
    even_snr: dict[str, float]  # split -> highest pass rate where exact resets have the higher snr
    even_along: dict[str, float]  # the same for `along`

    def at_example(self, split, q):
        """snr relative to GRPO at EXAMPLE_START."""
        return self.snr[split][ACCURACIES.index(q), STARTS.index(EXAMPLE_START)]


def lesson2():
    """Prints SNRs relative to GRPO, and up to which pass rate exact resets have the higher SNR."""
    print(
        f"\n## 2. The gradient of one prompt, exactly: {K} thoughts, {N} trained rollouts\n\n"
        "SNR relative to GRPO at the same number of prompts: noise in all directions / noise along "
        "the true gradient only\n"
    )
    starts = [f"P = {P}" for P in STARTS]
    print_head(["split", "q", *starts, f"thoughts, P = {EXAMPLE_START}"])
    grpo = [measure(Chain(P).group(0, N)) for P in STARTS]
    cells = [f"{signal.snr:.2g} / {signal.along:.2g}" for signal in grpo]
    print_row(["GRPO itself", "", *cells, str(K * N)])
    results = PromptGradients({}, {}, {})
    for name, split in SPLITS.items():
        rows = [accuracy_row(name, split, q, grpo) for q in ACCURACIES]
        results.snr[name] = np.array(rows)
    for name, split in SPLITS.items():
        break_even_row(name, split, "trained", results)
        break_even_row(f"{name} --length response", split, "response", results)
    texts = []
    for name, snr in results.even_snr.items():
        texts.append(f"{snr:.2g} / {results.even_along[name]:.2g} ({name})")
    print(
        "\nResets at the exact first error have the higher SNR up to about P = " + "; ".join(texts)
    )
    return results


def accuracy_row(name, split, q, grpo):
    """Prints the row of one localizer accuracy; returns its snr relative to GRPO [STARTS]."""
    cells = []
    row = []
    thoughts = 0.0
    for P, base in zip(STARTS, grpo):
        signal = measure(Chain(P).resets(q, split))
        row.append(signal.snr / base.snr)
        cells.append(f"{row[-1]:.2f} / {signal.along / base.along:.2f}")
        if P == EXAMPLE_START:
            thoughts = signal.thoughts / (K * N)
    label = f"{name} (RRPO)" if q == 0 else name
    print_row([label, str(q), *cells, f"{thoughts:.2f}"])
    return row


def break_even_row(name, split, length, results):
    """Finds where exact resets break even with GRPO, on a grid of pass rates.

    Prints a row for length="response": there a token weighs A / (K N), however short its suffix.
    """
    grid = np.geomspace(1e-4, 0.7, 19)
    better = np.array([relative(P, 1.0, split, length) for P in grid]) > 1  # [grid, 2]
    results.even_snr[name] = grid[better[:, 0]].max()
    results.even_along[name] = grid[better[:, 1]].max()
    if length == "response":
        cells = []
        for P in STARTS:
            snr, along = relative(P, 1.0, split, length)
            cells.append(f"{snr:.2f} / {along:.2f}")
        print_row([name, "1.0", *cells, ""])


# ------------------------------------------------------------------------- lesson 3: training
#
# A problem is a first state and LENGTH operations; each operation is a random bijection of the
# states. One thought applies one operation: it looks up the fact (operation, state) and writes the
# next state. The policy has a softmax over next states for every fact. The reward is 1 where the
# last state is right. B policies (learning rates x runs) train side by side, each on P = PROMPTS
# problems a step, with n rollouts of each problem.

STATES = 30  # values of a state
OPS = 20  # operations. 60 give much the same map, five times slower
LENGTH = 12  # thoughts of a chain
FACTS = OPS * STATES  # rows of a policy's table
PROMPTS = 32  # problems of a training step
EVERY = 2  # steps between evaluations
TARGET = 0.5  # the pass rate to reach
REGIMES = [
    (0.45, 0.90),
    (0.5, 0.95),
    (0.6, 0.97),
    (0.7, 0.99),
]  # range of a fact's first probability
GRIDS = {  # learning rates, the same for all methods
    "AdamW": (0.05, 0.08, 0.13, 0.2),
    "plain gradient": (600.0, 1000.0, 1700.0, 3000.0),
}
QS = (0.0, 0.4, 0.6, 0.8, 1.0)  # accuracy of the localizer; 0 is RRPO
CHOICES = ("first", "deepest")  # of the seed among the failures
GOOD_Q = 0.8  # the accuracy of QS that the text calls a good localizer


@dataclass(frozen=True)
class Method:
    """A method of this lesson. The default is GRPO."""

    base: int = N  # rollouts from the prompt; the rest of N are suffixes
    q: float = 0.0  # accuracy of the localizer
    choice: str = "first"  # of the seed, see CHOICES


@dataclass
class Problems:
    """B x P problems and their answers."""

    ops: torch.Tensor  # [B, P, LENGTH]
    first: torch.Tensor  # [B, P] first state
    answer: torch.Tensor  # [B, P] right last state


@dataclass
class Rollouts:
    """n rollouts of each problem, each field [B, P, n, LENGTH]."""

    facts: torch.Tensor  # rows of the policies' tables that were looked up
    states: torch.Tensor  # states that were written
    weights: torch.Tensor | None = None  # of each thought in the loss


@dataclass
class Resets:
    """The reset states of a step."""

    failed: torch.Tensor  # [B, P] whether the base group has a failure
    h: torch.Tensor  # [B, P] thoughts that are kept: the reset index h* from 0; 0 without a failure
    prefix: torch.Tensor  # [B, P, LENGTH] states of the seed


def generator(rng_key):
    return torch.Generator().manual_seed(rng_key)


def start_policies(low, high, run_seeds):
    """(truth [R, FACTS], the right next states; logits [R, FACTS, STATES]) of R runs.

    A fact is right with a probability between low and high. 90% of the rest is one misconception.
    """
    truths = []
    logits = []
    for run_seed in run_seeds:
        rng = generator(run_seed)
        bijections = [torch.randperm(STATES, generator=rng) for _ in range(OPS)]
        truth = torch.stack(bijections).flatten()
        right = low + (high - low) * torch.rand(FACTS, generator=rng)
        misconception = (truth + torch.randint(1, STATES, (FACTS,), generator=rng)) % STATES
        other = 0.1 * (1 - right) / (STATES - 2)
        probs = other[:, None].repeat(1, STATES)
        probs.scatter_(1, truth[:, None], right[:, None])
        probs.scatter_(1, misconception[:, None], 0.9 * (1 - right)[:, None])
        truths.append(truth)
        logits.append(probs.log())
    return torch.stack(truths), torch.stack(logits)


def facts_of(ops, before):
    """Rows of the B tables, laid end to end, for operations and the states before them [B, ...]."""
    policy = torch.arange(len(ops)).view(-1, *[1] * (ops.dim() - 1))
    return (policy * OPS + ops) * STATES + before


def draw_problems(truth, rng):
    """New problems for B policies. truth [B, FACTS]."""
    ops = torch.randint(OPS, (len(truth), PROMPTS, LENGTH), generator=rng)
    first = torch.randint(STATES, (len(truth), PROMPTS), generator=rng)
    return Problems(ops, first, answers(truth, ops, first))


def answers(truth, ops, first):
    """The right last states [B, P] after operations [B, P, LENGTH] on first states [B, P]."""
    state = first
    for k in range(LENGTH):
        state = truth.flatten()[facts_of(ops[:, :, k], state)]
    return state


def sample(cdf, problems, n, rng, resets=None):
    """n rollouts of each problem, or n suffixes from its reset state.

    cdf [B FACTS, STATES]: cumulated probabilities of the B policies, laid end to end.
    """
    state = problems.first[..., None].expand(*problems.first.shape, n)
    states = []
    used = []
    for k in range(LENGTH):
        facts = facts_of(problems.ops[:, :, k, None].expand_as(state), state)
        u = torch.rand(state.numel(), 1, generator=rng)
        state = (u > cdf.index_select(0, facts.flatten())).sum(-1)
        state = state.clamp(max=STATES - 1)  # rounded, the last cdf can fall short of 1
        state = state.view_as(facts)
        if resets is not None:
            kept = (k < resets.h)[..., None]
            state = torch.where(kept, resets.prefix[:, :, k, None], state)
        states.append(state)
        used.append(facts)
    return Rollouts(torch.stack(used, -1), torch.stack(states, -1))


def rewards_of(rollouts, problems):
    """Rewards [B, P, n]: 1 where the last state is right."""
    return (rollouts.states[..., -1] == problems.answer[..., None]).float()


def group_advantages(r):
    """loss.set_advantages for groups of rewards [..., G]."""
    std = r.std(-1, correction=0, keepdim=True)
    advantage = (r - r.mean(-1, keepdim=True)) / std.clamp(min=1e-8)
    return torch.where(std > 1e-8, advantage, 0.0)


def weights(A, h):
    """loss.token_weights [B, P, n, LENGTH] for advantages A [B, P, n], 0 on the prefix.

    h [B, P]: thoughts of the prefix.
    """
    trained = torch.arange(LENGTH) >= h[..., None, None]
    per_thought = A / ((LENGTH - h)[..., None] * N * PROMPTS)
    return per_thought[..., None] * trained


def one_step(probs, truth, method, problem_rng, rng):
    """Samples one step of B policies: ([base group, suffix group], generated thoughts [B]).

    probs [B, FACTS, STATES], truth [B, FACTS]. GRPO has no suffix group.
    """
    cdf = probs.cumsum(-1).view(-1, STATES)
    problems = draw_problems(truth, problem_rng)
    base = sample(cdf, problems, method.base, rng)
    r_base = rewards_of(base, problems)
    A_base = group_advantages(r_base)
    no_prefix = torch.zeros(len(truth), PROMPTS, dtype=torch.long)
    spent = torch.full((len(truth),), float(PROMPTS * method.base * LENGTH))
    if method.base == N:
        base.weights = weights(A_base, no_prefix)
        return [base], spent

    resets = choose_resets(base, r_base, truth, method, rng)
    n_suffixes = N - method.base
    suffixes = sample(cdf, problems, n_suffixes, rng, resets)
    r_suffixes = rewards_of(suffixes, problems)
    A_suffixes = group_advantages(r_suffixes)
    # Where nothing failed, h is 0 and all N rollouts are one group.
    A_all = group_advantages(torch.cat([r_base, r_suffixes], -1))
    failed = resets.failed[..., None]
    A_base = torch.where(failed, A_base, A_all[..., : method.base])
    A_suffixes = torch.where(failed, A_suffixes, A_all[..., method.base :])
    base.weights = weights(A_base, no_prefix)
    suffixes.weights = weights(A_suffixes, resets.h)
    spent = spent + n_suffixes * (LENGTH - resets.h).sum(1)
    return [base, suffixes], spent


def choose_resets(base, reward, truth, method, rng):
    """Chooses a seed among the failures of each base group, and its reset state."""
    error = (truth.flatten()[base.facts] != base.states).float().argmax(-1)  # [B, P, n] the first
    exact = torch.rand(error.shape, generator=rng) < method.q
    anywhere = torch.randint(LENGTH, error.shape, generator=rng)
    named = torch.where(exact, error, anywhere)
    priority = -torch.arange(method.base).expand_as(named)  # the earlier rollout first
    if method.choice == "deepest":
        priority = priority + named * method.base
    never = -method.base
    seed = torch.where(reward == 0, priority, never).argmax(-1, keepdim=True)  # [B, P, 1]
    failed = (reward == 0).any(-1)
    h = torch.where(failed, named.gather(-1, seed)[..., 0], 0)
    of_seed = seed[..., None].expand(-1, -1, 1, LENGTH)
    return Resets(failed, h, base.states.gather(2, of_seed)[:, :, 0])


def ascent(probs, buffer):
    """Gradient [B, FACTS, STATES] of sum(weight * log-prob) with respect to the logits.

    One thought adds weight * (onehot - probs) to the row of its fact.
    """
    onehots = torch.zeros(probs.numel())
    totals = torch.zeros(len(probs) * FACTS)
    for rollouts in buffer:
        chosen = rollouts.facts * STATES + rollouts.states
        onehots.index_add_(0, chosen.flatten(), rollouts.weights.flatten())
        totals.index_add_(0, rollouts.facts.flatten(), rollouts.weights.flatten())
    return onehots.view_as(probs) - totals.view(-1, FACTS, 1) * probs


def pass_rate(probs, truth, ops):
    """Exact pass rate [B] on operations [B, E, LENGTH], from all first states.

    Multiplies transition matrices.
    """
    B, E = ops.shape[:2]
    transitions = probs.view(B, OPS, STATES, STATES)
    right = truth.view(B, OPS, STATES)
    policy = torch.arange(B)[:, None]
    reached = torch.eye(STATES).repeat(B * E, 1, 1)  # [B E, first state, state]
    answer = torch.arange(STATES).expand(B, E, -1)  # [B, E, first state]
    for k in range(LENGTH):
        reached = torch.bmm(reached, transitions[policy, ops[:, :, k]].flatten(0, 1))
        answer = right[policy, ops[:, :, k]].gather(2, answer)
    reached = reached.view(B, E, STATES, STATES)
    return reached.gather(3, answer[..., None]).mean((1, 2, 3))


class Ascender:
    """Updates B policies, each with a learning rate of its own.

    AdamW is by hand for that reason: torch's defaults, and the weight decay of srpo.py.
    """

    def __init__(self, optimizer, lr, theta):
        """lr [B, 1, 1], theta [B, FACTS, STATES]."""
        self.optimizer = optimizer
        self.lr = lr
        self.m = torch.zeros_like(theta)
        self.v = torch.zeros_like(theta)
        self.steps = 0

    def step(self, theta, gradient):
        """Changes theta in place."""
        self.steps += 1
        if self.optimizer == "AdamW":
            self.m.lerp_(gradient, 0.1)
            self.v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            m = self.m / (1 - 0.9**self.steps)
            v = self.v / (1 - 0.999**self.steps)
            gradient = m / (v.sqrt() + 1e-8) - 0.01 * theta
        theta += self.lr * gradient


@dataclass
class Training:
    """L learning rates x R runs. A policy that does not get to TARGET counts all that it made."""

    steps: np.ndarray  # [L, R] until TARGET
    thoughts: np.ndarray  # [L, R] generated until TARGET
    reached: np.ndarray  # [L, R] whether it gets there
    rates: np.ndarray  # [evaluations, L, R] pass rates


def train(regime, optimizer, lrs, run_seeds, steps, method=Method()):
    """Trains policies side by side until all runs of one learning rate are at TARGET."""
    L = len(lrs)
    R = len(run_seeds)
    truth, theta = start_policies(*regime, run_seeds)
    truth = truth.repeat(L, 1)
    theta = theta.repeat(L, 1, 1)
    held_out = held_out_problems(run_seeds).repeat(L, 1, 1)
    problem_rng = generator(20_000 + run_seeds[0])
    rng = generator(30_000 + run_seeds[0])
    lr = torch.tensor(lrs).repeat_interleave(R)[:, None, None]
    ascender = Ascender(optimizer, lr, theta)
    spent = torch.zeros(L * R)
    rates = []
    thoughts = []
    for t in range(steps + 1):
        probs = theta.softmax(-1)
        if t % EVERY == 0:
            rates.append(pass_rate(probs, truth, held_out))
            thoughts.append(spent)
            reached = (torch.stack(rates) >= TARGET).any(0)
            if reached.view(L, R).all(1).any():
                break
        buffer, used = one_step(probs, truth, method, problem_rng, rng)
        ascender.step(theta, ascent(probs, buffer))
        spent = spent + used
    return until_target(torch.stack(rates), torch.stack(thoughts), L)


def held_out_problems(run_seeds):
    """Operations [R, 12, LENGTH] for the evaluation of each run."""
    each = []
    for run_seed in run_seeds:
        each.append(torch.randint(OPS, (1, 12, LENGTH), generator=generator(10_000 + run_seed)))
    return torch.cat(each)


def until_target(rates, thoughts, L):
    """When L x R policies get to TARGET, on a line between two evaluations.

    rates and thoughts are [evaluations, L R].
    """
    there = rates >= TARGET
    reached = there.any(0)
    now = torch.where(reached, there.float().argmax(0), len(rates) - 1)
    now = now.clamp(min=1)[None]  # [1, L R] an evaluation
    before = now - 1
    low = rates.gather(0, before)[0]
    high = rates.gather(0, now)[0]
    part = torch.where(reached, ((TARGET - low) / (high - low)).clamp(0, 1), 1.0)
    steps = EVERY * (before[0] + part)
    made_before = thoughts.gather(0, before)[0]
    made = made_before + part * (thoughts.gather(0, now)[0] - made_before)
    return Training(
        steps.view(L, -1).numpy(),
        made.view(L, -1).numpy(),
        reached.view(L, -1).numpy(),
        rates.view(len(rates), L, -1).numpy(),
    )


@dataclass
class Best:
    """A method at its best learning rate."""

    steps: np.ndarray  # [R] until TARGET
    thoughts: np.ndarray  # [R]
    reached: bool  # by all runs
    lr: float
    start: float  # pass rate before training, mean over runs


def best(optimizer, regime, run_seeds, steps, method=Method()):
    """Trains with the grid of learning rates and takes the best one.

    It is the one at which most runs get to TARGET, then the fastest. Every method chooses on its
    own runs.
    """
    lrs = GRIDS[optimizer]
    found = train(regime, optimizer, lrs, run_seeds, steps, method)

    def badness(i):
        missing = (~found.reached[i]).sum()
        return missing, found.steps[i].mean(), -found.rates[-1, i].mean()

    i = min(range(len(lrs)), key=badness)
    reached = found.reached[i].all()
    start = found.rates[0, i].mean()
    return Best(found.steps[i], found.thoughts[i], reached, lrs[i], start)


@dataclass
class Ratio:
    """A ratio to GRPO with its 95% bootstrap interval over runs."""

    value: float
    low: float
    high: float


@dataclass
class Cell:
    """A cell of the map: a reset method relative to GRPO."""

    ratios: dict[str, Ratio]  # of "steps" and "thoughts"
    sign: str  # ">": not all of its runs get to TARGET, "<": not all of GRPO's, "?": neither


@dataclass
class Start:
    """The part of the map with one optimizer and one regime."""

    rate: float  # pass rate before training
    rows: dict[str, dict[float, Cell]]  # choice of the seed -> q -> cell


def compare(found, grpo, rng):
    """The cell of a method's best learning rate beside GRPO's. rng picks the bootstrap runs."""
    runs = len(found.steps)
    picks = rng.integers(0, runs, (2000, runs))
    ratios = {
        "steps": ratio_of_means(found.steps, grpo.steps, picks),
        "thoughts": ratio_of_means(found.thoughts, grpo.thoughts, picks),
    }
    if found.reached:
        sign = "" if grpo.reached else "<"
    else:
        sign = ">" if grpo.reached else "?"
    return Cell(ratios, sign)


def ratio_of_means(ours, theirs, picks):
    """Ratio of two means over runs [R], with its interval from bootstrap picks [B, R]."""
    low, high = interval(ours[picks].mean(1) / theirs[picks].mean(1))
    return Ratio(ours.mean() / theirs.mean(), low, high)


def lesson3(run_seed, runs, steps):
    """Prints the map, and returns it: {(optimizer, regime): Start}."""
    rng = np.random.default_rng([run_seed, 3])
    run_seeds = [100 * run_seed + i for i in range(runs)]
    print(
        f"\n## 3. Training: {LENGTH} thoughts, {FACTS} facts, {PROMPTS} prompts x {N} rollouts, "
        f"{runs} runs, at most {steps} steps, best of 4 learning rates each\n\n"
        f"Steps / thoughts until the pass rate is {TARGET}, relative to GRPO from the same starts "
        "(below 1: resets are better), with 95% bootstrap intervals over runs. The ratio is a "
        "bound where not all runs of the method (>) or of GRPO (<) get there; ?: neither. The "
        "localizer's thoughts are not counted: `first` asks it once for each prompt with a "
        "failure, `deepest` once for each failure. A wrong chain is right by luck once in "
        f"{STATES}, also at the start.\n"
    )
    table = {}
    for optimizer, regime in product(GRIDS, REGIMES):
        grpo = best(optimizer, regime, run_seeds, steps)
        sign = "" if grpo.reached else ">"
        print(
            f"**{optimizer}, start {grpo.start:.3f}**, facts U{regime}. GRPO: "
            f"{sign}{grpo.steps.mean():.0f} steps, {grpo.thoughts.mean() / 1e3:.0f} thousand "
            f"thoughts, lr {grpo.lr:g}\n"
        )
        print_head(["1x4, seed", *[f"q = {q}" for q in QS]])
        start = Start(grpo.start, {})
        for choice in CHOICES:
            start.rows[choice] = {}
            texts = []
            for q in accuracies_of(choice):
                found = best(optimizer, regime, run_seeds, steps, Method(N // 2, q, choice))
                cell = compare(found, grpo, rng)
                start.rows[choice][q] = cell
                texts.append(f"{cell_text(cell)}, lr {found.lr:g}")
            missing = [""] * (len(QS) - len(texts))
            print_row([choice, *missing, *texts])
        table[optimizer, regime] = start
        print()
    return table


def accuracies_of(choice):
    """The q of a row of the map. "deepest" needs a localizer, so it has no q = 0."""
    return QS if choice == "first" else QS[1:]


def cell_text(cell):
    """Steps / thoughts of a cell with their intervals."""
    texts = []
    for r in cell.ratios.values():
        texts.append(f"{cell.sign}{r.value:.2f} ({r.low:.2f}-{r.high:.2f})")
    return " / ".join(texts)


def break_even(cells, what):
    """Localizer accuracy from which resets are not slower than GRPO; None: at no accuracy.

    cells: q -> cell, a row of the map. what: "steps" or "thoughts". Linear between two q. A cell
    that does not get to TARGET counts as twice GRPO's.
    """
    qs = list(cells)
    r = []
    for cell in cells.values():
        there = cell.sign in ("", "<")
        r.append(cell.ratios[what].value if there else 2.0)
    if r[-1] > 1:
        return None
    slower = [k for k in range(len(r)) if r[k] > 1]
    if not slower:
        return qs[0]
    k = slower[-1]
    return qs[k] + (qs[k + 1] - qs[k]) * (r[k] - 1) / (r[k] - r[k + 1])


def break_even_text(cells, what):
    q = break_even(cells, what)
    if q is None:
        return "never"
    lowest = next(iter(cells))
    return f"<= {q:.1f}" if q == lowest else f"{q:.2f}"


# ------------------------------------------------------------------------ guidance and figure


def guidance(one, two, three):
    """Prints what this run says to someone with a model. A lesson that did not run is None."""
    print("\n## When are resets worth it for my model?\n")
    if one is not None:
        better = slope(one.improvement.sampled)
        fewer = slope(one.samples.sampled)
        print(
            "- With an oracle, rare mistakes are the case for resets: measured exponents of p "
            f"{better:.2f} (improvement) and {fewer:.2f} (samples). But the theory compares with "
            "random resets, not with GRPO, and its oracle is free."
        )
    if two is not None:
        print(
            "- Gradient of one prompt, exact localizer, 1x4: better than GRPO below a pass rate of "
            f"{two.even_snr['1x4']:.2g} if noise in all directions counts, below "
            f"{two.even_along['1x4']:.2g} if only noise along the true gradient does; with the "
            f"deepest seed below {two.even_snr['1x4 deepest']:.2g} and "
            f"{two.even_along['1x4 deepest']:.2g}. A random reset at P = {EXAMPLE_START} has "
            f"{two.at_example('1x4', 0.0):.2f} of GRPO's SNR, an exact one "
            f"{two.at_example('1x4', 1.0):.2f}. Above P = 0.15 take GRPO."
        )
    if three is not None:
        guidance_of_map(three)


def guidance_of_map(table):
    """Accuracies that break even, and the starts at which a good localizer surely gains."""
    for optimizer in GRIDS:
        print(
            f"- {optimizer}: the localizer accuracy at which resets break even, by steps / by "
            "generated thoughts:\n"
        )
        print_head(["start", *CHOICES], indent="  ")
        for regime in REGIMES:
            start = table[optimizer, regime]
            texts = []
            for cells in start.rows.values():
                by_steps = break_even_text(cells, "steps")
                by_thoughts = break_even_text(cells, "thoughts")
                texts.append(f"{by_steps} / {by_thoughts}")
            print_row([f"{start.rate:.3f}", *texts], indent="  ")
        print()
    worth = []
    for optimizer in GRIDS:
        starts = []
        for regime in REGIMES:
            start = table[optimizer, regime]
            if start.rows["first"][GOOD_Q].ratios["steps"].high < 1:
                starts.append(f"{start.rate:.2f}")
        text = f"starts of {', '.join(starts)}" if starts else "no start of the map"
        worth.append(f"{optimizer}: {text}")
    print(
        f"- At {GOOD_Q} accuracy and the first failure as seed, resets surely need fewer steps "
        f"(interval below 1) at: {'; '.join(worth)}. So measure the pass rate and the localizer "
        "first (`eval.py localization`). With a low pass rate and a good localizer take resets, "
        "otherwise GRPO. The deepest seed is an idea that was tried here only."
    )


def draw_figure(one, two, three, out):
    """Draws a panel for each of lessons 1 and 2, and one for each optimizer of lesson 3."""
    n_panels = 0
    if one is not None:
        n_panels += 1
    if two is not None:
        n_panels += 1
    if three is not None:
        n_panels += len(GRIDS)
    if n_panels == 4:
        figure = Figure(figsize=(15, 10.5), layout="constrained")
        panels = iter(figure.subplots(2, 2).flat)
    else:
        figure = Figure(figsize=(6.5 * n_panels, 5), layout="constrained")
        panels = iter(figure.subplots(1, n_panels, squeeze=False).flat)
    if one is not None:
        draw_oracle_gain(next(panels), one)
    if two is not None:
        draw_prompt_gradients(next(panels), two)
    if three is not None:
        for optimizer in GRIDS:
            draw_map(next(panels), three, optimizer)
    figure.savefig(out, dpi=120)


def draw_oracle_gain(panel, gain):
    """Lesson 1: what the oracle gains, over 1 / p."""
    x = 1 / np.array(RATES)
    draw_exponent(panel, x, gain.improvement, "improvement, CARO / RR", "tab:blue")
    draw_exponent(panel, x, gain.samples, "samples, RR / CARO", "tab:red")
    panel.set_title("1. Credit oracle against random resets")
    panel.set_xlabel("1 / p   (p: chance that a visited state is improvable)")
    panel.set_ylabel("what the oracle gains")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(x, [f"{v:.0f}" for v in x], minor=False)
    panel.minorticks_off()
    panel.legend(fontsize=7)


def draw_exponent(panel, x, estimate, what, color):
    """One estimate with its exact line."""
    exact = f"{what}, exact: exponent of p {slope(estimate.exact):.2f}"
    panel.plot(x, estimate.exact, "-", color=color, label=exact)
    low, high = interval(slope(estimate.bootstraps))
    sampled = f"sampled: {slope(estimate.sampled):.2f} ({low:.2f} to {high:.2f})"
    errors = np.abs(interval(estimate.bootstraps) - estimate.sampled)
    panel.errorbar(x, estimate.sampled, errors, fmt="o", color=color, capsize=3, label=sampled)


def draw_prompt_gradients(panel, results):
    """Lesson 2: signal to noise over localizer accuracy."""
    colors = ("tab:red", "tab:orange", "tab:green", "tab:blue")
    for s, P in enumerate(STARTS):
        for name, style in (("1x4", "-o"), ("1x4 deepest", "--s")):
            label = f"{name}, pass rate {P}"
            panel.plot(ACCURACIES, results.snr[name][:, s], style, color=colors[s], label=label)
    panel.axhline(1, color="black", lw=1)
    panel.annotate("GRPO", (0.02, 1.02))
    panel.set_title("2. Gradient of one prompt, exact")
    panel.set_xlabel("accuracy q of the localizer (0: RRPO)")
    panel.set_ylabel("signal to noise (all directions), GRPO = 1")
    panel.set_ylim(0, 1.5)
    panel.legend(fontsize=7, ncols=2, loc="upper left")


def draw_map(panel, table, optimizer):
    """Lesson 3: steps to TARGET as colors, by choice of the seed, start and localizer accuracy."""
    ratios = np.full((len(CHOICES) * len(REGIMES), len(QS)), np.nan)
    labels = []
    for choice, regime in product(CHOICES, REGIMES):
        start = table[optimizer, regime]
        row = len(labels)
        labels.append(f"{choice} seed,\nstart {start.rate:.2f}")
        for q, cell in start.rows[choice].items():
            column = QS.index(q)
            ratios[row, column] = cell.ratios["steps"].value
            color = "white" if abs(np.log2(ratios[row, column])) > 0.8 else "black"
            text = panel.text(column, row, map_text(cell), fontsize=9, color=color)
            text.set(ha="center", va="center")
    image = panel.imshow(np.log2(ratios), cmap="RdBu_r", vmin=-1.2, vmax=1.2, aspect="auto")
    panel.set_title(f"3. {optimizer}: steps (thoughts) to a pass rate of {TARGET}, GRPO = 1")
    panel.set_xlabel("accuracy q of the localizer (0: RRPO)")
    panel.set_xticks(range(len(QS)), QS)
    panel.set_yticks(range(len(labels)), labels)
    panel.axhline(len(REGIMES) - 0.5, color="black", lw=1.5)
    bar = panel.figure.colorbar(image, ax=panel, ticks=[-1, 0, 1], shrink=0.8)
    bar.ax.set_yticklabels(["half the steps", "as GRPO", "twice the steps"])


def map_text(cell):
    if cell.sign == "?":
        return "?"
    steps = cell.ratios["steps"].value
    thoughts = cell.ratios["thoughts"].value
    return f"{cell.sign}{steps:.2f}\n({cell.sign}{thoughts:.2f})"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lesson", choices=["1", "2", "3", "all"], default="all")
    parser.add_argument("--out", default="theory.png", help="the figure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=6, help="lesson 3: runs of each cell")
    parser.add_argument("--steps", type=int, default=200, help="lesson 3: training steps at most")
    args = parser.parse_args(argv)
    if not Path(args.out).absolute().parent.is_dir():
        parser.error(f"--out {args.out}: its folder does not exist; make it first")
    if args.seeds < 1 or args.steps < EVERY:
        parser.error(f"lesson 3 needs --seeds of at least 1 and --steps of at least {EVERY}")
    torch.set_num_threads(1)
    one = two = three = None
    if args.lesson in ("1", "all"):
        one = lesson1(args.seed)
    if args.lesson in ("2", "all"):
        two = lesson2()
    if args.lesson in ("3", "all"):
        three = lesson3(args.seed, args.seeds, args.steps)
    guidance(one, two, three)
    draw_figure(one, two, three, args.out)


if __name__ == "__main__":
    main()
