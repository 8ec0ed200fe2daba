"""The measures as torchmetrics modules, for Lightning and metric collections.

Needs torchmetrics (``pip install diffcal[peers]``). Inputs are declared, not guessed, and states are
float64 sums, so that a value does not depend on batches or processes.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from diffcal.calibration.metrics.streaming import (
    STREAMING_MEASURES,
    CalibrationAccumulator,
    values_of_state,
)
from diffcal.errors import ConfigError, MissingExtraError

try:
    from torchmetrics import Metric
except ImportError as error:
    raise MissingExtraError(
        "torchmetrics is not installed: pip install 'diffcal[peers]'"
    ) from error

__all__ = ["CalibrationMetric", "CalibrationSummaryMetric"]


class CalibrationSummaryMetric(Metric):
    """All streaming measures as a dict of float64 scalars.

    ``update(preds, target)`` takes logits or probabilities ``[n, k]``, as ``input`` says, and integer
    labels ``[n]`` or floating soft labels ``[n, k]``. Values agree with
    :class:`~diffcal.calibration.metrics.streaming.CalibrationAccumulator`, whose docstring says which
    are exact.

    Raises:
        ConfigError: unknown ``input``, classes or bins.
    """

    is_differentiable = False
    full_state_update = False
    sums: Tensor
    top: Tensor
    classwise: Tensor
    cells: Tensor

    def __init__(
        self,
        classes: int,
        input: Literal["logits", "probs"] = "logits",
        n_bins: int = 15,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if input not in ("logits", "probs"):
            raise ConfigError(f"input must be 'logits' or 'probs', got '{input}'")
        self.classes, self.n_bins, self.input = classes, n_bins, input
        CalibrationAccumulator(classes, n_bins)  # checks the arguments
        for name, shape in CalibrationAccumulator.state_shapes(classes, n_bins).items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Take a batch."""
        batch = CalibrationAccumulator(self.classes, self.n_bins, preds.device)
        kind = "soft_labels" if target.is_floating_point() else "labels"
        batch.update(**{self.input: preds, kind: target})
        for name, tensor in batch.state.items():
            setattr(self, name, getattr(self, name) + tensor)

    def compute(self) -> Any:
        """Measures by name."""
        values = values_of_state(self._sums())
        return {
            name: torch.tensor(value, dtype=torch.float64, device=self.sums.device)
            for name, value in values.items()
        }

    def _sums(self) -> dict[str, Tensor]:
        names = CalibrationAccumulator.state_shapes(self.classes, self.n_bins)
        return {name: getattr(self, name) for name in names}


class CalibrationMetric(CalibrationSummaryMetric):
    """One measure by name (see ``STREAMING_MEASURES``), as a float64 scalar.

    Raises:
        ConfigError: the measure does not stream.
    """

    def __init__(
        self,
        classes: int,
        measure: str = "ece",
        input: Literal["logits", "probs"] = "logits",
        n_bins: int = 15,
        **kwargs: Any,
    ) -> None:
        super().__init__(classes, input, n_bins, **kwargs)
        if measure not in STREAMING_MEASURES:
            raise ConfigError(
                f"measure '{measure}' does not stream; use one of {', '.join(STREAMING_MEASURES)}"
            )
        self.measure = measure

    def compute(self) -> Any:
        """The measure."""
        return super().compute()[self.measure]
