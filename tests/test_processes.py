"""Several processes: a real torchrun of two on the CPU is the run of one process; checkpoints go
from one to the other; a death ends it."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_run import lines_of

import srpo
from conftest import IDEA, POLICY, ROOT, settings
from data.driver import run_programs
from data.parallel import trained_weights, whole, whole_weights
from data.policies import add_adapters, load_policy
from loss import backward, set_advantages, weigh
from rollout import HFEngine, grpo

TORCHRUN = [
    str(Path(sys.executable).parent / "torchrun"),
    "--standalone",  # a free port, also where another job runs
    "--nproc_per_node=2",
]
# 5 prompts and micro-batches of 3 rows: neither divides evenly between 2 processes.
SMALL = (
    "--engine hf --prompts_per_step 5 --micro_batch 3 --train_data chain-4 --eval_data chain-4 "
    "--eval_problems 9 --eval_samples 2 --save_every 1"
).split()
METHODS = {
    "grpo": "--method grpo --steps 2",
    "rrpo": "--method rrpo --steps 2",
    "srpo": "--steps 3",
    "fresh": (
        "--split 2x4 --seed_source fresh --localizer verifier --mask_prefix false --clip 0.2 "
        "--updates 2 --steps 2"
    ),
    # The second process has nothing to sample.
    "one_prompt": "--prompts_per_step 1 --steps 3 --localizer oracle --oracle_samples 2",
    # From a file outside the project: advantages for each thought.
    "idea": "--method {folder}/idea.py:vine --steps 2 --oracle_samples 2",
    "checkpointing": "--grad_checkpointing true --steps 2",
}


def torchrun(*args):
    """Runs a script in two processes, which must succeed."""
    done = subprocess.run([*TORCHRUN, *map(str, args)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]


def start_torchrun(*args, **pipes):
    return subprocess.Popen([*TORCHRUN, *map(str, args)], text=True, **pipes)


def weights(out, step):
    return load_file(out / "checkpoints" / f"step_{step}" / "model.safetensors")


def distance(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# --------------------------------------------------------------------------------- two are like one

JOBS = """
import sys
sys.path.insert(0, {root!r})
import srpo
for job in {jobs!r}:
    srpo.train(srpo.parse(job))
srpo.parallel.end_program()
sys.exit("Python's own end, in which Gloo's threads may abort")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every method in one process, and in two: folder with METHOD-1 and METHOD-2."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "idea.py").write_text(IDEA)

    def jobs(n):
        found = []
        for name, flags in METHODS.items():
            flags = flags.format(folder=folder).split()
            found.append([*SMALL, *flags, "--out_dir", f"{folder}/{name}-{n}"])
        return found

    script = folder / "jobs.py"  # one torchrun for all of them: no seconds go into imports
    script.write_text(JOBS.format(root=str(ROOT), jobs=jobs(2)))
    torchrun(script)
    for job in jobs(1):
        srpo.main(job)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one(runs, method):
    """Same rollouts, same metrics, same parameters: each process sampled its share, trained on its
    share, and nothing was counted twice."""
    one, two = runs / f"{method}-1", runs / f"{method}-2"
    assert lines_of(one / "rollouts.jsonl") == lines_of(two / "rollouts.jsonl")
    steps = lines_of(one / "metrics.jsonl")[-1]["step"]
    # Sums are rounded in another order, and Adam divides: a gradient near 0 may move its weight by
    # a small part of a step, which is 5e-4.
    assert distance(weights(one, steps), weights(two, steps)) < 5e-5
    before = load_file(POLICY / "model.safetensors")
    assert distance(weights(one, steps), before) > 5e-4  # it did train
    lines = zip(lines_of(one / "metrics.jsonl"), lines_of(two / "metrics.jsonl"), strict=True)
    for a, b in lines:
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            expected = b[key]
            if isinstance(expected, float):
                expected = pytest.approx(expected, abs=1e-4, rel=1e-3)
            assert a[key] == expected, key


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_checkpoint_resumes_in_another_number_of_processes(tmp_path, runs, first, then):
    out = tmp_path / "run"

    def run(n, *flags):
        if n == 1:
            srpo.main([str(flag) for flag in flags])
        else:
            torchrun(ROOT / "srpo.py", *flags)

    run(first, *SMALL, "--steps", "2", "--out_dir", out)
    run(then, "--resume", out, "--steps", "3")
    assert distance(weights(out, 3), weights(runs / "srpo-1", 3)) < 1e-5
    assert [line["step"] for line in lines_of(out / "metrics.jsonl")] == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------- how runs end


