"""Processes."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from data.faults import UserError


def connect() -> tuple[torch.device, bool]:
    """Joins the processes that torchrun started, NCCL between GPUs and Gloo between CPUs: (this process's device, whether the model is
    to be sharded). One GPU is a shard of its own: bf16 compute on float32 master weights is then the same code as on many."""
    local, cuda = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise UserError(
            f"process {local} of this machine has no GPU of its own ({torch.cuda.device_count()} there); lower --nproc_per_node"
        )
    if cuda:
        torch.cuda.set_device(local)
    sharded = cuda or processes() > 1
    if sharded and not dist.is_initialized():
        alone = {} if processes() > 1 else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2), **alone
        )  # a phase may be that uneven
    return torch.device("cuda", local) if cuda else torch.device("cpu"), sharded


def gather(mine) -> list:
    """[what each process gave], on every process; [mine] where there is only one."""
    if processes() == 1:
        return [mine]
    parts = [None] * processes()
    dist.all_gather_object(parts, mine)
    return parts


def processes() -> int:
    """How many processes `torchrun` started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """This process's number among them, from 0."""
    return int(os.environ.get("RANK", 0))


def on_main(action, *args):
    """What action(*args) returns, done by the first process and told to all of them; its UserError too."""
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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in one piece: gathered from all processes if it is sharded (every process must call it)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_weights(model):
    """(name as in a Hugging Face checkpoint, tensor) of every parameter, whole, one at a time, adapters merged into what they adapt."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight = whole(parameter)
        if name.endswith(".base_layer.weight"):
            layer = model.get_submodule(name.removesuffix(".base_layer.weight").removesuffix("."))
            delta = (
                whole(layer.lora_B["default"].weight)
                @ whole(layer.lora_A["default"].weight)
                * layer.scaling["default"]
            )
            weight = weight.float() + (delta.T if layer.fan_in_fan_out else delta)
        yield name.replace(".base_layer.", "."), weight
