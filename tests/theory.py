"""When are resets worth it? Three lessons on chains that are small enough to compute. Not a test; tests/test_theory.py checks its numbers.

  1  Conservative Policy Iteration (the paper's theory; Kakade & Langford 2002): where a visited state is improvable with probability p, a
     credit-assignment oracle (CPI-CARO) needs 1/p^2 fewer samples than random resets (CPI-RR) and improves 1/p more per iteration.
  2  The gradient of one prompt: exact mean and variance of what GRPO, RRPO and SRPO estimate, with the project's advantages and weights.
  3  Training: steps and thoughts to a pass rate of 0.5, over start pass rate and accuracy of the localizer, with AdamW and plain gradient.

Lesson 1 is exact and simulated, lesson 2 exact. Lesson 3 simulates a policy without a neural network: every fact has a softmax of its own,
so nothing generalises, and the localizer is a number that does not drift. All is a function of --seed.

    python tests/theory.py --out theory.png               # all lessons: some minutes on one core
    python tests/theory.py --lesson 2 --out lesson2.png   # one of them
"""

import argparse
import math
from itertools import product

import numpy as np
import torch

# ------------------------------------------------------------------------------- lesson 1: conservative policy iteration

H, DELTA, KAPPA = (
    4,
    1 / 8,
    0.5,
)  # decisions; advantage of the right action at an improvable state; how much actions change later states
RATES = [2.0**-k for k in range(1, 7)]  # p
CONFIDENCE, Z = (
    0.9,
    1.2816,
)  # how surely the sign of the estimated advantage is to be right, and the normal quantile of that
PATHS = np.array(list(product((0, 1), repeat=2 * H))).reshape(-1, 2, H)
C, A = (
    PATHS[:, 0],
    PATHS[:, 1],
)  # [L, H] of all paths. c = 1: improvable, there a = 1 adds DELTA to the chance of reward and a = 0 takes it away
GAIN = (C * (2 * A - 1)).cumsum(
    1
)  # [L, H] m: right minus wrong actions so far. Reward 1 with probability 1/2 + DELTA m: noise at every p


def path_probability(p, alpha, oracle=False):
    """Probabilities [..., L] of all paths under (1 - alpha) pi + alpha greedy, alpha [...]. pi tosses a coin; greedy always takes a = 1. With the
    oracle only improvable states are changed. The next state is improvable with probability p (1 - KAPPA) after a = 1 and p (1 + KAPPA)
    after a = 0: p under pi, less under a better policy. That shift of states is why steps must be conservative."""
    chance = np.full(C.shape, float(p))
    chance[:, 1:] = p * (1 + KAPPA * (1 - 2 * A[:, :-1]))
    shift = np.asarray(alpha, float)[..., None, None] / 2 * (C if oracle else 1)
    return (np.where(C, chance, 1 - chance) * (0.5 + np.where(A, shift, -shift))).prod(-1)


def J(p, alpha, oracle=False):
    """Expected reward [...] of the mixture, over the whole tree of paths."""
    return path_probability(p, alpha, oracle) @ (0.5 + DELTA * GAIN[:, -1])


def policy_advantage(p, oracle=False):
    """(mean, variance) of X = r(a = 1, then pi) - r(pi), both sampled from one visited state (h uniform; with the oracle an improvable one). The
    mean is the policy advantage E_{s~d_pi} E_{a~greedy} A_pi(s, a): p DELTA, DELTA. pi gains nothing on average, so V(s) = 1/2 + DELTA m."""
    weight = path_probability(p, 0.0)[:, None] * (C if oracle else np.ones((1, H)))
    weight = weight / weight.sum()  # [L, H]
    V = 0.5 + DELTA * (GAIN - C * (2 * A - 1))  # before the decision
    Q = V + DELTA * C
    mean = (weight * (Q - V)).sum()
    return mean, (
        weight * (Q * (1 - V) + V * (1 - Q))
    ).sum() - mean**2  # X^2 is 1 where the two rewards differ


def step_size(advantage):
    """The conservative alpha = A / (2 (H - 1)), for advantages within [-1, 1].

    J' - J = alpha sum_h E_{s~d'_h} A(s), and d'_h is d_h unless an earlier decision was changed: with probability at most (h - 1) alpha. So
    J' - J >= alpha (H A - alpha H (H - 1)), largest at this alpha: H A^2 / (4 (H - 1)), with A = p DELTA for CPI-RR. The oracle changes
    improvable states only, so p multiplies both terms: J' - J >= p alpha (H DELTA - alpha H (H - 1)), alpha = DELTA / (2 (H - 1))."""
    return np.clip(advantage, 0, 1) / (2 * (H - 1))


UNIT = 2**16  # draws are 16-bit integers: fast, and every probability here is a multiple of 2^-16


def draw(n, rng):
    return rng.integers(0, UNIT, n, dtype=np.uint16)


def first_states(n, p, rng):
    """n states (h, c, m), each [n], before the first decision."""
    return np.zeros(n, np.uint8), draw(n, rng) < round(UNIT * p), np.zeros(n, np.int8)


def walk(state, stop, p, rng, greedy=False, alpha=0.0):
    """Chains under pi from `state` to before decision `stop` [n]. greedy: their first action is a = 1; alpha: under the mixture instead."""
    h, c, m = state
    m = m.copy()
    for k in range(H):
        active = (h <= k) & (k < stop)
        right = draw(len(h), rng) < round(UNIT / 2 * (1 + alpha))
        if greedy:
            right |= h == k
        m += (active & c) * (2 * right.astype(np.int8) - 1)
        chance = np.where(
            right, np.uint16(UNIT * p * (1 - KAPPA)), np.uint16(UNIT * p * (1 + KAPPA))
        )
        c = np.where(active, draw(len(h), rng) < chance, c)
    return stop, c, m


