"""The values of `--device`, `--num_gpus` and `--dtype` on this machine."""

import textwrap

import torch

from teacache.base.errors import DeviceError
from teacache.parallel.launch import is_of_another_launcher


def choose_device(name: str, full_size: bool = False, offload: str = "none") -> torch.device:
    """The device for `--device`: `auto` is CUDA if available, else the CPU.

    Args:
        full_size: whether sampling with the checkpoint would take days on a CPU.

    Raises:
        DeviceError: if the machine lacks the device, if `auto` finds no GPU for a full-size
            checkpoint, or if weights would be offloaded from a CPU.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        if not torch.cuda.is_available() and full_size:
            raise DeviceError(
                f"this checkpoint needs a CUDA GPU, and torch finds none here{_no_cuda()}. For a "
                "small checkpoint: --ckpts_path tiny. To use the CPU all the same, slowly: "
                "--device cpu"
            )
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        reason = "" if count else _no_cuda()
        raise DeviceError(f"--device {name}: torch finds {count} CUDA GPUs{reason}")
    if device.type == "cpu" and offload not in ("auto", "none"):
        raise DeviceError(
            f"--offload {offload}: weights are offloaded from a GPU, and this is a CPU"
        )
    return device


def _no_cuda() -> str:
    """torch's reason for no CUDA, in brackets: no driver, or one that is too old."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f" ({textwrap.shorten(str(error), 250, placeholder=' ...').rstrip('.')})"
    return ""


def check_number(num_gpus: int, device: torch.device) -> None:
    """Raise DeviceError if `--num_gpus` is more than torch finds.

    A rank of another launcher may see only its own GPU. `teacache.parallel.group.connect` checks
    that each rank has its own.
    """
    count = torch.cuda.device_count()
    if device.type != "cuda" or num_gpus <= count or (count == 1 and is_of_another_launcher()):
        return
    raise DeviceError(f"--num_gpus {num_gpus}: torch finds {count} CUDA GPUs here")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The sampling dtype for `--dtype`: `auto` is bfloat16 on CUDA, float32 on a CPU."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    dtype: torch.dtype = getattr(torch, name)
    return dtype
