"""Consistency Calibration at feature and at input level."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from diffcal.calibration.metrics.inputs import Predictions
from diffcal.calibration.posthoc.calibrator import (
    Calibrator,
    Criterion,
    FitData,
    NotFittedError,
    criterion_value,
)
from diffcal.calibration.posthoc.consistency_sampling import sampled_consistency, smoothed
from diffcal.calibration.posthoc.last_layer import linear_head
from diffcal.calibration.posthoc.scalar_search import smooth_minimum
from diffcal.core.rng import item_generator
from diffcal.errors import ConfigError, DataError

__all__ = ["FeatureConsistency", "InputConsistency", "input_consistency_counts"]

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class FeatureConsistency(Calibrator):
    """``P(argmax(W (h + eps n) + b) = k)`` for standard normal n, from logits and W alone.

    Gaussian feature noise is logit noise of covariance eps² W Wᵀ, so features themselves are not
    needed: at most k numbers per draw are mixed by a square root of that matrix. Two classes have the
    closed form ``Φ((z_1 - z_0)/(eps |w_1 - w_0|))``, which is used; more are sampled (smoothed counts
    of ``num_samples`` draws, the same draws for equal rows whatever the batch).

    Pass the last layer by :meth:`with_weight` or :meth:`of_model` before fitting. eps minimises the
    criterion on validation data, with ``fit_samples`` draws.

    Source: Tao et al. 2024 (arXiv:2410.12295), feature level; the reduction to logits is ours.
    """

    criterion: Criterion = "nll"
    num_samples: int = 1000
    fit_samples: int = 200
    smoothing: float | None = None
    n_bins: int = 15
    seed: int = 0

    STATE: ClassVar = ("epsilon_", "factor_")

    def _check_settings(self) -> None:
        self._weight: Tensor | None = None
        if min(self.num_samples, self.fit_samples, self.n_bins) < 1:
            raise ConfigError("num_samples, fit_samples and n_bins must be at least 1")
        if self.smoothing is not None and self.smoothing < 0:
            raise ConfigError(f"smoothing must not be negative, got {self.smoothing}")

    def with_weight(self, weight: Float[Tensor, "k d"]) -> "FeatureConsistency":
        """The calibrator itself, knowing the weight of the last linear layer."""
        self._weight = weight.detach().double().cpu()
        return self

    def of_model(self, model: nn.Module, layer: str) -> "FeatureConsistency":
        """The calibrator itself, knowing a model's linear layer by its dotted name."""
        return self.with_weight(linear_head(model, layer)[0])

    @property
    def epsilon(self) -> float:
        """Fitted noise scale, in units of the features."""
        self._require_fitted()
        return float(self.epsilon_)

    @property
    def preserves_argmax(self) -> bool:
        """False for more than two classes: noise of some logits may be larger."""
        return self._classes == 2

    def _fit(self, data: FitData) -> None:
        if self._weight is None:
            raise DataError("feature consistency needs the last layer: with_weight(weight) first")
        if len(self._weight) != data.classes:
            raise DataError(
                f"the weight has {len(self._weight)} rows, logits {data.classes} columns"
            )
        # noise common to all logits changes nothing: centring keeps the factor small
        centred = self._weight - self._weight.mean(dim=0)
        u, s, _ = torch.linalg.svd(centred, full_matrices=False)
        if float(s[0]) == 0:
            raise DataError(
                "all rows of the weight are equal: feature noise cannot change a winner"
            )
        self.factor_ = (u * s).T.contiguous()
        z = data.logits.cpu()
        top = z.topk(2, dim=1).values
        margin = float((top[:, 0] - top[:, 1]).median())
        spread = float(self.factor_.square().sum(dim=0).mean().sqrt())
        high = max(10 * margin, 0.1) / spread

        def loss(epsilon: float) -> float:
            p = self._consistency(z, epsilon, self.fit_samples)
            return criterion_value(data, p.to(data.logits).log(), self.criterion, self.n_bins)

        found, at_end = smooth_minimum(loss, high / 1000, high, tolerance=1e-2)
        if at_end:
            log.warning("noise scale %.4g lies at the end of the searched range", found)
        self.epsilon_ = torch.tensor(found, dtype=torch.float64)

    def _consistency(self, z: Tensor, epsilon: float, samples: int) -> Tensor:
        if z.shape[1] == 2:
            spread = float((self.factor_[:, 1] - self.factor_[:, 0]).norm())
            gap = (z[:, 1] - z[:, 0]) / (epsilon * spread)
            return torch.special.ndtr(torch.stack([-gap, gap], dim=1))
        return sampled_consistency(
            z,
            epsilon,
            num_samples=samples,
            smoothing=self.smoothing,
            seed=self.seed,
            factor=self.factor_,
        )

    def _probs(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        return self._consistency(z, self.epsilon, self.num_samples)


Perturbation = Callable[[Tensor, float, torch.Generator], Tensor]
"""``perturb(x, strength, generator)``: one changed copy of one input (no batch axis)."""


def gaussian_perturbation(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """``x`` plus normal noise of standard deviation ``strength``."""
    return x + strength * torch.randn(x.shape, generator=generator).to(x)


@torch.no_grad()
def input_consistency_counts(
    model: Callable[[Tensor], Tensor],
    inputs: Shaped[Tensor, "b ..."],
    strength: float,
    *,
    perturb: Perturbation = gaussian_perturbation,
    num_samples: int = 32,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = 256,
) -> Int[Tensor, "b k"]:
    """How often the model assigns each class to perturbed copies of each input.

    The noise of input i depends on (seed, ``first_index`` + i, sample), so results depend neither on
    ``batch_size`` nor on how a data set is split when ``first_index`` says where it starts. The model
    is called as it is: put it into evaluation mode.
    """
    counts: Tensor | None = None
    jobs = [(i, m) for i in range(len(inputs)) for m in range(num_samples)]
    for start in range(0, len(jobs), batch_size):
        part = jobs[start : start + batch_size]
        stream = "consistency-input"
        changed = torch.stack(
            [
                perturb(inputs[i], strength, item_generator(seed, f"{stream}-{m}", first_index + i))
                for i, m in part
            ]
        )
        winners = model(changed)
        if counts is None:
            shape = (len(inputs), winners.shape[1])
            counts = torch.zeros(shape, dtype=torch.int64, device=winners.device)
        rows = torch.tensor([i for i, _ in part], device=winners.device)
        flat = rows * counts.shape[1] + winners.argmax(dim=1)
        counts.view(-1).scatter_add_(0, flat, torch.ones_like(flat))
    if counts is None:
        raise DataError("no inputs to perturb")
    return counts


@dataclass(kw_only=True, eq=False)
class InputConsistency:
    """Consistency Calibration with perturbed inputs: ``num_samples`` forward passes per example.

    ``fit`` takes inputs and labels and chooses, among ``strengths``, the one whose smoothed shares
    have the lowest criterion. Not a :class:`Calibrator`, since it needs the model, not its logits.

    Source: Tao et al. 2024 (arXiv:2410.12295), input level.
    """

    model: Callable[[Tensor], Tensor]
    strengths: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    perturb: Perturbation = gaussian_perturbation
    criterion: Criterion = "nll"
    num_samples: int = 32
    smoothing: float | None = None
    seed: int = 0
    batch_size: int = 256
    n_bins: int = 15

    def __post_init__(self) -> None:
        self.strength = math.nan
        if not self.strengths or self.num_samples < 1:
            raise ConfigError("strengths must not be empty and num_samples at least 1")

    def fit(self, inputs: Shaped[Tensor, "b ..."], labels: Int[Tensor, " b"]) -> "InputConsistency":
        """The calibrator itself with the best strength.

        Raises:
            DataError: labels out of range or of another length, no inputs.
        """
        best = math.inf
        for strength in self.strengths:
            p = self._shares(inputs, strength, 0)
            data = FitData(Predictions(logits=p.log().clamp(min=-1e6), labels=labels))
            value = criterion_value(data, p.log(), self.criterion, self.n_bins)
            if value < best:
                best, self.strength = value, strength
        if math.isnan(self.strength):
            raise DataError(
                "the criterion is infinite for every strength: smooth the counts or draw more"
            )
        return self

    def predict_proba(
        self, inputs: Shaped[Tensor, "b ..."], *, first_index: int = 0
    ) -> Float[Tensor, "b k"]:
        """Smoothed shares of classes among perturbed copies, float64."""
        if math.isnan(self.strength):
            raise NotFittedError("InputConsistency is not fitted: call fit first")
        return self._shares(inputs, self.strength, first_index)

    def _shares(self, inputs: Tensor, strength: float, first_index: int) -> Tensor:
        counts = input_consistency_counts(
            self.model,
            inputs,
            strength,
            perturb=self.perturb,
            num_samples=self.num_samples,
            seed=self.seed,
            first_index=first_index,
            batch_size=self.batch_size,
        )
        return smoothed(counts, self.smoothing)