def test_a_dead_process_ends_the_job(tmp_path):
    out = tmp_path / "run"
    flags = [*SMALL, "--steps", "1000", "--out_dir", out]
    process = start_torchrun(
        ROOT / "srpo.py", *flags, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    killed = time.monotonic()
    _, stderr = process.communicate(timeout=90)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert re.search(r"rank\s+: 1 .*\n.*exitcode\s+: -9", stderr)
    for pid in children:
        assert not Path(f"/proc/{pid}").exists()


def test_ctrl_c_saves_in_every_process(tmp_path):
    out = tmp_path / "run"
    flags = [*SMALL, "--steps", "1000", "--save_every", "500", "--out_dir", out]
    patient = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "200"}  # for a busy machine
    process = start_torchrun(
        ROOT / "srpo.py", *flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=patient
    )
    metrics = out / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 1):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, _ = process.communicate(timeout=240)
    assert f"go on with: torchrun --nproc_per_node=2 srpo.py --resume {out}" in stdout
    (checkpoint,) = (out / "checkpoints").glob("step_*")
    assert lines_of(metrics)[-1]["step"] == int(checkpoint.name.removeprefix("step_"))


def traced_files_of_ours(stderr):
    """Files of this project, not of its libraries, that a traceback in stderr goes through.

    A virtual environment inside the checkout is not ours. torchrun, which lies there, prints a
    traceback of its own.
    """
    ours = {str(path) for path in (*ROOT.glob("*.py"), *ROOT.glob("data/*.py"))}
    traced = set(re.findall(r'^\s*(?:\[rank\d+\]:\s*)?File "([^"]+)", line \d+', stderr, re.M))
    return traced & ours


@pytest.mark.parametrize(
    "flags, complaint",
    [
        # on all processes
        ("--tp 3", "--tp 3 must divide the number of processes, 2"),
        # on the first one
        ("--out_dir /proc/run", "cannot write to"),
    ],
)
def test_bad_input_is_said_once(tmp_path, flags, complaint):
    flags = [*SMALL, "--out_dir", str(tmp_path / "run"), *flags.split()]
    done = subprocess.run(
        [*TORCHRUN, str(ROOT / "srpo.py"), *flags], capture_output=True, text=True, timeout=100
    )
    assert done.returncode != 0
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("srpo.py: ")]
    assert complaint in said
    assert traced_files_of_ours(done.stderr) == set()


# ----------------------------------------------------------------------------------- sharded models


@contextmanager
def process_group():
    """A process group of this process alone: a new one, or the one that a vLLM engine keeps."""
    if torch.distributed.is_initialized():
        yield
        return
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def rewarded_rollouts(policy):
    """Base groups of 8 in which every third rollout is rewarded, whatever it says."""
    tasks = policy.tasks(4, 6, base=8)
    results = run_programs([grpo(task) for task in tasks], policy.engine).results
    rollouts = list(chain(*results))
    for i, rollout in enumerate(rollouts):
        rollout.reward = float(i % 3 == 0)
    set_advantages(rollouts)
    return rollouts


def backward_as_on_a_gpu(rollouts, lora_rank):
    """What a GPU runs, on a CPU of one process: shards, bf16 compute and gradient checkpointing.

    Returns the model with its gradients."""
    model, _ = load_policy(POLICY, torch.bfloat16 if lora_rank else torch.float32)
    if lora_rank:
        add_adapters(model, lora_rank)
    cfg = srpo.Config(lora_rank=lora_rank, dtype="bfloat16", grad_checkpointing=True).resolve()
    srpo.prepare(model, cfg, torch.device("cpu"), sharded=True)
    cfg = settings(micro_batch=5)
    backward(model, weigh(rollouts, cfg), 0, cfg)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.dtype == p.grad.dtype == torch.float32, name
    return model


def test_bf16_shards_on_float32_masters(policy):
    """bf16 compute with float32 gradients and masters: close to the float32 gradient. With
    adapters: see test_lora.py."""
    rollouts = rewarded_rollouts(policy)
    policy.model.zero_grad()
    cfg = settings()
    backward(policy.model, weigh(rollouts, cfg), 0, cfg)
    exact = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    with process_group():
        model = backward_as_on_a_gpu(rollouts, lora_rank=0)
        for name, p in model.named_parameters():
            assert (whole(p.grad) - exact[name]).norm() < 0.15 * exact[name].norm(), name
        assert dict(whole_weights(model)).keys() == exact.keys()


def test_buffers_of_a_checkpoint_reach_the_sampler_and_the_checkpoint(policy):
    """Such as the bias of a router of experts; not those that a model computes, as of positions."""
    model = copy.deepcopy(policy.model)
    model.register_buffer("bias", torch.tensor([1.0]))
    engine = HFEngine(model, policy.tokenizer, 512, torch.device("cpu"))
    model.bias += 1
    engine.sync(trained_weights(model))
    assert engine.model.bias == 2 and dict(whole_weights(model))["bias"] == 2
    assert dict(trained_weights(model)).keys() == model.state_dict().keys()


def test_the_model_that_is_trained_is_the_one_that_was_loaded(policy):
    """whole_weights names and orders what a Hugging Face checkpoint holds; one process passes its
    own tensors on, uncopied."""
    streamed = dict(whole_weights(policy.model))
    assert streamed.keys() == load_file(POLICY / "model.safetensors").keys()
    for name, weight in streamed.items():
        assert weight.data_ptr() == policy.model.get_parameter(name).data_ptr()
        assert not isinstance(weight, torch.distributed.tensor.DTensor)
    json.dumps(list(streamed))
