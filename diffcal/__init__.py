"""diffcal: which training images made this image, and how sure may this classifier be?"""

from typing import Any

__all__ = ["__version__", "load_denoiser"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # torch and diffusers take seconds to import, so the public loader is resolved on first use.
    if name == "load_denoiser":
        from diffcal.diffusion.checkpoints import load_denoiser

        return load_denoiser
    raise AttributeError(f"module 'diffcal' has no attribute {name!r}")
