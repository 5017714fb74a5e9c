"""The credit of the baselines in methods.py, on real parts.

VinePPO, SPO-tree and SCoRe claim a policy gradient: it is computed over ALL outcomes of the program
on a policy that can be enumerated. SPO-tree's advantages are also followed on a tree by hand.
Critique-GRPO and SCoRe run with an untrained model that has a chat template: their credit and the
machinery of a second turn, and not that they learn.
"""

import json
import math
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_english import folder  # noqa: F401  (the fixture: an untrained model that can chat)

import methods
import srpo
from conftest import ROOT, Enumerable, Letters, Outcome, settings
from data.driver import run_programs
from data.english import draw
from data.faults import UserError
from data.policies import load_policy
from loss import backward, collate, set_advantages, weigh
from rollout import HFEngine, Rollout, make_tasks

BY_TOKEN = dict(off_policy_shape=0.0, length="step")
BY_ROLLOUT = dict(off_policy_shape=0.0, length="trained")


# ------------------------------------------------------------------- expected gradients, enumerated


def gradient(model, scalar):
    """The gradient of a scalar, as one vector."""
    model.zero_grad()
    scalar.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def ascended(toy, start_program, normalize=False, **changed):
    """Sums probability x token weight x log-prob over all outcomes: minus the expected loss."""
    total = {}  # by prompt and response
    for outcome in toy.run_all(start_program):
        set_advantages(outcome.rollouts, normalize)
        for item in weigh(outcome.rollouts, settings(**changed)):
            text = tuple(item.rollout.prompt_ids), tuple(item.rollout.token_ids)
            weights = outcome.probability * np.array(item.weights)
            total[text] = total.get(text, 0.0) + weights
    scalar = 0.0
    for (prompt, response), weights in total.items():
        logps = toy.logps(response, list(prompt))
        scalar = scalar + (torch.from_numpy(weights).float() * logps).sum()
    return scalar


def thought_value(toy, h):
    """Its gradient is the part of the policy gradient that goes through thought h (from 0)."""
    total = 0.0
    for response in toy.correct:
        logps = toy.logps(response)
        total = total + logps.sum().exp().detach() * logps[h]
    return total


def assert_close(a, b):
    assert b.norm() > 1e-3
    assert (a - b).norm() < 1e-4 * b.norm()


@pytest.mark.parametrize("base, oracle_samples", [(1, 1), (1, 2), (2, 1)])
def test_vineppo_ascends_the_pass_rate(base, oracle_samples):
    """Its values are noisy, but never look at the thought that they judge: no bias at any m."""
    toy = Enumerable(V=2, H=2, correct={(0, 1), (1, 1)}, rng_key=5)
    numbers = dict(base=base, oracle_samples=oracle_samples)
    scalar = ascended(toy, lambda: methods.vineppo(toy.task(**numbers)), **BY_ROLLOUT)
    assert_close(gradient(toy.model, scalar), gradient(toy.model, toy.value() / toy.H))


def test_spo_tree_ascends_the_pass_rate_segment_by_segment(monkeypatch):
    """A segment of B siblings counts 1 - 1/B: it is part of its own baseline."""
    monkeypatch.setattr(methods, "BRANCHES", (2, 2))
    monkeypatch.setattr(methods, "SEGMENT", 1)
    toy = Enumerable(V=3, H=2, correct={(0, 1), (1, 2), (2, 2)}, rng_key=3)
    scalar = ascended(toy, lambda: methods.spo_tree(toy.task()), **BY_TOKEN)
    n_tokens = 2 + 4  # segments of each level, of one token each
    claimed = (2 * 0.5 * thought_value(toy, 0) + 4 * 0.5 * thought_value(toy, 1)) / n_tokens
    assert_close(gradient(toy.model, scalar), gradient(toy.model, claimed))


class TurnLetters(Letters):
    """Encodes whatever a user says as one letter."""

    def __call__(self, text, **_):
        return {"input_ids": [1]}


