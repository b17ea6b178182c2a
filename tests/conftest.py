"""What the tests share: the synthetic checkpoint, a pipeline on it, a real face."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from teacache import identity as faces
from teacache.checkpoint import VideoSize, local_checkpoint
from teacache.quiet import silence_libraries
from teacache.sampler import load_pipeline

CPU = torch.device("cpu")
SIZE = VideoSize(width=144, height=96, num_frames=13)
PROMPT = "a smiling astronaut stands by the sea"


@pytest.fixture(scope="session", autouse=True)
def cache_of_this_session(tmp_path_factory):
    """Every test, and every command that a test starts, builds and finds its checkpoint here."""
    silence_libraries()
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="session")
def tiny(cache_of_this_session) -> Path:
    """The folder of the synthetic checkpoint."""
    return local_checkpoint("tiny")


@pytest.fixture(scope="session")
def identity(tiny) -> faces.Identity:
    """The astronaut's identity, by the real face stack."""
    models = faces.load_face_models(tiny, CPU, torch.float32)
    return faces.find_identity(faces.load_image("astronaut"), models, CPU, torch.float32)


@pytest.fixture
def make_pipe(tiny):
    """Loads a pipeline of one's own, in one third of a second; `dtype` is float32."""

    def make(dtype: torch.dtype = torch.float32):
        return load_pipeline(tiny, CPU, dtype)

    return make


@pytest.fixture
def pipe(make_pipe):
    """A plain pipeline of this test's own."""
    return make_pipe()


@pytest.fixture
def sample(identity):
    """Calls the pipeline as its documentation does, and returns latents (or frames).

    Nothing of `teacache.sampler` is in it: what it returns from a plain pipeline is what users
    have today.
    """

    def call(pipe, steps: int = 12, seed: int = 42, **changed):
        dtype = pipe.transformer.dtype
        arguments = {
            "image": identity.face,
            "prompt": PROMPT,
            "width": SIZE.width,
            "height": SIZE.height,
            "num_frames": SIZE.num_frames,
            "num_inference_steps": steps,
            "guidance_scale": 6.0,
            "id_cond": identity.id_cond.to(dtype),
            "id_vit_hidden": [hidden.to(dtype) for hidden in identity.id_vit_hidden],
            "kps_cond": identity.kps,
            "generator": torch.Generator("cpu").manual_seed(seed),
            "output_type": "latent",
        }
        return pipe(**{**arguments, **changed}).frames

    return call
