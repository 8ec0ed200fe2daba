"""Rows that can be read block by block, whether in memory or on disk."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

__all__ = ["BLOCK_ROWS", "Rows", "TensorRows", "as_rows"]

BLOCK_ROWS = 1024


@runtime_checkable
class Rows(Protocol):
    """``len(rows)`` rows of ``dim`` numbers; :class:`~.feature_store.FeatureStore` is one."""

    @property
    def dim(self) -> int:
        """Entries of a row."""
        ...

    def __len__(self) -> int: ...

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[Float[Tensor, "b k"]]:
        """All rows in order, at most ``size`` at a time; can be called again."""
        ...


class TensorRows:
    """Rows of a tensor, without its graph: features, flattened images or encoder embeddings."""

    def __init__(self, tensor: Float[Tensor, "n ..."]) -> None:
        self.tensor = tensor.detach().flatten(1)

    @property
    def dim(self) -> int:
        """Entries of a row."""
        return self.tensor.shape[1]

    def __len__(self) -> int:
        return len(self.tensor)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[Float[Tensor, "b k"]]:
        """All rows in order, at most ``size`` at a time."""
        yield from self.tensor.split(size)


def as_rows(rows: Rows | Tensor) -> Rows:
    """``rows`` itself, or a tensor seen as rows."""
    return TensorRows(rows) if isinstance(rows, Tensor) else rows
