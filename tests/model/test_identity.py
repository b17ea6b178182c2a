"""The face stack, through the real libraries, on the astronaut."""

import re
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from support import ASTRONAUT, CPU, GRACE_HOPPER, grace_hopper, main

from teacache.base.errors import ImageError
from teacache.comparison import quality
from teacache.inputs import identity as faces
from teacache.inputs import photograph as pictures

# How far a detector's key points are from those that were marked by hand, in pixels of her
# photograph: eyes 42 pixels apart, and this is a fifth of it.
NEAR = 8


@pytest.fixture(scope="module")
def models(tiny):
    return faces.load_face_models(tiny, CPU, torch.float32)


def say(weights, head, numbers, levels=(0, 1, 2)):
    """Have a head of RetinaFace say the same everywhere, whatever the picture shows."""
    for level in levels:
        weights[f"{head}.{level}.conv1x1.weight"].zero_()
        weights[f"{head}.{level}.conv1x1.bias"].copy_(torch.tensor(numbers))


def see_others(weights):
    """Have it see a face of 70 pixels right and down of the middle of each cell of 32."""
    shift = 200 / 256  # in parts of the anchor's 256 pixels
    say(weights, "ClassHead", [5.0, -5.0] * 2)
    say(weights, "ClassHead", [-5.0, 5.0, 5.0, -5.0], levels=[2])
    box = [shift / 0.1, shift / 0.1, *[np.log(70 / 256) / 0.2] * 2]
    say(weights, "BboxHead", box * 2, levels=[2])
    marks = (np.array(ASTRONAUT) - ASTRONAUT[2]) / 256 + shift
    say(weights, "LandmarkHead", (marks.flatten() / 0.1).tolist() * 2, levels=[2])


def change_retinaface(light, change):
    """Give the RetinaFace of a checkpoint other biases in its heads."""
    path = light / "face_encoder" / "detection_Resnet50_Final.pth"
    weights = torch.load(path, weights_only=True)
    path.unlink()
    change(weights)
    torch.save(weights, path)


def find(image, models, name="--image it"):
    return faces.find_identity(image, models, CPU, torch.float32, name)


def test_the_astronauts_identity(identity):
    assert identity.id_cond.shape == (1, 1280)
    assert [tuple(hidden.shape) for hidden in identity.id_vit_hidden] == [(1, 577, 64)] * 5
    assert (identity.face.size, identity.face.mode) == ((512, 512), "RGB")
    assert all(torch.isfinite(t).all() for t in (identity.id_cond, *identity.id_vit_hidden))
    assert np.abs(identity.kps - np.array(ASTRONAUT)).max() <= NEAR


def test_a_photograph_that_the_detector_was_not_trained_on(models, identity):
    """Both detectors find its face, at the marks."""
    hopper = find(pictures.load_image(str(grace_hopper())), models)
    eyes = GRACE_HOPPER[1][0] - GRACE_HOPPER[0][0]
    for points in (hopper.kps, models.aligner.all_landmarks_5[0]):
        assert np.abs(np.array(points) - GRACE_HOPPER).max() <= eyes / 4
    assert not torch.allclose(hopper.id_cond, identity.id_cond, atol=1e-3)


def test_a_photograph_without_a_face(models):
    """A cup of coffee and a cat."""
    for name in ("coffee.png", "chelsea.png"):
        picture = pictures.load_image(str(Path(skimage.data.__file__).parent / name))
        with pytest.raises(ImageError, match=r"^--image it: no face was found in it"):
            find(picture, models)


def test_no_face(capsys, tmp_path, light, no_embeddings):
    """SCRFD knows her, and there is no RetinaFace to align her: before the big weights."""
    change_retinaface(light, lambda weights: say(weights, "ClassHead", [5.0, -5.0] * 2))
    asked = ("--ckpts_path", light, "--image", "astronaut", "--output_path", tmp_path / "out")
    code, output, error = main(capsys, *asked)
    assert code == 2
    assert error.splitlines()[-1].startswith("error: --image astronaut: no face was found in it")
    assert "loading" not in output


def test_several_faces(models, caplog):
    """Her face twice: that is told, and both detectors go on with one and the same of them."""
    twice = pictures.load_image("astronaut")
    left, top, right, bottom = 140, 30, 312, 220  # around her face
    twice.paste(twice.crop((left, top, right, bottom)), (left, top + 256))
    identity = find(twice, models)
    assert "--image it: 2 faces were found in it, the largest is" in caplog.text
    assert_the_same_face(identity, models)


