"""Likeness of queries and training images beside their attribution: what a mere search would say."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.core.tensors import require_finite
from diffcal.models.encoders import FeatureEncoder
from diffcal.workflows.das_images import ConditionedImages

__all__ = ["Likeness"]

BATCH = 512


class Likeness:
    """Cosines of embeddings after the mean training embedding is taken away.

    Without that, images that share a background are all alike: cosines of raw digits lie near 1. The
    embeddings of one block of training images are in memory at a time. Several sets of queries are
    taken as one.

    Args:
        kept: Positions of the training images to compare with; the others count for nothing.
    """

    def __init__(
        self,
        encoder: FeatureEncoder,
        training: ConditionedImages,
        *queries: ConditionedImages,
        kept: Sequence[int],
    ) -> None:
        self.encoder, self.training, self.kept = encoder, training, kept
        total, count = torch.zeros(()), len(kept)
        for start in range(0, count, BATCH):
            part = self._encode(training, kept[start : start + BATCH])
            total = total + part.double().sum(dim=0)
        self.centre = (total / count).float()
        parts = [
            self._encode(images, range(start, min(start + BATCH, len(images))))
            for images in queries
            for start in range(0, len(images), BATCH)
        ]
        self.queries = _unit(torch.cat(parts) - self.centre)

    def block(self, positions: Sequence[int]) -> Float[Tensor, "q b"]:
        """Cosine of every query with the kept images at ``positions`` among them, in [-1, 1]."""
        chosen = [self.kept[position] for position in positions]
        return self.queries @ _unit(self._encode(self.training, chosen) - self.centre).mT

    def _encode(self, images: ConditionedImages, positions: Sequence[int]) -> Tensor:
        features = self.encoder.encode(images.images(positions)).float().cpu()
        return require_finite(features, f"'{self.encoder.name}' embeddings")


def _unit(rows: Tensor) -> Tensor:
    length = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(length > 0, length, 1.0)
