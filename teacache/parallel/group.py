"""The process group of the ranks: connection, Ulysses attention, broadcast of orders."""

import datetime
import functools
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ConsisIDTransformer3DModel, ContextParallelConfig, ParallelConfig
from diffusers.models import attention_dispatch as dispatch

from teacache.base.errors import ArgumentError, DeviceError
from teacache.core.ranks import Ranks
from teacache.parallel.launch import rank, world_size
from teacache.parallel.meeting import meet

# Timeout for an order. Meanwhile the first rank downloads, decodes and compares.
TIMEOUT = datetime.timedelta(days=7)

_orders: Any = None  # the process group for orders


def connect(device: torch.device) -> None:
    """Join the process group of all ranks.

    Raises:
        DeviceError: if two ranks have the same GPU.
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
    _orders = dist.new_group(backend="gloo", timeout=TIMEOUT)
    if device.type == "cuda":
        check_own(str(torch.cuda.get_device_properties(device).uuid))


def check_own(gpu: str) -> None:
    """Raise DeviceError in every process if two of them have the same GPU."""
    gpus = [""] * dist.get_world_size()
    dist.all_gather_object(gpus, gpu, group=_orders)
    if len(set(gpus)) < len(gpus):
        raise DeviceError(
            f"{len(gpus)} ranks have {len(set(gpus))} GPUs between them: each needs its own"
        )


def disconnect() -> None:
    """Leave the process group."""
    dist.destroy_process_group()


def broadcast(order: Any) -> None:
    """Send an order to every other rank, where `receive` returns it. Its tensors are on the CPU."""
    dist.broadcast_object_list([order], group=_orders, device=torch.device("cpu"))


def receive() -> Any:
    """Wait for the next order of the first rank, and return it."""
    order = [None]
    dist.broadcast_object_list(order, group=_orders, device=torch.device("cpu"))
    return order[0]


def join(transformer: ConsisIDTransformer3DModel, ranks: Ranks, device: torch.device) -> Ranks:
    """Extend the transformer's attention to the tokens of all parts, by diffusers' Ulysses.

    All ranks call it, after their attention processors are set. Returns the ranks, with the number
    of this one.
    """
    if ranks.parts > 1:
        config = _exchange(ranks, device)
        for processor in transformer.attn_processors.values():
            processor._parallel_config = config
    return replace(ranks, rank=dist.get_rank())


@functools.cache
def _exchange(ranks: Ranks, device: torch.device) -> ParallelConfig:
    """The configuration for diffusers' dispatcher. Cached, since it creates process groups."""
    names = ("guidance", "ring", "ulysses")
    shape = (ranks.halves, 1, ranks.parts)
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=names)
    # The same as `transformer.enable_parallelism`, which fails on a machine without GPUs.
    ulysses = ContextParallelConfig(ulysses_degree=ranks.parts, mesh=mesh)
    config = ParallelConfig(context_parallel_config=ulysses)
    config.setup(dist.get_rank(), dist.get_world_size(), device, mesh=mesh)
    return config


def check_backend(name: str, backend: str) -> None:
    """Raise ArgumentError if diffusers does not support Ulysses with a backend of its dispatcher.

    name: the value of `--attention`.
    """
    supported = dispatch._AttentionBackendRegistry._is_context_parallel_available
    if not supported(dispatch.AttentionBackendName(backend)):
        raise ArgumentError(
            f"--attention {name} does not go with --num_gpus, which shares tokens: native does"
        )
