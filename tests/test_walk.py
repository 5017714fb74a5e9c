"""The walk: what it draws, what it ascends, what the step line and the record say of it.

Most tests use a policy whose outcomes can all be listed. There the found response has a
distribution that can be written down, and the expected gradient of the whole program is compared
with a written statement of what the walk ascends.

Left out: whether it learns better; that is measured (tests/README.md), not proved.
"""

import math
from collections import Counter
from itertools import product

import numpy as np
import pytest
from test_methods import BY_ROLLOUT, ascended, assert_close, gradient

import methods
from conftest import Enumerable, settings
from data.driver import run_programs
from data.faults import counters
from data.metrics import step_metrics
from loss import backward, set_advantages, weigh
from rollout import grouped, records_of, walk

# ------------------------------------------------------------------------------ an exact localizer


def policy_of(V, H, correct, rng_key):
    toy = Enumerable(V, H, correct, rng_key)
    toy.prompt = [1]  # not 0, the padding token: its embedding is zero
    return toy


def first_wrong(toy, response):
    """h of the first thought after which no right response can follow."""
    for h in range(1, toy.H + 1):
        if not any(right[:h] == response[:h] for right in toy.correct):
            return h
    return None


def exactly(toy):
    """A localizer that is always right."""

    def localize(task, seeds):
        yield from ()
        return [(first_wrong(toy, tuple(seed.token_ids)), "exactly") for seed in seeds]

    return localize


def found_in(rollouts):
    """The response that a walk found, or None."""
    found = [rollout for rollout in rollouts if rollout.purpose == "walk"]
    return found[0] if found else None


def probability(toy, response, after=0):
    """Of the thoughts of a response that follow its first `after`, given those."""
    return math.exp(sum(toy.all_logps[response][after:]))


def sampled_walks(toy, n, rounds):
    """The found responses of n walks with the real sampler, counted."""
    tasks = []
    for slot in range(n):
        task = toy.task(exactly(toy), base=2, rounds=rounds)
        task.slot = slot
        task.rng = np.random.default_rng([7, slot])
        tasks.append(task)
    sampled = run_programs([walk(task) for task in tasks], toy.engine)
    drawn = Counter()
    for rollouts in sampled.results:
        found = found_in(rollouts)
        if found is not None:
            drawn[tuple(found.token_ids)] += 1
    return drawn


def assert_drawn(drawn, n, expected):
    """The counts of n walks agree with the expected probabilities."""
    assert set(drawn) <= set(expected)
    for response, p in expected.items():
        assert abs(drawn[response] / n - p) < 4.5 * math.sqrt(p * (1 - p) / n)


# ----------------------------------------------------------------------------------- what it draws

SEVERAL = {(0, 0), (1, 0)}  # two first thoughts are right, which are not as likely to go on well


def test_the_found_response_has_the_enumerated_distribution():
    """All outcomes of the whole program, against 1,000 walks of the real sampler."""
    toy = policy_of(V=3, H=2, correct=SEVERAL, rng_key=1)
    expected = Counter()
    for outcome in toy.run_all(lambda: walk(toy.task(exactly(toy), base=2, rounds=2))):
        found = found_in(outcome.rollouts)
        if found is not None:
            expected[tuple(found.token_ids)] += outcome.probability
    assert set(expected) == SEVERAL and 0.05 < expected.total() < 0.95
    assert_drawn(sampled_walks(toy, 1000, rounds=2), 1000, expected)


def test_a_long_walk_filters_thought_by_thought():
    """A first response that is right, or else what the walk from it finds: each of its thoughts is
    a draw from those thoughts of the policy that are right there.

    Where one value a step is right, this is pi(y | right), a draw of the policy given success.
    Where several are, it is not: pi(y | right) also weighs how likely success is after each.
    """
    toy = policy_of(V=3, H=2, correct=SEVERAL, rng_key=1)
    value = toy.value().item()
    first = {right: math.exp(toy.all_logps[right][0]) for right in SEVERAL}
    filtered = {right: first[right] / sum(first.values()) for right in SEVERAL}
    given_success = {right: probability(toy, right) / value for right in SEVERAL}
    assert max(abs(filtered[right] - given_success[right]) for right in SEVERAL) > 0.2
    # The first of two responses is not right itself, and neither is the other one.
    expected = {}
    for right in SEVERAL:
        expected[right] = (filtered[right] - probability(toy, right)) * (1 - value)
    assert_drawn(sampled_walks(toy, 1000, rounds=60), 1000, expected)


