"""Suppresses the output of libraries, but not the warnings of this package."""

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
    """Hide libraries' warnings; print this package's, and `?` where a terminal lacks UTF-8.

    A command calls this once, before it imports torch.
    """
    warnings.simplefilter("ignore")
    for library in ("DIFFUSERS", "TRANSFORMERS", "HF_HUB"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for name in ("", "diffusers", "transformers", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # torch warns about torchao's enumerations, and about a compiler without CUDA.
    for name in ("torch.utils._pytree", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It logs an error that it raises as well.
    logging.getLogger("diffusers.loaders.peft").setLevel(logging.CRITICAL)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    own = logging.getLogger("teacache")
    own.handlers = [handler]
    own.setLevel(logging.WARNING)
    own.propagate = False
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of diffusers and transformers for reading and writing weights."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    both = (diffusers_logging, transformers_logging)
    enabled = [library for library in both if library.is_progress_bar_enabled()]
    for library in enabled:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in enabled:
            library.enable_progress_bar()


@contextlib.contextmanager
def silent_programs() -> Iterator[Callable[[], str]]:
    """Hide standard error of programs that the block starts; yield what returns its last line."""
    stderr = os.dup(2)
    try:
        output = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
    except OSError:  # every temporary folder is full: the line is lost
        output = open(os.devnull, "w+b")  # noqa: SIM115

    def last_line() -> str:
        output.seek(0)
        return output.read().decode(errors="replace").strip().split("\n")[-1].strip()

    with output:
        try:
            os.dup2(output.fileno(), 2)
            yield last_line
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def import_eva_clip() -> ModuleType:
    """Import `consisid_eva_clip`, without the advice that it prints on import."""
    with contextlib.redirect_stdout(io.StringIO()):
        import consisid_eva_clip
    return consisid_eva_clip
