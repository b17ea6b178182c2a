"""The embedded checkpoint: what it shows, and that its parts are what they should be."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from PIL import Image
from support import CPU, SIZE, grace_hopper

from teacache.checkpoint.pipeline import load_pipeline
from teacache.embedded import weights
from teacache.embedded.build import untrained_transformer
from teacache.embedded.configuration import VAE
from teacache.embedded.videos import SIDE, identity_of, videos
from teacache.embedded.weights import FROM_SEEDS
from teacache.inputs.identity import find_identity, load_face_models
from teacache.inputs.photograph import load_image
from teacache.inputs.text import Text, embed_text
from teacache.sampling import sampler

LEFT_ON_RED = "A woman moves to the left in front of a red background."
RIGHT_ON_GREEN = "A man goes right before a green wall."
# Of the backgrounds that it was trained on.
COLOURS = {
    "red": (196, 48, 44), "blue": (48, 88, 200), "green": (48, 148, 70),
    "golden": (222, 168, 50), "purple": (140, 60, 170), "grey": (122, 122, 122),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tiny):
    return load_face_models(tiny, CPU, torch.float32)


@pytest.fixture(scope="module")
def hopper(models):
    """The identity of a face that the checkpoint was not trained on."""
    return find_identity(load_image(str(grace_hopper())), models, CPU, torch.float32)


@pytest.fixture(scope="module")
def sampled(tiny, identity, hopper):
    """The astronaut and one prompt, the other face and another prompt: frames as RGB."""
    pipe = load_pipeline(tiny, CPU, torch.float32)
    nothing = embed_text(pipe, "").embeds
    each = ((identity, LEFT_ON_RED), (hopper, RIGHT_ON_GREEN))
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
    for frames, colour in zip(sampled, ("red", "green"), strict=True):
        distance = {
            name: np.linalg.norm(background(frames) - unit(rgb)) for name, rgb in COLOURS.items()
        }
        assert min(distance, key=distance.get) == colour
        assert distance[colour] < 0.2
    left, right = (way_to_the_right(frames) for frames in sampled)
    assert -60 < left < -30
    assert 30 < right < 60


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
    for frames, person in zip(sampled, (identity, hopper), strict=True):
        own = oval(np.array(person.face))
        shown = oval(frames[len(frames) // 2])
        assert shown @ own > max(shown @ other for other in others)


def test_a_held_out_portrait(models, hopper):
    """The one that was cut out of a photograph has its identity; no set has another's portrait."""
    sets = {name: videos(name) for name in ("held_out", "training", "fresh")}
    trained = {video.portrait.tobytes() for video in sets["training"]}
    assert [len(each) for each in (*sets.values(), trained)] == [16] * 4
    assert not trained & {v.portrait.tobytes() for v in (*sets["held_out"], *sets["fresh"])}
    likeness = [
        torch.cosine_similarity(identity_of(video.portrait, models).id_cond, hopper.id_cond).item()
        for video in sets["held_out"][:4]
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
