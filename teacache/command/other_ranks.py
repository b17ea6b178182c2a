"""One video on several GPUs: the first rank is the command, the others help it to denoise.

The first finds faces, embeds text, encodes, decodes, writes and speaks. The others load the
transformer alone, and then wait for videos: each comes with its schedule and its start, and all
ranks run the same loop on it. What they cache is of their own share.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only

from teacache.base.console import Console, Stages
from teacache.command.loading import load
from teacache.command.machine import choose_device
from teacache.command.memory import explained_out_of_memory
from teacache.command.order import Order
from teacache.command.preflight import Ready
from teacache.core.forward import apply_teacache
from teacache.core.ranks import ALONE, Ranks
from teacache.core.rule import Schedule
from teacache.inputs.text import Text
from teacache.parallel import group
from teacache.sampling import sampler
from teacache.sampling.sampler import Start

if TYPE_CHECKING:
    from diffusers import ConsisIDTransformer3DModel


class Task(NamedTuple):
    """What the other ranks need to denoise a video with the first; tensors on the CPU."""

    schedule: Schedule | None
    start: Start
    text: Text
    num_infer_steps: int


class OtherRanks:
    """The other ranks, as the first one speaks to them; where it is alone, nobody listens."""

    def __init__(self, ready: Ready):
        self._shared, self._device = ready.ranks, ready.device
        self._alone = ready.ranks == ALONE
        if not self._alone:
            group.connect(self._device)

    def begin(self, order: Order, ready: Ready) -> None:
        """Let the others load what they need: what this one has found out, they need not."""
        if not self._alone:
            group.tell((order, dataclasses.replace(ready, images={}, digests={})))

    def join(self, transformer: ConsisIDTransformer3DModel) -> Ranks:
        """Share the transformer's steps; the others do so once they have loaded theirs."""
        if self._alone:
            return ALONE
        return group.join(transformer, self._shared, self._device)

    def denoise(
        self, schedule: Schedule | None, start: Start, text: Text, num_infer_steps: int
    ) -> None:
        """Let the others denoise the video that this one is about to."""
        if not self._alone:
            group.tell(Task(schedule, *_moved((start, text), "cpu"), num_infer_steps))

    def end(self) -> None:
        """Let the others end: no video follows."""
        if not self._alone:
            group.tell(None)
            group.disconnect()


def help_denoising(device_name: str) -> None:
    """What every rank but the first does, as long as there are videos.

    Raises:
        DeviceError: for what its machine lacks.
    """
    console = Console(quiet=True)
    device = own_device(choose_device(device_name))
    group.connect(device)
    if (told := group.listen()) is not None:
        order, ready = told
        ready = dataclasses.replace(ready, device=device)
        with explained_out_of_memory(ready.machine, console):
            _denoise_all(order, ready, Stages(console))
    group.disconnect()


def own_device(device: torch.device) -> torch.device:
    """This rank's GPU, of those that it sees: all of them, or by a launcher's doing its own."""
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _denoise_all(order: Order, ready: Ready, stages: Stages) -> None:
    with stages.stage("loading"):
        pipe = load(order, ready, parts=("transformer",))
    with apply_teacache(pipe) as handle, stages.stage("denoising"):
        handle.ranks = group.join(pipe.transformer, ready.ranks, ready.device)
        while (task := group.listen()) is not None:
            handle.follow(task.schedule)
            start, text = _moved((task.start, task.text), ready.device)
            sampler.denoise(
                pipe,
                start,
                text,
                ready.size,
                num_infer_steps=task.num_infer_steps,
                guidance_scale=order.format.guidance_scale,
            )


def _moved(inputs: tuple[Start, Text], device: Any) -> tuple[Start, Text]:
    """Start and text with their tensors on a device; the generator's state is always the host's."""
    start, text = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)
    identity = start.identity._replace(face=None)  # of which only the latents are needed
    state = inputs[0].generator_state
    return start._replace(identity=identity, generator_state=state), text