# --------------------------------------------------------------------------------- what it ascends

ONE = {(0, 1)}  # one right value a step, so one right response


def found_within(toy, rounds):
    """F(y): how likely a walk from each wrong response finds the right one in time."""
    found = dict.fromkeys(toy.responses, 0.0)
    found = found | dict.fromkeys(toy.correct, 1.0)
    wrong = [response for response in toy.responses if response not in toy.correct]
    kept = {y: first_wrong(toy, y) - 1 for y in wrong}
    next_ones = {y: [z for z in toy.responses if z[: kept[y]] == y[: kept[y]]] for y in wrong}
    chance = {}
    for y in wrong:
        chance[y] = [probability(toy, z, kept[y]) for z in next_ones[y]]
    for _ in range(rounds):
        found = found | {y: np.dot(chance[y], [found[z] for z in next_ones[y]]) for y in wrong}
    return found


def weight_of_groups(P, base):
    """c, where base groups that differ, made twice as large, ascend c times the pass rate P.

    A success has the expected score grad P / P, a failure -grad P / (1 - P). Whoever decides by
    rewards alone changes c and never the direction."""
    c = 0.0
    for rewards in product([0.0, 1.0], repeat=2 * base):
        if 0 < sum(rewards[:base]) < base:
            r = np.array(rewards)
            advantages = (r - r.mean()) / r.std()
            chance = np.prod(np.where(r, P, 1 - P))
            c += chance * (advantages * np.where(r, 1 / P, -1 / (1 - P))).mean()
    return c


def statement(toy, base, rounds):
    """What the walk ascends: three terms, for one right response y* of probability P.

    Base groups that differ ascend c P. Where all `base` rollouts are wrong, and the walk from the
    first one, y, finds y* (probability F(y)), y* is a success of a group of base + 1: its advantage
    is sqrt(base), that of each failure -1 / sqrt(base)."""
    (right,) = toy.correct
    P = toy.value().item()
    F = found_within(toy, rounds)
    wrong = [response for response in toy.responses if response != right]
    ways = {y: probability(toy, y) * F[y] for y in wrong}  # it starts at y and ends at y*
    others = (1 - P) ** (base - 1)  # all other base rollouts are wrong, too
    success = others * sum(ways.values()) * toy.logps(right).sum()
    failures = 0.0
    for y in wrong:
        of_the_first = others * ways[y]
        of_the_others = (base - 1) * others / (1 - P) * sum(ways.values()) * probability(toy, y)
        failures = failures + (of_the_first + of_the_others) * toy.logps(y).sum()
    group = (base**0.5 * success - base**-0.5 * failures) / (base + 1)
    return (weight_of_groups(P, base) * toy.value() + group) / toy.H


def test_the_walk_ascends_what_is_written():
    toy = policy_of(V=3, H=2, correct=ONE, rng_key=3)

    def start_program():
        return walk(toy.task(exactly(toy), base=2, rounds=2))

    scalar = ascended(toy, start_program, normalize=True, **BY_ROLLOUT)
    assert_close(gradient(toy.model, scalar), gradient(toy.model, statement(toy, 2, 2)))


@pytest.mark.parametrize("base", [2, 4])
def test_a_long_walk_weighs_a_prompt_by_one_over_its_pass_rate(base):
    """With enough rounds the success ascends log P, so P with the weight 1 / P.

    GRPO's weight is bounded: G sqrt(G - 1) / G where P is small, because hardly any group has a
    success. So both differ in the weight of a prompt, and in how often it teaches anything at all.
    """
    toy = policy_of(V=3, H=2, correct=ONE, rng_key=3)
    P = toy.value().item()
    of_success = base**0.5 / P + base**0.5 / (1 - P)  # one success and `base` failures
    c = weight_of_groups(P, base) + (1 - P) ** base * of_success / (base + 1)
    long = gradient(toy.model, statement(toy, base, rounds=3000))
    assert_close(long, gradient(toy.model, c * toy.value() / toy.H))


def no_walk(toy, base):
    """Groups of `base` that double where they differ: the walk without rounds."""
    return lambda: walk(toy.task(exactly(toy), base=base, rounds=0))


def two_groups(toy, base):
    """The other way to use the second half: a group of its own."""

    def program():
        task = toy.task(base=base)
        (first,) = yield [task.request("base", base)]
        if len({rollout.reward for rollout in first}) == 1:
            return task.in_group(0, first)
        (second,) = yield [task.request("more", base)]
        return task.in_group(0, first) + task.in_group(1, second)

    return program


