"""From an identity and a prompt to latents, and from latents to frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers import CogVideoXDPMScheduler
from diffusers.pipelines.consisid.pipeline_consisid import draw_kps

from teacache.base import device as devices
from teacache.base.errors import SamplingError

if TYPE_CHECKING:
    from diffusers import ConsisIDPipeline
    from PIL import Image

    from teacache.checkpoint.size import VideoSize
    from teacache.inputs.identity import Identity
    from teacache.inputs.text import Text


class Denoised(NamedTuple):
    """latents: [1, latent frames, 16, height / 8, width / 8]; seconds of each denoising step."""

    latents: torch.Tensor
    step_seconds: list[float]


class Start(NamedTuple):
    """Where a video starts from. Nothing of it depends on the threshold.

    noise, image_latents: [1, latent frames, 16, height / 8, width / 8].
    generator_state: of the generator that drew them.
    """

    identity: Identity
    noise: torch.Tensor
    image_latents: torch.Tensor
    generator_state: torch.Tensor


@torch.no_grad()
def prepare(pipe: ConsisIDPipeline, identity: Identity, size: VideoSize, seed: int) -> Start:
    """Encode the face and draw the initial noise.

    Everything random comes from one generator on the sampling device, as the published sampler
    has it: the face's latents first, then the initial noise, then what the scheduler draws at each
    step, for which the generator's state is kept.
    """
    device, dtype = pipe._execution_device, pipe.transformer.dtype
    generator = torch.Generator(device).manual_seed(seed)

    def pixels(picture: Image.Image) -> torch.Tensor:  # [1, 3, height, width], from -1 to 1
        processed = pipe.video_processor.preprocess(picture, height=size.height, width=size.width)
        return processed.to(device, dtype=dtype)

    kps = pixels(draw_kps(identity.face, identity.kps)) if pipe.transformer.config.is_kps else None
    noise, image_latents = pipe.prepare_latents(
        pixels(identity.face),
        batch_size=1,
        num_channels_latents=pipe.transformer.config.in_channels // 2,
        num_frames=size.num_frames,
        height=size.height,
        width=size.width,
        dtype=dtype,
        device=device,
        generator=generator,
        kps_cond=kps,
    )
    return Start(identity, noise, image_latents, generator.get_state())


@torch.no_grad()
def denoise(
    pipe: ConsisIDPipeline,
    start: Start,
    text: Text,
    size: VideoSize,
    *,
    num_infer_steps: int = 50,
    guidance_scale: float = 6.0,
    on_step: Callable[[], None] = lambda: None,
) -> Denoised:
    """Sample one video's latents.

    `ConsisIDPipeline.__call__` step by step, from a start that several videos may share.

    Args:
        on_step: called after each denoising step.

    Raises:
        SamplingError: naming the step after which the latents are not finite.
    """
    loop = Loop(pipe, start, text, size, num_infer_steps, guidance_scale)
    device, finite = start.noise.device, []
    marks = [devices.mark(device)]
    for _ in range(num_infer_steps):
        loop.advance(loop.predict())
        finite.append(torch.isfinite(loop.latents).all())
        marks.append(devices.mark(device))
        on_step()
    _check_finite(finite, start.noise.dtype)
    return Denoised(loop.latents, devices.seconds_between(marks))


class Loop:
    """One video's denoising, step by step: `ConsisIDPipeline.__call__` taken apart.

    One loop at a time: the scheduler is the pipeline's.
    """

    def __init__(
        self,
        pipe: ConsisIDPipeline,
        start: Start,
        text: Text,
        size: VideoSize,
        num_infer_steps: int,
        guidance_scale: float,
    ) -> None:
        device = start.noise.device
        pipe.scheduler.set_timesteps(num_infer_steps, device=device)
        self._pipe, self._guidance_scale = pipe, guidance_scale
        self._image_latents = start.image_latents
        self._conditions = _conditions(pipe, start, text, size)
        generator = torch.Generator(device)
        generator.set_state(start.generator_state)
        self._extra = pipe.prepare_extra_step_kwargs(generator, eta=0.0)
        # The scheduler looks its coefficients up by the timestep. Given as a number of the host's
        # it need not be read from the device, for which all the work before it would have to be
        # done.
        self._values = pipe.scheduler.timesteps.tolist()
        self.step = 0
        self.latents = start.noise
        self._previous_sample: torch.Tensor | None = None

    @torch.no_grad()
    def predict(self) -> torch.Tensor:
        """What the scheduler steps with, guided, in float32, of the latents' shape."""
        t = self._pipe.scheduler.timesteps[self.step]
        return _predict(
            self._pipe,
            self.latents,
            self._image_latents,
            t,
            self._conditions,
            self._guidance_scale,
        )

    @torch.no_grad()
    def advance(self, predicted: torch.Tensor) -> None:
        """Step the latents with a prediction."""
        scheduler, value = self._pipe.scheduler, self._values[self.step]
        if isinstance(scheduler, CogVideoXDPMScheduler):
            latents, self._previous_sample = scheduler.step(
                predicted,
                self._previous_sample,
                value,
                self._values[self.step - 1] if self.step else None,
                self.latents,
                **self._extra,
                return_dict=False,
            )
        else:
            latents = scheduler.step(
                predicted, value, self.latents, **self._extra, return_dict=False
            )[0]
        self.latents = latents.to(self.latents.dtype)
        self.step += 1


