"""Measures and pictures: the estimator by enumeration, and every command on small sizes."""

import itertools
import json
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_english import folder as reader  # noqa: F401  (the fixture: a model that reads text)
from test_verifiers import Words

import eval as evaluation
import localize
from conftest import POLICY, ROOT
from data import build_policy, curves
from data.driver import run_programs
from data.faults import UserError
from data.labelled import load_labelled, sample_labelled
from data.lines import write_lines
from data.tasks import load_problems
from eval import LocatedFailure
from localize import by_oracle, by_verifier
from rollout import Rollout


@pytest.mark.parametrize("n, c, k", [(6, 0, 2), (6, 2, 3), (6, 5, 2), (6, 6, 1), (5, 1, 5)])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n, c, k):
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    share = sum(any(subset) for subset in subsets) / len(subsets)
    assert curves.pass_at_k(n, c, k) == pytest.approx(share)


# ---------------------------------------------------------------------------------------- runs


def make_run(folder, seed, rates, method="srpo", **config):
    """A run directory with an evaluation every ten steps; its name says the method."""
    folder.mkdir(parents=True)
    usual = {
        "name": method if method == "grpo" else f"{method} 1x4",
        "method": method,
        "prefixes": 1,
        "suffixes": 4,
        "localizer": "self",
        "seed_source": "base",
        "seed": seed,
    }
    (folder / "config.json").write_text(json.dumps(usual | config))
    lines = []
    for i, rate in enumerate(rates):
        line = {
            "step": 10 * i,
            "total_tokens": 1000 * i,
            "eval_pass_rate": rate,
            "pass_base": rate,
            "pass_suffix": None,
            "seconds": {"base": 1.0, "train": 3.0},
        }
        lines.append(line)
    write_lines(folder / "metrics.jsonl", lines)
    return folder


def test_curves_table_and_picture(tmp_path, capsys):
    runs = [
        make_run(tmp_path / "s0", 0, (0.0, 0.4, 0.8)),
        make_run(tmp_path / "s1", 1, (0.0, 0.6, 0.8)),
        make_run(tmp_path / "g", 0, (0.0, 0.1, 0.2), "grpo", prefixes=0),
    ]
    evaluation.main(["curves", *map(str, runs), "--out", str(tmp_path / "c.png")])
    out = capsys.readouterr().out
    # 0.5 is reached at 12.5 and 8.33
    assert "| srpo 1x4 | 2 | - | 20 | 0.00 ± 0.00 | 0.800 ± 0.000 | - | 10 ± 3 |" in out
    assert "| grpo | 1 | - | 20 | 0.00 | 0.200 | - | - | - | - |" in out
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_a_run_that_starts_at_the_target_has_reached_it(tmp_path):
    run = curves.read_run(make_run(tmp_path / "s0", 0, (0.6, 0.4, 0.8)))
    assert curves.first_reach(run.lines, 0.5, "step") == 0
    assert curves.first_reach(run.lines, 0.7, "step") == pytest.approx(17.5)


def test_a_curve_has_the_steps_that_all_runs_have(tmp_path):
    """A run that was stopped and resumed has an evaluation of its own."""
    runs = [make_run(tmp_path / "s0", 0, (0.0, 0.4, 0.8)), make_run(tmp_path / "s1", 1, (0.0, 0.6))]
    lines = [json.loads(line) for line in open(runs[1] / "metrics.jsonl")]
    write_lines(runs[1] / "metrics.jsonl", [lines[0], lines[1] | {"step": 13}])
    drawn = {axis: AxisOfTest() for axis in curves.AXES}
    curves.draw_mean(drawn, "srpo", curves.by_name(runs)["srpo 1x4"], "C0")
    assert list(drawn["step"].x) == [0]


class AxisOfTest:
    def plot(self, x, y, **style):
        self.x = x

    def fill_between(self, *args, **style):
        pass


def test_the_picture_goes_to_the_first_run(tmp_path):
    long = "srpo " + " ".join(f"setting_{i}=0.{i}" for i in range(20))
    runs = []
    for seed, folder in enumerate("ab"):
        runs.append(make_run(tmp_path / folder, seed, (0.0, 0.5), name=long))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that no room is left for the axes
        evaluation.main(["curves", *map(str, runs)])
    assert (runs[0] / "curves.png").stat().st_size > 10_000
    assert not (runs[1] / "curves.png").exists()


