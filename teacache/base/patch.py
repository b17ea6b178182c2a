"""Another forward in the place of a module's own, and its undoing.

Offload hooks, accelerate's and diffusers', wrap a module's forward too, and keep what they wrap. A
patch replaces the innermost forward, so that the two go together in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from teacache.base.errors import ArgumentError

if TYPE_CHECKING:
    import torch


def forwards(module: torch.nn.Module) -> Iterator[tuple[Any, str, Callable]]:
    """The forwards that are kept for a module beside its class's own.

    Yields:
        the object that holds it, the name of the attribute, and the forward.
    """
    holders: list[Any] = [
        module,
        *getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ()),
    ]
    for holder in holders:
        for name in ("_old_forward", "original_forward", "forward"):
            forward = vars(holder).get(name)
            if forward is not None:
                yield holder, name, forward


def put_in_place(module: torch.nn.Module, forward: Callable) -> None:
    """Let `forward` stand in the place of the module's own.

    Raises:
        ArgumentError: where something else than an offload hook has wrapped the module's forward,
            and would be lost.
    """
    own = type(module).forward
    for holder, name, current in forwards(module):
        if getattr(current, "__func__", None) is own:
            setattr(holder, name, forward)
            return
    if "forward" in vars(module):
        raise ArgumentError(
            f"the forward of this {type(module).__name__} is wrapped by something else than an "
            "offload hook: apply TeaCache first"
        )
    module.forward = forward


def take_away(module: torch.nn.Module, forward: Callable) -> None:
    """Undo `put_in_place`, where `forward` is still in place; else do nothing."""
    for holder, name, current in list(forwards(module)):
        if current is not forward:
            continue
        if (holder, name) == (module, "forward"):
            del module.forward
        else:
            setattr(holder, name, type(module).forward.__get__(module))
