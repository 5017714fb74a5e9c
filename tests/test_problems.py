"""Boxes and integers, mathematics under its time limit, the chain task, and data files."""

import gzip
import json
import os
import threading
import time
from pathlib import Path

import pytest

from data import prepare, verifiers
from data.chains import chain_thoughts, generate_chains
from data.faults import UserError, counters
from data.labelled import load_labelled, sample_labelled
from data.lines import write_lines
from data.problems import Problem, read_problems
from data.tasks import generate, load_problems
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


def record(answer, kind="integer"):
    """A line with this JSON as its answer."""
    return f'{{"question": "1+1", "answer": {answer}, "kind": "{kind}"}}\n'


def generated(origin):
    """A line with this JSON as its origin."""
    return record('"2"').replace('"kind"', f'"generated": {origin}, "kind"')


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
        (GOOD_LINE + "[" * 100_000, "line 2: nested too deeply"),
        (GOOD_LINE + '{"question": ' * 100_000, "line 2: nested too deeply"),
        (record("9" * 5_000), "line 1: holds an integer of too many digits"),
        (record(f'"{"9" * 5_000}"'), "line 1: answer '9999"),
        (record(f'"1 {"9" * 5_000}"', "integers"), "line 1: answer '1 999"),
        (record("27.0"), "line 1: answer '27.0' is not an integer"),
        (record('"3,4"'), "line 1: answer '3,4' is not an integer"),
        (record("1e999", "math"), "line 1: answer inf is neither a text nor a finite number"),
        (record("NaN", "math"), "line 1: answer nan is neither a text nor a finite number"),
        (record('["7"]', "math"), "line 1: answer ['7'] is neither a text nor a finite number"),
        (record('" "', "text"), "line 1: field 'answer' is missing or empty"),
        (record("null", "text"), "line 1: field 'answer' is missing or empty"),
        (record('"a\\ud800b"', "text"), "line 1: holds half a surrogate pair"),
        (record('"2"').replace("1+1", " "), "line 1: field 'question' is missing or empty"),
        (GOOD_LINE + '"\udcff"', "not UTF-8 text"),
        (GOOD_LINE + "\0", "line 2: not JSON"),
        (generated("[]"), "line 1: field 'generated' needs task"),
        (generated('{"task": "chain-3", "seed": 0}'), "line 1: field 'generated' needs task"),
        (
            generated('{"task": "chain-3", "seed": 0, "index": -1}'),
            "line 1: field 'generated' needs task",
        ),
        (
            generated('{"task": "chain-3", "seed": true, "index": 1}'),
            "line 1: field 'generated' needs task",
        ),
        (
            generated('{"task": "chain-3", "seed": 0, "index": 1}'),
            "problem 1 is not number 1 of chain-3 with seed 0",
        ),
        (
            generated('{"task": "chain-3", "seed": 0, "index": 99999}'),
            "problem 1 is not number 99999 of chain-3",
        ),
        (
            generated('{"task": "problems.jsonl", "seed": 0, "index": 0}'),
            "problem 1 is not number 0 of problems.jsonl",
        ),
        (generated('{"task": "chain-99", "seed": 0, "index": 0}'), "chains of 1 to 24 steps"),
    ],
)
def test_bad_data_files(tmp_path, content, complaint):
    path = tmp_path / "problems.jsonl"
    path.write_text(content, errors="surrogateescape")
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
        "chain-" + "9" * 5_000: "no such data file",
        "english-" + "9" * 5_000: "no such data file",
        str(tmp_path): "no such data file",
        "x" * 300: "no such data file",
        "": "no such data file",
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


def test_a_generated_problem_in_a_file_keeps_its_step_checker(tmp_path):
    """Also where the file mixes tasks, drops problems and has some of its own."""
    chosen = [*generate("chain-4", 7)[3:9:2], *generate("english-2-4", 8)[5:7]]
    own = Problem(0, "1+1", "2", "integer")
    path = tmp_path / "mixed.jsonl"
    write_lines(path, [problem.to_json() for problem in [*chosen, own]])
    *loaded, last = load_problems(str(path), seed=99)
    assert [problem.index for problem in loaded] == [0, 1, 2, 3, 4]
    assert last.check_steps is None and last.origin is None
    for problem, original in zip(loaded, chosen, strict=True):
        assert problem.to_json() == original.to_json()
        assert problem.check_steps(["so it is 5 = 6"]) == original.check_steps(["so it is 5 = 6"])
        assert problem.check_steps(["no"]) is not None
    write_lines(path, [problem.to_json() for problem in loaded])
    assert [p.to_json() for p in load_problems(str(path), seed=1)] == [p.to_json() for p in chosen]


