"""One video of a request."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    """One video. Exactly one of three attributes determines the computed steps.

    Attributes:
        rel_l1_thresh: threshold of the published rule.
        computed_steps: number of computed steps.
        steps: indices of computed steps, to which the first and the last are added.
        reuse: how the other steps are reused, one of `teacache.core.rule.REUSES`.
    """

    image: str
    prompt: str
    negative_prompt: str
    seed: int
    num_infer_steps: int
    rel_l1_thresh: float | None = None
    computed_steps: int | None = None
    steps: tuple[int, ...] | None = None
    reuse: str = "residual"

    @property
    def schedule(self) -> str | None:
        """Name of its schedule: `forecast 12`, `listed 9`; None for the published rule."""
        if self.computed_steps is not None:
            return f"{self.reuse} {self.computed_steps}"
        name = None
        if self.steps is not None:
            name = f"listed {len({0, self.num_infer_steps - 1, *self.steps})}"
        if self.reuse == "residual":
            return name
        return f"{name or f'{self.rel_l1_thresh:g}'} {self.reuse}"

    @property
    def which(self) -> str:
        """Name of its schedule, or its threshold: `rel_l1_thresh 0.15`."""
        return self.schedule or f"rel_l1_thresh {self.rel_l1_thresh}"

    @property
    def group(self) -> tuple[str, str, str, int, int]:
        """Equal for videos that are compared with each other: all but the schedule."""
        return self.image, self.prompt, self.negative_prompt, self.seed, self.num_infer_steps
