"""What the README says is so: its example runs, its names exist, its table is its formula."""

import importlib
import json
import re

import pytest

import srpo
from conftest import ROOT
from tests.gpu import SHAPES, Shape, on_paper

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "tests" / "README.md").read_text()
MODULES = {path.stem: path.stem for path in ROOT.glob("*.py")}
MODULES |= {path.stem: f"data.{path.stem}" for path in (ROOT / "data").glob("*.py")}


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 250
    assert max(map(len, lines)) <= 110


def test_the_worked_example_trains(tmp_path):
    """From a file outside the project, as the README says: every thought has its own advantage."""
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    (code,) = [block for block in blocks if "def vine" in block]
    (tmp_path / "vine.py").write_text(code)
    out = tmp_path / "run"
    flags = "--engine hf --steps 1 --prompts_per_step 6 --train_data chain-3 --eval_data chain-3"
    flags += " --eval_problems 4 --rollouts_every 1 --oracle_samples 2"
    srpo.main([*flags.split(), "--method", f"{tmp_path}/vine.py:vine", "--out_dir", str(out)])
    records = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["group"] is not None]
    assert len(trained) == 24 and len(records) > 24
    assert all(len(r["advantages"]) == len(r["thoughts"]) for r in trained)
    assert any(len(set(r["advantages"])) > 1 for r in trained)
    (line,) = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()][1:]
    assert line["trained_tokens"] > 0


def names_of_code():
    """`module.name` and `module.Class.name` in the README, of the project's own modules."""
    found = set()
    for module, path in re.findall(r"`(\w+)\.([A-Za-z_.]+)`", README):
        if module in MODULES and path not in ("py", "jsonl"):
            found.add((module, path))
    return sorted(found)


def test_the_readme_names_the_steps_of_the_paper():
    assert len(names_of_code()) >= 15


@pytest.mark.parametrize("module, path", names_of_code())
def test_every_name_exists(module, path):
    found = importlib.import_module(MODULES[module])
    for part in path.split("."):
        assert hasattr(found, part) or part in getattr(found, "__dataclass_fields__", {})
        found = getattr(found, part, None)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)[#)]", README + "\n"))))
def test_every_linked_file_exists(path):
    assert (ROOT / path).exists()


# ---------------------------------------------------------------------------- memory, on paper


GPU = 80e9  # bytes
VLLM = 0.5 * GPU
USABLE = 76e9  # the rest is what a framework takes


def memory(shape: Shape, N: int) -> str | None:
    """The cell of the table for N GPUs, by the formulas above it; None where nothing fits."""
    s = shape
    cache = (VLLM - 2 * s.P) / (4 * s.layers * s.kv_heads * s.head_size)
    for way, bytes in on_paper(s, N).items():
        sampling, training = bytes.sampling, bytes.training
        if sampling + VLLM < USABLE and training < USABLE:
            return f"{way} {sampling / 1e9:.0f} / {training / 1e9:.0f} ({cache / 1e3:,.0f}k)"
    return None


@pytest.mark.parametrize("name", SHAPES)
def test_the_memory_table_is_its_formula(name):
    cells = [memory(SHAPES[name], N) for N in (1, 2, 4, 8)]
    assert f"| {name} | {' | '.join(cells)} |" in RESULTS
