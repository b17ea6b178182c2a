"""TeaCache for ConsisID: identity-preserving videos in a half to a third of the time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from teacache.policy import COGVIDEOX_5B, Coefficients, Policy
    from teacache.transformer import TeaCacheHandle, apply_teacache

_ROOMS = {
    "apply_teacache": "transformer",
    "TeaCacheHandle": "transformer",
    "COGVIDEOX_5B": "policy",
    "Coefficients": "policy",
    "Policy": "policy",
}
__all__ = ["COGVIDEOX_5B", "Coefficients", "Policy", "TeaCacheHandle", "apply_teacache"]


def __getattr__(name: str) -> object:
    # Imported when first asked for: the transformer brings torch and diffusers, seconds of it.
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
