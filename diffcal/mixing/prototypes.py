"""Statistics of real features, streamed: class means, one shared covariance, counts."""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffcal.errors import DataError

__all__ = ["ClassStatistics", "FeatureBatches", "class_statistics"]

FeatureBatches = Iterable[tuple[Tensor, Tensor]]
"""Batches ``(features [b, d], labels int64 [b])`` that can be iterated over again, such as a list."""


class ClassStatistics:
    """Counts, means and the summed within-class scatter of features seen so far, in float64.

    Memory is C·d + d² numbers, however many images pass. Batches are merged by the pairwise update
    of Chan, Golub and LeVeque 1979, which keeps its digits where features lie far from zero.

    Args:
        num_classes: Number of classes C.
        dim: Length d of the features.
        covariance: False leaves out the d×d scatter, when only means and variances are wanted.
    """

    def __init__(self, num_classes: int, dim: int, *, covariance: bool = True) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.int64)
        self.means = torch.zeros(num_classes, dim, dtype=torch.float64)
        self.squares = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64) if covariance else None
        self.spectrum: tuple[Tensor, Tensor] | None = None
        """Eigenvalues and vectors of the correlations, once somebody computed them."""

    def update(self, features: Float[Tensor, "b d"], labels: Int64[Tensor, " b"]) -> None:
        """Add a batch.

        Raises:
            DataError: features of another length, labels out of range, values that are not finite.
        """
        classes, dim = self.means.shape
        if features.shape[1] != dim:
            raise DataError(f"features have length {features.shape[1]}, expected {dim}")
        if len(labels) == 0:
            return
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise DataError(
                f"labels run from {int(labels.min())} to {int(labels.max())}, but there are "
                f"{classes} classes"
            )
        self.spectrum = None
        features = features.double().cpu()
        labels = labels.cpu()
        if not bool(features.isfinite().all()):
            raise DataError("features hold NaN or infinite values")
        counts = torch.bincount(labels, minlength=classes)
        sums = torch.zeros_like(self.means).index_add_(0, labels, features)
        means = sums / counts.clamp(min=1)[:, None]
        centred = features - means[labels]
        total = self.counts + counts
        share = (self.counts * counts / total.clamp(min=1)).sqrt()[:, None]
        shift = share * (means - self.means)
        self.squares += centred.square().sum(dim=0) + shift.square().sum(dim=0)
        if self.scatter is not None:
            self.scatter += centred.T @ centred + shift.T @ shift
        self.means += (means - self.means) * (counts / total.clamp(min=1))[:, None]
        self.counts = total

    def require_classes(self, least: int = 2) -> "ClassStatistics":
        """Itself, if every class has at least ``least`` images.

        Raises:
            DataError: names the first class that has fewer.
        """
        few = (self.counts < least).nonzero()
        if len(few):
            index = int(few[0])
            raise DataError(
                f"class {index} has {int(self.counts[index])} real images; at least {least} of "
                "each class are needed to fit an annotator"
            )
        return self

    @property
    def freedom(self) -> int:
        """Degrees of freedom of the within-class covariance: images less classes."""
        return int(self.counts.sum()) - int((self.counts > 0).sum())

    @property
    def variances(self) -> Float[Tensor, " d"]:
        """Pooled within-class variance of each feature."""
        return self.squares / max(self.freedom, 1)

    @property
    def variance(self) -> float:
        """Pooled within-class variance, averaged over features: τ² of an isotropic model."""
        return float(self.variances.mean())

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Pooled within-class covariance.

        Raises:
            DataError: it was not collected.
        """
        if self.scatter is None:
            raise DataError("these statistics were collected without covariance")
        return self.scatter / max(self.freedom, 1)


def class_statistics(
    batches: FeatureBatches, num_classes: int, *, covariance: bool = True
) -> ClassStatistics:
    """Statistics of all ``batches``, in one pass.

    Raises:
        DataError: no batch, or a bad one (see :meth:`ClassStatistics.update`).
    """
    statistics: ClassStatistics | None = None
    for features, labels in batches:
        if statistics is None:
            statistics = ClassStatistics(num_classes, features.shape[1], covariance=covariance)
        statistics.update(features, labels)
    if statistics is None:
        raise DataError("no real features were given")
    return statistics
