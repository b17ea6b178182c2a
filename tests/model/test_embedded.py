"""The embedded checkpoint: what it shows, and that its parts are what they should be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from PIL import Image
from safetensors.torch import load_file
from support import CPU, SIZE, grace_hopper

from teacache.checkpoint.pipeline import load_pipeline
from teacache.embedded import detector, faces, weights
from teacache.embedded.build import untrained_transformer
from teacache.embedded.configuration import TRANSFORMER, VAE
from teacache.embedded.text import write_text_encoder
from teacache.embedded.videos import SIDE, identity_of, videos
from teacache.embedded.weights import FROM_SEEDS
from teacache.inputs.identity import find_identity, load_face_models
from teacache.inputs.photograph import load_image
from teacache.inputs.text import Text, embed_text
from teacache.sampling import sampler

LEFT_ON_RED = "A woman moves to the left in front of a red background."
RIGHT_ON_GREEN = "A man goes right before a green wall."
COLOURS = {  # of the backgrounds that it was trained on
    "red": (196, 48, 44),
    "blue": (48, 88, 200),
    "green": (48, 148, 70),
    "golden": (222, 168, 50),
    "purple": (140, 60, 170),
    "grey": (122, 122, 122),
}


@pytest.fixture(scope="module")
def models(tiny):
    return load_face_models(tiny, CPU, torch.float32)


@pytest.fixture(scope="module")
def hopper(models):
    """The identity of a face that the checkpoint was not trained on."""
    return find_identity(load_image(str(grace_hopper())), models, CPU, torch.float32)


@pytest.fixture(scope="module")
def sampled(tiny, identity, hopper):
    """Two prompts with the astronaut, then the first one with the other face: frames as RGB."""
    pipe = load_pipeline(tiny, CPU, torch.float32)
    nothing = embed_text(pipe, "").embeds
    each = ((identity, LEFT_ON_RED), (identity, RIGHT_ON_GREEN), (hopper, LEFT_ON_RED))
    frames = []
    for seed, (person, prompt) in enumerate(each):
        start = sampler.prepare(pipe, person, SIZE, seed)
        text = Text(embed_text(pipe, prompt).embeds, nothing)
        latents = sampler.denoise(pipe, start, text, SIZE, num_infer_steps=20).latents
        frames.append(np.stack([np.array(frame) for frame in sampler.decode(pipe, latents)]))
    return frames


def background(frames):
    """The median colour of the frames' edges, where no face is in the way, at brightness 1."""
    edge = np.ones(frames.shape[1:3], bool)
    edge[5:-5, 5:-5] = False
    return unit(np.median(frames[:, edge].reshape(-1, 3), axis=0))


def way_to_the_right(frames):
    """How many pixels the face goes: the centroid of what has not the background's colour."""
    colour = frames / np.linalg.norm(frames.astype(float), axis=-1, keepdims=True).clip(1)
    other = np.linalg.norm(colour - background(frames), axis=-1)  # [frames, height, width]
    columns = (other * (other > 0.3)).sum(1)
    middle = (columns * np.arange(columns.shape[1])).sum(1) / columns.sum(1)
    return middle[-1] - middle[0]


def unit(values):
    return values / np.linalg.norm(values)


def test_videos_do_what_their_prompts_say(sampled):
    """In the clips of the training the face went 48 pixels."""
    for frames, colour in zip(sampled, ("red", "green", "red"), strict=True):
        distance = {
            name: np.linalg.norm(background(frames) - unit(rgb)) for name, rgb in COLOURS.items()
        }
        assert min(distance, key=distance.get) == colour
        assert distance[colour] < 0.2
    ways = [way_to_the_right(frames) for frames in sampled]
    assert -60 < ways[0] < -30
    assert 30 < ways[1] < 60
    assert -60 < ways[2] < -30


def oval(picture):
    """What a video shows of an aligned face, in the middle of its time: less mean, of length 1."""
    small = np.array(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) / SIDE
    pixels = small[np.hypot((x - 0.5) / 0.3, (y - 0.54) / 0.4) < 1].astype(float)
    return unit(pixels - pixels.mean(0)).flatten()


