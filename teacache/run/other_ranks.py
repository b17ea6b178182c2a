"""One video on several GPUs: the first rank runs the command, the others only denoise.

The first rank finds faces, embeds text, encodes, decodes, writes and prints. The others load only
the transformer, and wait for videos. For each video the first rank broadcasts its schedule and its
start, and all ranks run the same loop. Each rank caches its own share of the residual.
"""

import dataclasses
import os
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from teacache.base.console import Console, Stages
from teacache.core.ranks import ALONE
from teacache.parallel import group
from teacache.preflight.machine import choose_device
from teacache.preflight.setup import Setup
from teacache.run.memory import explained_out_of_memory
from teacache.run.models import Task, denoise, open_models


class OtherRanks:
    """The first rank's connection to the others. Does nothing on a single GPU."""

    def __init__(self, setup: Setup):
        self._setup, self._begun = setup, False
        self._alone = setup.ranks == ALONE
        if not self._alone:
            group.connect(setup.device)

    def begin(self) -> None:
        """Let the others load the transformer, with the results of this rank's checks."""
        if not self._alone and not self._begun:
            group.broadcast(self._setup)
        self._begun = True

    def denoise(self, task: Task) -> None:
        """Let the others denoise a video. This rank must denoise it too."""
        if not self._alone:
            group.broadcast(_moved(task, "cpu"))

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
    stages = Stages(Console(quiet=True))
    device = own_device(choose_device(device_name))
    group.connect(device)
    if (setup := group.receive()) is not None:
        setup = dataclasses.replace(setup, device=device)
        with explained_out_of_memory(setup.machine, stages.console):
            with stages.stage("loading"):
                models = open_models(setup, parts=("transformer",))
            with stages.stage("denoising"):
                while (task := group.receive()) is not None:
                    denoise(models, setup, _moved(task, device))
    group.disconnect()


def own_device(device: torch.device) -> torch.device:
    """This rank's GPU. Some launchers show each rank only its own GPU."""
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _moved(task: Task, device: Any) -> Task:
    """A task with tensors on a device. The generator's state stays on the host."""
    moved = tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), task)
    identity = moved.start.identity._replace(face=None)  # the image, whose latents are in the start
    state = task.start.generator_state
    return moved._replace(start=moved.start._replace(identity=identity, generator_state=state))
