"""A kernel with rows added or removed, exact for every damping, without a new factorisation."""

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.attribution.kernel import Kernel
from diffcal.errors import DataError

__all__ = ["UpdatedKernel", "update_kernel"]


class UpdatedKernel(Kernel):
    """``(K + Σ ± s sᵀ + λI)⁻¹`` by the Woodbury identity in the eigenbasis of K.

    ``K'⁻¹ = K⁻¹ - K⁻¹ Sᵀ (D + S K⁻¹ Sᵀ)⁻¹ S K⁻¹`` with D = +1 for added and -1 for removed rows.
    Costs m³ for m changed rows and each damping: fit again when m nears the number of dimensions.
    """

    def __init__(
        self, base: Kernel, rows: Float[Tensor, "m r"], signs: Float[Tensor, " m"]
    ) -> None:
        trace = base.trace + float((signs * rows.square().sum(dim=1)).sum())
        count = base.count + int(signs.sum())
        super().__init__(base.eigenvalues, base.basis, count, trace, base.form)
        self._base, self._rows, self._signs = base, rows, signs
        self._factors: dict[float, tuple[Tensor, Tensor]] = {}

    @cached_property
    def spectrum(self) -> Float[Tensor, " r"]:
        """Eigenvalues of the changed kernel, of which the rules ``rest`` and ``dimension`` are made.

        The only thing here that factorises anew, without eigenvectors and without reading the rows.
        """
        change = self._rows.mT @ (self._signs[:, None] * self._rows)
        return torch.linalg.eigvalsh(change + self.eigenvalues.diag()).clamp(min=0)

    def effective_dimension(self, damping: float) -> float:
        """Σ l' / (l' + λ) of the changed kernel."""
        inverse_rows, core = self._factor(damping)
        shrink = (damping / (self.eigenvalues + damping)).sum()
        correction = torch.linalg.solve(core, inverse_rows @ inverse_rows.mT).diagonal().sum()
        # trace(I - λ K'λ⁻¹), with K'λ⁻¹ = Kλ⁻¹ - correction
        return float(len(self.eigenvalues) - shrink + damping * correction)

    def inverse(self, coordinates: Float[Tensor, "m r"], damping: float) -> Float[Tensor, "m r"]:
        """``(K' + λI)⁻¹`` applied to rotated rows."""
        inverse_rows, core = self._factor(damping)
        plain = super().inverse(coordinates, damping)
        overlap = coordinates @ inverse_rows.mT
        return plain - torch.linalg.solve(core, overlap.mT).mT @ inverse_rows

    def leverages(
        self, coordinates: Float[Tensor, "m r"], dampings: Sequence[float]
    ) -> Float[Tensor, "l m"]:
        """Exact ``φᵀ (K' + λI)⁻¹ φ`` of rotated rows."""
        values = [(coordinates * self.inverse(coordinates, d)).sum(dim=1) for d in dampings]
        return torch.stack(values)

    def inverse_norms(
        self, coordinates: Float[Tensor, "m r"], dampings: Sequence[float]
    ) -> Float[Tensor, "l m"]:
        """``‖(K' + λI)⁻¹ φ‖`` of rotated rows."""
        return torch.stack([self.inverse(coordinates, d).norm(dim=1) for d in dampings])

    def _factor(self, damping: float) -> tuple[Tensor, Tensor]:
        """``S K⁻¹`` and ``D + S K⁻¹ Sᵀ`` at this damping."""
        if damping not in self._factors:
            inverse_rows = Kernel.inverse(self, self._rows, damping)
            core = inverse_rows @ self._rows.mT + self._signs.diag()
            gone = self._signs < 0
            if bool(gone.any()):
                self._require_present(damping, gone)
            self._factors[damping] = inverse_rows, core
        return self._factors[damping]

    def _require_present(self, damping: float, gone: Tensor) -> None:
        """Rows can be removed only if ``I - S (K + added + λI)⁻¹ Sᵀ`` stays positive definite."""
        removed, added = self._rows[gone], self._rows[~gone]
        kept = (
            self._base if not len(added) else UpdatedKernel(self._base, added, self._signs[~gone])
        )
        block = kept.inverse(removed, damping) @ removed.mT
        largest = torch.linalg.eigvalsh((block + block.mT) / 2)[-1]
        if largest >= 1:
            raise DataError("rows to remove are not all part of the kernel")

    def save(self, path: object) -> None:
        """Refused: save the kernel before the change, or fit one on the changed rows."""
        raise DataError("an updated kernel is not saved; fit one on the changed rows")


def update_kernel(
    kernel: Kernel,
    *,
    added: Float[Tensor, "m k"] | None = None,
    removed: Float[Tensor, "m2 k"] | None = None,
) -> UpdatedKernel:
    """``kernel`` with training rows appended, or a whole block left out, exactly.

    Updates can be stacked. Relative dampings follow the changed trace and count.

    Raises:
        DataError: nothing changes, all rows go, or rows are removed that are not part of the kernel
            (found when a damping is first used).
    """
    parts = [(rows, sign) for rows, sign in ((added, 1.0), (removed, -1.0)) if rows is not None]
    changed = torch.cat([rows.to(kernel.basis) for rows, _ in parts]) if parts else torch.zeros(0)
    if len(changed) == 0:
        raise DataError("give rows to add or to remove")
    signs = torch.cat([torch.full((len(rows),), sign) for rows, sign in parts]).to(kernel.basis)
    if kernel.count + int(signs.sum()) < 1:
        raise DataError(f"removing {int((signs < 0).sum())} of {kernel.count} rows leaves none")
    rows = kernel.rotate(changed)
    base = kernel
    if isinstance(kernel, UpdatedKernel):
        base = kernel._base
    if kernel.basis.shape[1] < kernel.dim and added is not None:
        base, extra = _extended(base, changed[signs > 0])
        rows = base.rotate(changed)
        if isinstance(kernel, UpdatedKernel):
            old = torch.nn.functional.pad(kernel._rows, (0, extra))
            return UpdatedKernel(base, torch.cat([old, rows]), torch.cat([kernel._signs, signs]))
    elif isinstance(kernel, UpdatedKernel):
        return UpdatedKernel(
            base, torch.cat([kernel._rows, rows]), torch.cat([kernel._signs, signs])
        )
    return UpdatedKernel(base, rows, signs)


def _extended(base: Kernel, added: Tensor) -> tuple[Kernel, int]:
    """The same kernel with the directions of new rows outside its span, eigenvalue 0."""
    outside = added
    for _ in range(2):  # the second pass removes what rounding left of the first
        outside = outside - (outside @ base.basis) @ base.basis.mT
    left, sizes, _ = torch.linalg.svd(outside.mT, full_matrices=False)
    keep = sizes > added.norm() * len(base.basis) * torch.finfo(added.dtype).eps
    fresh = left[:, keep]
    zeros = base.eigenvalues.new_zeros(fresh.shape[1])
    basis = torch.cat([base.basis, fresh], dim=1)
    values = torch.cat([base.eigenvalues, zeros])
    return Kernel(values, basis, base.count, base.trace, base.form), fresh.shape[1]