BREAKS = "a\u2028b\u2029c\u0085d\x1ce\x0cf"


def test_a_line_ends_at_a_line_feed_only(tmp_path):
    """str.splitlines() would cut these texts, which public files hold."""
    written = [Problem(0, BREAKS, BREAKS, "text"), Problem(1, "1+1", "2", "integer")]
    path = tmp_path / "problems.jsonl"
    write_lines(path, [problem.to_json() for problem in written])
    assert BREAKS[:2] in path.read_text()  # as it is, not escaped
    assert read_problems(path) == written
    solution = {"question": BREAKS, "steps": [BREAKS], "label": -1}
    write_lines(path, [solution])
    assert load_labelled(str(path)) == [solution]
    solved = {"question": BREAKS, "answer": "so\n#### 7"}
    path.write_text(json.dumps(solved, ensure_ascii=False) + "\n")
    prepare.main(["gsm8k", "--from", str(path), "--out", str(tmp_path / "out")])
    (problem,) = read_problems(tmp_path / "out" / "gsm8k.jsonl")
    assert problem.question == BREAKS


def test_byte_order_marks_and_other_line_ends(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD_LINE.encode().replace(b"\n", b"\r\n") * 2)
    assert [problem.answer for problem in read_problems(path)] == ["2", "2"]
    path.write_text(GOOD_LINE, encoding="utf-16")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_problems(path)


def test_numbers_as_answers(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(record("27.0", "math") + record("27") + record("true", "yes_no"))
    assert [problem.answer for problem in read_problems(path)] == ["27.0", "27", "True"]


FOREIGN = {  # local copies that are damaged, or of another layout
    "one.json": b'{"question": "q"',
    "deep.json": b"[" * 100_000,
    "cut.json.gz": gzip.compress(b'[{"question": "q"}]')[:-9],
    "plain.json.gz": b"[]",
    "latin.jsonl": b'{"question": "\xe9"}',
    "half.jsonl": b'{"question": "\\ud800", "answer": "#### 1"}',
    "long.jsonl": b'{"question": "q", "answer": ' + b"9" * 5_000 + b"}",
    "list.jsonl": b"[1]",
    "number.json": b"[1, 2]",
    "empty.jsonl": b"",
    "unanswered.jsonl": b'{"question": "q", "answer": "####"}',
}


@pytest.mark.parametrize("name", FOREIGN)
def test_prepare_refuses_what_it_cannot_read(tmp_path, name):
    (tmp_path / name).write_bytes(FOREIGN[name])
    with pytest.raises(UserError) as fault:
        prepare.main(["gsm8k", "--from", str(tmp_path / name), "--out", str(tmp_path / "out")])
    assert "\n" not in str(fault.value)
    assert not (tmp_path / "out").exists()


def test_prepare_refuses_a_place_that_it_cannot_write_first(monkeypatch):
    monkeypatch.delattr(prepare, "download")
    with pytest.raises(UserError, match="cannot write to /dev/null"):
        prepare.main(["gsm8k", "--out", "/dev/null"])


DATA = Path(os.environ.get("SRPO_DATA", "nowhere"))


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the public files that SRPO_DATA names")
def test_every_real_record_is_read(tmp_path):
    """A real record of gsm8k has a line separator in its question."""
    records = prepare.read_local(DATA / "gsm8k" / "train.jsonl")
    assert len(records) == 7473
    (problems,) = prepare.convert("gsm8k_train", records).values()
    write_lines(tmp_path / "p.jsonl", problems)
    read = [problem.question for problem in read_problems(tmp_path / "p.jsonl")]
    assert read == [problem["question"] for problem in problems]
    assert any("\u2028" in question for question in read)
    records = prepare.read_local(DATA / "processbench" / "gsm8k.json")
    (solutions,) = prepare.convert("processbench", records).values()
    write_lines(tmp_path / "p.jsonl", solutions)
    solutions = load_labelled(str(tmp_path / "p.jsonl"))
    drawn = sample_labelled(solutions, 40, seed=0)
    erroneous = [sum(s["label"] >= 0 for s in some) for some in (solutions, solutions[:40], drawn)]
    assert len(solutions) == 400
    assert erroneous[1] == 40  # the file is sorted
    assert abs(erroneous[2] - erroneous[0] / 10) <= 0.5


def test_an_error_is_one_line_whatever_it_quotes():
    assert str(UserError("a\nb: no such file")) == "a\\nb: no such file"
    with pytest.raises(UserError, match=r"^a\\nb: no such data file"):
        load_problems("a\nb", seed=0)
