"""The command that repeats one video: the values of a request as words again."""

import shlex
from pathlib import Path

from teacache.base.errors import without_credentials
from teacache.core.rule import COGVIDEOX_5B
from teacache.request.arguments import parse_arguments
from teacache.request.flags import FLAGS
from teacache.request.job import Job
from teacache.request.values import Options


def command_of(job: Job, options: Options, record: Path, vae_tiling: bool) -> str:
    """A shell command that repeats one video, with the flags that differ from their defaults.

    Credentials in the URL of an image are masked.

    Args:
        record: path of the record, from which listed steps and coefficients are read.
        vae_tiling: whether the VAE was tiled, since `auto` depends on the free memory.
    """
    values: dict[str, object] = {
        **vars(options),
        **vars(options.format),
        **vars(options.machine),
        **vars(job.limits),
        **vars(job),
        "image": without_credentials(job.image),
        "seed": [job.seed],
        "lora": [f"{source}:{scale}" for source, scale in options.loras],
        "vae_tiling": "on" if vae_tiling else options.machine.vae_tiling,
        "schedule": record if job.steps is not None else None,
        "coefficients": record if options.coefficients_for(job) != COGVIDEOX_5B else None,
    }
    defaults = vars(parse_arguments(["--ckpts_path", options.ckpts_path]))
    defaults["ckpts_path"] = FLAGS["ckpts_path"].default
    defaults["reuse"] = "residual" if job.computed_steps is None else "forecast"
    words = ["python3", "teacache_sample_video.py"]
    for name, flag in FLAGS.items():
        value = values.get(name)
        if value is not None and value != defaults[name] and [value] != defaults[name]:
            words += flag.words(value)
    return shlex.join(words)
