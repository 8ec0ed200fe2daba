"""The kernel of all outputs with respect to the output layer, from one forward pass."""

from collections.abc import Mapping
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

import diffcal.attribution.gradient_rules  # noqa: F401  (fills the table of rules)
from diffcal.attribution.gradient_conv import ConvPart
from diffcal.attribution.gradient_parts import OuterPart, Part, by_rows, widened
from diffcal.attribution.gradient_taps import Taps
from diffcal.attribution.gradients import (
    GradientBatch,
    NormKind,
    Objective,
    PerSampleGradients,
    requiring_grad,
)
from diffcal.attribution.parameters import Layout
from diffcal.attribution.projection import IdentityProjection, ProjectionConfig
from diffcal.attribution.projectors import spread_projector
from diffcal.core.tensors import require_finite
from diffcal.errors import ConfigError

__all__ = ["OutputLayerRows"]


@final
class OutputLayerRows(PerSampleGradients):
    """Rows whose products are ``sum_o J_o(x) . J_o(x')``, J of every output by the output layer.

    An output is a product of the layer's weights with the patch of the layer's input that it sees (and
    the bias), so that the sum over all outputs needs no gradient: it is the inner product of the
    layer's inputs, each number counted as often as an output sees it, plus the number of outputs where
    there is a bias. A row is that input times the roots of the counts, projected.

    The first batch finds the layer: the last linear or convolutional layer of ``parameters`` that acts.
    Every batch then checks, by a backward pass that ends at that layer, that the outputs are the
    layer's own up to a factor of the row (and a choice among them, as where a variance is predicted
    too), in places that are the same for all rows.

    Args:
        objective: A denoiser's with the functional ``all-outputs``, the same signs in every row.
        parameters: Among which the output layer must be; its weight alone if its bias is not.
        projection: Of the rows, by the number of their coordinates (``spread_projector``); None: whole
            rows.

    Raises:
        ConfigError: the outputs are not those of one linear layer, or its parameters are not chosen.

    Source: the definition of DAS (arXiv:2410.18639) has all outputs; taking the sum in closed form
    is ours (``benchmarks/PROTOCOL.md``, fourth run on CIFAR-2).
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        projection: ProjectionConfig | None,
        *,
        norms: NormKind = "exact",
    ) -> None:
        super().__init__(module, objective, parameters, norms=norms)
        self._projection, self._coordinates = projection, 0
        self._pattern: Tensor | None = None
        self.layer: tuple[str, ...] = ()
        """Parameters of the output layer, and what ``layout`` is of, once a batch has been seen."""

    def _compute(self, inputs: tuple[Tensor, ...], entries: int) -> GradientBatch:
        if not self.layer:
            finder = _Finder()
            self._pass(finder, tuple(t[:2] for t in inputs), self.parameters)
            if not finder.found:
                raise _refusal(
                    type(self.module).__name__, "none of the chosen parameters is a layer's weight"
                )
            self.layer = finder.found
            self.layout = Layout.of({n: tuple(self.parameters[n].shape) for n in self.layer})
        layer = {name: self.parameters[name] for name in self.layer}
        listener = _Rows(
            type(self.module).__name__, self.layer[-1], inputs[0][0].numel(), self._pattern
        )
        values, extras, uses = self._pass(listener, inputs, layer)
        if listener.rows is None or uses != dict.fromkeys(self.layer, 1):
            raise _acts_otherwise(type(self.module).__name__, self.layer[-1])
        self._pattern = listener.pattern
        rows = by_rows(listener.rows, len(inputs[0]) // entries).sum(dim=1).to(self.dtype)
        self._make_projector(rows.shape[1])
        vectors = self.projector.project(rows)
        norms = (vectors if self.norms == "projected" else rows).norm(dim=1)
        return GradientBatch(vectors, norms, values, extras)

    def _make_projector(self, coordinates: int) -> None:
        if self._coordinates == coordinates:
            return
        self._coordinates = coordinates
        self.projector = (
            IdentityProjection(coordinates)
            if self._projection is None
            else spread_projector(self._projection, coordinates)
        )

    def _pass(
        self,
        listener: "_Finder | _Rows",
        inputs: tuple[Tensor, ...],
        parameters: Mapping[str, nn.Parameter],
    ) -> tuple[Tensor, Tensor, dict[str, int]]:
        count = len(inputs[0])
        taps = Taps(parameters, count, count, listener.listen, lambda part: None)
        with requiring_grad(self.module, {}):
            with taps:
                values, extras = self.objective(*inputs)
            if taps.leaves and values.requires_grad:
                torch.autograd.grad(values.sum(), taps.leaves, allow_unused=True)
        return values.detach(), extras.detach(), taps.uses


class _Finder:
    """Names the parameters of the last layer that acts, its weight last."""

    def __init__(self) -> None:
        self.found: tuple[str, ...] = ()

    def listen(self, parts: list[Part], g: Tensor) -> None:
        """Called in the backward pass, from the last operation on."""
        if not self.found and _weight(parts) is not None:
            self.found = tuple(part.name for part in parts)


class _Rows:
    """Forms the rows where the output layer is reached.

    Args:
        pattern: What the signs of the outputs became in an earlier batch.
    """

    def __init__(self, module: str, name: str, outputs: int, pattern: Tensor | None) -> None:
        self._module, self._name, self._outputs = module, name, outputs
        self.rows: Float[Tensor, "e p"] | None = None
        self.pattern = pattern

    @torch.no_grad()
    def listen(self, parts: list[Part], g: Tensor) -> None:
        """Called with the output layer's input and what the output signs became on their way to it."""
        weight = _weight(parts)
        if weight is None or self.rows is not None:
            raise _acts_otherwise(self._module, self._name)
        if weight.is_changed:
            raise _refusal(self._module, f"the input of '{self._name}' is overwritten")
        require_finite(g, "what the outputs became")
        factor = g.abs().flatten(1).amax(dim=1)
        # All rows have the same signs: where these arrive must not depend on the image (as after abs).
        signs = g / factor.reshape(-1, *(1,) * (g.ndim - 1))
        if self.pattern is None or self.pattern.shape[1:] != g.shape[1:]:
            self.pattern = signs[:1]
        used = self.pattern != 0
        alike = bool((signs == self.pattern).all() & (self.pattern.abs() == used).all())
        if not alike or int(used.sum()) != self._outputs:
            raise _refusal(
                self._module, f"its outputs are not those of the last layer, '{self._name}'"
            )
        rows = widened(weight.counted_input(used)).flatten(1)
        if len(parts) > 1:
            rows = torch.cat([rows, rows.new_full((len(rows), 1), self._outputs**0.5)], dim=1)
        self.rows = rows * widened(factor)[:, None]


def _weight(parts: list[Part]) -> ConvPart | OuterPart | None:
    return next((part for part in parts if isinstance(part, ConvPart | OuterPart)), None)


def _acts_otherwise(module: str, name: str) -> ConfigError:
    return _refusal(module, f"'{name}' acts in other ways than through the outputs")


def _refusal(module: str, why: str) -> ConfigError:
    return ConfigError(
        f"all-outputs needs a network whose outputs one linear or convolutional layer makes, and "
        f"that layer among the chosen parameters; of {module}, {why}: leave features.params at all, or "
        "choose features.functional random-signs or mean (the methods das-signs and das-mean)"
    )
