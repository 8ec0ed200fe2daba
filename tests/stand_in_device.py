"""An accelerator for machines without one: the ``meta`` device, but with numbers.

Tensors on it keep their values in CPU memory. As CUDA does, it refuses operations that mix devices,
generators of the CPU for its own draws, and ``numpy()``.
"""

from contextlib import contextmanager, nullcontext

import safetensors
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["StandIn", "stand_in_device"]

HERE = "meta"
MAY_MIX = {torch.ops.aten.copy_, torch.ops.aten.index, torch.ops.aten.index_put_}
"""Copies between devices, and indices on the CPU, which CUDA takes as well."""


class StandIn(torch.Tensor):
    """A tensor on the stand-in, its numbers in ``held``."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=HERE,
            requires_grad=held.requires_grad,
        )

    def __init__(self, held):
        self.held = held.detach()

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Catches what makes tensors of nothing."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, StandIn)]
    device = kwargs.get("device")
    to = None if device is None else torch.device(device).type
    if there and func.overloadpacket not in MAY_MIX:
        strangers = [t for t in tensors if t.ndim and not isinstance(t, StandIn)]
        if strangers:
            raise RuntimeError(f"{func} got tensors of several devices")
    lands = (to or (HERE if there else "cpu")) == HERE
    if func.overloadpacket in MAY_MIX:
        lands = isinstance(args[0], StandIn)
        if not lands and func.overloadpacket is torch.ops.aten.index and there:
            raise RuntimeError("indices on the accelerator into a tensor of the CPU")
    generator = kwargs.get("generator")
    if lands and generator is not None and generator.device.type != HERE:
        raise RuntimeError(f"{func} draws on the accelerator with a generator of the CPU")
    kwargs = dict(kwargs)
    if to == HERE:
        kwargs["device"] = torch.device("cpu")
    inner = tree_map(lambda t: t.held if isinstance(t, StandIn) else t, (args, kwargs))
    out = func(*inner[0], **inner[1])
    known = {id(t.held): t for t in there}
    plain = {id(t): t for t in tensors}

    def wrapped(value):
        if not isinstance(value, torch.Tensor) or isinstance(value, StandIn):
            return value
        if id(value) in known:
            return known[id(value)]
        if id(value) in plain:
            return value
        if (
            to == "cpu"
            and there
            and value.untyped_storage()._cdata in {t.held.untyped_storage()._cdata for t in there}
        ):
            value = value.clone()
        return StandIn(value) if lands else value

    return tree_map(wrapped, out)


@contextmanager
def stand_in_device(monkeypatch):
    """Inside, ``torch.device("meta")`` is an accelerator."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(
        torch,
        "autocast",
        lambda kind, *a, **k: nullcontext() if kind == HERE else autocast(kind, *a, **k),
    )
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != HERE and enabled(kind))
    opened = safetensors.safe_open

    def safe_open(path, framework, device="cpu"):
        file = opened(path, framework)
        return _Moved(file, device) if device == HERE else file

    monkeypatch.setattr(safetensors, "safe_open", safe_open)
    with Mode():
        yield torch.device(HERE)


class _Moved:
    """A safetensors file that is read to a device."""

    def __init__(self, file, device):
        self._file, self._device = file, device

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def metadata(self):
        return self._file.metadata()

    def get_tensor(self, name):
        return self._file.get_tensor(name).to(self._device)
