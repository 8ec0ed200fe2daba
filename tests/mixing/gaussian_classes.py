"""Classes that are Gaussian with one covariance: their posterior is known exactly."""

import torch

DOUBLE = torch.float64


class GaussianClasses:
    """``k`` classes in ``d`` dimensions with means Normal(0, spread²) and a common covariance."""

    def __init__(self, classes=4, dim=5, spread=0.8, isotropic=False, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.means = spread * self._normal(classes, dim)
        self.root = torch.eye(dim, dtype=DOUBLE)
        if not isotropic:
            self.root = self.root + 0.25 * self._normal(dim, dim)
        self.precision = torch.linalg.inv(self.root @ self.root.T)

    def _normal(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=DOUBLE)

    def draw(self, count, frequencies=None):
        """Features and labels; classes equally likely unless frequencies are given."""
        classes = len(self.means)
        shares = torch.ones(classes) if frequencies is None else torch.tensor(frequencies)
        labels = torch.multinomial(shares.double(), count, True, generator=self.generator)
        noise = self._normal(count, self.means.shape[1])
        return self.means[labels] + noise @ self.root.T, labels

    def between(self, count):
        """Features anywhere between and around the means."""
        weights = self._normal(count, len(self.means)).softmax(dim=1)
        return weights @ self.means + 0.5 * self._normal(count, self.means.shape[1])

    def posterior(self, features, log_prior=0.0):
        away = features[:, None] - self.means
        squared = torch.einsum("nkd,de,nke->nk", away, self.precision, away)
        return torch.softmax(log_prior - squared / 2, dim=1)


def batches(features, labels, size=500):
    """A list of batches, which can be iterated over again."""
    return list(zip(features.split(size), labels.split(size), strict=True))
