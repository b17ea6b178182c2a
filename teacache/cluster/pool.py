"""The videos of an order on a Ray cluster: each worker takes one task after the other.

Ray restarts a worker that is killed, and has it do its task again. A worker looks for the records
of its task first, so that no video is made twice.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from teacache.base import interruption
from teacache.base.console import Console, Stages
from teacache.base.errors import DeviceError, SamplingError, TeaCacheError, reason
from teacache.base.quiet import silence_libraries
from teacache.command.jobs import Job
from teacache.command.order import Order
from teacache.command.preflight import preflight
from teacache.command.report import write_report
from teacache.command.shards import tasks
from teacache.comparison.comparison import Comparison

RETRIES = 2  # of a task whose worker is killed
STOPPING_SECONDS = 10.0

logger = logging.getLogger("teacache.cluster")


class Worker:
    """Samples task after task, with models that it loads once; `folder` is that of the command."""

    def __init__(self, order: Order, folder: Path):
        self.order, self.folder = order, folder
        self.session: Any = None
        self.stages = Stages(Console(quiet=True))
        silence_libraries()
        self.warnings = BufferingHandler(capacity=10_000)
        logging.getLogger("teacache").handlers = [self.warnings]

    def sample(self, task: list[Job]) -> Iterator[tuple[Any, list[str]]]:
        """Each job's video, and the warnings since the one before. No jobs: check this machine.

        Raises:
            TeaCacheError: in one line, for what is wrong with a job or with this machine.
        """
        try:
            os.chdir(self.folder)
        except OSError as error:
            machine = os.uname().nodename
            raise DeviceError(f"all machines need {self.folder}: {machine} has none") from error
        order = replace(self.order, jobs=tuple(task), all_jobs=tuple(task))
        ready = preflight(order, self.stages)
        if self.session is None:
            from teacache.command.run import Session  # after `preflight`: imports diffusers

            # What was chosen by the memory that was free holds for later tasks too.
            self.order = replace(self.order, machine=ready.machine)
            self.session = Session(self.order, ready, self.stages, Console(quiet=True))
        try:
            for video in self.session.videos(task, ready, final=False):
                yield video, [each.getMessage() for each in self.warnings.buffer]
                self.warnings.flush()
        except KeyboardInterrupt as error:  # which Ray would take for its own
            raise SamplingError(". ".join(getattr(error, "__notes__", ()))) from error

    def stop(self) -> None:
        """End `sample` within a step: from another thread."""
        interruption.request_stop()


class Pool:
    """So many workers on Ray, of so many GPUs each, that share the tasks of an order."""

    def __init__(self, order: Order, workers: int, gpus: int, console: Console):
        self._order, self._console = order, console
        self._videos: dict[Job, Any] = {}
        self._failed: dict[Job, Exception] = {}
        self._warnings: set[str] = set()
        self._calls: dict[Any, tuple[Any, list[Job]]] = {}  # each with its worker and task
        self._queue = deque(tasks(order.jobs, workers))
        known = () if order.resume else order.output_path.glob("*.json")
        ignored = frozenset(path.name for path in known)
        self._arguments = replace(order, resume=True, ignored=ignored), Path.cwd()
        # A second thread for `stop`. SPREAD: over the machines, also where none has a GPU.
        options: dict[str, Any] = {"num_gpus": gpus, "scheduling_strategy": "SPREAD"}
        options |= {"max_restarts": -1, "max_task_retries": RETRIES}
        self._actor: Any = ray.remote(**options, concurrency_groups={"stop": 1})(Worker)
        for _ in range(min(workers, len(order.jobs))):
            self._give(self._actor.remote(*self._arguments), [])

    def run(self) -> None:
        """Sample every video that can be, and report on all.

        Raises:
            TeaCacheError: in one line, where a machine cannot sample, or videos failed.
        """
        every = len(self._order.jobs)
        try:
            while len(self._videos) + len(self._failed) < every:
                for worker, task, error in self._ended(seconds=1):
                    self._go_on(worker, task, error)
                interruption.check()
        except KeyboardInterrupt as interrupted:
            for worker, _ in self._calls.values():
                worker.stop.options(concurrency_group="stop").remote()
            until = time.monotonic() + STOPPING_SECONDS
            while self._calls and (seconds := until - time.monotonic()) > 0:
                for _, _, error in self._ended(seconds):
                    if isinstance(error, SamplingError):
                        interrupted.add_note(str(error))
            raise
        finally:
            self._report()
        if self._failed:
            first = str(next(iter(self._failed.values()))).splitlines()[-1]
            raise SamplingError(
                f"{len(self._failed)} of {every} videos could not be made, the first: {first}. "
                "--resume tries them again"
            )

    def _give(self, worker: Any, task: list[Job]) -> None:
        self._calls[worker.sample.options(num_returns="streaming").remote(task)] = worker, task

    def _ended(self, seconds: float) -> Iterator[tuple[Any, list[Job], Exception | None]]:
        """Take the videos that come; yield each task that ends, with its worker and its error."""
        for call in ray.wait(list(self._calls), timeout=seconds)[0]:
            answer: Any = call
            try:
                video, warnings = ray.get(next(answer))
            except StopIteration:
                yield *self._calls.pop(call), None
            except RayError as error:
                yield *self._calls.pop(call), cause_of(error)
            else:
                self._videos[video.job] = video
                line = f"{len(self._videos)} of {len(self._order.jobs)}  {video.path}"
                self._console.done(video.path, line)
                for warning in {*warnings} - self._warnings:
                    logger.warning("%s", warning)
                self._warnings.update(warnings)

    def _go_on(self, worker: Any, task: list[Job], error: Exception | None) -> None:
        """What comes after a task."""
        if error and not task:
            raise error  # this machine cannot sample
        left = [job for job in task if job not in self._videos]
        if len(left) == 1 and (error or len(task) == 1):
            failure = error or SamplingError("another process samples it")
            logger.warning("seed %d, %s: %s", left[0].seed, left[0].which, failure)
            self._failed[left[0]] = failure
        else:  # in halves, until the job that fails is alone
            halves = left[: len(left) // 2], left[len(left) // 2 :]
            self._queue.extend(half for half in halves if half)
        if error and not isinstance(error, TeaCacheError):  # its GPU may be of no more use to it
            ray.kill(worker)
            worker = self._actor.remote(*self._arguments)
        if self._queue:
            self._give(worker, self._queue.popleft())
        else:
            ray.kill(worker)  # its GPU may be needed by one that Ray restarts

    def _report(self) -> None:
        """What one process says at the end of several videos."""
        jobs = self._order.jobs
        comparison = Comparison(len(jobs), baseline=None, load_analyser=lambda: None)
        for place, job in enumerate(jobs):
            if video := self._videos.get(job):
                comparison.add_earlier(place, video.path, video.record)
        if len(jobs) > 1:
            write_report(comparison, self._order, len(jobs), self._console)


def cause_of(error: RayError) -> Exception:
    """What failed in a worker, where a user can act on it; else the error, with its traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause if isinstance(cause, TeaCacheError) else error
