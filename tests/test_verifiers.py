"""Verifiers and public sets: real and hostile answers, every set's layout, real references.

The tests at the end need copies of the public files (see `real`).
"""

import base64
import json
import os
import pickle
import sys
import zlib
from pathlib import Path

import pytest

from conftest import needs_sandbox
from data import prepare, verifiers
from data.faults import UserError, counters
from data.policies import encode_question
from data.prepare import SETS, convert, half, main, verifiable
from data.problems import Problem
from data.tasks import load_problems
from data.verifiers import KINDS, check_machine


@pytest.mark.parametrize(
    "kind, answer, right, wrong",
    [
        (
            "choice",
            "B",
            [
                "B",
                "b",
                "(B)",
                "(b).",
                r"\text{B}",
                r"\mathrm{(B)}",
                "B.",
                "B. bank",
                "B) bank",
                "(B) a bank",
                "Option B",
                "choice: B",
                "$B$",
                "B: bank, not A",
                "b) a bank",
                "B. George W. Bush",
                "B. Washington, D.C.",
                "B. CC(C)Cc1ccccc1",
                "B. x",
                "\\text{" * 9 + "B" + "}" * 9,
            ],
            [
                "A",
                "C",
                "",
                "AB",
                "A or B",
                "B, C, and D",
                "B, C or D",
                "B vs C",
                "b, c, d",
                "(b), (c)",
                "B. 5, C. 6",
                "not B",
                "bank",
                "both",
                "B or C",
                r"\text{C}",
                "(A) B",
                "Blue",
                "Z",
                "1",
                "B" * 600,
                "\\text{" * 9000 + "B" + "}" * 9000,
            ],
        ),
        (
            "yes_no",
            "yes",
            [
                "yes",
                "Yes",
                "YES.",
                r"\text{Yes}",
                "true",
                r"\textbf{True}",
                "$yes$",
                "Yes, because 7 is prime",
                "Yes (by induction)",
                "Yes – by induction",
                "Yes!",
            ],
            [
                "no",
                "",
                "maybe",
                "yes and no",
                "not yes",
                "yesno",
                "1",
                "no, yes",
                "Yes, no",
                "yes or maybe",
                "It depends, yes",
                "yes-man",
                "No, because 7 is prime",
            ],
        ),
        ("yes_no", "no", ["No", "false", r"\text{no}."], ["yes", "not", "none", "True"]),
        (
            "text",
            "2 H2 + O2 = 2 H2O",
            [
                "2 H2 + O2 = 2 H2O",
                "2 h2 + o2 = 2 h2o.",
                "2 H2  +  O2 = 2 H2O (balanced)",
                r"\text{2 H2 + O2 = 2 H2O}",
                r"2 H_2 + O_{2} = 2 H_2O",
                r"2H_2 + O_2 \rightarrow 2H_2O",
                "2H₂ + O₂ → 2H₂O",
                r"\ce{2H2 + O2 -> 2H2O}",
                r"2\,\text{H}_2 + \text{O}_2 = 2\,\text{H}_2\text{O}",
            ],
            [
                "",
                "H2 + O2 = H2O",
                "12 H2 + O2 = 2 H2O",
                r"2H_2 + O_2 \rightarrow H_2O",
                "H2O -> 2 H2 + O2",
                "2 H2 + O2 = 2 H2O2",
                "2 H2 + O2",
                "2 H2 + O2 = 2 H2O + CO2",
                "-2 H2 + O2 = 2 H2O",
                "4 2 H2 + O2 = 2 H2O",
                "x " * 200 + "2 H2 + O2 = 2 H2O",
            ],
        ),
        (
            "math",
            r"\frac{1}{2}",
            ["0.5", r"\frac12", "1/2", r"\dfrac{2}{4}"],
            ["2", "0.51", "", "1/2 + 1", r"\frac{1}{3}", "x"],
        ),
        ("math", r"3:00 \text{ AM}", [r"3:00 \text{ a.m.}"], [r"3:00 \text{ PM}"]),
        (
            "math",
            "5",
            [
                "5 apples",
                r"5 \text{ cm}",
                r"5^\circ",
                "=5",
                "€5",
                r"\boldsymbol{5}",
                r"\text{5 apples}",
            ],
            [
                "=6",
                r"\boldsymbol{6}",
                r"\text{5 million}",
                r"\text{5 or 6}",
                "5 thousands",
                r"5 \text{ trillion}",
                "5 tenths",
                "5 squared",
                r"5^\circ 30'",
            ],
        ),
        (
            "math",
            r"\begin{pmatrix} 1/2 \\ 3 \end{pmatrix}",
            [r"\begin{pmatrix} \frac{1}{2} \\[6pt] 3 \end{pmatrix}"],
            [r"\begin{pmatrix} \frac{1}{2} \\[6pt] 6 \end{pmatrix}"],
        ),
        ("math", r"3\sqrt{13}", [r"\mathbf{3\sqrt{13}}"], [r"\mathbf{3}\mathbf{13}"]),
        (
            "math",
            "(3, -2)",
            [r"\bigl(3,-2\bigr)", "(3,-2)", r"\left(3, -2\right)"],
            ["(-2, 3)", "3", "(3, 2)"],
        ),
        ("math", r"\frac \pi4", [r"\frac\pi4", r"\frac{\pi}4"], [r"\frac4\pi", r"\frac{4}\pi"]),
        (
            "math",
            r"\frac{20000}{3}",
            [r"\frac{20{,}000}{3}", r"\frac{20,000}{3}"],
            [r"\frac{20}{3}", r"\frac{20,00}{3}"],
        ),
        ("math", "0.125", ["0{,}125", r"\frac18"], ["125", "0125"]),
        ("math", r"16 \text{ oz}", ["16", "16 ounces"], [r"16 \text{ lb}", "16 pounds", "16 l"]),
        # Products, not millilitres and pounds.
        (
            "math",
            r"\frac{1}{12} m l^2",
            [r"\frac{1}{12}ml^2", r"\frac{ml^2}{12}"],
            [r"\frac{1}{12}"],
        ),
        ("math", "2lb", ["2bl", "2 l b"], ["2"]),
        ("math", r"\frac{1}{20000}", [r"\frac{1}{20,000}", "0.00005"], [r"\frac{1}{20}"]),
        ("integer", "72", ["72", "+72", "072"], ["73", "72.0", "7 2", "seventy-two"]),
        (
            "integer",
            "10000",
            ["10,000", r"10\,000", "10{,}000"],
            [r"10\,00", r"10\,0000", "1,0000", r"1^\circ 0000"],
        ),
        (
            "integers",
            "48 -50 42",
            ["48 -50 42", "48,-50, 42", "048 -50 +42", "[48, -50, 42]", r"\{48, -50, 42\}."],
            [
                "48 50 42",
                "[48] -50 42",
                "(48 -50 42",
                "-50 48 42",
                "48 -50",
                "48 -50 42 1",
                "48 -50 42.0",
                "",
                "1" * 2000,
            ],
        ),
        ("integers", "5 100 7", ["5, 100, 7", r"5\,100\,7", "5{,}100{,}7"], ["5100 7"]),
    ],
)
def test_answers(kind, answer, right, wrong):
    problem = Problem(0, "?", answer, kind)
    for said in right:
        assert problem.grade(f"thus </thought> \\boxed{{{said}}}") == 1, said
    for said in wrong:
        assert problem.grade(f"\\boxed{{{answer}}} no: \\boxed{{{said}}}") == 0, said
    assert problem.grade(answer) == 0
    assert counters["no_box"]