def test_the_face_is_the_photographs(sampled, identity, hopper):
    """Nearer to its own than to any other, whether trained on or not."""
    held_out = [oval(video.portrait) for video in videos("held_out")]
    others = held_out[1:]  # the first one is Grace Hopper
    for frames, person in zip(sampled, (identity, identity, hopper), strict=True):
        own = oval(np.array(person.face))
        shown = oval(frames[len(frames) // 2])
        assert shown @ own > max(shown @ other for other in others)
    inside = (slice(None), slice(30, 70), slice(40, 72))
    difference = np.abs(sampled[0][inside].astype(float) - sampled[2][inside]).mean()
    assert difference > 10  # of 255; the two faces in their clips differ by 40


def test_the_autoencoder_gives_faces_back(tiny):
    vae = load_pipeline(tiny, CPU, torch.float32, parts=("vae",)).vae
    for video in videos("held_out"):
        picture = Image.fromarray(video.portrait).resize((SIZE.width, SIZE.height))
        frame = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None, :, None] / 127.5 - 1
        with torch.no_grad():
            back = vae.decode(vae.encode(frame).latent_dist.mode()).sample.clamp(-1, 1)
        assert 10 * np.log10(4 / (back - frame).square().mean().item()) > 20, video.prompt


def test_the_sets_of_videos():
    sets = {name: videos(name) for name in ("held_out", "training", "fresh")}
    for own in sets.values():
        assert len(own) == 16
        assert {(v.portrait.shape, v.portrait.dtype.name) for v in own} == {
            ((SIDE, SIDE, 3), "uint8")
        }
    every = [video for own in sets.values() for video in own]
    assert len({video.seed for video in every}) == len(every)
    trained = {video.portrait.tobytes() for video in sets["training"]}
    assert len(trained) == 16
    assert not trained & {v.portrait.tobytes() for v in (*sets["held_out"], *sets["fresh"])}


def test_an_aligned_portrait_has_the_identity_of_its_photograph(models, hopper):
    """Of held-out portraits the one that was cut out of the photograph is the nearest."""
    likeness = [
        torch.cosine_similarity(identity_of(video.portrait, models).id_cond, hopper.id_cond).item()
        for video in videos("held_out")[:5]
    ]
    assert np.argmax(likeness) == 0


def test_every_stored_weight_gets_into_its_model():
    """And nothing else is changed but what comes from seeds, which is not stored."""
    assert weights.FILE.stat().st_size <= 8 * 10**6
    stored = weights.read()
    transformer, vae = untrained_transformer(), AutoencoderKLCogVideoX(**VAE)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    weights.unpack(stored, transformer, vae)
    assert vae.config.scaling_factor == stored.pop("scaling_factor").item()
    state = {f"detector.{name}": value for name, value in weights.detector_of(stored).items()}
    state |= {f"vae.{name}": value for name, value in vae.state_dict().items()}
    text = transformer.config.max_text_seq_length
    for name, value in transformer.state_dict().items():
        if name.startswith(FROM_SEEDS):
            assert torch.equal(value, before[name]), name
        elif name == weights.POSITIONS:
            assert torch.equal(value[:, :text], before[name][:, :text])
            state[f"transformer.{name}"] = value[:, text:]
        else:
            state[f"transformer.{name}"] = value
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], value.float()) for name, value in stored.items())


def test_what_is_not_stored_comes_from_seeds_alone(tmp_path):
    """So the trained weights see through it what they saw in the training, in another process."""
    found = weights.detector_of(weights.read())
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        transformer = untrained_transformer()
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


def test_a_token_is_embedded_by_itself(tiny):
    """Whatever stands beside it: what was trained depends on words, not on the tokenizer."""
    pipe = load_pipeline(tiny, CPU, torch.float32)
    tokens = pipe.tokenizer(LEFT_ON_RED, return_tensors="pt").input_ids
    with torch.no_grad():
        together = pipe.text_encoder(tokens)[0][0]
        alone = pipe.text_encoder(tokens.T)[0][:, 0]
    assert torch.allclose(together, alone, atol=1e-6)


def test_the_detector_is_one_network_in_two_forms(tmp_path):
    """Among RetinaFace's zeros, and as SCRFD's graph: the same boxes and points."""
    import onnxruntime
    from facexlib.detection.retinaface import RetinaFace
    from facexlib.detection.retinaface_utils import PriorBox, decode, decode_landm

    generator = torch.Generator().manual_seed(3)
    found = {
        name: torch.randn(value.shape, generator=generator)
        * ((2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1)
        for name, value in weights.detector_of(weights.read()).items()
    }
    for name in found:  # quiet as in training: heads, and ends of a block
        if name.endswith("weight") and ("Head" in name or "conv3" in name):
            found[name] /= 10
    full = RetinaFace(network_name="resnet50", device="cpu")
    full.load_state_dict(detector.retinaface_state(found, full.state_dict()))
    rgb = torch.randint(0, 256, (1, 3, 640, 640), generator=generator).float()
    bgr = rgb[:, [2, 1, 0]] - torch.tensor(detector.MEAN)[:, None, None]
    with torch.no_grad():
        box, sure, landmarks = full(bgr)
    assert min(part.std() for part in (box, sure, landmarks)) > 0.01

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
