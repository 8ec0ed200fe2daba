"""From a configuration to a projector."""

import math
from collections.abc import Sequence

from torch import Tensor

from diffcal.attribution.projection import (
    IdentityProjection,
    LocalProjector,
    ProjectionConfig,
    Projector,
)
from diffcal.attribution.projection_dense import GaussianProjection, RademacherProjection
from diffcal.attribution.projection_factorised import FactorisedProjection
from diffcal.attribution.projection_mask import MaskProjection
from diffcal.attribution.projection_sjlt import SJLT
from diffcal.errors import ConfigError

__all__ = ["ChainedProjection", "make_projector", "spread_projector"]

SPREAD = 4096


class ChainedProjection(Projector):
    """One sketch after another: mask then SJLT (GraSS), factors then SJLT (FactGraSS).

    Source: arXiv:2505.18976, section 3.
    """

    def __init__(self, first: LocalProjector, second: Projector) -> None:
        if second.num_params != first.dim:
            raise ConfigError(
                f"the second sketch takes {second.num_params} numbers, the first gives {first.dim}"
            )
        self.first, self.second = first, second
        self.num_params, self.dim = first.num_params, second.dim

    def _add(self, out: Tensor, block: Tensor, offset: int) -> None:
        # Only what the block reaches of the first sketch, which may be far longer than the second.
        low, high = self.first.touched(offset, offset + block.shape[1])
        part = block.new_zeros(len(block), high - low)
        self.first.add_at(part, block, offset, low)
        self.second.accumulate(out, part, low)


def make_projector(config: ProjectionConfig, shapes: Sequence[tuple[int, ...]]) -> Projector:
    """The projector of ``config`` for parameters of these shapes, concatenated in this order.

    Raises:
        ConfigError: the sketch would be larger than what it sketches.
    """
    total = sum(math.prod(shape) for shape in shapes)
    if config.kind == "identity":
        return IdentityProjection(total)
    if config.kind == "factorised":
        return FactorisedProjection(shapes, config.factor_dim, config.seed)
    if config.dim > total:
        raise ConfigError(
            f"projection.dim {config.dim} is larger than the {total} parameters that are attributed: "
            f"lower it, or take projection.kind 'identity'"
        )
    if config.kind == "gaussian" or config.kind == "rademacher":
        dense = GaussianProjection if config.kind == "gaussian" else RademacherProjection
        return dense(total, config.dim, config.seed, unit_variance=config.unit_variance)
    if config.kind == "mask":
        return MaskProjection(total, config.dim, config.seed)
    if config.kind == "sjlt":
        return SJLT(total, config.dim, config.seed, nonzeros=config.nonzeros)
    if config.kind == "mask_sjlt":
        first: LocalProjector = MaskProjection(total, min(config.mask_dim, total), config.seed)
    else:
        first = FactorisedProjection(shapes, config.factor_dim, config.seed)
    if config.dim > first.dim:
        raise ConfigError(
            f"projection.dim {config.dim} is larger than the {first.dim} numbers that the first stage "
            f"of '{config.kind}' gives: lower it"
        )
    second = SJLT(first.dim, config.dim, config.seed, nonzeros=config.nonzeros)
    return ChainedProjection(first, second)


def spread_projector(config: ProjectionConfig, coordinates: int) -> Projector:
    """The projector of ``config`` for one vector of so many coordinates, which may be few.

    An SJLT of up to SPREAD columns takes fewer coordinates as well: each enters as many buckets as fill
    the columns (``nonzeros`` doubled as often as needed), so that its error stays that of its width.

    Raises:
        ConfigError: a sketch larger than that and than what it sketches.
    """
    if config.kind == "sjlt" and config.dim > max(coordinates, SPREAD):
        raise ConfigError(
            f"projection.dim {config.dim} is larger than the {coordinates} numbers of a row: lower it "
            f"(up to {SPREAD} is always allowed)"
        )
    if config.kind != "sjlt" or config.dim <= coordinates:
        return make_projector(config, [(coordinates,)])
    nonzeros = config.nonzeros
    while coordinates * nonzeros < config.dim and config.dim % (2 * nonzeros) == 0:
        nonzeros *= 2
    return SJLT(coordinates, config.dim, config.seed, nonzeros=nonzeros)
