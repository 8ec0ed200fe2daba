"""Linear sketches of gradients: what every projection has in common, and how one is chosen."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.config import check_choices
from diffcal.errors import ConfigError, DataError

__all__ = [
    "IdentityProjection",
    "LocalProjector",
    "ProjectionConfig",
    "ProjectionKind",
    "Projector",
    "overlap",
    "project_rows",
]

ProjectionKind = Literal[
    "identity",
    "gaussian",
    "rademacher",
    "sjlt",
    "mask",
    "factorised",
    "mask_sjlt",
    "factorised_sjlt",
]


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig:
    """Which sketch: see the classes for what each does; :func:`make_projector` builds it."""

    kind: ProjectionKind = "sjlt"
    dim: int = 4096
    """Columns of the feature matrix; ``identity`` and ``factorised`` set their own."""
    seed: int = 0
    nonzeros: int = 1
    """Buckets that every coordinate enters (the s of SJLT)."""
    factor_dim: int = 64
    """Largest side of a layer's sketch in ``factorised``; smaller sides are kept whole."""
    mask_dim: int = 65536
    """Coordinates that ``mask_sjlt`` keeps before its SJLT."""
    unit_variance: bool = False
    """Leave dense matrices unscaled as traker draws them: features grow by sqrt(dim) and a damping
    in absolute units by dim."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("dim", "nonzeros", "factor_dim", "mask_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"projection.{name} must be at least 1, got {getattr(self, name)}"
                )
        if self.unit_variance and self.kind not in ("gaussian", "rademacher"):
            raise ConfigError(
                f"projection.unit_variance is for dense matrices, not '{self.kind}': set it to false, "
                "and where a published preset set it, a relative damping, as its absolute one counts "
                "in those units (scores.damping_rule=relative)"
            )
        if self.kind.endswith("sjlt") and self.dim % self.nonzeros:
            raise ConfigError(
                f"projection.dim {self.dim} must be a multiple of projection.nonzeros "
                f"{self.nonzeros}"
            )
        if self.kind == "mask_sjlt" and self.mask_dim < self.dim:
            raise ConfigError(
                f"projection.mask_dim {self.mask_dim} must not be below projection.dim {self.dim}"
            )


class Projector(ABC):
    """A linear map from ``num_params`` gradient coordinates to ``dim`` numbers, applied in blocks.

    The matrix depends on its seed and shape alone: not on block boundaries, batch, device or
    number of processes. Sums run in float32 (float64 for float64 input), so that other block
    boundaries change a result by rounding only.
    """

    dim: int
    num_params: int

    @final
    def project(
        self, block: Float[Tensor, "b m"], offset: int = 0
    ) -> Float[Tensor, "b {self.dim}"]:
        """What gradient coordinates ``offset .. offset + m`` contribute to the sketch of each row.

        The caller sums over blocks, in any order. float32, or float64 for float64 input.

        Raises:
            DataError: the block reaches beyond the parameters.
        """
        out = torch.zeros(len(block), self.dim, dtype=accumulator(block), device=block.device)
        return self.accumulate(out, block, offset)

    @final
    def accumulate(
        self, out: Float[Tensor, "b {self.dim}"], block: Float[Tensor, "b m"], offset: int = 0
    ) -> Float[Tensor, "b {self.dim}"]:
        """:meth:`project` added to ``out`` in place; returns ``out``."""
        stop = offset + block.shape[1]
        if offset < 0 or stop > self.num_params:
            raise DataError(
                f"gradient coordinates {offset}..{stop} lie outside the {self.num_params} "
                "parameters of the projection"
            )
        if block.numel():
            self._add(out, block.to(out.dtype), offset)
        return out

    @abstractmethod
    def _add(self, out: Tensor, block: Tensor, offset: int) -> None:
        """Add the contribution of a checked, non-empty block to ``out``."""


class LocalProjector(Projector):
    """A projector in which a block of coordinates reaches a narrow range of the sketch only."""

    @abstractmethod
    def touched(self, offset: int, stop: int) -> tuple[int, int]:
        """First and one past the last entry that coordinates ``offset .. stop`` may reach."""

    @abstractmethod
    def add_at(self, out: Tensor, block: Tensor, offset: int, origin: int) -> None:
        """Add a block's contribution to ``out``, whose first column is entry ``origin``."""

    def _add(self, out: Tensor, block: Tensor, offset: int) -> None:
        self.add_at(out, block, offset, 0)


class IdentityProjection(Projector):
    """The gradient itself: exact features for small models and for oracles."""

    def __init__(self, num_params: int) -> None:
        self.dim = self.num_params = num_params

    def _add(self, out: Tensor, block: Tensor, offset: int) -> None:
        out[:, offset : offset + block.shape[1]] += block


def accumulator(block: Tensor) -> torch.dtype:
    """Number format in which a block is summed."""
    return torch.float64 if block.dtype == torch.float64 else torch.float32


def overlap(start: int, stop: int, offset: int, width: int) -> tuple[int, int] | None:
    """Common part of ``start .. stop`` and of a block at ``offset``, or None."""
    low, high = max(start, offset), min(stop, offset + width)
    return (low, high) if low < high else None


def project_rows(
    projector: Projector, gradients: Float[Tensor, "b p"], block: int = 1 << 20
) -> Float[Tensor, "b {projector.dim}"]:
    """Sketch of whole gradients, ``block`` coordinates at a time."""
    out = torch.zeros(
        len(gradients), projector.dim, dtype=accumulator(gradients), device=gradients.device
    )
    for start in range(0, gradients.shape[1], block):
        projector.accumulate(out, gradients[:, start : start + block], start)
    return out


def parameter_slices(shapes: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """Start and stop of each parameter in the concatenated gradient."""
    start = 0
    for shape in shapes:
        size = 1
        for side in shape:
            size *= side
        yield start, start + size
        start += size