def rewards(state, p, rng, **how):
    """0 or 1 [n] of chains that go on from `state` to the end."""
    m = walk(state, np.uint8(H), p, rng, **how)[2]
    return (draw(len(m), rng) < UNIT // 2 + int(UNIT * DELTA) * m.astype(np.int32)).astype(np.int8)


def visited(n, p, rng, oracle=False):
    """n visited states of pi, and how many were drawn: with the oracle, until n were improvable (one oracle call each)."""
    kept, found, drawn = [], 0, 0
    while found < n:
        size = min(int((n - found) / p * 1.05) + 16, 2**20) if oracle else n
        states = walk(first_states(size, p, rng), rng.integers(0, H, size, dtype=np.uint8), p, rng)
        kept.append([part[states[1]] for part in states] if oracle else states)
        found, drawn = found + len(kept[-1][0]), drawn + size
    return [np.concatenate(part)[:n] for part in zip(*kept)], drawn


def sampled_advantage(p, oracle, replicates, rng, least=8):
    """Estimates the policy advantage from more and more samples, until its sign is right in enough replicates.
    -> sizes [T] (samples, growing by sqrt 2), sums of X [replicates, T], oracle calls for each sample."""
    sizes, sums, total, drawn, done = [], [], np.zeros(replicates), 0, 0
    while len(sums) < 4 or right_signs(sums[-1]).mean() < CONFIDENCE + 0.03:
        n = math.ceil(least * 2 ** (len(sizes) / 2))
        for at in range(done, n, 2**18 // replicates):  # in pieces that stay in the cache
            size = min(2**18 // replicates, n - at)
            state, draws = visited(size * replicates, p, rng, oracle)
            X = rewards(state, p, rng, greedy=True) - rewards(state, p, rng)
            total, drawn = total + X.reshape(replicates, size).sum(1), drawn + draws
        sizes, sums, done = sizes + [n], sums + [total], n
    return np.array(sizes), np.stack(sums, 1), drawn / (done * replicates) if oracle else 0.0


def right_signs(sums):
    """1 where the estimated advantage is positive, 1/2 where it is 0 (a toss)."""
    return (np.sign(sums) + 1) / 2


def samples_needed(sizes, share):
    """Samples from which on the share [T] of right signs stays at CONFIDENCE, log-linear between sizes."""
    below = np.flatnonzero(share[:-1] < CONFIDENCE)
    t = below[-1] if len(below) else 0
    part = np.clip((CONFIDENCE - share[t]) / max(share[t + 1] - share[t], 1e-9), 0, 1)
    return sizes[t] * (sizes[t + 1] / sizes[t]) ** part


def interval(values):
    """95% interval of bootstrap values [B, ...]."""
    return np.percentile(values, [2.5, 97.5], axis=0)


def slope(ratios):
    """Exponent of p in ratios [..., P]."""
    x = np.log(RATES) - np.mean(np.log(RATES))
    return np.log(ratios) @ x / (x @ x)


def lesson1(seed, replicates=(320, 2000), bootstraps=500):
    """One iteration of CPI-RR and CPI-CARO for every p: improvement and samples, exact and simulated. -> {what: (exact, sampled, bootstraps)}"""
    rng, calls = np.random.default_rng([seed, 1]), []
    exact, point = np.zeros((2, 2, 2, len(RATES)))  # [improvement or samples, RR or CARO, p]
    boot = np.zeros((bootstraps, 2, 2, len(RATES)))
    for (i, p), (k, oracle) in product(enumerate(RATES), enumerate((False, True))):
        mean, variance = policy_advantage(p, oracle)
        exact[:, k, i] = J(p, step_size(mean), oracle) - J(p, 0.0), Z**2 * variance / mean**2
        sizes, sums, asked = sampled_advantage(p, oracle, replicates[k], rng)
        point[1, k, i] = samples_needed(sizes, right_signs(sums).mean(0))
        t = np.abs(np.log(sizes / point[1, k, i])).argmin()
        gains = J(p, step_size(sums[:, t] / sizes[t]), oracle) - J(
            p, 0.0
        )  # each replicate steps by its own estimate
        point[0, k, i] = gains.mean()
        for b in range(bootstraps):
            weight = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums))) / len(sums)
            boot[b, :, k, i] = weight @ gains, samples_needed(sizes, weight @ right_signs(sums))
        calls += [asked * point[1, k, i]] if oracle else []
    ratios = lambda x: (x[..., 0, 1, :] / x[..., 0, 0, :], x[..., 1, 0, :] / x[..., 1, 1, :])  # noqa: E731  (what CARO gains: improvement, samples)
    (gain, need), (gain_s, need_s), (gain_b, need_b) = ratios(exact), ratios(point), ratios(boot)
    print(f"\n## 1. Conservative Policy Iteration: {H} decisions, advantage {DELTA} at improvable states\n\n| p | A of RR | alpha RR / CARO | J'-J of RR, CARO, exact | CARO / RR "
          f"| sampled | samples of RR, CARO, exact | RR / CARO | sampled | oracle calls of CARO |\n|{'---|' * 10}")  # fmt: skip
    for i, p in enumerate(RATES):
        mean, ((a, b), (c, d)) = (
            policy_advantage(p)[0],
            (interval(gain_b[:, i]), interval(need_b[:, i])),
        )
        print(f"| 1/{1 / p:.0f} | {mean:.4f} | {step_size(mean):.5f} / {step_size(DELTA):.5f} | {exact[0, 0, i]:.2e}, {exact[0, 1, i]:.2e} | {gain[i]:.2f} | {gain_s[i]:.2f} ({a:.2f} to {b:.2f}) "
              f"| {exact[1, 0, i]:,.0f}, {exact[1, 1, i]:,.0f} | {need[i]:,.0f} | {need_s[i]:,.0f} ({c:,.0f} to {d:,.0f}) | {calls[i]:,.0f} |")  # fmt: skip
    print(
        "\n| exponent of p | theory | exact | sampled, 95% bootstrap interval |\n|---|---|---|---|"
    )
    found = {
        "improvement, CARO / RR": (gain, gain_s, gain_b),
        "samples, RR / CARO": (need, need_s, need_b),
    }
    for theory, (what, (x, s, b)) in zip((-1, -2), found.items()):
        low, high = interval(slope(b))
        print(f"| {what} | {theory} | {slope(x):.3f} | {slope(s):.2f} ({low:.2f} to {high:.2f}) |")
    print(f"\nA sample is a pair of rewards from one state; samples are those to a right sign with probability {CONFIDENCE}. Oracle calls are counted apart, 1/p for each "
          "sample of CARO: if a call costs as much as a sample, CARO saves 1/p, not 1/p^2.")  # fmt: skip
    return found


