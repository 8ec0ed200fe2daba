"""Metrics of data that does not fit: constant memory, batch by batch, mergeable across processes."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.binned import ece_of_sums
from diffcal.calibration.metrics.binning import (
    BinSums,
    bin_sums,
    mass_edges,
    profile_bin_sums,
    width_edges,
)
from diffcal.calibration.metrics.classwise import class_width_sums
from diffcal.calibration.metrics.inputs import Predictions
from diffcal.calibration.metrics.profile import Profile
from diffcal.calibration.metrics.registry import MEASURES, harmonic_calibration_score
from diffcal.calibration.metrics.summary import COMMON_MEASURES
from diffcal.errors import ConfigError, DataError

__all__ = [
    "APPROXIMATE_MEASURES",
    "CalibrationAccumulator",
    "STREAMING_MEASURES",
    "values_of_state",
]

CELLS = 1 << 14
DEEPEST = 40.0  # halvings of 1 - confidence that the cells resolve

_SUMS = ("n", "confidence", "outcome", "outcome_square", "log_score", "brier", "brier_top")

APPROXIMATE_MEASURES = tuple(
    name
    for name in COMMON_MEASURES
    if (MEASURES[name].scheme == "mass" or MEASURES[name].of_profile is not None)
    and name not in ("accuracy", "confidence", "calibration_gap")
)
"""Measures computed from the histogram of confidences, see :class:`CalibrationAccumulator`."""

STREAMING_MEASURES = (
    *(name for name in COMMON_MEASURES if name not in ("sweep_ece", "noise_floor", "cw_ece")),
    "cw_ece",
    "hcs",
)
"""What :meth:`CalibrationAccumulator.compute` returns."""


class CalibrationAccumulator:
    """Sums from which the common measures follow, whatever the number of examples.

    Exact: accuracy, mean confidence, NLL, Brier scores, and all measures over equal-width bins, of
    the top label and of every class. Equal-mass, kernel and ranking measures come from a histogram
    of 16,384 cells (at most 1.3e-4 wide, and ever finer towards 1: 0.4 % of ``1 - c``) that keeps
    counts, mean confidences and outcomes of its cells; examples of one cell count as tied. Values
    then differ from the exact ones by the order of the cell width.

    All state is sums: ``merge`` adds another accumulator's, :meth:`all_reduce` those of the other
    processes, and the result does not depend on how the examples were split.

    Args:
        classes: Number of classes k.
        n_bins: Equal-width (and equal-mass) bins.
        device: Where the sums are kept.

    Raises:
        ConfigError: fewer than two classes or less than one bin.
    """

    def __init__(self, classes: int, n_bins: int = 15, device: torch.device | str = "cpu") -> None:
        if classes < 2 or n_bins < 1:
            raise ConfigError(f"need classes >= 2 and n_bins >= 1, got {classes} and {n_bins}")
        self.classes, self.n_bins = classes, n_bins
        self.state = {
            name: torch.zeros(shape, dtype=torch.float64, device=device)
            for name, shape in self.state_shapes(classes, n_bins).items()
        }

    @staticmethod
    def state_shapes(classes: int, n_bins: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the float64 tensors of :attr:`state`."""
        return {
            "sums": (len(_SUMS),),
            "top": (3, n_bins),
            "classwise": (3, classes, n_bins),
            "cells": (3, CELLS),
        }

    def __len__(self) -> int:
        return round(float(self.state["sums"][0]))

    def update(
        self,
        *,
        logits: Tensor | np.ndarray | None = None,
        probs: Tensor | np.ndarray | None = None,
        labels: Tensor | np.ndarray | None = None,
        soft_labels: Tensor | np.ndarray | None = None,
    ) -> None:
        """Take a batch of rows; arguments and errors as :class:`Predictions`."""
        self.add(Predictions(logits=logits, probs=probs, labels=labels, soft_labels=soft_labels))

    def add(self, predictions: Predictions) -> None:
        """Take a batch that is already checked.

        Raises:
            DataError: another number of classes.
        """
        if predictions.classes != self.classes:
            raise DataError(
                f"the accumulator has {self.classes} classes, the batch {predictions.classes}"
            )
        c, t = predictions.confidence, predictions.outcome
        state = self.state
        sums = [c, t, t.square(), predictions.log_score, predictions.brier, (c - t).square()]
        batch = torch.stack([c.new_tensor(float(len(c))), *(part.sum() for part in sums)])
        state["sums"] += batch.to(state["sums"])
        top = bin_sums(predictions, self.n_bins)
        state["top"] += torch.stack([top.count, top.confidence, top.outcome]).to(state["top"])
        classwise = torch.stack(class_width_sums(predictions, self.n_bins))
        state["classwise"] += classwise.to(state["classwise"])
        cell = _cell(c)
        cells = [torch.bincount(cell, weights=w, minlength=CELLS) for w in (c, t)]
        count = torch.bincount(cell, minlength=CELLS).double()
        state["cells"] += torch.stack([count, *cells]).to(state["cells"])

    def merge(self, other: "CalibrationAccumulator") -> None:
        """Add what ``other`` has seen.

        Raises:
            ConfigError: other classes or bins.
        """
        if (other.classes, other.n_bins) != (self.classes, self.n_bins):
            raise ConfigError(
                f"cannot merge {other.classes} classes and {other.n_bins} bins into "
                f"{self.classes} classes and {self.n_bins} bins"
            )
        for name, tensor in self.state.items():
            tensor += other.state[name].to(tensor)

    def all_reduce(self) -> None:
        """Sum over the processes of ``torch.distributed``; nothing to do without it."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for tensor in self.state.values():
                torch.distributed.all_reduce(tensor)

    def compute(self) -> dict[str, float]:
        """Measures by name (``STREAMING_MEASURES``) and ``n``.

        Raises:
            DataError: nothing was seen yet.
        """
        return values_of_state(self.state)


def values_of_state(state: Mapping[str, Tensor]) -> dict[str, float]:
    """The measures of an accumulator's state."""
    sums = dict(zip(_SUMS, state["sums"].tolist(), strict=True))
    n = sums["n"]
    if n == 0:
        raise DataError("no examples: metrics of an empty set are undefined")
    top = _sums(state["top"], n)
    profile = _profile(state["cells"])
    mass = profile_bin_sums(profile, mass_edges(profile, len(top.count)))
    accuracy = sums["outcome"] / n
    filled = top.filled
    resolution = (filled.weight * (filled.mean_outcome - accuracy).square()).sum()
    values = {
        "n": n,
        "accuracy": accuracy,
        "confidence": sums["confidence"] / n,
        "calibration_gap": (sums["confidence"] - sums["outcome"]) / n,
        "nll": sums["log_score"] / n,
        "brier": sums["brier"] / n,
        "brier_top": sums["brier_top"] / n,
        "brier_refinement": sums["outcome_square"] / n - accuracy**2 - float(resolution),
        "cw_ece": _classwise(state["classwise"], n),
        "hcs": harmonic_calibration_score(accuracy, float(ece_of_sums(top))),
    }
    for name in STREAMING_MEASURES:
        entry = MEASURES[name]
        if name in values:
            continue
        if entry.of_sums is not None:
            values[name] = float(entry.of_sums(mass if entry.scheme == "mass" else top))
        elif entry.of_profile is not None:
            values[name] = float(entry.of_profile(profile))
    return {name: values[name] for name in ("n", *STREAMING_MEASURES)}


def _sums(top: Float[Tensor, "3 m"], n: float) -> BinSums:
    return BinSums(width_edges(top.shape[1], top.device), top[0], top[1], top[2], round(n))


def _profile(cells: Float[Tensor, "3 m"]) -> Profile:
    count, confidence, hits = cells[:, cells[0] > 0]
    return Profile((confidence / count).clamp(max=1), count, hits)


def _classwise(cells: Float[Tensor, "3 k m"], n: float) -> float:
    return float((cells[1] - cells[2]).abs().sum() / n / cells.shape[1])


def _cell(c: Float[Tensor, " n"]) -> Tensor:
    # half of the cells evenly over [0, 1], half over the halvings of 1 - c
    halvings = torch.log2((1 - c).clamp(min=2**-DEEPEST)).neg_()
    place = (c + halvings / DEEPEST) / 2
    return (place * CELLS).to(torch.int64).clamp_(0, CELLS - 1)
