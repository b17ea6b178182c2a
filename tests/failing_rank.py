"""The command, with an attention that finds no memory in the rank that `SHORT_OF_MEMORY` names.

Each rank imports this file, as the one that its launcher was started with.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from teacache.command.main import run_and_exit

attend = torch.nn.functional.scaled_dot_product_attention


def no_memory(query, *args, **kwargs):
    of_a_step = query.shape[-2] > 256  # and not of the trial before anything is loaded
    if of_a_step and os.environ.get("RANK") == os.environ["SHORT_OF_MEMORY"]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB")
    return attend(query, *args, **kwargs)


torch.nn.functional.scaled_dot_product_attention = no_memory

if __name__ == "__main__":
    run_and_exit()