# -------------------------------------------------------------------------- lesson 2: the gradient of one prompt, exactly

K, N = 6, 8  # thoughts of a chain, trained rollouts of a prompt
STARTS = [0.01, 0.04, 0.15, 0.5]  # P, pass rate
ACCURACIES = [
    0.0,
    0.25,
    0.5,
    0.75,
    1.0,
]  # q, how often the localizer names the true first error, else any thought; 0 is RRPO
SPLITS = {"1x4": (4, "first"), "1x4 deepest": (4, "deepest"), "1x8, fresh seed": (0, "first")}


def advantages(right, G, normalize=True):
    """(A of right rollouts, A of wrong ones) in a group of G with `right` rewards of 1: loss.set_advantages."""
    mean = right / G
    std = math.sqrt(mean * (1 - mean))
    return (
        (0.0, 0.0)
        if std < 1e-8
        else tuple((r - mean) / (std if normalize else 1.0) for r in (1, 0))
    )


def binomial(n, k, p):
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


class Chain:
    """K thoughts, each right with probability p = P^(1/K), reward 1 iff all are. Thought k has one logit. After its first error a chain is at
    other states, with logits of their own, where nothing can be won: their scores are pure noise, of variance p (1 - p) each.
    So a rollout is its first error j (from 0; K: none), with scores u_j [K]: 1 - p before j, -p at j, 0 after.

    Gradients are given as terms (probability, mean [K], covariance [K, K], off-chain noise, generated thoughts) of a mixture over what decides
    the advantages; within a term rollouts are independent. Nothing is sampled."""

    def __init__(self, P, length="trained"):
        self.length, self.p = length, P ** (1 / K)
        p = self.p
        self.u = np.tril(np.full((K + 1, K), 1 - p), -1)
        self.u[range(K), range(K)] = -p
        self.off = (
            (K - 1.0 - np.arange(K)) * p * (1 - p)
        )  # [K] of a failure at j: summed variance of its scores after the error

    def failure(self, h=0, among=1.0):
        """(mean [K], covariance [K, K], off-chain noise) of the scores of a failure from thought h on; among [K]: chance of each j to be let in."""
        late = np.arange(K) >= h
        weight, u = self.p ** np.arange(K) * late * among, self.u[:K] * late
        weight = weight / max(weight.sum(), 1e-300)
        mean = weight @ u
        return mean, (u * weight[:, None]).T @ u - np.outer(mean, mean), weight @ self.off

    def group(self, h, G, passed=0, normalize=True):
        """Terms of a group of G after a right prefix of h thoughts, its first `passed` members known to be right."""
        mean, cov, off = self.failure(h)
        for right in range(passed, G + 1):
            T = K - h if self.length == "trained" else K
            a, b = (
                A / (N * T) for A in advantages(right, G, normalize)
            )  # loss.token_weights: A / (|T| N)
            n, u = G - right, self.u[K] * (np.arange(K) >= h)
            yield (
                binomial(G - passed, right - passed, self.p ** (K - h)),
                right * a * u + n * b * mean,
                n * b**2 * cov,
                n * b**2 * off,
                G * (K - h),
            )

    def resets(self, q, base, choice):
        """Terms of rollout.resets, split 1 x (N - base). The seed is the first failure of the base group, or the one named deepest, and stays in
        it; for base = 0 it is a fresh draw, untrained (rounds of 4, at most 8). Behind an error all suffixes fail, with zero advantages."""
        P, error = (
            self.p**K,
            self.p ** np.arange(K) * (1 - self.p) / (1 - self.p**K),
        )  # error [K]: first error of a failure
        named = q * np.eye(K) + (1 - q) / K  # [j, h]
        for w, *term, cost in self.group(0, N, passed=base):  # no failure: one group of N
            yield w * P ** (base or 8), *term, cost if base else cost + 8 * K
        for right in range(base or 1):
            a, b = (A / (N * K) for A in advantages(right, base)) if base else (0.0, 0.0)
            failures, chance, spent = (
                (base - right, binomial(base, right, P), K * base)
                if base
                else (1, 1 - P**8, 4 * K * (1 + P**4 / (1 + P**4)))
            )
            for place, j, h in product(
                range(failures if choice == "deepest" else 1), range(K), range(K)
            ):  # of the seed among the failures
                before, after = (
                    (named[:, :h].sum(1), named[:, : h + 1].sum(1))
                    if choice == "deepest"
                    else (np.ones(K), np.ones(K))
                )
                m, n = (
                    place,
                    failures - 1 - place,
                )  # failures before the seed are named before h, those after it at most at h: ties go to the first
                w = chance * error[j] * named[j, h] * (error @ before) ** m * (error @ after) ** n
                (u1, c1, o1), (u2, c2, o2) = self.failure(0, before), self.failure(0, after)
                mean = right * a * self.u[K] + b * (self.u[j] + m * u1 + n * u2)
                cov, off = b**2 * (m * c1 + n * c2), b**2 * (self.off[j] + m * o1 + n * o2)
                nothing = (1.0, 0.0, 0.0, 0.0, (N - base) * (K - h))
                for v, mean_s, cov_s, off_s, cost in (
                    self.group(h, N - base) if h <= j else [nothing]
                ):
                    yield w * v, mean + mean_s, cov + cov_s, off + off_s, spent + cost


