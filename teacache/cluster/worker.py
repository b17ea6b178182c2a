"""One of many processes that sample an order's videos: it loads once, and is handed job after job.

It does what the command does in one process, and knows nothing of who hands out the jobs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from teacache.base import interruption
from teacache.base.console import Console, Stages
from teacache.base.errors import DeviceError, SamplingError, TeaCacheError, TeamError
from teacache.base.quiet import silence_libraries
from teacache.command.jobs import Job
from teacache.command.memory import explained_out_of_memory
from teacache.command.order import Order
from teacache.command.preflight import plan_jobs, preflight
from teacache.inputs.photograph import load_image, pixels_sha256
from teacache.results.lock import locked
from teacache.results.output_folder import check_space
from teacache.results.record import Record

if TYPE_CHECKING:
    from teacache.command.ranks import Ranks
    from teacache.command.run import Loaded, Sampled
    from teacache.comparison.comparison import Comparison
    from teacache.inputs.identity import Identity
    from teacache.inputs.text import Text
    from teacache.parallel.helpers import Helpers

T = TypeVar("T")

logger = logging.getLogger("teacache")


class Answer(NamedTuple):
    """A video that is there.

    earlier: whether another process has made it.
    """

    path: Path
    record: Record
    earlier: bool


class Worker:
    """Samples the jobs of an order, one after the other.

    A job is named by its place in `order.jobs`. Each method's answer comes with the warnings that
    the user should be told. For a video on several GPUs it starts the other ranks, and is the
    first; where one of them or what they do together fails, it raises TeamError, and is of no more
    use.

    Args:
        folder: what relative paths start from, on every machine.
        ignored: names of records that were there before the order, and do not count as done.
    """

    def __init__(self, order: Order, folder: Path, ignored: Collection[str]):
        self.order, self.folder, self.ignored = order, folder, ignored
        self.console = Console(quiet=True)
        self.stages = Stages(self.console)
        self._loaded: Loaded | None = None
        self._helpers: Helpers | None = None
        self._comparison: Comparison | None = None
        self._identities: dict[str, Identity] = {}
        self._texts: dict[Job, Text] = {}

    def start(self) -> tuple[None, list[str]]:
        """Check the machine and the checkpoint, before anything is loaded.

        Raises:
            TeaCacheError: in one line, for what this machine lacks.
        """
        silence_libraries()
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise DeviceError(
                f"there is no {self.folder} on {os.uname().nodename}: all machines need the same "
                "folders, on a shared file system"
            ) from error
        with _collected_warnings() as warnings:
            self._start_helpers()
            self.ready = preflight(
                dataclasses.replace(self.order, jobs=(), all_jobs=()), self.stages
            )
        size, videos = self.ready.size, len(self.order.jobs)
        check_space(self.order.output_path, size.width * size.height, size.num_frames, videos)
        with self.stages.stage("diffusers"):
            from teacache.command.run import comparison_of
        if videos > 1:
            self._comparison = comparison_of(self.ready, videos=None)
        self._ranks = self._together(self._find_helpers)
        return None, warnings

    def condition(self, places: list[int]) -> tuple[None, list[str]]:
        """Find the faces and embed the prompts of jobs to come, each model loaded once for all.

        Those of earlier jobs are dropped. What is wrong with a job is said when its turn comes.
        """
        self.ready = dataclasses.replace(self.ready, images={}, digests={}, schedules={})
        self._identities, self._texts = {}, {}
        to_do = []
        with (
            _collected_warnings() as warnings,
            explained_out_of_memory(self.ready.machine, self.console),
        ):
            for place in places:
                with contextlib.suppress(TeaCacheError):
                    job = self.order.jobs[place]
                    self._plan(job)
                    if not self._find(job):
                        to_do.append(job)
            self._condition(to_do, skip_failures=True)
        return None, warnings

    def sample(self, place: int) -> tuple[Answer, list[str]]:
        """Sample a job's video, unless it is there already.

        Raises:
            TeaCacheError: in one line, for what is wrong with the job.
        """
        with (
            _collected_warnings() as warnings,
            _said_in_one_line(),
            explained_out_of_memory(self.ready.machine, self.console),
        ):
            job = self.order.jobs[place]
            self._plan(job)
            with self._lock(job) as ours:
                finished = self._find(job)
                if finished and self._comparison:
                    path, record = finished
                    self._comparison.add_earlier(place, path, record)
                if not finished and not ours:
                    raise SamplingError("another process samples it")
                path, record = finished or self._sample(job, place)
                return Answer(path, record, earlier=finished is not None), warnings

    def stop(self) -> None:
        """End what `sample` is at within a step: from another thread than its own."""
        interruption.request_stop()

    def _plan(self, job: Job) -> None:
        """Look at a job's image, and plan its steps."""
        ready = self.ready
        if job.image not in ready.images:
            image = load_image(job.image)
            ready.images[job.image], ready.digests[job.image] = image, pixels_sha256(image)
        order = dataclasses.replace(self.order, jobs=(job,), all_jobs=(job,))
        ready.schedules.update(plan_jobs(order, ready.checkpoint, ready.device, ready.dtype))

    def _condition(self, jobs: list[Job], skip_failures: bool) -> None:
        from teacache.command.run import condition

        room: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self._loaded:  # the text encoder and the face models take less than decoding
            room = self._loaded.room.to_decode(last=False)
        with room:
            identities, texts = condition(jobs, self.order, self.ready, self.stages, skip_failures)
        self._identities.update(identities)
        self._texts.update(texts)

    def _sample(self, job: Job, place: int) -> tuple[Path, Record]:
        if job not in self._texts or job.image not in self._identities:
            self._condition([job], skip_failures=False)
        video = self._together(lambda: self._load_and_sample(job))
        record = video.record
        if self._comparison:
            record = self._comparison.add(place, video.path, record, video.frames, video.identity)
        return video.path, record

    def _load_and_sample(self, job: Job) -> Sampled:
        identity, text = self._identities[job.image], self._texts[job]
        self._loaded = self._loaded or self._load(job)
        return self._loaded.sample(job, self.ready, identity, text, last=False)

    def _load(self, job: Job) -> Loaded:
        """The pipeline, compiled ahead where that is asked for. It stays until the process ends."""
        from teacache.command.loading import load
        from teacache.command.run import Loaded, compile_ahead
        from teacache.core.forward import apply_teacache
        from teacache.sampling.room import Room

        self._ranks.begin(self.order, self.ready)
        with self.stages.stage("loading"):
            pipe = load(self.order, self.ready)
        handle = apply_teacache(pipe)
        handle.team = self._ranks.join(pipe.transformer)
        room = Room(pipe, self.ready.size, self.ready.machine.offload)
        if self.order.machine.compile:
            with self.stages.stage("compiling"):
                identity, text = self._identities[job.image], self._texts[job]
                compile_ahead(pipe, identity, text, self.order, self.ready, self._ranks, room)
        return Loaded(pipe, handle, self.order, self.stages, self.console, self._ranks, room)

    def _start_helpers(self) -> None:
        """Start the other ranks of a video on several GPUs, which those that Ray has chosen are."""
        machine = self.order.machine
        if machine.num_gpus > 1:
            from teacache.parallel.helpers import Helpers

            self._helpers = Helpers(machine.num_gpus, ["--device", machine.device])

    def _find_helpers(self) -> Ranks:
        from teacache.command.ranks import Ranks

        return Ranks(self.ready)

    def _together(self, work: Callable[[], T]) -> T:
        """Do what all ranks do together; alone, just do it.

        Raises:
            TeamError: where it fails, which leaves the ranks out of step.
        """
        if self._helpers is None:
            return work()
        try:
            with explained_out_of_memory(self.ready.machine, self.console):
                return self._helpers.watch(work)
        except TeaCacheError as error:
            raise TeamError(str(error)) from error

    def _find(self, job: Job) -> tuple[Path, Record] | None:
        """A planned job's video, where it is there."""
        from teacache.command.finished import find_finished
        from teacache.command.recording import settings_of

        settings = settings_of(job, self.order, self.ready)
        return find_finished(settings, self.order.output_path, self.ignored)

    def _lock(self, job: Job) -> contextlib.AbstractContextManager[bool]:
        """With `--resume`, keep other processes from a planned job."""
        from teacache.command.recording import settings_of

        if not self.order.resume:
            return contextlib.nullcontext(True)
        return locked(self.order.output_path, settings_of(job, self.order, self.ready).name)


@contextlib.contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """The warnings of the block, which nobody reads where they are printed."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def _said_in_one_line() -> Iterator[None]:
    """Of an interruption, say what it has left."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise SamplingError(". ".join(["interrupted", *getattr(error, "__notes__", ())])) from error
