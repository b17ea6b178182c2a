"""ConsisID with TeaCache: identity-preserving videos from a photograph and a prompt, fast.

The public names are imported when they are asked for, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from teacache.checkpoint.pipeline import load_pipeline
    from teacache.core.forward import apply_teacache
    from teacache.core.rule import COGVIDEOX_5B, Coefficients, Schedule
    from teacache.inputs.identity import find_identity, load_face_models
    from teacache.inputs.photograph import load_image

__version__ = "1.0.0"
__all__ = [
    "COGVIDEOX_5B",
    "Coefficients",
    "Schedule",
    "apply_teacache",
    "find_identity",
    "load_face_models",
    "load_image",
    "load_pipeline",
]
_ROOMS = {
    "COGVIDEOX_5B": "core.rule",
    "Coefficients": "core.rule",
    "Schedule": "core.rule",
    "apply_teacache": "core.forward",
    "find_identity": "inputs.identity",
    "load_face_models": "inputs.identity",
    "load_image": "inputs.photograph",
    "load_pipeline": "checkpoint.pipeline",
}


def __getattr__(name: str) -> object:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
