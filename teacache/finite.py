"""Watching that latents stay finite: NaN would become a black video at the end."""

from __future__ import annotations

import torch

from teacache import device as devices
from teacache.errors import SamplingError


class FiniteWatch:
    """Looks for latents that are not finite, without waiting for the device.

    A GPU's answer on one step is read when it is there, while it is busy with the next.
    """

    def __init__(self, dtype: torch.dtype):
        self._dtype = dtype
        self._answers: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []
        self._step = 0

    def watch(self, latents: torch.Tensor) -> None:
        """Ask for one step, and raise SamplingError where an answer that is there says no."""
        answer, arrived = torch.isfinite(latents).all(), None
        if latents.is_cuda:
            answer = answer.to("cpu", non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(latents.device))
        self._answers.append((answer, arrived))
        while self._answers and (self._answers[0][1] is None or self._answers[0][1].query()):
            self._read()

    def check(self) -> None:
        """Read the answers that are left, once the device is done."""
        while self._answers:
            self._read()

    def _read(self) -> None:
        answer, _ = self._answers.pop(0)
        if not answer.numpy():
            dtype = devices.dtype_name(self._dtype)
            raise SamplingError(
                f"the latents hold NaN or infinite numbers after step {self._step}, counted from "
                f"0, in {dtype}: try another --dtype, a lower --guidance_scale or no --quantize"
            )
        self._step += 1
