"""Hands the videos of an order out to workers on Ray: one process for each GPU of the cluster.

Who is free takes what comes next. A job that fails is tried once more; one whose worker is lost is
done by another, and a new worker begins in the lost one's place. What is done is known by the
records in the output folder, so that no video is made twice.
"""

from __future__ import annotations

import collections
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from teacache.base import interruption
from teacache.base.console import Console
from teacache.base.errors import (
    DeviceError,
    TeaCacheError,
    TeamError,
    one_line,
    reason,
    without_credentials,
)
from teacache.cluster.worker import Answer, Worker
from teacache.command.order import Order
from teacache.command.shards import units

logger = logging.getLogger("teacache.cluster")

FAILURES = 2  # of a job, after which it is given up
LOSSES = 3  # of workers with one job, which may be what ends them; or, for each worker, in a row
MOST_CONDITIONED = 64  # jobs whose embeddings a worker keeps: 8 MB each at full size
STOPPING_SECONDS = 10.0
WAITING_SECONDS = 120.0  # for the first worker, after which the user is told


@dataclass
class Running:
    """A worker, and what it is at.

    Attributes:
        actor: Ray's handle of it.
        given: places of the jobs that it is given and has not begun.
        place: of the job that it samples.
        since: when it was asked for what it is at, by the monotonic clock.
    """

    actor: Any
    given: collections.deque[int] = field(default_factory=collections.deque)
    place: int | None = None
    since: float = 0.0