def test_runs_are_grouped_by_name(tmp_path):
    runs = [
        make_run(tmp_path / "s0", 0, (0.1, 0.2)),
        make_run(tmp_path / "g0", 0, (0.3, 0.4), "grpo"),
        make_run(tmp_path / "s1", 1, (0.5, 0.6)),
    ]
    named = curves.by_name(runs)
    assert list(named) == ["srpo 1x4", "grpo"]
    assert [run.folder for run in named["srpo 1x4"]] == [runs[0], runs[2]]
    assert [run.config["seed"] for run in named["srpo 1x4"]] == [0, 1]
    assert named["grpo"][0].lines[1]["eval_pass_rate"] == 0.4


def test_only_other_seeds_of_as_many_steps_share_a_curve(tmp_path):
    short = make_run(tmp_path / "short", 0, (0.1, 0.2), steps=60)
    long = make_run(tmp_path / "long", 0, (0.1, 0.2), steps=120)
    again = make_run(tmp_path / "again", 0, (0.1, 0.3), steps=60)
    other = make_run(tmp_path / "other", 1, (0.1, 0.3), steps=60)
    assert list(curves.by_name([short, long])) == ["srpo 1x4 steps=60", "srpo 1x4 steps=120"]
    twins = [f"srpo 1x4 in {short}", f"srpo 1x4 in {again}"]
    assert list(curves.by_name([short, again, other])) == [*twins, "srpo 1x4"]
    assert list(curves.by_name([short, other])) == ["srpo 1x4"]
    ((once,),) = curves.by_name([short, short / ".." / "short"]).values()
    assert once.folder == short


def test_markdown():
    rows = [{"run": "a", "rate": 0.5}, {"rate": 1, "run": "b"}]
    assert curves.markdown(rows) == "| run | rate |\n|---|---|\n| a | 0.5 |\n| b | 1 |"


