"""Ideas that were written with the README alone, kept as a forker wrote them.

Try it alone:  python srpo.py --method tests/ideas.py:entropy_reset
"""


def surprisals(rollout):
    starts = [0, *rollout.thought_ends[:-1]]
    return [
        -sum(rollout.logps[start:end]) / (end - start)
        for start, end in zip(starts, rollout.thought_ends)
    ]


def entropy_reset(task):
    (base,) = yield [task.request("base", 4)]
    failures = [rollout for rollout in base if task.failed(rollout)]
    if not failures:
        (more,) = yield [task.request("base", 4)]
        return task.in_group(0, base + more)
    seed = task.rng.choice(failures)
    values = surprisals(seed)
    h = 1 + values.index(max(values))
    (suffixes,) = yield [task.request("suffix", 4, seed, h, "entropy")]
    return task.in_group(0, base) + task.in_group(1, suffixes)


def review_credit(task):
    (base,) = yield [task.request("base", 8)]
    failures = [rollout for rollout in base if task.failed(rollout)]
    if failures:
        found = yield from task.localize(task, failures)
        for rollout in base:
            rollout.advantages = [1.0] * len(rollout.thought_ends)
        for rollout, (h, _) in zip(failures, found):
            n = len(rollout.thought_ends)
            rollout.advantages = [0.0 if i < h else -1.0 for i in range(1, n + 1)]
    return task.in_group(0, base)
