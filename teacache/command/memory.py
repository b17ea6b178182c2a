"""Running out of memory, explained: the stage, what was asked for, and which flags take less."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from teacache.base.console import Console, Stage
from teacache.base.device import is_out_of_memory, is_the_gpus
from teacache.base.errors import DeviceError
from teacache.command.order import Machine
from teacache.parallel.launch import rank

# The stages of a run in which a flag takes less memory: in others it is not worth a word.
WITH_VAE: tuple[Stage, ...] = ("compiling", "encoding", "decoding")
WITH_TRANSFORMER: tuple[Stage, ...] = ("loading", "compiling", "encoding", "denoising")
OFFLOADED: dict[str, tuple[Stage, ...]] = {
    "blocks": WITH_TRANSFORMER,
    # The VAE is not beside the transformer then, nor the transformer beside the VAE.
    "model": ("compiling", "encoding", "denoising"),
    # The text encoder is alone on the GPU: nothing else brings less of it there.
    "sequential": ("text", *WITH_TRANSFORMER),
}


@contextlib.contextmanager
def explained_out_of_memory(machine: Machine, console: Console) -> Iterator[None]:
    """Say in one line where memory ran out in the block, and which flags take less.

    Raises:
        DeviceError: instead of the error of whoever found no memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        advice = out_of_memory(error, console.under_way, machine)
        sentences = [advice, *getattr(error, "__notes__", ())]
        raise DeviceError(". ".join(sentences)) from error


def out_of_memory(error: BaseException, stage: Stage | None, machine: Machine) -> str:
    """What to do about it, in one line: the flags that take less, those first that cost little.

    Args:
        stage: that it ran out in; None before the first.
        machine: what has been tried already.
    """
    asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
    amount = f" (asked for {asked[1]})" if asked else ""
    flags = []
    if stage in WITH_VAE and machine.vae_tiling != "on":
        flags.append("--vae_tiling")
    if is_the_gpus(error):
        steps: tuple[str, ...] = ("none", "blocks", "sequential")
        if machine.quantize:
            steps = ("none", "model")
        elif machine.compile:
            steps = ("none", "blocks")
        untried = steps[steps.index(machine.offload) + 1 :] if machine.offload in steps else ()
        alone = "--num_gpus 1 " if machine.num_gpus > 1 else ""  # several do not offload
        flags += [f"{alone}--offload {step}" for step in untried if stage in OFFLOADED[step]]
    advice = f"Try, in this order: {', '.join(flags)}" if flags else "No further flag takes less"
    where = f"rank {rank()} of {machine.num_gpus}: " if machine.num_gpus > 1 else ""
    return f"{where}out of memory while {stage or 'starting'}{amount}. {advice}"