class Turns(Enumerable):
    """An enumerable policy that answers second turns too: its log-probs depend on the prompt."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.tokenizer = TurnLetters("abcdef"[: self.V])
        self.logps_of = {}  # by prompt and response

    def outcomes(self, request):
        for responses in product(self.responses, repeat=request.n):
            rollouts = [self.rollout(request, response) for response in responses]
            logps = [sum(rollout.logps) for rollout in rollouts]
            yield Outcome(rollouts, math.exp(sum(logps)))

    def rollout(self, request, response):
        rollout = super().rollout(request, response)
        rollout.prompt_ids = request.prompt_ids
        text = tuple(request.prompt_ids), response
        if text not in self.logps_of:
            self.logps_of[text] = self.logps(response, request.prompt_ids).tolist()
        rollout.logps = self.logps_of[text]
        return rollout

    def turn_values(self):
        """What pulls each turn: scalars with the gradients of E r1, and of E r2 by turn two."""
        first, second = 0.0, 0.0
        for said in self.responses:
            logps = self.logps(said)
            p = logps.sum().exp()
            if said in self.correct:
                first = first + p
            for corrected in self.correct:
                q = self.logps(corrected, [0, *said, 1]).sum().exp()
                second = second + p.detach() * q
        return first, second


def test_score_ascends_the_reward_of_each_turn():
    """Stage I: r2 by the second turn alone. Stage II: r1 by the first, too, r2 (1 + alpha) times.

    G = 2 pairs: 1 - 1/G is 1/2. A token weighs A / (|T| N), of N = 2 or 4 rollouts of 2 tokens.
    """
    toy = Turns(V=2, H=2, correct={(0, 1), (1, 1)}, rng_key=5)
    first, second = toy.turn_values()
    scalar = ascended(toy, lambda: methods.score_stage1(toy.task(base=2)), **BY_ROLLOUT)
    claimed = 0.5 / toy.H * second
    assert_close(gradient(toy.model, scalar), gradient(toy.model, claimed))

    first, second = toy.turn_values()
    scalar = ascended(toy, lambda: methods.score_stage2(toy.task(base=2)), **BY_ROLLOUT)
    claimed = 0.5 / toy.H / 2 * (first + (1 + methods.ALPHA) * second)
    assert_close(gradient(toy.model, scalar), gradient(toy.model, claimed))


# ------------------------------------------------------------------------------- advantages by hand


def answered(program, *rounds):
    """Plays the engine: sends each round's rollouts. Returns (all requests, the buffer)."""
    asked = []
    requests = program.send(None)
    for answers in rounds:
        asked.append(requests)
        try:
            requests = program.send(answers)
        except StopIteration as done:
            return asked, done.value
    raise AssertionError(f"the program still asks for {requests}")


def rollout_of(reward, tokens=(1, 1, 1), prefix_len=0, prompt_ids=(0,), purpose="base"):
    """A graded response of one-token thoughts."""
    return Rollout(
        problem=0,
        purpose=purpose,
        prompt_ids=list(prompt_ids),
        token_ids=list(tokens),
        logps=[-1.0] * len(tokens),
        thought_ends=list(range(1, len(tokens) + 1)),
        finish="thoughts",
        prefix_len=prefix_len,
        reward=float(reward),
    )


def toy_task(**changed):
    return Turns(V=2, H=3, correct=set()).task(**changed)


def test_vineppo_takes_differences_of_values(monkeypatch):
    def values(task, rollouts, purpose):
        yield from ()
        return [[0.25, 0.5, 0.0, 1.0]]

    monkeypatch.setattr(methods, "prefix_values", values)
    _, (rollout,) = answered(methods.vineppo(toy_task(base=1)), [[rollout_of(1)]])
    assert rollout.advantages == [0.25, -0.5, 1.0] and rollout.group == (0, 0)


@pytest.fixture
def small_tree(monkeypatch):
    """Three levels of two children, segments of one thought: 8 leaves."""
    monkeypatch.setattr(methods, "BRANCHES", (2, 2, 2))
    monkeypatch.setattr(methods, "SEGMENT", 1)


