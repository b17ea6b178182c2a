"""The clips that the embedded checkpoint is trained on, and the prompts that describe them.

A clip shows an aligned face in a soft oval that moves in front of a coloured gradient, in some
light. The prompt names motion, colour and light; everything else about a clip, where the gradient
is bright and where the two soft lights hang, is left to the noise.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import cv2
import numpy as np

from teacache.embedded.portraits import SIDE, Picture, training_portrait

FRAMES, HEIGHT, WIDTH = 13, 96, 112

COLOURS = {
    "red": (196, 48, 44),
    "blue": (48, 88, 200),
    "green": (48, 148, 70),
    "golden": (222, 168, 50),
    "purple": (140, 60, 170),
    "grey": (122, 122, 122),
}
MOTIONS = {
    "left": ("moves to the left", "drifts left", "goes left"),
    "right": ("moves to the right", "drifts right", "goes right"),
    "up": ("moves up", "rises up", "drifts up"),
    "down": ("moves down", "sinks down", "drifts down"),
    "closer": ("comes closer", "moves closer"),
    "away": ("moves away", "goes away"),
    "sways": ("sways", "sways from side to side"),
    "still": ("is still", "stays still"),
}
LIGHTS = {"": 1.0, "bright": 1.25, "dim": 0.6}
SUBJECTS = ("A face", "The face", "A person", "A man", "A woman", "An astronaut", "A portrait")
PLACES = ("in front of a {} background", "over a {} background", "before a {} wall")
# Words that say nothing of the clip: the model learns to pass over them.
FILLERS = ("", "", "", ", on film", ", softly blurred", ", cinematic", ", vintage film")

# How far a face goes in a clip, in pixels, and how far it grows. Sideways one latent (8 pixels) for
# each latent frame, up and down half of that.
ACROSS, UPWARDS, SWAY, GROWTH = 48, 24, 16, 1.4


class Scene(NamedTuple):
    """What a prompt says of a clip: keys of MOTIONS, COLOURS and LIGHTS."""

    motion: str
    colour: str
    light: str = ""


class Clip(NamedTuple):
    """A clip with what the model is conditioned on.

    frames: [FRAMES, HEIGHT, WIDTH, 3], uint8 RGB.
    """

    frames: np.ndarray
    portrait: Picture
    scene: Scene


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene for training; every other one in plain light."""
    lights = [*LIGHTS, ""]
    return Scene(
        motion=list(MOTIONS)[rng.integers(len(MOTIONS))],
        colour=list(COLOURS)[rng.integers(len(COLOURS))],
        light=lights[rng.integers(len(lights))],
    )


def prompt_of(scene: Scene, rng: np.random.Generator) -> str:
    """One of the ways to say it, such as "A woman drifts left before a red wall in dim light."."""
    verbs = MOTIONS[scene.motion]
    subject, verb = SUBJECTS[rng.integers(len(SUBJECTS))], verbs[rng.integers(len(verbs))]
    place = PLACES[rng.integers(len(PLACES))].format(scene.colour)
    light = f" in {scene.light} light" if scene.light else ""
    return f"{subject} {verb} {place}{light}{FILLERS[rng.integers(len(FILLERS))]}."


def random_clip(rng: np.random.Generator) -> Clip:
    """A clip to train on."""
    portrait, scene = training_portrait(rng), random_scene(rng)
    return Clip(render(portrait, scene, rng), portrait, scene)


def condition(portrait: Picture) -> np.ndarray:
    """[HEIGHT, WIDTH, 3]: the face as the pipeline stretches it to the frame."""
    return cv2.resize(portrait, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)


def render(portrait: Picture, scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The frames of a clip: [FRAMES, HEIGHT, WIDTH, 3], uint8 RGB.

    At scale 1 the face is as large as in the condition, stretched as there.
    """
    background = _background(scene.colour, rng)
    face = np.dstack([portrait.astype(np.float32), 255 * oval()])
    frames = np.empty((FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    for number in range(FRAMES):
        matrix = placing(scene.motion, number / (FRAMES - 1))
        moved = cv2.warpAffine(face, matrix, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)
        opacity = moved[..., 3:] / 255
        frame = background * (1 - opacity) + moved[..., :3] * opacity
        frames[number] = np.clip(frame * LIGHTS[scene.light], 0, 255).astype(np.uint8)
    return frames


def placing(motion: str, time: float) -> np.ndarray:
    """[2, 3]: the affine map from a portrait's pixels to a frame's; time is 0 to 1.

    At scale 1 it stretches the portrait to the frame, as the pipeline does.
    """
    x, y, scale = _place(motion, time)
    across, down = np.array([WIDTH, HEIGHT]) / SIDE * scale
    # Pixels are squares whose middles lie at halves.
    return np.array(
        [
            [across, 0, (WIDTH - 1) / 2 + x - across * (SIDE - 1) / 2],
            [0, down, (HEIGHT - 1) / 2 + y - down * (SIDE - 1) / 2],
        ]
    )


def _place(motion: str, time: float) -> tuple[float, float, float]:
    """Where the face is (pixels right of and below the middle) and how large; time is 0 to 1."""
    middle = time - 0.5
    shifts = {
        "left": (-ACROSS * middle, 0.0),
        "right": (ACROSS * middle, 0.0),
        "up": (0.0, -UPWARDS * middle),
        "down": (0.0, UPWARDS * middle),
        "sways": (SWAY * np.sin(2 * np.pi * time), 0.0),
    }
    growth = {"closer": GROWTH**middle, "away": GROWTH**-middle}
    return *shifts.get(motion, (0.0, 0.0)), growth.get(motion, 1.0)


def _background(colour: str, rng: np.random.Generator) -> np.ndarray:
    """[HEIGHT, WIDTH, 3], float: a gradient of the colour with two soft lights in it."""
    base = np.array(COLOURS[colour], np.float32) + rng.normal(0, 6, 3)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    along = np.cos(angle) * (x / WIDTH - 0.5) + np.sin(angle) * (y / HEIGHT - 0.5) + 0.5
    low, high = rng.uniform(0.55, 0.8), rng.uniform(1.0, 1.2)
    picture = base * (low + (high - low) * np.clip(along, 0, 1)[..., None])
    for _ in range(2):
        middle, radius = rng.uniform((0, 0), (WIDTH, HEIGHT)), rng.uniform(6, 12)
        away = np.hypot(x - middle[0], y - middle[1])[..., None]
        glow = rng.uniform(0.15, 0.4) * np.exp(-((away / radius) ** 2))
        picture = picture * (1 - glow) + np.clip(base * 0.4 + 160, 0, 255) * glow
    return np.clip(picture, 0, 255)


@cache
def oval() -> np.ndarray:
    """[SIDE, SIDE], 0 to 1: what of an aligned face goes into a clip, with a soft edge."""
    y, x = (np.mgrid[0:SIDE, 0:SIDE] + 0.5) / SIDE
    radius = np.hypot((x - 0.5) / 0.33, (y - 0.54) / 0.43)
    return np.clip((1 - radius) / 0.12 + 0.5, 0, 1).astype(np.float32)
