"""How one sample is given several classes: mixed conditions, mixed scores, or one after the other."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcal.core.tensors import append_dims
from diffcal.diffusion.denoisers import Denoiser
from diffcal.diffusion.guidance import Denoise, guided
from diffcal.errors import ConfigError, DataError
from diffcal.mixing.interpolation import Interpolation, interpolate_conditions
from diffcal.mixing.weights import check_weights

__all__ = [
    "ConditionConfig",
    "MixMode",
    "MixedScores",
    "ScheduledClasses",
    "mixed_denoiser",
]

MixMode = Literal["label", "embedding", "score", "schedule"]


@dataclass(frozen=True, kw_only=True)
class ConditionConfig:
    """How weights over classes become conditions.

    Raises:
        ConfigError: an unknown mode or interpolation, or an empty range.
    """

    mode: MixMode = "label"
    """``label``: the denoiser's own condition of the weights (CSM; for text models the weighted
    prompt embeddings). ``embedding``: conditions of the pure classes, combined by
    ``interpolation``. ``score``: ``sum_k w_k D(x; sigma, k)``. ``schedule``: the classes take
    turns, from large noise levels to small ones."""
    interpolation: Interpolation = "linear"
    """Mode embedding only: see :func:`~diffcal.mixing.interpolation.interpolate_conditions`."""
    schedule_range: tuple[float, float] = (0.2, 20.0)
    """Mode schedule only: the noise levels (low, high) between which classes change. Each class
    has the share of the range, in ln sigma, that is its weight; equal ends switch a mixed sample
    from its first to its last class at that level."""
    rows_per_call: int | None = None
    """Mode score only: evaluate exactly this many rows in each network call (the last one padded),
    so that results do not depend on which samples share a batch. None: all rows in one call."""

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("mode", self.mode, get_args(MixMode)),
            ("interpolation", self.interpolation, get_args(Interpolation)),
        ):
            if value not in choices:
                raise ConfigError(f"unknown {name} '{value}': use {', '.join(choices)}")
        low, high = self.schedule_range
        if not (0 < low <= high and math.isfinite(high)):
            raise ConfigError(
                f"schedule_range must satisfy 0 < low <= high, got {self.schedule_range}"
            )
        if self.rows_per_call is not None and self.rows_per_call < 1:
            raise ConfigError(f"rows_per_call must be at least 1, got {self.rows_per_call}")


def mixed_denoiser(
    denoiser: Denoiser, weights: Float[Tensor, "b k"], config: ConditionConfig | MixMode = "label"
) -> tuple[Denoise, Tensor | None]:
    """(function, condition) with which ``sample`` draws one sample for each row of ``weights``.

    In the modes score and schedule the function is bound to these rows (the condition is None): call
    it with as many states as there are rows, in their order. Guidance of the sampler's
    configuration applies to every mode; for scores it is
    ``D_u + scale (sum_k w_k D_k - D_u)`` in one evaluation.

    Args:
        denoiser: Conditional on classes or prompts.
        weights: Non-negative rows that sum to 1, over all classes of the denoiser.
        config: Mode and its settings, or the mode's name.

    Raises:
        ConfigError: an unconditional denoiser, or an unknown mode.
        DataError: rows that are no weights; slerp between more than two classes.
    """
    config = ConditionConfig(mode=config) if isinstance(config, str) else config
    if denoiser.condition_kind == "none":
        raise ConfigError("the model is unconditional: it has no classes to mix")
    check_weights(weights, denoiser.num_classes)
    if config.mode == "label":
        return denoiser, denoiser.condition(weights)
    if config.mode == "embedding":
        # Only classes in use, because a row of a text model is a whole sequence.
        used = (weights > 0).any(dim=0).nonzero().flatten()
        table = _class_conditions(denoiser, used)
        return denoiser, interpolate_conditions(table, weights[:, used], config.interpolation)
    if config.mode == "score":
        return MixedScores(denoiser, weights, rows_per_call=config.rows_per_call), None
    return ScheduledClasses(denoiser, weights, config.schedule_range), None


class MixedScores:
    """``sum_k w_k D(x; sigma, k)`` for given rows of weights, classes of weight 0 left out.

    A score is ``(D - x) / sigma^2``, so that mixing denoised states with weights that sum to 1 is
    mixing scores (composition of diffusion models, Liu et al. 2022, arXiv:2206.01714). Costs as many
    rows as there are positive weights, all in one evaluation unless ``rows_per_call`` is set.

    Args:
        denoiser: Conditional on classes or prompts.
        weights: Rows of weights.
        rows_per_call: See :class:`ConditionConfig`.
        guidance_scale: Not 1: the unconditional branch joins each row with weight
            ``1 - guidance_scale`` and the others are multiplied by ``guidance_scale``.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weights: Float[Tensor, "b k"],
        *,
        rows_per_call: int | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        self.denoiser, self.weights, self.rows_per_call = denoiser, weights, rows_per_call
        self.module = denoiser.module
        self.sigma_min, self.sigma_max = denoiser.sigma_min, denoiser.sigma_max
        rows, classes = weights.nonzero(as_tuple=True)
        used, position = classes.unique(return_inverse=True)
        condition = _class_conditions(denoiser, used)
        condition = condition[position.to(condition.device)]
        shares = weights[rows, classes].double()
        if guidance_scale != 1:
            count = len(weights)
            free = denoiser.unconditional(count).to(condition.device, condition.dtype)
            condition = torch.cat([condition, free])
            rows = torch.cat([rows, torch.arange(count, device=rows.device)])
            shares = torch.cat([shares * guidance_scale, shares.new_full((count,), 1.0)])
            shares[-count:] -= guidance_scale
        self.condition, device = condition, condition.device
        self.rows: Int[Tensor, " r"] = rows.to(device)
        self.shares: Float[Tensor, " r"] = shares.to(
            device, torch.float32 if device.type == "mps" else torch.float64
        )

    def __call__(
        self,
        x: Float[Tensor, "b *shape"],
        sigma: Float[Tensor, " b"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "b *shape"]:
        """Mixed denoised state, in the type of ``x``."""
        _check_bound(len(x), len(self.weights), condition)
        parts = self._evaluate(x[self.rows], sigma[self.rows])
        parts = parts.to(x.dtype) * append_dims(self.shares.to(x.dtype), parts)
        return torch.zeros_like(x).index_add_(0, self.rows, parts)

    def _evaluate(self, x: Tensor, sigma: Tensor) -> Tensor:
        size, count = self.rows_per_call, len(x)
        if size is None:
            return self.denoiser(x, sigma, self.condition)
        results = []
        for start in range(0, count, size):
            take = torch.arange(start, start + size, device=x.device).clamp(max=count - 1)
            results.append(self.denoiser(x[take], sigma[take], self.condition[take]))
        return torch.cat(results)[:count]

    def with_guidance(self, scale: float) -> "MixedScores":
        """The same mix, guided: ``D_u + scale (sum_k w_k D_k - D_u)``."""
        return MixedScores(
            self.denoiser, self.weights, rows_per_call=self.rows_per_call, guidance_scale=scale
        )


class ScheduledClasses:
    """The classes of a row take turns: the first at large noise levels, the last at small ones.

    Layout is decided at large noise levels and texture at small ones, so that a sample has the layout
    of one class and the texture of another. A pure row is the plain sample of its class.

    Args:
        denoiser: Conditional on classes or prompts.
        weights: Rows of weights; classes take turns in their order.
        schedule_range: See :class:`ConditionConfig`.
        guidance_scale: Classifier-free guidance by the class whose turn it is.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        weights: Float[Tensor, "b k"],
        schedule_range: tuple[float, float],
        *,
        guidance_scale: float = 1.0,
    ) -> None:
        self.denoiser, self.weights, self.schedule_range = denoiser, weights, schedule_range
        self.module = denoiser.module
        self.sigma_min, self.sigma_max = denoiser.sigma_min, denoiser.sigma_max
        self._call = guided(denoiser, guidance_scale)
        used = (weights > 0).any(dim=0).nonzero().flatten()
        self._conditions = _class_conditions(denoiser, used)
        shares = weights[:, used].to(self._conditions.device, torch.float32)
        # The ends of the turns. Those of the last class and of absent ones behind it lie at
        # infinity, so that rounding cannot open a gap.
        columns = torch.arange(len(used), device=shares.device)
        last = torch.where(shares > 0, columns, -1).amax(dim=1, keepdim=True)
        self._ends = shares.cumsum(dim=1).masked_fill(columns >= last, math.inf)

    def __call__(
        self,
        x: Float[Tensor, "b *shape"],
        sigma: Float[Tensor, " b"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "b *shape"]:
        """Denoised state under the condition of each row's turn."""
        _check_bound(len(x), len(self.weights), condition)
        return self._call(x, sigma, self._conditions[self._turn(sigma)])

    def _turn(self, sigma: Float[Tensor, " b"]) -> Int[Tensor, " b"]:
        low, high = self.schedule_range
        if low == high:
            progress = (sigma < low).float()
        else:
            span = math.log(high / low)
            progress = ((math.log(high) - sigma.float().log()) / span).clamp(0, 1)
        # At the very end (progress 1) only the last class remains, whose end is infinite.
        return (self._ends <= progress[:, None]).sum(dim=1)

    def with_guidance(self, scale: float) -> "ScheduledClasses":
        """The same turns under classifier-free guidance."""
        return ScheduledClasses(
            self.denoiser, self.weights, self.schedule_range, guidance_scale=scale
        )


def _class_conditions(denoiser: Denoiser, classes: Int[Tensor, " k"]) -> Tensor:
    one_hot = torch.zeros(len(classes), denoiser.num_classes)
    one_hot[torch.arange(len(classes)), classes.cpu()] = 1
    conditions = denoiser.condition(one_hot)
    assert conditions is not None  # unconditional denoisers were refused
    return conditions


def _check_bound(states: int, rows: int, condition: Tensor | None) -> None:
    if states != rows or condition is not None:
        raise DataError(
            f"this mix is bound to its {rows} rows of weights: call it with {rows} states and no "
            f"condition (got {states} states)"
        )
