"""Devices and number formats by name."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from threading import Lock, local

import torch
from torch import nn

from diffcal.errors import ConfigError

__all__ = ["module_device", "one_thread", "resolve_device", "resolve_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def module_device(module: nn.Module) -> torch.device:
    """Where the parameters of ``module`` are, or its buffers if it has none; CPU if it has neither."""
    first = next(chain(module.parameters(), module.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def resolve_device(name: str = "auto") -> torch.device:
    """Torch device of ``name``; ``auto`` is CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device '{name}': use auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device '{name}' asked for, but torch sees no CUDA device; use cpu or auto"
        )
    return device


def resolve_dtype(name: str) -> torch.dtype:
    """Torch number format of ``float32``, ``bfloat16`` or ``float16``."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise ConfigError(f"unknown number format '{name}': use {', '.join(_DTYPES)}") from None


class _Threads:
    """How many threads torch had before the first of those now inside :func:`one_thread`."""

    lock = Lock()
    inside = 0
    before = 1
    mine = local()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one CPU thread, for results that must not depend on how many a process has.

    Matrix products and factorisations split their sums over threads. Convolutions do not, and the
    networks' passes keep all threads. Several threads of a program may be inside at once, and enter
    again; each gets back the number that there was before the first came.
    """
    if getattr(_Threads.mine, "inside", False):
        yield
        return
    with _Threads.lock:
        if not _Threads.inside:
            _Threads.before = torch.get_num_threads()
        _Threads.inside += 1
        before = _Threads.before
        torch.set_num_threads(1)
    _Threads.mine.inside = True
    try:
        yield
    finally:
        _Threads.mine.inside = False
        with _Threads.lock:
            _Threads.inside -= 1
            torch.set_num_threads(before)
