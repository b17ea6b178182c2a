"""What a run computes on, and how much of its memory that took."""

from __future__ import annotations

import gc
import itertools
import resource
import sys
import time

import torch

Mark = float | torch.cuda.Event  # see `mark`


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def mark(device: torch.device) -> Mark:
    """A timestamp in the device's queue, taken without synchronising; on a CPU, its clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(marks: list[Mark]) -> list[float]:
    """Seconds from each mark to the next, once the device has reached the last."""
    events = [each for each in marks if isinstance(each, torch.cuda.Event)]
    if events:
        events[-1].synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]
    moments = [each for each in marks if isinstance(each, float)]
    return [after - before for before, after in itertools.pairwise(moments)]


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that was allocated so far: on the GPU by torch, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB on Linux


def peak_reserved_bytes(device: torch.device) -> int | None:
    """The most GPU memory that torch has held so far, what it had free within included."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def total_memory_bytes(device: torch.device) -> int:
    """What a GPU has."""
    return torch.cuda.mem_get_info(device)[1]


def free_memory_bytes(device: torch.device) -> int:
    """What a GPU has left for torch to allocate."""
    free, _ = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + reserved


def free_cached_memory(device: torch.device) -> None:
    """Return torch's cached blocks to the GPU, against fragmentation."""
    if device.type == "cuda":
        gc.collect()  # some models are in reference cycles
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory for what it was asked for, on a GPU or on the host."""
    phrases = (
        *("can't allocate memory", "Cannot allocate memory", "not enough memory"),
        *("CUDA error: out of memory", "ALLOC_FAILED"),
    )
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, (RuntimeError, OSError))
        and any(phrase in str(error) for phrase in phrases)
    )


def is_the_gpus(error: BaseException) -> bool:
    """Whether the memory that ran out is a GPU's: the host's own has errors of other kinds."""
    names = ("CUDA", "CUDNN", "CUBLAS")
    return isinstance(error, torch.OutOfMemoryError) or any(name in str(error) for name in names)


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as `--dtype` spells it."""
    return str(dtype).removeprefix("torch.")
