"""Images seen through an encoder, as rows for the likeness baselines."""

from collections.abc import Iterator

from jaxtyping import Float, UInt8
from torch import Tensor

from diffcal.attribution.rows import BLOCK_ROWS
from diffcal.core.tensors import require_finite
from diffcal.errors import DataError
from diffcal.models.encoders import FeatureEncoder

__all__ = ["EncodedRows"]


class EncodedRows:
    """Embeddings of images, computed block by block and never held as a whole.

    With :class:`~diffcal.models.encoders.PixelEncoder` these are raw pixels. Pass them to
    :func:`~.baselines.dot_blocks` or :func:`~.baselines.cosine_blocks`; to encode only once, write
    the blocks to a :class:`~.feature_store.FeatureStore` whose specification names the encoder's
    ``version``.

    Raises:
        DataError: no images.
    """

    def __init__(self, encoder: FeatureEncoder, images: UInt8[Tensor, "n h w c"]) -> None:
        if len(images) == 0:
            raise DataError("there are no images to compare")
        self.encoder, self.images = encoder, images

    @property
    def dim(self) -> int:
        """Entries of an embedding."""
        return self.encoder.dim

    def __len__(self) -> int:
        return len(self.images)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[Float[Tensor, "b k"]]:
        """All embeddings in order, at most ``size`` at a time."""
        for part in self.images.split(size):
            yield require_finite(self.encoder.encode(part), f"'{self.encoder.name}' embeddings")
