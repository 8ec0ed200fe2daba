"""Annotators that stay within the mixed classes: ratio, projection on the line of a pair, simplex."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from diffcal.errors import ConfigError, DataError
from diffcal.mixing.annotator_base import Annotator, pairs_of, support_mask, target_matrix
from diffcal.mixing.logistic import fit_logistic_slope, fit_logistics
from diffcal.mixing.posterior import KClassPosterior, whitening
from diffcal.mixing.projection import pair_labels, pair_projection, simplex_weights_of_classes
from diffcal.mixing.prototypes import ClassStatistics, FeatureBatches, class_statistics

__all__ = [
    "KClassProjection",
    "ProjectionIsotonic",
    "ProjectionSigmoid",
    "ProjectionSlope",
    "Ratio",
]

WHITENING_SHRINKAGE = 0.1
POINTS = 1_000_000
"""At most this many (image, pair) points enter an isotonic fit, or one batch of logistic ones."""


@dataclass(kw_only=True)
class Ratio(Annotator):
    """The mixing weights themselves, without looking at the image: mixup's labels."""

    name: ClassVar[str] = "ratio"
    all_classes: ClassVar[bool] = False

    def _fit(self, train: FeatureBatches, held_out: FeatureBatches, num_classes: int) -> None:
        pass

    def _annotate(self, features: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        labels = torch.zeros(len(classes), self.num_classes, dtype=torch.float64)
        shares = torch.where(classes >= 0, weights, 0.0).double()
        return labels.scatter_add_(1, classes.clamp(min=0), shares)


@dataclass(kw_only=True)
class _Projection(Annotator):
    """What the annotators on the line between two prototypes share."""

    all_classes: ClassVar[bool] = False

    def _ratio(self, features: Tensor, pairs: Tensor) -> Tensor:
        prototypes = self._fitted("prototypes")
        features = self._checked(features, prototypes.shape[1])
        return pair_projection(features, prototypes[pairs[:, 0]], prototypes[pairs[:, 1]])


@dataclass(kw_only=True)
class ProjectionSigmoid(_Projection):
    """``sigmoid(s (λ̂ - 1/2))`` for the first class of the pair, with one s for all pairs.

    Source: the released form of Luo et al. 2025 (arXiv:2504.13548): s = 4 for CIFAR-10 and
    Tiny-ImageNet, 2.3 for CIFAR-100.
    """

    name: ClassVar[str] = "projection_sigmoid"

    slope: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.slope > 0:
            raise ConfigError(f"slope must be positive, got {self.slope}")

    def _fit(self, train: FeatureBatches, held_out: FeatureBatches, num_classes: int) -> None:
        statistics = class_statistics(train, num_classes, covariance=False).require_classes(1)
        self.state["prototypes"] = statistics.means

    def _annotate(self, features: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        pairs = pairs_of(classes)
        share = torch.sigmoid(self.slope * (self._ratio(features, pairs) - 0.5))
        return pair_labels(share, pairs, self.num_classes)


@dataclass(kw_only=True)
class ProjectionSlope(_Projection):
    """``sigmoid(s_pair (λ̂ - 1/2) + b_pair)``: each pair has the slope that its classes deserve.

    ``isotropic``: ``s = ‖δ‖² / τ²`` with the pooled variance τ², the exact posterior of spherical
    Gaussian classes. ``direction``: the variance along δ instead of the mean one. ``logistic``: slope
    and offset fitted on held-out images of the two classes, drawn towards one multiple of
    ``direction`` for all pairs, and that multiple towards 1. Real images are nearly all pure, so any
    slope is carried over from the ends to the middle; people's shares as held-out targets mend that.
    """

    name: ClassVar[str] = "projection_slope"

    method: Literal["isotropic", "direction", "logistic"] = "logistic"
    strength: float = 20.0
    """``logistic``: weight of the common slope against a pair's own, in images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("isotropic", "direction", "logistic"):
            raise ConfigError(
                f"method must be 'isotropic', 'direction' or 'logistic', got '{self.method}'"
            )
        if not self.strength > 0:
            raise ConfigError(f"strength must be positive, got {self.strength}")

    def _fit(self, train: FeatureBatches, held_out: FeatureBatches, num_classes: int) -> None:
        statistics = class_statistics(train, num_classes, covariance=self.method != "isotropic")
        statistics.require_classes()
        self.state["prototypes"] = statistics.means
        slopes = _gaussian_slopes(statistics, isotropic=self.method == "isotropic")
        offsets = torch.zeros_like(slopes)
        if self.method == "logistic":
            slopes, offsets = self._fit_pairs(slopes, held_out, num_classes)
        self.state |= {"slopes": slopes, "offsets": offsets}

    def _fit_pairs(
        self, slopes: Tensor, held_out: FeatureBatches, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        squared, targets = _distances(held_out, self.state["prototypes"], num_classes)
        unit = slopes / (2 * _gaps(self.state["prototypes"]))
        pairs = torch.combinations(torch.arange(num_classes))
        # Σ t_i log p + t_j log(1 - p) over images: those of class i count for it, those of j against.
        rows, present = _rows_of_classes(targets > 0)

        def points(chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            i, j = chosen[:, :1], chosen[:, 1:]
            images = torch.cat([rows[chosen[:, 0]], rows[chosen[:, 1]]], dim=1)
            odds = unit[i, j] * (squared[images, j] - squared[images, i])
            half = rows.shape[1]
            weight = torch.cat([targets[images[:, :half], i], targets[images[:, half:], j]], dim=1)
            weight *= torch.cat([present[chosen[:, 0]], present[chosen[:, 1]]], dim=1)
            first = (torch.arange(2 * half) < half).double().expand_as(odds)
            return odds, first, weight

        width = 2 * rows.shape[1]
        stride = -(-len(pairs) * width // POINTS)
        common = fit_logistic_slope(
            *(part.reshape(-1) for part in points(pairs[::stride])), strength=self.strength
        )
        self.report["common_slope"] = common
        fitted, offsets = slopes * common, torch.zeros_like(slopes)
        for chosen in pairs.split(max(POINTS // width, 1)):
            slope, offset = fit_logistics(*points(chosen), slope=common, strength=self.strength)
            i, j = chosen.T
            # A negative slope would say that images nearer to a class belong to it less.
            fitted[i, j] = fitted[j, i] = slopes[i, j] * slope.clamp(min=0)
            offsets[i, j], offsets[j, i] = offset, -offset
        return fitted, offsets

    def _annotate(self, features: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        pairs = pairs_of(classes)
        slope = self._fitted("slopes")[pairs[:, 0], pairs[:, 1]]
        offset = self._fitted("offsets")[pairs[:, 0], pairs[:, 1]]
        share = torch.sigmoid(slope * (self._ratio(features, pairs) - 0.5) + offset)
        return pair_labels(share, pairs, self.num_classes)


@dataclass(kw_only=True)
class ProjectionIsotonic(_Projection):
    """A rising curve from λ̂ to the share of the first class, the same for all pairs.

    The curve is fitted to what held-out images say between the classes: people's label shares if the
    held-out targets are soft, else the calibrated posterior of ``kclass_posterior`` (hard labels would
    give a step). It is symmetric, so that swapping a pair swaps the label.
    """

    name: ClassVar[str] = "projection_isotonic"

    method: Literal["lda", "logistic"] = "logistic"
    """Of the posterior that stands in for people's shares."""

    def _fit(self, train: FeatureBatches, held_out: FeatureBatches, num_classes: int) -> None:
        statistics = class_statistics(train, num_classes, covariance=False).require_classes(2)
        self.state["prototypes"] = statistics.means
        squared, targets = _distances(held_out, statistics.means, num_classes)
        if bool(((targets == 0) | (targets == 1)).all()):
            reference = KClassPosterior(method=self.method)
            reference.fit(train, held_out, num_classes)
            targets = torch.cat(
                [reference.logits(features).softmax(dim=1) for features, _ in held_out]
            )
        gaps = _gaps(statistics.means)
        top = targets.argmax(dim=1, keepdim=True)
        other = torch.arange(num_classes).expand(len(top), -1)
        weight = targets.gather(1, top) + targets
        ratio = 0.5 + (squared - squared.gather(1, top)) / (2 * gaps[top, other])
        share = targets.gather(1, top) / weight
        keep = other != top
        stride = -(-int(keep.sum()) // POINTS)
        points = [values[keep][::stride].numpy() for values in (ratio, share, weight)]
        self.state["knots"], self.state["shares"] = _isotonic(*points)

    def _annotate(self, features: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        pairs = pairs_of(classes)
        share = np.interp(
            self._ratio(features, pairs).numpy(),
            self._fitted("knots").numpy(),
            self._fitted("shares").numpy(),
        )
        return pair_labels(torch.from_numpy(share), pairs, self.num_classes)


@dataclass(kw_only=True)
class KClassProjection(Annotator):
    """Weights of the mix of prototypes that lies nearest to the image: non-negative, summing to 1."""

    name: ClassVar[str] = "kclass_projection"
    all_classes: ClassVar[bool] = False

    support: Literal["all", "mixed"] = "all"
    """Whose prototypes may be used: all classes', or only those that were mixed."""
    whiten: bool = False
    """Measure distance in units of the within-class covariance rather than of the features."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.support not in ("all", "mixed"):
            raise ConfigError(f"support must be 'all' or 'mixed', got '{self.support}'")

    def _fit(self, train: FeatureBatches, held_out: FeatureBatches, num_classes: int) -> None:
        statistics = class_statistics(train, num_classes, covariance=self.whiten)
        statistics.require_classes(2 if self.whiten else 1)
        self.state["prototypes"] = statistics.means
        if self.whiten:
            self.state["whitening"] = whitening(statistics, WHITENING_SHRINKAGE)[0]

    def _annotate(self, features: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        prototypes = self._fitted("prototypes")
        features = self._checked(features, prototypes.shape[1])
        if self.whiten:
            matrix = self._fitted("whitening").T
            features, prototypes = features @ matrix, prototypes @ matrix
        allowed = torch.ones(len(features), len(prototypes), dtype=torch.bool)
        if self.support == "mixed":
            allowed = support_mask(classes, self.num_classes)
        return simplex_weights_of_classes(features, prototypes, allowed)


def _gaussian_slopes(statistics: ClassStatistics, *, isotropic: bool) -> Tensor:
    """Log-odds per unit of λ̂ of every pair, if classes are Gaussian; 0 on the diagonal."""
    means = statistics.means
    squared = _gaps(means).fill_diagonal_(0)
    if isotropic:
        return squared / max(statistics.variance, 1e-300)
    inner = means @ statistics.covariance @ means.T
    own = inner.diagonal()
    along = (own[:, None] + own[None, :] - 2 * inner).clamp(min=1e-300)  # δᵀ Σ δ
    return squared.square() / along


def _gaps(prototypes: Tensor) -> Tensor:
    """Squared distances between all prototypes; 1 on the diagonal, which nobody divides by in earnest.

    Raises:
        DataError: two classes share a prototype.
    """
    gaps = torch.cdist(prototypes, prototypes, compute_mode="donot_use_mm_for_euclid_dist").square()
    gaps.fill_diagonal_(1)
    if bool((gaps == 0).any()):
        first, second = (gaps == 0).nonzero()[0].tolist()
        raise DataError(
            f"classes {first} and {second} have the same prototype, so nothing lies between them"
        )
    return gaps


def _rows_of_classes(member: Tensor) -> tuple[Tensor, Tensor]:
    """Indices ``[k, m]`` of the rows of each class, and which of them are no padding."""
    counts = member.sum(dim=0)
    order = member.T.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    width = max(int(counts.max()), 1)
    return order[:, :width], torch.arange(width) < counts[:, None]


def _distances(
    held_out: FeatureBatches, prototypes: Tensor, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Squared distances of held-out images to all prototypes, and their targets ``[n, k]``."""
    squared, targets = [], []
    for features, labels in held_out:
        mode = "donot_use_mm_for_euclid_dist"  # the other one cancels where features lie far away
        squared.append(torch.cdist(features.double(), prototypes, compute_mode=mode).square())
        targets.append(target_matrix(labels, num_classes))
    if not squared:
        raise DataError("no held-out images: slopes must be set on unseen images")
    return torch.cat(squared), torch.cat(targets)


def _isotonic(ratio: np.ndarray, share: np.ndarray, weight: np.ndarray) -> tuple[Tensor, Tensor]:
    """Knots and values of the symmetric rising curve of least weighted squared error."""
    from sklearn.isotonic import IsotonicRegression

    curve = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(
        np.concatenate([ratio, 1 - ratio]),
        np.concatenate([share, 1 - share]),
        np.concatenate([weight, weight]),
    )
    return (
        torch.from_numpy(np.asarray(curve.X_thresholds_, dtype=np.float64)),
        torch.from_numpy(np.asarray(curve.y_thresholds_, dtype=np.float64)),
    )
