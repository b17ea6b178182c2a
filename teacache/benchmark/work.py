"""The work of a denoising step at full size, counted on tensors that have no data."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from diffusers import CogVideoXDPMScheduler, ConsisIDTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from teacache.benchmark.random_weights import FULL
from teacache.core.forward import apply_teacache
from teacache.core.rule import COGVIDEOX_5B, listed_schedule
from teacache.sampling.attention import use_attention
from teacache.sampling.blocks import use_lean_blocks

FRAMES, HEIGHT, WIDTH, TEXT = 13, 60, 90, 226  # latents of 49 frames of 720x480, text tokens
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class Work(NamedTuple):
    """Of a step: operations in attention and in matrix products, bytes of everything else."""

    attention: int
    product: int
    elsewhere: int


class Counter(TorchDispatchMode):
    """Books the work of each operation.

    Attributes:
        work: all of it so far.
        between: bytes that go into attention and matrix products or come out of them, weights left
            out, each tensor once: what is left of `elsewhere` where all that lies between two of
            them is one pass.
    """

    def __init__(self, weights: Iterator[torch.Tensor]):
        super().__init__()
        self._weights = {each.untyped_storage()._cdata for each in weights}
        self._seen: dict[int, torch.UntypedStorage] = {}
        self.work, self.between = Work(0, 0, 0), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = (
            [each for each in pytree.tree_leaves(tree) if isinstance(each, torch.Tensor)]
            for tree in ((args, kwargs), out)
        )
        name = func.overloadpacket.__name__
        attention, product, elsewhere = self.work
        if "scaled_dot_product" in name:
            (batch, heads, queries, width), keys = read[0].shape, read[1].shape[2]
            self.work = Work(
                attention + 4 * batch * heads * queries * keys * width, product, elsewhere
            )
            self._pass([*read[:3], written[0]])
        elif name in PRODUCTS:
            # Each number of the output is a sum over the rows of the right matrix.
            rows = read[-1].shape[-2]
            self.work = Work(attention, product + 2 * written[0].numel() * rows, elsewhere)
            self._pass([*read, *written])
        elif not func.is_view:
            moved = sum(_bytes(each) for each in (*read, *written))
            self.work = Work(attention, product, elsewhere + moved)
        return out

    def _pass(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._weights and storage._cdata not in self._seen:
                self._seen[storage._cdata] = storage  # held, so that none gets its place
                self.between += _bytes(tensor)


def _bytes(tensor: torch.Tensor) -> int:
    """What there is of it: of one that repeats itself, once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@contextlib.contextmanager
def fake_bfloat16() -> Iterator[None]:
    """Let new tensors have no data, and be bfloat16."""
    default = torch.get_default_dtype()
    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def full_transformer(ours: bool) -> ConsisIDTransformer3DModel:
    """The real architecture; `ours`: with this package's attention and blocks."""
    transformer = ConsisIDTransformer3DModel(**FULL).eval()
    if ours:
        use_attention(transformer, "native")
        use_lean_blocks(transformer)
    return transformer


def step_inputs(samples: int) -> dict[str, Any]:
    """What the transformer is called with at published settings; `samples`: 2 with guidance."""
    rotary = (FRAMES * HEIGHT * WIDTH // 4, FULL["attention_head_dim"])
    return {
        "hidden_states": torch.empty(samples, FRAMES, 32, HEIGHT, WIDTH),
        "encoder_hidden_states": torch.empty(samples, TEXT, 4096),
        "timestep": torch.zeros(samples, dtype=torch.int64),
        "image_rotary_emb": tuple(torch.empty(*rotary, dtype=torch.float32) for _ in range(2)),
        "id_cond": torch.empty(1, 1280),
        "id_vit_hidden": [torch.empty(1, 577, 1024) for _ in range(5)],
        "return_dict": False,
    }


@contextlib.contextmanager
def three_steps(transformer: ConsisIDTransformer3DModel) -> Iterator[None]:
    """Apply TeaCache, which then computes two steps and reuses one."""
    scheduler = CogVideoXDPMScheduler()
    scheduler.timesteps = torch.zeros(4, dtype=torch.int64)
    plan = listed_schedule((0, 1, 3), [1.0, 1.0, 1.0, 1.0], COGVIDEOX_5B)
    with apply_teacache(transformer, schedule=plan, scheduler=scheduler):
        yield


@functools.cache
def count(ours: bool) -> tuple[Counter, Counter]:
    """The work of a computed step, and of a reused one; of the plain forward twice the same."""
    counters = []
    with fake_bfloat16():
        transformer = full_transformer(ours)
        inputs = step_inputs(samples=2)
        with three_steps(transformer) if ours else contextlib.nullcontext():
            for _ in range(3):
                weights = iter(transformer.state_dict().values())
                with Counter(weights) as counter:
                    transformer(**inputs)
                counters.append(counter)
    return counters[1], counters[2]
