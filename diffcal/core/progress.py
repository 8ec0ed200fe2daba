"""The progress bar: on stderr, on the main process only, calm when stderr is a file."""

import os
import sys
from typing import Any

from tqdm import tqdm

__all__ = ["progress_bar"]


def progress_bar(
    total: int, description: str, *, unit: str = "it", initial: int = 0
) -> "tqdm[Any]":
    """A ``tqdm`` bar to ``update(n)``; use it as a context manager.

    Silent on processes other than rank 0 of a launch and when ``DIFFCAL_PROGRESS=0``.
    """
    terminal = sys.stderr.isatty()
    silent = os.environ.get("RANK", "0") != "0" or os.environ.get("DIFFCAL_PROGRESS", "1") == "0"
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        initial=initial,
        file=sys.stderr,
        disable=silent,
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else 20.0,
    )
