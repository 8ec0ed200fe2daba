"""Devices and number formats by name."""

import torch

from diffcal.errors import ConfigError

__all__ = ["resolve_device", "resolve_dtype"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
