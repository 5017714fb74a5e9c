"""Boxes and integers, mathematics under its time limit, the chain task, and data files."""

import threading
import time

import pytest

from data import verifiers
from data.chains import chain_thoughts, generate_chains
from data.faults import UserError, counters
from data.problems import Problem, read_problems
from data.tasks import load_problems
from data.verifiers import DELIMITER, last_boxed


@pytest.mark.parametrize(
    "text, content",
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{ 42 }", "42"),
        (r"first \boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{}", r"\{"),
        (r"\boxed{a \boxed{b}}", r"a \boxed{b}"),
        (r"\boxed{1} and \boxed{2", "1"),
        (r"\boxed{1 and \boxed{2}", "2"),
        (r"\boxed{}", ""),
        ("no box", None),
        ("", None),
        (r"\boxed 7", None),
        (r"}} \boxed{3}", "3"),
        (r"\\boxed{5}", "5"),
        # Hostile: the time must not grow with the square of the length.
        ("\\boxed{" * 100_000, None),
        ("\\boxed{1}" * 50_000 + "{" * 50_000, "1"),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    "boxed, answer, reward",
    [
        ("42", "42", 1),
        ("+42", "42", 1),
        ("042", "42", 1),
        ("-7", "-7", 1),
        ("1,000", "1000", 1),
        ("1000", "1,000", 1),
        ("10,00", "1000", 0),
        ("43", "42", 0),
        ("42.0", "42", 0),
        ("", "42", 0),
        ("4 2", "42", 0),
        ("__import__('os')", "42", 0),
        ("6*7", "42", 0),
        ("٤٢", "42", 0),
        ("9" * 1001, "42", 0),
        ("4e1", "40", 0),
    ],
)
def test_integers(boxed, answer, reward):
    problem = Problem(0, "", answer, "integer")
    assert problem.grade(f"\\boxed{{{boxed}}}") == reward


@pytest.mark.parametrize(
    "boxed, answer, reward",
    [
        (r"\frac{1}{2}", "0.5", 1),
        (r"x^2+2x+1", "(x+1)^2", 1),
        (r"\sqrt{8}", r"2\sqrt{2}", 1),
        (r"\frac{1}{3}", "0.5", 0),
        (r"\{1,2\}", r"\{2,1\}", 1),
        ("", "2", 0),
    ],
)
def test_mathematics(boxed, answer, reward):
    problem = Problem(0, "", answer, "math")
    assert problem.grade(f"\\boxed{{{boxed}}}") == reward


def test_mathematics_ends_at_its_time_limit_on_another_thread():
    verifiers.grade_math("1", "1")  # starts the worker
    rewards = []

    def grade():
        rewards.append(verifiers.grade_math("10000000!", "5", seconds=1.0))

    start = time.time()
    thread = threading.Thread(target=grade)
    thread.start()
    thread.join(60)
    assert rewards == [0.0]
    assert time.time() - start < 60
    assert counters == {"math_timeout": 1}
    assert verifiers.grade_math("2", "2") == 1.0  # a killed worker is replaced


def test_unparsable_mathematics_is_a_counted_zero():
    assert verifiers.grade_math(r"\frac{", "2") == 0.0
    assert counters["math_unparsable"] == 1
    assert verifiers.grade_math("1" * 3000, "2") == 0.0
    assert counters["math_too_long"] == 1


def test_chain_truth():
    for problem in generate_chains(steps=9, n=50, seed=3):
        words = problem.question.split()  # mod97 1: +7 2: *3 ... start 41 .
        start = int(words[-2])
        operations = words[2:20:2]
        truth = chain_thoughts(start, operations)
        written = [f"{thought} {DELIMITER}" for thought in truth]
        assert problem.grade(" ".join(written)) == 1.0
        assert problem.check_steps(written) is None
        for i in range(9):
            *rest, value = written[i].removesuffix(DELIMITER).split()
            changed = list(written)
            changed[i] = " ".join([*rest, str((int(value) + 1) % 97)])
            assert problem.check_steps(changed) == i + 1
        assert problem.check_steps(written[:4]) == 4  # ends too early
        assert problem.check_steps([*written, "10: +2 = 5"]) == 11


def test_chains_are_a_function_of_the_seed():
    def questions(seed):
        return [problem.question for problem in generate_chains(12, 64, seed)]

    assert questions(5) == questions(5)
    assert not set(questions(5)) & set(questions(6))


GOOD_LINE = '{"question": "1+1", "answer": "2", "kind": "integer"}\n'


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("", "holds no problems"),
        ("\n\n", "holds no problems"),
        (GOOD_LINE + '{"question": ', "line 2: not JSON"),
        ('["a list"]', "line 1: not a JSON object"),
        ('{"question": "1+1", "kind": "integer"}', "line 1: field 'answer' is missing"),
        (
            '{"question": "", "answer": "2", "kind": "integer"}',
            "line 1: field 'question' is missing",
        ),
        ('{"question": "1+1", "answer": "2", "kind": "essay"}', "line 1: unknown kind 'essay'"),
        (
            '{"question": "1+1", "answer": "two", "kind": "integer"}',
            "line 1: answer 'two' is not an integer",
        ),
    ],
)
def test_bad_data_files(tmp_path, content, complaint):
    path = tmp_path / "problems.jsonl"
    path.write_text(content)
    with pytest.raises(UserError) as fault:
        load_problems(str(path), seed=0)
    message = str(fault.value)
    assert str(path) in message
    assert complaint in message
    assert "\n" not in message


def test_other_bad_sources(tmp_path):
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"question": "\xe9"}')
    complaints = {
        str(tmp_path / "none.jsonl"): "no such data file",
        str(latin): "not UTF-8",
        "chain-99": "1 to 24 steps",
    }
    for source, complaint in complaints.items():
        with pytest.raises(UserError, match=complaint):
            load_problems(source, seed=0)


def test_good_data_file(tmp_path):
    path = tmp_path / "problems.jsonl"
    half = '{"question": "half", "answer": "1/2", "kind": "math"}\n'
    path.write_text('{"question": "1+1", "answer": 2, "kind": "integer"}\n\n' + half)
    first, second = load_problems(str(path), seed=0)
    assert first.index == 0
    assert first.answer == "2"
    assert second.index == 1
    assert second.kind == "math"
    assert read_problems(path) == [first, second]