DOUBLE = {"stdin": [["2", "4"], ["3", "6"]]}


@pytest.mark.parametrize(
    "response, reward",
    [
        ("so</thought>\n```python\nprint(2 * int(input()))\n```", 1),
        ("```py\nprint(4)\n```</thought>", 0.5),
        ("```python\nprint(4)\n```\nbetter:\n```python\nprint(2 * int(input()))\n```", 1),
        ("```\nprint(2 * int(input()))\n```", 1),
        ("Sample:\n```text\n3\n```\nSo:\n```python\nprint(2 * int(input()))\n```", 1),
        ("```python3\r\nprint(2 * int(input()))\r\n```", 1),
        ("1. so\n   ```Python\n   print(2 * int(input()))\n   ```", 1),
        ("```python\nprint(2 * int(input()))\n```\nOutput:\n```\n4\n```", 1),
        ('```python\nfence = "```"\nprint(2 * int(input()))\n```', 1),
        ("So.</thought>```python\nprint(2 * int(input()))\n```", 1),
        ("Here it is: ```python\nprint(2 * int(input()))```", 1),
        ("- ```python\n  print(2 * int(input()))\n  ```", 1),
        ("Code: ```python\nprint(4)\n```\ntext\n```python\nprint(2 * int(input()))\n```", 1),
        ("I write ``` here.\n```python\nprint(2 * int(input()))\n```", 1),
        ("Call `int` or ```input``` in:\n```python\nprint(2 * int(input()))\n```", 1),
        ("print(2 * int(input()))", 0),
        ("```python\nprint(2 * int(input()))", 0),
        ("```python\n```", 0),
    ],
)
@needs_sandbox
def test_programs_in_responses(response, reward):
    assert Problem(0, "?", "", "code", tests=DOUBLE).grade(response) == reward