def signal_per_rollout(toy, start_program):
    """c / rollouts, where c grad P is the expected gradient, summed over what was drawn."""
    weights, drawn = Counter(), 0.0
    for outcome in toy.run_all(start_program):
        set_advantages(outcome.rollouts)
        drawn += outcome.probability * len(outcome.rollouts)
        for rollout in outcome.rollouts:
            weights[tuple(rollout.token_ids)] += outcome.probability * rollout.advantages[0]
    expected = sum(weight * toy.logps(response).sum() for response, weight in weights.items())
    expected = gradient(toy.model, expected)
    pass_rate = gradient(toy.model, toy.value())
    c = (expected @ pass_rate) / (pass_rate @ pass_rate)
    assert_close(expected, c * pass_rate)  # the look changes the scale, and not the direction
    return c.item() / drawn


@pytest.mark.parametrize("rng_key", [0, 1, 2])
def test_to_look_before_a_group_is_doubled_keeps_the_direction(rng_key):
    """The baseline of a doubled group depends on the look, so the scale changes, and only that.

    One doubled group gives more signal for each drawn rollout than two groups do."""
    toy = policy_of(V=2, H=1, correct={(0,)}, rng_key=rng_key)
    doubled = signal_per_rollout(toy, no_walk(toy, 4))
    assert doubled > 1.05 * signal_per_rollout(toy, two_groups(toy, 4))


# -------------------------------------------------------------------- the record and the step line


@pytest.fixture(scope="module")
def step(policy):
    """24 walks of the embedded policy, with a localizer that is always right."""
    tasks = policy.tasks(8, 24, rounds=5)
    sampled = run_programs([walk(task) for task in tasks], policy.engine)
    rollouts = []
    for buffer in sampled.results:
        rollouts += buffer
    set_advantages(rollouts)
    return tasks, sampled, rollouts


def walk_of(task, generated):
    """The continuations of one walk, in the order of its rounds."""
    index = task.problem.index
    return [r for r in generated if r.problem == index and r.purpose == "walk"]


def test_who_walks_and_what_joins(step):
    tasks, sampled, rollouts = step
    kinds = Counter()
    for slot, members in grouped(rollouts).items():
        task = tasks[slot[0]]
        base = [r for r in members if r.purpose == "base"]
        rest = [r for r in members if r.purpose != "base"]
        rounds = walk_of(task, sampled.generated)
        assert len(base) == 4
        if len({r.reward for r in base}) > 1:
            kinds["doubled"] += 1
            assert [r.purpose for r in rest] == ["more"] * 4 and not rounds
        elif base[0].reward == 1:
            assert not rest and not rounds
        elif rest:
            kinds["found"] += 1
            (found,) = rest
            assert found is rounds[-1] and found.reward == 1
        else:
            kinds["failed"] += 1
            assert len(rounds) == 5
        in_hand = base[0]
        for continued in rounds:  # each continues the one before it, from its first wrong thought
            assert continued.seed is in_hand
            assert continued.reset == task.first_wrong(in_hand)
            assert continued.token_ids[: continued.prefix_len] == in_hand.prefix(continued.reset)
            in_hand = continued
    assert kinds["doubled"] and kinds["found"] and kinds["failed"]
    assert len(rollouts) == 4 * 24 + 4 * kinds["doubled"] + kinds["found"]


def test_the_found_response_is_a_whole_response_of_the_prompt(policy, step):
    """Trained from its first token, weighed once, and marked: its prefix was searched for."""
    tasks, sampled, rollouts = step
    records = records_of(1, sampled.generated, tasks)
    found = [r for r in rollouts if r.purpose == "walk"]
    for rollout, record in zip(sampled.generated, records):
        assert record["off_policy"] == any(rollout is r for r in found)
    assert any(r.prefix_len > 0 for r in found)
    for r in found:
        assert r.advantages == pytest.approx([2.0] * len(r.thought_ends))
    items = weigh(found, settings())
    assert all(all(item.trained) for item in items)
    sums = backward(policy.model, items, 0, settings())
    assert sums.tokens == sum(len(r.token_ids) for r in found)
    # The same weights sampled the prefix: its log-probs differ by rounding alone.
    assert sums.prefix_tokens > 0 and sums.gap_max < 1e-3


