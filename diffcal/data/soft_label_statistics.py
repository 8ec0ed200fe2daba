"""Running statistics of soft labels and of re-estimated against requested mixing ratios."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

__all__ = ["SoftLabelStatistics"]

MAX_RATIOS = 33
"""Distinct requested ratios up to which each has its own row; beyond, tenths of [0, 1] have one."""
ENTROPY_FLOOR = 1e-300


@dataclass
class SoftLabelStatistics:
    """Sums over any number of images, in the memory of one batch; float64 throughout.

    Entropies are in nats. A requested ratio λ is the weight of the first class that an image was mixed
    from; the re-estimate λ̂ exists for pairs only.
    """

    num_classes: int
    images: int = 0
    _argmax: ndarray = field(init=False)
    _mass: ndarray = field(init=False)
    _sums: dict[str, float] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _exact: dict[float, ndarray] | None = field(default_factory=dict)
    _tenths: dict[float, ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._argmax = np.zeros(self.num_classes, np.int64)
        self._mass = np.zeros(self.num_classes, np.float64)

    def update(
        self,
        soft_labels: Float[ndarray, "b k"],
        first_classes: ndarray,
        ratios: ndarray,
        estimates: ndarray,
        quality: dict[str, ndarray],
    ) -> None:
        """Take in a batch.

        Args:
            soft_labels: Rows that sum to 1.
            first_classes: Class of each row that its ratio belongs to, integers ``[b]``.
            ratios: Requested weight of that class, ``[b]``.
            estimates: Re-estimated weight, NaN where there is none, ``[b]``.
            quality: Columns to average, floating, NaN for null, each ``[b]``.
        """
        labels = soft_labels.astype(np.float64)
        count = len(labels)
        entropy = -(labels * np.log(np.maximum(labels, ENTROPY_FLOOR))).sum(axis=1)
        top = np.sort(labels, axis=1)[:, ::-1]
        self.images += count
        self._argmax += np.bincount(labels.argmax(axis=1), minlength=self.num_classes)
        self._mass += labels.sum(axis=0)
        self._add("entropy", entropy)
        self._add("top_probability", top[:, 0])
        self._add("top_two_probability", top[:, :2].sum(axis=1))
        for name, values in quality.items():
            self._add(name, values.astype(np.float64))
        first = labels[np.arange(count), first_classes]
        ratios = ratios.astype(np.float64)
        self._add_ratios(ratios, estimates.astype(np.float64), first, entropy)

    def summary(self) -> dict[str, Any]:
        """Everything as plain numbers, ready for JSON; None where nothing was counted.

        ``ratios`` has a row for each requested λ, ascending: ``ratio`` (mean within the row),
        ``images``, ``estimates`` (images with a λ̂), their ``estimate_mean`` and ``estimate_sd``,
        and the mean ``first_class_probability`` and ``entropy``.
        """
        table = self._exact if self._exact is not None else self._tenths
        return {
            "images": self.images,
            "classes": self.num_classes,
            "images_per_class": self._argmax.tolist(),
            "mass_per_class": [round(float(value), 6) for value in self._mass],
            "means": {
                name: _rounded(self._sums[name] / count) if (count := self._counts[name]) else None
                for name in self._sums
            },
            "ratios": [_ratio_row(table[key]) for key in sorted(table)],
            "ratio_rows": "values" if self._exact is not None else "tenths",
        }

    def _add(self, name: str, values: ndarray) -> None:
        known = values[~np.isnan(values)]
        self._sums[name] = self._sums.get(name, 0.0) + float(known.sum())
        self._counts[name] = self._counts.get(name, 0) + len(known)

    def _add_ratios(
        self, ratios: ndarray, estimates: ndarray, first: ndarray, entropy: ndarray
    ) -> None:
        known = ~np.isnan(estimates)
        filled = np.where(known, estimates, 0.0)
        # images, Σλ, Σq, Σentropy, number of λ̂, Σλ̂, Σλ̂²
        columns = np.stack(
            [np.ones(len(ratios)), ratios, first, entropy, known, filled, filled**2], axis=1
        )
        _accumulate(self._tenths, np.minimum(np.floor(ratios * 10 + 1e-6), 9) / 10, columns)
        if self._exact is not None:
            _accumulate(self._exact, np.round(ratios, 5), columns)
        if self._exact is not None and len(self._exact) > MAX_RATIOS:
            self._exact = None  # a continuous distribution: memory must not grow with it


def _accumulate(table: dict[float, ndarray], keys: ndarray, columns: ndarray) -> None:
    values, inverse = np.unique(keys, return_inverse=True)
    sums = np.zeros((len(values), columns.shape[1]))
    np.add.at(sums, inverse, columns)
    for value, row in zip(values.tolist(), sums, strict=True):
        table[value] = table[value] + row if value in table else row


def _ratio_row(sums: ndarray) -> dict[str, Any]:
    count, ratio, first, entropy, estimates, total, squares = sums.tolist()
    mean = total / estimates if estimates else None
    variance = squares / estimates - mean**2 if mean is not None else None
    return {
        "ratio": _rounded(ratio / count),
        "images": int(count),
        "estimates": int(estimates),
        "estimate_mean": None if mean is None else _rounded(mean),
        "estimate_sd": None if variance is None else _rounded(math.sqrt(max(variance, 0.0))),
        "first_class_probability": _rounded(first / count),
        "entropy": _rounded(entropy / count),
    }


def _rounded(value: float) -> float:
    return round(float(value), 6)
