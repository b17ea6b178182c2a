"""ConsisID with TeaCache: identity-preserving videos from a photograph and a prompt, fast.

The public names are imported on first use, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from teacache.checkpoint.pipeline import load_pipeline as load_pipeline
    from teacache.core.forward import apply_teacache as apply_teacache
    from teacache.core.rule import COGVIDEOX_5B as COGVIDEOX_5B
    from teacache.core.rule import Coefficients as Coefficients
    from teacache.core.rule import Limits as Limits
    from teacache.core.rule import Schedule as Schedule
    from teacache.inputs.identity import find_identity as find_identity
    from teacache.inputs.identity import load_face_models as load_face_models
    from teacache.inputs.photograph import load_image as load_image

__version__ = "1.0.0"
_MODULES = {
    "COGVIDEOX_5B": "core.rule",
    "Coefficients": "core.rule",
    "Limits": "core.rule",
    "Schedule": "core.rule",
    "apply_teacache": "core.forward",
    "find_identity": "inputs.identity",
    "load_face_models": "inputs.identity",
    "load_image": "inputs.photograph",
    "load_pipeline": "checkpoint.pipeline",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
