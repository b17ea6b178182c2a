"""Tensors that say they are on a GPU, and compute on the CPU: real numbers, CUDA's rules.

An operation over tensors of both devices raises as it would on a GPU, numbers (of no dimension)
excepted. What makes the host wait for the GPU, and each copy between the two, goes on the log, with
the place in the project that it comes from. Not modelled: streams and events beyond their being
there, memory, kernels of CUDA's own, and `parameter.data = tensor` from one device to the other,
which torch does not hand to Python: `--offload` moves weights that way.
"""

import sys
from collections import Counter
from typing import Self

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
INDEXING = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index"}
COPYING = {"copy_", "_to_copy", "set_"}
# In half precision many CPUs take ten times as long for these.
MULTIPLYING = {"convolution", "mm", "addmm", "bmm", "baddbmm"}

log: Counter[str] = Counter()  # what happened, and where


def note(what: str) -> None:
    """Put something on the log, with the innermost place of the project's that it comes from."""
    frame = sys._getframe(1)
    while frame and "/teacache/" not in frame.f_code.co_filename:
        frame = frame.f_back  # type: ignore[assignment]
    name = frame.f_code.co_filename.rpartition("/teacache/")[2] if frame else "elsewhere"
    log[f"{what} {name}:{frame.f_code.co_name if frame else ''}"] += 1


class OnGpu(torch.Tensor):
    """A tensor whose numbers are `host`'s."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> Self:
        like = {"strides": host.stride(), "dtype": host.dtype, "device": GPU}
        like["storage_offset"] = host.storage_offset()
        made = torch.Tensor._make_wrapper_subclass(cls, host.size(), **like)
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return carry_out(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        return OnGpu(self.host.clone())

    # Torch does these behind guards that ask the driver which GPU is the current one.

    def __getitem__(self, index):
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, torch.Tensor) and (part.dtype == torch.bool or part.dim() == 0):
                note("wait")
        with torch._C._DisableTorchDispatch():
            return OnGpu(self.host[pytree.tree_map(on_host, index)])

    def __setitem__(self, index, value):
        if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) and value.dim():
            note("copy")
        with torch._C._DisableTorchDispatch():
            self.host[pytree.tree_map(on_host, index)] = on_host(value)

    def contiguous(self, memory_format=torch.contiguous_format):
        if self.host.is_contiguous(memory_format=memory_format):
            return self
        return torch.clone(self, memory_format=memory_format)

    def copy_(self, source, non_blocking=False):
        if not isinstance(source, OnGpu):
            note("copy")
        with torch._C._DisableTorchDispatch():
            self.host.copy_(on_host(source))
        return self

    def tolist(self):
        note("wait")
        return self.host.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *args, **kwargs):
        self.numpy()

    def __bool__(self):
        return bool(self.item())

    def __int__(self):
        return int(self.item())

    def __float__(self):
        return float(self.item())

    def cpu(self, *args, **kwargs):
        return self.to("cpu")

    def untyped_storage(self):
        return self.host.untyped_storage()

    def data_ptr(self):
        return self.host.data_ptr()


class Generator:
    """A CPU's generator that says it is a GPU's."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = GPU if torch.device(device).type == "cuda" else torch.device(device)
        self.host = torch._C.Generator("cpu")
        self.get_state = self.host.get_state

    def manual_seed(self, seed: int) -> Self:
        self.host.manual_seed(seed)
        return self

    def set_state(self, state: torch.Tensor) -> None:
        assert state.device.type == "cpu", "a generator's state is a tensor of the host's"
        self.host.set_state(state)


class PretendedCuda(TorchDispatchMode):
    """Lets what is made on `cuda` be made of `OnGpu`."""

    def __enter__(self):
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *exception):
        torch._C._set_only_lift_cpu_tensors(self._before)
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return carry_out(func, args, kwargs or {})


def on_host(value):
    """The tensor that holds the numbers; whatever else as it is."""
    return value.host if isinstance(value, (OnGpu, Generator)) else value


def widened(value):
    """The tensor that holds the numbers, in single precision; whatever else as it is."""
    value = on_host(value)
    return value.float() if isinstance(value, torch.Tensor) else value


def on_gpu(value):
    """A tensor of the host's as one of the GPU's; whatever else as it is."""
    plain = isinstance(value, torch.Tensor) and not isinstance(value, OnGpu)
    return OnGpu(value) if plain and value.device.type == "cpu" else value


def carry_out(func, args, kwargs):
    """An operation, by CUDA's rules about devices."""
    name = func._schema.name.partition("::")[2]
    if name == "device":
        return args[0].device
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = any(isinstance(tensor, OnGpu) for tensor in tensors)
    asked = kwargs.get("device")
    target = torch.device(asked).type if asked is not None else "cuda" if there else "cpu"
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if asked is not None and target == "cuda":
        kwargs["device"] = torch.device("cpu")
    if there and name not in COPYING and (asked is None or name in INDEXING):
        _check_devices(func, name, args, tensors)
    if there and name in WAITING:
        note("wait")
    _note_copies(name, args, target, there)
    if name == "_to_copy":
        kwargs.pop("non_blocking", None)
    with torch._C._DisableTorchDispatch():
        # Of different types it raises, as on a GPU.
        widen = name in MULTIPLYING and len({tensor.dtype for tensor in tensors}) == 1
        on = widened if widen else on_host
        out = func(*pytree.tree_map(on, args), **pytree.tree_map(on, kwargs))
        if widen:
            out = out.to(tensors[0].dtype)
    if func._schema.is_mutable and not isinstance(out, (tuple, list)):
        return _written(func, args, kwargs, out)
    return pytree.tree_map(on_gpu, out) if target == "cuda" else out


def _check_devices(func, name, args, tensors):
    """Raise RuntimeError where tensors of both devices meet."""
    others = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
    if name in INDEXING:  # indices may lie on the host
        others = [x for x in others if x is args[0] or (len(args) > 2 and x is args[2])]
    if any(tensor.dim() and tensor.device.type != "meta" for tensor in others):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, found cuda:0 and cpu ({func})"
        )


def _note_copies(name, args, target, there):
    if name == "_to_copy" and {target, "cuda" if there else args[0].device.type} == {"cpu", "cuda"}:
        note("copy")
    if name == "copy_" and isinstance(args[0], OnGpu) != isinstance(args[1], OnGpu):
        note("copy")


def _written(func, args, kwargs, out):
    """What an operation in place returns: the tensor that it was given to write to."""
    arguments = func._schema.arguments
    values = [*args, *(kwargs.get(each.name) for each in arguments[len(args) :])]
    for value, argument in zip(values, arguments, strict=True):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return value
    return out
