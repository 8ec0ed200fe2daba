"""Estimates an EK-FAC curvature from training samples, in two passes over them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcal.attribution.ekfac import CurvatureConfig, Ekfac, KroneckerBlock, matrix_shape
from diffcal.attribution.functionals import ALL_OUTPUTS
from diffcal.attribution.gradient_fused import FusedGradients, UnknownUse
from diffcal.attribution.gradient_parts import Part
from diffcal.attribution.gradient_taps import Taps
from diffcal.attribution.gradients import Objective, requiring_grad
from diffcal.attribution.outputs import DenoiserObjective, PredictionKind
from diffcal.attribution.parameters import Layout, select_parameters
from diffcal.attribution.projection import Projector
from diffcal.attribution.timesteps import NoiseLevels
from diffcal.core.devices import module_device, one_thread
from diffcal.core.rng import item_normal, item_signs
from diffcal.core.tensors import require_finite
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import DataError

__all__ = ["Samples", "fit_ekfac"]

Samples = tuple[Float[Tensor, "_ _ _ _"], Sequence[int], Tensor | None]
"""Clean samples, their positions in the data set, and their conditions."""


def fit_ekfac(
    denoiser: Denoiser,
    samples: Iterable[Samples],
    levels: NoiseLevels,
    config: CurvatureConfig | None = None,
    *,
    params: str = "all",
    prediction: PredictionKind = "network",
    unknown: UnknownUse = "vmap",
    on_samples: Callable[[int], object] | None = None,
) -> Ekfac:
    """The curvature of the mean squared error of a denoiser's output at its training samples.

    With D outputs and targets drawn by the model itself the Gauss-Newton matrix is ``2/D E[Jᵀ s sᵀ J]``
    for random signs s: every (sample, timestep) has signs and noise of its own. The first pass sums the
    second moments of inputs and output gradients, the second those of rotated gradients. Parameters
    that are no sum of outer products (biases, scales of norms, grouped convolutions) and sides beyond
    ``config.max_side`` keep the basis of their entries. On a CPU one thread adds up, so that the result
    does not depend on how many there are.

    Args:
        samples: Batches, gone through twice; all timesteps of a batch pass through the network at once.
        levels: Noise levels, equally likely.
        on_samples: Told how many samples were done, in both passes.

    Raises:
        ConfigError: parameters without gradients.
        DataError: no samples.
        NumericalError: NaN or infinity.
    """
    config = config or CurvatureConfig(kind="ekfac")
    denoiser.module.eval()
    parameters = select_parameters(denoiser.module, params)
    objective = DenoiserObjective(denoiser, ALL_OUTPUTS, prediction)
    told = on_samples or (lambda count: None)

    def batches() -> Iterator[tuple[Tensor, ...]]:
        for clean, positions, condition in samples:
            yield _rows(denoiser, objective, clean, positions, condition, levels, config.seed)
            told(len(clean))

    on_cpu = module_device(denoiser.module).type == "cpu"
    with one_thread() if on_cpu else nullcontext():
        moments = _Moments(denoiser.module, objective, parameters, config.max_side)
        for rows in batches():
            moments.add(rows)
        bases = moments.bases()
        squares = _RotatedSquares(
            Layout.of({n: tuple(p.shape) for n, p in parameters.items()}), bases
        )
        engine = FusedGradients(
            denoiser.module, objective, parameters, squares, norms="projected", unknown=unknown
        )
        for rows in batches():
            engine(*rows)
        return Ekfac(squares.blocks(2 / prod(denoiser.sample_shape)))


def _rows(
    denoiser: Denoiser,
    objective: DenoiserObjective,
    clean: Tensor,
    positions: Sequence[int],
    condition: Tensor | None,
    levels: NoiseLevels,
    seed: int,
) -> tuple[Tensor, ...]:
    """What the objective takes: every sample at every timestep, each with noise and signs of its own."""
    device = module_device(denoiser.module)
    count, shape = len(levels.timesteps), tuple(clean.shape[1:])

    def drawn(draw: Callable[..., Tensor], stream: str) -> Tensor:
        return torch.stack(
            [draw(seed, f"{stream}|{t}", p, shape) for p in positions for t in levels.timesteps]
        ).to(device)

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.to(device).repeat_interleave(count, dim=0)

    wide = torch.float32 if device.type == "mps" else torch.float64
    return objective.inputs(
        repeated(clean),
        drawn(item_normal, "attribution-curvature-noise"),
        levels.sigmas.to(device, wide).repeat(len(clean)),
        levels.weights.to(device, wide).repeat(len(clean)),
        None if condition is None else repeated(condition),
        drawn(item_signs, "attribution-curvature-signs"),
    )


class _Moments:
    """Second moments of inputs and output gradients of every weight matrix, over all positions."""

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        parameters: Mapping[str, nn.Parameter],
        max_side: int,
    ) -> None:
        self.module, self.objective, self.parameters = module, objective, parameters
        self.max_side = max_side
        self.sums: dict[str, list[Tensor | None]] = {}
        self._copied: set[str] = set()
        self._without: set[str] = set()

    def add(self, rows: tuple[Tensor, ...]) -> None:
        """Add a batch."""
        while True:
            # Whole batches only: what a pass saw before an activation changed is forgotten.
            self._fresh: dict[str, list[Tensor | None]] = {}
            self._changed: str | None = None
            self._pass(rows)
            if self._changed is None:
                break
            self._copied.add(self._changed)
        for name, found in self._fresh.items():
            before = self.sums.get(name)
            if before is None:
                self.sums[name] = found
                continue
            for total, new in zip(before, found, strict=True):
                if total is not None and new is not None:
                    total += new

    def _pass(self, rows: tuple[Tensor, ...]) -> None:
        count = len(rows[0])
        taps = Taps(self.parameters, count, count, self._listen, self._prepare)
        with requiring_grad(self.module, {}):
            with taps:
                values, _ = self.objective(*rows)
            if taps.leaves and values.requires_grad:
                torch.autograd.grad(values.sum(), taps.leaves, allow_unused=True)
        # A use that has no rule would be missing from the sums.
        self._without |= set(taps.unsupported)

    def _prepare(self, part: Part) -> None:
        if part.name in self._copied:
            part.keep_copy()

    def _listen(self, parts: list[Part], g: Tensor) -> None:
        for part in parts:
            if part.is_changed:
                self._changed = part.name
                return
            if part.name in self._without or len(part.shape) < 2:
                continue
            sides = part.sides(g)
            if sides is None or tuple(s.shape[1] for s in sides) != matrix_shape(part.shape):
                self._without.add(part.name)
                continue
            found = [self._moment(side) for side in sides]
            before = self._fresh.get(part.name)
            if before is not None:  # the parameter is used more than once
                found = [
                    None if new is None or old is None else old + new
                    for old, new in zip(before, found, strict=True)
                ]
            self._fresh[part.name] = found

    def _moment(self, side: Tensor) -> Tensor | None:
        return None if side.shape[1] > self.max_side else side.mT @ side

    def bases(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """Eigenvectors on both sides of every parameter; None: the basis of its entries."""
        found: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        for name in self.parameters:
            left, right = (
                (None, None) if name in self._without else self.sums.get(name, (None, None))
            )
            found[name] = (_eigenvectors(left, name), _eigenvectors(right, name))
        return found


def _eigenvectors(moment: Tensor | None, name: str) -> Tensor | None:
    if moment is None:
        return None
    require_finite(moment, f"second moments of '{name}'")
    wide = moment if moment.device.type == "mps" else moment.double()
    return torch.linalg.eigh(wide).eigenvectors.to(moment.dtype)


class _RotatedSquares(Projector):
    """A projector that keeps the squares of rotated gradients and projects nothing."""

    def __init__(
        self, layout: Layout, bases: Mapping[str, tuple[Tensor | None, Tensor | None]]
    ) -> None:
        self.num_params, self.dim = layout.size, 1
        self._names = {offset: name for name, _, offset in layout}
        self._blocks = {
            name: KroneckerBlock(*bases[name], torch.zeros(matrix_shape(shape)))
            for name, shape, _ in layout
        }
        self._rows: dict[str, int] = dict.fromkeys(layout.names, 0)

    def _add(self, out: Tensor, block: Tensor, offset: int) -> None:
        name = self._names[offset]
        held = self._blocks[name]
        values = held.eigenvalues
        if values.device != block.device:
            values = values.to(block.device)
            self._blocks[name] = held = KroneckerBlock(held.left, held.right, values)
        rotated = held.rotated(block.unflatten(1, tuple(values.shape)))
        values += rotated.square().sum(dim=0)
        self._rows[name] += len(block)

    def blocks(self, factor: float) -> dict[str, KroneckerBlock]:
        """Curvature of every parameter: ``factor`` times the means of the squares.

        Raises:
            DataError: nothing was added.
        """
        count = max(self._rows.values(), default=0)
        if count == 0:
            raise DataError("a curvature needs training samples")
        return {
            name: KroneckerBlock(held.left, held.right, held.eigenvalues * (factor / count))
            for name, held in self._blocks.items()
        }
