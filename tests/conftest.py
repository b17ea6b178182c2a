"""What the tests share: the embedded checkpoint, a pipeline on it, a real face."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Before torch comes in, here and in every command that a test starts: the tests speak of a CPU,
# also where there is a GPU, and two of them run side by side on two cores.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
# With AMX a bfloat16 product of few rows is summed up in another order than one of many: then ranks
# that share tokens differ from one process in the last bit.
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from support import CPU, PROMPT, SIZE

from teacache.base.files import cache_folder
from teacache.base.quiet import silence_libraries
from teacache.embedded.cached import cached_tiny_checkpoint

for name, examples in (("push", 50), ("thorough", 300)):
    settings.register_profile(
        name, max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck)
    )
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "push"))


@pytest.fixture(scope="session", autouse=True)
def tiny(tmp_path_factory, worker_id) -> Iterator[Path]:
    """The embedded checkpoint, where every test and every command that a test starts finds it.

    One of the processes of this session builds it, and what one compiles all find. Each has a cache
    folder of its own, whose files are links to it.
    """
    silence_libraries()
    alone = worker_id == "master"
    shared = tmp_path_factory.getbasetemp() if alone else tmp_path_factory.getbasetemp().parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared / "inductor"))
        with FileLock(shared / "tiny.lock"):
            patch.setenv("XDG_CACHE_HOME", str(shared / "shared"))
            built = cached_tiny_checkpoint()
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        own = cache_folder() / built.name
        shutil.copytree(built, own, copy_function=os.link)
        yield own


@pytest.fixture
def light(tiny, tmp_path) -> Path:
    """A copy of the checkpoint whose files are links: to be replaced, not written to."""
    shutil.copytree(tiny, tmp_path / "checkpoint", copy_function=os.link)
    return tmp_path / "checkpoint"


@pytest.fixture
def no_embeddings():
    """None of earlier tests in the cache folder."""
    shutil.rmtree(cache_folder() / "embeddings", ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark rule, forecast, forward and units as fast, but for the videos of 50 steps."""
    for item in items:
        of_core = item.path.name in ("test_forward.py", "test_forecast.py")
        if item.path.parent.name == "unit" or (of_core and "test_nearer_to_every" not in item.name):
            item.add_marker("fast")


@pytest.fixture(scope="session")
def identity(tiny):
    """The astronaut's identity, by the real face stack."""
    from teacache.inputs import identity as faces
    from teacache.inputs import photograph as pictures

    models = faces.load_face_models(tiny, CPU, torch.float32)
    return faces.find_identity(pictures.load_image("astronaut"), models, CPU, torch.float32)


@pytest.fixture(scope="session")
def make_pipe(tiny):
    """Loads a pipeline of one's own, in a tenth of a second; `dtype` is float32."""
    from teacache.checkpoint.pipeline import load_pipeline

    def make(dtype: torch.dtype = torch.float32):
        return load_pipeline(tiny, CPU, dtype)

    return make


@pytest.fixture
def pipe(make_pipe):
    """A plain pipeline of this test's own."""
    return make_pipe()


@pytest.fixture
def shallow(make_pipe):
    """Loads a pipeline without blocks: its schedules are those of the whole one, at no cost."""

    def make(dtype: torch.dtype = torch.float32):
        pipe = make_pipe(dtype)
        del pipe.transformer.transformer_blocks[:]
        return pipe

    return make


@pytest.fixture(scope="session")
def sample(identity):
    """Calls the pipeline as its documentation does, and returns latents (or frames).

    Nothing of our sampler is in it: what it returns from a plain pipeline is what users have today.
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


@pytest.fixture(scope="session")
def published_schedule():
    """Computed steps by the published rule: a second computation, from the embeddings, in NumPy."""

    def compute(pipe, steps: int, threshold: float) -> list[int]:
        pipe.scheduler.set_timesteps(steps)
        transformer, computed, total, previous = pipe.transformer, [], 0.0, None
        polynomial = np.poly1d(
            [-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02]
        )
        for i, t in enumerate(pipe.scheduler.timesteps):
            e = transformer.time_embedding(transformer.time_proj(t.expand(2)).to(transformer.dtype))
            if previous is not None:
                x = (e - previous).abs().mean() / previous.abs().mean()
                total += polynomial(x.item())
            if i in (0, steps - 1) or total >= threshold:
                computed.append(i)
                total = 0.0
            previous = e
        return computed

    return compute
