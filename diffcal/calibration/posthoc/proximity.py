"""ProCal: calibration that knows how close an input is to the validation data."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from diffcal.calibration.posthoc.calibrator import Calibrator, FitData
from diffcal.calibration.posthoc.isotonic import IsotonicCalibration
from diffcal.calibration.posthoc.probability_map import with_top
from diffcal.errors import ConfigError, DataError

__all__ = ["DensityRatioCalibration", "ProximityBinning", "proximity"]

KERNEL_ELEMENTS = 1 << 22


def proximity(
    features: Float[Tensor, "b d"] | None,
    reference: Float[Tensor, "n d"],
    neighbours: int = 10,
    average_first: bool = False,
) -> Float[Tensor, " b"]:
    """Closeness of each feature to its nearest reference features, in (0, 1].

    The mean over the neighbours of ``exp(-d)``, with d the squared Euclidean distance of features
    scaled to unit length. ``features=None`` gives that of the reference examples themselves, each
    without itself. ``average_first`` gives ``exp(-mean d)``, which is what the documentation of the
    released code says it computes.

    Source: Xiong et al. 2023 (arXiv:2306.04590), section 3.
    """
    search = NearestNeighbors(n_neighbors=neighbours).fit(_unit(reference).cpu().numpy())
    queries = None if features is None else _unit(features).cpu().numpy()
    squared = torch.from_numpy(search.kneighbors(queries)[0]).to(reference).square()
    return (-squared.mean(dim=1)).exp() if average_first else (-squared).exp().mean(dim=1)


@dataclass(kw_only=True, eq=False)
class DensityRatioCalibration(Calibrator):
    """Confidence from the densities of (confidence, proximity) among right and wrong examples.

    ``conf' = f_right / (f_right + f_wrong n_wrong/n_right)``, each density a product of Gaussian
    kernels; the other classes are rescaled. ``bandwidth`` holds the widths for confidence and
    proximity; by default the normal reference rule ``1.06 σ n^(-1/6)`` for right and wrong examples
    apart. Where both densities vanish the confidence stays as it is.

    Source: Xiong et al. 2023 (arXiv:2306.04590), section 4.2.
    """

    neighbours: int = 10
    bandwidth: tuple[float, float] | None = None

    STATE: ClassVar = ("reference_", "points_", "right_", "bandwidths_")
    needs_features: ClassVar = True

    def _check_settings(self) -> None:
        if self.neighbours < 1:
            raise ConfigError(f"neighbours must be at least 1, got {self.neighbours}")
        if self.bandwidth is not None and min(self.bandwidth) <= 0:
            raise ConfigError(f"bandwidths must be positive, got {self.bandwidth}")

    @property
    def preserves_argmax(self) -> bool:
        """False: a confidence may fall below the other classes."""
        return False

    def _fit(self, data: FitData) -> None:
        h = data.require_features()
        _require_neighbours(len(h), self.neighbours + 1)
        near = proximity(None, h, self.neighbours)
        right = data.predictions.outcome
        if not 0 < float(right.sum()) < len(right):
            raise DataError("a density ratio needs right and wrong examples in the validation data")
        points = torch.stack([data.predictions.confidence, near], dim=1)
        if self.bandwidth is not None:
            widths = points.new_tensor([self.bandwidth, self.bandwidth])
        else:
            widths = torch.stack([_reference_width(points, w) for w in (right, 1 - right)])
        self.reference_, self.points_ = h.cpu(), points.cpu()
        self.right_, self.bandwidths_ = right.cpu(), widths.cpu()

    def _probs(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        assert features is not None
        p = z.softmax(dim=1)
        top, index = p.max(dim=1)
        near = proximity(features, self.reference_.to(features), self.neighbours)
        points = torch.stack([top, near.to(top)], dim=1)
        right, wrong = (
            self._kernel_sum(points, weight, width)
            for weight, width in zip((self.right_, 1 - self.right_), self.bandwidths_, strict=True)
        )
        # sums over examples are n_right f_right and n_wrong f_wrong: their ratio is the published one
        total = right + wrong
        confidence = torch.where(total > 0, right / total.clamp(min=1e-300), top)
        return with_top(p, index, confidence)

    def _kernel_sum(self, points: Tensor, weight: Tensor, width: Tensor) -> Tensor:
        known, weight, width = (a.to(points) for a in (self.points_, weight, width))
        sums = []
        for part in points.split(max(1, KERNEL_ELEMENTS // len(known))):
            distance = ((part[:, None] - known) / width).square().sum(dim=2)
            sums.append((-0.5 * distance).exp() @ weight)
        return torch.cat(sums) / width.prod()


@dataclass(kw_only=True, eq=False)
class ProximityBinning(Calibrator):
    """Bin-mean-shift: a pooled isotonic map within each quantile bin of proximity.

    ``n_bins`` bins of equal mass on validation proximities, 5 as in the released scripts. The pooled
    map takes the whole row, so that predictions stay (the released default feeds rows to a
    one-dimensional regression, which fails).

    Source: Xiong et al. 2023 (arXiv:2306.04590), section 4.3.
    """

    neighbours: int = 10
    n_bins: int = 5

    STATE: ClassVar = ("reference_", "edges_", "knots_", "values_", "ends_")
    needs_features: ClassVar = True

    def _check_settings(self) -> None:
        if self.neighbours < 1 or self.n_bins < 1:
            raise ConfigError("neighbours and n_bins must be at least 1")

    @property
    def preserves_argmax(self) -> bool:
        """True: the pooled map keeps the order within a row."""
        return True

    def _fit(self, data: FitData) -> None:
        h = data.require_features()
        _require_neighbours(len(h), max(self.neighbours + 1, self.n_bins))
        near = proximity(None, h, self.neighbours)
        inner = torch.linspace(0, 1, self.n_bins + 1, dtype=torch.float64)[1:-1].to(near)
        self.edges_ = torch.quantile(near, inner).unique().cpu()
        member = torch.bucketize(near, self.edges_.to(near))
        maps = []
        for b in range(len(self.edges_) + 1):
            rows = (member == b).nonzero()[:, 0]
            maps.append(IsotonicCalibration(scheme="pooled").fit_data(data.select(rows)))
        self.reference_ = h.cpu()
        self.knots_ = torch.cat([made.knots_ for made in maps])
        self.values_ = torch.cat([made.values_ for made in maps])
        self.ends_ = torch.tensor([len(made.knots_) for made in maps]).cumsum(0)

    def _probs(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        assert features is not None
        near = proximity(features, self.reference_.to(features), self.neighbours)
        member = torch.bucketize(near, self.edges_.to(near))
        out = torch.empty_like(z)
        starts = [0, *self.ends_[:-1].tolist()]
        for b, (start, stop) in enumerate(zip(starts, self.ends_.tolist(), strict=True)):
            rows = (member == b).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            made = IsotonicCalibration(scheme="pooled").load_state_dict(
                {
                    "sizes": torch.tensor([z.shape[1], 0]),
                    "knots_": self.knots_[start:stop],
                    "values_": self.values_[start:stop],
                    "ends_": torch.tensor([stop - start]),
                }
            )
            out[rows] = made.predict_proba(z[rows])
        return out


def _unit(features: Tensor) -> Tensor:
    norm = features.norm(dim=1, keepdim=True)
    if bool((norm == 0).any()):
        raise DataError("a feature row of zeros has no direction: proximity is undefined")
    return features / norm


def _require_neighbours(n: int, needed: int) -> None:
    if n < needed:
        raise DataError(f"needs at least {needed} validation examples, got {n}")


def _reference_width(points: Tensor, weight: Tensor) -> Tensor:
    n = weight.sum()
    mean = (weight[:, None] * points).sum(0) / n
    deviation = ((weight[:, None] * (points - mean).square()).sum(0) / n).sqrt()
    return (1.06 * deviation * n ** (-1 / 6)).clamp(min=1e-6)
