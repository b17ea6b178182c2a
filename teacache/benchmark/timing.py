"""Samples videos in several variants, in turn, on the same weights, and times their stages."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from teacache.base import device as devices
from teacache.base.errors import CheckpointError
from teacache.benchmark import random_weights
from teacache.benchmark.random_weights import Material
from teacache.checkpoint.pipeline import load_pipeline
from teacache.checkpoint.size import video_size
from teacache.core.forward import apply_teacache
from teacache.core.handle import TeaCacheHandle
from teacache.core.ranks import ALONE
from teacache.inputs.conditioning import Conditioning
from teacache.inputs.embedding_cache import EmbeddingCache
from teacache.inputs.identity import from_tensors
from teacache.inputs.photograph_store import PhotographStore
from teacache.inputs.text import Text
from teacache.parallel import group
from teacache.parallel.division import divide
from teacache.preflight.checks import find_checkpoint
from teacache.request.arguments import DEFAULT_PROMPT
from teacache.results.video import write_video
from teacache.sampling import acceleration, attention, sampler
from teacache.sampling.blocks import use_lean_blocks
from teacache.sampling.decoder import use_lean_decoder
from teacache.sampling.decoder_memory import DecoderMemory

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX, ConsisIDTransformer3DModel

GUIDANCE_SCALE = 6.0
SEED = 42


class Variant(NamedTuple):
    """One way to sample. `threshold` None is the plain diffusers pipeline."""

    name: str
    threshold: float | None
    attention: str = "native"
    compile: bool = False
    quantize: str | None = None


PLAIN = Variant("", None)


class Measured(NamedTuple):
    """Seconds of each step and each stage of one video; peak GPU memory, None on a CPU."""

    computed_steps: list[float]
    reused_steps: list[float]
    seconds: dict[str, float]
    peak_memory_bytes: int | None


def variants(
    thresholds: list[float], backend: str, compiling: bool, quantize: str | None
) -> list[Variant]:
    """The plain pipeline; then for each threshold TeaCache, and one acceleration more each time."""
    accelerations: dict[str, dict[str, Any]] = {}
    if backend != "native":
        accelerations[attention.short_name(backend)] = {"attention": backend}
    if compiling:
        accelerations["compile"] = {"compile": True}
    if quantize:
        accelerations[quantize] = {"quantize": quantize}
    result = [Variant("plain pipeline", None)]
    for threshold in thresholds:
        result.append(Variant(f"TeaCache {threshold:g}", threshold))
        for name, setting in accelerations.items():
            result.append(result[-1]._replace(name=f"{result[-1].name} + {name}", **setting))
    return result


def of_random_weights(
    name: str, num_infer_steps: int, computed_steps: int, device: torch.device, dtype: torch.dtype
) -> Bench:
    """A bench on random weights, with evenly spaced computed steps."""
    material = random_weights.random_material(name, device, dtype)
    steps = random_weights.spread(computed_steps, num_infer_steps)
    return Bench(material, num_infer_steps, steps, device, dtype)


def of_checkpoint(
    name: str, num_infer_steps: int, device: torch.device, dtype: torch.dtype
) -> Bench:
    """A bench on a local checkpoint, with the photograph of the astronaut."""
    folder = find_checkpoint(name)
    if folder is None:
        raise CheckpointError(f"--ckpts_path {name}: there is no such folder")
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as empty:
        cache = EmbeddingCache(Path(empty))
        conditioning = Conditioning(folder, device, dtype, "none", cache)
        with _timed(seconds, "identity", device):
            face = conditioning.find_faces(["astronaut"], PhotographStore())["astronaut"]
            identity = from_tensors(face, device)
        with _timed(seconds, "text", device):
            embedded = conditioning.embed_texts([DEFAULT_PROMPT, ""])
    with _timed(seconds, "loading", device):
        pipe = load_pipeline(folder, device, dtype, parts=("transformer", "vae"))
    text = Text(*(embedded[each].embeds.to(device) for each in (DEFAULT_PROMPT, "")))
    material = Material(pipe, identity, text, video_size(folder, None, None, None))
    bench = Bench(material, num_infer_steps, None, device, dtype)
    bench.before_the_loop = {name: f"{value:.1f} s" for name, value in seconds.items()}
    return bench


class Bench:
    """Samples videos in any variant. Each variant has its own models.

    Args:
        listed_steps: the steps to compute; None for the threshold rule.

    Attributes:
        before_the_loop: seconds of the stages that all variants share.
    """

    def __init__(
        self,
        material: Material,
        num_infer_steps: int,
        listed_steps: list[int] | None,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.material, self.num_infer_steps = material, num_infer_steps
        self.listed_steps = listed_steps
        self.device, self.dtype = device, dtype
        self.before_the_loop: dict[str, str] = {}
        self.ranks = ALONE
        self._models = {PLAIN: (material.pipe.transformer, material.pipe.vae)}

    def share(self, num_gpus: int) -> None:
        """Share each denoising step among ranks, all of which run this benchmark.

        Raises:
            ArgumentError: where a step cannot be divided by their number.
        """
        if num_gpus == 1:
            return
        config, size = self.material.pipe.transformer.config, self.material.size
        frames = (size.num_frames - 1) // config.temporal_compression_ratio + 1
        self.ranks = divide(
            num_gpus,
            guided=GUIDANCE_SCALE > 1,
            heads=config.num_attention_heads,
            text=config.max_text_seq_length,
            video=frames * (config.sample_height // 2) * (config.sample_width // 2),
        )
        group.connect(self.device)

    def warm_up(self, variant: Variant) -> float:
        """Sample three steps; where they are compiled, sample again.

        Returns:
            the seconds that the first time took longer, 0 where nothing is compiled.
        """
        first = self._sample(variant, 3, [0, 2])
        if not variant.compile:
            return 0.0
        second = self._sample(variant, 3, [0, 2])
        return max(0.0, sum(first.seconds.values()) - sum(second.seconds.values()))

    def sample(self, variant: Variant) -> Measured:
        """Sample a video and write its mp4."""
        return self._sample(variant, self.num_infer_steps, self.listed_steps)

    def _sample(
        self, variant: Variant, num_infer_steps: int, listed_steps: list[int] | None
    ) -> Measured:
        seconds: dict[str, float] = {}
        pipe = self.material.pipe
        with self._ready(variant) as handle, tempfile.TemporaryDirectory() as folder:
            on_gpu = self.device.type == "cuda"
            if on_gpu:
                torch.cuda.reset_peak_memory_stats(self.device)
            room: contextlib.AbstractContextManager = contextlib.nullcontext()
            if handle is None:  # the plain pipeline also keeps its transformer while it decodes
                latents, computed = self.plain_latents(num_infer_steps, seconds)
                reused = []
            else:
                handle.follow(listed_steps)
                latents, steps = self._latents(num_infer_steps, seconds)
                computed = [steps[n] for n in handle.video.plan.computed_steps]
                reused = [steps[n] for n in handle.video.plan.reused_steps]
                room = DecoderMemory(pipe, self.material.size, "none").to_decode(last=False)
            with room, _timed(seconds, "decoding", self.device):
                frames = sampler.decode(pipe, latents)
            with _timed(seconds, "writing", self.device):
                write_video(frames, Path(folder) / "video.mp4")
            peak = devices.peak_memory_bytes(self.device) if on_gpu else None
        return Measured(computed, reused, seconds, peak)

    def plain_latents(self, num_infer_steps: int, seconds: dict[str, float]) -> sampler.Denoised:
        """Latents by `ConsisIDPipeline.__call__`; the time before its first step is encoding."""
        material, marks = self.material, [devices.mark(self.device)]
        hook = material.pipe.transformer.register_forward_pre_hook(
            lambda module, args: marks.append(devices.mark(self.device))
        )
        try:
            latents = material.pipe(
                image=material.identity.face,
                **material.size._asdict(),
                num_inference_steps=num_infer_steps,
                guidance_scale=GUIDANCE_SCALE,
                prompt_embeds=material.text.prompt_embeds,
                negative_prompt_embeds=material.text.negative_prompt_embeds,
                id_cond=material.identity.id_cond,
                id_vit_hidden=material.identity.id_vit_hidden,
                kps_cond=material.identity.kps,
                generator=torch.Generator(self.device).manual_seed(SEED),
                output_type="latent",
            ).frames
        finally:
            hook.remove()
        encoding, *steps = devices.seconds_between([*marks, devices.mark(self.device)])
        seconds.update(encoding=encoding, denoising=sum(steps))
        return sampler.Denoised(latents, steps)

    def _latents(self, num_infer_steps: int, seconds: dict[str, float]) -> sampler.Denoised:
        material = self.material
        with _timed(seconds, "encoding", self.device):
            start = sampler.prepare(material.pipe, material.identity, material.size, SEED)
        with _timed(seconds, "denoising", self.device):
            return sampler.denoise(
                material.pipe,
                start,
                material.text,
                material.size,
                num_infer_steps=num_infer_steps,
                guidance_scale=GUIDANCE_SCALE,
            )

    @contextlib.contextmanager
    def _ready(self, variant: Variant) -> Iterator[TeaCacheHandle | None]:
        """Put the models of a variant on the device, all others in host memory."""
        # Variants that differ only in name or threshold share their models.
        kind = variant._replace(name="", threshold=None if variant.threshold is None else 0.0)
        pipe = self.material.pipe
        for model in (model for models in self._models.values() for model in models):
            model.to("cpu")
        devices.free_cached_memory(self.device)
        if kind not in self._models:
            self._models[kind] = self._make_models(kind)
        pipe.transformer, pipe.vae = (model.to(self.device) for model in self._models[kind])
        if variant.threshold is None:
            yield None
            return
        with apply_teacache(pipe, variant.threshold) as handle:
            if self.ranks != ALONE:
                handle.ranks = group.join(pipe.transformer, self.ranks, self.device)
            yield handle

    def _make_models(
        self, kind: Variant
    ) -> tuple[ConsisIDTransformer3DModel, AutoencoderKLCogVideoX]:
        """Copies of transformer and VAE, with the accelerations of a variant."""
        transformer, vae = copy.deepcopy(self._models[PLAIN])
        transformer.to(self.device)
        attention.use_attention(transformer, kind.attention)
        use_lean_blocks(transformer)
        use_lean_decoder(vae)
        if kind.quantize:
            acceleration.quantize_fp8(transformer)
        if kind.compile:
            acceleration.compile_transformer(transformer)
        return transformer, vae


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Store the seconds of the block, including the work that it queues on the device."""
    before = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] = time.perf_counter() - before