def test_what_holds_an_answer():
    for name, kind in KINDS.items():
        assert not kind.answered("no answer here, \\boxed{1")
        assert kind.answered("\\boxed{1}") == (name != "code")
        assert kind.answered("```python\nprint(") == (name == "code")


def test_slow_kinds_wait_for_another_process():
    slow = [name for name in KINDS if Problem(0, "?", "", name).slow]
    assert slow == ["math", "code"]


@needs_sandbox
def test_only_code_asks_something_of_the_machine(monkeypatch):
    others = [Problem(0, "?", "1", name) for name in KINDS if name != "code"]
    code = Problem(0, "?", "", "code", tests=DOUBLE)
    assert "bubblewrap" in check_machine([*others, code])

    def refuse():
        raise OSError("no sandbox for abacus")

    monkeypatch.setattr(verifiers, "isolation", refuse)
    assert check_machine(others) is None
    with pytest.raises(UserError, match="kind code cannot be graded .* no sandbox for abacus"):
        check_machine([*others, code])


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"question": "q", "answer": "BC", "kind": "choice"}', "answer 'BC' is not a letter"),
        ('{"question": "q", "answer": "maybe", "kind": "yes_no"}', "is not yes, no, true or false"),
        ('{"question": "q", "kind": "code"}', "field 'tests' of a code problem"),
        (
            '{"question": "q", "kind": "code", "tests": {"call": "f"}}',
            "field 'tests' of a code problem",
        ),
        ('{"question": "q", "answer": "", "kind": "text"}', "field 'answer' is missing"),
        ('{"question": "q", "answer": "1", "kind": "steps"}', "unknown kind 'steps'"),
    ],
)
def test_records_that_cannot_be_graded_are_refused(tmp_path, line, complaint):
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match="line 1: .*" + complaint):
        load_problems(str(tmp_path / "p.jsonl"), seed=0)


class Words:
    """A tokenizer that keeps the text."""

    chat_template = None
    added_tokens_decoder = {}
    unk_token_id = None

    def convert_tokens_to_ids(self, token):
        return None

    def __call__(self, text):
        return {"input_ids": [text]}


def test_prompts_ask_for_what_the_verifier_reads():
    prompts = {}
    for kind in KINDS:
        prompts[kind] = encode_question(Words(), Problem(0, "Q?", "", kind))[0]
        assert "Q?" in prompts[kind]
        assert "</thought>" in prompts[kind]
        assert prompts[kind].endswith(KINDS[kind].ending)
    assert r"\boxed{}" in prompts["math"]
    assert "letter" in prompts["choice"]
    assert "yes or no" in prompts["yes_no"]
    assert "```python" in prompts["code"]
    assert "boxed" not in prompts["code"]


# --------------------------------------------------------------------------------------- the sets

CASES = [{"input": "1", "output": "2"}, {"input": "3", "output": "6"}]


def as_private(tests):
    """Private tests as LiveCodeBench stores them: pickled, compressed, in base 64."""
    return base64.b64encode(zlib.compress(pickle.dumps(tests))).decode()