def test_not_a_run(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        evaluation.main(["curves", str(tmp_path)])


# ---------------------------------------------------------------------------------- benchmarks

BENCH = "benchmark --engine hf --data chain-3 chain-5 --problems 10 --n 4 --temperature 1".split()


@pytest.fixture(scope="module")
def benchmarked(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "all"
    evaluation.main([*BENCH, "--out", str(out)])
    return out


def results(out):
    """{data set: its results} of a results.json, without what the clock says."""
    content = json.loads((out / "results.json").read_text())
    for result in content["results"].values():
        result.pop("seconds")
    return content["results"]


def responses_to(out, data):
    """The file with the responses to a data set; its name ends with a digest of the problems."""
    (path,) = out.glob(f"{data}-????????.jsonl")
    return path


def rows_of(path):
    """The lines of a SET.jsonl without what the clock says."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row.pop("seconds")
    return rows


def test_benchmark(benchmarked, capsys):
    path = responses_to(benchmarked, "chain-3")
    rows = rows_of(path)
    result = results(benchmarked)[path.stem]
    right = np.array([row["reward"] == 1 for row in rows]).reshape(10, 4)
    half = 1.96 * right.mean(1).std(ddof=1) / math.sqrt(10)
    assert result["problems"] == 10
    assert result["mean"] == result["pass_at"]["1"]
    assert result["mean"] == pytest.approx(right.mean())
    assert result["pass_at"]["4"] == right.any(1).mean()
    assert result["half"] == pytest.approx(half)
    assert result["tokens"] == sum(row["tokens"] for row in rows) / 10
    assert result["unparsable"] == np.mean([not row["answered"] for row in rows])
    assert 0 < result["mean"] < 1


@pytest.mark.parametrize("max_rows", [512, 8])
def test_benchmark_goes_on_where_it_stopped(tmp_path, benchmarked, max_rows, capsys):
    """Cut inside a line, a problem and a set: the same rollouts, and nothing is done twice."""
    out = tmp_path / "again"
    out.mkdir()
    shutil.copy(benchmarked / "settings.json", out)
    first = responses_to(benchmarked, "chain-3")
    whole = first.read_text().splitlines(keepends=True)
    marked = [line.replace('"tokens": ', '"kept": 1, "tokens": ') for line in whole]
    (out / first.name).write_text("".join(marked[:18]) + whole[18][:30])
    evaluation.main([*BENCH, "--max_rows", str(max_rows), "--out", str(out)])
    assert results(out) == results(benchmarked)
    rows = rows_of(out / first.name)
    assert sum(row.pop("kept", 0) for row in rows) == 16  # four problems of four
    rows.sort(key=lambda row: (row["problem"], row["sample"]))
    assert rows == rows_of(first)
    for name in unsolved_files(benchmarked):
        assert (out / name).read_bytes() == (benchmarked / name).read_bytes()


def test_a_benchmark_in_bfloat16(tmp_path, benchmarked, capsys):
    """Another type is another policy: its responses do not join those of float32."""
    out = tmp_path / "bfloat16"
    shutil.copytree(benchmarked, out)
    with pytest.raises(UserError, match="other settings"):
        evaluation.main([*BENCH, "--dtype", "bfloat16", "--out", str(out)])
    args = SimpleNamespace(dtype="bfloat16", model="embedded", engine="hf", max_rows=8)
    opened = evaluation.open_policy(args)
    assert {weight.dtype for weight in opened.engine.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("what, first", [("weights", "others"), ("engine", "vllm")])
def test_a_benchmark_of_another_sampler(tmp_path, benchmarked, what, first):
    """The folder of a model may get another policy: its responses do not join the old ones."""
    settings = json.loads((benchmarked / "settings.json").read_text())
    settings[what] = first
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="other settings"):
        evaluation.main([*BENCH, "--out", str(tmp_path)])


def test_one_problem_has_no_interval(tmp_path, capsys):
    flags = "--engine hf --data chain-3 --problems 1 --n 2 --temperature 1".split()
    evaluation.main(["benchmark", *flags, "--out", str(tmp_path)])
    (result,) = results(tmp_path).values()
    assert result["half"] is None
    assert f"| 1 | {result['mean']:.3f} |" in capsys.readouterr().out


def unsolved_files(out):
    names = [path.name for path in out.glob("unsolved-*")]
    assert names
    return names


def two_processes(*flags):
    """What the benchmark prints under torchrun, which takes --n for its own."""
    common = [flag.replace("--n", "--samples") for flag in BENCH]
    torchrun = Path(sys.executable).parent / "torchrun"
    launch = [torchrun, "--standalone", "--nproc_per_node=2", ROOT / "eval.py"]
    command = [*launch, *common, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_benchmark_under_torchrun(tmp_path, benchmarked):
    out = tmp_path / "two"
    printed = two_processes("--max_rows", "8", "--out", out)
    assert results(out) == results(benchmarked)
    path = responses_to(benchmarked, "chain-5")
    assert f"| {path.stem} | 10 |" in printed
    assert rows_of(out / path.name) == rows_of(path)
    for name in unsolved_files(benchmarked):
        assert (out / name).read_bytes() == (benchmarked / name).read_bytes()


def test_two_processes_go_on_where_one_stopped(tmp_path, benchmarked):
    """Only the first process reads the folder; the other is told what is done."""
    out = tmp_path / "resumed"
    out.mkdir()
    shutil.copy(benchmarked / "settings.json", out)
    first = responses_to(benchmarked, "chain-3")
    whole = first.read_text().splitlines(keepends=True)
    (out / first.name).write_text("".join(whole[:18]))
    two_processes("--out", out)
    assert results(out) == results(benchmarked)


def test_compare(tmp_path, capsys):
    """Paired: the interval is far narrower than the spread of 0.14 over problems."""
    for name, shift in (("a", 0.0), ("b", 0.1)):
        (tmp_path / name).mkdir()
        by_problem = {}
        for i in range(200):
            odd_gain = 0.02 * (i % 2) if shift else 0.0
            by_problem[str(i)] = (i % 5) / 10 + shift + odd_gain
        sets = {"set": {"by_problem": by_problem}}
        if name == "b":
            sets["another"] = {"by_problem": {"0": 1.0}}
        (tmp_path / name / "results.json").write_text(json.dumps({"results": sets}))
    a, b = (str(tmp_path / name / "results.json") for name in "ab")
    evaluation.main(["benchmark", "--compare", a, b])
    row = "| set | 200 | 0.200 | 0.310 | +0.110 (+0.109 to +0.111) |"
    printed = capsys.readouterr().out
    assert row in printed and f"another: only {b} has it" in printed
    with pytest.raises(UserError, match="none.json: cannot be read"):
        evaluation.main(["benchmark", "--compare", a, str(tmp_path / "none.json")])


DAMAGED_RESULTS = [
    "",
    "[]",
    '{"results": []}',
    '{"results": {}}',
    '{"results": {"set": 1}}',
    '{"results": {"set": {"by_problem": {}}}}',
    '{"results": {"set": {"by_problem": {"0": "1"}}}}',
    "[" * 100_000,
    "9" * 5_000,
    "\udcff",
]


@pytest.mark.parametrize("text", DAMAGED_RESULTS)
def test_damaged_results_are_not_compared(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text, errors="surrogateescape")
    assert str(path) in refused("benchmark", "--compare", path, path)


def refused(*argv):
    """The one line with which a command refuses."""
    with pytest.raises(UserError) as fault:
        evaluation.main([str(argument) for argument in argv])
    assert "\n" not in str(fault.value)
    return str(fault.value)


def write_problems(path, answers):
    """A data file of chain-like problems, with the given reference answers."""
    records = []
    for answer in answers:
        question = "mod97 1: +2 start 5 ."
        records.append({"question": question, "answer": answer, "kind": "text"})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, records)
    return str(path)


def test_results_belong_to_the_content_of_a_file(tmp_path):
    """Two files with one name have their own results; so has a file that changed, in one folder."""
    first = write_problems(tmp_path / "a" / "set.jsonl", ["7", "7"])
    second = write_problems(tmp_path / "b" / "set.jsonl", ["no", "no", "no"])
    out = ["--engine", "hf", "--out", str(tmp_path / "out")]
    evaluation.main(["benchmark", "--data", first, second, *out])
    found = results(tmp_path / "out")
    assert sorted(result["problems"] for result in found.values()) == [2, 3]
    assert len({name.rpartition("-")[0] for name in found}) == 1

    Path(first).write_text(Path(second).read_text())
    evaluation.main(["benchmark", "--data", first, *out])
    assert results(tmp_path / "out") == found  # the same as the second; the first ones stay
    third = write_problems(tmp_path / "third.jsonl", ["no"] * 4)
    evaluation.main(["benchmark", "--data", third, *out])
    kept = results(tmp_path / "out")
    assert kept.items() > found.items()
    assert sorted(result["problems"] for result in kept.values()) == [2, 3, 4]
    content = tmp_path / "out" / "results.json"
    content.rename(tmp_path / "second.json")
    content.write_text("[]")
    assert "results.json: not as this command writes it" in refused(
        "benchmark", "--data", third, *out
    )
    content.unlink()
    evaluation.main(["benchmark", "--data", write_problems(tmp_path / "set.jsonl", ["7"]), *out])
    complaint = refused("benchmark", "--compare", content, tmp_path / "second.json")
    assert "share no problems" in complaint


def test_unsolved_problems_are_a_data_file(benchmarked, capsys):
    """Exactly those without a right response; they load with their step checkers."""
    n_unsolved = 0
    for name in unsolved_files(benchmarked):
        path = benchmarked / name.removeprefix("unsolved-")
        solved = {row["problem"] for row in rows_of(path) if row["reward"] == 1}
        problems = load_problems(path.name.rpartition("-")[0], seed=10**6)[:10]
        expected = [problem for problem in problems if problem.index not in solved]
        loaded = load_problems(str(benchmarked / name), seed=3)
        assert [p.to_json() for p in loaded] == [p.to_json() for p in expected]
        for problem, original in zip(loaded, expected, strict=True):
            for thoughts in (["x"], [f"1: {original.question.split()[2]} = 7"]):
                assert problem.check_steps(thoughts) == original.check_steps(thoughts)
        n_unsolved += len(expected)
    assert 0 < n_unsolved < 20

    data = str(benchmarked / unsolved_files(benchmarked)[0])
    flags = ["--engine", "hf", "--data", data, "--n", "2", "--temperature", "1"]
    evaluation.main(["benchmark", *flags, "--out", str(benchmarked.parent / "again")])
    (again,) = results(benchmarked.parent / "again").values()
    assert again["problems"] == len(load_problems(data, seed=0))


def test_unsolved_problems_of_a_file(tmp_path, capsys):
    """Questions, references and kinds stay as they are; no file where all are solved."""
    tests = {"call": "double", "cases": [[[2], 4]]}
    records = [
        {"question": "6 * 7?", "answer": 42, "kind": "integer"},
        {"question": "a\u2028b", "answer": "3 -1", "kind": "integers"},
        {"question": "Half?", "answer": 0.5, "kind": "math"},
        {"question": "Double?", "kind": "code", "tests": tests},
    ]
    write_lines(tmp_path / "set.jsonl", records)
    problems = load_problems(str(tmp_path / "set.jsonl"), seed=0)
    rewards = {0: (0.0, 1.0), 1: (0.0, 0.0), 2: (0.0, 0.0), 3: (0.0, 0.5)}  # of two responses each
    done = {}
    for index, of_problem in rewards.items():
        done[index] = [{"reward": reward} for reward in of_problem]
    path = tmp_path / "unsolved.jsonl"
    evaluation.write_unsolved(path, problems, done)
    assert f"{path}: the 3 of 4 problems" in capsys.readouterr().out
    loaded = load_problems(str(path), seed=0)
    assert [p.to_json() for p in loaded] == [p.to_json() for p in problems[1:]]

    evaluation.write_unsolved(tmp_path / "none.jsonl", problems[:1], done)
    assert not (tmp_path / "none.jsonl").exists()
    assert "none: none of 1 problems" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    ['{"problem": 0}', "[]", "{", "null", "[" * 100_000, "9" * 5_000, '"\\ud800"'],
)
def test_damaged_responses_are_named(tmp_path, line):
    path = tmp_path / "set.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="set.jsonl, line 1: "):
        curves.finished_problems(path, 1)
    assert path.read_text() == line + "\n"


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--n 4 --temperature 0", "greedy responses are all the same"),
        ("--data none.jsonl", "no such data file"),
        ("--seed 7", "holds a benchmark with other settings"),
    ],
)
def test_benchmark_refuses(benchmarked, flags, complaint):
    before = {path: path.read_bytes() for path in benchmarked.iterdir()}
    with pytest.raises(UserError, match=complaint):
        evaluation.main([*BENCH, "--out", str(benchmarked), *flags.split()])
    assert {path: path.read_bytes() for path in benchmarked.iterdir()} == before


# -------------------------------------------------------------------------------- localization


@pytest.mark.parametrize(
    "right, n, low, high",
    [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (50, 100, 0.4038, 0.5962)],
)
def test_wilson(right, n, low, high):
    """Published values."""
    assert curves.wilson(right, n) == pytest.approx((low, high), abs=1e-3)


def test_processbench_scores():
    """The exact step of erroneous ones, "no error" of correct ones; no answer is always wrong."""
    scores = curves.processbench_scores([0, 2, 2, 4, -1, -1], [1, 3, 2, None, 0, 1])
    assert scores["accuracy on erroneous"].startswith("0.500")
    assert scores["accuracy on correct"].startswith("0.500")
    assert scores["F1"] == "0.500"
    assert curves.processbench_scores([0, -1], [0, None])["F1"] == "0.000"


class Reviewer:
    """Stands in for an engine: answers each review with a given box, and keeps what was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = iter(answers), []

    def sample(self, requests):
        groups = []
        for request in requests:
            self.asked.append(request.prompt_ids[0])
            answer = Rollout(
                request.problem,
                request.purpose,
                request.prompt_ids,
                token_ids=[1],
                logps=[0.0],
                thought_ends=[1],
                finish="eos",
                text=next(self.answers),
            )
            groups.append([answer])
        return groups


def test_localization_on_labelled_solutions(tmp_path):
    path = tmp_path / "p.jsonl"
    steps = ["a", "b", "c"]
    write_lines(path, [{"question": "Q?", "steps": steps, "label": label} for label in (1, 0, -1)])
    assert evaluation.is_labelled(str(path)) and not evaluation.is_labelled("chain-3")
    engine = Reviewer(r"\boxed{2}", r"\boxed{3}", r"\boxed{0}", "hm", r"\boxed{1}")
    policy = evaluation.Policy(Words(), engine, context=99, dtype="float32")
    args = SimpleNamespace(seed=0, localize_tokens=9, temperature=0.3)
    result = evaluation.on_labelled(load_labelled(str(path)), policy, args)
    assert result["accuracy on erroneous"].startswith("0.500")
    assert result["accuracy on correct"].startswith("1.000")
    assert result["F1"] == "0.667"
    assert result["told that it is wrong, exact"].startswith("0.500")
    assert result["a step chosen at random"] == "0.333"
    assert result["no step named"] == "0 of 3; told that it is wrong, 1 of 2"
    for text in engine.asked[:3]:
        assert "no error" in text and "WRONG" not in text
    for text in engine.asked[3:]:
        assert "WRONG" in text and "no error" not in text
    assert "[Thought 1] a\n[Thought 2] b\n[Thought 3] c" in engine.asked[3]
    write_lines(path, [{"question": "Q?", "steps": ["a"], "label": 1}])
    with pytest.raises(UserError, match="line 1: needs question"):
        load_labelled(str(path))


SORTED = [{"question": "Q?", "steps": ["a", "b"], "label": k % 2} for k in range(300)]
SORTED += [{"question": f"Q{k}?", "steps": ["a", "b"], "label": -1} for k in range(100)]


def test_a_sample_of_labelled_solutions_keeps_the_shares():
    """Public files are sorted by label: their first records have no correct solution."""
    for n in (4, 40, 399):
        chosen = sample_labelled(SORTED, n, seed=0)
        erroneous = sum(record["label"] >= 0 for record in chosen)
        assert len(chosen) == n and abs(erroneous - 0.75 * n) <= 0.5
        assert chosen == sample_labelled(SORTED, n, seed=0)
        assert chosen != sample_labelled(SORTED, n, seed=1)
    for n in (None, 400, 10**6):
        assert sample_labelled(SORTED, n, seed=0) == SORTED
    chosen = sample_labelled(SORTED, 60, seed=0)
    questions = [record["question"] for record in chosen if record["label"] < 0]
    numbers = [int(question[1:-1]) for question in questions]
    assert len(numbers) == 15 and numbers == sorted(numbers) and max(numbers) > 15


def test_localization_command_on_labelled_solutions(reader, tmp_path, capsys):  # noqa: F811
    write_lines(tmp_path / "p.jsonl", SORTED)
    data = ["--engine", "hf", "--data", str(tmp_path / "p.jsonl"), "--localize_tokens", "4"]
    assert "the policy has no tokens for" in refused("localization", *data)  # the embedded one
    data += ["--model", str(reader)]
    evaluation.main(["localization", *data, "--problems", "8"])
    printed = capsys.readouterr().out
    assert "solutions: 8 of 400; fewer than all are drawn by --seed" in printed
    assert "of 2)" in printed and "of 6)" in printed  # correct, erroneous
    write_lines(tmp_path / "p.jsonl", SORTED[:5])
    evaluation.main(["localization", *data])
    printed = capsys.readouterr().out
    assert "solutions: 5 of 5;" in printed
    assert "F1: none: it needs erroneous and correct solutions" in printed


@pytest.mark.parametrize("reference", [by_verifier, by_oracle])
def test_localization_on_own_failures(policy, reference):
    """On chain-12 the policy finds nearly all of its first errors; an error that is kept stays."""
    tasks = policy.tasks(12, 12, oracle_samples=1, localize_temperature=0.3)
    result = evaluation.on_own_failures(tasks, policy.engine, reference)
    exact = float(result["exact"].split()[0])
    assert (exact > 0.8) == (reference is by_verifier)
    assert sum(result["deviations"].values()) <= 12
    assert result["failures"].endswith("reference: " + reference.__name__.removeprefix("by_"))
    late = result["corrected, from an erroneous prefix"]
    assert late == "none" or float(late.split()[0]) < 0.2


def test_suffixes_of_a_failure_are_one_observation():
    failures = [LocatedFailure(1, 1, 3, [right] * 4) for right in (True, False, False, False)]
    low, high = curves.wilson(1, 4)
    assert evaluation.corrected(failures) == f"0.250 ({low:.3f} to {high:.3f}, 4 of 16)"


def test_localization_command(capsys):
    evaluation.main(["localization", "--engine", "hf", "--problems", "4", "--data", "chain-4"])
    assert "a step chosen at random: 0." in capsys.readouterr().out


# ------------------------------------------------------------------------- what is refused

LABELLED = '{"question": "Q?", "steps": ["a"], "label": %s}\n'


@pytest.mark.parametrize(
    "content",
    [
        LABELLED % 1,
        LABELLED % -2,
        LABELLED % "true",
        LABELLED % "0.0",
        LABELLED % ("9" * 5_000),
        '{"question": "Q?", "steps": [], "label": -1}',
        '{"question": "Q?", "steps": [1], "label": 0}',
        '{"question": 1, "steps": ["a"], "label": 0}',
        '{"steps": ["a"], "label": 0}',
        LABELLED % 0 + "[]",
        LABELLED % 0 + "[" * 100_000,
        LABELLED % 0 + '"\\ud800"',
    ],
)
def test_labelled_solutions_are_checked_whole(tmp_path, content):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    number = 2 if content.startswith(LABELLED % 0) else 1
    assert f"{path}, line {number}: " in refused("localization", "--engine", "hf", "--data", path)


def test_binary_and_missing_data_is_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(bytes(range(256)))
    for command in ("benchmark", "localization", "self-correct"):
        assert "not UTF-8 text" in refused(command, "--data", path)
        assert "no such data file" in refused(command, "--data", tmp_path)
        assert "no such data file" in refused(command, "--data", "x" * 300)


NO_NUMBERS = ("0", "-1", "1e3", "x", "", "nan", "9" * 31, "9" * 5_000)
FLAGS = {
    "benchmark": "--problems --n --max_rows --max_thoughts --max_tokens_per_thought",
    "localization": "--problems --max_rows --localize_tokens",
    "self-correct": "--problems --max_rows --max_thoughts --max_tokens_per_thought",
}


@pytest.mark.parametrize("command", FLAGS)
def test_flags_out_of_range_are_refused(command):
    for flag in FLAGS[command].split():
        for value in NO_NUMBERS:
            said = refused(command, f"{flag}={value}")
            assert flag in said and repr(value[:40]) in said and len(said) < 200
    for value in NO_NUMBERS[1:]:
        assert "--seed" in refused(command, f"--seed={value}")
    for value in ("-0.1", "nan", "inf", "1e30", "1e-40", "x"):
        assert "--temperature" in refused(command, f"--temperature={value}")


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "none",
        "self-correct --rounds -1",
        "self-correct --rounds 99999999999999999999",
        "curves run --target 1.5",
        "curves run --target nan",
        "report run --megabytes 0",
        "report run --megabytes inf",
        "report",
        "benchmark --engine none",
        "benchmark --none",
        "benchmark",
    ],
)
def test_command_lines_are_refused_in_one_line(flags):
    assert refused(*flags.split())


