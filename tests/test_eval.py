"""Measures and pictures: the estimator by enumeration, and every command on small sizes."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import eval as evaluation
import speed
from conftest import POLICY, ROOT
from data.problems import UserError


@pytest.mark.parametrize("n, c, k", [(6, 0, 2), (6, 2, 3), (6, 5, 2), (6, 6, 1), (5, 1, 5)])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n, c, k):
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


def make_run(folder, seed, rates, method="srpo", **config):
    folder.mkdir(parents=True)
    usual = {"method": method, "prefixes": 1, "suffixes": 4, "localizer": "self", "seed_choice": "first", "seed_source": "base", "seed": seed}
    (folder / "config.json").write_text(json.dumps(usual | config))
    lines = [{"step": 10 * i, "total_tokens": 1000 * i, "eval_pass_rate": r, "pass_base": r, "pass_suffix": None, "seconds": {"base": 1.0, "train": 3.0}} for i, r in enumerate(rates)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_table_and_picture(tmp_path, capsys):
    runs = [make_run(tmp_path / f"s{i}", i, (0.0, 0.4 + i / 5, 0.8)) for i in range(2)] + [make_run(tmp_path / "g", 0, (0.0, 0.1, 0.2), "grpo", prefixes=0)]
    evaluation.main(["curves", *map(str, runs), "--out", str(tmp_path / "c.png")])
    out = capsys.readouterr().out
    assert "| srpo 1x4 | 2 | 20 | 0.00 ± 0.00 | 0.800 ± 0.000 | 10 ± 3 |" in out  # 0.5 is reached at 12.5 and 8.33
    assert "| grpo | 1 | 20 | 0.00 ± 0.00 | 0.200 ± 0.000 | not reached | not reached | - |" in out
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_phases(tmp_path, capsys):
    evaluation.main(["phases", str(make_run(tmp_path / "r", 0, (0.0, 0.1)))])
    assert "4.00 s per step over 2 steps: base 1.00 s (25%), train 3.00 s (75%)" in capsys.readouterr().out


def test_not_a_run(tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        evaluation.main(["curves", str(tmp_path)])


def test_throughput_runs(capsys):
    speed.main(["--engine", "hf", "--data", "chain-2", "--problems", "4", "--samples", "2", "--repeats", "1"])
    assert "hf engine / generate:" in capsys.readouterr().out


BENCH = ["benchmark", "--engine", "hf", "--data", "chain-3", "chain-5", "--problems", "10", "--n", "4", "--temperature", "1"]


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
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]


def test_benchmark(benchmarked, capsys):
    rows = rows_of(benchmarked / "chain-3.jsonl")
    r = results(benchmarked)["results"]["chain-3"]
    right = np.array([row["reward"] == 1 for row in rows]).reshape(10, 4)
    assert r["problems"] == 10 and r["mean"] == pytest.approx(right.mean()) == r["pass_at"]["1"]
    assert r["pass_at"]["4"] == right.any(1).mean() and r["half"] == pytest.approx(1.96 * right.mean(1).std(ddof=1) / 10**0.5)
    assert r["tokens"] == sum(row["tokens"] for row in rows) / 10 and r["unparsable"] == np.mean([not row["answered"] for row in rows])
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
    assert sorted(rows, key=lambda r: (r["problem"], r["sample"])) == rows_of(benchmarked / "chain-3.jsonl")


def test_benchmark_under_torchrun(tmp_path, benchmarked):
    out = tmp_path / "two"
    launch = [Path(sys.executable).parent / "torchrun", "--nproc_per_node=2", ROOT / "eval.py", *(flag.replace("--n", "--samples") for flag in BENCH), "--max_rows", "8", "--out", out]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-4000:]
    assert results(out) == results(benchmarked) and "| chain-5 | 10 |" in done.stdout
    assert rows_of(out / "chain-5.jsonl") == rows_of(benchmarked / "chain-5.jsonl")


def test_compare(tmp_path, capsys):
    for name, shift in (("a", 0.0), ("b", 0.1)):
        (tmp_path / name).mkdir()
        by_problem = {str(i): (i % 5) / 10 + shift + 0.02 * (i % 2) * bool(shift) for i in range(200)}
        (tmp_path / name / "results.json").write_text(json.dumps({"results": {"set": {"by_problem": by_problem}}}))
    a, b = (str(tmp_path / name / "results.json") for name in "ab")
    evaluation.main(["benchmark", "--compare", a, b])
    assert "| set | 200 | 0.200 | 0.310 | +0.110 (+0.109 to +0.111) |" in capsys.readouterr().out  # paired: far narrower than the spread of 0.14
    with pytest.raises(UserError, match="needs two results.json"):
        evaluation.main(["benchmark", "--compare", a, str(tmp_path / "none.json")])


@pytest.mark.parametrize(
    "flags, complaint",
    [("--n 4 --temperature 0", "greedy responses are all the same"), ("--data none.jsonl", "no such data file"), ("--seed 7", "holds a benchmark with other settings")],
)
def test_benchmark_refuses(benchmarked, flags, complaint):
    before = {p: p.read_bytes() for p in benchmarked.iterdir()}
    with pytest.raises(UserError, match=complaint):
        evaluation.main([*BENCH, "--out", str(benchmarked), *flags.split()])
    assert {p: p.read_bytes() for p in benchmarked.iterdir()} == before


def test_the_committed_model_card_is_what_the_policy_does(policy):
    """Fewer problems than the card's, so with some room; the aims of the embedded default are part of it."""
    measures = evaluation.measure_policy(policy.model, policy.tokenizer, policy.engine, 384, n=128, steps=12)
    card = dict(line.strip("| ").split(" | ") for line in (POLICY / "README.md").read_text().splitlines() if line.startswith("| ") and "measure" not in line)
    stated = {name.split(",")[0].split(":")[0]: float(value) for name, value in card.items()}
    assert measures["pass_rate"] == pytest.approx(stated["sampled pass rate"], abs=0.025)
    assert measures["greedy"] == pytest.approx(stated["greedy pass rate"], abs=0.12)
    assert measures["localization_exact"] == pytest.approx(stated["self-localization"], abs=0.08)
    assert 0.03 <= stated["sampled pass rate"] <= 0.10 and stated["greedy pass rate"] < 0.5
    assert stated["self-localization"] >= 0.6 and measures["luck"] <= 0.03
    size = sum(f.stat().st_size for f in POLICY.iterdir())
    assert size <= 8_000_000
    config = policy.model.config
    assert config.model_type == "llama" and not config.tie_word_embeddings and config.hidden_size // config.num_attention_heads >= 32