def measure(terms):
    """mean [K], cov [K, K], off-chain noise, thoughts of a mixture of terms, and two signal-to-noise ratios. g is the unit gradient of the true
    pass rate (the diagonal); the signal is (mean . g)^2, as the mean gradient of a reset method is not the gradient of the pass rate.
      snr    noise = trace of the covariance, off-chain noise too: what limits plain gradient steps. Twice the SNR is worth twice the prompts
      along  noise = variance along g only: how surely one gradient points uphill"""
    w, means, covs, offs, costs = (
        np.array(part)
        for part in zip(*((w, m, c + np.zeros((K, K)), o, t) for w, m, c, o, t in terms))
    )
    mean = w @ means
    cov, off, g = (
        np.einsum("t,tij->ij", w, covs) + (means * w[:, None]).T @ means - np.outer(mean, mean),
        w @ offs,
        np.full(K, K**-0.5),
    )
    signal = (mean @ g) ** 2
    return dict(
        total=w.sum(),
        mean=mean,
        cov=cov,
        off=off,
        thoughts=w @ costs,
        snr=signal / (np.trace(cov) + off),
        along=signal / (g @ cov @ g),
    )


def relative(P, q, split, length="trained"):
    """(snr, along) of a reset method relative to GRPO."""
    reset, grpo = measure(Chain(P, length).resets(q, *split)), measure(Chain(P).group(0, N))
    return reset["snr"] / grpo["snr"], reset["along"] / grpo["along"]


def lesson2():
    """Prints SNRs relative to GRPO, and where resets with an exact localizer break even. -> ({(split, q, P): snr}, {(split, what): P})"""
    print(f"\n## 2. The gradient of one prompt, exactly: {K} thoughts, {N} trained rollouts\n\nSNR relative to GRPO at the same number of prompts: noise in all directions / noise along the "
          f"true gradient only\n\n| split | q | {' | '.join(f'P = {P}' for P in STARTS)} | thoughts, P = 0.04 |\n|{'---|' * (3 + len(STARTS))}")  # fmt: skip
    grpo = [measure(Chain(P).group(0, N)) for P in STARTS]
    show = lambda row, by: " | ".join(
        f"{m['snr'] / g['snr']:.2f} / {m['along'] / g['along']:.2f}" for m, g in zip(row, by)
    )  # noqa: E731
    print(
        "| GRPO itself | | "
        + " | ".join(f"{m['snr']:.2g} / {m['along']:.2g}" for m in grpo)
        + f" | {K * N} |"
    )
    found = {}
    for (name, split), q in product(SPLITS.items(), ACCURACIES):
        row = [measure(Chain(P).resets(q, *split)) for P in STARTS]
        found |= {(name, q, P): m["snr"] / g["snr"] for P, m, g in zip(STARTS, row, grpo)}
        print(
            f"| {name}{' (RRPO)' * (q == 0)} | {q} | {show(row, grpo)} | {row[1]['thoughts'] / (K * N):.2f} |"
        )
    even, grid = {}, np.geomspace(1e-4, 0.7, 19)
    for (name, split), length in product(SPLITS.items(), ("trained", "response")):
        named = name + " --length response" * (length == "response")
        better = np.array([relative(P, 1.0, split, length) for P in grid]) > 1
        even |= {(named, what): grid[better[:, i]].max() for i, what in enumerate(("snr", "along"))}
        if length == "response":  # a token weighs 1 / K, however short its suffix
            row = [relative(P, 1.0, split, length) for P in STARTS]
            print(
                f"| {named} | 1.0 | {' | '.join(f'{snr:.2f} / {along:.2f}' for snr, along in row)} | |"
            )
    print(
        "\nResets at the exact first error have the higher SNR up to about P = "
        + "; ".join(
            f"{snr:.2g} / {even[name, 'along']:.2g} ({name})"
            for (name, what), snr in even.items()
            if what == "snr"
        )
    )
    return found, even


