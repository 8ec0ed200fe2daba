"""Settings of an attribution index, and the methods that they can start from."""

import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffcal.attribution.featurise import FeatureConfig, GradientMethod
from diffcal.attribution.presets import PRESETS
from diffcal.attribution.score_config import ScoreConfig
from diffcal.config import build_config
from diffcal.errors import ConfigError
from diffcal.workflows.generate import ModelConfig

__all__ = ["METHODS", "DasConfig", "StoreConfig", "TrainingImages", "das_config"]

METHODS = tuple(
    name
    for name, preset in PRESETS.items()
    if (preset.get("inputs"), preset.get("checkpoints")) == ("gradients", [1.0])
    and preset["queries"] == "images"
)
"""Methods of one model's gradients: ``das`` (the default), ``das-official``, ``dtrak``, ``trak`` ..."""

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
        if self.shard_rows < 1:
            raise ConfigError(f"store.shard_rows must be at least 1, got {self.shard_rows}")


@dataclass(frozen=True, kw_only=True)
class DasConfig:
    """Everything that decides an index, and how its scores are computed unless told otherwise."""

    method: str = "das"
    """Where features and scores started from; they say what is done."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: TrainingImages = field(default_factory=TrainingImages)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    scores: ScoreConfig = field(default_factory=ScoreConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    gradients: GradientMethod = "fused"
    """``fused``, ``vmap`` or ``loop``: the same numbers at different cost."""
    batch_rows: int = 64
    """(Image, timestep) pairs that pass through the network at once."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"unknown method '{self.method}': use {', '.join(METHODS)}")
        if self.batch_rows < 1:
            raise ConfigError(f"batch_rows must be at least 1, got {self.batch_rows}")


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
    if preset in METHODS:
        base = {"method": preset}
    elif preset is not None:
        path = SETUPS / f"das-{preset}.toml"
        if not path.exists():
            known = sorted(p.stem.removeprefix("das-") for p in SETUPS.glob("das-*.toml"))
            raise ConfigError(f"unknown preset '{preset}'; known: {', '.join([*METHODS, *known])}")
        base = tomllib.loads(path.read_text("utf-8"))
    method = _method(base, file, overrides)
    start = PRESETS[method]
    features = {**start["features"], **base.get("features", {})}
    if "projection" in base.get("features", {}):
        features["projection"] = {
            **start["features"]["projection"],
            **base["features"]["projection"],
        }
    scores = {**start["scores"], **base.get("scores", {})}
    return build_config(
        DasConfig,
        file,
        overrides,
        {**base, "method": method, "features": features, "scores": scores},
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
    if method not in METHODS:
        raise ConfigError(f"unknown method '{method}': use {', '.join(METHODS)}")
    return str(method)
