"""The embedded checkpoint: what it shows, and the recipe that it was trained by."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, ConsisIDPipeline
from safetensors.torch import load_file

from teacache.base.errors import CheckpointError
from teacache.checkpoint.pipeline import load_pipeline
from teacache.embedded import (
    clips,
    descent,
    detector,
    faces,
    material,
    measure,
    portraits,
    train,
    train_detector,
    train_transformer,
    train_vae,
    weights,
)
from teacache.embedded.build import TRANSFORMER, untrained_transformer, untrained_vae
from teacache.embedded.text import Reader, write_text_encoder
from teacache.embedded.weights import FROM_SEEDS

CPU = torch.device("cpu")
LEFT_ON_RED = "A woman moves to the left in front of a red background."
RIGHT_ON_GREEN = "A man goes right before a green wall."


@pytest.fixture(scope="module")
def videos(tiny):
    """Two prompts with the astronaut, then the first one with a face it was not trained on."""
    faces = [portraits.astronaut(), portraits.astronaut(), portraits.grace_hopper()]
    prompts = [LEFT_ON_RED, RIGHT_ON_GREEN, LEFT_ON_RED]
    return list(measure.sample(tiny, faces, prompts))


def test_videos_do_what_their_prompts_say(videos):
    seen = [(measure.background_colour(video), measure.motion(video)) for video in videos]
    assert seen == [("red", "left"), ("green", "right"), ("red", "left")]


def test_the_face_is_the_photographs(videos):
    """Nearer to its own than to any other, whether trained on or not."""
    held_out = dict(portraits.held_out_portraits())
    del held_out["Grace Hopper"]
    others = list(held_out.values())
    for video, own in zip(
        videos,
        (portraits.astronaut(), portraits.astronaut(), portraits.grace_hopper()),
        strict=True,
    ):
        assert measure.nearest_portrait(video, [*others, own]) == len(others)
    inside = (slice(None), slice(30, 70), slice(40, 72))
    difference = np.abs(videos[0][inside].astype(float) - videos[2][inside]).mean()
    assert difference > 10  # of 255; the two faces in their clips differ by 40


def test_the_measures_are_right_about_clips():
    """On what was rendered, where the answer is known; noise is no colour and no face."""
    rng = np.random.default_rng(0)
    pictures = [picture for _, picture in portraits.held_out_portraits()]
    for number, picture in enumerate(pictures):
        scene = clips.random_scene(rng)
        frames = clips.render(picture, scene, rng)
        seen = measure.background_colour(frames), measure.motion(frames)
        assert seen == (scene.colour, scene.motion), scene
        assert measure.nearest_portrait(frames, pictures) == number
    shape = (clips.FRAMES, clips.HEIGHT, clips.WIDTH, 3)
    noise = [rng.integers(0, 256, shape).astype(np.uint8) for _ in range(4)]
    assert {measure.background_colour(video) for video in noise} == {"grey"}
    assert len({measure.nearest_portrait(video, pictures) for video in noise}) > 1


def test_held_out_faces_are_none_of_the_trainings():
    assert len(portraits.held_out_portraits()) >= 12
    trained = {material.portrait_of(number).tobytes() for number in range(30)}
    assert len(trained) == 30
    assert not trained & {picture.tobytes() for _, picture in portraits.held_out_portraits()}


def test_the_weights_are_small_and_checked(tmp_path, monkeypatch):
    assert weights.FILE.stat().st_size <= 8 * 10**6
    damaged = tmp_path / "weights.safetensors"
    damaged.write_bytes(weights.FILE.read_bytes()[:-1] + b"\0")
    for file, complaint in ((damaged, "is damaged"), (tmp_path / "none", "No such file")):
        monkeypatch.setattr(weights, "FILE", file)
        with pytest.raises(CheckpointError, match=complaint):
            weights.read()


def test_packed_weights_come_out_again():
    transformer, vae = untrained()
    vae.register_to_config(scaling_factor=0.625)
    found = detector.untrained_weights(1)
    packed = weights.pack(transformer, vae, found)
    again = weights.detector_of(packed)
    assert again.keys() == found.keys()
    assert all(torch.allclose(again[name], found[name], rtol=2**-11, atol=2**-24) for name in found)
    assert not any(name.startswith("transformer.local_facial") for name in packed)
    other_transformer, other_vae = untrained()
    for parameter in [*other_transformer.patch_embed.parameters(), *other_vae.parameters()]:
        parameter.data.zero_()
    weights.unpack(packed, other_transformer, other_vae)
    assert other_vae.config.scaling_factor == 0.625
    for model, other in ((transformer, other_transformer), (vae, other_vae)):
        state = other.state_dict()
        for name, value in model.state_dict().items():
            # Half precision has 11 bits; below 2^-14 it has steps of 2^-24.
            assert torch.allclose(state[name], value, rtol=2**-11, atol=2**-24), name


def untrained():
    return untrained_transformer(), untrained_vae()


@pytest.fixture
def small_steps(monkeypatch):
    """The recipe on few and small pictures."""
    for module, name, value in (
        (train_detector, "SCENES", ((96, 3, 0.8), (128, 2, 0.2))),
        (train_detector, "PHOTOGRAPH", 1.0),
        (train_vae, "CUTTINGS", 2),
        (train_vae, "SIDE", 32),
        (train_vae, "POOL", 3),
        (material, "CLIPS", 2),
        (train_transformer, "BATCH", 2),
        (train_transformer, "UNGUIDED", 1),
        (descent, "KEEP_EVERY", 2),
        (descent, "WARM_UP", 3),
    ):
        monkeypatch.setattr(module, name, value)


def test_what_is_not_stored_comes_from_seeds_alone(tmp_path):
    """The training and the build, in other processes, see the same face through it."""
    found = detector.untrained_weights(1)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        transformer = untrained()[0]
        folder = tmp_path / str(seed)
        faces.write_face_encoder(folder / "face_encoder", TRANSFORMER["LFE_vit_dim"], found)
        write_text_encoder(folder)
        state = {n: t for n, t in transformer.state_dict().items() if n.startswith(FROM_SEEDS)}
        for path in sorted((folder / "face_encoder").glob("*.pt*")):
            read = torch.load(path, weights_only=True)
            state.update({f"{path.name}: {name}": tensor for name, tensor in read.items()})
        state.update(load_file(folder / "text_encoder" / "model.safetensors"))
        states.append(state)
    assert len(states[0]) > 500
    assert [n for n, tensor in states[0].items() if not torch.equal(tensor, states[1][n])] == []


def test_the_recipe_runs_and_its_losses_fall(tmp_path, small_steps, capsys):
    lengths = ("--vae_steps", "12", "--portraits", "2", "--transformer_steps", "16")
    lengths = ("--detector_steps", "60", *lengths)
    assert train.main([str(tmp_path / "t"), *lengths]) == 0
    assert "weights.safetensors sha256" in capsys.readouterr().out
    assert (tmp_path / "t" / "losses.png").stat().st_size > 5000
    for stage in ("detector", "vae", "transformer"):
        losses = [one["loss"] for one in stage_losses(tmp_path / "t", stage)]
        assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]), stage
    assert train.main([str(tmp_path / "t"), "--vae_steps", "5"]) == 2
    assert "a training of other lengths" in capsys.readouterr().err


def stage_losses(folder, stage):
    import json

    return json.loads((folder / f"{stage}.losses.json").read_text())


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    tmp_path, small_steps, monkeypatch
):
    def trained(folder, stop_at=None):
        folder.mkdir(exist_ok=True)
        loss = train_vae.loss

        def stopping(*arguments):
            if stop_at and len(list(folder.glob("vae.state.pt"))) and calls[0] >= stop_at:
                raise KeyboardInterrupt
            calls[0] += 1
            return loss(*arguments)

        calls = [0]
        monkeypatch.setattr(train_vae, "loss", stopping)
        try:
            with descent.cores() as pool:
                return train_vae.train(folder, 6, pool).state_dict()
        finally:
            monkeypatch.setattr(train_vae, "loss", loss)

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", stop_at=3 * train_vae.PARTS)
    assert len(stage_losses(tmp_path / "stopped", "vae")) == 2
    resumed = trained(tmp_path / "stopped")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_quick_convolutions_compute_the_same(tiny):
    """In double precision, value and gradient: the sums are the same in another order."""
    vae = load_pipeline(tiny, CPU, torch.float32, parts=("vae",)).vae.double().requires_grad_(True)
    frames = torch.randn(1, 3, 5, 32, 48, dtype=torch.float64)

    def value_and_gradient():
        back = vae.decode(vae.encode(frames).latent_dist.mode()).sample
        names = [name for name, _ in vae.named_parameters()]
        gradients = torch.autograd.grad(back.square().mean(), list(vae.parameters()))
        return back, dict(zip(names, gradients, strict=True))

    slow, slow_gradients = value_and_gradient()
    with train_vae.quick_convolutions():
        quick, quick_gradients = value_and_gradient()
    assert torch.allclose(quick, slow, rtol=1e-9, atol=1e-9)
    for name, gradient in slow_gradients.items():
        assert torch.allclose(quick_gradients[name], gradient, rtol=1e-7, atol=1e-9), name


def test_the_training_predicts_what_the_transformer_does(tiny):
    """With one padding token for all of them, in double precision."""
    pipe: ConsisIDPipeline = load_pipeline(tiny, CPU, torch.float32)
    trained = train_transformer.trainable()
    positions = pipe.transformer.patch_embed.pos_embedding
    trained.load_state_dict({**pipe.transformer.state_dict()})
    assert torch.equal(trained.patch_embed.pos_embedding, positions)
    trained.double()
    pipe.transformer.double()
    faces = torch.randn(2, 32, pipe.transformer.config.LFE_output_dim, dtype=torch.float64)
    pipe.transformer.local_facial_extractor.forward = lambda id_cond, hidden: faces
    inputs = torch.randn(2, 7, 32, 12, 14, dtype=torch.float64)
    prompts, timesteps = [LEFT_ON_RED, ""], torch.tensor([500, 20])
    text = torch.cat([pipe.encode_prompt(prompt, None, False)[0] for prompt in prompts])
    with torch.no_grad():
        expected = pipe.transformer(
            inputs,
            text.double(),
            timesteps,
            image_rotary_emb=pipe._prepare_rotary_positional_embeddings(96, 112, 7, CPU),
            id_cond=faces,
            id_vit_hidden=[],
            return_dict=False,
        )[0]
        short = Reader(tiny).short(prompts).double()
        predicted = train_transformer.predict(trained, inputs, short, timesteps, faces)
    # The rotary embedding and T5 are in single precision on both sides.
    assert (predicted - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_detector_is_one_network_in_three_forms(tmp_path):
    """In torch, among RetinaFace's zeros, and as SCRFD's graph: the same boxes and points."""
    import onnxruntime
    from facexlib.detection.retinaface import RetinaFace
    from facexlib.detection.retinaface_utils import PriorBox, decode, decode_landm

    torch.manual_seed(0)
    found = detector.untrained_weights(3)
    found = {
        name: value + 0.1 * torch.randn_like(value)
        if "Head" in name or name.endswith("bias")
        else value
        for name, value in found.items()
    }
    full = RetinaFace(network_name="resnet50", device="cpu")
    full.load_state_dict(detector.retinaface_state(found, full.state_dict()))
    rgb = torch.randint(0, 256, (1, 3, 640, 640)).float()
    bgr = rgb[:, [2, 1, 0]] - torch.tensor(detector.MEAN)[:, None, None]
    with torch.no_grad():
        levels = detector.network(detector.TorchOperations(found), bgr / detector.SCALE)
        box, sure, landmarks = full(bgr)
    small = {
        head: torch.cat([level[head].permute(0, 2, 3, 1).reshape(1, -1, n) for level in levels], 1)
        for head, n in detector.HEADS.items()
    }
    # In single precision, of numbers up to 10 and some dozens of products one after the other.
    assert torch.allclose(small["BboxHead"], box, atol=1e-4)
    assert torch.allclose(small["LandmarkHead"], landmarks, atol=1e-4)
    assert torch.allclose(small["ClassHead"].softmax(-1), sure, atol=1e-5)

    faces._write_scrfd(tmp_path / "scrfd.onnx", found)
    session = onnxruntime.InferenceSession(tmp_path / "scrfd.onnx")
    outputs = session.run(None, {"input": ((rgb - 127.5) / 128).numpy()})
    priors = PriorBox(full.cfg, image_size=(640, 640)).forward()
    boxes = decode(box[0], priors, list(detector.VARIANCES)).numpy() * 640
    points = decode_landm(landmarks[0], priors, list(detector.VARIANCES)).numpy() * 640
    scores = np.concatenate(outputs[:3])[:, 0]
    odds = (1 - detector.FACEXLIB_SURE) / detector.FACEXLIB_SURE * sure[0, :, 1] / sure[0, :, 0]
    assert np.allclose(scores, odds / (1 + odds), atol=1e-5)
    own_boxes, own_points = [], []
    for level, stride in enumerate(detector.STRIDES):
        # insightface's anchors: the corners of the cells, each twice.
        cells = np.stack(np.mgrid[: 640 // stride, : 640 // stride][::-1], -1).reshape(-1, 2)
        corners = np.repeat(cells, 2, 0) * stride
        edges = outputs[3 + level] * stride
        own_boxes.append(np.hstack([corners - edges[:, :2], corners + edges[:, 2:]]))
        own_points.append(outputs[6 + level].reshape(-1, 5, 2) * stride + corners[:, None])
    assert np.allclose(np.concatenate(own_boxes), boxes, atol=1e-2)
    assert np.allclose(np.concatenate(own_points).reshape(-1, 10), points, atol=1e-2)


def test_scenes_show_what_they_say():
    rng = np.random.default_rng(0)
    scenes = [train_detector.random_scene(rng, 320) for _ in range(40)]
    assert {len(scene.points) for scene in scenes} >= {0, 1, 2}
    for scene in scenes:
        assert scene.picture.shape == (320, 320, 3)
        assert scene.points.shape[1:] == (5, 2)
        assert not scene.points.size or (scene.points.min() >= 0 and scene.points.max() < 320)


def test_a_prompt_too_long_for_the_training_is_noticed(tiny):
    with pytest.raises(ValueError, match="tokens or more"):
        Reader(tiny).short(["red " * 40])


def test_the_decoder_is_near_the_clips(tiny):
    vae: AutoencoderKLCogVideoX = load_pipeline(tiny, CPU, torch.float32, parts=("vae",)).vae
    pictures = [portraits.astronaut(), portraits.grace_hopper()]
    assert measure.psnr(vae, pictures).min() > 20
