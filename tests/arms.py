"""Controls of the study: the walk with one thing changed, each as a program for `--method`.

  walk_half       half of the resets are at a random thought
  success_alone   the found response keeps its advantage, the four failures beside it get none
  true_solution   the problem's own solution in place of the found response, as a teacher gives it
  chained_groups  a suffix group in each round, in place of one continuation
  more_samples    fresh responses in place of resets, until one is right: no localizer is asked

All start as the walk does: a base group; where its rewards differ, as many more. The other controls
are flags: `--rounds 0` (no walk), `--localizer random` and `--localizer verifier`.

Left out: controls for partial rewards. All here is for rewards of 0 and 1.

Try it alone:  python srpo.py --method tests/arms.py:walk_half --base 4
"""

from collections.abc import Generator
from dataclasses import replace

from data.chains import true_response
from localize import by_random
from loss import set_advantages
from rollout import Program, Rollout, Row, Task, locate, walk


def walk_half(task: Task) -> Program:
    """The walk with a localizer degraded to half: each reset is at random with chance 1/2."""
    localize = task.localize

    def half(task: Task, seeds: list[Rollout]) -> Generator:
        if task.rng.random() < 0.5:
            return (yield from by_random(task, seeds))
        return (yield from localize(task, seeds))

    return (yield from walk(replace(task, localize=half)))


def success_alone(task: Task) -> Program:
    """The walk whose success keeps its advantage, while the four failures beside it get none."""
    rollouts = yield from walk(task)
    set_advantages(rollouts)
    if any(rollout.purpose == "walk" for rollout in rollouts):
        for failure in rollouts:
            if task.failed(failure):
                failure.advantages = [0.0] * len(failure.thought_ends)
    return rollouts


def start(task: Task) -> Generator:
    """The walk's first phase. Returns the base group; where rewards differ, it is a double one."""
    (base,) = yield [task.request("base", task.cfg.base)]
    if len({rollout.reward for rollout in base}) > 1:
        (more,) = yield [task.request("more", task.cfg.base)]
        base = base + more
    return base


def all_failed(task: Task, rollouts: list[Rollout]) -> bool:
    return all(task.failed(rollout) for rollout in rollouts)


def true_solution(task: Task) -> Program:
    """Where all four fail, the true solution joins them. Only its box is sampled.

    The log-probs of its steps are unknown; 0 stands for them, so `gap_prefix` says nothing here.
    """
    base = yield from start(task)
    if not all_failed(task, base):
        return task.in_group(0, base)
    row = Row(task.request("truth", 1), task.vocabulary)
    text = true_response(task.problem.question)
    for token in task.vocabulary.tokenizer(text)["input_ids"]:
        row.push(token, 0.0)
    truth = row.rollout()
    box = len(truth.thought_ends)
    ((solution,),) = yield [task.request("truth", 1, truth, box, "truth")]
    if not task.failed(solution):
        solution.trained_from = 0
        base = base + [solution]
    return task.in_group(0, base)


def chained_groups(task: Task) -> Program:
    """Each round samples a suffix group of four and trains it; the first of four failures goes on.

    The continuations are i.i.d. samples of their state, so nothing is trained off-policy.
    """
    base = yield from start(task)
    trained = task.in_group(0, base)
    if not all_failed(task, base):
        return trained
    in_hand = base[0]
    for k in range(1, task.cfg.rounds + 1):
        found = yield from locate(task, [in_hand])
        if not found:
            break
        reset = found[0]
        (suffixes,) = yield [task.request("suffix", 4, reset.seed, reset.h, reset.how)]
        trained = trained + task.in_group(k, suffixes)
        if not suffixes or not all_failed(task, suffixes):
            break
        in_hand = suffixes[0]
    return trained


def more_samples(task: Task) -> Program:
    """Where all four fail, up to `rounds` more responses, one after the other until one is right.

    A round of the walk costs about as many tokens, its review included. All join the group.
    """
    base = yield from start(task)
    if all_failed(task, base):
        for _ in range(task.cfg.rounds):
            (more,) = yield [task.request("more", 1)]
            base = base + more
            if not all_failed(task, more):
                break
    return task.in_group(0, base)
