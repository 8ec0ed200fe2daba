"""Attribution features: per-sample rows at several timesteps, normalised, put together, projected."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.attribution.ekfac import CurvatureConfig, CurvedProjection, Ekfac
from diffcal.attribution.functionals import (
    ALL_OUTPUTS,
    CUSTOM,
    FUNCTIONALS,
    Functional,
    NamedFunctional,
)
from diffcal.attribution.gradient_fused import FusedGradients, UnknownUse
from diffcal.attribution.gradient_loop import LoopGradients
from diffcal.attribution.gradient_outputs import OutputLayerRows
from diffcal.attribution.gradient_vmap import VmapGradients
from diffcal.attribution.gradients import GradientBatch, NormKind, Objective, PerSampleGradients
from diffcal.attribution.noise import NoisePolicy, attribution_noise
from diffcal.attribution.outputs import DenoiserObjective, PredictionKind
from diffcal.attribution.parameters import Layout, select_parameters
from diffcal.attribution.projection import ProjectionConfig, Projector
from diffcal.attribution.projectors import make_projector
from diffcal.attribution.timesteps import TimestepStrategy, noise_levels
from diffcal.config import check_choices, config_to_dict
from diffcal.core.devices import module_device
from diffcal.core.rng import item_normal, item_signs
from diffcal.core.runs import fingerprint
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ConfigError, DataError

__all__ = [
    "FeatureConfig",
    "Features",
    "Featuriser",
    "GradientMethod",
    "average_over_timesteps",
    "make_gradients",
]

GradientMethod = Literal["fused", "vmap", "loop"]

NORM_EPSILON = 1e-8  # added to every norm that divides, as published


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """What decides the features of a sample, besides the model and the sample itself."""

    functional: str = ALL_OUTPUTS
    """A name of ``FUNCTIONALS``, or ``custom`` (or ``custom:NAME``) for a callable given from Python."""
    prediction: PredictionKind = "network"
    """Form in which the functional sees the network's output; the raw one as published."""
    timesteps: int | tuple[int, ...] = 10
    """How many, placed by ``strategy``, or the timesteps themselves."""
    strategy: TimestepStrategy = "uniform"
    """See :func:`~.timesteps.timestep_grid`. A single one is 0 by ``uniform``, where nothing is noise
    and little is seen: take ``centred`` for it (500)."""
    sigmas: tuple[float, ...] | None = None
    """Noise levels instead of timesteps."""
    noise: NoisePolicy = "shared"
    noise_seed: int = 0
    slot_batch: int = 16
    """Batch whose places ``slot`` noise belongs to: 16 in DAS's scripts, 52 in D-TRAK's."""
    normalise: bool = True
    """Divide the gradient of every timestep by its norm before averaging."""
    combine: Literal["mean", "stack"] = "stack"
    """How a sample's timesteps make one feature. ``mean``: their average, as published; the kernel then
    also compares gradients at different timesteps. ``stack``: as if they were written one after the
    other, so that the kernel is the mean of the timesteps' own kernels; they share the same entries,
    each timestep with random signs of its own, which costs no memory and no accuracy beyond that of
    the sketch."""
    norms: Literal["auto", "exact", "projected"] = "auto"
    """Which norm that is; auto: projected for factorised projections, exact for all others."""
    params: str = "all"
    """Which parameters; see :func:`~diffcal.attribution.parameters.select_parameters`."""
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    curvature: CurvatureConfig = field(default_factory=CurvatureConfig)
    """Of loss gradients: rotate and scale them by the curvature of the training loss first."""

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.is_custom and self.functional not in FUNCTIONALS:
            raise ConfigError(
                f"unknown functional '{self.functional}': use {', '.join(FUNCTIONALS)} or custom"
            )
        if self.functional == ALL_OUTPUTS:
            if self.prediction != "network":
                raise ConfigError(
                    f"{ALL_OUTPUTS} is of the network's own outputs, not of prediction "
                    f"'{self.prediction}'"
                )
            if self.projection.kind in ("identity", "factorised", "factorised_sjlt"):
                raise ConfigError(
                    f"{ALL_OUTPUTS} has no gradients of weight matrices and no length of its own: "
                    f"choose projection.kind sjlt, not '{self.projection.kind}'"
                )
        if self.curvature.kind != "none":
            self._check_curvature()
        if self.functional == "weighted-mse" and self.sigmas is not None:
            raise ConfigError("weighted-mse weighs timesteps: it has no weights for sigmas")

    def _check_curvature(self) -> None:
        kind = self.curvature.kind
        if self.functional != "loss" or self.normalise:
            raise ConfigError(
                f"curvature.kind '{kind}' is of the loss: it goes with functional 'loss' and "
                f"normalise = false, not with '{self.functional}'"
                + (" normalised" if self.normalise else "")
            )
        if self.projection.kind in ("factorised", "factorised_sjlt"):
            raise ConfigError(
                f"curvature.kind '{kind}' rotates whole gradients, which projection.kind "
                f"'{self.projection.kind}' does not form: choose sjlt"
            )

    @property
    def is_custom(self) -> bool:
        """Whether the functional is a callable."""
        return self.functional == CUSTOM or self.functional.startswith(f"{CUSTOM}:")

    @property
    def norm_kind(self) -> NormKind:
        """``norms`` with ``auto`` resolved."""
        if self.norms != "auto":
            return self.norms
        return "projected" if self.projection.kind.startswith("factorised") else "exact"


