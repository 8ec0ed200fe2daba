"""Rows that can be read block by block, whether in memory or on disk."""

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["BLOCK_ROWS", "ChosenRows", "Rows", "TensorRows", "as_rows"]

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


class ChosenRows:
    """Some rows of others, in their order, without a copy of them.

    Args:
        positions: Of the rows to take.

    Raises:
        IndexError: a position beyond the rows.
    """

    def __init__(self, rows: Rows, positions: Sequence[int]) -> None:
        self.rows = rows
        self._chosen = torch.zeros(len(rows), dtype=torch.bool)
        self._chosen[list(positions)] = True

    @property
    def dim(self) -> int:
        """Entries of a row."""
        return self.rows.dim

    def __len__(self) -> int:
        return int(self._chosen.sum())

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[Float[Tensor, "b k"]]:
        """The chosen rows of each block of the others; blocks without any are skipped."""
        start = 0
        for block in self.rows.blocks(size):
            mine = self._chosen[start : start + len(block)]
            start += len(block)
            if bool(mine.any()):
                yield block[mine]


def as_rows(rows: Rows | Tensor) -> Rows:
    """``rows`` itself, or a tensor seen as rows."""
    return TensorRows(rows) if isinstance(rows, Tensor) else rows