def _check_finite(finite: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Raise SamplingError where a step's latents were not finite: NaN would become black frames.

    Read once, at the end: a look at each step would wait for the GPU.
    """
    answers = torch.stack(finite).tolist()
    if not all(answers):
        raise SamplingError(
            f"the latents hold NaN or infinite numbers after step {answers.index(False)}, counted "
            f"from 0, in {devices.dtype_name(dtype)}: try another --dtype, a lower "
            "--guidance_scale or no --quantize"
        )


def _conditions(
    pipe: ConsisIDPipeline, start: Start, text: Text, size: VideoSize
) -> dict[str, Any]:
    """What the transformer is given at every step alike."""
    rotary = None
    if pipe.transformer.config.use_rotary_positional_embeddings:
        rotary = pipe._prepare_rotary_positional_embeddings(
            size.height, size.width, start.noise.shape[1], start.noise.device
        )
    return {
        "encoder_hidden_states": text.prompt_embeds
        if text.negative_prompt_embeds is None
        else torch.cat([text.negative_prompt_embeds, text.prompt_embeds]),
        "image_rotary_emb": rotary,
        "id_cond": start.identity.id_cond,
        "id_vit_hidden": start.identity.id_vit_hidden,
    }


def _predict(
    pipe: ConsisIDPipeline,
    latents: torch.Tensor,
    image_latents: torch.Tensor,
    t: torch.Tensor,
    conditions: dict[str, Any],
    guidance_scale: float,
) -> torch.Tensor:
    """What the scheduler steps with, in float32: one forward, both halves of guidance in a batch.

    Args:
        conditions: of a batch of two where there is guidance, without the prompt and with it.
    """
    batch = len(conditions["encoder_hidden_states"])
    noisy = pipe.scheduler.scale_model_input(torch.cat([latents] * batch), t)
    predicted = pipe.transformer(
        # [batch, latent frames, 32, h, w]: what is denoised, and the face beside it
        hidden_states=torch.cat([noisy, torch.cat([image_latents] * batch)], dim=2),
        timestep=t.expand(batch),
        return_dict=False,
        **conditions,
    )[0].float()
    if batch == 1:
        return predicted
    without, with_prompt = predicted.chunk(2)
    return without + guidance_scale * (with_prompt - without)


@torch.no_grad()
def decode(pipe: ConsisIDPipeline, latents: torch.Tensor) -> list[Image.Image]:
    """Decode one video's latents to its frames."""
    video = pipe.decode_latents(latents)
    frames = pipe.video_processor.postprocess_video(video=video, output_type="pil")
    pipe.maybe_free_model_hooks()
    return frames[0]