def assert_the_same_face(identity, models):
    """That the recogniser's key points are those that the face was aligned by."""
    aligned = models.aligner.all_landmarks_5[0]
    # The same network, but SCRFD looks at the picture in another size.
    assert np.abs(np.array(identity.kps) - aligned).max() <= NEAR


def test_where_upstream_chooses_the_same_face_it_is_upstreams_identity(models):
    """Hers, in the middle of the picture: bit for bit."""
    from diffusers.pipelines.consisid.consisid_utils import process_face_embeddings_infer

    moved = np.roll(np.array(pictures.load_image("astronaut")), (128, 32), axis=(0, 1))
    identity = find(Image.fromarray(moved), models)
    with torch.no_grad():
        id_cond, id_vit_hidden, face, kps = process_face_embeddings_infer(
            *(models.aligner, models.eva_clip, models.recogniser),
            *(models.clip_mean, models.clip_std, models.analyser),
            *("cpu", torch.float32, moved),
        )
    assert torch.equal(identity.id_cond, id_cond)
    assert all(map(torch.equal, identity.id_vit_hidden, id_vit_hidden))
    assert np.array_equal(identity.face, face)
    assert np.array_equal(identity.kps, kps)


def test_where_the_detectors_find_different_faces(light, caplog):
    """SCRFD hers, RetinaFace some others: recogniser and alignment go on with one of those."""
    change_retinaface(light, see_others)
    models = faces.load_face_models(light, CPU, torch.float32)
    identity = find(pictures.load_image("astronaut"), models)
    assert "--image it: the detectors find different faces, the aligned one is" in caplog.text
    assert np.array_equal(identity.kps, models.aligner.all_landmarks_5[0])
    recognised = models.recogniser.get_feat(models.aligner.cropped_faces[0])
    assert np.array_equal(identity.id_cond[:, :512].numpy(), recognised)
    assert np.array_equal(identity.embedding, recognised[0])


def test_a_small_face(models, caplog):
    astronaut = pictures.load_image("astronaut")
    find(astronaut, models)
    assert not caplog.text
    find(astronaut.resize((160, 160), Image.Resampling.LANCZOS), models)
    assert "pixels wide or high, in a picture of 160x160. Below 64 pixels a face is" in caplog.text
    caplog.clear()
    # A face of 80 pixels, reduced to a third before the detectors see it.
    large = Image.new("RGB", (2000, 3072), "grey")
    large.paste(astronaut, (700, 1000))
    find(large, models)
    told = re.search(r"the face is (\d+) pixels .* of 2000x3072\. Below 192 ", caplog.text)
    assert abs(int(told[1]) - 80) <= NEAR


def test_identity_by_the_real_recogniser(models, identity):
    astronaut = np.array(pictures.load_image("astronaut"))
    frames = np.stack([astronaut, np.roll(astronaut, (0, 50), (0, 1)), np.zeros_like(astronaut)])
    found = quality.identity_similarity(frames, identity.embedding, models.analyser)
    same, moved, nobody = found["per_frame"]
    assert same == pytest.approx(1.0, abs=1e-5)  # float32, of 512 products
    assert 0.5 < moved <= 1.0
    assert nobody is None
    assert (found["frames_without_face"], found["face_share"]) == (1, pytest.approx(2 / 3))
    assert (found["worst"], found["worst_frame"]) == (min(same, moved), int(moved < same))
    found = quality.identity_similarity(frames[2:], identity.embedding, models.analyser)
    assert (found["mean"], found["worst_frame"], found["face_share"]) == (None, None, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_the_reference_is_not_rounded_with_the_models(tiny, identity, dtype):
    """It is the photograph's in float32, whatever the video is conditioned on."""
    rounded = faces.find_identity(
        pictures.load_image("astronaut"), faces.load_face_models(tiny, CPU, dtype), CPU, dtype
    )
    assert rounded.id_cond.dtype == dtype
    assert np.array_equal(rounded.embedding, identity.embedding)
    assert rounded.embedding.dtype == np.float32
    assert np.array_equal(identity.embedding, identity.id_cond[0, :512].numpy())