@dataclass(frozen=True)
class Features:
    """Features of some samples."""

    vectors: Float[Tensor, "n k"]
    """Projected mean gradient of each sample, float32."""
    errors: Float[Tensor, "n t"]
    """Mean squared error of the prediction at each timestep."""
    values: Float[Tensor, "n t"]
    """The functional at each timestep."""


class Featuriser:
    """Features of samples of one denoiser; what is asked for is in ``config``.

    ``phi_i = mean_t S_t P g_it / (||g_it|| + 1e-8)``, with ``g_it`` the gradient of the functional of
    the network's output at the noised sample, over the chosen parameters in order of registration,
    and ``S_t`` the identity, or random signs if timesteps are stacked.
    Without normalisation the gradient of a sample's timesteps is formed and projected once. The
    network runs in evaluation mode. Results do not depend on ``batch_rows`` or on the order of samples,
    up to rounding.

    Args:
        denoiser: The model.
        functional: A callable, where ``config.functional`` is ``custom``; one with a name
            (:class:`~.functionals.NamedFunctional`), where that is ``custom:NAME``.
        method: ``fused``, ``vmap`` or ``loop``: the same numbers at different cost.
        batch_rows: (Sample, timestep) pairs that pass through the network at once.
        channels_last: Keep the network and its input in that memory format (changes the module's
            parameters' strides).
        unknown: What ``fused`` does with parameters that it has no rule for.
        curvature: What :func:`~.ekfac_fit.fit_ekfac` gave for this model and ``config.curvature``, where
            that asks for one.

    Source: DAS (arXiv:2410.18639); the order of normalising, averaging and projecting is that of
    the release.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        config: FeatureConfig | None = None,
        *,
        functional: Functional | None = None,
        method: GradientMethod = "fused",
        batch_rows: int = 64,
        channels_last: bool = False,
        unknown: UnknownUse = "vmap",
        curvature: Ekfac | None = None,
    ) -> None:
        self.denoiser, self.config = denoiser, config or FeatureConfig()
        if (functional is None) == self.config.is_custom:
            raise ConfigError("a callable functional goes with functional = 'custom', and only so")
        self._functional_name = self._named(functional)
        if batch_rows < 1:
            raise ConfigError(f"batch_rows must be at least 1, got {batch_rows}")
        self.batch_rows = batch_rows
        self._lacks_curvature = False
        self._shared_noise: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self._output_signs: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        denoiser.module.eval()
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        if channels_last:
            denoiser.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.levels = noise_levels(
            denoiser, self.config.timesteps, self.config.strategy, self.config.sigmas
        )
        self.objective = DenoiserObjective(
            denoiser, functional or self.config.functional, self.config.prediction
        )
        parameters = select_parameters(denoiser.module, self.config.params)
        # Norms that nobody asks for cost nothing if they are those of the projection.
        norms: NormKind = self.config.norm_kind if self.config.normalise else "projected"
        module, projection = denoiser.module, self.config.projection
        self.gradients: PerSampleGradients
        if self.config.functional == ALL_OUTPUTS:
            if method != "fused":
                raise ConfigError(
                    f"{ALL_OUTPUTS} takes no gradients by {method}: leave it at fused"
                )
            self.gradients = OutputLayerRows(
                module, self.objective, parameters, projection, norms=norms
            )
            self._dim = projection.dim
            self._look()
        else:
            projector = self._projector(parameters, curvature)
            self.gradients = make_gradients(
                method, module, self.objective, parameters, projector, norms=norms, unknown=unknown
            )
            self._dim = projector.dim

    def _projector(
        self, parameters: Mapping[str, torch.nn.Parameter], curvature: Ekfac | None
    ) -> Projector:
        shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        projector = make_projector(self.config.projection, list(shapes.values()))
        asked = self.config.curvature
        if curvature is not None and asked.kind == "none":
            raise ConfigError("a curvature was given, but features.curvature.kind is none")
        self._lacks_curvature = curvature is None and asked.kind != "none"
        if curvature is None:
            return projector
        return CurvedProjection(projector, curvature, Layout.of(shapes), asked.damping)

    def _look(self) -> None:
        """One row of noise, so that a network without an output layer is refused before any work."""
        denoiser, condition = self.denoiser, None
        if denoiser.condition_kind != "none":
            first = torch.eye(1, max(denoiser.num_classes, 1))
            condition = (
                denoiser.condition(first) if denoiser.num_classes else denoiser.unconditional(1)
            )
        noise = item_normal(0, "attribution-look", 0, denoiser.sample_shape)[None]
        self.rows(noise, noise, torch.tensor([0]), condition)

    def _named(self, functional: Functional | None) -> str:
        """What stands for the functional in ``spec``."""
        asked = self.config.functional
        if functional is None:
            return asked
        if not isinstance(functional, NamedFunctional):
            if asked != CUSTOM:
                raise ConfigError(f"features.functional is '{asked}', but the callable has no name")
            return f"{functional.__module__}.{functional.__qualname__}"  # type: ignore[attr-defined]
        if asked not in (CUSTOM, functional.setting):
            raise ConfigError(
                f"features.functional is '{asked}', the callable's '{functional.name}'"
            )
        return functional.setting

    @property
    def dim(self) -> int:
        """Entries of a feature."""
        return self._dim

    @property
    def spec(self) -> dict[str, Any]:
        """Everything that decides the features, as plain values: features mix only if it is equal."""
        values = config_to_dict(self.config)
        # The grid itself says what was asked, however it was asked for.
        for name in ("timesteps", "strategy", "sigmas", "norms"):
            del values[name]
        if self.config.combine == "mean":
            del values["combine"]  # features were averages before there was a choice
        if self.config.curvature.kind == "none":
            del values["curvature"]
        return values | {
            "functional": self._functional_name,
            "norms": self.config.norm_kind if self.config.normalise else "none",
            "slot_batch": self.config.slot_batch if self.config.noise == "slot" else None,
            "timesteps": list(self.levels.timesteps),
            "sigmas": [float(f"{sigma:.9g}") for sigma in self.levels.sigmas.tolist()],
            "parameters": fingerprint(
                [[name, list(shape)] for name, shape, _ in self.gradients.layout]
            ),
            "num_params": self.gradients.layout.size,
            "model": self.denoiser.fingerprint,
            "model_dtype": str(getattr(self.denoiser, "dtype", torch.float32)).removeprefix(
                "torch."
            ),
        }

    def __call__(
        self,
        clean: Float[Tensor, "n c h w"],
        indices: Sequence[int],
        condition: Tensor | None = None,
        *,
        role: str = "train",
    ) -> Features:
        """Features of clean samples.

        Args:
            clean: What ``denoiser.encode`` gives of images.
            indices: Position of each in its data set; decides slot and independent noise.
            condition: What ``denoiser.condition`` gives of class weights; None if unconditional.
            role: ``train`` or ``query``: keeps independent noise apart.

        Raises:
            DataError: lengths that differ.
            NumericalError: a gradient with NaN or infinity.
        """
        samples, levels = len(clean), len(self.levels.timesteps)
        if len(indices) != samples or (condition is not None and len(condition) != samples):
            raise DataError(
                f"{samples} samples, {len(indices)} indices"
                + ("" if condition is None else f", {len(condition)} conditions")
            )
        noise = self._noise(tuple(clean.shape[1:]), indices, role)
        stack = self._stack_signs() if self.config.combine == "stack" else None
        sums = torch.zeros(samples, self.dim)
        errors, values = [], []
        for rows, entries in self._batches(samples, levels):
            sample, level = rows // levels, rows % levels
            part = self.rows(
                clean[sample.to(clean.device)],
                noise(sample, level),
                level,
                None if condition is None else condition[sample.to(condition.device)],
                entries=entries,
            )
            # Added up as they come, so that memory does not grow with the number of timesteps.
            vectors = _divide(part.vectors, part.norms if self.config.normalise else None)
            if stack is not None:
                vectors = vectors * stack[level].to(vectors)
            sums = sums.to(vectors)
            sums.index_add_(0, sample[::entries].to(vectors.device), vectors)
            errors.append(part.extras)
            values.append(part.values)
        return Features(
            sums / max(levels, 1), _table(errors, samples, levels), _table(values, samples, levels)
        )

    def _batches(self, samples: int, levels: int) -> Iterator[tuple[Tensor, int]]:
        """(Sample, level) rows of each batch, sample after sample, and how many have one gradient."""
        if self.config.normalise or self.config.combine == "stack":
            for rows in torch.arange(samples * levels).split(self.batch_rows):
                yield rows, 1
            return
        if levels <= self.batch_rows:
            whole = self.batch_rows // levels * levels
            for rows in torch.arange(samples * levels).split(whole):
                yield rows, levels
            return
        for one in torch.arange(samples * levels).split(levels):
            for rows in one.split(self.batch_rows):
                yield rows, len(rows)

    def _noise(
        self, shape: tuple[int, ...], indices: Sequence[int], role: str
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """From rows' (sample, level) to their noise; shared noise is kept on the network's device."""
        config, timesteps = self.config, self.levels.timesteps
        device = module_device(self.denoiser.module)

        def draw(positions: Sequence[int]) -> Tensor:
            return torch.stack(
                [
                    attribution_noise(
                        config.noise,
                        config.noise_seed,
                        t,
                        positions,
                        shape,
                        role=role,
                        slot_batch=config.slot_batch,
                    )
                    for t in timesteps
                ]
            )

        if config.noise == "shared":
            key = (shape, device)
            if key not in self._shared_noise:
                self._shared_noise[key] = draw([0])[:, 0].to(device)
            shared = self._shared_noise[key]
            return lambda sample, level: shared[level.to(device)]
        drawn = draw(indices)
        return lambda sample, level: drawn[level, sample]

    def _signs(self, shape: tuple[int, ...], device: torch.device) -> Float[Tensor, "t c h w"]:
        """Signs of the output at every timestep, kept on the network's device."""
        key = (shape, device)
        if key not in self._output_signs:
            seed, timesteps = self.config.noise_seed, self.levels.timesteps
            if self.config.functional == ALL_OUTPUTS:  # they mark outputs, the same everywhere
                timesteps = timesteps[:1] * len(timesteps)
            drawn = [item_signs(seed, "attribution-signs", t, shape) for t in timesteps]
            self._output_signs[key] = torch.stack(drawn).to(device)
        return self._output_signs[key]

    def _stack_signs(self) -> Float[Tensor, "t k"]:
        """Signs of the sketch's entries at every timestep."""
        seed = self.config.projection.seed
        return torch.stack(
            [item_signs(seed, "attribution-stack", t, (self.dim,)) for t in self.levels.timesteps]
        )

    def rows(
        self,
        clean: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        level: Tensor,
        condition: Tensor | None = None,
        *,
        entries: int = 1,
    ) -> GradientBatch:
        """Projected gradients of (sample, timestep) rows, or of the sums over several of them.

        Args:
            level: Which of ``levels`` each row is at, int [b].
            entries: How many rows following each other have one gradient together.
        """
        if self._lacks_curvature:
            raise ConfigError(
                f"these features need a curvature ('{self.config.curvature.kind}'): fit_ekfac makes it"
            )
        device = module_device(self.denoiser.module)
        wide = torch.float32 if device.type == "mps" else torch.float64
        level = level.cpu()
        inputs = self.objective.inputs(
            clean.to(device, memory_format=self._format),
            noise.to(device, memory_format=self._format),
            self.levels.sigmas[level].to(device, wide),
            self.levels.weights[level].to(device, wide),
            None if condition is None else condition.to(device),
            self._signs(tuple(clean.shape[1:]), device)[level.to(device)]
            if self.objective.needs_signs
            else None,
        )
        return self.gradients(*inputs, entries=entries)


