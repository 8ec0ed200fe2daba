"""The versions that manifests carry."""

import platform

import torch

from diffcal import __version__

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Of diffcal, torch and Python."""
    return {
        "diffcal": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
