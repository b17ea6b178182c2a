"""What Python and its packages need of the machine: looked at, or set, before torch is imported."""

from __future__ import annotations

import os
import re

from teacache.base.errors import DeviceError


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
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        missing = re.match(r"(\S+\.so[.\d]*): cannot open shared object file", str(error))
        if missing:  # servers often lack what draws on a screen
            raise DeviceError(
                f"opencv does not find {missing[1]}: apt-get install libgl1 libglib2.0-0"
            ) from error
        raise DeviceError(f"opencv cannot be imported: {error}") from error
