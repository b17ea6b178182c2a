"""`--resume`: videos and latents in the output folder that need no second computation."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from teacache.base.console import Console, Stages
from teacache.preflight.setup import Setup, Shot
from teacache.results.finished_videos import FinishedVideos
from teacache.results.output_folder import locked_name
from teacache.results.record import Record
from teacache.results.slot import find_latents
from teacache.run.recording import settings_of


@contextlib.contextmanager
def pending(
    shot: Shot, setup: Setup, finished: FinishedVideos | None, console: Console
) -> Iterator[tuple[bool, tuple[Path, Record] | None]]:
    """With `--resume`, lock a video against other processes while the block runs.

    Yields:
        whether the lock is held: False if another process samples the video. And the video, if
        another process has finished it meanwhile.
    """
    if finished is None:
        yield True, None
        return
    settings = settings_of(shot, setup)
    with locked_name(setup.options.output_path, settings.name) as held:
        video = None
        if held:
            finished.list_folder()
            video = finished.find(settings)
        if video:
            console.done(video[0], f"done by another process {video[0]}")
        elif not held:
            console.say(f"seed {shot.job.seed}, {shot.job.which}: another process samples it")
        yield held, video


def saved_latents(
    shot: Shot, setup: Setup, stages: Stages
) -> tuple[torch.Tensor, Record, Path] | None:
    """Latents of a video that an earlier run saved and did not decode.

    Returns:
        the latents, their record with the settings of this run, and their file; or None. The
        seconds of the earlier run are added to the stages.
    """
    settings = settings_of(shot, setup)
    saved = next(find_latents(setup.options.output_path, settings), None)
    if saved is None:
        return None
    path, record = saved
    stages.console.say(f"latents     {path}")
    stages.include(record.seconds)
    latents = load_file(path)["latents"].to(setup.device)
    return latents, dataclasses.replace(record, settings=settings), path
