"""One video on several GPUs: the first rank runs the command, the others only denoise.

The first rank finds faces, embeds text, encodes, decodes, writes and prints. The others load only
the transformer, and wait for videos. For each video the first rank broadcasts its schedule and its
start, and all ranks run the same loop. Each rank caches its own share of the residual.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from teacache.base.console import Console, Stages
from teacache.core.forward import apply_teacache
from teacache.core.ranks import ALONE, Ranks
from teacache.core.rule import Schedule
from teacache.inputs.text import Text
from teacache.parallel import group
from teacache.preflight.checks import Ready
from teacache.preflight.machine import choose_device
from teacache.request.values import Order
from teacache.run.memory import explained_out_of_memory
from teacache.run.models import load
from teacache.sampling import sampler
from teacache.sampling.sampler import Start

if TYPE_CHECKING:
    from diffusers import ConsisIDTransformer3DModel


class Task(NamedTuple):
    """The inputs of denoising that the first rank broadcasts; tensors on the CPU."""

    schedule: Schedule | None
    start: Start
    text: Text
    num_infer_steps: int


class OtherRanks:
    """The first rank's connection to the others. Does nothing on a single GPU."""

    def __init__(self, ready: Ready):
        self._shared, self._device = ready.ranks, ready.device
        self._alone = ready.ranks == ALONE
        if not self._alone:
            group.connect(self._device)

    def begin(self, order: Order, ready: Ready) -> None:
        """Let the others load the transformer, with the results of this rank's checks."""
        if not self._alone:
            group.broadcast((order, dataclasses.replace(ready, images={}, digests={})))

    def join(self, transformer: ConsisIDTransformer3DModel) -> Ranks:
        """Connect the transformer's attention to that of the others."""
        if self._alone:
            return ALONE
        return group.join(transformer, self._shared, self._device)

    def denoise(
        self, schedule: Schedule | None, start: Start, text: Text, num_infer_steps: int
    ) -> None:
        """Let the others denoise a video. This rank must denoise it too."""
        if not self._alone:
            group.broadcast(Task(schedule, *_move((start, text), "cpu"), num_infer_steps))

    def end(self) -> None:
        """Let the others end after the last video."""
        if not self._alone:
            group.broadcast(None)
            group.disconnect()


def help_denoising(device_name: str) -> None:
    """Denoise with the first rank until it ends. Every other rank runs this.

    Raises:
        DeviceError: if the machine lacks something.
    """
    console = Console(quiet=True)
    device = own_device(choose_device(device_name))
    group.connect(device)
    if (start := group.receive()) is not None:
        order, ready = start
        ready = dataclasses.replace(ready, device=device)
        with explained_out_of_memory(ready.machine, console):
            _denoise_all(order, ready, Stages(console))
    group.disconnect()


def own_device(device: torch.device) -> torch.device:
    """This rank's GPU. Some launchers show each rank only its own GPU."""
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _denoise_all(order: Order, ready: Ready, stages: Stages) -> None:
    with stages.stage("loading"):
        pipe = load(order, ready, parts=("transformer",))
    with apply_teacache(pipe) as handle, stages.stage("denoising"):
        handle.ranks = group.join(pipe.transformer, ready.ranks, ready.device)
        while (task := group.receive()) is not None:
            handle.follow(task.schedule)
            start, text = _move((task.start, task.text), ready.device)
            sampler.denoise(
                pipe,
                start,
                text,
                ready.size,
                num_infer_steps=task.num_infer_steps,
                guidance_scale=order.format.guidance_scale,
            )


def _move(inputs: tuple[Start, Text], device: Any) -> tuple[Start, Text]:
    """Start and text with tensors on a device. The generator's state stays on the host."""
    start, text = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)
    identity = start.identity._replace(face=None)  # the image, whose latents are in the start
    state = inputs[0].generator_state
    return start._replace(identity=identity, generator_state=state), text
