"""Per-sample gradients and sketches from one forward and one backward pass without weight gradients."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, final

import torch
from torch import Tensor, nn

import diffcal.attribution.gradient_rules  # noqa: F401  (fills the table of rules)
from diffcal.attribution.gradient_parts import Part
from diffcal.attribution.gradient_taps import Taps
from diffcal.attribution.gradient_vmap import vmap_gradients
from diffcal.attribution.gradients import (
    GradientBatch,
    NormKind,
    Objective,
    PerSampleGradients,
    RowSums,
    requiring_grad,
)
from diffcal.attribution.projection import Projector
from diffcal.attribution.projection_factorised import FactorisedProjection, LayerSketch
from diffcal.attribution.projectors import ChainedProjection
from diffcal.core.tensors import require_finite
from diffcal.errors import ConfigError

__all__ = ["FusedGradients", "UnknownUse"]

UnknownUse = Literal["vmap", "refuse"]

_log = logging.getLogger(__name__)


@final
class FusedGradients(PerSampleGradients):
    """The fast way: taps on operations, parameters frozen, every layer projected as it is reached.

    With a factorised projector (alone or followed by another), activations are sketched in the
    forward pass and output gradients in the backward pass, and no gradient of a weight matrix is
    ever formed. With any other projector, each layer's per-sample gradient is formed, projected and
    dropped. Entries of a batch may be any mix of samples and timesteps. Under half precision autocast
    products for a layer's gradient or sketch are of half precision numbers, summed in float32 and
    rounded once, as autograd's own weight gradients are.

    The first batch checks two of its rows against ``torch.autograd``, parameter by parameter, so
    that a use which the taps cannot see (inside compiled code, say) is never skipped in silence.

    Exact norms of gradients that are never formed are ghost norms: from Gram matrices of activations
    and output gradients, or from the gradient of a layer where that is cheaper.

    Args:
        unknown: Parameters that act through an operation without a rule: ``vmap`` computes them
            exactly in a second pass (and says so once in the log), ``refuse`` raises.
        check: Check the first batch.

    Raises:
        ConfigError: a refused parameter, rows that influence each other, or a module that
            recomputes activations (gradient checkpointing).
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        projector: Projector | None = None,
        *,
        norms: NormKind = "exact",
        unknown: UnknownUse = "vmap",
        check: bool = True,
    ) -> None:
        super().__init__(module, objective, parameters, projector, norms=norms)
        recomputing = [
            name
            for name, child in module.named_modules()
            if getattr(child, "gradient_checkpointing", False)
        ]
        if recomputing:
            raise ConfigError(
                f"'{recomputing[0] or type(module).__name__}' recomputes activations: switch gradient "
                "checkpointing off (no activation of a weight gradient has to be kept here)"
            )
        if unknown not in ("vmap", "refuse"):
            raise ConfigError(f"unknown must be vmap or refuse, got '{unknown}'")
        self._unknown, self._to_check = unknown, check
        self.slow_parameters: dict[str, str] = {}
        """Parameters that go through ``vmap``, and why."""
        self._copied: set[str] = set()  # parameters whose activations are overwritten in place
        first = self.projector.first if isinstance(self.projector, ChainedProjection) else None
        factorised = first if first is not None else self.projector
        self._layers: dict[str, LayerSketch] = {}
        if isinstance(factorised, FactorisedProjection):
            self._layers = dict(zip(self.layout.names, factorised.layers, strict=True))
        self._device = torch.device("cpu")

    def _compute(self, inputs: tuple[Tensor, ...], entries: int) -> GradientBatch:
        if self._to_check:
            self._check(tuple(_two_rows(tensor, entries) for tensor in inputs))
            self._to_check = False
        return self._run(inputs, entries)

    def _layers_here(self) -> dict[str, LayerSketch]:
        """Sketches by parameter, their factors on the parameters' device (moved once)."""
        device = next(iter(self.parameters.values())).device
        if device != self._device:
            self._layers = {name: _moved(layer, device) for name, layer in self._layers.items()}
            self._device = device
        return self._layers

    def _run(self, inputs: tuple[Tensor, ...], entries: int) -> GradientBatch:
        while True:
            sums = _Sums(len(inputs[0]) // entries, self)
            try:
                values, extras = self._pass(inputs, sums)
            except _ChangedInPlace as changed:
                self._copied.add(str(changed))
                continue
            break
        if self.slow_parameters:
            slow = {name: self.parameters[name] for name in self.slow_parameters}
            gradients, _, _ = vmap_gradients(self.module, self.objective, slow, inputs, entries)
            for name, gradient in gradients.items():
                sums.add(name, gradient)
        return sums.finish(values, extras)

    def _pass(
        self, inputs: tuple[Tensor, ...], sums: "_Sums", weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        fast = {n: p for n, p in self.parameters.items() if n not in self.slow_parameters}
        taps = Taps(fast, sums.rows, len(inputs[0]), sums.listen, sums.prepare)
        with requiring_grad(self.module, {}):
            with taps:
                values, extras = self.objective(*inputs)
            self._hand_over(taps.unsupported)
            sums.begin(taps.uses, self.slow_parameters)
            if taps.leaves and values.requires_grad:
                total = (values if weights is None else values * weights).sum()
                torch.autograd.grad(total, taps.leaves, allow_unused=True)
            sums.flush()
        return values.detach(), extras.detach()

    def _hand_over(self, unsupported: Mapping[str, str]) -> None:
        """Let ``vmap`` have parameters, or refuse them."""
        fresh = {n: why for n, why in unsupported.items() if n not in self.slow_parameters}
        if not fresh:
            return
        named = ", ".join(f"{name} ({why})" for name, why in list(fresh.items())[:_NAMED])
        if len(fresh) > _NAMED:
            named += f" and {len(fresh) - _NAMED} more"
        if self._unknown == "refuse":
            raise ConfigError(f"no fused per-sample gradient for: {named}")
        _log.warning("per-sample gradients by vmap, in a second pass, for: %s", named)
        self.slow_parameters.update(fresh)

    def _check(self, pair: tuple[Tensor, ...]) -> None:
        """Compare what the first entry adds to two rows with autograd, parameter by parameter."""
        pair = tuple(
            t.detach().requires_grad_() if t.is_floating_point() else t.detach() for t in pair
        )
        with requiring_grad(self.module, self.parameters):
            values, _ = self.objective(*pair)
            leaves = [*self.parameters.values(), *(t for t in pair if t.requires_grad)]
            found = torch.autograd.grad(values[0], leaves, materialize_grads=True)
        for gradient in found:
            # Before rows are compared: what is not a number differs from everything.
            require_finite(gradient, "per-sample gradients")
        wanted, by_input = found[: len(self.parameters)], found[len(self.parameters) :]
        if any(bool(gradient[1:].any()) for gradient in by_input):
            raise ConfigError(
                f"rows of a batch influence each other in {type(self.module).__name__}: its "
                "per-sample gradients are not defined"
            )
        first = torch.zeros_like(values.detach())
        first[0] = 1
        seen = self._blocks(tuple(t.detach() for t in pair), first)
        half = values.dtype not in (torch.float32, torch.float64)
        tolerance = _CHECK_HALF if half or getattr(self.objective, "is_half", False) else _CHECK
        # What is nothing but rounding (a bias before a norm) has no direction to compare.
        floor = _CHECK_FLOOR * tolerance * max(float(gradient.norm()) for gradient in wanted)
        bad = {}
        for (name, parameter), gradient in zip(self.parameters.items(), wanted, strict=True):
            if name in self.slow_parameters:
                continue
            block = seen.get(name)
            rows = parameter.new_zeros(2, parameter.numel()) if block is None else block
            size = float(gradient.norm())
            off = float((rows[0] - gradient.flatten()).norm()), float(rows[1].norm())
            if not max(off) <= tolerance * size + floor:
                bad[name] = (
                    f"off by {off[0]:.1e} of {size:.1e} in its own row and {off[1]:.1e} in another"
                )
        self._hand_over(bad)

    def _blocks(self, inputs: tuple[Tensor, ...], weights: Tensor) -> dict[str, Tensor]:
        """Whole gradients of two rows of weighted entries, by parameter."""
        while True:
            seen = _Blocks(2, self)
            try:
                self._pass(inputs, seen, weights)
            except _ChangedInPlace as changed:
                self._copied.add(str(changed))
                continue
            return seen.blocks


_NAMED = 6  # parameters that a message lists
_CHECK = 1e-3  # largest relative error of a parameter's gradient in the check of the first batch
_CHECK_HALF = 5e-2
_CHECK_FLOOR = 1e-2  # and in units of that error of the largest parameter's


def _two_rows(tensor: Tensor, entries: int) -> Tensor:
    """Up to two entries of each of the first two rows, of one row twice if it is alone."""
    rows = tensor.unflatten(0, (-1, entries))[:2, :2]
    return (rows if len(rows) > 1 else torch.cat([rows, rows])).flatten(0, 1)


def _moved(layer: LayerSketch, device: torch.device) -> LayerSketch:
    left, right = (None if f is None else f.to(device) for f in (layer.left, layer.right))
    return replace(layer, left=left, right=right)


class _ChangedInPlace(Exception):
    """Names the parameter whose activation was overwritten before the backward pass."""


class _Sums(RowSums):
    """Adds up parts in the order in which the backward pass reaches them."""

    def __init__(self, rows: int, engine: FusedGradients) -> None:
        super().__init__(rows, engine)
        self._layers, self._copied = engine._layers_here(), engine._copied
        self._needs_gradients = not self._layers or self.norms == "exact"
        self._sketched = self.vectors
        if self._layers and isinstance(self.projector, ChainedProjection):
            self._sketched = self.vectors.new_zeros(rows, self.projector.first.dim)
        self._left: dict[str, int] = {}
        self._several: dict[str, Tensor] = {}
        self._dropped: Mapping[str, str] = {}

    def prepare(self, part: Part) -> None:
        """Called in the forward pass, for every part."""
        if part.name in self._copied:
            part.keep_copy()
        if self._layers and not self._needs_gradients and part.is_sketchable:
            part.shrink(self._layers[part.name])

    def begin(self, uses: Mapping[str, int], dropped: Mapping[str, str]) -> None:
        """Called between the passes."""
        self._left, self._dropped = dict(uses), dropped
        self._single = {name for name, count in uses.items() if count == 1}

    def listen(self, parts: list[Part], g: Tensor) -> None:
        """Called in the backward pass, for every operation."""
        for part in parts:
            if part.name in self._dropped:
                continue
            if part.is_changed:
                raise _ChangedInPlace(part.name)
            self._left[part.name] -= 1
            if part.name in self._single:
                self._add_part(part, g)
                continue
            # Norms do not add up over several uses of one parameter, gradients and sketches do.
            block = self._block(part, g)
            sum_so_far = self._several.get(part.name)
            self._several[part.name] = block if sum_so_far is None else sum_so_far + block
            if not self._left[part.name]:
                self._add_block(part.name, self._several.pop(part.name))

    def flush(self) -> None:
        """Called after the backward pass: uses without influence on the output were never heard."""
        for name in list(self._several):
            self._add_block(name, self._several.pop(name))

    def _sketch(self, part: Part, g: Tensor) -> Tensor:
        layer = self._layers[part.name]
        return part.sketch(g, layer) if part.is_sketchable else Part.sketch(part, g, layer)

    def _block(self, part: Part, g: Tensor) -> Tensor:
        sketched = self._layers and not self._needs_gradients
        return self._sketch(part, g) if sketched else part.exact(g).reshape(self.rows, -1)

    def _add_part(self, part: Part, g: Tensor) -> None:
        if not self._layers:
            self.add(part.name, part.exact(g))
            return
        if self.norms == "exact":
            self.squares += part.squared_norm(g)
        self._add_sketch(part.name, self._sketch(part, g))

    def _add_block(self, name: str, block: Tensor) -> None:
        if self._layers and not self._needs_gradients:
            self._add_sketch(name, block)
        else:
            self.add(name, block)

    @torch.no_grad()
    def add(self, name: str, gradient: Tensor) -> None:
        """Add whole gradients of one parameter."""
        if not self._layers:
            super().add(name, gradient)
            return
        layer = self._layers[name]
        block = gradient.reshape(self.rows, layer.rows, layer.columns).to(self.vectors.dtype)
        if self.norms == "exact":
            self.squares += torch.linalg.vector_norm(block.flatten(1), dim=1).square()
        self._add_sketch(name, layer.apply(block))

    def _add_sketch(self, name: str, sketch: Tensor) -> None:
        slot = self._layers[name].slot
        flat = sketch.reshape(self.rows, -1)
        self._sketched[:, slot : slot + flat.shape[1]] += flat

    def finish(self, values: Tensor, extras: Tensor) -> GradientBatch:
        """The batch, when every parameter has been added."""
        if self._sketched is not self.vectors:
            assert isinstance(self.projector, ChainedProjection)
            self.projector.second.accumulate(self.vectors, self._sketched)
        return super().finish(values, extras)


class _Blocks(_Sums):
    """Keeps whole gradients by name, for the check."""

    def __init__(self, rows: int, engine: FusedGradients) -> None:
        super().__init__(rows, engine)
        self._layers, self._needs_gradients = {}, True
        self.blocks: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """Keep the gradients of one parameter."""
        self.blocks[name] = gradient.reshape(self.rows, -1)