# ------------------------------------------------------------------------------------------------------ lesson 3: training

STATES, OPS, LENGTH = (
    30,
    20,
    12,
)  # values of a state, random bijections of it, thoughts of a chain (60 bijections: much the same map, 5 times slower)
FACTS, PROMPTS, EVERY, TARGET = (
    OPS * STATES,
    32,
    2,
    0.5,
)  # prompts of a training step; an evaluation every so many steps
REGIMES = [
    (0.45, 0.90),
    (0.5, 0.95),
    (0.6, 0.97),
    (0.7, 0.99),
]  # a fact starts right with a probability drawn between these
GRIDS = {
    "AdamW": (0.05, 0.08, 0.13, 0.2),
    "plain gradient": (600.0, 1000.0, 1700.0, 3000.0),
}  # learning rates, the same for all methods
QS = (0.0, 0.4, 0.6, 0.8, 1.0)  # accuracy of the localizer; 0: RRPO


def start_policies(lo, hi, seeds):
    """truth [R, FACTS] (the right next state), logits [R, FACTS, STATES]: 90% of what is not right goes to one fixed misconception."""
    truths, logits = [], []
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        truth = torch.stack([torch.randperm(STATES, generator=rng) for _ in range(OPS)]).flatten()
        p = lo + (hi - lo) * torch.rand(FACTS, generator=rng)
        wrong = (truth + torch.randint(1, STATES, (FACTS,), generator=rng)) % STATES
        probs = (0.1 * (1 - p) / (STATES - 2))[:, None].repeat(1, STATES)
        probs.scatter_(1, truth[:, None], p[:, None]).scatter_(
            1, wrong[:, None], 0.9 * (1 - p)[:, None]
        )
        truths, logits = truths + [truth], logits + [probs.log()]
    return torch.stack(truths), torch.stack(logits)


def facts(ops, before):
    """Rows of the B tables of FACTS that are used: operations and the states before them, both [B, ...]."""
    return (torch.arange(len(ops)).view(-1, *[1] * (ops.dim() - 1)) * OPS + ops) * STATES + before


def sample(cdf, ops, first, n, rng, h=None, prefix=None):
    """n chains for each problem: states and facts used, both [B, P, n, LENGTH]. ops [B, P, LENGTH], first state [B, P], cdf [B FACTS, STATES].
    With h [B, P] and prefix [B, P, LENGTH] the first h thoughts are the prefix's."""
    state, states, used = first[..., None].expand(*first.shape, n), [], []
    for k in range(LENGTH):
        used.append(facts(ops[:, :, k, None].expand_as(state), state))
        u = torch.rand(state.numel(), 1, generator=rng)
        state = (
            (u > cdf.index_select(0, used[-1].flatten()))
            .sum(-1)
            .clamp(max=STATES - 1)
            .view_as(state)
        )  # the last cdf can fall short of 1
        if h is not None:
            state = torch.where((k < h)[..., None], prefix[:, :, k, None], state)
        states.append(state)
    return torch.stack(states, -1), torch.stack(used, -1)


def group_advantages(r):
    """loss.set_advantages for rewards r [..., G]."""
    std = r.std(-1, correction=0, keepdim=True)
    return torch.where(std > 1e-8, (r - r.mean(-1, keepdim=True)) / std.clamp(min=1e-8), 0.0)


def weights(A, h):
    """loss.token_weights for advantages A [B, P, n] of groups that start at thought h [B, P] (from 0): [B, P, n, LENGTH], 0 on the prefix."""
    return (A / ((LENGTH - h)[..., None] * N * PROMPTS))[..., None] * (
        torch.arange(LENGTH) >= h[..., None, None]
    )


def one_step(probs, truth, q, base, choice, problems, rng):
    """Samples a step: [(facts, states, weights)], each [B, P, n, LENGTH], and the thoughts generated [B]. base = N is GRPO."""
    B, cdf, truth = len(truth), probs.cumsum(-1).view(-1, STATES), truth.flatten()
    ops, first = (
        torch.randint(high, (B, PROMPTS, *more), generator=problems)
        for high, more in ((OPS, (LENGTH,)), (STATES, ()))
    )
    answer = first
    for k in range(LENGTH):
        answer = truth[facts(ops[:, :, k], answer)]
    states, used = sample(cdf, ops, first, base, rng)
    reward, start = (
        (states[..., -1] == answer[..., None]).float(),
        torch.zeros(B, PROMPTS, dtype=torch.long),
    )
    spent = torch.full((B,), float(PROMPTS * base * LENGTH))
    if base == N:
        return [(used, states, weights(group_advantages(reward), start))], spent
    error = (truth[used] != states).float().argmax(-1)  # [B, P, n] first wrong thought of a failure
    exact = torch.rand(error.shape, generator=rng) < q
    named = torch.where(exact, error, torch.randint(LENGTH, error.shape, generator=rng))
    order = (named if choice == "deepest" else 0) * base - torch.arange(
        base
    )  # ties: the earlier rollout
    seed = torch.where(reward == 0, order, -base).argmax(-1, keepdim=True)  # [B, P, 1]
    failed = (reward == 0).any(-1)
    h = torch.where(failed, named.gather(-1, seed)[..., 0], 0)
    prefix = states.gather(2, seed[..., None].expand(-1, -1, 1, LENGTH))[:, :, 0]
    suffixes, used_s = sample(cdf, ops, first, N - base, rng, h, prefix)
    reward_s = (suffixes[..., -1] == answer[..., None]).float()
    one = group_advantages(torch.cat([reward, reward_s], -1)).split(
        base, -1
    )  # nobody failed: h = 0, and all N are one group
    A, A_s = (
        torch.where(failed[..., None], group_advantages(r), o)
        for r, o in zip((reward, reward_s), (one[0], torch.cat(one[1:], -1)))
    )
    return [(used, states, weights(A, start)), (used_s, suffixes, weights(A_s, h))], spent + (
        N - base
    ) * (LENGTH - h).sum(1)