def average_over_timesteps(
    vectors: Float[Tensor, "n t k"], norms: Float[Tensor, "n t"] | None
) -> Float[Tensor, "n k"]:
    """Mean over timesteps of (projected) gradients, each divided by its norm if norms are given."""
    return _divide(vectors, norms).mean(dim=1)


def _divide(vectors: Tensor, norms: Tensor | None) -> Tensor:
    return vectors if norms is None else vectors / (norms[..., None] + NORM_EPSILON)


def make_gradients(
    method: GradientMethod,
    module: torch.nn.Module,
    objective: Objective,
    parameters: dict[str, torch.nn.Parameter],
    projector: Projector | None = None,
    *,
    norms: NormKind = "exact",
    unknown: UnknownUse = "vmap",
) -> PerSampleGradients:
    """Per-sample gradients by one of three methods that give the same numbers.

    Raises:
        ConfigError: unknown method.
    """
    if method == "fused":
        return FusedGradients(
            module, objective, parameters, projector, norms=norms, unknown=unknown
        )
    if method not in ("vmap", "loop"):
        raise ConfigError(f"unknown gradient method '{method}': use fused, vmap or loop")
    cls = VmapGradients if method == "vmap" else LoopGradients
    return cls(module, objective, parameters, projector, norms=norms)


def _table(columns: list[Tensor], samples: int, levels: int) -> Float[Tensor, "n t"]:
    joined = torch.cat(columns) if columns else torch.empty(0)
    return joined.float().reshape(samples, levels)
