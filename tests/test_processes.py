"""Several processes: a real torchrun of two on the CPU is the run of one process; checkpoints go from one to the other; a death ends it."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_run import lines_of
from torch.distributed.fsdp import MixedPrecisionPolicy

import srpo
from conftest import POLICY, ROOT, settings
from data.driver import run_programs
from data.policies import load_policy
from loss import backward, set_advantages
from rollout import grpo

TORCHRUN = [
    str(Path(sys.executable).parent / "torchrun"),
    "--standalone",
    "--nproc_per_node=2",
]  # standalone: a free port, also where another job runs
# 5 prompts and micro-batches of 3 rows divide by 2 nowhere
SMALL = "--engine hf --prompts_per_step 5 --micro_batch 3 --train_data chain-4 --eval_data chain-4 --eval_problems 9 --eval_samples 2 --save_every 1".split()
METHODS = {
    "grpo": "--method grpo --steps 2",
    "rrpo": "--method rrpo --steps 2",
    "srpo": "--steps 3",
    "fresh": "--split 2x4 --seed_source fresh --localizer verifier --mask_prefix false --clip 0.2 --updates 2 --steps 2",
    "one_prompt": "--prompts_per_step 1 --steps 3 --localizer oracle --oracle_samples 2",  # the second process has nothing to sample
    "checkpointing": "--grad_checkpointing true --steps 2",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every method in one process, and in two: folder with METHOD-1 and METHOD-2."""
    folder = tmp_path_factory.mktemp("processes")
    jobs = {
        n: [
            [*SMALL, *flags.split(), "--out_dir", f"{folder}/{name}-{n}"]
            for name, flags in METHODS.items()
        ]
        for n in (1, 2)
    }
    script = folder / "jobs.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport srpo\nfor job in {jobs[2]!r}:\n    srpo.train(srpo.parse(job))\n"
    )
    done = subprocess.run([*TORCHRUN, script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-6000:]
    for job in jobs[1]:
        srpo.main(job)
    return folder


def weights(out, step):
    return load_file(out / "checkpoints" / f"step_{step}" / "model.safetensors")


def distance(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one(runs, method):
    """Same rollouts, same metrics, same parameters: each process sampled its share, trained on its share, and nothing was counted twice."""
    one, two = runs / f"{method}-1", runs / f"{method}-2"
    assert lines_of(one / "rollouts.jsonl") == lines_of(two / "rollouts.jsonl")
    steps = lines_of(one / "metrics.jsonl")[-1]["step"]
    assert distance(weights(one, steps), weights(two, steps)) < 1e-5
    assert (
        distance(weights(one, steps), load_file(POLICY / "model.safetensors")) > 5e-4
    )  # it did train
    for a, b in zip(lines_of(one / "metrics.jsonl"), lines_of(two / "metrics.jsonl"), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            close = (
                pytest.approx(b[key], abs=1e-4, rel=1e-3) if isinstance(b[key], float) else b[key]
            )
            assert a[key] == close, key


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_checkpoint_resumes_in_another_number_of_processes(tmp_path, runs, first, then):
    out = tmp_path / "run"

    def run(n, *flags):
        if n == 1:
            return srpo.main([str(flag) for flag in flags])
        done = subprocess.run(
            [*TORCHRUN, ROOT / "srpo.py", *flags], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr[-6000:]

    run(first, *SMALL, "--steps", "2", "--out_dir", out)
    run(then, "--resume", out, "--steps", "3")
    assert distance(weights(out, 3), weights(runs / "srpo-1", 3)) < 1e-5
    assert [line["step"] for line in lines_of(out / "metrics.jsonl")] == [0, 1, 2, 3]


def test_a_dead_process_ends_the_job(tmp_path):
    process = subprocess.Popen([*TORCHRUN, ROOT / "srpo.py", *SMALL, "--steps", "1000", "--out_dir", tmp_path / "run"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert process.poll() is None
        time.sleep(0.05)
    children = [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    assert len(children) == 2
    os.kill(children[1], signal.SIGKILL)
    killed = time.monotonic()
    _, stderr = process.communicate(timeout=90)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0 and re.search(r"rank\s+: 1 .*\n.*exitcode\s+: -9", stderr)
    for pid in children:
        assert not Path(f"/proc/{pid}").exists()


def test_ctrl_c_saves_in_every_process(tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([*TORCHRUN, ROOT / "srpo.py", *SMALL, "--steps", "1000", "--save_every", "500", "--out_dir", out],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    while not (out / "metrics.jsonl").exists() or len(lines_of(out / "metrics.jsonl")) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert f"go on with: torchrun --nproc_per_node=2 srpo.py --resume {out}" in stdout
    (checkpoint,) = (out / "checkpoints").glob("step_*")
    assert lines_of(out / "metrics.jsonl")[-1]["step"] == int(checkpoint.name.removeprefix("step_"))


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--tp 3", "--tp 3 must divide the number of processes, 2"),
        ("--out_dir /proc/run", "cannot write to"),
    ],  # on all, and on the first
)
def test_bad_input_is_said_once(tmp_path, flags, complaint):
    flags = [*SMALL, "--out_dir", tmp_path / "run", *flags.split()]
    done = subprocess.run(
        [*TORCHRUN, ROOT / "srpo.py", *flags], capture_output=True, text=True, timeout=100
    )
    said = [line for line in done.stderr.splitlines() if line.startswith("srpo.py: ")]
    assert (
        done.returncode != 0
        and len(said) == 1
        and complaint in said[0]
        and 'Traceback (most recent call last):\n  File "' + str(ROOT) not in done.stderr
    )


def test_bf16_shards_on_float32_masters(policy, monkeypatch):
    """What a GPU runs, on a CPU of one process: bf16 compute, float32 gradients and masters, with adapters a bf16 base."""
    tasks = policy.tasks(4, 6, base=8)
    rollouts = [
        r
        for buffer in run_programs([grpo(t) for t in tasks], policy.engine).results
        for r in buffer
    ]
    for i, r in enumerate(rollouts):
        r.reward = float(i % 3 == 0)
    set_advantages(rollouts)
    policy.model.zero_grad()
    backward(policy.model, rollouts, len(rollouts), 0, settings())
    exact = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    monkeypatch.setattr(srpo, "MixedPrecisionPolicy", lambda **_: bf16)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        for lora_rank in (0, 4):
            model, _ = load_policy(POLICY, torch.bfloat16 if lora_rank else torch.float32)
            if lora_rank and importlib.util.find_spec("peft") is None:
                continue
            srpo.prepare(
                model,
                srpo.Config(lora_rank=lora_rank, grad_checkpointing=True).resolve(),
                torch.device("cpu"),
                sharded=True,
            )
            backward(model, rollouts, len(rollouts), 0, settings(micro_batch=5))
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained.values())
            if lora_rank:
                assert {p.dtype for p in model.parameters() if not p.requires_grad} == {
                    torch.bfloat16
                }
            else:
                for name, p in trained.items():
                    assert (srpo.whole(p.grad) - exact[name]).norm() < 0.15 * exact[name].norm(), (
                        name
                    )
            assert dict(srpo.whole_weights(model)).keys() == exact.keys()
    finally:
        torch.distributed.destroy_process_group()


def test_the_model_that_is_trained_is_the_one_that_was_loaded(policy):
    """whole_weights names and orders what a Hugging Face checkpoint holds; one process passes its own tensors on, uncopied."""
    streamed = dict(srpo.whole_weights(policy.model))
    assert streamed.keys() == load_file(POLICY / "model.safetensors").keys()
    assert all(
        weight.data_ptr() == policy.model.get_parameter(name).data_ptr()
        for name, weight in streamed.items()
    )
    assert not any(
        isinstance(weight, torch.distributed.tensor.DTensor) for weight in streamed.values()
    )
    json.dumps(list(streamed))