def test_spo_tree_by_hand(small_tree):
    """Rewards of the leaves, in order: 1 0 | 1 1 || 0 0 | 1 0. Values: .5 1 | 0 .5, .75 .25, .5."""
    a, b = rollout_of(1), rollout_of(0)
    a2, b2 = rollout_of(1, prefix_len=1), rollout_of(1, prefix_len=1)
    last = [rollout_of(reward, prefix_len=2) for reward in (0, 0, 1, 0)]
    a_last, b_last, a2_last, b2_last = last
    rounds = [[[a, b]], [[a2], [b2]], [[leaf] for leaf in last]]
    asked, buffer = answered(methods.spo_tree(toy_task()), *rounds)

    nodes = [[(request.seed, request.reset, request.n) for request in level] for level in asked]
    assert nodes[0] == [(None, None, 2)]
    assert nodes[1] == [(a, 2, 1), (b, 2, 1)]
    assert nodes[2] == [(a, 3, 1), (b, 3, 1), (a2, 3, 1), (b2, 3, 1)]
    assert [request.purpose for request in asked[2]] == ["segment"] * 4

    assert len(buffer) == 8 and all(leaf.group == (0, 0) for leaf in buffer)
    assert a.advantages == [0.25, -0.25, 0.5]
    assert a_last.advantages == [0, 0, -0.5]
    assert a2.advantages == [0, 0.25, 0]
    assert a2_last.advantages == [0, 0, 0]
    assert b.advantages == [-0.25, -0.25, 0]
    assert b_last.advantages == [0, 0, 0]
    assert b2.advantages == [0, 0.25, 0.5]
    assert b2_last.advantages == [0, 0, -0.5]

    # Every segment of the tree, 2 + 4 + 8, is trained in one rollout, all with the same say.
    items = weigh(buffer, settings(**BY_TOKEN))
    assert sum(sum(item.trained) for item in items) == 14
    for item in items:
        assert item.weights == pytest.approx([A / 14 for A in item.rollout.advantages])


def test_a_response_that_ends_early_is_one_child(small_tree):
    """The node's value is the mean of its children, and not of the leaves below them."""
    a, short = rollout_of(1, tokens=(1, 1)), rollout_of(0, tokens=(1,))
    a2 = rollout_of(0, prefix_len=1)
    a2_last = rollout_of(0, prefix_len=2)
    asked, buffer = answered(methods.spo_tree(toy_task()), [[a, short]], [[a2]], [[a2_last]])
    assert [request.seed for request in asked[1]] == [a]
    assert [request.seed for request in asked[2]] == [a2]
    assert short.advantages == [-0.25]  # (1 + 0) / 2 at the node of a, 1/4 at the prompt
    assert a.advantages == [0.25, 0.5]
    assert a2.advantages == [0, -0.5, 0]


def test_a_segment_without_room_has_no_sibling(small_tree):
    a, b = rollout_of(1), rollout_of(0)
    _, buffer = answered(methods.spo_tree(toy_task()), [[a, b]], [[], []], [[], []])
    assert buffer == [a, b]
    assert a.advantages == [0.5, 0, 0] and b.advantages == [-0.5, 0, 0]


def test_spo_tree_trains_what_was_generated_once(policy):
    """On the embedded policy: all generated tokens are trained, and no others."""
    programs = [methods.spo_tree(task) for task in policy.tasks(9, 3)]
    sampled = run_programs(programs, policy.engine)
    for buffer in sampled.results:
        assert len(buffer) == math.prod(methods.BRANCHES)
        set_advantages(buffer)
        for item in weigh(buffer, settings(**BY_TOKEN)):
            rollout = item.rollout
            assert sum(item.trained) == rollout.generated > 0
            assert not any(item.weights[: rollout.prefix_len])
            if rollout.seed is not None:
                assert rollout.prefix_len == rollout.seed.thought_ends[rollout.reset - 2]
    assert sum(map(len, sampled.results)) == len(sampled.generated)


def score_pairs(program):
    """Three pairs of rewards (1, 1), (0, 1), (0, 0), and one first turn that leaves no room."""
    firsts = [rollout_of(reward) for reward in (1, 0, 0, 1)]
    seconds = [rollout_of(reward, prompt_ids=(0, 1, 1, 1, 1)) for reward in (1, 1, 0)]
    return answered(program, [firsts], [[second] for second in seconds] + [[]])


def test_score_stage_1_by_hand():
    _, buffer = score_pairs(methods.score_stage1(toy_task()))
    found = [rollout.advantages for rollout in buffer]
    assert found == [pytest.approx([A] * 3) for A in (1 / 3, 1 / 3, -2 / 3)]
    assert all(rollout.prompt_ids == [0, 1, 1, 1, 1] for rollout in buffer)  # second turns only


