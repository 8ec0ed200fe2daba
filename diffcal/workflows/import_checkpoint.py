"""``diffcal checkpoints import``: an EDM pickle in, a checkpoint folder out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.edm_pickle import import_edm_pickle

__all__ = ["run"]


def run(
    path: Path | str,
    out: Path | str,
    sha256: str | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Import the pickle at ``path`` into the folder ``out``, then load it from there once.

    Nothing in the file is executed. Imported weights keep the licence of their source.

    Returns:
        Summary of :func:`diffcal.diffusion.edm_pickle.import_edm_pickle`, and the fingerprint of
        the denoiser as it loads from ``out``.

    Raises:
        CheckpointError, UnsafeCheckpointError: the file cannot or must not be read.
        ConfigError: class names do not fit.
        ArtifactError: ``out`` cannot be written, or holds something else.
    """
    summary = import_edm_pickle(path, out, sha256=sha256, class_names=class_names)
    return summary | {"fingerprint": load_denoiser(out).fingerprint}