@pytest.mark.parametrize("out", ["/dev/null", "/dev/null/below", "/proc/none", "FILE"])
def test_places_that_cannot_be_written_are_refused_first(tmp_path, out, monkeypatch):
    monkeypatch.delattr(evaluation, "open_policy")  # what comes next
    if out == "FILE":
        out = tmp_path / "file"
        out.write_text("kept")
    assert f"cannot write to {out}" in refused(*BENCH, "--out", out)
    assert out != tmp_path / "file" or out.read_text() == "kept"


def test_pictures_and_pages_that_cannot_be_written(tmp_path):
    run = make_run(tmp_path / "run", 0, (0.0, 0.5))
    for out in (tmp_path / "none" / "c.png", tmp_path / "c.xyz", tmp_path, "/dev/null/c.png"):
        assert f"cannot write {out}" in refused("curves", run, "--out", out)


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"step": 1},
        {"step": "1", "total_tokens": 2},
        {"step": 1, "total_tokens": 10**400},
        {"step": 1, "total_tokens": 2, "eval_pass_rate": "high"},
        {"step": 1, "total_tokens": 2, "tokens": 7},
    ],
)
def test_damaged_step_lines_are_named(tmp_path, line):
    run = make_run(tmp_path / "run", 0, (0.0, 0.5))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    for command in ("curves", "report"):
        assert "metrics.jsonl, line 3: " in refused(command, run)


