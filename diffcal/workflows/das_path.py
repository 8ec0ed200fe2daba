"""Journey-TRAK's query features: gradients along the path of the sampler that drew a query."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.attribution.functionals import NamedFunctional
from diffcal.attribution.journey import path_features
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ArtifactError, ConfigError
from diffcal.workflows.das_config import DasConfig
from diffcal.workflows.das_features import Columns, make_featuriser
from diffcal.workflows.das_images import ConditionedImages
from diffcal.workflows.das_redraw import MixImages, Redrawable, denoised_levels

__all__ = ["PathRows", "path_rows"]

DRAWN_AT_ONCE = 256


class PathRows:
    """Mean gradient over the steps that led to an image; see :func:`~.journey.path_features`.

    Args:
        config: Of the index.
        denoiser: The attributed model, which draws the images again.
        redraw: The images.
        functional: The user's own, where the index has one.
    """

    def __init__(
        self,
        config: DasConfig,
        denoiser: Denoiser,
        redraw: Redrawable,
        functional: NamedFunctional | None = None,
    ) -> None:
        levels = denoised_levels(denoiser, redraw.sampler)
        along = replace(config, features=replace(config.features, sigmas=levels))
        self.featuriser = make_featuriser(along, denoiser, functional)
        self.redraw, self.at_once = redraw, DRAWN_AT_ONCE

    @property
    def dim(self) -> int:
        """Entries of a projected gradient."""
        return self.featuriser.dim

    @property
    def spec(self) -> dict[str, Any]:
        """Of the gradients at the levels of the path, and of the path."""
        return {**self.featuriser.spec, "path": self.redraw.fingerprint}

    def rows(
        self, images: ConditionedImages, positions: range, role: str
    ) -> tuple[Float[Tensor, "n k"], Columns]:
        """See :class:`~.das_features.ImageRows`."""
        denoiser = self.featuriser.denoiser
        found = torch.zeros(len(positions), self.dim)
        for batch in self.redraw.batches(denoiser, positions, path=True):
            assert batch.denoised is not None
            condition = images.condition(denoiser, batch.positions)
            vectors = path_features(self.featuriser, batch.denoised, batch.positions, condition)
            found[[position - positions.start for position in batch.positions]] = vectors.cpu()
        return found, {}


def path_rows(
    config: DasConfig,
    denoiser: Denoiser,
    folder: Path,
    queries: ConditionedImages,
    functional: NamedFunctional | None = None,
) -> PathRows:
    """For queries from a run of ``diffcal csm``.

    Raises:
        DataError: other queries, whose path is not known.
        ArtifactError: another model drew them.
        ConfigError: settings that exclude a path.
    """
    if config.features.functional == "weighted-mse":
        raise ConfigError("weighted-mse weighs timesteps, a sampling path has noise levels")
    redraw = MixImages(folder, queries.rows, queries.captions)
    if redraw.denoiser != denoiser.fingerprint:
        raise ArtifactError(
            f"the images of '{folder}' were drawn by another model than the index's (model: "
            f"'{redraw.denoiser[:12]}' there, '{denoiser.fingerprint[:12]}' here), so their sampling "
            "path is not known"
        )
    return PathRows(config, denoiser, redraw, functional)
