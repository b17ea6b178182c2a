"""One video of a request."""

from dataclasses import dataclass

from teacache.core.rule import PUBLISHED, Limits


@dataclass(frozen=True)
class Job:
    """One video. Exactly one of three attributes determines the computed steps.

    Attributes:
        rel_l1_thresh: threshold of the published rule.
        computed_steps: number of computed steps.
        steps: indices of computed steps, to which the first and the last are added.
        reuse: how the other steps are reused, one of `teacache.core.rule.REUSES`.
        limits: on reuse, also for `computed_steps`; `steps` have none.
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
    limits: Limits = PUBLISHED

    @property
    def schedule(self) -> str | None:
        """Its schedule's name: `forecast 12`, `0.15, max_reuse 2`; None for the published rule."""
        how = "" if self.reuse == "residual" else f" {self.reuse}"
        if self.computed_steps is not None:
            name = f"{self.reuse} {self.computed_steps}"
        elif self.steps is not None:
            name = f"listed {len({0, self.num_infer_steps - 1, *self.steps})}{how}"
        elif how or self.limits != PUBLISHED:
            name = f"{self.rel_l1_thresh:g}{how}"
        else:
            return None
        published = vars(PUBLISHED)
        changed = ((n, value) for n, value in vars(self.limits).items() if value != published[n])
        return ", ".join([name, *(f"{n} {value}" for n, value in changed)])

    @property
    def which(self) -> str:
        """Name of its schedule, or its threshold: `rel_l1_thresh 0.15`."""
        named = self.schedule or str(self.rel_l1_thresh)
        return named if self.rel_l1_thresh is None else f"rel_l1_thresh {named}"

    @property
    def group(self) -> tuple[str, str, str, int, int]:
        """Equal for videos that are compared with each other: all but the schedule."""
        return self.image, self.prompt, self.negative_prompt, self.seed, self.num_infer_steps
