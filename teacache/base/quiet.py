"""Keeps the noise of the libraries below from the user, and leaves what this package says."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType


def silence_libraries() -> None:
    """Hide deprecations and advice; let this package's warnings through, a line each.

    For a command, once, before anything heavy is imported.
    """
    warnings.simplefilter("ignore")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    for name in ("", "diffusers", "transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # What torch says of torchao's enumerations, and of a compiler that finds no CUDA.
    for name in ("torch.utils._pytree", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    own = logging.getLogger("teacache")
    own.handlers = [handler]
    own.setLevel(logging.WARNING)
    own.propagate = False


def allow_any_encoding() -> None:
    """Print a question mark for what a terminal or file without UTF-8 cannot hold."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the bars that diffusers and transformers draw while they read or write weights."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    shown = [log for log in (of_diffusers, of_transformers) if log.is_progress_bar_enabled()]
    for log in shown:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in shown:
            log.enable_progress_bar()


@contextlib.contextmanager
def silent_programs() -> Iterator[Callable[[], str]]:
    """Hide what programs that are started in the block say on standard error.

    Yields:
        a function that gives the last line of it.
    """
    stderr = os.dup(2)
    try:
        output = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    except OSError:  # no room anywhere: then it cannot be told
        output = open(os.devnull, "w+b")  # noqa: SIM115

    def last_line() -> str:
        output.seek(0)
        lines = output.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    with output:
        try:
            os.dup2(output.fileno(), 2)
            yield last_line
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def import_eva_clip() -> ModuleType:
    """Import `consisid_eva_clip`, which prints advice about optional packages as it comes in."""
    with contextlib.redirect_stdout(io.StringIO()):
        import consisid_eva_clip
    return consisid_eva_clip
