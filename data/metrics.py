"""The numbers of a step line: pass rates, flat groups, resets, costs, the loss, seconds.

srpo.py joins them with the step number and the counters, and writes the line to metrics.jsonl.
Rates are in [0, 1], tokens are counts, and None says that there was nothing to measure.

`load_tracker` finds what --tracker sends the step lines to as well.

Left out: statistics over steps or seeds; see data/curves.py.

Try it alone:  python -m pytest tests/test_walk.py -k step_line
"""

from collections import Counter
from dataclasses import dataclass, fields
from importlib import import_module
from itertools import chain
from time import perf_counter
from types import ModuleType

import numpy as np
import torch

from data.faults import UserError
from rollout import Rollout, Task, grouped


@dataclass
class Sums:
    """Sums over the trained tokens of a step. gap = |sampler's - trainer's log-prob|, nats."""

    loss: float = 0.0
    tokens: int = 0
    entropy: float = 0.0  # nats
    gap: float = 0.0  # of tokens that are neither in a prefix nor off-policy
    gap_prefix: float = 0.0  # of tokens in a prefix, which was sampled earlier than the rest
    gap_max: float = 0.0  # of all but off-policy tokens
    prefix_tokens: int = 0
    off_policy_tokens: int = 0  # sampled from another prompt: their gap says nothing

    def add(self, other: "Sums") -> None:
        for f in fields(self):
            values = getattr(self, f.name), getattr(other, f.name)
            setattr(self, f.name, max(values) if f.name == "gap_max" else sum(values))


def sums_of(scored, tokens) -> Sums:
    """The sums of a micro-batch. scored: loss.Scored; tokens: loss.Tokens, its trained tokens."""
    gap = (scored.logps - tokens.old_logps).abs()
    on_policy = ~tokens.off_policy
    in_prefix = tokens.in_prefix & on_policy
    return Sums(
        loss=scored.loss.item(),
        tokens=len(gap),
        entropy=scored.entropies.sum().item(),
        gap=gap[on_policy & ~in_prefix].sum().item(),
        gap_prefix=gap[in_prefix].sum().item(),
        gap_max=max(gap[on_policy].tolist(), default=0.0),
        prefix_tokens=int(in_prefix.sum()),
        off_policy_tokens=int(tokens.off_policy.sum()),
    )


@dataclass
class Update:
    """What a gradient step reports."""

    sums: Sums  # of all processes
    grad_norm: float  # before clipping


def step_metrics(rollouts: list[Rollout], generated: list[Rollout], tasks: list[Task]) -> dict:
    """What the rollouts of one step tell, for any method. rollouts: trained; generated: all."""
    groups = grouped(rollouts).values()
    base_groups = [members for members in groups if not is_reset(members)]
    suffix_groups = [members for members in groups if is_reset(members)]
    first_draws = [first_draws_of(members, tasks) for members in base_groups]
    tokens = Counter(dict.fromkeys(PURPOSES, 0))
    for rollout in generated:
        tokens[rollout.purpose] += rollout.generated
    response_tokens = [len(rollout.token_ids) for rollout in rollouts]
    masked = [rollout.masked(tasks[0].cfg.mask_prefix) for rollout in rollouts]
    return {
        "pass_base": mean_reward(first_draws),
        "pass_suffix": mean_reward(suffix_groups),
        "zero_variance_base": share_of_alike(first_draws),
        "zero_variance_suffix": share_of_alike(suffix_groups),
        "flat_groups": mean([is_flat(members) for members in groups]),
        # One continuation of a walk is a reset, too.
        **reset_metrics(suffix_groups + [[r] for r in generated if continues_walk(r)], tasks),
        "walk": walk_metrics(generated),
        "tokens": dict(tokens),
        "verifier_calls": sum(rollout.reward is not None for rollout in generated),
        "masked_share": sum(masked) / sum(response_tokens),
        "response_tokens": mean(response_tokens),
        "thoughts": mean([len(rollout.thought_ends) for rollout in rollouts]),
        "finish": dict(Counter(rollout.finish for rollout in rollouts)),
    }


# Of the methods in rollout.py. "more": drawn from the prompt after a look at its first rewards.
PURPOSES = ("base", "more", "seed", "localization", "suffix", "oracle", "walk")


def first_draws_of(members: list[Rollout], tasks: list[Task]) -> list[Rollout]:
    """The i.i.d. rollouts of the plain prompt in a base group: their mean is the pass rate.

    Not a continuation that joined the group, a later turn, or one drawn after a look at the others.
    """
    prompt = tasks[members[0].group[0]].prompt_ids
    return [r for r in members if r.seed is None and r.prompt_ids == prompt and r.purpose != "more"]


def is_reset(members: list[Rollout]) -> bool:
    """Whether a group continues a reset state, and is trained from there."""
    return all(r.seed is not None and r.trained_from is None for r in members)


