"""Settings of classifier training; the defaults are the recipe of the calibration literature."""

from dataclasses import dataclass, field
from typing import Any, Literal

from diffcal.calibration.losses.registry import LOSSES, build_loss
from diffcal.config import check_choices
from diffcal.errors import ConfigError

__all__ = [
    "AugmentationConfig",
    "ClassifierConfig",
    "DataMethodConfig",
    "LossConfig",
    "MixedConfig",
]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """A loss of :data:`diffcal.calibration.losses.registry.LOSSES` with its parameters."""

    name: str = "cross_entropy"
    params: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        build_loss(self.name, **self.params)


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Random crops and mirror images, drawn for each image by itself."""

    crop_padding: int = 4
    """Pixels added on every side before cropping back; 0 switches cropping off."""
    padding: Literal["black", "reflect"] = "black"
    flip: bool = True
    """Mirror half of the images; wrong for digits."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.crop_padding < 0:
            raise ConfigError(
                f"augmentation.crop_padding must not be negative, got {self.crop_padding}"
            )


@dataclass(frozen=True, kw_only=True)
class DataMethodConfig:
    """Blending of the real images of a batch with each other, before any loss sees them."""

    name: Literal["none", "mixup", "rank_mixup"] = "none"
    """``mixup``: the blended batch with blended targets replaces the raw one, under any loss (Zhang
    et al. 2018, arXiv:1710.09412). ``rank_mixup``: the raw batch trains as ever; blended copies of it
    enter through ``ranking`` alone (Noh et al. 2023, arXiv:2308.11990)."""
    alpha: float | None = None
    """Of ``Beta(alpha, alpha)``. By default 0.2 for mixup (calibration studies use 0.1 to 0.4) and 2
    for RankMixup (its CIFAR setting; 1 on Tiny-ImageNet)."""
    probability: float = 1.0
    """Chance of each batch to be blended; of each example if ``per_example``."""
    per_example: bool = False
    """Mixup with a share of its own for each example instead of one for the batch."""
    copies: int | None = None
    """Blended copies that RankMixup ranks; by default 3 for M-NDCG and 1 for MRL."""
    ranking: LossConfig = field(default_factory=lambda: LossConfig(name="rank_mixup_mndcg"))
    """RankMixup's term, ``rank_mixup_mndcg`` or ``rank_mixup_mrl``, with its coefficient, margin and
    so on; ``coefficient`` times it is added to the loss of the raw batch."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise ConfigError(f"data_method.alpha must be positive, got {self.alpha}")
        if not 0 < self.probability <= 1:
            raise ConfigError(
                f"data_method.probability must be in (0, 1], got {self.probability}; "
                "name = 'none' switches blending off"
            )
        if self.copies is not None and self.copies < 1:
            raise ConfigError(f"data_method.copies must be at least 1, got {self.copies}")
        if not getattr(LOSSES[self.ranking.name], "needs_copies", False):
            ranking = [n for n, loss in LOSSES.items() if getattr(loss, "needs_copies", False)]
            raise ConfigError(
                f"data_method.ranking is {' or '.join(ranking)}, got '{self.ranking.name}'; the "
                "loss of the raw batch is set by 'loss'"
            )
        rank = ("copies", self.copies is not None), ("ranking", self.ranking != _RANKING)
        owners = {
            "none": (*rank, ("per_example", self.per_example), ("alpha", self.alpha is not None)),
            "mixup": rank,
            "rank_mixup": (("per_example", self.per_example),),
        }
        for name, given in owners[self.name]:
            if given:
                raise ConfigError(f"data_method '{self.name}' does not read data_method.{name}")

    @property
    def strength(self) -> float:
        """``alpha`` or its default."""
        return self.alpha if self.alpha is not None else {"mixup": 0.2}.get(self.name, 2.0)

    @property
    def copy_count(self) -> int:
        """``copies`` or its default; 1 for mixup."""
        if self.name != "rank_mixup":
            return 1
        return self.copies or {"rank_mixup_mrl": 1}.get(self.ranking.name, 3)


_RANKING = LossConfig(name="rank_mixup_mndcg")


@dataclass(frozen=True, kw_only=True)
class MixedConfig:
    """How semantically mixed images take part (Luo et al. 2025, arXiv:2504.13548)."""

    loss: LossConfig = field(default_factory=lambda: LossConfig(name="squared_error"))
    weight: float = 1.0
    policy: Literal["paired", "uniform"] = "paired"
    """``paired``: each real image of class y brings members of a group that contains y.
    ``uniform``: mixed images in random order, whatever the real ones are."""
    per_real: int = 2
    """Mixed images per real image."""
    anchor_fraction: float = 0.5
    """Share of the paired images that are anchors: the member that looks most like y."""
    start_epoch: float = 0.0
    """Epochs on real images alone before mixed ones join."""
    ramp_epochs: float = 0.0
    """Epochs over which the weight then grows linearly to its value."""
    batchnorm: Literal["separate", "joint", "auxiliary"] = "separate"
    """``separate``: two passes, each normalised by itself; the running averages, used at test,
    see both. ``joint``: one pass over all images. ``auxiliary``: two passes; mixed images
    leave the running averages alone, so that real statistics are used at test."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.weight < 0 or self.start_epoch < 0 or self.ramp_epochs < 0:
            raise ConfigError("mixed: weight, start_epoch and ramp_epochs must not be negative")
        if self.per_real < 1:
            raise ConfigError(f"mixed.per_real must be at least 1, got {self.per_real}")
        if not 0 <= self.anchor_fraction <= 1:
            raise ConfigError(
                f"mixed.anchor_fraction must be in [0, 1], got {self.anchor_fraction}"
            )


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Optimiser, schedule, losses and precision of one training run."""

    model: str = "resnet50"
    """Name for :func:`diffcal.models.registry.build_classifier`."""
    epochs: int = 200
    steps: int | None = None
    """Total optimiser steps; replaces ``epochs`` as the length of the run."""
    batch_size: int = 128
    """Real images per step, over all processes and accumulation passes."""
    accumulate: int = 1
    """Forward-backward passes per step; BatchNorm then sees smaller batches."""
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    nesterov: bool = False
    schedule: Literal["milestones", "cosine", "constant"] = "milestones"
    milestones: tuple[float, ...] = (0.4, 0.6)
    """Shares of the run after which the rate falls tenfold: 80 and 120 of 200 epochs."""
    warmup_epochs: float = 0.0
    clip: float | None = 2.0
    """Largest gradient norm."""
    reduction: Literal["mean", "sum"] = "mean"
    """``sum`` multiplies the objective by the batch size before clipping, which makes nearly
    every early step a normalised-gradient step (Mukhoti et al. 2020, arXiv:2002.09437)."""
    loss: LossConfig = field(default_factory=LossConfig)
    data_method: DataMethodConfig = field(default_factory=DataMethodConfig)
    mixed: MixedConfig = field(default_factory=MixedConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    ema: float | None = None
    """Decay per step of an average of the weights, which is then what is evaluated and saved."""
    select: Literal["last", "best_accuracy", "best_nll"] = "last"
    """Which epoch to keep, by the validation images."""
    precision: Literal["float32", "bf16"] = "float32"
    channels_last: bool = True
    compile: bool = False
    """Compile the network with torch.compile (a minute of preparation; needs a C compiler on CPU)."""
    evaluate_every: int = 1
    """Epochs between validations."""
    save_every: int = 1
    """Epochs between saved states."""
    save_every_steps: int | None = None
    """Steps between saved states, besides the epochs'."""

    def __post_init__(self) -> None:
        check_choices(self)
        counts = {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
            "evaluate_every": self.evaluate_every,
            "save_every": self.save_every,
            "steps": self.steps or (1 if self.steps is None else 0),
            "save_every_steps": self.save_every_steps
            or (1 if self.save_every_steps is None else 0),
        }
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}"
            )
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.weight_decay < 0 or not 0 <= self.momentum < 1:
            raise ConfigError("weight_decay must not be negative and momentum must be in [0, 1)")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("nesterov needs a momentum above 0")
        if not all(0 < share <= 1 for share in self.milestones):
            raise ConfigError(
                f"milestones are shares of the run in (0, 1], got {list(self.milestones)}"
            )
        if self.clip is not None and self.clip <= 0:
            raise ConfigError(f"clip must be positive or none, got {self.clip}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"ema must be in (0, 1) or none, got {self.ema}")
        if self.warmup_epochs < 0:
            raise ConfigError(f"warmup_epochs must not be negative, got {self.warmup_epochs}")
