"""The device of a run: timing, memory, names, and its out-of-memory errors."""

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
    """A timestamp in the device's queue, without synchronising; on a CPU the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(marks: list[Mark]) -> list[float]:
    """Seconds from each mark to the next. Waits until the device has reached the last."""
    events = [each for each in marks if isinstance(each, torch.cuda.Event)]
    if events:
        events[-1].synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]
    moments = [each for each in marks if isinstance(each, float)]
    return [after - before for before, after in itertools.pairwise(moments)]


def peak_memory_bytes(device: torch.device) -> int:
    """Peak of the GPU memory that torch allocated; on a CPU peak memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def peak_reserved_bytes(device: torch.device) -> int | None:
    """Peak of the GPU memory that torch reserved, its cache included; None on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def total_memory_bytes(device: torch.device) -> int:
    """The memory of a GPU, or the part that `torch.cuda.set_per_process_memory_fraction` allows."""
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    return int(torch.cuda.mem_get_info(device)[1] * fraction)


def free_memory_bytes(device: torch.device) -> int:
    """The GPU memory that torch can still allocate, its cache included."""
    free, _ = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    cached = torch.cuda.memory_reserved(device) - allocated
    return min(free + cached, total_memory_bytes(device) - allocated)


def free_cached_memory(device: torch.device) -> None:
    """Return torch's cached blocks to the GPU, against fragmentation."""
    if device.type == "cuda":
        gc.collect()  # some models are in reference cycles
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a failed memory allocation, on a GPU or on the host."""
    phrases = (
        *("can't allocate memory", "Cannot allocate memory", "not enough memory"),
        *("CUDA error: out of memory", "ALLOC_FAILED"),
    )
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, (RuntimeError, OSError))
        and any(phrase in str(error) for phrase in phrases)
    )


def is_gpu_memory(error: BaseException) -> bool:
    """Whether an out-of-memory error is about GPU memory, not host memory."""
    names = ("CUDA", "CUDNN", "CUBLAS")
    return isinstance(error, torch.OutOfMemoryError) or any(name in str(error) for name in names)


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as `--dtype` spells it."""
    return str(dtype).removeprefix("torch.")
