"""Samples one video after the other, with models that are loaded once."""

from collections.abc import Sequence
from contextlib import nullcontext

from teacache.base.console import Stages
from teacache.inputs.photograph_store import PhotographStore
from teacache.preflight.setup import Setup, Shot
from teacache.run.conditions import Condition, Conditions
from teacache.run.models import Models, Task, denoise, open_models
from teacache.run.other_ranks import OtherRanks
from teacache.sampling import acceleration, sampler


class Session:
    """The stages of each of `videos` videos, from photograph and prompt to frames.

    Args:
        stages: shared by all videos.
    """

    def __init__(self, setup: Setup, photographs: PhotographStore, stages: Stages, videos: int):
        self.setup, self.stages, self._videos = setup, stages, videos
        self._others = OtherRanks(setup)
        self._conditions = Conditions(setup, photographs, stages)
        self._models: Models | None = None
        self._start: sampler.Start | None = None
        self._start_key: tuple[str, int] | None = None

    def conditions(self, shots: Sequence[Shot]) -> list[Condition]:
        """The conditions of a window of videos."""
        self._others.begin()
        # The text encoder and the face models need less memory than decoding.
        with self._models.memory.to_decode(last=False) if self._models else nullcontext():
            return self._conditions.of(shots)

    def load(self, condition: Condition) -> Models:
        """Load the models once; with `--compile` compile them for a video with this condition."""
        if self._models is None:
            with self.stages.stage("loading"):
                self._models = open_models(self.setup, self._videos)
            if self.setup.machine.compile:
                with self.stages.stage("compiling"):
                    self._compile(self._models, condition)
        return self._models

    def _compile(self, models: Models, condition: Condition) -> None:
        """Denoise one step and decode, so that the seconds of no video include compilation."""
        identity = condition.identity(self.setup.device)
        start = sampler.prepare(models.pipe, identity, self.setup.size, seed=0)
        task = Task(None, start, condition.text(self.setup.device), num_infer_steps=1)
        self._others.denoise(task)
        latents, _ = denoise(models, self.setup, task)
        if acceleration.is_compiled(models.pipe.vae):
            with models.memory.to_decode(last=False):
                sampler.decode(models.pipe, latents)

    def denoise(
        self, models: Models, shot: Shot, condition: Condition, stages: Stages
    ) -> sampler.Denoised:
        """The latents of a video, in its own stages, with the models of `load`."""
        steps = shot.job.num_infer_steps
        with stages.stage("encoding"):
            start = self._start_of(models, shot, condition)
        task = Task(shot.schedule, start, condition.text(self.setup.device), steps)
        self._others.denoise(task)
        bar = stages.console.bar(steps, models.handle.counts)
        with stages.stage("denoising"), bar as on_step:
            return denoise(models, self.setup, task, on_step)

    def _start_of(self, models: Models, shot: Shot, condition: Condition) -> sampler.Start:
        """The start of a video. Videos with the same image and seed share it."""
        key = shot.image_sha256, shot.job.seed
        if self._start is None or self._start_key != key:
            self._start, self._start_key = None, key
            identity = condition.identity(self.setup.device)
            self._start = sampler.prepare(models.pipe, identity, self.setup.size, shot.job.seed)
        return self._start

    def end(self) -> None:
        """Let the other ranks end, after the last video."""
        self._others.end()
