"""Per-sample gradients behind one interface, whole or projected as they are made."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from diffcal.attribution.parameters import Layout
from diffcal.attribution.projection import IdentityProjection, Projector
from diffcal.core.tensors import require_finite
from diffcal.errors import ConfigError

__all__ = [
    "GradientBatch",
    "NormKind",
    "Objective",
    "PerSampleGradients",
    "RowSums",
    "requiring_grad",
]

NormKind = Literal["exact", "projected"]

Objective = Callable[..., tuple[Tensor, Tensor]]
"""From tensors whose first axis is the rows to (one number for each row, anything else by row).

It must run the module that it is given with, in evaluation mode, and must not mix rows.
"""


@dataclass(frozen=True)
class GradientBatch:
    """Gradients of the rows of one batch."""

    vectors: Float[Tensor, "b k"]
    """Projected gradients (whole ones where no projector was given), float32 or float64."""
    norms: Float[Tensor, " b"]
    """L2 norm of each whole gradient, or of its projection where ``norms`` is ``projected``."""
    values: Float[Tensor, " e"]
    """The differentiated numbers, of every entry."""
    extras: Shaped[Tensor, "e ..."]
    """What else the objective gave for each entry."""


class PerSampleGradients(ABC):
    """Gradient of every row's own number with respect to chosen parameters.

    A call with the tensors of one batch returns a :class:`GradientBatch`. Several entries may make one
    row, an image at several timesteps say: its gradient, of the sum of their numbers, is then formed
    and projected once. The coordinates of a
    gradient are the parameters in the given order, each flattened row by row (``layout``). The
    module's parameters, their ``requires_grad`` and ``grad`` are left as they were.

    Args:
        module: The network that the objective runs.
        objective: See :data:`Objective`.
        parameters: What is differentiated, by the names of ``module.named_parameters()``.
        projector: Made for ``layout``; None: whole gradients.
        norms: Of the whole gradient (``exact``) or of its projection (``projected``), which costs
            nothing; its relative error is about ``sqrt(1 / (2 k))`` for a projection to k numbers.

    Raises:
        ConfigError: no parameters, a name that the module does not have, or a projector for another
            number of parameters.
        NumericalError: a gradient with NaN or infinity.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        projector: Projector | None = None,
        *,
        norms: NormKind = "exact",
    ) -> None:
        if norms not in ("exact", "projected"):
            raise ConfigError(f"norms must be exact or projected, got '{norms}'")
        known = dict(module.named_parameters())
        strangers = [name for name, p in parameters.items() if known.get(name) is not p]
        if strangers or not parameters:
            raise ConfigError(
                f"'{strangers[0]}' is not a parameter of the module"
                if strangers
                else "no parameters to differentiate"
            )
        self.module, self.objective, self.parameters = module, objective, dict(parameters)
        self.layout = Layout.of({name: tuple(p.shape) for name, p in parameters.items()})
        self.projector = projector or IdentityProjection(self.layout.size)
        if self.projector.num_params != self.layout.size:
            raise ConfigError(
                f"the projector is made for {self.projector.num_params} parameters, but "
                f"{self.layout.size} are differentiated"
            )
        self.norms: NormKind = norms
        wide = any(p.dtype == torch.float64 for p in parameters.values())
        self.dtype = torch.float64 if wide else torch.float32

    def __call__(self, *inputs: Tensor, entries: int = 1) -> GradientBatch:
        """Gradients of a batch.

        Args:
            inputs: Each has the entries of all rows as its first axis, row after row.
            entries: How many make a row.
        """
        lengths = {len(tensor) for tensor in inputs}
        if len(lengths) != 1:
            raise ConfigError(f"inputs have different numbers of rows: {sorted(lengths)}")
        if entries < 1 or min(lengths) % entries:
            raise ConfigError(f"{min(lengths)} entries are no rows of {entries}")
        coupled = _batch_coupled(self.module)
        if coupled:
            raise ConfigError(
                f"'{coupled}' uses statistics of the batch, so rows have no gradients of their own: "
                "put the module into evaluation mode"
            )
        batch = self._compute(tuple(tensor.detach() for tensor in inputs), entries)
        require_finite(batch.vectors, "per-sample gradients")
        return batch

    @abstractmethod
    def _compute(self, inputs: tuple[Tensor, ...], entries: int) -> GradientBatch: ...


class RowSums:
    """Projection and squared norm of each row, added up block by block."""

    def __init__(self, rows: int, engine: PerSampleGradients) -> None:
        like = next(iter(engine.parameters.values()))
        self.rows, self.norms, self.projector = rows, engine.norms, engine.projector
        self._offsets = {name: offset for name, _, offset in engine.layout}
        self.vectors = like.new_zeros(rows, engine.projector.dim, dtype=engine.dtype)
        self.squares = like.new_zeros(rows, dtype=engine.dtype)

    @torch.no_grad()
    def add(self, name: str, gradient: Float[Tensor, "b ..."]) -> None:
        """Add the gradients of one parameter."""
        block = gradient.reshape(self.rows, -1).to(self.vectors.dtype)
        if self.norms == "exact":
            # Reads the block once and writes nothing.
            self.squares += torch.linalg.vector_norm(block, dim=1).square()
        self.projector.accumulate(self.vectors, block, self._offsets[name])

    def finish(self, values: Tensor, extras: Tensor) -> GradientBatch:
        """The batch, when every parameter has been added."""
        norms = self.vectors.norm(dim=1) if self.norms == "projected" else self.squares.sqrt()
        return GradientBatch(self.vectors, norms, values.detach(), extras.detach())


@contextmanager
def requiring_grad(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, exactly these parameters of the module require gradients; ``grad`` is not touched."""
    before = [(p, p.requires_grad) for p in module.parameters()]
    chosen = {id(p) for p in parameters.values()}
    try:
        for p, _ in before:
            p.requires_grad_(id(p) in chosen)
        with torch.enable_grad():
            yield
    finally:
        for p, required in before:
            p.requires_grad_(required)


def _batch_coupled(module: nn.Module) -> str | None:
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and (
            child.training or child.running_mean is None
        ):
            return name or type(child).__name__
    return None
