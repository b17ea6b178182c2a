"""`python3 -m teacache.embedded.measure`: what the embedded checkpoint has learned.

On faces that it was not trained on: the PSNR of its autoencoder, and whether the videos that it
samples do what their prompts say, computed from their pixels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from teacache.base.environment import prepare_environment
from teacache.base.errors import TeaCacheError
from teacache.base.quiet import silence_libraries
from teacache.embedded import clips, portraits

if TYPE_CHECKING:
    from diffusers import AutoencoderKLCogVideoX

SEED = 4
SHEET_FRAMES = (0, 3, 6, 9, 12)
BORDER = 5  # pixels at the frame's edge that show the background, where no face is in the way


def main(argv: list[str] | None = None) -> int:
    """Measure, and print what came out."""
    parser = argparse.ArgumentParser(
        prog="python3 -m teacache.embedded.measure",
        description="Measure what the embedded checkpoint has learned, on faces held out.",
    )
    parser.add_argument("--videos", type=int, default=40, help="how many to sample (40)")
    parser.add_argument("--sheet", type=Path, help="also write a picture of 8 prompts' videos")
    args = parser.parse_args(argv)
    silence_libraries()
    try:
        prepare_environment()
        measure(args.videos, args.sheet)
    except TeaCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def measure(videos: int, sheet: Path | None) -> None:
    """Print the figures as they come; write the picture."""
    import torch

    from teacache.checkpoint.pipeline import load_pipeline
    from teacache.embedded.build import cached_tiny_checkpoint

    checkpoint = cached_tiny_checkpoint()
    pipe = load_pipeline(checkpoint, torch.device("cpu"), torch.float32)
    held_out = portraits.held_out_portraits()
    decibels = psnr(pipe.vae, [picture for _, picture in held_out])
    error = decibels.std(ddof=1) / len(decibels) ** 0.5
    print(
        f"VAE, {len(decibels)} held-out clips: PSNR {decibels.mean():.1f} +- {error:.1f} dB, "
        f"the worst {decibels.min():.1f}"
    )

    rng = np.random.default_rng(SEED)
    right = {"background colour": 0, "motion": 0, "face (the nearest of all held out)": 0}
    scenes = [clips.random_scene(rng) for _ in range(videos)]
    prompts = [clips.prompt_of(scene, rng) for scene in scenes]
    pictures = [picture for _, picture in held_out]
    numbers = [number % len(held_out) for number in range(videos)]
    sampled = sample(checkpoint, [pictures[number] for number in numbers], prompts)
    for number, scene, prompt, frames in zip(numbers, scenes, prompts, sampled, strict=True):
        seen = background_colour(frames), motion(frames), nearest_portrait(frames, pictures)
        print(f"{held_out[number][0]}: {prompt} {seen[0]}, {seen[1]}, {held_out[seen[2]][0]}")
        wanted = scene.colour, scene.motion, number
        for key, one, other in zip(right, seen, wanted, strict=True):
            right[key] += one == other
    for key, count in right.items():
        print(f"{key}: right in {count} of {videos}")
    if sheet:
        write_sheet(checkpoint, sheet)


def psnr(vae: AutoencoderKLCogVideoX, pictures: list[portraits.Picture]) -> np.ndarray:
    """[clips], dB: of what the autoencoder makes of a clip of each portrait."""
    import torch

    from teacache.embedded.train_vae import to_tensor

    rng = np.random.default_rng(SEED)
    decibels = []
    for picture in pictures:
        frames = clips.render(picture, clips.random_scene(rng), rng)
        with torch.no_grad():
            latents = vae.encode(to_tensor(frames[None])).latent_dist.mode()
            back = vae.decode(latents).sample.clamp(-1, 1)
        error = (back - to_tensor(frames[None])).square().mean().item()
        decibels.append(10 * np.log10(4 / error))
    return np.array(decibels)


def sample(
    checkpoint: Path, pictures: list[portraits.Picture], prompts: list[str], steps: int = 50
) -> Iterator[np.ndarray]:
    """A video for each aligned portrait and prompt: [frames, height, width, 3], uint8.

    By the sampler that the command uses, at threshold 0; the seed is the video's number.
    """
    import torch

    from teacache.checkpoint.pipeline import load_pipeline
    from teacache.checkpoint.size import VideoSize
    from teacache.core.forward import apply_teacache
    from teacache.embedded.material import identity_of
    from teacache.inputs.identity import load_face_models
    from teacache.inputs.text import Text, embed_text
    from teacache.sampling import sampler

    device, dtype = torch.device("cpu"), torch.float32
    pipe = load_pipeline(checkpoint, device, dtype)
    models = load_face_models(checkpoint, device, dtype)
    size = VideoSize(clips.WIDTH, clips.HEIGHT, clips.FRAMES)
    nothing = embed_text(pipe, "").embeds
    with apply_teacache(pipe, rel_l1_thresh=0.0):
        for seed, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
            start = sampler.prepare(pipe, identity_of(picture, models), size, seed)
            text = Text(embed_text(pipe, prompt).embeds, nothing)
            latents = sampler.denoise(pipe, start, text, size, num_infer_steps=steps).latents
            yield np.stack([np.array(frame) for frame in sampler.decode(pipe, latents)])


def write_sheet(checkpoint: Path, file: Path) -> None:
    """A picture of 8 videos, one a row: the photograph, then frames. One row for each motion."""
    from PIL import Image, ImageDraw

    held_out = dict(portraits.held_out_portraits())
    faces = [portraits.astronaut(), held_out["Grace Hopper"], held_out["drawing 3"]]
    colours, lights = list(clips.COLOURS), list(clips.LIGHTS)
    rng = np.random.default_rng(SEED)
    pictures, prompts = [], []
    for number, name in enumerate(clips.MOTIONS):
        light = lights[number % len(lights)] if number > 3 else ""
        scene = clips.Scene(name, colours[number % len(colours)], light)
        pictures.append(faces[number // 2 % len(faces)])
        prompts.append(clips.prompt_of(scene, rng))
    side, text = clips.HEIGHT, 14
    canvas = Image.new(
        "RGB",
        (side + clips.WIDTH * len(SHEET_FRAMES), (side + text) * len(prompts)),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    for row, frames in enumerate(sample(checkpoint, pictures, prompts)):
        top = row * (side + text)
        draw.text((2, top + 1), prompts[row], fill="black")
        canvas.paste(Image.fromarray(pictures[row]).resize((side, side)), (0, top + text))
        for column, number in enumerate(SHEET_FRAMES):
            place = (side + column * clips.WIDTH, top + text)
            canvas.paste(Image.fromarray(frames[number]), place)
    canvas.save(file, quality=90, optimize=True)


def background_colour(frames: np.ndarray) -> str:
    """The key of COLOURS that is nearest to the border's median, whatever its brightness.

    Args:
        frames: [frames, height, width, 3], uint8.
    """
    median = _border_colour(frames)

    def distance(name: str) -> float:
        colour = np.array(clips.COLOURS[name], float)
        return float(np.linalg.norm(median / np.linalg.norm(median) - colour / _norm(colour)))

    return min(clips.COLOURS, key=distance)


def motion(frames: np.ndarray) -> str:
    """The key of MOTIONS that the frames show.

    Each motion says where in each frame the face would be. Cut out there, frames show the same
    again and again only if it is the right one: it is the one with the least variance over time.
    """
    inside = clips.oval() > 0.9

    def variance(name: str) -> float:
        cut_out = [
            _normal(_portrait_in(frame, name, number / (len(frames) - 1))[inside])
            for number, frame in enumerate(frames)
        ]
        return float(np.var(cut_out, axis=0).mean())

    return min(clips.MOTIONS, key=variance)


def nearest_portrait(frames: np.ndarray, pictures: list[np.ndarray]) -> int:
    """Which portrait the face in the middle frame is: there it is in the middle, at scale 1.

    By the correlation of what is in the oval, whatever its light.
    """
    inside = clips.oval() > 0.9
    own = _normal(_portrait_in(frames[len(frames) // 2], "still", 0.5)[inside])
    return int(np.argmax([(own * _normal(p.astype(float)[inside])).sum() for p in pictures]))


def _border_colour(frames: np.ndarray) -> np.ndarray:
    edge = np.ones(frames.shape[1:3], bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    return np.median(frames[:, edge].reshape(-1, 3), axis=0)


def _portrait_in(frame: np.ndarray, name: str, time: float) -> np.ndarray:
    """[SIDE, SIDE, 3]: what the frame shows where the motion has the face at that time."""
    return cv2.warpAffine(
        frame.astype(np.float32),
        clips.placing(name, time),
        (portraits.SIDE, portraits.SIDE),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )


def _normal(pixels: np.ndarray) -> np.ndarray:
    centred = pixels - pixels.mean(0)
    return centred / _norm(centred)


def _norm(values: np.ndarray) -> float:
    return float(np.linalg.norm(values)) or 1.0


if __name__ == "__main__":
    sys.exit(main())
