"""The embedded policy and its task: no reward by luck, a box that copies, a card with its figures.

Try it alone:  python -m pytest -q tests/test_policy.py
"""

import pytest

from conftest import POLICY
from data.build_policy import (
    PROBLEMS,
    ROWS,
    Judged,
    Student,
    build_tokenizer,
    copies_its_values,
)
from data.chains import OPERATIONS, chain_problem, chain_thoughts, generate_chains
from data.driver import run_programs
from data.problems import check_record
from data.verifiers import DELIMITER, KINDS
from rollout import grpo, make_tasks

STEPS = 4
SAMPLES = 8


@pytest.fixture(scope="module")
def judged(policy):
    """Sampled responses to short chains, with the truth about them."""
    problems = generate_chains(steps=STEPS, n=128, seed=11)
    tasks = make_tasks(problems, policy.engine, context=384, base=SAMPLES)
    groups = run_programs([grpo(task) for task in tasks], policy.engine).results
    found = []
    for task, group in zip(tasks, groups):
        for rollout in group:
            thoughts = rollout.thoughts(policy.tokenizer)
            found.append(
                Judged(task, rollout, task.first_wrong(rollout), copies_its_values(thoughts))
            )
    return found


def test_a_reward_means_that_every_step_is_right(judged):
    rewarded = [j for j in judged if j.rollout.reward == 1]
    wrong = [j for j in judged if j.first_wrong is not None]
    assert len(rewarded) > 100 and len(wrong) > 100  # the sample has both
    assert all(j.first_wrong is None for j in rewarded)
    assert all(j.rollout.reward == 0 for j in wrong)


def test_boxes_copy_the_values_of_their_own_steps(judged):
    copied = sum(j.copied for j in judged)
    assert copied > 0.98 * len(judged)


def test_copies_its_values():
    right = chain_thoughts(41, ["+7", "*3"])
    assert copies_its_values(right)
    assert copies_its_values([f"{thought} {DELIMITER}" for thought in right])
    assert copies_its_values(["1: +7 = 5", "2: *3 = 6", "\\boxed{ 5 6 }"])  # wrong, but its own
    assert not copies_its_values(["1: +7 = 5", "2: *3 = 6", "\\boxed{ 6 5 }"])
    assert not copies_its_values(["1: +7 = 5", "2: *3 = 6"])
    assert not copies_its_values([DELIMITER, "\\boxed{ 5 }"])


@pytest.mark.parametrize(
    "boxed, reward",
    [
        ("48 47 42", 1),
        ("48, 47, 42", 1),
        ("+48,47,042", 1),
        ("47 48 42", 0),  # wrong order
        ("48 47", 0),  # a value is missing
        ("48 47 42 42", 0),  # one too many
        ("48 47 43", 0),
        ("484742", 0),
        ("forty-eight 47 42", 0),
        ("48 47 42 done", 0),
        ("48; 47; 42", 0),
        ("48 47 4²", 0),
        (",", 0),
        ("", 0),
    ],
)
def test_lists_of_integers(boxed, reward):
    assert KINDS["integers"].grade(f"\\boxed{{{boxed}}}", "48 47 42") == reward


@pytest.mark.parametrize("answer", ["48 47 42", "7", "-1, +2"])
def test_references_that_are_lists_of_integers(answer):
    assert check_record({"question": "?", "kind": "integers", "answer": answer}) is None


@pytest.mark.parametrize("answer", ["48 x", "1.5", ","])
def test_references_that_are_not(answer):
    complaint = check_record({"question": "?", "kind": "integers", "answer": answer})
    assert "not a list of integers" in complaint


def test_a_wrong_box_is_a_wrong_last_thought():
    problem = chain_problem(0, 41, ["+7", "*3"])
    right = chain_thoughts(41, ["+7", "*3"])
    assert problem.answer == "48 47"
    assert problem.check_steps(right) is None
    for box in ("\\boxed{ 47 48 }", "\\boxed{ 47 }", "\\boxed{ 48 47 47 }"):
        assert problem.check_steps([*right[:2], box]) == 3


def test_a_second_error_that_cancels_the_first_earns_nothing():
    problem = chain_problem(0, 41, ["+7", "*3", "-5"])
    thoughts = ["1: +7 = 49", "2: *3 = 47", "3: -5 = 42", "\\boxed{ 49 47 42 }"]
    assert problem.grade(f"{DELIMITER} ".join(thoughts)) == 0
    assert problem.check_steps(thoughts) == 1


def test_the_corpus_is_written_as_the_task_is():
    """A chain of the corpus reads as its problem does, and its review names the first wrong step.

    Quotations train the values that the box and the review repeat, and nothing else."""
    tokenizer = build_tokenizer()
    student = Student(tokenizer, seed=0)
    chains = student.draw(B=8, K=5)
    solution, review = student.solution(chains), student.review(chains)
    for b in range(8):
        operations = [OPERATIONS[i] for i in chains.operations[b]]
        problem = chain_problem(0, int(chains.start[b]), operations)
        text = tokenizer.decode(solution.ids[b])
        question, response = text.split(" . ", 1)
        assert f"{question} ." == problem.question
        thoughts = response.split(DELIMITER)[:-1]
        assert copies_its_values(thoughts)
        first_wrong = problem.check_steps(thoughts)
        if first_wrong:
            shown = tokenizer.decode(review.ids[b][review.mask[b]])
            assert shown.endswith(f"wrong \\boxed{{ {first_wrong} }} <eos>")


def test_quotations_train_the_repeated_values():
    tokenizer = build_tokenizer()
    quotations = Student(tokenizer, seed=0).quotations(B=3, K=4)
    for ids, mask in zip(quotations.ids, quotations.mask):
        words = tokenizer.decode(ids).split()
        box = words.index("\\boxed{")
        values = words[box + 1 : box + 5]
        assert tokenizer.decode(ids[mask]).split() == values + values


def test_the_card_has_its_figures():
    card = (POLICY / "README.md").read_text()
    rows = {}
    for line in card.splitlines():
        if line.startswith("| "):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[name] = cells
    assert rows["measure"] == [f"chain-{steps}" for steps in PROBLEMS]
    figures = {}
    for key, text in ROWS.items():
        figures[key] = [float(cell) for cell in rows[text]]
    assert 0.02 <= figures["pass_rate"][-1] <= 0.06
    assert min(figures["localization_exact"]) >= 0.6
    assert sum(figures["wrong"]) >= 6000
    assert sum(figures["lucky"]) == 0
    assert "Wilson's 95% interval" in card
