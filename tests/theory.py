"""When are resets worth it? Four lessons on chains that are small enough to compute.

  1  Conservative Policy Iteration, the paper's theory (after Kakade and Langford, 2002). A visited
     state is improvable with probability p. A credit-assignment oracle (CPI-CARO) needs 1/p^2 fewer
     samples than random resets (CPI-RR) and improves 1/p times as much per iteration.
  2  The gradient of one prompt: exact mean and variance of what GRPO, RRPO and SRPO estimate, with
     the advantages and token weights of loss.py.
  3  Training without luck: steps and generated thoughts until the pass rate is 0.5, for resets and
     the walk beside GRPO, by start pass rate and localizer accuracy, with AdamW and with plain
     gradient steps.
  4  Luck: the pass rate where the verifier rewards wrong responses with some probability.

Lesson 1 is exact and simulated. Lesson 2 is exact. Lessons 3 and 4 are simulated, on the policies
of tests/tabular.py, whose header says how methods are drawn and what they cost.

Left out: the neural network. In lessons 3 and 4 nothing generalises, and the localizer is a fixed
accuracy q that does not drift during training. Both keep the map small enough to compute; the runs
in tests/README.md have a network and a real localizer. Luck that a policy can learn to use (a
guess, a skipped step) is left out, too: here it is noise.

"deepest" localizes every failure of the base group and resets the one whose named error comes last.
It is an idea that was tried, and these lessons are its record: the paper takes the first failure,
and so does rollout.py.

This file is an experiment; tests/test_theory.py checks its numbers. All numbers are a function of
--seed.

Try it alone, from the repository root:
    python -m tests.theory --out theory.png               # all lessons, a minute of one core
    python -m tests.theory --lesson 2 --out lesson2.png   # one lesson, seconds
"""

import argparse
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from tests.tabular import FACTS, LENGTH, PROMPTS, Ended, Method, rates_at, train, until

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


def advance(states, stop, p, rng, greedy=False, alpha=0.0):
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
    lead = advance(states, end, p, rng, greedy, alpha).lead
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
        states = advance(start, stop, p, rng)
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
        """Cases of rollout.resets, with one seed and a localizer of accuracy q.

        Left out: fresh seeds where the base group has no failure. There it is GRPO's group of N.
        """
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


# ----------------------------------------------------------------- lesson 3: training without luck
#
# Policies of tests/tabular.py. All methods train at one learning rate: larger rates are faster for
# every one of them, since without shared weights nothing is ever unlearned for good, so none is
# best. `rate_table` shows how much the ratios depend on it.

TARGET = 0.5  # the pass rate to reach
REGIMES = [
    (0.35, 0.90),
    (0.5, 0.95),
    (0.6, 0.97),
    (0.7, 0.99),
]  # range of a fact's first probability
LRS = {"AdamW": 0.1, "plain gradient": 1000.0}
RATE_FACTORS = (0.5, 1, 2, 4)  # of these learning rates, in `rate_table`
QS = (0.0, 0.4, 0.6, 0.8, 1.0)  # accuracy of the localizer; 0: random resets
CHOICES = ("first", "deepest", "walk")  # programs of tests/tabular.py
GOOD_Q = 0.8  # the accuracy of QS that the text calls a good localizer


@dataclass
class Ratio:
    """A ratio to GRPO with its 95% bootstrap interval over runs."""

    value: float
    low: float
    high: float


@dataclass
class Cell:
    """A cell of the map: a method relative to GRPO."""

    ratios: dict[str, Ratio]  # of "steps" and "thoughts"
    sign: str  # ">": not all of its runs get to TARGET, "<": not all of GRPO's, "?": neither


@dataclass
class Start:
    """The part of the map with one optimizer and one regime."""

    rate: float  # pass rate before training
    rows: dict[str, dict[float, Cell]]  # choice -> q -> cell


