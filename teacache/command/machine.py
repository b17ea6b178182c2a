"""What `--device` and `--dtype` mean on this machine."""

from __future__ import annotations

import textwrap

import torch

from teacache.base.errors import DeviceError
from teacache.parallel.launch import is_of_another_launcher

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
                f"this checkpoint needs a CUDA GPU, and torch finds none here{_why_none()}. To see "
                "it work without: --ckpts_path tiny. To use the CPU all the same, slowly: "
                "--device cpu"
            )
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise DeviceError(
            f"--device {name}: torch finds {count} CUDA GPUs{'' if count else _why_none()}"
        )
    if device.type == "cpu" and offload not in ("auto", "none"):
        raise DeviceError(
            f"--offload {offload}: weights are offloaded from a GPU, and this is a CPU"
        )
    return device


def _why_none() -> str:
    """In brackets what torch says of it: there is no driver, or one too old for its CUDA."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f" ({textwrap.shorten(str(error), 250, placeholder=' ...').rstrip('.')})"
    return ""


def check_number(num_gpus: int, device: torch.device) -> None:
    """Raise DeviceError where `--num_gpus` asks for more GPUs than torch finds.

    A rank that another launcher has started may see its own GPU alone: whether each has one of its
    own is found out when they meet, see `teacache.parallel.group.connect`.
    """
    count = torch.cuda.device_count()
    if device.type != "cuda" or num_gpus <= count or (count == 1 and is_of_another_launcher()):
        return
    raise DeviceError(f"--num_gpus {num_gpus}: torch finds {count} CUDA GPUs here")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The sampling dtype for `--dtype`: `auto` is bfloat16 on CUDA, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]
