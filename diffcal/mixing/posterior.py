"""Class posterior of features over all classes, calibrated on held-out images."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffcal.errors import ConfigError, DataError
from diffcal.mixing.annotator_base import Annotator, target_matrix
from diffcal.mixing.prototypes import ClassStatistics, FeatureBatches, class_statistics
from diffcal.mixing.temperature import fit_temperature, mean_log_loss, smoothed_targets

__all__ = ["KClassPosterior", "linear_discriminant", "whitening"]

SHRINKAGES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0)
PENALTIES = (1.0, 0.1, 0.01, 1e-3, 1e-4)
WHITENING_SHRINKAGE = 0.02
"""Of the space in which the logistic weights are found; it sets what the penalty means."""
CACHED_NUMBERS = 2**26
"""Training features of up to this many numbers are kept in memory between passes (256 MiB)."""
LEAST_VARIANCE = 1e-12
"""Relative to the mean variance: features that never change get this one."""


@dataclass(kw_only=True)
class KClassPosterior(Annotator):
    """``softmax((W (v - centre) + b) / T)`` over all classes, whatever classes were mixed.

    ``lda``: Gaussian classes with one covariance, shrunk towards its diagonal. ``logistic``:
    multinomial logistic regression with an L2 penalty in the whitened space, begun at the LDA.
    Shrinkage or penalty, and then the temperature T, minimise the log loss of held-out images (their
    targets smoothed by :func:`~diffcal.mixing.temperature.smoothed_targets`), whose classes are taken
    to be as frequent as in the training images.
    """

    name: ClassVar[str] = "kclass_posterior"
    all_classes: ClassVar[bool] = True

    method: Literal["lda", "logistic"] = "logistic"
    strength: float | None = None
    """Shrinkage in [0, 1], or penalty; chosen on held-out images if None."""
    prior: Literal["balanced", "data"] = "balanced"
    """Class frequencies that the posterior assumes: equal ones, or those of the real images."""
    iterations: int = 60
    """Largest number of quasi-Newton steps for each penalty."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("lda", "logistic"):
            raise ConfigError(f"method must be 'lda' or 'logistic', got '{self.method}'")
        if self.prior not in ("balanced", "data"):
            raise ConfigError(f"prior must be 'balanced' or 'data', got '{self.prior}'")
        if self.iterations < 1:
            raise ConfigError(f"iterations must be at least 1, got {self.iterations}")
        if self.strength is not None and not 0 <= self.strength <= (
            1 if self.method == "lda" else float("inf")
        ):
            raise ConfigError(f"strength {self.strength} is out of range for '{self.method}'")

    def logits(self, features: Tensor) -> Tensor:
        """Calibrated float64 logits ``[b, k]``; their softmax is the posterior."""
        weight = self._fitted("weight")
        shifted = self._checked(features, weight.shape[1]) - self._fitted("centre")
        scores = shifted @ weight.T + self._fitted("bias")
        return scores / self._fitted("temperature") + self._fitted("log_prior")

    def _annotate(self, features: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        return self.logits(features).softmax(dim=1)

    def _fit(self, train: FeatureBatches, held_out: FeatureBatches, num_classes: int) -> None:
        statistics = class_statistics(train, num_classes).require_classes()
        prior = (statistics.counts.double() / statistics.counts.sum()).log()
        centre = statistics.means.mean(dim=0)
        if self.method == "lda":
            shrinkages = SHRINKAGES if self.strength is None else (self.strength,)
            candidates = ((s, *linear_discriminant(statistics, s)) for s in shrinkages)
        else:
            penalties = PENALTIES if self.strength is None else (self.strength,)
            candidates = _logistic_path(train, statistics, prior, penalties, self.iterations)
        targets = [target_matrix(y, num_classes) for _, y in held_out]
        if not targets:
            raise DataError("no held-out images: the temperature must be set on unseen images")
        labels = torch.cat(targets)
        targets = smoothed_targets(labels)
        best = float("inf")
        for strength, weight, bias in candidates:
            # Held-out images come in the frequencies of the data, whatever the labels shall assume.
            scores = torch.cat([(f.double() - centre) @ weight.T for f, _ in held_out]) + bias
            temperature = fit_temperature(scores, targets, prior)
            logits = scores / temperature + prior
            loss = mean_log_loss(logits, targets)
            if loss < best:
                best = loss
                self.state |= {
                    "centre": centre,
                    "weight": weight,
                    "bias": bias,
                    "temperature": torch.tensor(temperature, dtype=torch.float64),
                    "log_prior": prior if self.prior == "data" else torch.zeros_like(prior),
                }
                hits = logits.argmax(dim=1) == labels.argmax(dim=1)
                self.report = {
                    "strength": float(strength),
                    "temperature": temperature,
                    "held_out_log_loss": loss,
                    "held_out_accuracy": float(hits.double().mean()),
                }


def whitening(statistics: ClassStatistics, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Matrix ``A`` [d, d] with ``A Σ̃ Aᵀ = I``, and the eigenvalues of the shrunk correlations.

    ``Σ̃`` is the pooled covariance with its correlations multiplied by ``1 - shrinkage``.
    """
    variances = statistics.variances
    floor = LEAST_VARIANCE * float(variances.mean()) + 1e-300
    deviation = variances.clamp(min=floor).sqrt()
    values, vectors = _spectrum(statistics, deviation)
    shrunk = (1 - shrinkage) * values.clamp(min=0) + max(shrinkage, 1e-10)
    return (vectors / shrunk.sqrt()).T / deviation, shrunk


def _spectrum(statistics: ClassStatistics, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of the correlations: the slow part, the same for every shrinkage."""
    known = statistics.spectrum
    if known is None:
        correlation = statistics.covariance / deviation[:, None] / deviation
        values, vectors = torch.linalg.eigh(correlation)
        known = statistics.spectrum = (values, vectors)
    return known


def linear_discriminant(statistics: ClassStatistics, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Weights ``[k, d]`` and biases ``[k]`` of the log posterior for equally likely classes.

    For features taken relative to the mean of the class means.

    Source: Friedman 1989, Regularized discriminant analysis, with one covariance.
    """
    matrix, _ = whitening(statistics, shrinkage)
    means = (statistics.means - statistics.means.mean(dim=0)) @ matrix.T
    return means @ matrix, -means.square().sum(dim=1) / 2


def _logistic_path(
    train: FeatureBatches,
    statistics: ClassStatistics,
    prior: Tensor,
    penalties: tuple[float, ...],
    iterations: int,
):
    """Solutions for falling penalties, each begun at the one before."""
    matrix, _ = whitening(statistics, WHITENING_SHRINKAGE)
    centre = statistics.means.mean(dim=0)
    count, dim = int(statistics.counts.sum()), len(centre)
    # In the whitened space the discriminant's weights are the class means; a fifth is a tame start.
    start = (statistics.means - centre) @ matrix.T
    bias = -start.square().sum(dim=1, keepdim=True) / 2
    parameters = (0.2 * torch.cat([start, bias], dim=1)).float().requires_grad_()
    whitener, log_prior = matrix.float(), prior.float()
    blocks = _Centred(train, centre)
    passes = list(blocks) if count * dim <= CACHED_NUMBERS else blocks

    for penalty in sorted(penalties, reverse=True):
        optimizer = torch.optim.LBFGS(
            [parameters],
            max_iter=iterations,
            history_size=12,
            tolerance_grad=1e-6,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )

        def closure(optimizer=optimizer, penalty=penalty):
            optimizer.zero_grad()
            # The weights are whitened rather than the features: d k numbers instead of d n.
            inner = (parameters[:, :-1].detach() @ whitener).requires_grad_()
            offset = (parameters[:, -1].detach() + log_prior).requires_grad_()
            loss = 0.0
            for features, labels in passes:
                logits = torch.addmm(offset, features, inner.T)
                part = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count
                part.backward()
                loss += part.item()
            assert inner.grad is not None
            assert offset.grad is not None
            gradient = inner.grad @ whitener.T + penalty * parameters[:, :-1].detach()
            parameters.grad = torch.cat([gradient, offset.grad[:, None]], dim=1)
            ridge = penalty / 2 * float(parameters[:, :-1].detach().square().sum())
            return torch.tensor(loss + ridge, dtype=torch.float64)

        optimizer.step(closure)
        solution = parameters.detach().double()
        yield penalty, solution[:, :-1] @ matrix, solution[:, -1]


class _Centred:
    """Float32 features relative to ``centre``, with their labels, in blocks of bounded memory."""

    def __init__(self, batches: FeatureBatches, centre: Tensor, size: int = 8192) -> None:
        self.batches, self.centre, self.size = batches, centre, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for features, labels in self.batches:
            for start in range(0, len(labels), self.size):
                rows = slice(start, start + self.size)
                yield (features[rows].double() - self.centre).float(), labels[rows]
