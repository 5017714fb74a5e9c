"""Adapters (the optional peft library): only they are trained, checkpoints hold the merged policy,
and everything else is as without them."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_english import folder as reader  # noqa: F401  (the fixture: a model that reads text)
from test_processes import (
    backward_as_on_a_gpu,
    distance,
    process_group,
    rewarded_rollouts,
    torchrun,
    weights,
)
from test_run import TINY, lines_of
from transformers import AutoModelForCausalLM

import srpo
from conftest import POLICY, ROOT
from data import warm_start
from data.faults import UserError
from data.parallel import adapter_delta, trained_weights, whole_weights
from data.policies import add_adapters, load_policy
from rollout import HFEngine

if "REQUIRE_OPTIONAL" not in os.environ:  # the gate sets it: there these tests may not be skipped
    pytest.importorskip("peft", reason="peft is not installed; see Run it in README.md")

FLAGS = [*TINY, "--lora_rank", "4", "--lr", "1e-2", "--eval_every", "0"]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "one"
    srpo.main([*FLAGS, "--steps", "3", "--out_dir", str(out)])
    return out


def test_only_the_linear_layers_move(adapted):
    before, after = load_file(POLICY / "model.safetensors"), weights(adapted, 3)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        linear = name.endswith("_proj.weight")
        assert torch.equal(weight, after[name]) != linear, name
        if linear:
            change = (after[name] - weight).double()
            assert torch.linalg.matrix_rank(change, rtol=1e-4) <= 4
    checkpoint = adapted / "checkpoints" / "step_3"
    AutoModelForCausalLM.from_pretrained(checkpoint)
    # It goes on from adapters and their moments; the whole model's would be three times its size.
    state_bytes = sum(file.stat().st_size for file in (checkpoint / "state").iterdir())
    assert state_bytes < 0.7 * 3 * (POLICY / "model.safetensors").stat().st_size


def test_merged_weights_are_the_adapted_policy():
    model, _ = load_policy(POLICY)
    torch.manual_seed(0)
    add_adapters(model, 4)
    for name, p in model.named_parameters():
        assert p.requires_grad == (".lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)  # starts at zero
    merged, _ = load_policy(POLICY)
    ids = torch.randint(0, 150, (2, 40))
    plain = merged(ids).logits
    merged.load_state_dict(dict(whole_weights(model)))
    assert (model(ids).logits - plain).abs().max() > 0.1
    assert torch.allclose(model(ids).logits, merged(ids).logits, atol=1e-4)


def test_a_bf16_sampler_follows_small_adapters():
    """Merged into bf16 weights a small change is lost: it is below half of their spacing."""
    model, tokenizer = load_policy(POLICY, torch.bfloat16)
    add_adapters(model, 4)
    engine = HFEngine(model, tokenizer, device=torch.device("cpu"), dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=1e-4)  # of one update
    engine.sync(trained_weights(model))
    adapted = [name for name, m in model.named_modules() if hasattr(m, "lora_A")]
    assert adapted
    for name in adapted:
        trained, copied = model.get_submodule(name), engine.model.get_submodule(name)
        assert torch.equal(trained.base_layer.weight, copied.base_layer.weight)
        change = adapter_delta(trained)
        assert (adapter_delta(copied) - change).norm() < 0.02 * change.norm(), name
        weight = trained.base_layer.weight.float()
        merged = (weight + change).bfloat16().float() - weight
        assert (merged - change).norm() > 0.5 * change.norm(), name  # else this shows nothing


def test_the_usual_learning_rate():
    assert srpo.Config(lora_rank=4).resolve().lr == 5e-4  # the embedded policy's own
    assert srpo.Config(model="another", lora_rank=4).resolve().lr == 5e-5


def test_resume_is_exact(tmp_path, adapted):
    out = tmp_path / "run"
    srpo.main([*FLAGS, "--steps", "2", "--out_dir", str(out)])
    shutil.rmtree(out / "checkpoints" / "step_1")
    srpo.main(["--resume", str(out), "--steps", "3"])
    assert distance(weights(out, 3), weights(adapted, 3)) == 0


def test_two_processes_are_one(tmp_path, adapted):
    out = tmp_path / "two"
    torchrun(ROOT / "srpo.py", *FLAGS, "--steps", "3", "--out_dir", out)
    assert lines_of(out / "rollouts.jsonl") == lines_of(adapted / "rollouts.jsonl")
    assert distance(weights(out, 3), weights(adapted, 3)) < 1e-4


def test_adapters_are_float32_on_a_bf16_base(policy):
    rollouts = rewarded_rollouts(policy)
    with process_group():
        model = backward_as_on_a_gpu(rollouts, lora_rank=4)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        assert {p.dtype for p in frozen} == {torch.bfloat16}
        names = {name for name, _ in policy.model.named_parameters()}
        assert dict(whole_weights(model)).keys() == names


# --------------------------------------------------------------------------------------- warm start

SMALL = ["--format_steps", "4", "--review_steps", "4", "--problems", "8", "--rows", "4"]
SMALL += ["--measure", "0", "--max_tokens_per_thought", "8", "--save_every", "2"]
SMALL += ["--lora_rank", "2", "--lr", "1e-2", "--dtype", "bfloat16"]


def test_a_warm_start_is_its_adapters(reader, tmp_path):  # noqa: F811
    """Whole, resumed in the midst of a phase, or from its file of adapters: the same policy."""
    whole, resumed, quick = tmp_path / "whole", tmp_path / "resumed", tmp_path / "quick"
    warm_start.main(["--model", str(reader), "--out", str(whole), *SMALL])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_start, "solution", stops_after(warm_start.solution, 13))
        with pytest.raises(KeyboardInterrupt):  # in step 4 of 4; 2 are saved
            warm_start.main(["--model", str(reader), "--out", str(resumed), *SMALL])
    state = torch.load(resumed / "format.pt")
    assert state["step"] == 2 and all(".lora_" in name for name in state["trained"])
    warm_start.main(["--model", str(reader), "--out", str(resumed), *SMALL])
    adapters = whole / "adapters.safetensors"
    warm_start.main(["--model", str(reader), "--out", str(quick), "--adapters", str(adapters)])

    policy = load_file(whole / "model.safetensors")
    before = load_file(reader / "model.safetensors")
    assert any(not torch.equal(policy[name], before[name]) for name in policy)
    for other in (resumed, quick):
        same = load_file(other / "model.safetensors")
        assert same.keys() == policy.keys()
        assert all(torch.equal(same[name], policy[name]) for name in policy)


def stops_after(make, n: int):
    """A function that does as `make`, n times, and is then interrupted."""
    calls = iter(range(n))

    def make_or_stop(*args):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return make(*args)

    return make_or_stop


def test_adapters_are_merged_as_peft_merges_them(tmp_path):
    path = tmp_path / "adapters.safetensors"
    base, _ = load_policy(POLICY)
    model, _ = load_policy(POLICY)
    torch.manual_seed(0)
    add_adapters(model, 3)
    for name, p in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
            p.data = p.data.bfloat16().float()  # what the file holds
    warm_start.write_adapters(model, base, path)
    merged, _ = load_policy(POLICY)
    warm_start.merge_adapters(merged, path)
    for name, weight in whole_weights(model):
        assert torch.allclose(merged.get_parameter(name), weight, atol=1e-6), name
    with pytest.raises(UserError, match="were trained on another model"):
        warm_start.merge_adapters(merged, path)  # a second time


def test_a_file_that_holds_no_adapters_is_refused(tmp_path):
    (tmp_path / "torn").write_bytes(b"x")
    for file, said in (
        ("torn", "torn: cannot be read"),
        (POLICY / "model.safetensors", "no adapt"),
    ):
        command = ["--model", str(POLICY), "--out", str(tmp_path / "out"), "--adapters"]
        with pytest.raises(UserError, match=said):
            warm_start.main([*command, str(tmp_path / file)])
        assert not list((tmp_path / "out").glob("*"))  # the mended command is not refused
