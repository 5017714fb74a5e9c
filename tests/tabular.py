"""Policies small enough to simulate: one logit for each fact, GRPO, resets and the walk on them.

A problem is LENGTH facts, drawn at random from FACTS, one for each thought. A policy gets a fact
right with chance sigmoid(logit). A response is right where all its thoughts are. The verifier
rewards a right response always, and a wrong one with probability `luck`: 0 unless a caller says
otherwise.

    grpo     a group of 8 responses
    first    a base group of 4, and 4 suffixes from a reset of its first failure, as rollout.resets
    deepest  the same, but every failure is localized; reset is the one whose named error is last
    walk     4, doubled where their rewards differ; where all are wrong, the first one is reset
             ROUNDS times at most, until it is rewarded, and joins the four, as rollout.walk

A localizer names the first wrong thought with probability q, else any thought.

Costs are generated thoughts. A localization (a review) counts as half a response. At q = 0 resets
are random: nobody is asked, and it costs nothing.

Departures from rollout.py: "deepest" is an idea that was tried, not the paper's. Where a base group
has no failure, `first` and `deepest` draw one GRPO group; rollout.py first looks for a seed among
fresh draws.

Left out: the neural network. Facts are learned apart, so nothing generalises, and q does not drift.

B policies train side by side. Shapes: B policies, P = PROMPTS problems a step, n responses of each,
L = LENGTH thoughts. tests/theory.py and tests/walk_gain.py are experiments on them;
tests/test_theory.py compares them with the project's own programs and weights.

Try it alone:  python -m pytest -q tests/test_theory.py
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

LENGTH = 12  # facts of a problem, thoughts of a response
FACTS = 600
PROMPTS = 32  # problems of a training step
BASE = 4  # responses of a base group
N = 8  # responses of a group of GRPO; base group and suffixes together
ROUNDS = 12  # of a walk, at most
REVIEW = LENGTH // 2  # thoughts that a localization costs


@dataclass(frozen=True)
class Method:
    """What is drawn, with which localizer and verifier."""

    program: str = "grpo"  # see PROGRAMS
    q: float = 0.0  # accuracy of the localizer; 0: random resets
    luck: float = 0.0  # probability that a wrong response is rewarded

    @property
    def review(self) -> int:
        """Thoughts that a localization costs."""
        return REVIEW if self.q > 0 else 0


@dataclass
class Drawn:
    """Responses to the problems of a step. Those that are not trained have an advantage of 0."""

    right: np.ndarray  # [B, P, n, L] which thoughts are right
    advantages: np.ndarray  # [B, P, n]
    start: np.ndarray  # [B, P, n] the first trained thought, from 0
    trained: np.ndarray  # [B, P] responses in the buffer, flat groups included
    thoughts: np.ndarray  # [B, P] generated


def respond(p, n, rng):
    """n responses [B, P, n, L] to problems whose thoughts are right with chance p [B, P, L]."""
    B, P, L = p.shape
    return rng.random((B, P, n, L), dtype=np.float32) < p[:, :, None]


def rewarded(right, method, rng):
    """Whether the verifier rewards responses [..., L]."""
    whole = right.all(-1)
    return whole | (rng.random(whole.shape, dtype=np.float32) < method.luck)


def localize(right, method, rng):
    """The thought that is named, from 0, for wrong responses [..., L]."""
    first_wrong = right.argmin(-1)
    anywhere = rng.integers(right.shape[-1], size=first_wrong.shape)
    return np.where(rng.random(first_wrong.shape) < method.q, first_wrong, anywhere)


def continued(kept, h, fresh):
    """The first h thoughts of `kept`, and the rest of `fresh`: [..., L] each, h [...]."""
    return np.where(np.arange(kept.shape[-1]) < h[..., None], kept, fresh)


def group_advantages(r, member=True):
    """loss.set_advantages for groups of rewards [..., G]; 0 for those that are not a member."""
    member = np.broadcast_to(member, r.shape)
    n = member.sum(-1, keepdims=True)
    mean = (r * member).sum(-1, keepdims=True) / n
    std = np.sqrt(((r - mean) ** 2 * member).sum(-1, keepdims=True) / n)
    return np.where(member & (std > 1e-8), (r - mean) / np.maximum(std, 1e-8), 0.0)


def draw_grpo(p, method, rng) -> Drawn:
    B, P, L = p.shape
    right = respond(p, N, rng)
    advantages = group_advantages(rewarded(right, method, rng))
    start = np.zeros((B, P, N), int)
    return Drawn(right, advantages, start, np.full((B, P), N), np.full((B, P), N * L))


def draw_resets(p, method, rng) -> Drawn:
    L = p.shape[-1]
    base = respond(p, BASE, rng)
    r_base = rewarded(base, method, rng)
    has_failure = ~r_base.all(-1)  # [B, P]
    named = localize(base, method, rng)
    if method.program == "deepest":
        seed = np.where(r_base, -1, named).argmax(-1)
        reviews = (~r_base).sum(-1)
    else:
        seed = r_base.argmin(-1)
        reviews = has_failure
    h = np.take_along_axis(named, seed[..., None], -1)[..., 0]
    h = np.where(has_failure, h, 0)  # [B, P] kept thoughts
    kept = np.take_along_axis(base, seed[..., None, None], 2)
    suffixes = continued(kept, h[..., None], respond(p, N - BASE, rng))
    r_suffixes = rewarded(suffixes, method, rng)
    in_two = np.concatenate([group_advantages(r_base), group_advantages(r_suffixes)], -1)
    in_one = group_advantages(np.concatenate([r_base, r_suffixes], -1))
    start = np.repeat(h[..., None], N, -1)
    start[..., :BASE] = 0
    return Drawn(
        right=np.concatenate([base, suffixes], 2),
        advantages=np.where(has_failure[..., None], in_two, in_one),
        start=start,
        trained=np.full(h.shape, N),
        thoughts=BASE * L + (N - BASE) * (L - h) + reviews * method.review,
    )


def draw_walk(p, method, rng) -> Drawn:
    L = p.shape[-1]
    base = respond(p, BASE, rng)
    more = respond(p, BASE, rng)  # made, and counted, where the rewards of base differ
    r_base = rewarded(base, method, rng)
    r_more = rewarded(more, method, rng)
    differ = r_base.any(-1) & ~r_base.all(-1)  # [B, P]
    walking = ~r_base.any(-1)
    thoughts = BASE * L * (1 + differ)
    in_hand = base[:, :, 0]
    found = np.zeros_like(walking)
    for _ in range(ROUNDS):
        h = localize(in_hand, method, rng)
        again = continued(in_hand, h, respond(p, 1, rng)[:, :, 0])
        in_hand = np.where(walking[..., None], again, in_hand)
        thoughts = thoughts + walking * (method.review + L - h)
        found |= walking & rewarded(in_hand, method, rng)
        walking &= ~found
        if not walking.any():
            break
    r = np.concatenate([r_base, r_more, found[..., None]], -1)
    member = np.ones_like(r)
    member[..., BASE : 2 * BASE] = differ[..., None]
    member[..., -1] = found
    return Drawn(
        right=np.concatenate([base, more, in_hand[:, :, None]], 2),
        advantages=group_advantages(r, member),
        start=np.zeros(r.shape, int),
        trained=member.sum(-1),
        thoughts=thoughts,
    )


PROGRAMS = {"grpo": draw_grpo, "first": draw_resets, "deepest": draw_resets, "walk": draw_walk}


def weights(drawn: Drawn):
    """loss.token_weights [B, P, n, L]: A / (|T| N) on the trained thoughts, N of the whole step."""
    L = drawn.right.shape[-1]
    trained = drawn.trained.sum(-1)[:, None, None]
    per_thought = drawn.advantages / ((L - drawn.start) * trained)
    return per_thought[..., None] * (np.arange(L) >= drawn.start[..., None])


def ascent(drawn: Drawn, p, facts):
    """Gradient [B, FACTS] of sum(weight * log-prob): a right thought adds 1 - p, a wrong one -p."""
    of_thoughts = (weights(drawn) * (drawn.right - p[:, :, None])).sum(2)  # [B, P, L]
    B = len(facts)
    row = facts + FACTS * np.arange(B)[:, None, None]
    return np.bincount(row.ravel(), of_thoughts.ravel(), B * FACTS).reshape(B, FACTS)


def sigmoid(logits):
    return (1 + np.tanh(logits / 2)) / 2  # never overflows


def pass_rate(logits):
    """Share [...] of right responses over all problems, exactly: facts are drawn independently."""
    return sigmoid(logits).mean(-1) ** LENGTH


def start_logits(low, high, run_seeds):
    """Logits [R, FACTS]: each fact is right with a chance that is uniform between low and high."""
    p = [np.random.default_rng(seed).uniform(low, high, FACTS) for seed in run_seeds]
    p = np.stack(p)
    return np.log(p / (1 - p))


class Ascender:
    """Updates B policies.

    AdamW has torch's defaults and the weight decay of srpo.py. "plain gradient" adds lr times the
    gradient. A step of "fixed length" has the length lr in all logits together.
    """

    def __init__(self, optimizer: str, lr: float):
        self.optimizer = optimizer
        self.lr = lr
        self.m = self.v = 0.0
        self.steps = 0

    def step(self, logits, gradient):
        """The logits after one step, both [B, FACTS]."""
        self.steps += 1
        if self.optimizer == "AdamW":
            self.m = 0.9 * self.m + 0.1 * gradient
            self.v = 0.999 * self.v + 0.001 * gradient**2
            m = self.m / (1 - 0.9**self.steps)
            v = self.v / (1 - 0.999**self.steps)
            gradient = m / (np.sqrt(v) + 1e-8) - 0.01 * logits
        elif self.optimizer == "fixed length":
            gradient = gradient / (np.linalg.norm(gradient, axis=-1, keepdims=True) + 1e-8)
        return logits + self.lr * gradient


@dataclass
class Now:
    """Where R runs are."""

    step: int
    rates: np.ndarray  # [R] pass rates
    thoughts: np.ndarray  # [R] generated so far


def train(
    regime: tuple[float, float],
    optimizer: str,
    lr: float,
    run_seeds: list[int],
    method: Method,
    factor: Callable | None = None,
) -> Iterator[Now]:
    """Trains a policy for each run seed; yields before every step, for as long as it is asked.

    regime: (low, high) of start_logits. factor: pass rate of each problem [B, P] -> what its
    advantages are multiplied by.
    """
    logits = start_logits(*regime, run_seeds)
    B = len(logits)
    ascender = Ascender(optimizer, lr)
    rng = np.random.default_rng([run_seeds[0], 11])
    thoughts = np.zeros(B)
    step = 0
    while True:
        yield Now(step, pass_rate(logits), thoughts)
        facts = rng.integers(FACTS, size=(B, PROMPTS, LENGTH))
        p = np.take_along_axis(sigmoid(logits), facts.reshape(B, -1), 1).reshape(facts.shape)
        drawn = PROGRAMS[method.program](p, method, rng)
        if factor:
            drawn.advantages = drawn.advantages * factor(p.prod(-1))[..., None]
        logits = ascender.step(logits, ascent(drawn, p, facts))
        thoughts = thoughts + drawn.thoughts.sum(-1)
        step += 1


@dataclass
class Ended:
    """What R runs needed to get to a pass rate. One that does not counts all that it made."""

    steps: np.ndarray  # [R]
    thoughts: np.ndarray  # [R] generated
    reached: bool  # by all runs
    start: float  # pass rate before training, mean over runs


def until(training: Iterator[Now], target: float, longest: int) -> Ended:
    """Trains until all runs are at the target, for `longest` steps at most."""
    now = next(training)
    start = now.rates.mean()
    steps, thoughts = np.zeros(len(now.rates)), now.thoughts
    going = now.rates < target
    while going.any() and now.step < longest:
        now = next(training)
        steps = np.where(going, now.step, steps)
        thoughts = np.where(going, now.thoughts, thoughts)
        going &= now.rates < target
    return Ended(steps, thoughts, not going.any(), start)


def rates_at(training: Iterator[Now], budget: float, longest: int):
    """Pass rates [R] after `budget` generated thoughts, on a line between two steps."""
    passed = []
    while not passed or (passed[-1].step < longest and (passed[-1].thoughts < budget).any()):
        passed.append(next(training))
    rates = np.stack([now.rates for now in passed], 1)  # [R, steps]
    thoughts = np.stack([now.thoughts for now in passed], 1)
    return np.array([np.interp(budget, x, y) for x, y in zip(thoughts, rates)])
