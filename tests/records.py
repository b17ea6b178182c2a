"""A record of a video that nobody has sampled, to change what a test is about."""

import dataclasses
from typing import Any

from teacache.results.record import Record, Settings

SETTINGS = Settings(
    image="a.png", prompt="a man", negative_prompt="", seed=1, num_infer_steps=5,
    rel_l1_thresh=0.15, image_sha256="4a", ckpts_path="tiny", output_path="out",
    guidance_scale=6.0, width=112, height=96, num_frames=13, device="cpu", dtype="float32",
    offload="none", vae_tiling=False, attention="native", compile=False, quantize=None,
    approximations=[],
    coefficients={"values": [0, 0, 0, 1, 0], "fitted_range": None, "source": "p(x) = x"},
)  # fmt: skip
RECORD = Record(
    settings=SETTINGS, computed_steps=[0, 2, 4], reused_steps=[1, 3],
    distances=[None, 0.1, 0.1, 0.1, 0.1], rescaled=[None, 0.1, 0.1, 0.1, 0.1],
    steps_outside_fitted_range=[], why_nothing_was_reused=None,
    computed_step_seconds=0.3, reused_step_seconds=0.1,
    seconds={"denoising": 1.0, "decoding": 1.0, "total": 3.0}, peak_memory_bytes=2**30,
    device_name="cpu", versions={"torch": "2"},
)  # fmt: skip
OF_A_VIDEO = {field.name for field in dataclasses.fields(Settings)}


def record_of_a_video(**changed: Any) -> Record:
    """`RECORD`, with other settings or values."""
    settings = {name: value for name, value in changed.items() if name in OF_A_VIDEO}
    own = {name: value for name, value in changed.items() if name not in OF_A_VIDEO}
    return dataclasses.replace(RECORD, settings=dataclasses.replace(SETTINGS, **settings), **own)
