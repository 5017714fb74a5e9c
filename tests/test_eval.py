"""Measures and pictures: the estimator by enumeration, and every command on small sizes."""

import itertools
import json

import pytest

import eval as evaluation
from conftest import POLICY
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


def test_pass_card_and_throughput_run(capsys):
    evaluation.main(["pass", "--data", "chain-3", "--problems", "16", "--samples", "4"])
    assert "pass@4" in capsys.readouterr().out
    evaluation.main(["throughput", "--engine", "hf", "--data", "chain-2", "--problems", "4", "--samples", "2", "--repeats", "1"])
    assert "hf engine / generate:" in capsys.readouterr().out


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
