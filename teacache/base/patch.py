"""Replaces the forward of a module, and restores it.

The offload hooks of accelerate and diffusers wrap a module's forward too, and store the forward
that they wrap. A patch replaces the innermost forward, so both combine in any order.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from teacache.base.errors import ArgumentError


def forwards(module: torch.nn.Module) -> Iterator[tuple[Any, str, Callable]]:
    """The forwards that a module or an offload hook of it stores: holder, attribute, forward."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", ())
    for holder in (module, *hooks):
        for name in ("_old_forward", "original_forward", "forward"):
            forward = vars(holder).get(name)
            if forward is not None:
                yield holder, name, forward


def put_in_place(module: torch.nn.Module, forward: Callable) -> None:
    """Replace the module's own forward by `forward`.

    Raises:
        ArgumentError: if something else than an offload hook wraps the module's forward, because
            the patch would remove that wrapper.
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
    """Undo `put_in_place`. Does nothing if `forward` is not in place."""
    for holder, name, current in list(forwards(module)):
        if current is forward and (holder, name) == (module, "forward"):
            del module.forward
        elif current is forward:
            setattr(holder, name, type(module).forward.__get__(module))
