"""Checks and settings that must come before torch is imported."""

import os
import re

from teacache.base.errors import DeviceError


def prepare_environment() -> None:
    """Import opencv, and set what torch and onnxruntime read. Call it before they are imported.

    Unless the user has configured the allocator, its segments are expandable: decoding at
    published settings then reserves 4 GiB less for the same tensors.

    Raises:
        DeviceError: if opencv cannot be imported, with the command that helps.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime's, and its files in ~/.cache
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        import cv2  # noqa: F401
    except ModuleNotFoundError:
        raise  # see `teacache.base.interruption.run_command`
    except ImportError as error:
        library = re.match(r"(\S+\.so[.\d]*): cannot open shared object file", str(error))
        if library:  # a server often lacks the graphics libraries
            raise DeviceError(
                f"opencv does not find {library[1]}: apt-get install libgl1 libglib2.0-0"
            ) from error
        raise DeviceError(f"opencv cannot be imported: {error}") from error