def ascent(probs, buffer):
    """Gradient [B, FACTS, STATES] of sum(weight x log-prob) with respect to the logits: weight x (onehot - probs), added up."""
    G, total = torch.zeros(probs.numel()), torch.zeros(len(probs) * FACTS)
    for used, states, weight in buffer:
        G.index_add_(0, (used * STATES + states).flatten(), weight.flatten())
        total.index_add_(0, used.flatten(), weight.flatten())
    return G.view_as(probs) - total.view(-1, FACTS, 1) * probs


def pass_rate(probs, truth, ops):
    """Exact pass rate [B] over held-out sequences ops [B, E, LENGTH] from all first states: products of transition matrices."""
    T, right, b = (
        probs.view(-1, OPS, STATES, STATES),
        truth.view(-1, OPS, STATES),
        torch.arange(len(ops))[:, None],
    )
    M, answer = (
        torch.eye(STATES).repeat(ops.shape[0] * ops.shape[1], 1, 1),
        torch.arange(STATES).expand(*ops.shape[:2], -1),
    )
    for k in range(LENGTH):
        M, answer = (
            torch.bmm(M, T[b, ops[:, :, k]].flatten(0, 1)),
            right[b, ops[:, :, k]].gather(2, answer),
        )
    return M.view(*ops.shape[:2], STATES, STATES).gather(3, answer[..., None]).mean((1, 2, 3))