def reset_metrics(continued: list[list[Rollout]], tasks: list[Task]) -> dict:
    """Where a step resets. A step checker tells how often rightly; training never sees this.

    continued: the continuations of each reset state.
    """
    # A prefix is clean if h* is at or before the truth: it holds no wrong thought.
    exact, clean_groups, erroneous_groups = [], [], []
    task_of = {task.problem.index: task for task in tasks}
    for members in continued:
        first = members[0]
        truth = task_of[first.problem].first_wrong(first.seed)
        if truth is None:
            continue
        exact.append(first.reset == truth)
        judged_groups = clean_groups if first.reset <= truth else erroneous_groups
        judged_groups.append(members)
    firsts = [members[0] for members in continued]
    return {
        "pass_suffix_clean": mean_reward(clean_groups),
        "pass_suffix_erroneous": mean_reward(erroneous_groups),
        "reset_depth": mean([r.reset / len(r.seed.thought_ends) for r in firsts]),  # h* / H
        "localized": dict(Counter(r.localized for r in firsts)),
        "localized_exact": mean(exact),
        "localized_clean": len(clean_groups) / len(exact) if exact else None,
    }


def continues_walk(rollout: Rollout) -> bool:
    """Whether it is a round of a walk: a method of one's own may use the word for another thing."""
    return rollout.purpose == "walk" and rollout.seed is not None


def walk_metrics(generated: list[Rollout]) -> dict:
    """How the walks of a step ended: how many there were, and after how many rounds, on average.

    A walk is a chain of rollouts, each of which continues the one before it; its end is no seed.
    """
    continued = {id(rollout.seed) for rollout in generated if continues_walk(rollout)}
    rounds_found, rounds_failed = [], []
    for rollout in generated:
        if not continues_walk(rollout) or id(rollout) in continued:
            continue
        rounds = 0
        earlier = rollout
        while continues_walk(earlier):
            rounds += 1
            earlier = earlier.seed
        ended = rounds_failed if rollout.group is None else rounds_found
        ended.append(rounds)
    return {
        "found": len(rounds_found),
        "failed": len(rounds_failed),
        "rounds_found": mean(rounds_found),
        "rounds_failed": mean(rounds_failed),
    }


def update_metrics(update: Update | None) -> dict:
    """What the gradient step reports; None without one. Entropy and gaps are means, in nats."""
    if update is None:
        names = ("loss", "entropy", "grad_norm", "gap", "gap_prefix", "gap_max")
        return {"trained_tokens": 0, "off_policy_tokens": 0} | dict.fromkeys(names)
    sums = update.sums
    others = sums.prefix_tokens + sums.off_policy_tokens
    return {
        "trained_tokens": sums.tokens,
        "loss": sums.loss,
        "entropy": sums.entropy / sums.tokens,
        "grad_norm": update.grad_norm,
        "gap": sums.gap / max(1, sums.tokens - others),
        "gap_prefix": sums.gap_prefix / sums.prefix_tokens if sums.prefix_tokens else None,
        "gap_max": sums.gap_max,
        "off_policy_tokens": sums.off_policy_tokens,
    }


def mean(values: list) -> float | None:
    return float(np.mean(values)) if values else None


def mean_reward(groups: list[list[Rollout]]) -> float | None:
    """Of the rollouts that were graded: a review that is trained has no reward."""
    return mean([rollout.reward for rollout in chain(*groups) if rollout.reward is not None])


def share_of_alike(groups: list[list[Rollout]]) -> float | None:
    """Share of groups whose rewards are all alike. Groups without rewards do not count."""
    alike = []
    for members in groups:
        rewards = {rollout.reward for rollout in members if rollout.reward is not None}
        if rewards:
            alike.append(len(rewards) == 1)
    return mean(alike)


def is_flat(members: list[Rollout]) -> bool:
    """Whether a group teaches nothing: all its advantages are zero."""
    return not any(any(rollout.advantages) for rollout in members)


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds = Counter()
        self.at = perf_counter()

    def add(self, seconds: Counter) -> None:
        """Adds the seconds of phases that were timed elsewhere; a new lap starts."""
        self.seconds.update(seconds)
        self.at = perf_counter()

    def lap(self, phase: str) -> None:
        """Counts the time since the last call for this phase."""
        now = perf_counter()
        self.seconds[phase] += now - self.at
        self.at = now

    def metrics(self) -> dict:
        """Seconds by phase, and the peak GPU memory of this process so far (torch's, in GB)."""
        metrics = {"seconds": {phase: round(s, 4) for phase, s in self.seconds.items()}}
        if torch.cuda.is_available():
            metrics["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return metrics


def load_tracker(package: str | None) -> ModuleType | None:
    """The package that --tracker names. trackio's init, log and finish are made like wandb's."""
    if package is None:
        return None
    try:
        return import_module(package)
    except ImportError as fault:
        raise UserError(
            f"--tracker {package} cannot be used ({fault}); pip install {package}, or leave it out"
        )
