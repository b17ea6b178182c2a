"""Making models of a checkpoint's files, and what is said where that cannot be."""

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

MOST_SAID = 200  # characters of what a library says: some list every weight


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn what a library raises in the block, which reads models from `folder`, into one line.

    Each raises errors of its own kinds for files that are damaged or do not go together. Running
    out of memory, a missing package and a GPU that fails are none of the files' faults.

    Raises:
        CheckpointError: naming the folder.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (TeaCacheError, ImportError)) or is_out_of_memory(error):
            raise
        if "CUDA" in str(error):  # the GPU's fault or ours
            raise
        message = textwrap.shorten(
            f"{type(error).__name__}: {error}", MOST_SAID, placeholder=" ..."
        )
        raise CheckpointError(f"{folder} cannot be read: {message}") from error


def load_model(
    kind: type[ModelMixin | PreTrainedModel],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> ModelMixin | PreTrainedModel:
    """A model of diffusers or transformers with all of its weights.

    Raises:
        CheckpointError: where its files cannot be read, or do not hold every weight: the libraries
            would fill those with random numbers and go on.
    """
    with reading(folder):
        try:
            model, found = kind.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                device_map={"": device},
                output_loading_info=True,
            )
        except ImportError as error:
            if "quantization_config" not in read_json(folder / "config.json"):
                raise
            message = textwrap.shorten(str(error), MOST_SAID, placeholder=" ...")
            raise CheckpointError(
                f"{folder} is quantized, and cannot be read: {message}"
            ) from error
        except NotImplementedError as error:  # torch cannot copy a missing weight's meta tensor
            raise CheckpointError(f"{folder} lacks some of the model's weights") from error
    missing = found["missing_keys"]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the model's weights: {min(missing)}"
        )
    return model
