"""Training on a CPU: every core computes a part of the gradient, and what is done is kept.

A stage of the training is a loop over `steps`: it draws its own data from the number of the step,
so that a training that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from teacache.base.files import written_whole

KEEP_EVERY = 50  # steps
WARM_UP = 30  # steps
MOMENTUM, MUON_DECAY = 0.95, 0.01


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal by five Newton-Schulz iterations.

    Keller Jordan et al. 2024, kellerjordan.github.io/posts/muon. As torch.optim.Muon does it, but
    in single precision: that one computes in bfloat16, ten times slower on CPUs without it.
    """

    def __init__(self, matrices: list[nn.Parameter], lr: float) -> None:
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonal(matrix.grad.lerp(momentum, MOMENTUM))
                rows, columns = update.shape
                matrix.mul_(1 - group["lr"] * MUON_DECAY)
                matrix.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix whose rows or columns are orthonormal."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Muon's: they bring singular values to about 1
    x = matrix / (matrix.norm() + 1e-7)
    wide = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide.T if x.shape[0] > x.shape[1] else wide


class Descent:
    """Muon for a model's matrices and convolutions, AdamW for all else; their mean over time.

    The learning rate rises over the first steps, stays, and falls to nothing over the last half.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        is_matrix: Callable[[str, nn.Parameter], bool],
        steps: int,
        folder: Path,
        *,
        muon_rate: float,
        adam_rate: float,
    ) -> None:
        """
        Args:
            name: of the stage: its files in `folder` begin with it.
            is_matrix: whether Muon takes the parameter of this name; a convolution is flattened.
        """
        self.name, self.model, self.steps, self.folder = name, model, steps, folder
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._matrices = [p for n, p in named if is_matrix(n, p)]
        # They share their memory with the parameters.
        self._flat = [nn.Parameter(p.detach().flatten(1)) for p in self._matrices]
        self._others = [p for n, p in named if not is_matrix(n, p)]
        self._muon = Muon(self._flat, muon_rate)
        self._adam = torch.optim.AdamW(
            self._others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        self._rates = [(self._muon, muon_rate), (self._adam, adam_rate)]
        self.mean = [p.detach().clone() for p in self.parameters]
        self.losses: list[dict[str, float]] = []

    def remaining(self) -> Iterator[int]:
        """The steps still to be done; what was done is read first, and kept as it grows."""
        self._resume()
        start, last = time.monotonic(), time.monotonic()
        first = len(self.losses)
        for step in range(first, self.steps):
            yield step
            if (step + 1) % KEEP_EVERY == 0 or step + 1 == self.steps:
                self._keep()
                recent = self.losses[-KEEP_EVERY:]
                figures = " ".join(
                    f"{key} {sum(r[key] for r in recent) / len(recent):.4f}" for key in recent[0]
                )
                left = (time.monotonic() - start) / (step + 1 - first) * (self.steps - step - 1)
                pace = (time.monotonic() - last) / min(KEEP_EVERY, step + 1 - first)
                print(
                    f"{self.name} {step + 1}/{self.steps} {figures} {pace:.2f} s/step, "
                    f"{left / 60:.0f} min left",
                    flush=True,
                )
                last = time.monotonic()

    def apply(self, gradients: list[Tensor], figures: dict[str, float]) -> None:
        """One step down; `figures` go on record."""
        step = len(self.losses)
        norm = torch.stack([g.norm() for g in gradients]).norm().item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"{self.name}: no finite gradient at step {step}")
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient / max(1.0, norm)
        for flat, parameter in zip(self._flat, self._matrices, strict=True):
            assert parameter.grad is not None
            flat.grad = parameter.grad.flatten(1)
        share = min(1.0, (step + 1) / WARM_UP, 2 * (1 - step / self.steps))
        for optimizer, rate in self._rates:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
        decay = min(0.995, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.parameters], 1 - decay)
        self.losses.append(figures)

    def take_mean(self) -> None:
        """Give the model the mean of its parameters over the last steps: what is kept of it."""
        with torch.no_grad():
            for parameter, mean in zip(self.parameters, self.mean, strict=True):
                parameter.copy_(mean)

    def _resume(self) -> None:
        file = self.folder / f"{self.name}.state.pt"
        if not file.is_file():
            return
        state = torch.load(file, weights_only=True)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self.mean = state["mean"]
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])
        self.losses = json.loads((self.folder / f"{self.name}.losses.json").read_text())
        self.losses = self.losses[: state["steps"]]

    def _keep(self) -> None:
        state = {
            "steps": len(self.losses),
            "parameters": [p.detach() for p in self.parameters],
            "mean": self.mean,
            "muon": self._muon.state_dict(),
            "adam": self._adam.state_dict(),
        }
        with written_whole(self.folder / self.name, ".state.pt", ".losses.json") as beside:
            torch.save(state, beside[0])
            beside[1].write_text(json.dumps(self.losses))


@contextmanager
def cores() -> Iterator[ThreadPoolExecutor]:
    """A pool of one thread a core, each of which computes alone: faster than one computation that
    is spread over the cores, where tensors are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else before
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def mean_gradients(
    pool: ThreadPoolExecutor,
    parameters: list[nn.Parameter],
    loss_of: Callable[[int], tuple[Tensor, dict[str, float]]],
    parts: int,
) -> tuple[list[Tensor], dict[str, float]]:
    """Gradients and figures, each the mean over the parts of a batch."""

    def part(number: int) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        loss, figures = loss_of(number)
        return torch.autograd.grad(loss, parameters, materialize_grads=True), figures

    gradients: list[Tensor] = []
    total: dict[str, float] = {}
    for own, figures in pool.map(part, range(parts)):
        scaled = [g / parts for g in own]
        gradients = [a + b for a, b in zip(gradients, scaled, strict=True)] if gradients else scaled
        for key, value in figures.items():
            total[key] = total.get(key, 0.0) + value / parts
    return gradients, total
