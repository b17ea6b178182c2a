"""What a process of a real gloo group does for `test_parallel`. Its tensors come back in a file."""

import contextlib
import os
import socket
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX, ConsisIDPipeline, ConsisIDTransformer3DModel
from diffusers import CogVideoXDPMScheduler as Scheduler
from torch._dynamo.utils import counters

from teacache.base.errors import DeviceError
from teacache.checkpoint.size import VideoSize
from teacache.core.forward import apply_teacache
from teacache.core.ranks import ALONE, Ranks
from teacache.embedded import build as tiny
from teacache.inputs.identity import Identity
from teacache.inputs.text import Text
from teacache.parallel import group
from teacache.sampling import acceleration, sampler
from teacache.sampling.attention import use_attention

# The embedded model with 12 heads and 64 + 252 tokens, which divide by 4 as the real ones do.
WIDE = {**tiny.TRANSFORMER, "num_attention_heads": 12, "attention_head_dim": 16}
WIDE |= {"sample_width": 12, "sample_height": 12, "max_text_seq_length": 64}
TEXT, VIDEO = 64, 7 * 6 * 6
SIZE = VideoSize(96, 96, 13)
THRESHOLDS, STEPS = (0.0, 0.2), 10
FORECAST = 4  # computed steps
CPU = torch.device("cpu")


def make_pipe(dtype: torch.dtype) -> ConsisIDPipeline:
    torch.manual_seed(0)
    transformer = ConsisIDTransformer3DModel(**WIDE).eval()
    tiny.smooth_time_embedding(transformer)
    return ConsisIDPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLCogVideoX(**tiny.VAE).eval(),
        transformer=transformer.to(dtype),
        scheduler=Scheduler(**tiny.SCHEDULER),
    )


def accelerate(transformer: ConsisIDTransformer3DModel, how: str) -> None:
    """What a case is accelerated by, if by anything."""
    if how == "compile":
        acceleration.compile_transformer(transformer)
    elif how == "fp8":
        # The real float8 layers; only torchao's question after the GPU is answered for it.
        with mock.patch("torchao.quantization.quant_api._check_hardware_support"):
            acceleration.quantize_fp8(transformer)


def sample(dtype: torch.dtype, guidance_scale: float, how: str, join=lambda transformer: ALONE):
    """Latents at every threshold and by a forecast, [runs, ...], and the computed steps of each."""
    pipe = make_pipe(dtype)
    config, generator = pipe.transformer.config, torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    hidden = [random(1, 577, config.LFE_vit_dim) for _ in range(5)]
    identity = Identity(random(1, config.LFE_id_dim), hidden, None, np.zeros((5, 2)), np.zeros(512))
    state = torch.Generator().manual_seed(2).get_state()
    start = sampler.Start(identity, random(1, 7, 16, 12, 12), random(1, 7, 16, 12, 12), state)
    texts = [random(1, TEXT, config.text_embed_dim) for _ in range(2)]
    text = Text(texts[0], texts[1] if guidance_scale > 1 else None)
    use_attention(pipe.transformer, "native")
    accelerate(pipe.transformer, how)
    with apply_teacache(pipe) as handle:
        handle.ranks = join(pipe.transformer)
        found = []
        for run in (*THRESHOLDS, FORECAST):
            if run == FORECAST:
                handle.follow(FORECAST)
            else:
                handle.rel_l1_thresh = run
            denoised = sampler.denoise(
                pipe, start, text, SIZE, num_infer_steps=STEPS, guidance_scale=guidance_scale
            )
            found.append((denoised.latents, handle.schedule.computed_steps))
    return torch.stack([latents for latents, _ in found]), [steps for _, steps in found]


def work(rank: int, world: int, port: int, cases: list, folder: str) -> None:
    """Sample each case and save what came of it.

    Args:
        cases: halves, parts, dtype, guidance scale, and what it is accelerated by.
    """
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group.connect(CPU)
    group.check_own(f"GPU-{rank}")
    with contextlib.suppress(DeviceError):
        group.check_own(f"GPU-{max(rank, 1)}")
        raise AssertionError("ranks 0 and 1 have the same GPU")
    sent = _count_exchanges()
    results = {}
    for halves, parts, dtype, guidance_scale, how in cases:
        sent.clear()

        def join(transformer, halves=halves, parts=parts) -> Ranks:
            return group.join(transformer, Ranks(halves, parts), CPU)

        latents, steps = sample(dtype, guidance_scale, how, join)
        if how == "compile":
            assert counters["stats"]["unique_graphs"] == 2, "a block and a cross-attention layer"
        results[halves, parts, dtype, guidance_scale, how] = latents, steps, list(sent)
    torch.save(results, Path(folder) / f"{rank}.pt")
    group.disconnect()


def _count_exchanges() -> list[int]:
    """The bytes that each exchange of tokens for heads takes from this process, from now on.

    None are counted of what is compiled, which a list that grows would have compiled each time.
    """
    from torch.distributed import _functional_collectives as collectives

    sent: list[int] = []
    exchange = collectives.all_to_all_single

    def counting(tensor, *arguments, **named):
        if not torch.compiler.is_compiling():
            sent.append(tensor.numel() * tensor.element_size())
        return exchange(tensor, *arguments, **named)

    collectives.all_to_all_single = counting
    return sent


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
