"""Out-of-memory errors in one line: the stage, the size of the allocation, flags that take less."""

import contextlib
import re
from collections.abc import Iterator

from teacache.base.console import Console, Stage
from teacache.base.device import is_gpu_memory, is_out_of_memory
from teacache.base.errors import DeviceError
from teacache.parallel.launch import rank
from teacache.request.values import Machine

# The stages in which each flag reduces memory.
REDUCES: dict[str, tuple[Stage, ...]] = {
    "--vae_tiling": ("compiling", "encoding", "decoding"),
    "--offload blocks": ("loading", "compiling", "encoding", "denoising"),
    "--offload model": ("compiling", "encoding", "denoising"),
    "--offload sequential": ("text", "loading", "compiling", "encoding", "denoising"),
}


@contextlib.contextmanager
def explained_out_of_memory(machine: Machine, console: Console) -> Iterator[None]:
    """Turn an out-of-memory error of the block into one line with advice.

    Raises:
        DeviceError: instead of an error that is about memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        advice = out_of_memory(error, console.stage, machine)
        raise DeviceError(". ".join([advice, *getattr(error, "__notes__", ())])) from error


def out_of_memory(error: BaseException, stage: Stage | None, machine: Machine) -> str:
    """The line for an out-of-memory error in a stage of a run on this machine.

    It names the flags that take less than the machine's own, the fastest first.
    """
    size = re.search(r"allocate ([\d.]+ \w+)", str(error))
    flags = [] if machine.vae_tiling == "on" else ["--vae_tiling"]
    if is_gpu_memory(error):
        ways = ["none", "model" if machine.quantize else "blocks"]
        if not machine.quantize and not machine.compile:
            ways.append("sequential")
        if machine.offload in ways:
            flags += [f"--offload {way}" for way in ways[ways.index(machine.offload) + 1 :]]
    flags = [flag for flag in flags if stage in REDUCES[flag]]
    where = ""
    if machine.num_gpus > 1:  # several GPUs do not offload
        flags = [flag.replace("--offload", "--num_gpus 1 --offload") for flag in flags]
        where = f"rank {rank()} of {machine.num_gpus}: "
    amount = f" (asked for {size[1]})" if size else ""
    advice = f"Try, in this order: {', '.join(flags)}" if flags else "No further flag takes less"
    return f"{where}out of memory while {stage or 'starting'}{amount}. {advice}"
