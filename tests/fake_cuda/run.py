"""The command on pretended CUDA: `python run.py FREE ARGUMENTS`, the log on standard error."""

import contextlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_cuda.tensors import GPU, Generator, OnGpu, PretendedCuda, log, note, on_host

GIB = 2**30
SDPA = torch.nn.functional.scaled_dot_product_attention


class Event:
    """A point in a queue that is always reached."""

    def __init__(self, *args, **kwargs):
        self.record = self.wait = lambda stream=None: None
        self.synchronize = lambda: note("wait")
        self.elapsed_time = lambda other: 1.0


def attend(query, key, value, *args, **kwargs):
    """Attention by the CPU's kernel: for a GPU's torch asks the driver which it has."""
    assert len({each.device for each in (query, key, value)}) == 1
    args, kwargs = pytree.tree_map(on_host, ((query, key, value, *args), kwargs))
    with torch._C._DisableTorchDispatch():
        out = SDPA(*args, **kwargs)
    return OnGpu(out) if isinstance(query, OnGpu) else out


def pretend(free: float) -> None:
    """Make torch say that there is a GPU.

    Args:
        free: GiB of its memory.
    """
    torch.set_num_threads(1)
    cuda = torch.cuda
    h100 = {"name": "Pretended H100", "major": 9, "minor": 0, "multi_processor_count": 132}
    zero = ("current_device", "memory_allocated", "memory_reserved")
    zero += ("max_memory_allocated", "max_memory_reserved", "is_initialized")
    answers = {
        "is_available": True,
        "device_count": 1,
        "get_device_capability": (9, 0),
        "get_device_name": h100["name"],
        "get_device_properties": SimpleNamespace(**h100, total_memory=80 * GIB),
        "mem_get_info": (int(free * GIB), int(free * GIB)),
        "get_per_process_memory_fraction": 1.0,
        **dict.fromkeys(zero, 0),
        **dict.fromkeys(("_lazy_init", "empty_cache", "current_stream", "reset_peak_memory_stats")),
    }
    for name, answer in answers.items():
        setattr(cuda, name, lambda *args, answer=answer, **kwargs: answer)
    cuda.synchronize = lambda device=None: note("wait")
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.Event = Event
    torch.Generator = Generator
    torch.nn.functional.scaled_dot_product_attention = attend
    torch._C._nn.scaled_dot_product_attention = attend
    is_alias = torch._C._is_alias_of
    torch._C._is_alias_of = lambda one, other: is_alias(on_host(one), on_host(other))
    # A module that moves gets new parameters: torch exchanges the old ones' memory below Python.
    torch.backends.cudnn.enabled = False  # whose batch norms a CPU does not have
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _name_the_gpu()


def _name_the_gpu() -> None:
    """Let `cuda` be `cuda:0` without a question to the driver."""
    moved, made = torch.Tensor.to, {name: getattr(torch, name) for name in ("tensor", "as_tensor")}

    def named(device):
        there = isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"
        return GPU if there else device

    def to(self, *args, **kwargs):
        kwargs |= {"device": named(kwargs["device"])} if "device" in kwargs else {}
        return moved(self, *map(named, args), **kwargs)

    torch.Tensor.to = OnGpu.to = to
    for name, make in made.items():

        def on_device(data, *args, make=make, device=None, **kwargs):
            tensor = make(data, *args, **kwargs)
            return tensor if device is None else tensor.to(device)

        setattr(torch, name, on_device)
    draw = torch.randn

    def randn(*size, generator=None, device=None, **kwargs):
        if generator is None:
            return draw(*size, device=device, **kwargs)
        assert generator.device.type == torch.device(device or "cpu").type
        drawn = draw(*size, generator=generator.host, **kwargs)
        return drawn if generator.device.type == "cpu" else OnGpu(drawn)  # no copy: made there

    torch.randn = randn


if __name__ == "__main__":
    free, *arguments = sys.argv[1:]
    # Weights that are read in threads of their own would be read without the mode.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    pretend(float(free))
    torch.set_grad_enabled(False)
    from teacache.command.main import main

    with PretendedCuda():
        code = main(arguments)
    print(json.dumps(log), file=sys.stderr)
    sys.exit(code)
