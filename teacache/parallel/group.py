"""The ranks' process group: finding each other, exchanging tokens for heads, passing orders."""

from __future__ import annotations

import datetime
import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from teacache.base.errors import ArgumentError, DeviceError
from teacache.core.ranks import Ranks
from teacache.parallel.launch import rank, world_size
from teacache.parallel.meeting import meet

if TYPE_CHECKING:
    from diffusers import ConsisIDTransformer3DModel, ParallelConfig

# So long the others wait for an order, while the first downloads, decodes and compares.
PATIENCE = datetime.timedelta(days=7)

_orders: Any = None  # the process group that orders go through


def connect(device: torch.device) -> None:
    """Find the other processes.

    Raises:
        DeviceError: where two of them have the same GPU.
    """
    global _orders
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo",
        store=meet(),
        rank=rank(),
        world_size=world_size(),
    )
    _orders = dist.new_group(backend="gloo", timeout=PATIENCE)
    if device.type == "cuda":
        check_own(str(torch.cuda.get_device_properties(device).uuid))


def check_own(gpu: str) -> None:
    """Raise DeviceError, in every process, where one of them names the same GPU as another."""
    gpus = [""] * dist.get_world_size()
    dist.all_gather_object(gpus, gpu, group=_orders)
    if len(set(gpus)) < len(gpus):
        raise DeviceError(
            f"{len(gpus)} ranks have {len(set(gpus))} GPUs between them: each needs its own"
        )


def disconnect() -> None:
    """Leave the others, at the end."""
    dist.destroy_process_group()


def tell(order: Any) -> None:
    """Let every other process's `listen` return this. Tensors in it are to be on the CPU."""
    dist.broadcast_object_list([order], group=_orders, device=torch.device("cpu"))


def listen() -> Any:
    """What the first process tells next."""
    order = [None]
    dist.broadcast_object_list(order, group=_orders, device=torch.device("cpu"))
    return order[0]


def join(transformer: ConsisIDTransformer3DModel, ranks: Ranks, device: torch.device) -> Ranks:
    """Let the transformer's attention be over the tokens of all parts, by diffusers' Ulysses.

    To be called by all processes, and after their attention processors are in place.
    """
    if ranks.parts > 1:
        config = _exchange(ranks, device)
        for processor in transformer.attn_processors.values():
            processor._parallel_config = config
    return replace(ranks, rank=dist.get_rank())


@functools.cache
def _exchange(ranks: Ranks, device: torch.device) -> ParallelConfig:
    """What diffusers' dispatcher exchanges by; made once, since it makes process groups."""
    from diffusers import ContextParallelConfig, ParallelConfig

    names = ("guidance", "ring", "ulysses")
    shape = (ranks.halves, 1, ranks.parts)
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=names)
    # What `transformer.enable_parallelism` does, which divides by the number of GPUs and so fails
    # where there are none.
    ulysses = ContextParallelConfig(ulysses_degree=ranks.parts, mesh=mesh)
    config = ParallelConfig(context_parallel_config=ulysses)
    config.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
    return config


def check_backend(name: str, backend: str) -> None:
    """Raise ArgumentError where diffusers has no exchange of tokens for heads around a backend.

    Args:
        name: as `--attention` has it; backend: the dispatcher's name.
    """
    from diffusers.models.attention_dispatch import (
        AttentionBackendName,
        _AttentionBackendRegistry,
    )

    available = _AttentionBackendRegistry._is_context_parallel_available
    if not available(AttentionBackendName(backend)):
        raise ArgumentError(
            f"--attention {name} does not go with --num_gpus, which shares tokens: native does"
        )
