"""The command, with ranks that are forked, and so have its imports; otherwise they begin anew.

The attention of the rank that `SHORT_OF_MEMORY` names finds no memory.
"""

import functools
import logging
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.distributed.launcher import api

from teacache.command.main import run_and_exit
from teacache.parallel import launch

attend, begin = torch.nn.functional.scaled_dot_product_attention, launch._exit_with


def no_memory(query, *args, **kwargs):
    of_a_step = query.shape[-2] > 256  # and not of the trial before anything is loaded
    if of_a_step and os.environ["RANK"] == os.environ.get("SHORT_OF_MEMORY"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB")
    return attend(query, *args, **kwargs)


def begin_anew(*arguments):
    """Without what torch's launcher and ours have changed in their own process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    logging.disable(logging.NOTSET)
    begin(*arguments)


if __name__ == "__main__":
    torch.nn.functional.scaled_dot_product_attention = no_memory
    api.LaunchConfig = functools.partial(api.LaunchConfig, start_method="fork")
    launch._exit_with = begin_anew
    run_and_exit()
