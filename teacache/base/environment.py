"""What Python and its packages need of the machine: looked at, or set, before torch is imported."""

from __future__ import annotations

import os
import re
import resource
import sys

from teacache.base.errors import DeviceError

# The embedded checkpoint's 13 frames on a CPU, two threads, torch 2.14 and diffusers 0.42: with 5
# it works at times, with 4 never. Every further thread takes some, and so does a real checkpoint.
ADDRESS_SPACE_GB = 6


def prepare_environment() -> None:
    """Look for what else ends in a traceback from within a library, and choose the GPU's allocator.

    To be called before torch is imported. It imports opencv, which is needed later in any case.
    Unless the user has chosen something, torch's memory on a GPU grows in segments that expand:
    decoding at published settings then reserves 4 GiB less for the same tensors.

    Raises:
        DeviceError: where something is missing, with what can be done about it.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older of its names
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if sys.flags.optimize >= 2:
        raise DeviceError(
            "python -OO removes docstrings, from which transformers makes what it shows: "
            "use -O, or neither, and no PYTHONOPTIMIZE=2"
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE_GB * 2**30:
        raise DeviceError(
            f"not enough address space: {ADDRESS_SPACE_GB} GB are needed, "
            f"`ulimit -v` allows {limit * 10 // 2**30 / 10}"
        )
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        missing = re.match(r"(\S+\.so[.\d]*): cannot open shared object file", str(error))
        if missing:  # servers often lack what draws on a screen
            raise DeviceError(
                f"opencv does not find {missing[1]}: apt-get install libgl1 libglib2.0-0"
            ) from error
        raise DeviceError(f"opencv cannot be imported: {error}") from error