def test_score_stage_2_by_hand():
    """Worths of the second turns: 1 + 10 (1 - 1) = 1, 1 + 10 (1 - 0) = 11, 0; their mean is 4."""
    asked, buffer = score_pairs(methods.score_stage2(toy_task()))
    assert [request.prompt_ids for request in asked[1]] == [[0, 1, 1, 1, 1]] * 4
    assert {request.seed for request in asked[1]} == {None}
    found = [rollout.advantages for rollout in buffer]
    expected = (2 / 3, -1 / 3, -1 / 3, -3, 7, -4)
    assert found == [pytest.approx([A] * 3) for A in expected]
    assert all(rollout.group == (0, 0) for rollout in buffer)
    set_advantages(buffer)  # keeps them, and does not mind the different prompts
    assert [rollout.advantages for rollout in buffer] == found


# ---------------------------------------------------------------- two turns through a chat template


@dataclass
class Talker:
    """An untrained model with a chat template, and tasks of short responses."""

    model: object
    tokenizer: object
    engine: HFEngine

    def tasks(self, n, **changed):
        """Tasks with rewards of our own: an untrained model earns none."""
        rng = np.random.default_rng(0)
        problems = [draw(rng, 1, 2).problem(i) for i in range(n)]
        for problem in problems:
            problem.grade = lambda text: float(len(text) % 3 == 0)
        numbers = dict(base=4, max_thoughts=3, max_tokens_per_thought=6, localize_tokens=9)
        return make_tasks(problems, self.engine, context=1024, **(numbers | changed))


@pytest.fixture(scope="module")
def talker(request):
    model, tokenizer = load_policy(request.getfixturevalue("folder"))
    return Talker(model, tokenizer, HFEngine(model, tokenizer))


def test_the_best_refinement_joins_the_base_group_off_policy(talker):
    tasks = talker.tasks(6)
    sampled = run_programs([methods.critique_grpo(task) for task in tasks], talker.engine)
    rollouts, refinements = [], []
    for task, buffer in zip(tasks, sampled.results):
        of_task = [r for r in sampled.generated if r.problem == task.problem.index]
        *base, best = buffer
        assert [r.purpose for r in base] == ["base"] * 4
        assert all(r.group == (task.slot, 0) for r in buffer)
        assert best.purpose == "refinement" and best.trained_prompt == task.prompt_ids

        n_failures = sum(task.failed(r) for r in base)
        critiques = [r for r in of_task if r.purpose == "critique"]
        tried = [r for r in of_task if r.purpose == "refinement"]
        assert len(critiques) == len(tried) == n_failures > 0
        assert best.reward == max(r.reward for r in tried)
        critique = critiques[tried.index(best)]
        said = critique.prompt_ids + critique.token_ids
        assert best.prompt_ids[: len(said)] == said
        turn = talker.tokenizer.decode(best.prompt_ids[len(said) :])
        assert methods.REFINE.strip() in turn and task.problem.question in turn
        rollouts += buffer
        refinements.append(best)

    set_advantages(rollouts)
    group = rollouts[:5]
    rewards = np.array([rollout.reward for rollout in group])
    expected = (rewards - rewards.mean()) / rewards.std()
    assert [rollout.advantages[0] for rollout in group] == pytest.approx(list(expected))

    items = weigh(rollouts, settings(**BY_ROLLOUT))
    for item in items:  # the refinement is trained whole, under the prompt of its group
        assert item.context == tuple(tasks[item.rollout.group[0]].prompt_ids)
        assert all(item.trained)
    n_tokens = sum(len(rollout.token_ids) for rollout in refinements)
    assert collate(items, talker.tokenizer.pad_token_id).chosen.off_policy.sum() == n_tokens
    sums = backward(talker.model, items, talker.tokenizer.pad_token_id, settings(**BY_ROLLOUT))
    assert sums.off_policy_tokens == n_tokens
    assert sums.gap_max < 1e-4  # sampler and trainer agree on all the others

    # With their log-probs taken for on-policy ones the gap would be wide.
    for rollout in refinements:
        rollout.prompt_ids, rollout.trained_prompt = rollout.trained_prompt, None
    wrong = backward(talker.model, items, talker.tokenizer.pad_token_id, settings(**BY_ROLLOUT))
    assert wrong.gap_max > 1e-2


