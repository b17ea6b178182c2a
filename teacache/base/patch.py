"""Another forward in the place of a module's own, and its undoing.

Accelerate's offload hooks wrap a forward too. A patch goes below them, in any order of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from teacache.base.errors import ArgumentError

if TYPE_CHECKING:
    import torch


def innermost_forward(module: torch.nn.Module) -> Callable | None:
    """The forward below accelerate's hooks, or None where nothing but the class's own is there.

    Such a hook keeps the forward that it wraps in `_old_forward`, and puts it back when it goes. So
    the innermost forward is the one to replace, whichever of the two came first.
    """
    return vars(module).get("_old_forward", vars(module).get("forward"))


def put_in_place(module: torch.nn.Module, forward: Callable) -> None:
    """Let `forward` stand in the place of the module's own.

    Raises:
        ArgumentError: where something else than an accelerate hook has wrapped the forward, and
            would be lost.
    """
    current = innermost_forward(module)
    if current is not None and getattr(current, "__func__", None) is not type(module).forward:
        raise ArgumentError(
            f"the forward of this {type(module).__name__} is wrapped by something else than an "
            "accelerate hook: apply TeaCache first"
        )
    setattr(module, "_old_forward" if "_old_forward" in vars(module) else "forward", forward)


def take_away(module: torch.nn.Module, forward: Callable) -> None:
    """Undo `put_in_place`, where `forward` is still the innermost; else do nothing."""
    if vars(module).get("_old_forward") is forward:
        module._old_forward = type(module).forward.__get__(module)
    elif vars(module).get("forward") is forward:
        del module.forward
