"""Gram matrices of feature rows, accumulated block by block."""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.attribution.rows import BLOCK_ROWS, Rows, as_rows
from diffcal.core.runs import write_atomic
from diffcal.core.tensors import require_finite
from diffcal.errors import ArtifactError, DataError

__all__ = ["GramAccumulator", "dual_gram"]

FORMAT = "diffcal-gram/1"


class GramAccumulator:
    """``K = Σ φ φᵀ`` and the number of rows in it; its memory does not grow with the rows.

    Rows can be added and taken out again, and two accumulators can be merged, so that processes
    work on their own shards. float64 keeps directions whose eigenvalue is 1e-12 of the largest;
    float32 loses those below about 1e-6, which a relative damping of 0.01 with 5,000 rows reaches.
    """

    def __init__(
        self,
        dim: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        self.matrix = torch.zeros(dim, dim, dtype=dtype, device=device)
        self.count = 0

    def add(self, block: Float[Tensor, "b k"]) -> "GramAccumulator":
        """Add the rows of ``block``.

        Raises:
            NumericalError: NaN or infinite features.
        """
        return self._accumulate(block, 1)

    def remove(self, block: Float[Tensor, "b k"]) -> "GramAccumulator":
        """Take out rows that were added before."""
        return self._accumulate(block, -1)

    def merge(self, other: "GramAccumulator") -> "GramAccumulator":
        """Add what another accumulator holds."""
        self.matrix += other.matrix.to(self.matrix)
        self.count += other.count
        return self

    def save(self, path: Path | str) -> None:
        """Write as safetensors, atomically, to go on later with appended rows."""
        from safetensors.torch import save

        tensors = {"gram": self.matrix.cpu(), "count": torch.tensor(self.count)}
        data = save(tensors, metadata={"format": FORMAT})
        write_atomic(Path(path), lambda file: file.write(data))

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> "GramAccumulator":
        """What :meth:`save` wrote.

        Raises:
            ArtifactError: not such a file, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise ArtifactError(f"'{path}' is not an accumulated kernel")
                matrix, count = file.get_tensor("gram"), int(file.get_tensor("count"))
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"accumulated kernel '{path}' cannot be read: {error}") from error
        found = cls(len(matrix), matrix.dtype, matrix.device)
        found.matrix, found.count = matrix, count
        return found

    def _accumulate(self, block: Tensor, sign: int) -> "GramAccumulator":
        if block.shape[1] != len(self.matrix):
            raise DataError(f"rows have {block.shape[1]} entries, expected {len(self.matrix)}")
        rows = require_finite(block, "features").to(self.matrix)
        self.matrix.addmm_(rows.mT, rows, alpha=sign)
        self.count += sign * len(block)
        return self


def dual_gram(
    rows: Rows | Tensor,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    block_rows: int = BLOCK_ROWS,
) -> Float[Tensor, "n n"]:
    """``G = Φ Φᵀ`` from pairs of blocks; two blocks of rows are in memory at a time."""
    rows = as_rows(rows)
    gram = torch.zeros(len(rows), len(rows), dtype=dtype, device=device)
    start = 0
    for left in rows.blocks(block_rows):
        stop = start + len(left)
        left = require_finite(left, "features").to(gram)
        first = 0
        for right in rows.blocks(block_rows):
            if first > start:
                break
            last = first + len(right)
            product = left @ right.to(gram).mT
            gram[start:stop, first:last] = product
            gram[first:last, start:stop] = product.mT
            first = last
        start = stop
    return gram
