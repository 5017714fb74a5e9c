"""Ideas that may better the walk, each as a program for `--method`; tests/study.md has their runs.

  latest            the walk starts from the failure whose h* is the latest, not from the first one
  kept              an unfinished walk goes on when its problem comes again
  by_mean           A = (r - mean) / mean in place of (r - mean) / std
  rewarded_reviews  the policy's reviews are trained by what their resets gained

Three more are flags of `--method walk`: `--rounds 24`, `--base 2` and `--base 1`.

Left out: partial rewards. All here is for rewards of 0 and 1.

Try it alone:  python srpo.py --method tests/better.py:latest --base 4
"""

from collections.abc import Generator

import numpy as np

from localize import fallback, reviewed
from rollout import Program, Rollout, Task, grouped, locate, walk
from tests.arms import all_failed, start


def go_on(task: Task, in_hand: Rollout, rounds: int) -> Generator:
    """The rest of a walk: at most `rounds` resets, from `in_hand` on. Returns the last response."""
    while task.failed(in_hand) and rounds > 0:
        found = yield from locate(task, [in_hand])
        if not found:
            break
        reset = found[0]
        ((in_hand,),) = yield [task.request("walk", 1, reset.seed, reset.h, reset.how)]
        rounds -= 1
    return in_hand


def joined(task: Task, base: list[Rollout], found: Rollout) -> list[Rollout]:
    """The base group and, if it is right, what the walk found: trained as a whole response."""
    if not task.failed(found):
        found.trained_from = 0
        base = base + [found]
    return task.in_group(0, base)


def latest(task: Task) -> Program:
    """All four failures are reviewed; the one with the longest kept prefix is walked.

    Costs three reviews more than the walk. A fallback's random h* counts as well.
    """
    base = yield from start(task)
    if not all_failed(task, base):
        return task.in_group(0, base)
    resets = yield from locate(task, base)
    if not resets:
        return task.in_group(0, base)
    reset = max(resets, key=lambda reset: reset.h)
    ((in_hand,),) = yield [task.request("walk", 1, reset.seed, reset.h, reset.how)]
    in_hand = yield from go_on(task, in_hand, task.cfg.rounds - 1)
    return joined(task, base, in_hand)


UNFINISHED: dict[str, Rollout] = {}  # question -> the last response of a walk that found nothing


def kept(task: Task) -> Program:
    """Where all four fail again, the walk goes on from where the last one of this problem ended.

    So it differs from the walk only after a whole pass over the problems: 32 steps of the hard set.
    A run that is resumed starts with none: the memory is this process's.
    """
    base = yield from start(task)
    if not all_failed(task, base):
        return task.in_group(0, base)
    question = task.problem.question
    in_hand = UNFINISHED.pop(question, base[0])
    in_hand = yield from go_on(task, in_hand, task.cfg.rounds)
    if task.failed(in_hand):
        UNFINISHED[question] = in_hand
    return joined(task, base, in_hand)


def by_mean(task: Task) -> Program:
    """The walk with A = (r - mean) / mean: rare successes weigh more.

    A success that is one of n has A = n - 1, where a division by std gives it sqrt(n - 1).
    """
    rollouts = yield from walk(task)
    for members in grouped(rollouts).values():
        mean = sum(rollout.reward for rollout in members) / len(members)
        for rollout in members:
            A = (rollout.reward - mean) / mean if mean > 0 else 0.0
            rollout.advantages = [A] * len(rollout.thought_ends)
    return rollouts


REVIEWS = 4  # of one failure, compared with each other


def rewarded_reviews(task: Task) -> Program:
    """Four reviews of one failure, a reset by each; they are trained as a group of their own.

    A review is worth the share of thoughts that it keeps, if its continuation is right, else 0
    (after an option of the authors' release). Wants `--localize_temperature 1`, so that reviews
    are samples of what is trained. Of the continuations only one success is trained. The step line
    counts each of the four as a walk of its own.
    """
    base = yield from start(task)
    if not all_failed(task, base):
        return task.in_group(0, base)
    failure = base[0]
    reviews = yield from reviewed(task, [failure] * REVIEWS)
    requests = []
    for review in reviews:
        h = fallback(task, failure) if review.h is None else review.h
        requests.append(task.request("walk", 1, failure, h, review.how))
    continuations = [rollout for (rollout,) in (yield requests)]
    worth = []
    for review, continuation in zip(reviews, continuations):
        share_kept = (continuation.reset - 1) / len(failure.thought_ends)
        named_well = review.h is not None and not task.failed(continuation)
        worth.append(share_kept if named_well else 0.0)
    answers = []
    for review, gain in zip(reviews, worth):
        if review.answer is not None:
            A = (gain - np.mean(worth)) / max(np.std(worth), 1e-8)
            review.answer.advantages = [float(A)] * len(review.answer.thought_ends)
            answers.append(review.answer)
    successes = [rollout for rollout in continuations if not task.failed(rollout)]
    in_hand = (successes or continuations)[0]
    in_hand = yield from go_on(task, in_hand, task.cfg.rounds - REVIEWS)
    return joined(task, base, in_hand) + task.in_group(1, answers)
