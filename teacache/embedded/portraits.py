"""The pictures that the embedded checkpoint is trained on and measured with: aligned faces.

All look as facexlib aligns a face: eyes, nose and mouth in the same places, `ALIGNED`. There are
four kinds, and of each some are held out of the training:

- drawn faces, as many as one likes: skin, hair, brows, eyes, nose, mouth, beard, glasses;
- the hundred small grey faces of scikit-image's subset of Labeled Faces in the Wild, tinted;
- photographs: scikit-image's astronaut (NASA) for training, since she is the default image, and
  matplotlib's Grace Hopper (US Navy) for measuring, both in the public domain;
- cuttings of scikit-image's other pictures, which are no faces, so that whatever is in the oval is
  kept and not only what a drawing has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np

SIDE = 128  # pixels of an aligned face
# Eyes, tip of the nose and corners of the mouth in an aligned face, in parts of its side: the
# template of facexlib 0.3.0, face_restoration_helper.py, which is that of FFHQ.
ALIGNED = np.array(
    [[0.3769, 0.4686], [0.6229, 0.4691], [0.5012, 0.6133], [0.3931, 0.7254], [0.6115, 0.7249]]
)
# The same points in the photographs, in pixels.
ASTRONAUT = ((204, 101), (246, 103), (225, 126), (204, 140), (243, 141))
GRACE_HOPPER = ((221, 207), (302, 204), (262, 247), (238, 277), (297, 276))

LFW_FACES = 100  # of the 200 pictures of the subset; the others are no faces
LFW_HELD_OUT = range(0, LFW_FACES, 12)
TEXTURES = ("chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg")
TEXTURES_HELD_OUT = ("hubble_deep_field.jpg",)

Picture = np.ndarray  # [SIDE, SIDE, 3], uint8 RGB


def training_portrait(rng: np.random.Generator) -> Picture:
    """A picture of any kind to train on, no two of them alike."""
    kind = rng.random()
    if kind < 0.5:
        portrait = drawn(rng)
    elif kind < 0.65:
        faces = [n for n in range(LFW_FACES) if n not in LFW_HELD_OUT]
        portrait = small_face(int(rng.choice(faces)), rng)
    elif kind < 0.85:
        portrait = astronaut()
    else:
        portrait = _cutting(texture(TEXTURES[rng.integers(len(TEXTURES))]), rng)
    return _varied(portrait, rng)


def held_out_portraits() -> list[tuple[str, Picture]]:
    """Pictures that nothing was trained on, with what each is called: 10 drawn faces, 9 small
    photographs and Grace Hopper."""
    # Seeds that no generator of the training has: those draw from one stream.
    drawings = [(f"drawing {n}", drawn(np.random.default_rng([n, 1]))) for n in range(10)]
    faces = [(f"face {n}", small_face(n, np.random.default_rng([n, 2]))) for n in LFW_HELD_OUT]
    return [*drawings, *faces, ("Grace Hopper", grace_hopper())]


@cache
def astronaut() -> Picture:
    """The default image of the embedded checkpoint, aligned."""
    return _aligned(_read(_skimage_folder() / "astronaut.png"), ASTRONAUT)


@cache
def grace_hopper() -> Picture:
    """A photograph of a face for measuring, aligned."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "sample_data"
    return _aligned(_read(folder / "grace_hopper.jpg"), GRACE_HOPPER)


def small_face(number: int, rng: np.random.Generator) -> Picture:
    """One of the hundred faces of 25x25 grey pixels, enlarged, moved into place and tinted."""
    face = (_lfw()[number] * 255).astype(np.uint8)
    # There the eyes are 0.34 of the side apart, 0.4 from the top; the mouth 0.35 below them.
    scale = 0.73 * SIDE / 25
    matrix = np.array([[scale, 0, 0.135 * SIDE], [0, scale, 0.177 * SIDE]])
    large = cv2.warpAffine(
        face, matrix, (SIDE, SIDE), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
    )
    tint = np.array([1.12, 0.92, 0.8]) * rng.uniform(0.9, 1.1, 3)
    return _to_bytes(large[..., None] * tint)