def test_the_step_line_counts_first_draws_and_walks(step):
    tasks, sampled, rollouts = step
    line = step_metrics(rollouts, sampled.generated, tasks)
    base = [r for r in rollouts if r.purpose == "base"]
    assert len(base) == 4 * 24
    assert line["pass_base"] == pytest.approx(np.mean([r.reward for r in base]))
    alike = []
    for task in tasks:
        rewards = {r.reward for r in base if r.problem == task.problem.index}
        alike.append(len(rewards) == 1)
    assert line["zero_variance_base"] == np.mean(alike)
    found = [r for r in rollouts if r.purpose == "walk"]
    flat = line["flat_groups"]
    assert flat == pytest.approx(line["zero_variance_base"] - len(found) / 24)
    walks = [walk_of(task, sampled.generated) for task in tasks]
    rounds = [len(walked) for walked in walks if walked and walked[-1].reward == 1]
    assert line["walk"] == {
        "found": len(found),
        "failed": sum(1 for walked in walks if walked and walked[-1].reward == 0),
        "rounds_found": np.mean(rounds),
        "rounds_failed": 5,
    }
    spent = sum(r.generated for r in sampled.generated if r.purpose == "walk")
    assert line["tokens"]["walk"] == spent
    assert line["verifier_calls"] == len(sampled.generated)
    assert line["pass_suffix"] is None
    exact = []
    for task, walked in zip(tasks, walks):
        exact += [r.reset == task.first_wrong(r.seed) for r in walked]
    assert len(exact) == sum(line["localized"].values()) > 0
    assert line["localized_exact"] == pytest.approx(np.mean(exact))


def test_the_base_group_is_iid(policy):
    """Trap 1: doubled groups are those that differ, so their later draws do not count."""
    tasks = policy.tasks(4, 200, rounds=0, base=2)
    sampled = run_programs([walk(task) for task in tasks], policy.engine)
    rollouts = []
    for buffer in sampled.results:
        rollouts += buffer
    set_advantages(rollouts)
    line = step_metrics(rollouts, sampled.generated, tasks)
    assert line["tokens"]["more"] > 0 and line["walk"]["found"] == 0
    first = [r.reward for r in sampled.generated if r.purpose == "base"]
    assert len(first) == 400 and line["pass_base"] == pytest.approx(np.mean(first))
    assert counters["walk_failed"] > 0


def graded_by(rewards):
    """A grader that gives the rewards one after the other."""
    left = list(rewards)

    def grade(text):
        return left.pop(0)

    return grade


@pytest.mark.parametrize(
    "rewards, purposes",
    [
        ([0.5, 0.5, 0.75, 1.0], ["base", "base", "walk"]),  # alike and failed: on to a success
        ([0.0, 0.5, 0.5, 1.0], ["base", "base", "more", "more"]),  # they differ: a signal
        ([1.0, 1.0], ["base", "base"]),
        ([0.5, 0.5, 0.5, 0.5], ["base", "base"]),
    ],
)
def test_partial_rewards(rewards, purposes):
    toy = policy_of(V=3, H=2, correct=ONE, rng_key=3)

    def first_thought(task, seeds):
        yield from ()
        return [(1, "first") for _ in seeds]

    task = toy.task(first_thought, base=2, rounds=2)
    task.problem.grade = graded_by(rewards)
    sampled = run_programs([walk(task)], toy.engine)
    (buffer,) = sampled.results
    assert [r.purpose for r in buffer] == purposes


def test_a_seed_that_localization_drops_ends_the_walk():
    """--localize_fallback skip."""
    toy = policy_of(V=3, H=2, correct=ONE, rng_key=3)

    def none(task, seeds):
        yield from ()
        return [(None, "no_box") for _ in seeds]

    task = toy.task(none, base=2)
    task.problem.grade = graded_by([0.0, 0.0])
    sampled = run_programs([walk(task)], toy.engine)
    assert len(sampled.generated) == len(sampled.results[0]) == 2
    assert counters["walk_failed"] == 1


def test_the_releases_version_fills_the_slots_of_one_group(policy):
    """Right or wrong, every correction takes a slot; after a right response comes a fresh one."""
    tasks = policy.tasks(4, 16, base=8)
    sampled = run_programs([methods.corrections(task) for task in tasks], policy.engine)
    corrected = 0
    for task, slots in zip(tasks, sampled.results):
        assert len(slots) == 8
        before = None
        for response in slots:
            if before is None or before.reward == 1:
                assert response.purpose == "base" and response.seed is None
            else:
                assert response.purpose == "correction" and response.seed is before
                corrected += 1
            before = response
        set_advantages(slots)
        assert all(all(item.trained) for item in weigh(slots, settings()))
    assert corrected > 16 and len(sampled.generated) == 8 * 16
