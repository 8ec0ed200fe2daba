"""Which score: the settings, and their way to the functions that compute it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.attribution.baselines import cosine_blocks, dot_blocks
from diffcal.attribution.damping_selection import (
    DIMENSION_DAMPINGS,
    RELATIVE_DAMPINGS,
    REST_DAMPINGS,
)
from diffcal.attribution.kernel import Kernel
from diffcal.attribution.readouts import Readout, read_out
from diffcal.attribution.residuals import ResidualKind, residual_weights
from diffcal.attribution.rows import BLOCK_ROWS, Rows
from diffcal.attribution.scores import ScoreBlock, ScoreNorm, score_blocks
from diffcal.config import check_choices
from diffcal.errors import ConfigError, DataError

__all__ = ["DampingRule", "ScoreConfig", "ScoreMethod", "score_features"]

ScoreMethod = Literal["kernel", "dot", "cosine"]
DampingRule = Literal["relative", "rest", "dimension", "absolute"]


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """How features become scores; the defaults are diffcal's DAS."""

    method: ScoreMethod = "kernel"
    """``kernel`` for TRAK and its relatives, ``dot`` and ``cosine`` without a kernel."""
    norm: ScoreNorm = "none"
    residual: ResidualKind = "none"
    """``none`` although the paper has one: the released weight is inert, and others move the LDS of
    the toys by less than its spread."""
    leverage: bool = False
    """Off as in the released code: the correction changes ranks little at useful dampings."""
    readout: Readout = "square"
    average: Literal["scores", "signed"] = "scores"
    """Of several models: their scores as read out, or their signed scores before the readout."""
    damping: float = 20.0
    damping_rule: DampingRule = "rest"
    """``rest`` is in units of the mean of all eigenvalues of the kernel but the largest
    (:meth:`~.kernel.Kernel.rest_damping`): what all features share, as they do with one noise for all
    images, does not count. ``relative`` is in units of the mean squared norm of a training feature, and
    ``dimension`` the share of the kernel's dimensions that is left
    (:meth:`~.kernel.Kernel.dimension_damping`). Of features of ``all-outputs`` the best was 3 to 10 by
    ``rest`` on digits and 100 on photographs, at all timesteps
    (``benchmarks/PROTOCOL.md``, fourth run on CIFAR-2)."""
    damping_grid: tuple[float, ...] = ()
    """Where :func:`~.damping_selection.choose_damping` looks, under the same rule; empty for the
    rule's own grid."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.damping_grid:
            own = {"dimension": DIMENSION_DAMPINGS, "rest": REST_DAMPINGS}
            grid = own.get(self.damping_rule, RELATIVE_DAMPINGS)
            object.__setattr__(self, "damping_grid", grid)
        most = 1.0 if self.damping_rule == "dimension" else float("inf")
        for name, values in (("damping", (self.damping,)), ("damping_grid", self.damping_grid)):
            outside = [value for value in values if not 0 < value < most]
            if outside:
                limit = "below 1, a share of the dimensions," if most == 1 else "finite,"
                hint = "; empty, it is the rule's own" if name == "damping_grid" else ""
                raise ConfigError(f"{name} must be positive and {limit} got {outside[0]}{hint}")
        if self.method != "kernel":
            for name, plain in (("norm", "none"), ("residual", "none"), ("leverage", False)):
                if getattr(self, name) != plain:
                    raise ConfigError(f"'{name}' belongs to method 'kernel', not '{self.method}'")

    def absolute_damping(self, kernel: Kernel) -> float:
        """λ for this kernel."""
        return self._absolute(kernel, self.damping)

    def absolute_grid(self, kernel: Kernel) -> list[float]:
        """λ of every entry of the grid for this kernel."""
        return [self._absolute(kernel, value) for value in self.damping_grid]

    def _absolute(self, kernel: Kernel, value: float) -> float:
        match self.damping_rule:
            case "absolute":
                return value
            case "relative":
                return kernel.damping(value)
            case "rest":
                return kernel.rest_damping(value)
            case "dimension":
                return kernel.dimension_damping(value)


def score_features(
    config: ScoreConfig,
    queries: Float[Tensor, "q k"],
    rows: Rows | Tensor,
    *,
    kernel: Kernel | None = None,
    errors: Float[Tensor, "n t"] | None = None,
    dtype: torch.dtype = torch.float32,
    block_rows: int = BLOCK_ROWS,
) -> Iterator[ScoreBlock]:
    """Scores as ``config`` says, block by block of training rows.

    Args:
        kernel: Fitted on ``rows``; needed by method ``kernel`` only.
        errors: Denoising errors of the training examples; needed by residuals only.

    Raises:
        DataError: a kernel or an error table is needed and missing.
    """
    if config.method != "kernel":
        blocks = dot_blocks if config.method == "dot" else cosine_blocks
        for start, values in blocks(queries, rows, block_rows=block_rows):
            yield ScoreBlock(start, read_out(values, config.readout).to(dtype))
        return
    if kernel is None:
        raise DataError("this score needs a kernel fitted on the training features")
    residual = None
    if config.residual != "none":
        if errors is None:
            raise DataError(f"residual '{config.residual}' needs the training error table")
        residual = residual_weights(errors, config.residual)
    yield from score_blocks(
        kernel,
        queries,
        rows,
        config.absolute_damping(kernel),
        residual=residual,
        leverage=config.leverage,
        norm=config.norm,
        readout=config.readout,
        dtype=dtype,
        block_rows=block_rows,
    )