class Dispatch:
    """The videos of an order, on their way to being finished.

    Args:
        workers: how many at a time.
        gpus: of each of them.

    Attributes:
        finished: what is there, by the place of its job in `order.jobs`.
        failed: why a job was given up, by its place.
    """

    def __init__(self, order: Order, workers: int, gpus: int, console: Console):
        self.order, self.console = order, console
        self.finished: dict[int, Answer] = {}
        self.failed: dict[int, Exception] = {}
        self._workers = min(workers, len(order.jobs))
        places = {job: place for place, job in enumerate(order.jobs)}
        self._queue = collections.deque(
            [places[job] for job in unit] for unit in units(order.jobs, self._workers)
        )
        # Two threads: one that does the work, always the same, and one that is told to stop it.
        remote = ray.remote(concurrency_groups={"stop": 1})  # type: ignore[call-overload]
        # Where no machine has a GPU, nothing but this spreads them over the machines.
        self._actor = remote(Worker).options(num_gpus=gpus, scheduling_strategy="SPREAD")
        known = [] if order.resume else order.output_path.glob("*.json")
        self._ignored = frozenset(path.name for path in known)
        self._calls: dict[Any, Running] = {}  # by the reference of what they will answer
        self._idle: list[Running] = []
        self._failures: collections.Counter[int] = collections.Counter()
        self._losses: collections.Counter[int] = collections.Counter()
        self._losses_in_a_row = 0
        self._seconds: list[float] = []
        self._refusals: list[str] = []
        self._begun = False
        self._told: set[str] = set()

    def run(self) -> None:
        """Have every video sampled, or given up.

        Raises:
            TeaCacheError: where no worker can begin, for the reason that the last one gives.
        """
        for _ in range(self._workers):
            self._begin()
        tell_at = time.monotonic() + WAITING_SECONDS
        try:
            while len(self.finished) + len(self.failed) < len(self.order.jobs):
                # Not longer than a second: signals are looked at between.
                answered, _ = ray.wait(list(self._calls), timeout=1)
                interruption.check()
                if time.monotonic() > tell_at and not self._begun:
                    self.console.say("no worker could begin yet: `ray status` says what is free")
                    tell_at = math.inf
                for call in answered:
                    self._take(call, self._calls.pop(call))
        except KeyboardInterrupt as error:
            self._stop(error)
            raise

    def _begin(self) -> None:
        """Have a worker begin, which waits for a free GPU."""
        worker = Running(self._actor.remote(self.order, Path.cwd(), self._ignored))
        self._ask(worker, worker.actor.start.remote())

    def _ask(self, worker: Running, call: Any) -> None:
        worker.since = time.monotonic()
        self._calls[call] = worker

    def _next(self, worker: Running) -> None:
        """Give a worker its next job, or more of them to get ready for, or nothing to do."""
        if worker.given:
            worker.place = worker.given.popleft()
            self._ask(worker, worker.actor.sample.remote(worker.place))
        elif self._queue:
            left = sum(map(len, self._queue))
            # Ever fewer, so that all end at about the same time.
            share = min(MOST_CONDITIONED, math.ceil(left / (2 * self._workers)))
            while self._queue and len(worker.given) < share:
                worker.given.extend(self._queue.popleft())
            self._ask(worker, worker.actor.condition.remote(list(worker.given)))
        else:
            self._idle.append(worker)

    def _take(self, call: Any, worker: Running) -> None:
        """Take a worker's answer, or what became of it instead."""
        place, worker.place = worker.place, None
        try:
            answer, warnings = ray.get(call)
        except RayTaskError as error:
            if place is not None:
                self._failed(place, worker, error)
            elif isinstance(error.cause, TeamError):
                self._lose(place, worker, error)
            else:
                self._give_up(worker, error)
            return
        except RayError as error:
            self._lose(place, worker, error)
            return
        for warning in [*warnings, *self._refusals]:
            if warning not in self._told:  # by another worker
                self._told.add(warning)
                logger.warning("%s", warning)
        self._refusals.clear()
        self._begun = True
        if place is not None:
            self._losses_in_a_row = 0
            self._finish(place, answer, time.monotonic() - worker.since)
        self._next(worker)

    def _finish(self, place: int, answer: Answer, seconds: float) -> None:
        """Tell of a finished video, and how long the others will take."""
        self.finished[place] = answer
        if answer.earlier:
            self.console.done(answer.path, f"done before {answer.path}")
            return
        self._seconds.append(seconds)
        every, done = len(self.order.jobs), len(self.finished)
        left = (every - done - len(self.failed)) / self._workers
        estimate = left * sum(self._seconds) / len(self._seconds)
        self.console.done(
            answer.path,
            f"{done} of {every}  {answer.path}  {seconds:.1f} s"
            + (f", about {in_words(estimate)} left" if left else ""),
        )

    def _failed(self, place: int, worker: Running, error: RayTaskError) -> None:
        """A job has failed: once more at the end, or no more."""
        self._failures[place] += 1
        again = self._failures[place] < FAILURES
        then = "It is tried once more" if again else "It is given up"
        logger.warning("%s failed: %s. %s", self._name(place), said(error), then)
        foreseen = isinstance(error.cause, TeaCacheError)
        if foreseen and not isinstance(error.cause, TeamError):
            self._next(worker)
        else:  # a fault, after which a GPU may be of no more use to the process, or ranks that fail
            ray.kill(worker.actor)
            self._return(worker.given)
            self._begin()
        told = error.cause if foreseen else error
        self._put_back_or_give_up(place, again, told)

    def _lose(self, place: int | None, worker: Running, error: RayError) -> None:
        """A worker is gone: others do its jobs, and a new one begins."""
        ray.kill(worker.actor)  # it may be out of reach alone
        self._losses_in_a_row += 1
        self._return(worker.given)
        why = said(error)
        if self._losses_in_a_row > LOSSES * self._workers:
            raise DeviceError(
                f"workers end one after the other, as where host memory runs out: {why}"
            )
        self._begin()
        if place is None:
            logger.warning("a worker was lost: %s", why)
            return
        self._losses[place] += 1
        again = self._losses[place] < LOSSES
        then = "Another does it" if again else "It is given up"
        logger.warning("%s has lost its worker: %s. %s", self._name(place), why, then)
        self._put_back_or_give_up(place, again, DeviceError(f"its workers were lost: {why}"))

    def _give_up(self, worker: Running, error: RayTaskError) -> None:
        """A worker cannot begin, or get ready for jobs: the others go on without it."""
        self._workers -= 1
        if not self._workers:
            raise error.cause if isinstance(error.cause, TeaCacheError) else error
        self._return(worker.given)
        self._refusals.append(f"a worker less: {said(error)}")  # told once another has begun

    def _put_back_or_give_up(self, place: int, again: bool, error: Exception) -> None:
        if again:
            self._return([place])
        else:
            self.failed[place] = error

    def _return(self, places: collections.deque[int] | list[int]) -> None:
        """Jobs that somebody else has to do, and whoever is idle does."""
        if places:
            self._queue.append(list(places))
        waiting, self._idle = self._idle, []
        for worker in waiting:
            self._next(worker)

    def _stop(self, interrupted: KeyboardInterrupt) -> None:
        """Have the workers end within a step, and note what that leaves."""
        for worker in self._calls.values():
            worker.actor.stop.options(concurrency_group="stop").remote()
        calls = list(self._calls)
        stopped: list[Any] = []
        if calls:
            stopped, _ = ray.wait(calls, num_returns=len(calls), timeout=STOPPING_SECONDS)
        for call in stopped:
            try:
                answer, _ = ray.get(call)
            except RayError as error:
                kept = said(error).partition("interrupted. ")[2]
                if kept:
                    interrupted.add_note(kept)
            else:
                place = self._calls[call].place
                if place is not None:
                    self.finished[place] = answer

    def _name(self, place: int) -> str:
        job = self.order.jobs[place]
        image = without_credentials(job.image)
        which = f"image {image}, seed {job.seed}, {job.which}"
        return f"video {place + 1} of {len(self.order.jobs)} ({which})"


def said(error: Exception) -> str:
    """What an error says, or what it was caused by in a worker, in one line."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    foreseen = isinstance(cause, (TeaCacheError, RayError))
    kind = "" if foreseen else f"{type(cause).__name__}: "
    return one_line(kind + reason(cause)).rstrip(".")


def in_words(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3 h 5 min."""
    if seconds < 100:
        return f"{math.ceil(seconds)} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
