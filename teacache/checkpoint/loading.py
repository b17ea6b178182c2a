"""Loads the models of a checkpoint, with one-line errors for damaged files."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from teacache.base.device import is_out_of_memory
from teacache.base.errors import CheckpointError, TeaCacheError
from teacache.checkpoint.folder import read_json

if TYPE_CHECKING:
    import torch
    from diffusers import ModelMixin
    from transformers import PreTrainedModel


@contextlib.contextmanager
def reading(folder: Path | str) -> Iterator[None]:
    """Turn any error of the block, which reads models from a folder, into a CheckpointError.

    Each library has its own errors for files that are damaged or do not fit together. Errors with
    other causes stay as they are: no memory, a missing package, a failing GPU.

    Raises:
        CheckpointError: in one line, with the folder.
    """
    try:
        yield
    except Exception as error:
        other_cause = isinstance(error, (TeaCacheError, ImportError)) or is_out_of_memory(error)
        if other_cause or "CUDA" in str(error):
            raise
        # Some messages list every weight.
        message = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        raise CheckpointError(f"{folder} cannot be read: {message}") from error


def load_model(
    kind: type[ModelMixin | PreTrainedModel],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> ModelMixin | PreTrainedModel:
    """Load a model of diffusers or transformers.

    Raises:
        CheckpointError: where its files cannot be read or lack weights, which the libraries would
            replace by random numbers.
    """
    with reading(folder):
        try:
            model, info = kind.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                device_map={"": device},
                output_loading_info=True,
            )
        except ImportError as error:
            if "quantization_config" not in read_json(folder / "config.json"):
                raise
            message = textwrap.shorten(str(error), 200, placeholder=" ...")
            raise CheckpointError(
                f"{folder} is quantized, and cannot be read: {message}"
            ) from error
        except NotImplementedError as error:  # torch cannot copy a missing weight's meta tensor
            raise CheckpointError(f"{folder} lacks some of the model's weights") from error
    if missing := info["missing_keys"]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's weights: {min(missing)}"
        )
    return model
