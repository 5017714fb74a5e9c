"""Measures and pictures: the estimator by enumeration, and every command on small sizes."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import speed
from test_verifiers import Words

import eval as evaluation
import localize
from conftest import POLICY, ROOT
from data import build_policy
from data.faults import UserError
from localize import by_oracle, by_verifier
from rollout import Rollout, run_programs


@pytest.mark.parametrize("n, c, k", [(6, 0, 2), (6, 2, 3), (6, 5, 2), (6, 6, 1), (5, 1, 5)])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n, c, k):
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert evaluation.pass_at_k(n, c, k) == pytest.approx(
        sum(any(s) for s in subsets) / len(subsets)
    )


def make_run(folder, seed, rates, method="srpo", **config):
    folder.mkdir(parents=True)
    usual = {
        "method": method,
        "prefixes": 1,
        "suffixes": 4,
        "localizer": "self",
        "seed_choice": "first",
        "seed_source": "base",
        "seed": seed,
    }
    (folder / "config.json").write_text(json.dumps(usual | config))
    lines = [
        {
            "step": 10 * i,
            "total_tokens": 1000 * i,
            "eval_pass_rate": r,
            "pass_base": r,
            "pass_suffix": None,
            "seconds": {"base": 1.0, "train": 3.0},
        }
        for i, r in enumerate(rates)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_table_and_picture(tmp_path, capsys):
    runs = [make_run(tmp_path / f"s{i}", i, (0.0, 0.4 + i / 5, 0.8)) for i in range(2)] + [
        make_run(tmp_path / "g", 0, (0.0, 0.1, 0.2), "grpo", prefixes=0)
    ]
    evaluation.main(["curves", *map(str, runs), "--out", str(tmp_path / "c.png")])
    out = capsys.readouterr().out
    assert (
        "| srpo 1x4 | 2 | - | 20 | 0.00 ± 0.00 | 0.800 ± 0.000 | - | 10 ± 3 |" in out
    )  # 0.5 is reached at 12.5 and 8.33
    assert "| grpo | 1 | - | 20 | 0.00 ± 0.00 | 0.200 ± 0.000 | - | - | - | - |" in out
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_not_a_run(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        evaluation.main(["curves", str(tmp_path)])


def test_throughput_runs(capsys):
    speed.main(
        [
            "--engine",
            "hf",
            "--data",
            "chain-2",
            "--problems",
            "4",
            "--samples",
            "2",
            "--repeats",
            "1",
        ]
    )
    assert "hf engine / generate:" in capsys.readouterr().out


BENCH = [
    "benchmark",
    "--engine",
    "hf",
    "--data",
    "chain-3",
    "chain-5",
    "--problems",
    "10",
    "--n",
    "4",
    "--temperature",
    "1",
]


@pytest.fixture(scope="module")
def benchmarked(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark") / "all"
    evaluation.main([*BENCH, "--out", str(out)])
    return out


def results(out):
    text = json.loads((out / "results.json").read_text())
    for r in text["results"].values():
        r.pop("seconds")
    return text


def rows_of(path):
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in path.read_text().splitlines()
    ]


def test_benchmark(benchmarked, capsys):
    rows = rows_of(benchmarked / "chain-3.jsonl")
    r = results(benchmarked)["results"]["chain-3"]
    right = np.array([row["reward"] == 1 for row in rows]).reshape(10, 4)
    assert r["problems"] == 10 and r["mean"] == pytest.approx(right.mean()) == r["pass_at"]["1"]
    assert r["pass_at"]["4"] == right.any(1).mean() and r["half"] == pytest.approx(
        1.96 * right.mean(1).std(ddof=1) / 10**0.5
    )
    assert r["tokens"] == sum(row["tokens"] for row in rows) / 10 and r["unparsable"] == np.mean(
        [not row["answered"] for row in rows]
    )
    assert 0 < r["mean"] < 1


@pytest.mark.parametrize("max_rows", [512, 8])
def test_benchmark_goes_on_where_it_stopped(tmp_path, benchmarked, max_rows, capsys):
    """Cut in the middle of a line, of a problem, and of a set: the same rollouts come out, and what was done is not done again."""
    out = tmp_path / "again"
    out.mkdir()
    shutil.copy(benchmarked / "settings.json", out)
    whole = (benchmarked / "chain-3.jsonl").read_text().splitlines(keepends=True)
    marked = [line.replace('"tokens": ', '"kept": 1, "tokens": ') for line in whole]
    (out / "chain-3.jsonl").write_text("".join(marked[:18]) + whole[18][:30])
    evaluation.main([*BENCH, "--max_rows", str(max_rows), "--out", str(out)])
    assert results(out)["results"] == results(benchmarked)["results"]
    rows = rows_of(out / "chain-3.jsonl")
    assert sum(row.pop("kept", 0) for row in rows) == 16  # four problems of four
    assert sorted(rows, key=lambda r: (r["problem"], r["sample"])) == rows_of(
        benchmarked / "chain-3.jsonl"
    )


def test_benchmark_under_torchrun(tmp_path, benchmarked):
    out = tmp_path / "two"
    launch = [
        Path(sys.executable).parent / "torchrun",
        "--standalone",
        "--nproc_per_node=2",
        ROOT / "eval.py",
        *(flag.replace("--n", "--samples") for flag in BENCH),
        "--max_rows",
        "8",
        "--out",
        out,
    ]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert results(out) == results(benchmarked) and "| chain-5 | 10 |" in done.stdout
    assert rows_of(out / "chain-5.jsonl") == rows_of(benchmarked / "chain-5.jsonl")


def test_compare(tmp_path, capsys):
    for name, shift in (("a", 0.0), ("b", 0.1)):
        (tmp_path / name).mkdir()
        by_problem = {
            str(i): (i % 5) / 10 + shift + 0.02 * (i % 2) * bool(shift) for i in range(200)
        }
        (tmp_path / name / "results.json").write_text(
            json.dumps({"results": {"set": {"by_problem": by_problem}}})
        )
    a, b = (str(tmp_path / name / "results.json") for name in "ab")
    evaluation.main(["benchmark", "--compare", a, b])
    assert (
        "| set | 200 | 0.200 | 0.310 | +0.110 (+0.109 to +0.111) |" in capsys.readouterr().out
    )  # paired: far narrower than the spread of 0.14
    with pytest.raises(UserError, match="needs two results.json"):
        evaluation.main(["benchmark", "--compare", a, str(tmp_path / "none.json")])


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--n 4 --temperature 0", "greedy responses are all the same"),
        ("--data none.jsonl", "no such data file"),
        ("--seed 7", "holds a benchmark with other settings"),
    ],
)
def test_benchmark_refuses(benchmarked, flags, complaint):
    before = {p: p.read_bytes() for p in benchmarked.iterdir()}
    with pytest.raises(UserError, match=complaint):
        evaluation.main([*BENCH, "--out", str(benchmarked), *flags.split()])
    assert {p: p.read_bytes() for p in benchmarked.iterdir()} == before


# --------------------------------------------------------------------------------------------------------- localization


def test_wilson():
    assert evaluation.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-3) and evaluation.wilson(
        10, 10
    ) == pytest.approx((0.7225, 1), abs=1e-3)
    assert evaluation.wilson(50, 100) == pytest.approx(
        (0.4038, 0.5962), abs=1e-3
    )  # published values


def test_processbench_scores():
    """Exact step of erroneous ones, "no error" of correct ones, harmonic mean; no answer is wrong for both."""
    scores = evaluation.processbench_scores([0, 2, 2, 4, -1, -1], [1, 3, 2, None, 0, 1])
    assert (
        scores["accuracy on erroneous"].startswith("0.500")
        and scores["accuracy on correct"].startswith("0.500")
        and scores["F1"] == "0.500"
    )
    assert evaluation.processbench_scores([0, -1], [0, None])["F1"] == "0.000"


class Reviewer:
    """Stands in for an engine: answers each review with a given box, and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = iter(answers), []

    def sample(self, requests):
        self.asked += [r.prompt_ids[0] for r in requests]
        return [
            [
                Rollout(
                    r.problem,
                    r.purpose,
                    r.prompt_ids,
                    [1],
                    [0.0],
                    [1],
                    "eos",
                    text=next(self.answers),
                )
            ]
            for r in requests
        ]


