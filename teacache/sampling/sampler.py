"""Denoising, from an identity and a prompt to latents; and decoding, from latents to frames."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers import CogVideoXDPMScheduler, ConsisIDPipeline
from diffusers.pipelines.consisid.pipeline_consisid import draw_kps
from PIL import Image

from teacache.base import device as devices
from teacache.base.errors import SamplingError
from teacache.checkpoint.size import VideoSize
from teacache.inputs.identity import Identity
from teacache.inputs.text import Text


class Denoised(NamedTuple):
    """Latents, [1, latent frames, 16, height / 8, width / 8], and the seconds of each step."""

    latents: torch.Tensor
    step_seconds: list[float]


class Start(NamedTuple):
    """The inputs of denoising that do not depend on the threshold.

    Attributes:
        noise, image_latents: [1, latent frames, 16, height / 8, width / 8].
        generator_state: of the generator after it drew them.
    """

    identity: Identity
    noise: torch.Tensor
    image_latents: torch.Tensor
    generator_state: torch.Tensor


@torch.no_grad()
def prepare(pipe: ConsisIDPipeline, identity: Identity, size: VideoSize, seed: int) -> Start:
    """Encode the face and draw the initial noise.

    As in the published sampler, one generator on the sampling device draws all random numbers:
    first for the face's latents, then the initial noise, then the scheduler's noise of each step.
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
    """Sample one video's latents, like `ConsisIDPipeline.__call__`.

    Args:
        on_step: called after each denoising step.

    Raises:
        SamplingError: if the latents are not finite; the message names the step.
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
    """The denoising loop of one video, one step at a time.

    It uses the pipeline's scheduler, so only one loop can run at a time.
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
        rotary = None
        if pipe.transformer.config.use_rotary_positional_embeddings:
            rotary = pipe._prepare_rotary_positional_embeddings(
                size.height, size.width, start.noise.shape[1], device
            )
        self._embeds = text.prompt_embeds
        if text.negative_prompt_embeds is not None:
            self._embeds = torch.cat([text.negative_prompt_embeds, text.prompt_embeds])
        self._conditions = {
            "encoder_hidden_states": self._embeds,
            "image_rotary_emb": rotary,
            "id_cond": start.identity.id_cond,
            "id_vit_hidden": start.identity.id_vit_hidden,
        }
        generator = torch.Generator(device)
        generator.set_state(start.generator_state)
        self._extra = pipe.prepare_extra_step_kwargs(generator, eta=0.0)
        # The scheduler looks up coefficients by the timestep. With a Python number it need not read
        # from the device, which would synchronise.
        self._values = pipe.scheduler.timesteps.tolist()
        self.step = 0
        self.latents = start.noise
        self._previous_sample: torch.Tensor | None = None

    @torch.no_grad()
    def predict(self) -> torch.Tensor:
        """The guided prediction for the current step, in float32 and the shape of the latents.

        One forward, with both halves of guidance as a batch of two.
        """
        t = self._pipe.scheduler.timesteps[self.step]
        batch = len(self._embeds)
        noisy = self._pipe.scheduler.scale_model_input(torch.cat([self.latents] * batch), t)
        predicted = self._pipe.transformer(
            # [batch, latent frames, 32, h, w]: the noisy latents, then the face's latents
            hidden_states=torch.cat([noisy, torch.cat([self._image_latents] * batch)], dim=2),
            timestep=t.expand(batch),
            return_dict=False,
            **self._conditions,
        )[0].float()
        if batch == 1:
            return predicted
        without, with_prompt = predicted.chunk(2)
        return without + self._guidance_scale * (with_prompt - without)

    @torch.no_grad()
    def advance(self, predicted: torch.Tensor) -> None:
        """Take one scheduler step with a prediction."""
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
    """Raise SamplingError if the latents of a step were not finite: NaN gives black frames.

    All steps are read at the end, because a read at each step would synchronise.
    """
    values = torch.stack(finite).tolist()
    if not all(values):
        raise SamplingError(
            f"the latents hold NaN or infinite numbers after step {values.index(False)}, counted "
            f"from 0, in {devices.dtype_name(dtype)}: try another --dtype, a lower "
            "--guidance_scale or no --quantize"
        )


@torch.no_grad()
def decode(pipe: ConsisIDPipeline, latents: torch.Tensor) -> list[Image.Image]:
    """Decode one video's latents to its frames."""
    video = pipe.decode_latents(latents)
    frames = pipe.video_processor.postprocess_video(video=video, output_type="pil")
    pipe.maybe_free_model_hooks()
    return frames[0]