def test_a_prompt_without_failures_is_plain_grpo(talker):
    (task,) = talker.tasks(1)
    base = [rollout_of(1), rollout_of(1)]
    asked, buffer = answered(methods.critique_grpo(task), [base], [], [])
    assert buffer == base and asked[1:] == [[], []]


def test_a_critique_reads_the_question_and_the_solution_but_no_answer(talker):
    (task,) = talker.tasks(1)
    task.problem.answer = "74656"
    ids = talker.tokenizer("I add.</thought> So \\boxed{9}</thought>")["input_ids"]
    solution = rollout_of(0, tokens=ids)
    solution.thought_ends = [len(ids)]
    read = talker.tokenizer.decode(methods.critique_prompt(task, solution))
    assert task.problem.question in read and "I add. So \\boxed{9}" in read
    assert "74656" not in read and "</thought>" not in read


def test_the_second_turn_follows_what_was_sampled(talker):
    """Prompt of the first turn, its token ids without the end-of-text, then the user's turn."""
    (task,) = talker.tasks(1)
    eos = talker.tokenizer.eos_token_id
    ended = rollout_of(0, tokens=[300, 301, eos], prompt_ids=task.prompt_ids)
    cut_off = rollout_of(0, tokens=[300, 301], prompt_ids=task.prompt_ids)
    program = methods.score_stage2(task)
    program.send(None)
    requests = program.send([[ended, cut_off]])
    assert requests[0].prompt_ids == requests[1].prompt_ids
    said = task.prompt_ids + [300, 301]
    assert requests[0].prompt_ids[: len(said)] == said
    turn = talker.tokenizer.decode(requests[0].prompt_ids[len(said) :])
    user = f"<|im_start|>user\n{methods.CORRECT}<|im_end|>\n<|im_start|>assistant\n"
    assert turn == "<|im_end|>\n" + user


@pytest.mark.parametrize("method", [methods.critique_grpo, methods.score_stage1])
def test_a_terse_policy_is_refused(policy, method):
    (task,) = policy.tasks(3, 1)
    with pytest.raises(UserError, match="cannot answer a second turn"):
        method(task).send(None)


# --------------------------------------------------------------------------------------- whole runs


def steps_of(out_dir):
    """The lines of metrics.jsonl after the one that measures the policy before training."""
    _, *lines = (out_dir / "metrics.jsonl").read_text().splitlines()
    return [SimpleNamespace(**json.loads(line)) for line in lines]


def run(method, out_dir, *flags):
    file = ROOT / "tests" / "methods.py"
    usual = "--engine hf --eval_problems 4 --eval_samples 1 --prompts_per_step 4".split()
    srpo.main(["--method", f"{file}:{method}", "--out_dir", str(out_dir), *usual, *flags])


@pytest.mark.parametrize(
    "method, purpose, flags",
    [
        ("vineppo", "value", "--base 3 --oracle_samples 2 --train_data chain-3"),
        ("spo_tree", "segment", "--length step --train_data chain-6"),
    ],
)
def test_two_steps_of_a_run(method, purpose, flags, tmp_path):
    run(method, tmp_path, "--steps", "2", "--eval_data", "chain-3", *flags.split())
    steps = steps_of(tmp_path)
    assert [line.step for line in steps] == [1, 2]
    for line in steps:
        assert line.tokens["base"] > 0 and line.tokens[purpose] > 0
        assert line.trained_tokens > 0 and line.gap_max < 1e-4


@pytest.mark.parametrize("method", ["critique_grpo", "score_stage2"])
def test_a_step_with_a_model_that_can_chat(method, folder, tmp_path):  # noqa: F811
    """The untrained model earns nothing: no group has variance, and no update is made."""
    data = "--steps 1 --train_data english-1-2 --eval_data english-1-2 --base 2"
    short = "--max_thoughts 2 --max_tokens_per_thought 5 --localize_tokens 9"
    run(method, tmp_path, "--model", str(folder), *data.split(), *short.split())
    (line,) = steps_of(tmp_path)
    purpose = {"critique_grpo": "refinement", "score_stage2": "second_turn"}[method]
    assert line.tokens["base"] > 0 and line.tokens[purpose] > 0
    assert line.counters["no_update"] == 1
