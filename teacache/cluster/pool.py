"""The videos of a request on a Ray cluster. Each worker takes one task after the other.

Ray restarts a killed worker and repeats its task. A worker skips the videos that have a record, so
no video is sampled twice.
"""

import functools
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

from teacache.base import interruption
from teacache.base.console import Console, Stages
from teacache.base.errors import DeviceError, SamplingError, TeaCacheError
from teacache.base.quiet import silence_libraries
from teacache.comparison.comparison import Comparison
from teacache.inputs.photograph_store import PhotographStore
from teacache.preflight.checks import preflight, shots_of
from teacache.request.job import Job
from teacache.request.shards import tasks
from teacache.request.values import Request
from teacache.results.finished_videos import FinishedVideos
from teacache.results.output_folder import prepared_folder
from teacache.results.record import Record
from teacache.run.report import write_report


class Worker:
    """Samples task after task, with models that it loads once, in the command's `folder`.

    The records with the file names `ignored` do not count as finished videos.
    """

    def __init__(self, request: Request, folder: Path, ignored: frozenset[str]):
        self.request, self.folder, self.ignored = request, folder, ignored
        self.session: Any = None
        self.photographs = PhotographStore()
        silence_libraries()
        self.warnings = BufferingHandler(capacity=10_000)
        logging.getLogger("teacache").handlers = [self.warnings]

    def sample(self, jobs: tuple[Job, ...]) -> Iterator[tuple[Job, Path, Record, list[str]]]:
        """Sample a task; yield each job, its video, record, and the warnings since the last one.

        Without jobs, only check this machine. Raises TeaCacheError if a job or the machine fails.
        """
        try:
            if not self.folder.is_dir():
                name = os.uname().nodename
                raise DeviceError(f"{name} lacks {self.folder}: all machines need it")
            os.chdir(self.folder)
            with prepared_folder(self.request.options.output_path):
                if self.session is None:
                    self._open_session()
                from teacache.run.loop import compared  # imports diffusers: after the checks

                shots = shots_of(jobs, self.session.setup, self.photographs)
                videos = compared(self.session, shots, self.finished, self.comparison, final=False)
                for video in videos:
                    # As a tuple: to unpickle a `FinishedVideo` the command would import diffusers.
                    yield *video[:3], [each.getMessage() for each in self.warnings.buffer]
                    self.warnings.flush()
        except KeyboardInterrupt as error:  # Ray handles it differently
            raise SamplingError(". ".join(getattr(error, "__notes__", ()))) from error

    def _open_session(self) -> None:
        jobs, stages = self.request.jobs, Stages(Console(quiet=True))
        setup, _ = preflight(replace(self.request, jobs=()), self.photographs, stages)
        from teacache.run.loop import Session, comparison_of

        self.finished = FinishedVideos(self.request.options.output_path, self.ignored)
        self.comparison = comparison_of(jobs, setup)
        self.session = Session(setup, self.photographs, stages, len(jobs))

    def stop(self) -> None:
        """End `sample` within one step. Another thread calls it."""
        interruption.request_stop()


class Pool:
    """`workers` on Ray, with `gpus` each, that share the tasks of a request."""

    def __init__(self, request: Request, workers: int, gpus: int, console: Console):
        self._request, self._console = request, console
        output = request.options.output_path
        self._comparison = Comparison(request.jobs, output, load_analyser=lambda: None)
        self._pending = dict.fromkeys(request.jobs)
        self._warn = functools.cache(logging.getLogger("teacache").warning)  # each text once
        self._queue = deque(tasks(request.jobs, workers))
        self._calls: dict[Any, tuple[Any, tuple[Job, ...]]] = {}  # worker and task of each call
        known = [] if request.resume else [path.name for path in output.glob("*.json")]
        self._arguments = request, Path.cwd(), frozenset(known)
        # A second thread for `stop`. SPREAD uses all machines, also without GPUs.
        options: dict[str, Any] = {"num_gpus": gpus, "concurrency_groups": {"stop": 1}}
        options |= {"scheduling_strategy": "SPREAD", "max_restarts": -1, "max_task_retries": 2}
        self._actor: Any = ray.remote(**options)(Worker)
        for _ in range(min(workers, len(request.jobs))):
            self._give(self._actor.remote(*self._arguments), ())

    def run(self) -> None:
        """Sample all videos, and write the report.

        Raises:
            TeaCacheError: in one line, if a machine cannot sample, or videos failed.
        """
        try:
            while self._pending:
                for worker, task, error in self._ended(seconds=1):
                    self._after_task(worker, task, error)
                interruption.check()
        except KeyboardInterrupt as interrupted:
            for worker, _ in self._calls.values():
                worker.stop.options(concurrency_group="stop").remote()
            until = time.monotonic() + 10
            while self._calls and (seconds := until - time.monotonic()) > 0:
                for _, _, error in self._ended(seconds):
                    if isinstance(error, SamplingError):
                        interrupted.add_note(str(error))
            raise
        finally:
            if len(self._request.jobs) > 1:
                write_report(self._comparison, self._console)
        if failed := self._comparison.missing:
            raise SamplingError(
                f"{len(failed)} of {len(self._request.jobs)} videos failed, see above: --resume "
                "tries them again"
            )

    def _give(self, worker: Any, task: tuple[Job, ...]) -> None:
        self._calls[worker.sample.options(num_returns="streaming").remote(task)] = worker, task

    def _ended(self, seconds: float) -> Iterator[tuple[Any, tuple[Job, ...], Exception | None]]:
        """Collect finished videos; yield worker, task and error of each call that ended."""
        for call in ray.wait(list(self._calls), timeout=seconds)[0]:
            try:
                job, path, record, warnings = ray.get(next(call))  # type: ignore[arg-type]
            except StopIteration:
                yield *self._calls.pop(call), None
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                yield *self._calls.pop(call), cause if isinstance(cause, TeaCacheError) else error
            else:
                for warning in warnings:
                    self._warn(warning)
                if job in self._pending:  # else a repeated task returned it again
                    del self._pending[job]
                    self._comparison.add_earlier(job, path, record)
                    line = f"{len(self._comparison.videos)} of {len(self._request.jobs)}  {path}"
                    self._console.done(path, line)

    def _after_task(self, worker: Any, task: tuple[Job, ...], error: Exception | None) -> None:
        if error and not task:
            raise error  # this machine cannot sample
        pending = tuple(job for job in task if job in self._pending)
        if len(pending) == 1 and (error or len(task) == 1):
            job, reason = pending[0], error or "another process samples it"
            del self._pending[job]
            self._warn(f"seed {job.seed}, {job.which}: {reason}")
        else:  # in halves, until the failing job is alone
            half = len(pending) // 2
            self._queue += filter(None, (pending[:half], pending[half:]))
        broken = error and not isinstance(error, TeaCacheError)
        if broken or not self._queue:  # a worker that Ray restarts may need its GPU
            ray.kill(worker)
        if self._queue:
            fresh = self._actor.remote(*self._arguments) if broken else worker
            self._give(fresh, self._queue.popleft())