@dataclass
class Plan:
    """What all trainings of a lesson have in common."""

    run_seeds: list[int]
    steps: int  # at most
    rng: np.random.Generator  # picks bootstrap runs

    def needed(self, optimizer, regime, method, rate_factor=1) -> Ended:
        """What the method needs to get to TARGET."""
        lr = LRS[optimizer] * rate_factor
        return until(train(regime, optimizer, lr, self.run_seeds, method), TARGET, self.steps)

    def picks(self):
        """Runs [B, R] of bootstrap resamples."""
        runs = len(self.run_seeds)
        return self.rng.integers(0, runs, (2000, runs))


def plan_of(args, lesson):
    run_seeds = [100 * args.seed + i for i in range(args.seeds)]
    return Plan(run_seeds, args.steps, np.random.default_rng([args.seed, lesson]))


def compare(found, grpo, picks):
    """The cell of a method beside GRPO, both Ended."""
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


def lesson3(plan):
    """Prints the map, and returns it: {(optimizer, regime): Start}."""
    rates = ", ".join(f"{lr:g} with {optimizer}" for optimizer, lr in LRS.items())
    print(
        f"\n## 3. Training: {LENGTH} thoughts, {FACTS} facts, {PROMPTS} prompts, "
        f"{len(plan.run_seeds)} runs, at most {plan.steps} steps, learning rate {rates}\n\n"
        "A response is rewarded where all its thoughts are right: no luck. Steps / generated "
        f"thoughts until the pass rate is {TARGET}, relative to GRPO (below 1: better), with 95% "
        "bootstrap intervals over runs. The ratio is a bound where not all runs of the method (>) "
        "or of GRPO (<) get there; ?: neither. A localization counts as half a response: `first` "
        "asks once for each prompt with a failure, `deepest` once for each failure, the walk once "
        "a round. At q = 0 resets are random and nobody is asked.\n"
    )
    table = {}
    for optimizer, regime in product(LRS, REGIMES):
        grpo = plan.needed(optimizer, regime, Method())
        sign = "" if grpo.reached else ">"
        print(
            f"**{optimizer}, start {grpo.start:.3f}**, facts U{regime}. GRPO: "
            f"{sign}{grpo.steps.mean():.0f} steps, {grpo.thoughts.mean() / 1e3:.0f} thousand "
            "thoughts\n"
        )
        print_head(["", *[f"q = {q}" for q in QS]])
        start = Start(grpo.start, {})
        for choice in CHOICES:
            start.rows[choice] = {}
            for q in accuracies_of(choice):
                found = plan.needed(optimizer, regime, Method(choice, q))
                start.rows[choice][q] = compare(found, grpo, plan.picks())
            texts = [cell_text(cell) for cell in start.rows[choice].values()]
            print_row([choice, *[""] * (len(QS) - len(texts)), *texts])
        table[optimizer, regime] = start
        print()
    rate_table(plan)
    return table


def rate_table(plan):
    """Prints how the ratios of exact localizers depend on the learning rate, at one start."""
    regime = REGIMES[min(1, len(REGIMES) - 1)]
    print(f"The same at other learning rates, facts U{regime}, q = 1:\n")
    print_head(["learning rate", "steps of GRPO", *CHOICES])
    for optimizer, k in product(LRS, RATE_FACTORS):
        grpo = plan.needed(optimizer, regime, Method(), k)
        texts = [f"{grpo.steps.mean():.0f}"]
        for choice in CHOICES:
            found = plan.needed(optimizer, regime, Method(choice, 1.0), k)
            texts.append(cell_text(compare(found, grpo, plan.picks())))
        print_row([f"{optimizer} {k * LRS[optimizer]:g}", *texts])


def accuracies_of(choice):
    """The q of a row of the map. "deepest" needs a localizer, so it has no q = 0."""
    return QS[1:] if choice == "deepest" else QS


def cell_text(cell):
    """Steps / thoughts of a cell with their intervals."""
    texts = []
    for r in cell.ratios.values():
        texts.append(f"{cell.sign}{r.value:.2f} ({r.low:.2f}-{r.high:.2f})")
    return " / ".join(texts)


