"""Consistency Calibration at logit level: confidence as the share of perturbed logits that agree."""

import logging
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.posthoc.calibrator import Calibrator, Criterion, FitData, criterion_value
from diffcal.calibration.posthoc.consistency_exact import (
    LOG_CONSISTENCY,
    NoiseLaw,
    exact_consistency,
)
from diffcal.calibration.posthoc.consistency_gaussian import gaussian_consistency
from diffcal.calibration.posthoc.consistency_sampling import Aggregation, sampled_consistency
from diffcal.calibration.posthoc.scalar_search import coarse_to_fine, smooth_minimum
from diffcal.errors import ConfigError

__all__ = ["ConsistencyCalibration"]

log = logging.getLogger(__name__)

LOWEST = 1e-2
"""Smallest noise scale of a search."""


@dataclass(kw_only=True, eq=False)
class ConsistencyCalibration(Calibrator):
    """``c_k = P(argmax(z + eps n) = k)`` for random n, with the eps that fits validation labels.

    ``mode="exact"`` computes the probability
    (:func:`~diffcal.calibration.posthoc.consistency_exact.exact_consistency`): deterministic, keeps
    the argmax. ``mode="monte_carlo"`` draws ``num_samples`` perturbations of each row, as published;
    counts are smoothed. ``aggregation="mean"`` averages the softmax of the perturbed logits instead
    of counting winners, which only sampling offers. Gumbel noise is temperature scaling; Gaussian
    noise its probit counterpart; uniform noise gives certainty beyond a margin of eps, and exact
    zeros, so that its likelihood needs a ``floor``.

    eps minimises the criterion on validation data: ``nll`` and ``brier`` by a bounded search on the
    logarithm from 0.01 to ten times the median margin of the top two logits (on compact networks trained
    with a focal loss it gave a better likelihood and an ECE three points worse, see
    ``benchmarks/losses_on_cifar10.md``); ``ece``, as published,
    from coarse to fine up to three times the largest margin (the released range [0, 10] cuts off the
    best uniform eps of ordinary networks). A warning is logged if the best eps lies at an end.
    Counting with samples is fitted by its exact limit.

    Attributes:
        epsilon: The fitted noise scale.

    Source: Tao et al. 2024 (arXiv:2410.12295). Exact forms and the default criterion are ours; the
    released code samples, searches the ECE, and keeps the better of Gaussian and uniform.
    """

    noise: NoiseLaw = "gaussian"
    criterion: Criterion = "nll"
    mode: Literal["exact", "monte_carlo"] = "exact"
    aggregation: Aggregation = "consistency"
    num_samples: int = 1000
    smoothing: float | None = None  # pseudo-count of a class; None is 1/k
    floor: float = 0.0  # smallest probability of the exact uniform law
    n_bins: int = 15
    seed: int = 0

    STATE: ClassVar = ("epsilon_",)
    single_precision: ClassVar = True
    block_elements: ClassVar = 1 << 22  # the exact form makes blocks of its own

    def _check_settings(self) -> None:
        if self.aggregation == "mean" and self.mode == "exact":
            raise ConfigError("aggregation='mean' has no closed form: use mode='monte_carlo'")
        if self.num_samples < 1 or self.n_bins < 1:
            raise ConfigError("num_samples and n_bins must be at least 1")
        if self.smoothing is not None and self.smoothing < 0:
            raise ConfigError(f"smoothing must not be negative, got {self.smoothing}")
        if not 0 <= self.floor < 0.5:
            raise ConfigError(f"floor must lie in [0, 0.5), got {self.floor}")
        if self.noise == "uniform" and self.criterion == "nll" and self.floor == 0:
            raise ConfigError(
                "uniform noise gives probabilities of exactly 0, whose NLL is infinite: "
                "set floor (as 1e-4), or use criterion='ece' or 'brier'"
            )

    @property
    def epsilon(self) -> float:
        """Fitted noise scale, in units of the logits."""
        self._require_fitted()
        return float(self.epsilon_)

    @property
    def preserves_argmax(self) -> bool:
        """True for the exact forms; sampling can break close calls either way."""
        return self.mode == "exact"

    def _fit(self, data: FitData) -> None:
        z = data.logits
        top = z.topk(2, dim=1).values
        margin = top[:, 0] - top[:, 1]
        exact = self.aggregation == "consistency"

        def loss(epsilon: float) -> float:
            log_p = self._exact_log(z, epsilon) if exact else self._sampled(z, epsilon).log()
            return criterion_value(data, log_p, self.criterion, self.n_bins)

        if self.criterion == "ece":
            found, at_end = coarse_to_fine(loss, max(3 * float(margin.max()), LOWEST))
        else:
            high = max(10 * float(margin.median()), 10 * LOWEST)
            tolerance = 1e-9 if exact else 1e-2  # samples make a rough loss
            found, at_end = smooth_minimum(loss, LOWEST, high, tolerance=tolerance)
        if at_end:
            log.warning("noise scale %.4g lies at the end of the searched range", found)
        self.epsilon_ = torch.tensor(found, dtype=torch.float64)

    def _exact_log(self, z: Tensor, epsilon: float) -> Tensor:
        blocks = [
            LOG_CONSISTENCY[self.noise](z[rows], epsilon) for rows in self._row_blocks(*z.shape)
        ]
        log_p = torch.cat(blocks)
        return self._floored(log_p.exp()).log() if self.floor > 0 else log_p

    def _floored(self, p: Tensor) -> Tensor:
        return (1 - self.floor * p.shape[1]) * p + self.floor if self.floor > 0 else p

    def _sampled(self, z: Tensor, epsilon: float) -> Tensor:
        return sampled_consistency(
            z,
            epsilon,
            noise=self.noise,
            num_samples=self.num_samples,
            aggregation=self.aggregation,
            smoothing=self.smoothing,
            seed=self.seed,
        )

    def _probs(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        if self.mode == "monte_carlo":
            return self._sampled(z, self.epsilon).to(z.dtype)
        return self._floored(exact_consistency(z, self.epsilon, self.noise))

    def _write_probs(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None, out: Tensor
    ) -> None:
        if self.mode == "exact" and self.noise == "gaussian" and self.floor == 0:
            gaussian_consistency(z, self.epsilon, out=out)  # fresh memory in between costs a fifth
        else:
            super()._write_probs(z, features, out)

    def _logits(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        if self.mode == "monte_carlo" or self.floor > 0:
            return self._probs(z, features).log()
        return LOG_CONSISTENCY[self.noise](z, self.epsilon)
