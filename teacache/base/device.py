"""What a run computes on, and how much of its memory that took."""

from __future__ import annotations

import gc
import itertools
import resource
import sys
import time

import torch

from teacache.base.errors import DeviceError

Mark = float | torch.cuda.Event  # see `mark`
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(name: str, full_size: bool = False, offload: str = "none") -> torch.device:
    """The device for `--device`: `auto` is CUDA where there is one, else the CPU.

    Args:
        full_size: whether the checkpoint has weights that a CPU would sample with for days.
        offload: the `--offload` that is asked for.

    Raises:
        DeviceError: where the machine does not have it, `auto` finds no GPU for a full-size
            checkpoint, or there is nothing to offload from.
    """
    if name == "auto":
        if not torch.cuda.is_available() and full_size:
            raise DeviceError(
                "this checkpoint needs a CUDA GPU, and torch finds none here. To see it work "
                "without: --ckpts_path tiny. To use the CPU all the same, slowly: --device cpu"
            )
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA GPUs")
    if device.type == "cpu" and offload != "none":
        raise DeviceError(
            f"--offload {offload}: weights are offloaded from a GPU, and this is a CPU"
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The sampling dtype for `--dtype`: `auto` is bfloat16 on CUDA, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


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
