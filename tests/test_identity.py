"""The face stack, through the real libraries, on the astronaut."""

from __future__ import annotations

import shutil

import consisid_eva_clip
import numpy as np
import pytest
import torch
from conftest import CPU
from PIL import Image

from teacache import identity as faces
from teacache.errors import ImageError
from teacache.tiny_faces import FACE_BOX, FACE_KPS


@pytest.fixture(scope="module")
def models(tiny):
    return faces.load_face_models(tiny, CPU, torch.float32)


def test_shapes(identity, tiny):
    assert identity.id_cond.shape == (1, 1280)
    assert [tuple(hidden.shape) for hidden in identity.id_vit_hidden] == [(1, 577, 128)] * 5
    assert identity.face.size == (512, 512)
    assert identity.face.mode == "RGB"
    assert np.shape(identity.kps) == (5, 2)
    assert all(torch.isfinite(t).all() for t in (identity.id_cond, *identity.id_vit_hidden))


def test_key_points_are_hers(identity):
    # The detector answers in cells of 8 pixels of a canvas that is 640/512 of the photograph.
    assert np.abs(identity.kps - np.array(FACE_KPS)).max() <= 8 * 512 / 640


def test_key_points_follow_the_face(models):
    """The detector finds the face where it is, not where it was when the checkpoint was built."""
    astronaut = np.array(faces.load_image("astronaut"))
    moved = np.roll(astronaut, (40, -30), axis=(0, 1))
    identity = faces.find_identity(Image.fromarray(moved), models, CPU, torch.float32)
    expected = np.array(FACE_KPS) + np.array([-30, 40])
    assert np.abs(identity.kps - expected).max() <= 8 * 512 / 640


def test_the_aligned_face_is_her_face(identity):
    """facexlib moves the eyes to (193, 240) and (319, 240) of 512, and leaves the face in colour.

    So the aligned picture is the photograph, enlarged and turned: sampled at the places that the
    five key points went to, it has the photograph's colours.
    """
    from skimage.transform import SimilarityTransform

    photograph = np.array(faces.load_image("astronaut")).astype(float)
    aligned = np.array(identity.face).astype(float)
    template = np.array(
        [[192.98, 239.95], [318.90, 240.19], [256.63, 314.02], [201.26, 371.41], [313.09, 371.15]]
    )
    to_photograph = SimilarityTransform.from_estimate(template, np.array(FACE_KPS, float))
    left, top, right, bottom = FACE_BOX
    spots = np.random.default_rng(0).uniform((160, 160), (350, 400), (200, 2))
    there = np.round(to_photograph(spots)).astype(int)
    assert ((there >= (left, top)) & (there <= (right, bottom))).all()
    a = aligned[spots[:, 1].astype(int), spots[:, 0].astype(int)]
    b = photograph[there[:, 1], there[:, 0]]
    # About 3 x 3 pixels of the one are one of the other: edges differ, faces correlate.
    assert np.corrcoef(a.flatten(), b.flatten())[0, 1] > 0.9


def test_arcface_and_eva_clip_make_the_identity(identity):
    clip = identity.id_cond[0, 512:]
    assert clip.norm().item() == pytest.approx(1.0, abs=1e-5), "upstream normalises EVA-CLIP's part"
    assert identity.id_cond[0, :512].std() > 0.01


def test_another_face_is_another_identity(models, identity):
    mirrored = Image.fromarray(np.array(faces.load_image("astronaut"))[:, ::-1])
    other = faces.find_identity(mirrored, models, CPU, torch.float32)
    assert not torch.allclose(other.id_cond, identity.id_cond, atol=1e-3)


def test_in_bfloat16(tiny):
    models = faces.load_face_models(tiny, CPU, torch.bfloat16)
    identity = faces.find_identity(faces.load_image("astronaut"), models, CPU, torch.bfloat16)
    assert {t.dtype for t in (identity.id_cond, *identity.id_vit_hidden)} == {torch.bfloat16}


def test_eva_clip_configuration_is_the_checkpoints_own(tiny, tmp_path):
    """One that describes a small EVA-CLIP, then one that describes none: the packaged one again."""
    faces.load_face_models(tiny, CPU, torch.float32)
    width = consisid_eva_clip.get_model_config(faces.EVA_CLIP)["vision_cfg"]["width"]
    assert width == 128
    shutil.copytree(tiny, tmp_path / "full", copy_function=shutil.copy)
    (tmp_path / "full" / "face_encoder" / f"{faces.EVA_CLIP}.json").unlink()
    # The small weights do not fit the full-size model that is now asked for.
    with pytest.raises(RuntimeError, match=r"size mismatch|shape"):
        faces.load_face_models(tmp_path / "full", CPU, torch.float32)
    width = consisid_eva_clip.get_model_config(faces.EVA_CLIP)["vision_cfg"]["width"]
    assert width == 1024


def test_images_come_upright_and_in_rgb(tmp_path):
    picture = Image.new("RGB", (40, 20), "red")
    picture.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter: the first row is the right edge
    picture.save(tmp_path / "turned.png", exif=exif)
    upright = faces.load_image(str(tmp_path / "turned.png"))
    assert upright.size == (20, 40)
    assert upright.getpixel((19, 0)) == (0, 0, 255)
    Image.new("LA", (8, 8)).save(tmp_path / "grey.png")
    assert faces.load_image(str(tmp_path / "grey.png")).mode == "RGB"


def test_no_face(models, monkeypatch):
    """Neither detector finds one: SCRFD knows her alone, and RetinaFace is told to see nothing."""
    face = models.aligner.face_det.ClassHead[2].conv1x1.bias
    before = face.detach().clone()
    with torch.no_grad():
        face.copy_(torch.tensor([5.0, -5.0, 5.0, -5.0]))
    try:
        with pytest.raises(ImageError, match="no face"):
            faces.find_identity(Image.new("RGB", (300, 300)), models, CPU, torch.float32)
        with pytest.raises(ImageError, match="no face"):  # SCRFD finds her, facexlib does not
            faces.find_identity(faces.load_image("astronaut"), models, CPU, torch.float32)
    finally:
        with torch.no_grad():
            face.copy_(before)