def test_a_run_without_lines_and_a_benchmark_of_something_else(tmp_path):
    run = make_run(tmp_path / "run", 0, (0.0, 0.5))
    (run / "benchmark").mkdir()
    for text in ("{}", '{"results": {"a": {"mean": 0.5, "pass_at": {"1": 0.5}}}}', "[", "[]"):
        (run / "benchmark" / "results.json").write_text(text)
        assert "benchmark/results.json: " in refused("curves", run)
    (run / "metrics.jsonl").write_text("")
    for command in ("curves", "report"):
        assert "holds no step line yet" in refused(command, run)


def test_a_prompt_without_room_is_refused_by_every_command(tmp_path):
    question = "mod97 " + "1: +2 " * 400
    write_lines(tmp_path / "p.jsonl", [{"question": question, "answer": "1", "kind": "text"}])
    for command in ("benchmark", "localization", "self-correct"):
        flags = ["--engine", "hf", "--data", tmp_path / "p.jsonl"]
        if command == "benchmark":
            flags += ["--out", tmp_path / "out"]
        assert "the context is" in refused(command, *flags)


# ----------------------------------------------------------------------------- self-correction


def corrected(policy, reset):
    """The traces of self-correction on 32 problems, with every rollout that it took."""
    tasks = policy.tasks(12, 32, localize_temperature=0.3)
    programs = [evaluation.self_correct(task, 3, "verifier", reset) for task in tasks]
    return run_programs(programs, policy.engine)


