"""Settings of the proof: subsets, the models trained on them, what they are asked, which methods."""

from dataclasses import dataclass, field
from typing import Any

from diffcal.attribution.datamodels import FOLDS
from diffcal.attribution.lds_folds import FEWEST
from diffcal.attribution.presets import PRESETS
from diffcal.config import config_from_dict
from diffcal.diffusion.samplers import SamplerConfig
from diffcal.diffusion.training import OptimizerConfig
from diffcal.errors import ConfigError
from diffcal.mixing.encoding import EncoderConfig
from diffcal.workflows.das_checkpoints import require_stages
from diffcal.workflows.das_config import (
    INDEX_METHODS,
    DasConfig,
    TrainingImages,
    method_settings,
)
from diffcal.workflows.train_diffusion import NetworkConfig, TrainDiffusionConfig

__all__ = ["LIKENESS", "SUBSET_LOSSES", "LdsConfig", "LdsQueries", "LossConfig", "SubsetConfig"]

SUBSET_LOSSES = tuple(
    name for name, preset in PRESETS.items() if preset["inputs"] == "subset-losses"
)
LIKENESS = tuple(name for name, preset in PRESETS.items() if preset["inputs"] == "pixels")


@dataclass(frozen=True, kw_only=True)
class SubsetConfig:
    """Which subsets; see :func:`diffcal.attribution.subsets.subset_masks`."""

    count: int = 32
    fraction: float = 0.5
    seed: int = 7
    stratified: bool = True
    """Every class keeps its share."""
    training_seeds: tuple[int, ...] = (0,)
    """A model of each subset is trained with each of these; their losses are averaged."""
    together: int = 1
    """Subset models that one process trains at once. Results change by rounding only. On a CPU one at a
    time is faster for convolutional networks (``benchmarks/train_together.py``); a GPU that a small
    network leaves idle is where several pay."""

    def __post_init__(self) -> None:
        if self.together < 1:
            raise ConfigError(f"subsets.together must be at least 1, got {self.together}")
        if self.count < 2 or not self.training_seeds:
            raise ConfigError("an LDS needs at least 2 subsets and one training seed")


@dataclass(frozen=True, kw_only=True)
class LdsQueries:
    """Images whose losses are to be predicted, held out and generated."""

    first_row: int = 0
    """Of the held-out images in the training source."""
    validation: int = 100
    """How many of them; none if 0."""
    generated: int = 100
    """How many the attributed model draws, class after class; none if 0."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(preset="fast"))
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.validation, self.generated) < 0 or self.validation + self.generated < 2:
            raise ConfigError("an LDS needs at least two queries")
        if 1 in (self.validation, self.generated):
            raise ConfigError("a set of queries needs at least two images, or none")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """How the loss of a model on a query is measured."""

    timesteps: int = 50
    """Evenly spaced; the published protocol has all 1000, and 100 suffice for development."""
    noises: int = 1
    """Draws at each timestep, the same for all models."""
    batch: int = 256

    def __post_init__(self) -> None:
        if min(self.timesteps, self.noises, self.batch) < 1:
            raise ConfigError("losses: timesteps, noises and batch must be at least 1")


@dataclass(frozen=True, kw_only=True)
class LdsConfig:
    """Everything that decides an LDS experiment."""

    data: TrainingImages = field(default_factory=TrainingImages)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    conditional: bool = True
    seed: int = 42
    """Training seed of the attributed model, which sees all images."""
    subsets: SubsetConfig = field(default_factory=SubsetConfig)
    queries: LdsQueries = field(default_factory=LdsQueries)
    losses: LossConfig = field(default_factory=LossConfig)
    methods: tuple[str, ...] = ("das", "das-official", "dtrak", "trak", "pixel-cosine")
    readouts: tuple[str, ...] = ("signed", "square")
    """Kernel methods are judged with each of these, whatever their own is."""
    features: dict[str, Any] = field(default_factory=dict)
    """Settings that all methods share, as ``{"timesteps": 10, "projection": {"dim": 2048}}``."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Of the methods ``encoder-dot`` and ``encoder-cosine``; the attributed model's own layers by
    default."""
    folds: int = 2
    """Of subsets, for a damping that is judged where it was not chosen."""
    resamples: int = 500

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in INDEX_METHODS:
                raise ConfigError(f"unknown method '{name}': use {', '.join(INDEX_METHODS)}")
            if name in SUBSET_LOSSES:  # they ask the subset models themselves
                rest = self.subsets.count - -(-self.subsets.count // self.folds)
                if self.subsets.count < FEWEST * self.folds or rest < FOLDS:
                    raise ConfigError(
                        f"'{name}' is fitted on some of the {self.subsets.count} subsets and judged on "
                        f"the others: too few for {self.folds} folds"
                    )
                continue
            self.index_config(name)
            require_stages(name, self.optimizer.steps)
            if PRESETS[name].get("queries") == "sampling-path" and not self.queries.generated:
                raise ConfigError(f"'{name}' judges generated queries alone: set queries.generated")

    def index_config(self, method: str) -> DasConfig:
        """What is featurised for ``method``."""
        values = method_settings(method, self.features) | {"encoder": self.encoder}
        return config_from_dict(DasConfig, {**values, "data": self.data})

    @property
    def kept_checkpoints(self) -> tuple[float, ...]:
        """Shares of the training at which some method wants the attributed model."""
        shares = {share for name in self.methods for share in PRESETS[name].get("checkpoints", ())}
        return tuple(sorted(shares - {1.0}))

    def training_config(self, seed: int) -> TrainDiffusionConfig:
        """How one model is trained, on images that are handed over."""
        steps = self.optimizer.steps
        return TrainDiffusionConfig(
            data=self.data.name,
            conditional=self.conditional,
            network=self.network,
            optimizer=self.optimizer,
            seed=seed,
            save_every=min(1000, steps),
            sample_every=steps,
            sample_steps=8,
            weights="float32",
        )
