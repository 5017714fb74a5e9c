"""What the README shows as code really runs."""

import re

import pytest

import localize
import loss
import rollout
import srpo
from conftest import ROOT
from data import problems
from data.driver import run_programs
from rollout import PROGRAMS

README = (ROOT / "README.md").read_text()


def test_the_worked_example_runs(policy):
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "PROGRAMS[" in block
    ]
    try:
        exec(code, {})
        sampled = run_programs(
            [PROGRAMS["halfway"](task) for task in policy.tasks(6, 8)], policy.engine
        )
        buffers, generated = sampled.results, sampled.generated
    finally:
        PROGRAMS.pop("halfway", None)
    rollouts = [r for buffer in buffers for r in buffer]
    assert len(rollouts) == 64 and len(generated) == 64
    loss.set_advantages(rollouts)
    assert any(r.reset and r.prefix_len for r in rollouts)


@pytest.mark.parametrize(
    "name",
    sorted(
        set(re.findall(r"`((?:rollout|localize|loss|srpo|data\.problems)\.[A-Za-z_.]+)`", README))
        - {"rollout.py", "localize.py", "loss.py", "srpo.py"}
    ),
)
def test_every_name_in_the_paper_table_exists(name):
    module, *path = name.removeprefix("data.").split(".")
    found = {
        "rollout": rollout,
        "localize": localize,
        "loss": loss,
        "srpo": srpo,
        "problems": problems,
    }[module]
    for part in path:
        assert hasattr(found, part) or part in getattr(found, "__dataclass_fields__", {})
        found = getattr(found, part, None)


SHAPES = {  # Qwen2.5: parameters, layers, d, d_ff, heads, KV heads, head size, vocabulary, embeddings tied to the head
    "0.5B": (0.494e9, 24, 896, 4864, 14, 2, 64, 151936, True),
    "1.5B": (1.544e9, 28, 1536, 8960, 12, 2, 128, 151936, True),
    "7B": (7.616e9, 28, 3584, 18944, 28, 4, 128, 152064, False),
    "14B": (14.77e9, 48, 5120, 13824, 40, 8, 128, 152064, False),
}


def memory(name, N, R=4, L=5632, chunk=4096, rank=64):
    """The README's formulas: (what is trained, GB while sampling beside vLLM, GB while training, thousand tokens in vLLM's cache)."""
    P, layers, d, d_ff, heads, kv_heads, size, V, tied = SHAPES[name]
    E = V * d * (1 if tied else 2)
    P_layer = (P - E) / layers
    r = rank * layers * (4 * d + 2 * (d + kv_heads * size) + 3 * (d + d_ff))
    activations = (
        2 * R * L * (layers * d + 6 * d + 2 * (heads + 2 * kv_heads) * size + 4 * d_ff)
        + 12 * chunk * V
    )
    cache = (0.5 * 80e9 - 2 * P) / (4 * layers * kv_heads * size)
    full = 12 * P / N, 16 * P / N + 8 * E + 10 * P_layer + activations
    lora = (2 * P + 12 * r) / N, (2 * P + 16 * r) / N + 2 * E + 4 * P_layer + activations
    for what, (sampling, training) in (("all weights", full), ("LoRA", lora)):
        if sampling + 0.5 * 80e9 < 76e9 and training < 76e9:  # 4 GB for what a framework takes
            return f"{what} {sampling / 1e9:.0f} / {training / 1e9:.0f} ({cache / 1e3:,.0f}k)"


def test_the_memory_table_is_its_formula():
    for name in SHAPES:
        assert f"| {name} | " + " | ".join(memory(name, N) for N in (1, 2, 4, 8)) + " |" in README