def drawn(rng: np.random.Generator) -> Picture:
    """A face that is drawn, from the back to the front: backdrop, hair, shoulders, head."""
    side = 2 * SIDE  # drawn at twice the size: edges come out smooth
    canvas = backdrop(rng, side)
    tone = rng.random()
    skin = np.array([255, 222, 194]) * (1 - tone) + np.array([92, 58, 40]) * tone
    skin = np.clip(skin + rng.normal(0, 8, 3), 0, 255)
    hairs = ((30, 22, 18), (72, 46, 26), (122, 76, 36), (205, 165, 90), (165, 165, 165))
    hair = np.clip(np.array(hairs[rng.integers(len(hairs))]) + rng.normal(0, 8, 3), 0, 255)
    width, height = rng.uniform(0.24, 0.29), rng.uniform(0.33, 0.38)

    def ellipse(x, y, across, down, colour, start=0, end=360, line=-1):  # type: ignore[no-untyped-def]
        """In parts of the head: (0, 0) is its middle, 1 its edge."""
        middle = (0.5 + x * width, 0.55 + y * height)
        cv2.ellipse(
            canvas,
            tuple(int(side * part) for part in middle),
            (max(1, int(side * across * width)), max(1, int(side * down * height))),
            0,
            start,
            end,
            tuple(int(part) for part in np.clip(colour, 0, 255)),
            line,
            cv2.LINE_AA,
        )

    cut = rng.integers(4)  # of the hair: short, long, full, none
    if cut == 1:
        ellipse(0, 0.35, 1.35, 1.3, hair)
    if cut == 2:
        ellipse(0, -0.1, 1.4, 1.15, hair)
    ellipse(0, 1.2, 0.5, 0.6, skin * 0.85)
    ellipse(0, 1.85, 2.0, 0.65, rng.uniform(20, 236, 3))
    if cut != 3:
        ellipse(0, -0.25, 1.12, 0.95, hair)
    ellipse(0, 0, 1, 1, skin)
    if cut != 3:
        ellipse(0, -0.74, rng.uniform(0.8, 0.95), rng.uniform(0.28, 0.42), hair, 180, 360)
    _features(ellipse, rng, skin, hair, width, height)
    left, right = rng.uniform(0.8, 1.15, 2)
    shade = np.linspace(float(left), float(right), side)[None, :, None]
    return cv2.resize(_to_bytes(canvas * shade), (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def _features(
    ellipse: Callable[..., None],
    rng: np.random.Generator,
    skin: np.ndarray,
    hair: np.ndarray,
    width: float,
    height: float,
) -> None:
    """Brows, eyes, glasses, nose, beard and mouth, at the places that alignment gives them."""
    places = (ALIGNED - (0.5, 0.55)) / (width, height)
    eye_x, eye_y = places[1]
    mouth_x, mouth_y = places[4]
    iris = ((66, 42, 22), (44, 92, 150), (54, 112, 62))[rng.integers(3)]
    glasses, beard = rng.random() < 0.2, rng.random() < 0.2
    brow, open_ = int(rng.integers(4, 9)), rng.uniform(0.08, 0.13)
    if beard:
        ellipse(0, mouth_y + 0.05, 0.62, 0.42, hair)
    for x in (-eye_x, eye_x):
        ellipse(x, eye_y, 0.22, open_, (248, 248, 248))
        ellipse(x, eye_y, 0.11, open_, iris)
        ellipse(x, eye_y, 0.05, open_ / 2, (8, 8, 8))
        ellipse(x, eye_y - 0.14, 0.27, 0.12, hair * 0.8, 200, 340, brow)
        if glasses:
            ellipse(x, eye_y, 0.36, 0.22, (25, 25, 25), 0, 360, 5)
    ellipse(0, places[2, 1] - 0.04, 0.13, 0.14, skin * 0.75, 10, 170, 5)
    lip = np.clip(skin * 0.5 + np.array([110, 20, 25]) * rng.uniform(0.4, 0.8), 0, 255)
    kind = rng.integers(3)  # smiling, laughing, closed
    if kind == 0:
        ellipse(0, mouth_y - 0.1, mouth_x, 0.17, lip, 10, 170, int(rng.integers(5, 9)))
    elif kind == 1:
        ellipse(0, mouth_y - 0.07, mouth_x, 0.2, (120, 25, 30), 0, 180)
        ellipse(0, mouth_y - 0.07, mouth_x * 0.85, 0.09, (250, 250, 250), 0, 180)
    else:
        ellipse(0, mouth_y, mouth_x * 0.8, 0.07, lip)


def backdrop(rng: np.random.Generator, side: int) -> np.ndarray:
    """[side, side, 3], uint8: a gradient between two colours."""
    first = rng.uniform(20, 236, 3)
    second = np.clip(first + rng.uniform(-80, 80, 3), 0, 255)
    along = np.linspace(0, 1, side)[:, None, None]
    return _to_bytes((first * (1 - along) + second * along) * np.ones((side, side, 1)))


def _varied(picture: Picture, rng: np.random.Generator) -> Picture:
    """The same, a little turned, moved, brighter or darker; every other one mirrored.

    An alignment by landmarks that were found is never exact.
    """
    matrix = cv2.getRotationMatrix2D(
        (SIDE / 2, SIDE / 2), rng.normal(0, 2), np.exp(rng.normal(0, 0.03))
    )
    matrix[:, 2] += rng.normal(0, 0.01 * SIDE, 2)
    moved = cv2.warpAffine(
        picture, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    if rng.random() < 0.5:
        moved = moved[:, ::-1]
    contrast, light = rng.uniform(0.85, 1.15), rng.uniform(-15, 15)
    return _to_bytes((moved.astype(np.float32) - 128) * contrast + 128 + light)


def _cutting(picture: np.ndarray, rng: np.random.Generator) -> Picture:
    side = int(rng.integers(min(picture.shape[:2]) // 3, min(picture.shape[:2])))
    top, left = (int(rng.integers(length - side + 1)) for length in picture.shape[:2])
    square = picture[top : top + side, left : left + side]
    return cv2.resize(square, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def _aligned(picture: np.ndarray, points: tuple[tuple[int, int], ...]) -> Picture:
    """The face at these five points, as facexlib cuts it out."""
    matrix, _ = cv2.estimateAffinePartial2D(
        np.array(points, np.float32), (ALIGNED * SIDE).astype(np.float32), method=cv2.LMEDS
    )
    grey = (135, 133, 132)  # facexlib's border
    return cv2.warpAffine(picture, matrix, (SIDE, SIDE), flags=cv2.INTER_AREA, borderValue=grey)


def _skimage_folder() -> Path:
    import skimage.data

    return Path(skimage.data.__file__).parent


@cache
def texture(name: str) -> np.ndarray:
    return _read(_skimage_folder() / name)


@cache
def _lfw() -> np.ndarray:
    return np.load(_skimage_folder() / "lfw_subset.npy")


def _read(path: Path) -> np.ndarray:
    return cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)


def _to_bytes(picture: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.clip(picture, 0, 255).astype(np.uint8))