def break_even(cells, what):
    """Localizer accuracy from which a method is not slower than GRPO; None: at no accuracy.

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
    if q > lowest:
        return f"{q:.2f}"
    return "any" if q == 0 else f"<= {q:.1f}"


# ---------------------------------------------------------------------- lesson 4: a verifier's luck
#
# What is measured, decided before the first run that counts: the pass rate (right responses, not
# rewarded ones) after as many generated thoughts as GRPO without luck needs to get to TARGET. Gain
# and loss are differences to GRPO at the same luck. Luck is independent of what a response says, so
# it is noise that no policy can learn to use.

LUCKS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.5)  # chance that a wrong response is rewarded
LUCK_REGIMES = REGIMES[:2]
DIAL = {
    "GRPO": ("grpo", 0.0),
    "resets, exact": ("first", 1.0),
    "resets, random": ("first", 0.0),
    "walk, exact": ("walk", 1.0),
    "walk, random": ("walk", 0.0),
}  # name -> program and q


@dataclass
class Difference:
    """Pass rate minus GRPO's: its 95% bootstrap interval over runs."""

    low: float
    high: float

    @property
    def sign(self):
        """+ gain, - loss, 0 neither for sure."""
        if self.low > 0:
            return "+"
        return "-" if self.high < 0 else "0"


@dataclass
class Dial:
    """Lesson 4 with one optimizer at one start."""

    optimizer: str
    start: float  # pass rate before training
    budget: float  # generated thoughts
    rates: dict[str, np.ndarray]  # of DIAL -> [LUCKS, R] pass rates after that budget
    differences: dict[str, list[Difference]]  # of DIAL, without GRPO -> one for each luck


def lesson4(plan):
    """Prints pass rates by luck, and returns the Dials."""
    print(
        f"\n## 4. Luck: the pass rate after the thoughts with which GRPO without luck gets to "
        f"{TARGET}\n\n"
        f"{len(plan.run_seeds)} runs, the learning rates of lesson 3. Luck is the probability that "
        "a wrong response is rewarded. In brackets the 95% bootstrap interval of the difference to "
        "GRPO at the same luck."
    )
    return [turn_dial(plan, *place) for place in product(LRS, LUCK_REGIMES)]


def turn_dial(plan, optimizer, regime):
    """Lesson 4 with one optimizer at one start."""
    free = plan.needed(optimizer, regime, Method())
    dial = Dial(optimizer, free.start, free.thoughts.mean(), {}, {})
    lr = LRS[optimizer]
    for name, (program, q) in DIAL.items():
        rates = []
        for luck in LUCKS:
            training = train(regime, optimizer, lr, plan.run_seeds, Method(program, q, luck))
            rates.append(rates_at(training, dial.budget, plan.steps))
        dial.rates[name] = np.stack(rates)
        if name != "GRPO":
            dial.differences[name] = differences(dial.rates[name], dial.rates["GRPO"], plan.picks())
    print_dial(dial)
    return dial


def differences(ours, theirs, picks):
    """One Difference for each row of pass rates [LUCKS, R]; picks [B, R]."""
    found = []
    for row in ours - theirs:
        low, high = interval(row[picks].mean(1))
        found.append(Difference(low, high))
    return found


def print_dial(dial):
    print(f"\n**{dial.optimizer}, start {dial.start:.3f}**, {dial.budget / 1e3:.0f}k thoughts\n")
    print_head(["luck", *DIAL])
    for i, luck in enumerate(LUCKS):
        texts = [f"{dial.rates['GRPO'][i].mean():.3f}"]
        for name, row in dial.differences.items():
            rate = dial.rates[name][i].mean()
            texts.append(f"{rate:.3f} ({row[i].low:+.3f} to {row[i].high:+.3f})")
        print_row([f"{luck:g}", *texts])


# ------------------------------------------------------------------------ guidance and figure


def guidance(one, two, three, four):
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
            f"{two.at_example('1x4', 1.0):.2f}."
        )
    if three is not None:
        guidance_of_map(three)
    if four is not None:
        guidance_of_luck(four)