LCB = {
    "difficulty": "medium",
    "question_content": "Double it.",
    "starter_code": "",
    "metadata": "{}",
    "private_test_cases": as_private(json.dumps(CASES)),
}
# One record in each set's own layout: (set, record, answer of the problem, its kind).
RECORDS = [
    ("gsm8k", {"question": "q", "answer": "1 + 1 = <<1+1=2>>2\n#### 1,002"}, "1002", "math"),
    ("math500", {"problem": "q", "answer": r"\frac12", "solution": "s"}, r"\frac12", "math"),
    ("math_level5", {"problem": "q", "level": "Level 5", "solution": r"so \boxed{7}"}, "7", "math"),
    (
        "numinamath_olympiads",
        {"problem": "q", "source": "olympiads", "solution": r"\boxed{7}"},
        "7",
        "math",
    ),
    (
        "olympiadbench",
        {"question": "q", "context": None, "unit": "cm", "final_answer": [r"$1$,$\sqrt{2}$."]},
        r"1, \sqrt{2}",
        "math",
    ),
    ("aime25", {"problem": "q", "answer": 204}, "204", "math"),
    (
        "theoremqa",
        {"Question": "q", "Answer": "True", "Answer_type": "bool", "Picture": None},
        "yes",
        "yes_no",
    ),
    ("theoremqa", {"Question": "q", "Answer": "(c)", "Answer_type": "option"}, "C", "choice"),
    (
        "theoremqa",
        {"Question": "q", "Answer": "[0.5, 2]", "Answer_type": "list of float"},
        "(0.5, 2)",
        "math",
    ),
    (
        "csqa",
        {"question": "q", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"},
        "B",
        "choice",
    ),
    (
        "csqa",
        {"question": {"stem": "q", "choices": [{"label": "A", "text": "x"}]}, "answerKey": "A"},
        "A",
        "choice",
    ),
    ("strategyqa", {"question": "q", "answer": False}, "no", "yes_no"),
    ("strategyqa", {"question": "q", "answer": True}, "yes", "yes_no"),
    (
        "sciknoweval_physics",
        {
            "domain": "Physics",
            "details": {"level": "L3"},
            "question": "q",
            "choices": {"text": ["x"], "label": ["A"]},
            "answerKey": "A",
            "type": "mcq-4-choices",
        },
        "A",
        "choice",
    ),
    (
        "sciknoweval_physics",
        {
            "domain": "Physics",
            "details": {"level": "L3"},
            "question": "q",
            "choices": {"text": []},
            "answer": "No",
            "type": "true_or_false",
        },
        "no",
        "yes_no",
    ),
    (
        "sciknoweval_physics",
        {
            "domain": "Physics",
            "details": {"level": "L3"},
            "question": "q",
            "choices": {"text": []},
            "answer": "E = m",
            "type": "filling",
        },
        "E = m",
        "text",
    ),
    (
        "humaneval",
        {
            "prompt": "def f(x):\n    '''doubles'''\n",
            "entry_point": "f",
            "test": "def check(c):\n    assert c(2) == 4",
            "canonical_solution": "    return 2 * x\n",
        },
        None,
        "code",
    ),
    ("livecodebench_medium", LCB, None, "code"),
    ("processbench", {"problem": "q", "steps": ["a", "b"], "label": 1}, "", "steps"),
]
OF_NO_USE = [  # records that are no problem of the set
    ("math_level5", {"problem": "q", "level": "Level 4", "solution": r"\boxed{7}"}),
    ("numinamath_olympiads", {"problem": "q", "source": "cn_k12", "solution": r"\boxed{7}"}),
    (
        "numinamath_olympiads",
        {"problem": "q", "source": "olympiads", "solution": r"\boxed{\text{all}}"},
    ),
    ("numinamath_olympiads", {"problem": "q", "source": "olympiads", "solution": "none"}),
    ("theoremqa", {"Question": "q", "Answer": "1", "Answer_type": "integer", "Picture": "png"}),
    ("sciknoweval_physics", {"domain": "Biology", "details": {"level": "L3"}}),
    ("sciknoweval_physics", {"domain": "Physics", "details": {"level": "L2"}}),
    ("livecodebench_medium", LCB | {"difficulty": "hard"}),
]


@pytest.mark.parametrize("name, record, answer, kind", RECORDS)
def test_layouts(name, record, answer, kind):
    converted = SETS[name].convert(record)
    assert converted["kind"] == kind
    assert converted.get("answer") == answer
    if kind == "choice":
        assert "q" in converted["question"]


@pytest.mark.parametrize("name, record", OF_NO_USE)
def test_records_that_are_dropped(name, record):
    assert SETS[name].convert(record) is None


def test_livecodebench_tests_are_halved_and_never_executed():
    parts = convert("livecodebench_medium", [LCB])
    train = parts["train"][0]["tests"]["stdin"]
    test = parts["test"][0]["tests"]["stdin"]
    assert sorted(train + test) == [["1", "2"], ["3", "6"]]
    assert len(train) == 1
    assert half({"stdin": [["1", "2"]]}, 1) == {"stdin": [["1", "2"]]}
    evil = LCB | {"private_test_cases": as_private(print)}
    with pytest.raises(UserError, match="hold builtins.print"):
        SETS["livecodebench_medium"].convert(evil)
    of_a_function = {
        "metadata": '{"func_name": "f"}',
        "private_test_cases": '[{"input": "[1, 2]\\n3", "output": "true"}]',
    }
    converted = SETS["livecodebench_medium"].convert(LCB | of_a_function)
    assert converted["tests"] == {"call": "f", "cases": [[[[1, 2], 3], True]]}


def test_samples_are_seeded_and_split_without_overlap():
    records = []
    for i in range(700):
        record = {"problem": f"q{i}", "source": "olympiads", "solution": rf"\boxed{{{i}}}"}
        records.append(record)
    parts = convert("numinamath_olympiads", records)
    assert parts == convert("numinamath_olympiads", records)
    train = {p["question"] for p in parts["train"]}
    test = {p["question"] for p in parts["test"]}
    assert len(train) == 400
    assert len(test) == 100
    assert not train & test
    assert parts["train"][0]["question"] != "q0"  # shuffled


@pytest.mark.parametrize(
    "answer, kept",
    [
        (r"\frac{3}{4}", True),
        ("B", True),
        ("(C)", True),
        (r"2\sqrt{3}", True),
        ("x + y", False),
        ("12 cm", False),
        ("50%", False),
        ("all even n", False),
        (r"\frac{3}{4", False),
        (r"\text{2}", False),
        ("1" * 61, False),
        ("", False),
        ("F", False),
    ],
)
def test_the_papers_filter_of_answers(answer, kept):
    assert verifiable(answer) is kept


def refused(*argv):
    """The message with which the command refuses its arguments."""
    with pytest.raises(UserError) as fault:
        main([str(argument) for argument in argv])
    assert "\n" not in str(fault.value)
    return str(fault.value)


def test_the_command(tmp_path, capsys, monkeypatch):
    source = tmp_path / "raw.jsonl"
    out = tmp_path / "out"
    records = [{"question": f"q{i}", "answer": f"so\n#### {i}"} for i in range(5)]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    main(["gsm8k", "--from", str(source), "--out", str(out)])
    verdict = "5 problems of 5 records; 5 of 5 reference answers pass their own verifier (100.00%)"
    assert verdict in capsys.readouterr().out
    answers = [p.answer for p in load_problems(str(out / "gsm8k.jsonl"), seed=0)]
    assert answers == ["0", "1", "2", "3", "4"]
    assert [path.name for path in out.iterdir()] == ["gsm8k.jsonl"]

    main(["--list"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in SETS)

    no = tmp_path / "no"
    assert "not a set that is known here" in refused("gsm9k")
    complaint = refused("gsm8k", "--from", out / "gsm8k.jsonl", "--out", no)
    assert "not in the layout of openai/gsm8k" in complaint
    assert "cannot be read" in refused("gsm8k", "--from", tmp_path / "none.jsonl")
    assert "name one" in refused("gsm8k", "math500", "--from", source)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    assert "pip install datasets" in refused("gsm8k", "--out", no)

    def no_isolation():
        raise OSError("no sandbox for abacus")

    monkeypatch.setattr(verifiers, "isolation", no_isolation)
    (record,) = [layout[1] for layout in RECORDS if layout[0] == "humaneval"]
    source.write_text(json.dumps(record) + "\n")
    assert "no sandbox for abacus" in refused("humaneval", "--from", source, "--out", no)
    assert not no.exists()


# -------------------------------------------------------------------------------- the real records

DATA = Path(os.environ.get("SRPO_DATA", "nowhere"))
real = pytest.mark.skipif(
    not DATA.is_dir(),
    reason="needs copies of the public files, in the folder that SRPO_DATA names; "
    "the repository does not hold them",
)
FILES = {
    "gsm8k": "gsm8k/test.jsonl",
    "math500": "math500/test.jsonl",
    "math_level5": "math/test.jsonl",
    "aime24": "math_evals/aime24.jsonl",
    "olympiadbench": "math_evals/olympiadbench.jsonl",
    "theoremqa": "theoremqa/theoremqa_test.json",
    "csqa": "csqa/dev_rand_split.jsonl",
    "strategyqa": "strategyqa/train.json",
    "humaneval": "human_eval/HumanEval.jsonl.gz",
}
SAME = {("5", "x=5"), ("0.0", "0")}  # neighbours that are the same answer in other words


@real
@pytest.mark.parametrize("name", FILES)
def test_real_references_pass_and_their_neighbours_do_not(name):
    """About 40 references of each file; the command itself grades all of them."""
    (problems,) = convert(name, prepare.read_local(DATA / FILES[name])).values()
    stride = max(1, len(problems) // 40)
    graded, rejected = prepare.check(problems[::stride])
    assert graded >= 30
    assert len(rejected) <= 0.005 * graded, rejected[:3]
    answers = [p["answer"] for p in problems if p["kind"] == "math"][:50]
    for answer, neighbour in zip(answers, answers[1:]):
        if answer != neighbour and (answer, neighbour) not in SAME:
            problem = Problem(0, "", answer, "math")
            assert problem.grade(f"\\boxed{{{neighbour}}}") == 0, (answer, neighbour)
