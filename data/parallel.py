"""Several processes: joining them, exchanging objects, sharding the model, and reading whole
weights.

`torchrun` starts the processes; without it there is one, and every function here still works.

    connect() joins them, and lets them end with torchrun's agent; end_program() ends all of them;
    rank() 0 writes files and prints; gather(x) gives every process what each one has;
    on_main(f) runs f once, on rank 0; shard(model, ...) splits parameters, gradients and optimizer
    state (FSDP2); whole_weights(model) names them as a Hugging Face checkpoint does.

Left out: pipeline and sequence parallelism, and training and sampling on different GPUs.

Try it alone:  torchrun --nproc_per_node=2 -m data.parallel    # each process says who it is
"""

import ctypes
import os
import signal
import sys
from datetime import timedelta
from types import MethodType
from typing import Callable, Iterator

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from data.faults import UserError

# ---------------------------------------------------------------------------------------- processes


def processes() -> int:
    """How many processes `torchrun` started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number among them, from 0."""
    return int(os.environ.get("RANK", 0))


def connect(dtype: str | None = None) -> tuple[torch.device, bool]:
    """Joins the processes: (this process's device, whether the model is to be sharded).

    NCCL between GPUs, Gloo between CPUs. One process is a shard of its own on a GPU, and on a CPU
    that computes in bfloat16 (dtype, of --dtype): with float32 master weights this is then the same
    code as for many. Raises UserError if a process has no GPU of its own.
    """
    if processes() > 1:
        end_with_parent()
    local = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise UserError(
            f"process {local} of this machine has no GPU of its own "
            f"({torch.cuda.device_count()} there); lower --nproc_per_node"
        )
    if cuda:
        torch.cuda.set_device(local)
    sharded = cuda or processes() > 1 or dtype == "bfloat16"
    if sharded and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        patience = timedelta(hours=2)  # a phase of sampling may be that uneven
        store = store_of_agent() if processes() > 1 else dist.HashStore()
        store.set_timeout(patience)
        places = dict(rank=rank(), world_size=processes())
        dist.init_process_group(backend, timeout=patience, store=store, **places)
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    return device, sharded


def usual_dtype() -> str:
    """The name of the type that a policy computes in where --dtype is unset."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


JOIN = timedelta(minutes=1)  # torchrun's agent listens before it starts a process


def store_of_agent() -> dist.Store:
    """The store through which processes find each other. Raises UserError if nobody serves it.

    Then the agent ended while this process imported torch, too early for `end_with_parent`.
    """
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=JOIN))
    except dist.DistNetworkError as fault:
        reason = str(fault).partition("\n")[0][:200]
        raise UserError(f"torchrun's agent does not answer ({reason}); start torchrun again")
    return store


PARENT = os.getppid()  # who started this process: torchrun's agent, in a run of several
PR_SET_PDEATHSIG = 1  # see prctl(2)


def end_with_parent() -> None:
    """From now on the system kills this process when its parent ends, however it ends (Linux).

    A process whose agent is gone would go on training beside the run that --resume starts.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError("prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != PARENT:  # it ended before the call
        os._exit(1)


def end_program() -> None:
    """Ends a program that succeeded: leaves the group, and one of several processes ends here.

    It ends without Python's own end. destroy_process_group does not stop Gloo's threads, because
    torch keeps references to the group once a model was sharded. Such a thread may still hold the
    tensors of the last collective; if it drops them while Python ends, the process aborts. So files
    must be closed and trackers finished before. vLLM closes its groups, and ours, itself.
    """
    if not dist.is_initialized() or "vllm" in sys.modules:
        return
    barrier()  # a process that just ends can take others down
    dist.destroy_process_group()
    if processes() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def gather(mine) -> list:
    """What each process gave, on every process, by rank. All processes must call it."""
    if processes() == 1:
        return [mine]
    parts = [None] * processes()
    dist.all_gather_object(parts, mine)
    return parts


def barrier() -> None:
    """Waits until every process is here: what they did with files before is done for all."""
    gather(None)


def on_main(action: Callable, *args):
    """Runs action(*args) on rank 0 and broadcasts its result, or its UserError."""
    if processes() == 1:
        return action(*args)
    told = [None]
    if rank() == 0:
        try:
            told = [action(*args)]
        except UserError as fault:
            told = [fault]
    dist.broadcast_object_list(told)
    if isinstance(told[0], UserError):
        raise told[0]
    return told[0]


class StopRequest:
    """Ctrl-C or SIGTERM: the step in progress ends, is saved, and the run stops. A second Ctrl-C
    stops at once."""

    def __init__(self):
        self.requested = False
        self.before = {}
        for sign in (signal.SIGINT, signal.SIGTERM):
            self.before[sign] = signal.signal(sign, self.request)

    def restore(self) -> None:
        for sign, handler in self.before.items():
            signal.signal(sign, handler)

    def request(self, *_) -> None:
        self.requested = True
        # No KeyboardInterrupt: Python would first wait for every answer that is still to be graded.
        for sign in self.before:
            signal.signal(sign, signal.SIG_DFL)
        if rank() == 0:
            print("\nstopping after this step (once more: at once)", file=sys.stderr)
            if processes() > 1:
                print(
                    "torchrun kills the run 30 s after Ctrl-C, unless it was started with a longer "
                    "--shutdown_timeout",
                    file=sys.stderr,
                )


# ------------------------------------------------------------------------------------------- shards


def shard(model, layers: list, device: torch.device, dtype: torch.dtype, method: Callable) -> None:
    """Shards a loaded model over all processes, in place (FSDP2): each of its layers, then the
    rest.

    It computes in `dtype`, with float32 masters and gradients. Gradients are summed over
    processes, not averaged: the loss's weights already hold 1/N of the whole step. method: a
    function (model, ...) that runs the model; it becomes a method that gathers parameters as
    `forward` does.
    """
    mesh = init_device_mesh(device.type, (processes(),))
    precision = MixedPrecisionPolicy()
    if dtype != torch.float32:
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for part in (*layers, model):  # moves it to the device, one part at a time
        fully_shard(part, mesh=mesh, mp_policy=precision)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    setattr(model, method.__name__, MethodType(method, model))
    register_fsdp_forward_method(model, method.__name__)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in one piece. If it is sharded, every process must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of what an engine gets after a step, one at a time.

    All weights, or the trained ones where only adapters are trained. Every process must read all of
    it.
    """
    frozen = False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, whole(parameter)
        else:
            frozen = True
    if not frozen:
        yield from kept_buffers(model)


def whole_weights(model) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, whole tensor) of what a Hugging Face checkpoint holds, one at a time.

    LoRA adapters are merged into the weights that they adapt, in float32: bf16 would round small
    ones away. Every process must read all of it.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight = whole(parameter)
        if name.endswith(".base_layer.weight"):
            layer = model.get_submodule(name.removesuffix(".base_layer.weight"))
            weight = weight.float() + adapter_delta(layer)
        yield name.replace(".base_layer.", "."), weight
    yield from kept_buffers(model)


def kept_buffers(model) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that are part of a checkpoint, such as the bias of a router of experts."""
    names = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in names:
            yield name, buffer


def adapter_delta(layer) -> torch.Tensor:
    """What the LoRA adapter of a layer adds to its weight."""
    A = whole(layer.lora_A["default"].weight)
    B = whole(layer.lora_B["default"].weight)
    delta = B @ A * layer.scaling["default"]
    return delta.T if layer.fan_in_fan_out else delta


if __name__ == "__main__":
    device, sharded = connect()
    print(f"process {rank()} of {processes()} on {device}, sharded: {sharded}; {gather(rank())}")
    end_program()