def test_self_correction_stops_resets_and_counts(policy):
    """With the verifier as judge accuracy never falls, and resets beat restarts here."""
    resets, restarts = corrected(policy, True), corrected(policy, False)
    for sampled in (resets, restarts):
        spent = sum(trace[-1].tokens for trace in sampled.results)
        assert spent == sum(r.generated for r in sampled.generated)  # reviews included
        for trace in sampled.results:
            rewards = [now.reward for now in trace]
            tokens = [now.tokens for now in trace]
            assert len(trace) == 4
            assert rewards == sorted(rewards) and tokens == sorted(tokens)
            if 1.0 in rewards:  # the first right answer is the last cost
                assert len(set(tokens[rewards.index(1.0) :])) == 1
    assert any(r.purpose == "localization" for r in resets.generated)
    assert not any(r.purpose == "localization" for r in restarts.generated)
    right = sum(trace[-1].reward for trace in resets.results)
    assert right > sum(trace[-1].reward for trace in restarts.results)
    for with_resets, without in zip(resets.results, restarts.results):
        assert with_resets[0] == without[0]  # the same first responses


def test_self_judged_correction_ends_where_no_error_is_seen(policy, monkeypatch):
    monkeypatch.setattr(localize, "parse_localization", lambda text, H: (None, "no_error"))
    (task,) = policy.tasks(6, 1, localize_temperature=0.3)
    sampled = run_programs([evaluation.self_correct(task, 3, "self", True)], policy.engine)
    (trace,) = sampled.results
    assert len(trace) == 4 and len(sampled.generated) == 2
    assert len({now.reward for now in trace}) == 1
    assert trace[-1].tokens == sum(r.generated for r in sampled.generated)


