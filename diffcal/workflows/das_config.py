"""Settings of an attribution index, and the methods that they can start from."""

import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffcal.attribution.featurise import FeatureConfig, GradientMethod
from diffcal.attribution.gradient_fused import UnknownUse
from diffcal.attribution.presets import PRESETS
from diffcal.attribution.score_config import ScoreConfig
from diffcal.config import build_config, check_choices
from diffcal.errors import ConfigError
from diffcal.mixing.encoding import EncoderConfig
from diffcal.workflows.generate import ModelConfig

__all__ = [
    "INDEX_METHODS",
    "METHODS",
    "DasConfig",
    "StoreConfig",
    "TrainingImages",
    "das_config",
    "method_settings",
]

METHODS = tuple(
    name
    for name, preset in PRESETS.items()
    if (preset.get("inputs"), preset.get("checkpoints")) == ("gradients", [1.0])
    and preset["queries"] == "images"
)
"""Methods of one model's gradients: ``das`` (the default), ``das-official``, ``dtrak``, ``trak`` ..."""

INDEX_METHODS = tuple(name for name, preset in PRESETS.items() if "scores" in preset)
"""Everything that can be indexed and scored: also gradients of several checkpoints (``tracincp``,
``gas``), of sampling paths (``journey-trak``), pixels, embeddings and the losses of subset models
(``empirical-influence``, ``datamodel``) in place of gradients."""

SETUPS = Path(__file__).parent / "presets"


@dataclass(frozen=True, kw_only=True)
class TrainingImages:
    """The images that the model was trained on: rows of a source of labelled images."""

    name: str = "digits"
    """See :func:`diffcal.data.sources.open_images`."""
    first_row: int = 0
    rows: int | None = None
    """How many from ``first_row`` on; all that follow if None."""
    image_column: str = "image"
    label_column: str = "label"


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How features are kept on disk."""

    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float16"
    shard_rows: int = 256
    """Images of one file: what one process works on, and what a kill can cost."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.shard_rows < 1:
            raise ConfigError(f"store.shard_rows must be at least 1, got {self.shard_rows}")