def test_localization_on_labelled_solutions(tmp_path):
    records = [{"question": "Q?", "steps": ["a", "b", "c"], "label": label} for label in (1, 0, -1)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert evaluation.is_labelled(str(tmp_path / "p.jsonl")) and not evaluation.is_labelled(
        "chain-3"
    )
    engine = Reviewer(r"\boxed{2}", r"\boxed{3}", r"\boxed{0}", "hm", r"\boxed{1}")
    args = SimpleNamespace(seed=0, localize_tokens=9, temperature=0.3)
    result = evaluation.on_labelled(
        evaluation.load_labelled(str(tmp_path / "p.jsonl")), Words(), engine, 99, args
    )
    assert (
        result["accuracy on erroneous"].startswith("0.500")
        and result["accuracy on correct"].startswith("1.000")
        and result["F1"] == "0.667"
    )
    assert (
        result["told that it is wrong, exact"].startswith("0.500")
        and result["a step chosen at random"] == "0.333"
    )
    assert result["no step named"] == "0 of 3; told that it is wrong, 1 of 2"
    open_, told = engine.asked[:3], engine.asked[3:]
    assert all("no error" in text and "WRONG" not in text for text in open_) and all(
        "WRONG" in text and "no error" not in text for text in told
    )
    assert "[Thought 1] a\n[Thought 2] b\n[Thought 3] c" in told[0]
    (tmp_path / "p.jsonl").write_text('{"question": "Q?", "steps": ["a"], "label": 1}')
    with pytest.raises(UserError, match="line 1: needs steps"):
        evaluation.load_labelled(str(tmp_path / "p.jsonl"))


@pytest.mark.parametrize("reference", [by_verifier, by_oracle])
def test_localization_on_own_failures(policy, reference):
    """On chain-12 the policy finds nearly all of its first errors; suffixes start where it resets, and an error that is kept stays."""
    tasks = policy.tasks(12, 12, oracle_samples=1, localize_temperature=0.3)
    result = evaluation.on_own_failures(tasks, policy.engine, reference)
    exact = float(result["exact"].split()[0])
    assert (exact > 0.8) == (reference is by_verifier) and sum(result["deviations"].values()) <= 12
    assert result["failures"].endswith("reference: " + reference.__name__.removeprefix("by_"))
    late = result["corrected, from an erroneous prefix"]
    assert late == "none" or float(late.split()[0]) < 0.2


def test_localization_command(capsys):
    evaluation.main(["localization", "--engine", "hf", "--problems", "4", "--data", "chain-4"])
    assert "a step chosen at random: 0." in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- self-correction


def test_self_correction_stops_resets_and_counts(policy):
    """With the verifier as judge accuracy never falls, tokens stop growing with the first right answer, and resets beat restarts here."""
    curves = {}
    for reset in (True, False):
        tasks = policy.tasks(12, 32, localize_temperature=0.3)
        sampled = run_programs(
            [evaluation.self_correct(task, 3, "verifier", reset) for task in tasks], policy.engine
        )
        traces, generated = sampled.results, sampled.generated
        curves[reset] = traces
        assert sum(trace[-1][1] for trace in traces) == sum(
            r.generated for r in generated
        )  # every generated token, reviews included
        for trace in traces:
            rewards, tokens = zip(*trace)
            assert (
                len(trace) == 4
                and list(rewards) == sorted(rewards)
                and list(tokens) == sorted(tokens)
            )
            if 1.0 in rewards:
                assert len(set(tokens[rewards.index(1.0) :])) == 1
        assert any(r.purpose == "localization" for r in generated) == reset
    assert sum(t[-1][0] for t in curves[True]) > sum(t[-1][0] for t in curves[False])
    assert [t[0] for t in curves[True]] == [t[0] for t in curves[False]]  # the same first responses


def test_self_judged_correction_ends_where_no_error_is_seen(policy, monkeypatch):
    monkeypatch.setattr(localize, "parse_localization", lambda text, H: (None, "no_error"))
    (task,) = policy.tasks(6, 1, localize_temperature=0.3)
    sampled = run_programs([evaluation.self_correct(task, 3, "self", True)], policy.engine)
    (trace,), generated = sampled.results, sampled.generated
    assert (
        len(trace) == 4
        and len(generated) == 2
        and len({reward for reward, _ in trace}) == 1
        and trace[-1][1] == sum(r.generated for r in generated)
    )


def test_self_correct_command(capsys):
    evaluation.main(
        [
            "self-correct",
            "--engine",
            "hf",
            "--problems",
            "8",
            "--rounds",
            "1",
            "--data",
            "chain-4",
            "--judge",
            "self",
        ]
    )
    assert "| 1 |" in capsys.readouterr().out


def test_the_committed_model_card_is_what_the_policy_does(policy):
    """Fewer problems than the card's, so with some room; the aims of the embedded default are part of it."""
    measures = build_policy.measure(policy.model, policy.tokenizer, n=128, steps=12)
    rows = [
        line.strip("| ").split(" | ")
        for line in (POLICY / "README.md").read_text().splitlines()
        if line.startswith("| ") and "measure" not in line
    ]
    stated = {
        name.split(",")[0].split(":")[0]: float(values[-1]) for name, *values in rows
    }  # the last column: the default task
    assert measures["pass_rate"] == pytest.approx(stated["sampled pass rate"], abs=0.025)
    assert measures["greedy"] == pytest.approx(stated["greedy pass rate"], abs=0.12)
    assert measures["localization_exact"] == pytest.approx(stated["self-localization"], abs=0.08)
    assert 0.03 <= stated["sampled pass rate"] <= 0.10 and stated["greedy pass rate"] < 0.5
    assert stated["self-localization"] >= 0.6 and measures["luck"] <= 0.03
    size = sum(f.stat().st_size for f in POLICY.iterdir())
    assert size <= 8_000_000
    config = policy.model.config
    assert (
        config.model_type == "llama"
        and not config.tie_word_embeddings
        and config.hidden_size // config.num_attention_heads >= 32
    )
