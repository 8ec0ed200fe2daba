"""Linear maps of logits or log-probabilities: vector, matrix and Dirichlet scaling."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor

from diffcal.calibration.posthoc.calibrator import Calibrator, FitData
from diffcal.calibration.posthoc.newton import minimise_newton
from diffcal.errors import ConfigError

__all__ = ["DirichletScaling", "MatrixScaling", "VectorScaling"]

NEWTON_CLASSES = 32
"""Classes up to which the matrix map is fitted by Newton steps; above, by L-BFGS."""


@dataclass(kw_only=True, eq=False)
class VectorScaling(Calibrator):
    """``softmax(w * x + b)``: a factor and an offset for each class, fitted by NLL.

    ``x`` are the logits, or with ``input="log_probs"`` their log-softmax. These are different
    models, as a factor per class is not blind to a common shift; netcal's multi-class logistic
    calibration is the second. ``b`` is centred, since a common offset changes nothing. Factors may
    come out negative.

    Source: Guo et al. 2017 (arXiv:1706.04599), section 4.2.
    """

    input: Literal["logits", "log_probs"] = "logits"
    bias: bool = True

    STATE: ClassVar = ("scale_", "bias_")
    gives_logits: ClassVar = True

    @property
    def preserves_argmax(self) -> bool:
        """False: classes are scaled differently."""
        return False

    def _fit(self, data: FitData) -> None:
        x = data.logits if self.input == "logits" else data.log_probs
        q, (n, k) = data.targets, x.shape

        def split(w: Tensor) -> tuple[Tensor, Tensor]:
            return w[:k], w[k:] if self.bias else torch.zeros_like(w[:k])

        def value(w: Tensor) -> float:
            a, b = split(w)
            return -float((q * (x * a + b).log_softmax(dim=1)).sum()) / n

        def objective(w: Tensor) -> tuple[float, Tensor, Tensor]:
            a, b = split(w)
            log_p = (x * a + b).log_softmax(dim=1)
            p = log_p.exp() * q.sum(dim=1, keepdim=True)
            rest = p - q
            parts = [p * x, p] if self.bias else [p * x]
            gradient = torch.cat([(rest * x).sum(0), rest.sum(0)][: len(parts)]) / n
            columns = torch.cat(parts, dim=1)
            hessian = -(columns.T @ (columns / q.sum(dim=1, keepdim=True)))
            i = torch.arange(k, device=x.device)
            hessian[i, i] += (p * x.square()).sum(0)
            if self.bias:
                hessian[i + k, i + k] += p.sum(0)
                cross = (p * x).sum(0)
                hessian[i, i + k] += cross
                hessian[i + k, i] += cross
            return -float((q * log_p).sum()) / n, gradient, hessian / n

        start = torch.cat([x.new_ones(k), x.new_zeros(k)])[: 2 * k if self.bias else k]
        a, b = split(minimise_newton(objective, start, value=value))
        self.scale_, self.bias_ = a.clone().cpu(), (b - b.mean()).cpu()

    def last_layer(
        self,
        features: Float[Tensor, "n d"],
        weight: Float[Tensor, "k d"],
        bias: Float[Tensor, " k"],
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The scaled layer; None for log-probabilities, which are not linear in the logits."""
        self._require_fitted()
        if self.input == "log_probs":
            return None
        scale = self.scale_.to(weight)
        return features, scale[:, None] * weight, scale * bias + self.bias_.to(bias)

    def _logits(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        x = z if self.input == "logits" else z.log_softmax(dim=1)
        return x * self.scale_.to(x) + self.bias_.to(x)


@dataclass(kw_only=True, eq=False)
class MatrixScaling(Calibrator):
    """``softmax(A z + b)`` with off-diagonal and intercept regularisation (ODIR).

    Minimises mean NLL + off_diagonal/(k(k-1)) Σ_{i≠j} A_ij² + intercept/k Σ b_i², which is convex,
    in float64: by Newton steps up to 32 classes, by L-BFGS above. Choose the two strengths by
    cross-validation (:func:`select_regularisation`); without any, k² + k parameters overfit.

    Source: Kull et al. 2019 (arXiv:1910.12656), section 4 and its released code for the scaling of
    the penalty; Guo et al. 2017 for the unregularised map.
    """

    off_diagonal: float = 1.0
    intercept: float = 1.0

    STATE: ClassVar = ("weight_", "bias_")
    gives_logits: ClassVar = True

    def _check_settings(self) -> None:
        for name in ("off_diagonal", "intercept"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def preserves_argmax(self) -> bool:
        """False: classes mix."""
        return False

    def _input(self, z: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        return z

    def _fit(self, data: FitData) -> None:
        x = self._input(data.logits)
        k = x.shape[1]
        problem = _MatrixProblem(x, data.targets, self.off_diagonal, self.intercept)
        start = torch.cat([torch.eye(k).to(x), x.new_zeros(k, 1)], dim=1).flatten()
        if k <= NEWTON_CLASSES:
            w = minimise_newton(problem.second_order, start, value=problem.value)
        else:
            w = problem.by_lbfgs(start)
        table = w.reshape(k, k + 1)
        self.weight_, self.bias_ = table[:, :k].clone().cpu(), table[:, k].clone().cpu()

    def objective(self, data: FitData) -> float:
        """The regularised objective at the fitted parameters."""
        table = torch.cat([self.weight_, self.bias_[:, None]], dim=1).flatten()
        x = self._input(data.logits)
        problem = _MatrixProblem(x, data.targets, self.off_diagonal, self.intercept)
        return problem.value(table.to(x))

    def last_layer(
        self,
        features: Float[Tensor, "n d"],
        weight: Float[Tensor, "k d"],
        bias: Float[Tensor, " k"],
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The product of both maps."""
        self._require_fitted()
        a = self.weight_.to(weight)
        return features, a @ weight, a @ bias + self.bias_.to(bias)

    def _logits(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        x = self._input(z)
        return x @ self.weight_.T.to(x) + self.bias_.to(x)


@dataclass(kw_only=True, eq=False)
class DirichletScaling(MatrixScaling):
    """:class:`MatrixScaling` of log-probabilities: ``softmax(A log p + b)``.

    Source: Kull et al. 2019 (arXiv:1910.12656), equation 3 (linear parametrisation).
    """

    def _input(self, z: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
        return z.log_softmax(dim=1)

    def last_layer(
        self,
        features: Float[Tensor, "n d"],
        weight: Float[Tensor, "k d"],
        bias: Float[Tensor, " k"],
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """None: log-probabilities are not linear in the logits."""
        self._require_fitted()
        return None


class _MatrixProblem:
    """The ODIR objective with its derivatives; parameters are [A | b] flattened."""

    def __init__(self, x: Tensor, q: Tensor, off_diagonal: float, intercept: float) -> None:
        n, k = x.shape
        self.n, self.k, self.q = n, k, q
        self.mass = q.sum(dim=1, keepdim=True)
        self.x = torch.cat([x, x.new_ones(n, 1)], dim=1)
        penalty = x.new_full((k, k + 1), off_diagonal / (k * (k - 1)))
        penalty[:, :k].fill_diagonal_(0)
        penalty[:, k] = intercept / k
        self.penalty = penalty

    def _log_p(self, w: Tensor) -> Tensor:
        return (self.x @ w.reshape(self.k, self.k + 1).T).log_softmax(dim=1)

    def value(self, w: Tensor) -> float:
        table = w.reshape(self.k, self.k + 1)
        nll = -float((self.q * self._log_p(w)).sum()) / self.n
        return nll + float((self.penalty * table.square()).sum())

    def first_order(self, w: Tensor) -> tuple[float, Tensor]:
        table = w.reshape(self.k, self.k + 1)
        log_p = self._log_p(w)
        gradient = (log_p.exp() * self.mass - self.q).T @ self.x / self.n
        value = -float((self.q * log_p).sum()) / self.n
        value += float((self.penalty * table.square()).sum())
        return value, (gradient + 2 * self.penalty * table).flatten()

    def second_order(self, w: Tensor) -> tuple[float, Tensor, Tensor]:
        value, gradient = self.first_order(w)
        p = self._log_p(w).exp()
        size = self.k + 1
        hessian = w.new_zeros(self.k * size, self.k * size)
        # rows in pieces: the outer products of p and x hold k (k + 1) numbers for every row
        step = max(1, (1 << 22) // (self.k * size))
        for start in range(0, self.n, step):
            rows = slice(start, start + step)
            columns = (p[rows, :, None] * self.x[rows, None, :]).flatten(1)
            hessian -= columns.T @ (columns * self.mass[rows])
        for i in range(self.k):
            block = slice(i * size, (i + 1) * size)
            hessian[block, block] += self.x.T @ (self.x * p[:, i : i + 1] * self.mass)
        hessian /= self.n
        hessian.diagonal().add_(2 * self.penalty.flatten())
        return value, gradient, hessian

    def by_lbfgs(self, start: Tensor) -> Tensor:
        def both(w: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = self.first_order(torch.from_numpy(w).to(self.x))
            return value, gradient.cpu().numpy()

        options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-8, "maxcor": 20}
        found = minimize(both, start.cpu().numpy(), jac=True, method="L-BFGS-B", options=options)
        return torch.from_numpy(found.x).to(self.x)
