"""The kernel (K + λI)⁻¹ of the training features: one factorisation for every damping."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from scipy.optimize import root_scalar
from torch import Tensor

from diffcal.attribution.gram import GramAccumulator, dual_gram
from diffcal.attribution.rows import BLOCK_ROWS, Rows, as_rows
from diffcal.core.runs import write_atomic
from diffcal.errors import ArtifactError, ConfigError, DataError, NumericalError

__all__ = ["Kernel", "fit_kernel", "load_kernel"]

FORMAT = "diffcal-kernel/1"
FULL_PRECISION_SIZE = 8192
"""Up to this side of K or G everything is in float64 (on devices that have it)."""
SPAN_TOLERANCE = 1e-2
"""Relative squared norm that a row may have outside the span of the fitted rows."""

ROUNDINGS = 10
"""Dampings below this many roundings of the largest eigenvalue are blurred."""

KernelForm = Literal["auto", "primal", "dual"]


class Kernel:
    """Eigenvalues l and eigenvectors V of ``K = ΦᵀΦ``; the methods take rows in this basis.

    With ``x = rotate(φ) = φ V``, everything follows for any damping λ > 0 without another
    factorisation: scores ``Σ_j q_j x_j / (l_j + λ)``, leverages ``Σ_j x_j² / (l_j + λ)``.

    Source: DAS (arXiv:2410.18639), the score of section 3 with one eigendecomposition in place of
    an inverse per damping.
    """

    def __init__(
        self,
        eigenvalues: Float[Tensor, " r"],
        basis: Float[Tensor, "k r"],
        count: int,
        trace: float,
        form: str,
    ) -> None:
        self.eigenvalues, self.basis = eigenvalues, basis
        self.count = count
        """Training rows in the kernel."""
        self.trace = trace
        """Sum of all eigenvalues, also of those too small to keep."""
        self.form = form
        """``primal`` (from K) or ``dual`` (from G)."""

    @property
    def dim(self) -> int:
        """Entries of a feature row."""
        return len(self.basis)

    @property
    def spectrum(self) -> Float[Tensor, " r"]:
        """Eigenvalues of the kernel; of a changed one they are no longer :attr:`eigenvalues`."""
        return self.eigenvalues

    @property
    def device(self) -> torch.device:
        """Where the factorisation lies."""
        return self.basis.device

    def damping(self, rho: float) -> float:
        """λ = rho · trace(G) / N, the damping relative to the mean squared norm of a row."""
        return _positive(rho) * self.trace / self.count

    def rest_damping(self, rho: float) -> float:
        """λ = rho times the mean of all eigenvalues of G but the largest.

        With shared noise one direction, common to all examples, holds 94 to 99.9 % of the trace and
        tells none of them apart; how much it holds differs between networks, and with it the best
        damping in units of the trace. In units of the rest the optimum hardly moved on digits, but did
        on photographs (``benchmarks/PROTOCOL.md``).

        Raises:
            ConfigError: all features are multiples of one another, or there is a single one.
        """
        rest = max(self.trace - float(self.spectrum.max()), 0.0)
        return _positive(_positive(rho) * rest / max(self.count - 1, 1))

    def dimension_damping(self, share: float) -> float:
        """λ that leaves an effective dimension of ``share`` times the rank.

        The mean leverage of the training rows is then ``share`` (with at least as many features as
        rows), whatever the spectrum: the units of the features and directions that all rows share
        play no part. See ``benchmarks/PROTOCOL.md``, LDS on CIFAR-2.

        Raises:
            ConfigError: ``share`` is not between 0 and 1.
        """
        if not 0 < share < 1:
            raise ConfigError(f"a share of the dimensions must lie between 0 and 1, got {share}")
        largest_first = self.spectrum.double().cpu().sort(descending=True).values
        eigenvalues = largest_first[: min(self.count, self.dim)]  # the others are rounding
        eigenvalues = eigenvalues[eigenvalues > self.resolution / ROUNDINGS]
        target = share * len(eigenvalues)

        def excess(log_damping: float) -> float:
            return float((eigenvalues / (eigenvalues + math.exp(log_damping))).sum()) - target

        # at these ends no dimension is below its share, or none above it; a little wider for rounding
        odds = (1 - share) / share
        low, high = (float(end) * odds for end in (eigenvalues[-1], eigenvalues[0]))
        ends = (math.log(low) - 1e-6, math.log(high) + 1e-6)
        return math.exp(root_scalar(excess, bracket=ends).root)

    @property
    def resolution(self) -> float:
        """Smallest damping that rounding does not blur: ten roundings of the largest eigenvalue."""
        return float(self.eigenvalues.max()) * ROUNDINGS * torch.finfo(self.eigenvalues.dtype).eps

    def effective_dimension(self, damping: float) -> float:
        """Σ l / (l + λ), which is the sum of all leverages."""
        return float((self.eigenvalues / (self.eigenvalues + _positive(damping))).sum())

    def rotate(self, features: Float[Tensor, "m k"]) -> Float[Tensor, "m r"]:
        """Rows in the eigenbasis, in the precision of the factorisation.

        Raises:
            DataError: another number of entries.
        """
        if features.shape[1] != self.dim:
            raise DataError(
                f"features have {features.shape[1]} entries, the kernel was fitted on {self.dim}"
            )
        return features.to(self.basis) @ self.basis

    def require_fitted(
        self, features: Float[Tensor, "m k"], coordinates: Float[Tensor, "m r"]
    ) -> None:
        """Refuse rows that the kernel was not fitted on.

        Only a kernel of fewer rows than dimensions can tell: its scores are exact for rows in the
        span of those it was fitted on.

        Raises:
            DataError: a row lies outside that span.
        """
        if coordinates.shape[1] == self.dim:
            return
        total = features.to(coordinates).square().sum(dim=1)
        outside = total - coordinates.square().sum(dim=1) > SPAN_TOLERANCE * total
        if bool(outside.any()):
            raise DataError(
                f"{int(outside.sum())} rows are not among those that the kernel was fitted on; "
                "append them to the kernel or fit it again"
            )

    def inverse(self, coordinates: Float[Tensor, "m r"], damping: float) -> Float[Tensor, "m r"]:
        """``(K + λI)⁻¹`` applied to rotated rows."""
        return coordinates / (self.eigenvalues + _positive(damping))

    def leverages(
        self, coordinates: Float[Tensor, "m r"], dampings: Sequence[float]
    ) -> Float[Tensor, "l m"]:
        """Exact ``φᵀ (K + λI)⁻¹ φ`` of rotated rows, in [0, 1) for training rows."""
        return _weights(self.eigenvalues, dampings) @ coordinates.square().mT

    def inverse_norms(
        self, coordinates: Float[Tensor, "m r"], dampings: Sequence[float]
    ) -> Float[Tensor, "l m"]:
        """``‖(K + λI)⁻¹ φ‖`` of rotated rows."""
        return (_weights(self.eigenvalues, dampings).square() @ coordinates.square().mT).sqrt()

    def save(self, path: Path | str) -> None:
        """Write as safetensors, atomically."""
        from safetensors.torch import save

        tensors = {
            "eigenvalues": self.eigenvalues.cpu().contiguous(),
            "basis": self.basis.cpu().contiguous(),
        }
        facts = {"count": self.count, "trace": self.trace, "form": self.form}
        # One entry: safetensors writes several in an order that changes from call to call.
        data = save(tensors, metadata={FORMAT: json.dumps(facts)})
        write_atomic(Path(path), lambda file: file.write(data))


def fit_kernel(
    rows: Rows | Tensor | GramAccumulator,
    *,
    form: KernelForm = "auto",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    block_rows: int = BLOCK_ROWS,
) -> Kernel:
    """The kernel of all training rows.

    Args:
        rows: Features ``[n, k]``, in memory or on disk; or an accumulated ``K``.
        form: ``primal`` factorises the k × k matrix K, ``dual`` the n × n matrix G; ``auto`` takes
            the smaller one. Both give the same scores. Memory does not grow with n in either.
        dtype: float64 or float32; by default float64 up to a side of 8,192 where the device has it.

    Raises:
        NumericalError: NaN or infinite features, or all of them zero.
        DataError: no rows.
    """
    if isinstance(rows, GramAccumulator):
        if form == "dual":
            raise ConfigError("an accumulated K can only be factorised in primal form")
        return _from_gram(rows)
    rows = as_rows(rows)
    n, k = len(rows), rows.dim
    if n == 0:
        raise DataError("a kernel needs at least one row of features")
    if form == "auto":
        form = "dual" if n < k else "primal"
    device = torch.device(device)
    if dtype is None:
        small = min(n, k) <= FULL_PRECISION_SIZE and device.type != "mps"
        dtype = torch.float64 if small else torch.float32
    if form == "primal":
        accumulator = GramAccumulator(k, dtype, device)
        for block in rows.blocks(block_rows):
            accumulator.add(block)
        return _from_gram(accumulator)
    gram = dual_gram(rows, dtype, device, block_rows)
    trace = _positive_trace(gram)
    values, vectors = torch.linalg.eigh(gram)
    del gram
    # Directions below the rounding of G are noise; dividing by their root would blow them up. With
    # shared noise the largest eigenvalue holds nearly all of the trace and the others, which tell
    # examples apart, are small beside it: float32 has no room for a margin.
    margin = n if dtype == torch.float64 else 1
    kept = values > values[-1] * margin * torch.finfo(dtype).eps
    values, vectors = values[kept], vectors[:, kept]
    basis = torch.zeros(k, len(values), dtype=dtype, device=device)
    start = 0
    for block in rows.blocks(block_rows):
        basis.addmm_(block.to(basis).mT, vectors[start : start + len(block)])
        start += len(block)
    return Kernel(values, basis / values.sqrt(), n, trace, "dual")


def load_kernel(path: Path | str, device: torch.device | str = "cpu") -> Kernel:
    """The kernel that :meth:`Kernel.save` wrote.

    Raises:
        ArtifactError: not such a file, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if FORMAT not in metadata:
                raise ArtifactError(f"'{path}' is not a saved kernel")
            values, basis = file.get_tensor("eigenvalues"), file.get_tensor("basis")
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"kernel '{path}' cannot be read: {error}") from error
    facts = json.loads(metadata[FORMAT])
    return Kernel(values, basis, int(facts["count"]), float(facts["trace"]), facts["form"])


def _from_gram(accumulator: GramAccumulator) -> Kernel:
    trace = _positive_trace(accumulator.matrix)
    values, basis = torch.linalg.eigh(accumulator.matrix)
    return Kernel(values.clamp(min=0), basis, accumulator.count, trace, "primal")


def _positive_trace(gram: Tensor) -> float:
    trace = float(gram.diagonal().sum())
    if not trace > 0:
        raise NumericalError("all training features are zero, so no kernel can be fitted")
    return trace


def _positive(value: float) -> float:
    if not 0 < value < float("inf"):
        raise ConfigError(f"damping must be positive and finite, got {value}")
    return value


def _weights(eigenvalues: Tensor, dampings: Sequence[float]) -> Tensor:
    """1 / (l + λ) of every damping, ``[l, r]``."""
    values = torch.tensor([_positive(v) for v in dampings], dtype=torch.float64).to(eigenvalues)
    return 1 / (eigenvalues + values[:, None])
