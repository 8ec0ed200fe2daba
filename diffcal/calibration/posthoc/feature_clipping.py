"""Feature Clipping: bound the inputs of the last linear layer before it makes logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffcal.calibration.posthoc.calibrator import Calibrator, Criterion, FitData, criterion_value
from diffcal.calibration.posthoc.last_layer import attach_clipping, linear_head
from diffcal.errors import ConfigError, DataError

__all__ = ["FeatureClipping", "LogitClipping", "clipped_entropy_change"]

HEAD_TOLERANCE = 1e-3
"""Largest difference between logits and head(features), relative to the largest logit."""


@dataclass(kw_only=True, eq=False)
class FeatureClipping(Calibrator):
    """``softmax(W clip(h, -c, c) + b)`` with the c that fits validation labels best.

    Needs the head (weight and bias): pass it with :meth:`with_head`, or read it from a model with
    :meth:`of_model`. c runs over a grid; only values whose validation accuracy exceeds
    ``min_accuracy_ratio`` times the accuracy without clipping are candidates; the first smallest
    criterion wins; if there is no candidate, c is infinite and nothing changes. Without that floor
    the ECE picks thresholds that destroy the classifier.

    ``grid="released"`` is 0.01, 0.02, ..., 20.00 of the released code; ``grid="quantile"``, the
    default, takes ``grid_size`` quantiles of |h| on validation and infinity, because the scale of
    features differs between networks by orders of magnitude.

    :meth:`attach` puts the fitted clipping into a model as a removable hook.

    Source: Tao, Dong and Xu 2025 (arXiv:2410.19796), section 3, and the released search.
    """

    criterion: Criterion = "nll"
    grid: Literal["quantile", "released"] = "quantile"
    grid_size: int = 200
    min_accuracy_ratio: float = 0.99
    n_bins: int = 15

    STATE: ClassVar = ("threshold_", "weight_", "bias_")
    needs_features: ClassVar = True
    gives_logits: ClassVar = True

    def _check_settings(self) -> None:
        self._head: tuple[Tensor, Tensor] | None = None
        if not 0 <= self.min_accuracy_ratio <= 1:
            raise ConfigError(
                f"min_accuracy_ratio must lie in [0, 1], got {self.min_accuracy_ratio}"
            )
        if self.grid_size < 1 or self.n_bins < 1:
            raise ConfigError("grid_size and n_bins must be at least 1")

    def with_head(
        self, weight: Float[Tensor, "k d"], bias: Float[Tensor, " k"]
    ) -> "FeatureClipping":
        """The calibrator itself, knowing the last linear layer."""
        self._head = (weight.detach().double().cpu(), bias.detach().double().cpu())
        return self

    def of_model(self, model: nn.Module, layer: str) -> "FeatureClipping":
        """The calibrator itself, knowing the linear layer of a model by its dotted name."""
        return self.with_head(*linear_head(model, layer))

    @property
    def threshold(self) -> float:
        """Fitted c; infinity where clipping does not help."""
        self._require_fitted()
        return float(self.threshold_)

    @property
    def preserves_argmax(self) -> bool:
        """False: clipping changes logits unequally."""
        return False

    def attach(self, model: nn.Module, layer: str) -> RemovableHandle:
        """Clip inside ``model`` at its linear ``layer`` until ``handle.remove()``."""
        return attach_clipping(model, layer, self.threshold)

    def _fit(self, data: FitData) -> None:
        if self._head is None:
            raise DataError("feature clipping needs the last layer: with_head(weight, bias) first")
        h, z = data.require_features(), data.logits
        weight, bias = (part.to(h) for part in self._head)
        if weight.shape != (z.shape[1], h.shape[1]) or bias.shape != (z.shape[1],):
            raise DataError(
                f"the head must be [{z.shape[1]}, {h.shape[1]}] and [{z.shape[1]}], "
                f"got {list(weight.shape)} and {list(bias.shape)}"
            )
        gap = float((h @ weight.T + bias - z).abs().max())
        if gap > HEAD_TOLERANCE * max(1.0, float(z.abs().max())):
            raise DataError(
                f"logits differ from head(features) by up to {gap:.3g}: "
                "features or head belong to another model"
            )
        if self.grid == "released":
            grid = _released_grid(0.01, 2000, float(h.abs().max()))
        else:
            levels = torch.linspace(0, 1, self.grid_size + 1, dtype=torch.float64)[1:]
            sizes = h.abs().flatten().sort().values
            ranks = (levels * (len(sizes) - 1)).round().long().to(sizes.device)
            grid = [c for c in sizes[ranks].unique().tolist() if c > 0]

        def clipped(c: float) -> Tensor:
            return h.clamp(-c, c) @ weight.T + bias

        chosen = constrained_minimum(
            data, clipped, grid, self.criterion, self.min_accuracy_ratio, self.n_bins, z
        )
        self.threshold_ = torch.tensor(chosen, dtype=torch.float64)
        self.weight_, self.bias_ = (part.cpu() for part in (weight, bias))

    def last_layer(
        self,
        features: Float[Tensor, "n d"],
        weight: Float[Tensor, "k d"],
        bias: Float[Tensor, " k"],
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The layer as it is, on clipped features."""
        self._require_fitted()
        c = self.threshold
        return features.clamp(-c, c), weight, bias

    def _logits(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        assert features is not None
        c = float(self.threshold_)
        changed = (features.abs() > c).any(dim=1, keepdim=True)
        if not bool(changed.any()):
            return z
        made = features.clamp(-c, c) @ self.weight_.T.to(features) + self.bias_.to(features)
        return torch.where(changed, made.to(z), z)  # rows that nothing clips stay bit for bit


@dataclass(kw_only=True, eq=False)
class LogitClipping(Calibrator):
    """``softmax(clip(z, -c, c))``, the search of :class:`FeatureClipping` on logits themselves.

    Thresholds start at the ``start`` quantile of validation logits and rise by 0.01 for 2,000 steps,
    as in the released peer library. Clipped top logits tie; that counts as their lowest index.
    """

    criterion: Criterion = "nll"
    start: float = 0.8
    min_accuracy_ratio: float = 0.95
    n_bins: int = 15

    STATE: ClassVar = ("threshold_",)
    gives_logits: ClassVar = True

    def _check_settings(self) -> None:
        if not 0 <= self.start <= 1 or not 0 <= self.min_accuracy_ratio <= 1:
            raise ConfigError("start and min_accuracy_ratio must lie in [0, 1]")

    @property
    def threshold(self) -> float:
        """Fitted c; infinity where clipping does not help."""
        self._require_fitted()
        return float(self.threshold_)

    @property
    def preserves_argmax(self) -> bool:
        """False: clipped logits tie."""
        return False

    def _fit(self, data: FitData) -> None:
        z = data.logits
        sizes = z.flatten().sort().values
        low = float(sizes[round(self.start * (len(sizes) - 1))])
        grid = [c for c in _released_grid(low, 2000, float(z.abs().max())) if c > 0]
        chosen = constrained_minimum(
            data,
            lambda c: z.clamp(-c, c),
            grid,
            self.criterion,
            self.min_accuracy_ratio,
            self.n_bins,
            z,
        )
        self.threshold_ = torch.tensor(chosen, dtype=torch.float64)

    def _logits(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        c = float(self.threshold_)
        return z.clamp(-c, c)


def constrained_minimum(
    data: FitData,
    logits_at: Callable[[float], Float[Tensor, "n k"]],
    grid: list[float],
    criterion: Criterion,
    min_accuracy_ratio: float,
    n_bins: int,
    unclipped: Float[Tensor, "n k"],
) -> float:
    """The first grid value with the smallest criterion among those that keep the accuracy.

    The value must beat every earlier one strictly, and its accuracy must exceed
    ``min_accuracy_ratio`` times that of the unclipped logits (or be that accuracy itself). Infinity
    if there is none, or if not clipping is strictly better.
    """
    targets = data.targets
    top = unclipped.argmax(dim=1)

    def accuracy(z: Tensor) -> float:
        return float(targets.gather(1, z.argmax(dim=1)[:, None]).mean())

    before = float(targets.gather(1, top[:, None]).mean())
    best, chosen = math.inf, math.inf
    for c in grid:
        z = logits_at(c)
        reached = accuracy(z)
        if not (reached > min_accuracy_ratio * before or reached == before):
            continue
        value = criterion_value(data, z.log_softmax(dim=1), criterion, n_bins)
        if value < best:
            best, chosen = value, c
    if criterion_value(data, unclipped.log_softmax(dim=1), criterion, n_bins) < best:
        return math.inf
    return chosen


def clipped_entropy_change(sigma: float, threshold: float) -> float:
    """Change of the entropy of ``max(0, N(0, σ²))`` by clipping at c, in nats.

    Entropy of the mixed law: atoms by ``-m ln m``, the density by ``-∫ f ln f``. It depends on the
    unit of the features (scaling both arguments adds ``-t ln s``), so it illustrates the argument of
    the paper and should decide nothing.
    """
    a = threshold / sigma
    t = 0.5 * math.erfc(a / math.sqrt(2))
    density = math.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    if t == 0:
        return 0.0
    return -t * (math.log(t) + 0.5 * math.log(2 * math.pi * sigma**2) + 0.5) - 0.5 * a * density


def _released_grid(first: float, steps: int, largest: float) -> list[float]:
    """``steps`` values from ``first`` by repeated addition of 0.01, as released code makes them.

    Ends with the first value that reaches ``largest``, from where on nothing is clipped.
    """
    values, c = [], first
    for _ in range(steps):
        values.append(c)
        if c >= largest:
            break
        c += 0.01
    return values