def test_self_correct_command(reader, capsys):  # noqa: F811
    chains = "--engine hf --problems 8 --rounds 1 --data chain-4".split()
    evaluation.main(["self-correct", *chains])
    assert "| 1 |" in capsys.readouterr().out
    short = "--max_thoughts 2 --max_tokens_per_thought 4 --localize_tokens 4".split()
    evaluation.main(["self-correct", *chains, "--judge", "self", "--model", str(reader), *short])
    assert "judge: self" in capsys.readouterr().out
    assert "always names a thought" in refused("self-correct", *chains, "--judge", "self")
    assert "--temperature above 0" in refused("self-correct", "--temperature", "0")


# --------------------------------------------------------------------------------- model card


def stated_on_the_card():
    """The measures in the last column of the embedded policy's card: the default task."""
    stated = {}
    for line in (POLICY / "README.md").read_text().splitlines():
        if line.startswith("| ") and "measure" not in line:
            name, *values = line.strip("| ").split(" | ")
            stated[name.split(",")[0].split(":")[0]] = float(values[-1])
    return stated


def test_the_committed_model_card_is_what_the_policy_does(policy):
    """Fewer problems than the card's, so with some room; the policy's aims are part of it."""
    measures = build_policy.measure(policy.model, policy.tokenizer, n=128, steps=12)
    stated = stated_on_the_card()
    assert measures["pass_rate"] == pytest.approx(stated["sampled pass rate"], abs=0.025)
    assert measures["greedy"] == pytest.approx(stated["greedy pass rate"], abs=0.12)
    assert measures["localization_exact"] == pytest.approx(stated["self-localization"], abs=0.08)
    assert 0.02 <= stated["sampled pass rate"] <= 0.06
    assert stated["greedy pass rate"] < 0.5
    assert stated["self-localization"] >= 0.6
    assert measures["lucky"] == 0
    assert sum(file.stat().st_size for file in POLICY.iterdir()) <= 8_000_000
    config = policy.model.config
    assert config.model_type == "llama" and not config.tie_word_embeddings
    assert config.hidden_size // config.num_attention_heads >= 32