def train(regime, optimizer, lrs, seeds, steps, base=N, q=0.0, choice="first"):
    """Trains lrs x seeds policies side by side until all seeds of one learning rate are at TARGET. -> steps, thoughts until there (of the others:
    all they made), reached, all [L, R]; pass rates [evaluations, L, R]."""
    L, R = len(lrs), len(seeds)
    truth, theta = (x.repeat(L, *[1] * (x.dim() - 1)) for x in start_policies(*regime, seeds))
    held_out = torch.cat(
        [
            torch.randint(OPS, (1, 12, LENGTH), generator=torch.Generator().manual_seed(10_000 + s))
            for s in seeds
        ]
    ).repeat(L, 1, 1)
    problems, rng = (
        torch.Generator().manual_seed(20_000 + seeds[0]),
        torch.Generator().manual_seed(30_000 + seeds[0]),
    )
    lr = torch.tensor(lrs).repeat_interleave(R)[:, None, None]
    m, v, spent, rates, thoughts = (
        torch.zeros_like(theta),
        torch.zeros_like(theta),
        torch.zeros(L * R),
        [],
        [],
    )
    for t in range(steps + 1):
        probs = theta.softmax(-1)
        if t % EVERY == 0:
            rates, thoughts = rates + [pass_rate(probs, truth, held_out)], thoughts + [spent]
            if (torch.stack(rates) >= TARGET).any(0).view(L, R).all(1).any():
                break
        buffer, used = one_step(probs, truth, q, base, choice, problems, rng)
        G, spent = ascent(probs, buffer), spent + used
        if (
            optimizer == "AdamW"
        ):  # torch's defaults, weight decay of srpo.py; by hand, as each policy has a learning rate of its own
            m.lerp_(G, 0.1)
            v.mul_(0.999).addcmul_(G, G, value=0.001)
            G = (m / (1 - 0.9 ** (t + 1))) / (
                (v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8
            ) - 0.01 * theta
        theta += lr * G
    rates, thoughts = torch.stack(rates), torch.stack(thoughts)
    reached = (rates >= TARGET).any(0)
    i = torch.where(reached, (rates >= TARGET).float().argmax(0), len(rates) - 1).clamp(min=1)[
        None
    ]  # a line from the evaluation before to this one
    low, high = rates.gather(0, i - 1)[0], rates.gather(0, i)[0]
    part = torch.where(reached, ((TARGET - low) / (high - low)).clamp(0, 1), 1.0)
    made = thoughts.gather(0, i - 1)[0]
    out = EVERY * (i[0] - 1 + part), made + part * (thoughts.gather(0, i)[0] - made), reached
    return *(x.view(L, R).numpy() for x in out), rates.view(-1, L, R)


def best(optimizer, regime, seeds, steps, **method):
    """Of the grid's learning rates the one at which most seeds reach the target, then the fastest. Every method chooses on its own seeds."""
    at, thoughts, reached, rates = train(
        regime, optimizer, GRIDS[optimizer], seeds, steps, **method
    )
    i = min(
        range(len(at)),
        key=lambda i: ((~reached[i]).sum(), at[i].mean(), -rates[-1, i].mean().item()),
    )
    return dict(
        steps=at[i],
        thoughts=thoughts[i],
        reached=reached[i].all(),
        lr=GRIDS[optimizer][i],
        start=rates[0, i].mean().item(),
    )


def lesson3(seed, n_seeds, steps):
    """Prints the map. -> {(optimizer, choice, q, regime): {steps, thoughts: (ratio, low, high), sign, start}}"""
    rng, seeds, table = (
        np.random.default_rng([seed, 3]),
        [100 * seed + i for i in range(n_seeds)],
        {},
    )
    print(f"\n## 3. Training: {LENGTH} thoughts, {FACTS} facts, {PROMPTS} prompts x {N} rollouts, {n_seeds} seeds, at most {steps} steps, best of 4 learning rates each\n\nSteps / thoughts "
          f"until the pass rate is {TARGET}, relative to GRPO from the same starts (below 1: resets are better), with 95% bootstrap intervals over seeds. > (<): not all seeds of "
          "the method (of GRPO) get there, this is a bound; ?: neither. Thoughts of the localizer are not counted: `first` asks once for each prompt with a failure, `deepest` once for each "
          f"failure. A wrong chain is right by luck once in {STATES}, also at the start.\n")  # fmt: skip
    for optimizer, regime in product(GRIDS, REGIMES):
        grpo = best(optimizer, regime, seeds, steps)
        print(f"**{optimizer}, start {grpo['start']:.3f}**, facts U{regime}. GRPO: {'' if grpo['reached'] else '>'}{grpo['steps'].mean():.0f} steps, {grpo['thoughts'].mean() / 1e3:.0f} thousand "
              f"thoughts, lr {grpo['lr']:g}\n\n| 1x4, seed | q = {' | q = '.join(map(str, QS))} |\n|{'---|' * (1 + len(QS))}")  # fmt: skip
        for choice in ("first", "deepest"):
            cells = []
            for q in QS if choice == "first" else QS[1:]:
                found = best(optimizer, regime, seeds, steps, base=N // 2, q=q, choice=choice)
                sign = {(True, True): "", (False, True): ">", (True, False): "<"}.get(
                    (found["reached"], grpo["reached"]), "?"
                )
                picks = rng.integers(0, n_seeds, (2000, n_seeds))
                cell = {
                    what: (
                        found[what].mean() / grpo[what].mean(),
                        *interval(found[what][picks].mean(1) / grpo[what][picks].mean(1)),
                    )
                    for what in ("steps", "thoughts")
                }
                table[optimizer, choice, q, regime] = cell | dict(sign=sign, start=grpo["start"])
                cells.append(
                    " / ".join(
                        f"{sign}{r:.2f} ({low:.2f}-{high:.2f})" for r, low, high in cell.values()
                    )
                    + f", lr {found['lr']:g}"
                )
            print(f"| {choice} | {' | '.join([''] * (len(QS) - len(cells)) + cells)} |", flush=True)
        print()
    return table


def break_even(table, optimizer, choice, regime, what):
    """Accuracy of the localizer from which on resets are not slower than GRPO (linear between the q of the map); None: at no q."""
    qs = [q for q in QS if (optimizer, choice, q, regime) in table]
    r = [
        cell[what][0] if cell["sign"] in ("", "<") else 2.0
        for cell in (table[optimizer, choice, q, regime] for q in qs)
    ]  # not there: count as twice
    if r[-1] > 1:
        return None
    k = max([k for k in range(len(r)) if r[k] > 1], default=-1)
    return qs[0] if k < 0 else qs[k] + (qs[k + 1] - qs[k]) * (r[k] - 1) / (r[k] - r[k + 1])


# --------------------------------------------------------------------------------------------------- guidance and figure


def guidance(one, two, three):
    """What the numbers of this run say to someone with a model, a line for each lesson."""
    print("\n## When are resets worth it for my model?\n")
    if one:
        exponents = [slope(sampled) for _, sampled, _ in one.values()]
        print(f"- With an oracle, rare mistakes are the case for resets: measured exponents of p {exponents[0]:.2f} (improvement) and {exponents[1]:.2f} (samples). But the theory "
              "compares with random resets, not with GRPO, and asking the oracle is free in it.")  # fmt: skip
    if two:
        found, even = two
        print(f"- Gradient of one prompt, exact localizer, 1x4: better than GRPO below a pass rate of {even['1x4', 'snr']:.2g} if noise in all directions counts, below {even['1x4', 'along']:.2g} if "
              f"only noise along the true gradient does; with the deepest seed below {even['1x4 deepest', 'snr']:.2g} and {even['1x4 deepest', 'along']:.2g}. A random reset at P = 0.04 has "
              f"{found['1x4', 0.0, 0.04]:.2f} of GRPO's SNR, an exact one {found['1x4', 1.0, 0.04]:.2f}. Above P = 0.15 take GRPO.")  # fmt: skip
    for optimizer in GRIDS if three else ():
        print(
            f"- {optimizer}: localizer accuracy from which on resets break even, by steps / by generated thoughts:\n\n  | start | {'first | deepest'} |\n  |---|---|---|"
        )
        for regime in REGIMES:
            qs = {
                (c, w): break_even(three, optimizer, c, regime, w)
                for c, w in product(("first", "deepest"), ("steps", "thoughts"))
            }
            show = {
                key: "never"
                if q is None
                else f"<= {q:.1f}"
                if (key[0], q) in (("first", QS[0]), ("deepest", QS[1]))
                else f"{q:.2f}"
                for key, q in qs.items()
            }
            print(
                f"  | {three[optimizer, 'first', 1.0, regime]['start']:.3f} | "
                + " | ".join(
                    f"{show[c, 'steps']} / {show[c, 'thoughts']}" for c in ("first", "deepest")
                )
                + " |"
            )
        print()
    if three:
        worth = {
            o: [
                three[o, "first", 1.0, r]["start"]
                for r in REGIMES
                if three[o, "first", 0.8, r]["steps"][2] < 1
            ]
            for o in GRIDS
        }
        text = "; ".join(
            f"{o}: {'starts of ' + ', '.join(f'{s:.2f}' for s in starts) if starts else 'no start of the map'}"
            for o, starts in worth.items()
        )
        print(f"- At 0.8 accuracy and the first failure as seed, resets need surely fewer steps (interval below 1) at: {text}. So: measure the pass rate and the localizer first "
              "(`eval.py localization`). Low pass rate and a good localizer: resets, and try --seed_choice deepest. Otherwise GRPO.")  # fmt: skip


def draw_figure(one, two, three, out):
    """Panels of the lessons that ran."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n = bool(one) + bool(two) + 2 * bool(three)
    figure, axes = plt.subplots(
        *((2, 2) if n == 4 else (1, n)),
        figsize=(15, 10.5) if n == 4 else (6.5 * n, 5),
        layout="constrained",
        squeeze=False,
    )
    panels = iter(axes.flat)
    if one:
        panel, x = next(panels), 1 / np.array(RATES)
        for (what, (exact, sampled, boot)), color in zip(one.items(), ("tab:blue", "tab:red")):
            low, high = interval(slope(boot))
            panel.plot(
                x, exact, "-", color=color, label=f"{what}, exact: exponent of p {slope(exact):.2f}"
            )
            panel.errorbar(
                x,
                sampled,
                np.abs(interval(boot) - sampled),
                fmt="o",
                color=color,
                capsize=3,
                label=f"sampled: {slope(sampled):.2f} ({low:.2f} to {high:.2f})",
            )
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="1 / p   (p: chance that a visited state is improvable)",
            ylabel="what the oracle gains",
            title="1. Credit oracle against random resets",
        )
        panel.set_xticks(x, [f"{v:.0f}" for v in x], minor=False)
        panel.minorticks_off()
        panel.legend(fontsize=7)
    if two:
        panel = next(panels)
        for P, color in zip(STARTS, ("tab:red", "tab:orange", "tab:green", "tab:blue")):
            for name, style in (("1x4", "-o"), ("1x4 deepest", "--s")):
                panel.plot(
                    ACCURACIES,
                    [two[0][name, q, P] for q in ACCURACIES],
                    style,
                    color=color,
                    label=f"{name}, pass rate {P}",
                )
        panel.axhline(1, color="black", lw=1)
        panel.annotate("GRPO", (0.02, 1.02))
        panel.set(
            xlabel="accuracy q of the localizer (0: RRPO)",
            ylabel="signal to noise (all directions), GRPO = 1",
            title="2. Gradient of one prompt, exact",
            ylim=(0, 1.5),
        )
        panel.legend(fontsize=7, ncols=2, loc="upper left")
    for optimizer in GRIDS if three else ():
        panel, lines = next(panels), list(product(("first", "deepest"), REGIMES))
        ratios = np.array(
            [
                [
                    three[optimizer, c, q, r]["steps"][0]
                    if (optimizer, c, q, r) in three
                    else np.nan
                    for q in QS
                ]
                for c, r in lines
            ]
        )
        image = panel.imshow(np.log2(ratios), cmap="RdBu_r", vmin=-1.2, vmax=1.2, aspect="auto")
        for (i, (c, r)), (j, q) in product(enumerate(lines), enumerate(QS)):
            if cell := three.get((optimizer, c, q, r)):
                text = (
                    "?"
                    if cell["sign"] == "?"
                    else f"{cell['sign']}{cell['steps'][0]:.2f}\n({cell['sign']}{cell['thoughts'][0]:.2f})"
                )
                panel.text(
                    j,
                    i,
                    text,
                    ha="center",
                    va="center",
                    fontsize=9,
                    color="white" if abs(np.log2(ratios[i, j])) > 0.8 else "black",
                )
        panel.set(
            title=f"3. {optimizer}: steps (thoughts) to a pass rate of 0.5, GRPO = 1",
            xlabel="accuracy q of the localizer (0: RRPO)",
        )
        panel.set_xticks(range(len(QS)), QS)
        panel.set_yticks(
            range(len(lines)),
            [
                f"{c} seed,\nstart {three[optimizer, 'first', 1.0, r]['start']:.2f}"
                for c, r in lines
            ],
        )
        panel.axhline(len(REGIMES) - 0.5, color="black", lw=1.5)
        bar = figure.colorbar(image, ax=panel, ticks=[-1, 0, 1], shrink=0.8)
        bar.ax.set_yticklabels(["half the steps", "as GRPO", "twice the steps"])
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="When are resets worth it? Three lessons on chains that are small enough to compute."
    )
    parser.add_argument("--lesson", choices=["1", "2", "3", "all"], default="all")
    parser.add_argument("--out", default="theory.png", help="the figure")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=6, help="lesson 3: runs of each cell")
    parser.add_argument("--steps", type=int, default=200, help="lesson 3: training steps at most")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    one, two, three = (args.lesson in (n, "all") and teach() for n, teach in
                       (("1", lambda: lesson1(args.seed)), ("2", lesson2), ("3", lambda: lesson3(args.seed, args.seeds, args.steps))))  # fmt: skip
    guidance(one, two, three)
    draw_figure(one, two, three, args.out)


if __name__ == "__main__":
    main()