def guidance_of_map(table):
    """Accuracies that break even, and the starts at which a good localizer surely gains."""
    for optimizer in LRS:
        print(
            f"- {optimizer}: the localizer accuracy that breaks even with GRPO, by steps / by "
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
    for choice in CHOICES:
        worth = []
        for optimizer in LRS:
            starts = sure_gains(table, optimizer, choice)
            worth.append(f"{optimizer}: {', '.join(starts) or 'none'}")
        print(
            f"- {choice}, localizer right in {GOOD_Q}: fewer generated thoughts than GRPO for sure "
            f"(interval below 1) from starts of: {'; '.join(worth)}."
        )
    print(
        "- So measure the pass rate and the localizer first (`eval.py localization`). The deepest "
        "seed is an idea that was tried here only."
    )


def sure_gains(table, optimizer, choice):
    """Starts at which a good localizer needs fewer thoughts than GRPO, as texts."""
    starts = []
    for regime in REGIMES:
        start = table[optimizer, regime]
        cell = start.rows[choice][GOOD_Q]
        if cell.sign in ("", "<") and cell.ratios["thoughts"].high < 1:
            starts.append(f"{start.rate:.3f}")
    return starts


def guidance_of_luck(dials):
    """Whether each method gains, by luck."""
    print(
        f"- Luck {', '.join(f'{luck:g}' for luck in LUCKS)}: + gain, - loss against GRPO, "
        "0 neither for sure.\n"
    )
    print_head(["", *list(DIAL)[1:]], indent="  ")
    for dial in dials:
        texts = []
        for row in dial.differences.values():
            texts.append(" ".join(difference.sign for difference in row))
        print_row([f"{dial.optimizer}, start {dial.start:.3f}", *texts], indent="  ")


# Told apart by the colour-blind (Okabe and Ito).
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"


def draw_figure(one, two, three, four, out):
    """Draws a panel for each of lessons 1 and 2, two for lesson 3, two for 4: its lowest start."""
    panels = []  # functions of a panel
    if one is not None:
        panels.append(partial(draw_oracle_gain, gain=one))
    if two is not None:
        panels.append(partial(draw_prompt_gradients, results=two))
    if three is not None:
        for optimizer in LRS:
            panels.append(partial(draw_map, table=three, optimizer=optimizer))
    if four is not None:
        for dial in four[:: len(LUCK_REGIMES)]:
            panels.append(partial(draw_dial, dial=dial))
    rows = [panels[k : k + 2] for k in range(0, len(panels), 2)]
    with rc_context({"font.size": 13, "axes.titlesize": 14, "legend.fontsize": 11}):
        figure = Figure(figsize=(8 * len(rows[0]), 5.6 * len(rows)), layout="constrained")
        parts = figure.subfigures(len(rows), 1, squeeze=False).flat
        for part, row in zip(parts, rows):
            places = part.subplots(1, len(row), squeeze=False).flat
            for place, draw_panel in zip(places, row):
                draw_panel(place)
        figure.savefig(out, dpi=90, pil_kwargs={"optimize": True})


def draw_oracle_gain(panel, gain):
    """Lesson 1: what the oracle gains, over 1 / p."""
    x = 1 / np.array(RATES)
    draw_exponent(panel, x, gain.improvement, "improvement, CARO / RR", BLUE)
    draw_exponent(panel, x, gain.samples, "samples, RR / CARO", RED)
    panel.set_title("1. Credit oracle against random resets")
    panel.set_xlabel("1 / p   (p: chance that a visited state is improvable)")
    panel.set_ylabel("what the oracle gains")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xticks(x, [f"{v:.0f}" for v in x], minor=False)
    panel.minorticks_off()
    panel.legend()


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
    colors = (RED, ORANGE, GREEN, BLUE)
    for s, P in enumerate(STARTS):
        for name, style in (("1x4", "-o"), ("1x4 deepest", "--s")):
            label = f"{name}, pass rate {P}"
            panel.plot(ACCURACIES, results.snr[name][:, s], style, color=colors[s], label=label)
    panel.axhline(1, color="black", lw=1)
    panel.annotate("GRPO", (0.02, 1.02))
    panel.set_title("2. Gradient of one prompt, exact")
    panel.set_xlabel("accuracy q of the localizer (0: random)")
    panel.set_ylabel("signal to noise (all directions), GRPO = 1")
    panel.set_ylim(0, 1.65)
    panel.legend(ncols=2, loc="upper left")


def draw_map(panel, table, optimizer):
    """Lesson 3: thoughts to TARGET as colors, by method, start and localizer accuracy."""
    ratios = np.full((len(CHOICES) * len(REGIMES), len(QS)), np.nan)
    labels = []
    for choice, regime in product(CHOICES, REGIMES):
        start = table[optimizer, regime]
        row = len(labels)
        labels.append(f"{choice}, {start.rate:.3f}")
        for q, cell in start.rows[choice].items():
            column = QS.index(q)
            ratios[row, column] = cell.ratios["thoughts"].value
            color = "white" if abs(np.log2(ratios[row, column])) > 1 else "black"
            text = panel.text(column, row, map_text(cell), fontsize=11, color=color)
            text.set(ha="center", va="center")
    image = panel.imshow(np.log2(ratios), cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto")
    panel.set_title(f"3. {optimizer}: thoughts (steps) to {TARGET}, GRPO = 1")
    panel.set_xlabel("accuracy q of the localizer (0: random)")
    panel.set_ylabel("method, start")
    panel.set_xticks(range(len(QS)), QS)
    panel.set_yticks(range(len(labels)), labels)
    for k in range(1, len(CHOICES)):
        panel.axhline(k * len(REGIMES) - 0.5, color="black", lw=1.5)
    bar = panel.figure.colorbar(image, ax=panel, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["1/4", "1/2", "as\nGRPO", "2 x", "4 x"])


def map_text(cell):
    if cell.sign == "?":
        return "?"
    thoughts = cell.ratios["thoughts"].value
    steps = cell.ratios["steps"].value
    return f"{cell.sign}{thoughts:.2f} ({steps:.2f})"


def draw_dial(panel, dial):
    """Lesson 4: pass rates over luck, with 95% bands over runs. Luck 0 is drawn at the left end."""
    x = np.array(LUCKS)
    x[0] = x[1] / 3
    styles = ("-o", "-s", "--s", "-^", "--^")
    colors = ("black", ORANGE, ORANGE, BLUE, BLUE)
    for (name, rates), style, color in zip(dial.rates.items(), styles, colors):
        mean = rates.mean(1)
        half = 1.96 * rates.std(1) / math.sqrt(rates.shape[1])
        panel.plot(x, mean, style, color=color, label=name)
        panel.fill_between(x, mean - half, mean + half, color=color, alpha=0.2, lw=0)
    thoughts = f"{dial.budget / 1e3:.0f}k thoughts"
    panel.set_title(f"4. Luck: {dial.optimizer}, start {dial.start:.3f}, after {thoughts}")
    panel.set_xlabel("luck: chance that a wrong response is rewarded")
    panel.set_ylabel("pass rate (right responses)")
    panel.set_xscale("log")
    panel.set_xticks(x, [f"{luck:g}" for luck in LUCKS])
    panel.minorticks_off()
    panel.set_ylim(0, 1.3)
    panel.set_yticks([0, 0.25, 0.5, 0.75, 1])
    panel.legend(ncols=3, loc="upper center")


LESSONS = ["1", "2", "3", "4", "all"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lesson", choices=LESSONS, default="all")
    parser.add_argument("--out", default="theory.png", help="the figure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=10, help="lessons 3 and 4: runs")
    parser.add_argument("--steps", type=int, default=300, help="lessons 3 and 4: steps at most")
    args = parser.parse_args(argv)
    if not Path(args.out).absolute().parent.is_dir():
        parser.error(f"--out {args.out}: its folder does not exist; make it first")
    if Path(args.out).suffix not in (".png", ".jpg"):
        parser.error(f"--out {args.out}: the figure is a .png or a .jpg")
    if args.seeds < 1 or args.steps < 1:
        parser.error("lessons 3 and 4 need --seeds and --steps of at least 1")
    one = two = three = four = None
    if args.lesson in ("1", "all"):
        one = lesson1(args.seed)
    if args.lesson in ("2", "all"):
        two = lesson2()
    if args.lesson in ("3", "all"):
        three = lesson3(plan_of(args, 3))
    if args.lesson in ("4", "all"):
        four = lesson4(plan_of(args, 4))
    guidance(one, two, three, four)
    draw_figure(one, two, three, four, args.out)


if __name__ == "__main__":
    main()
