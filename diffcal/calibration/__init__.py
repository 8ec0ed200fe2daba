"""Losses, post-hoc methods, metrics and plots for calibration.

The names that most scripts need are here: ``build_loss``, ``build_calibrator``, ``calibration_summary``,
``measure`` and ``Predictions``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffcal.calibration.losses.registry import build_loss
    from diffcal.calibration.metrics.inputs import Predictions
    from diffcal.calibration.metrics.summary import calibration_summary, measure
    from diffcal.calibration.posthoc.registry import build_calibrator

__all__ = ["Predictions", "build_calibrator", "build_loss", "calibration_summary", "measure"]

_HOMES = {
    "Predictions": "metrics.inputs",
    "build_calibrator": "posthoc.registry",
    "build_loss": "losses.registry",
    "calibration_summary": "metrics.summary",
    "measure": "metrics.summary",
}


def __getattr__(name: str) -> Any:
    # Resolved on first use: a loss needs none of the modules of the metrics, nor the other way round.
    if name in _HOMES:
        return getattr(import_module(f"diffcal.calibration.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'diffcal.calibration' has no attribute {name!r}")