@dataclass(frozen=True, kw_only=True)
class DasConfig:
    """Everything that decides an index, and how its scores are computed unless told otherwise."""

    method: str = "das"
    """Where features and scores started from; they say what is done. Pixel and encoder methods take
    embeddings of the images in place of gradients."""
    model: ModelConfig = field(default_factory=ModelConfig)
    models: tuple[str, ...] = ()
    """Several models whose scores are averaged, in place of ``model.source``: trainings with other
    seeds (TRAK's ensembles), or checkpoints of one training (TracInCP, GAS)."""
    data: TrainingImages = field(default_factory=TrainingImages)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Of the methods ``encoder-dot`` and ``encoder-cosine``; CLIP is kind ``transformers``."""
    subset_run: str = ""
    """Run of ``diffcal das lds`` whose models the methods ``empirical-influence`` and ``datamodel``
    ask; model and training images are the run's unless named."""
    gradients: GradientMethod = "fused"
    """``fused``, ``vmap`` or ``loop``: the same numbers at different cost."""
    batch_rows: int = 64
    """(Image, timestep) pairs that pass through the network at once."""
    channels_last: bool = False
    """Keep network and images in that memory format: faster on many GPUs, seldom on a CPU."""
    unknown: UnknownUse = "vmap"
    """What ``fused`` does with a layer that it has no rule for: compute it by vmap, or ``refuse``."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.method not in INDEX_METHODS:
            raise ConfigError(f"unknown method '{self.method}': use {', '.join(INDEX_METHODS)}")
        if len(set(self.models)) < len(self.models):
            raise ConfigError(f"models names one model twice: {', '.join(self.models)}")
        if self.inputs != "gradients" and (self.models or self.scores.method == "kernel"):
            raise ConfigError(
                f"'{self.method}' compares images: it has one model and scores.method dot or cosine"
            )
        if self.inputs == "subset-losses" and self.scores.method != "dot":
            raise ConfigError(f"scores of '{self.method}' are products: scores.method is dot")
        if self.features.curvature.kind != "none" and self.queries_from != "images":
            raise ConfigError(
                f"features.curvature.kind '{self.features.curvature.kind}' is for gradients at images, "
                f"but '{self.method}' asks along the {self.queries_from}: set it to none"
            )
        if self.batch_rows < 1:
            raise ConfigError(f"batch_rows must be at least 1, got {self.batch_rows}")

    @property
    def inputs(self) -> str:
        """What rows are made of: ``gradients``, ``pixels``, ``encoder`` embeddings or
        ``subset-losses``."""
        return str(PRESETS[self.method]["inputs"])

    @property
    def checkpoints(self) -> tuple[float, ...]:
        """Shares of the training at which the method wants the model."""
        return tuple(PRESETS[self.method].get("checkpoints", (1.0,)))

    @property
    def queries_from(self) -> str:
        """What query features are made of: ``images`` or the ``sampling-path`` that led to them."""
        return str(PRESETS[self.method].get("queries", "images"))


def method_settings(method: str, shared: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``method``, ``features`` and ``scores`` of a preset, as values of :class:`DasConfig`.

    Args:
        shared: Settings of the features in place of the preset's own, as ``{"timesteps": 10,
            "projection": {"dim": 2048}}``.
    """
    preset = PRESETS[method]
    values: dict[str, Any] = {"method": method, "scores": preset["scores"]}
    if "features" in preset:
        mine, given = preset["features"], dict(shared or {})
        projection = {**mine["projection"], **given.pop("projection", {})}
        if projection["kind"] not in ("gaussian", "rademacher"):
            projection.pop("unit_variance", None)
        values["features"] = {**mine, **given, "projection": projection}
    return values


def das_config(
    preset: str | None = None,
    overrides: Sequence[str] = (),
    *,
    file: Path | None = None,
) -> DasConfig:
    """Settings from a preset, then a TOML file, then overrides as ``features.timesteps=2``.

    Args:
        preset: A method (``das``, ``das-official``, ``dtrak``, ``trak`` ...), or a set-up of model and
            data that comes with diffcal (``digits``). ``method`` in the file or the overrides
            changes the method of either.

    Raises:
        ConfigError: unknown preset, method or setting.
    """
    base: dict[str, Any] = {}
    if preset in INDEX_METHODS:
        base = {"method": preset}
    elif preset is not None:
        path = SETUPS / f"das-{preset}.toml"
        if not path.exists():
            known = sorted(p.stem.removeprefix("das-") for p in SETUPS.glob("das-*.toml"))
            raise ConfigError(
                f"unknown preset '{preset}'; known: {', '.join([*INDEX_METHODS, *known])}"
            )
        base = tomllib.loads(path.read_text("utf-8"))
    method = _method(base, file, overrides)
    start = method_settings(method, base.get("features"))
    scores = {**start["scores"], **base.get("scores", {})}
    return build_config(
        DasConfig,
        file,
        overrides,
        {**base, **start, "scores": scores},
    )


def _method(base: Mapping[str, Any], file: Path | None, overrides: Sequence[str]) -> str:
    """The method that the last of preset, file and overrides names."""
    method = base.get("method", "das")
    if file is not None and file.is_file():
        with suppress(tomllib.TOMLDecodeError):  # build_config says what is wrong with it
            method = tomllib.loads(file.read_text("utf-8")).get("method", method)
    for override in overrides:
        key, _, value = override.partition("=")
        if key.strip() == "method":
            method = value.strip().strip("\"'")
    if method not in INDEX_METHODS:
        raise ConfigError(f"unknown method '{method}': use {', '.join(INDEX_METHODS)}")
    return str(method)
