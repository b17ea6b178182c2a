"""TeaCache on one transformer: its settings, and the state of the current video."""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, Self

import torch
from diffusers import ConsisIDTransformer3DModel

from teacache.base.errors import ArgumentError
from teacache.base.patch import take_away
from teacache.core import rule
from teacache.core.forecast import Forecast, Scheduler
from teacache.core.ranks import ALONE
from teacache.core.rule import REUSES, Coefficients, Limits, Schedule, whole_number
from teacache.core.state import VideoState, embed_timestep, is_at

logger = logging.getLogger(__name__)

ONE_VIDEO = (
    "the transformer was called at a timestep that its video is not at. With TeaCache it denoises "
    "one video at a time, in one thread, by the scheduler of the pipeline that was patched"
)


class TeaCacheHandle:
    """TeaCache on one transformer: settings of the next video, state of the current one.

    `apply_teacache` returns it. As a context manager it removes the patch at the end of the block.
    `ranks` share each step.

    Args:
        reuse: one of `REUSES`, or None, as for `apply_teacache`.
        scheduler: returns the scheduler of the current video.
        forward: replaces the transformer's forward; takes the transformer, this handle, and the
            arguments of the forward.
    """

    def __init__(
        self,
        transformer: ConsisIDTransformer3DModel,
        rel_l1_thresh: float,
        coefficients: Coefficients,
        limits: Limits,
        reuse: str | None,
        scheduler: Callable[[], Scheduler],
        forward: Callable[..., Any],
    ):
        if reuse not in (None, *REUSES):
            raise ArgumentError(f"reuse must be one of {', '.join(REUSES)}: found {reuse!r}")
        self.forward = functools.partial(forward, transformer, self)
        self.transformer = transformer
        self.coefficients, self.limits = coefficients, limits
        self.rel_l1_thresh = rel_l1_thresh
        self.reuse = reuse
        self.ranks = ALONE
        self.removed = False
        self._scheduler = scheduler
        self._followed: Schedule | tuple[int, ...] | int | None = None
        self._video: VideoState | None = None
        self._within_step = threading.Lock()
        self._warned = False

    @property
    def rel_l1_thresh(self) -> float:
        """Threshold on the accumulated distance. A new value applies from the next video on."""
        return self._rel_l1_thresh

    @rel_l1_thresh.setter
    def rel_l1_thresh(self, value: float) -> None:
        self._rel_l1_thresh = rule.check_threshold(value)

    def follow(self, steps: Schedule | Iterable[int] | int | None) -> None:
        """Compute these steps from the next video on. None restores the threshold rule.

        Args:
            steps: a schedule; or the steps to compute, to which the first and the last are added;
                or their number, see `teacache.core.rule.spread_steps`.

        Raises:
            ArgumentError: if a step or the number is not a whole one.
        """
        if isinstance(steps, Iterable):
            steps = tuple(whole_number(step, "a computed step") for step in steps)
        elif steps is not None and not isinstance(steps, Schedule):
            steps = whole_number(steps, "computed_steps")
        self._followed = steps

    @property
    def schedule(self) -> Schedule | None:
        """The part of the schedule that is done, of the current or the last video; or None."""
        return None if self._video is None else self._video.done

    def counts(self) -> dict[str, int]:
        """Numbers of computed and reused steps of the current video so far."""
        done = self.video.done
        return {"computed": len(done.computed_steps), "reused": len(done.reused_steps)}

    @property
    def video(self) -> VideoState:
        """The current video, or the last one."""
        if self._video is None:
            raise RuntimeError("no video has begun")
        return self._video

    def remove(self) -> None:
        """Remove the patch and clear the caches. A second call does nothing.

        If something else has wrapped the patched forward meanwhile, the patch stays inside, and
        calls the plain forward.
        """
        take_away(self.transformer, self.forward)
        self.removed = True
        self._forget()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Raise ArgumentError: a copy would follow the scheduler and the state of the original."""
        raise ArgumentError(
            "a transformer with TeaCache cannot be copied or pickled: remove() it first, and apply "
            "TeaCache to the copy"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Lock the transformer for one step; raise ArgumentError if another thread holds it."""
        if not self._within_step.acquire(blocking=False):
            raise ArgumentError(ONE_VIDEO)
        try:
            yield
        finally:
            self._within_step.release()

    def begin_step(self, timestep: torch.Tensor, dtype: torch.dtype) -> bool:
        """Begin a step; return whether it is computed. The first step of a video plans all steps.

        Args:
            timestep: [batch], the argument of the transformer.
            dtype: of the latents; the timestep embedding is rounded to it.

        Raises:
            ArgumentError: if this is neither the next step of the current video nor the first step
                of another.
        """
        scheduler, video = self._scheduler(), self._video
        timesteps = scheduler.timesteps
        if video is None or video.timesteps is not timesteps or video.step == len(timesteps):
            video = None
        elif not is_at(timestep, timesteps[video.step]) and is_at(timestep, timesteps[0]):
            video = None  # the previous video was stopped
        if video is None:
            if not is_at(timestep, timesteps[0]):
                raise ArgumentError(ONE_VIDEO)
            self._forget()
            video = VideoState(timesteps, self._plan(timesteps, len(timestep), dtype))
            if video.plan.reuse == "forecast" and video.plan.reused_steps:
                video.forecast = Forecast.by(scheduler)
            self._video = video
        elif video.thread != threading.get_ident() or not is_at(timestep, timesteps[video.step]):
            raise ArgumentError(ONE_VIDEO)
        if video.is_computed:
            video.residual = None  # frees its memory for the blocks
        return video.is_computed

    def end_step(self) -> None:
        """End a step. The last one clears the caches, so that the VAE can use their memory."""
        self.video.step += 1
        if self.video.step == len(self.video.timesteps):
            self._forget()

    def _plan(self, timesteps: torch.Tensor, batch: int, dtype: torch.dtype) -> Schedule:
        """The schedule of a new video. It depends only on the timestep embeddings."""
        plan = self._followed
        if not isinstance(plan, Schedule):
            distances = rule.distances_between(
                [embed_timestep(self.transformer, t.expand(batch), dtype) for t in timesteps]
            )
            how = self.rel_l1_thresh, self.coefficients, self.limits, self.reuse
            plan = rule.schedule(distances, *how, computed_steps=plan)
        elif plan.num_steps != len(timesteps):
            raise ArgumentError(
                f"a schedule of {plan.num_steps} steps cannot be followed in {len(timesteps)}"
            )
        inner = [step for step in plan.steps_outside_fitted_range if step < plan.num_steps - 1]
        # Threshold 0 and listed steps do not depend on the coefficients.
        if inner and plan.rel_l1_thresh and not self._warned:
            self._warned = True
            logger.warning(
                "step %d: the timestep embedding moved by %.4f, which the coefficients (%s) do not "
                "cover: such steps are computed",
                inner[0],
                plan.distances[inner[0]],
                plan.coefficients.source,
            )
        return plan

    def _forget(self) -> None:
        """Clear the caches of the last video; its schedule stays available."""
        if self._video is not None:
            self._video.residual = self._video.face = self._video.forecast = None
