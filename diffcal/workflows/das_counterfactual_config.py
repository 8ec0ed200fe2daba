"""Settings of counterfactual retraining, and where they come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffcal.attribution.presets import PRESETS
from diffcal.config import build_config, config_from_dict, config_to_dict
from diffcal.core.runs import read_json
from diffcal.diffusion.checkpoints import bundled_checkpoint
from diffcal.diffusion.samplers import SamplerConfig
from diffcal.errors import ArtifactError, ConfigError
from diffcal.mixing.encoding import EncoderConfig
from diffcal.workflows.das_checkpoints import require_stages
from diffcal.workflows.das_config import (
    INDEX_METHODS,
    DasConfig,
    TrainingImages,
    method_settings,
)
from diffcal.workflows.das_report import manifest_of_scores
from diffcal.workflows.preset_files import preset_config
from diffcal.workflows.train_diffusion import TrainDiffusionConfig

__all__ = ["CounterfactualConfig", "DrawnQueries", "counterfactual_config"]


@dataclass(frozen=True, kw_only=True)
class DrawnQueries:
    """The generated images that are to change."""

    count: int = 10
    """How many the model draws, class after class; of scores that are given, the first so many."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(preset="fast"))
    """Images of scores that are given have their own."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"queries.count must be at least 1, got {self.count}")


@dataclass(frozen=True, kw_only=True)
class CounterfactualConfig:
    """Everything that decides which models are trained, and how their images are compared."""

    training: TrainDiffusionConfig = field(default_factory=TrainDiffusionConfig)
    """The recipe of the attributed model: all others follow it, with fewer images or another seed."""
    scores: tuple[str, ...] = ()
    """Folders of ``diffcal das score`` that say what to remove, and whose queries are drawn again.
    Without any, the model is trained, draws queries of its own and is attributed by ``methods``."""
    methods: tuple[str, ...] = ("das", "pixel-cosine")
    """Methods that are computed here, besides the scores."""
    features: dict[str, Any] = field(default_factory=dict)
    """Settings that all methods share, as ``{"timesteps": 10, "projection": {"dim": 2048}}``."""
    queries: DrawnQueries = field(default_factory=DrawnQueries)
    remove: int = 50
    """Training images that each removal takes out."""
    random_draws: int = 3
    """Removals of as many random images; each serves all queries."""
    other_seeds: tuple[int, ...] = (1001,)
    """Trained on everything with these seeds: what chance alone changes."""
    together: int = 1
    """Models (other than the attributed one) trained at once as one stack, which saves time where
    networks are small; each ends as it would alone, up to rounding."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """In which likeness is measured, besides pixels; the attributed model's own layers by default."""
    centre: bool = True
    """Take the mean training embedding away first; the published cosines (of CLIP) are without."""
    resamples: int = 1000
    seed: int = 0
    """Of starting noise, random removals and bootstrap."""

    def __post_init__(self) -> None:
        if not self.scores and not self.methods:
            raise ConfigError("give scores, or methods that say which images to remove")
        if min(self.remove, self.random_draws, self.together) < 1:
            raise ConfigError("remove, random_draws and together must be at least 1")
        if self.training.seed in self.other_seeds:
            raise ConfigError(
                f"other_seeds holds {self.training.seed}, which is the seed of the attributed model"
            )
        for name in self.methods:
            if name not in INDEX_METHODS:
                raise ConfigError(f"unknown method '{name}': use {', '.join(INDEX_METHODS)}")
            if PRESETS[name]["inputs"] == "subset-losses":
                raise ConfigError(
                    f"'{name}' needs models trained on subsets: score it with diffcal das index and "
                    "score, and give that folder"
                )
            self.index_config(name, "")
            require_stages(name, self.training.optimizer.steps)
            if PRESETS[name].get("queries") == "sampling-path":
                raise ConfigError(
                    f"'{name}' needs queries of diffcal csm: score them with diffcal das score, and "
                    "give that folder"
                )
            if self.scores and len(PRESETS[name].get("checkpoints", [1.0])) > 1:
                raise ConfigError(
                    f"'{name}' needs the model at several stages of its training, which scores do not "
                    "tell: score it with diffcal das index and score, and give that folder"
                )
        if self.training.initialise_from is not None:
            raise ConfigError(
                "training.initialise_from: a model that starts from weights which have seen all images "
                "cannot tell what would be without them"
            )

    @property
    def kept_checkpoints(self) -> tuple[float, ...]:
        """Shares of the training at which some method wants the attributed model."""
        shares = {share for name in self.methods for share in PRESETS[name].get("checkpoints", [])}
        return tuple(sorted(shares - {1.0}))

    def index_config(self, method: str, model: str) -> DasConfig:
        """What is featurised for ``method``."""
        training = self.training
        data = TrainingImages(
            name=training.data,
            first_row=training.first_row,
            rows=training.rows,
            image_column=training.image_column,
            label_column=training.label_column,
        )
        values = method_settings(method, self.features) | {"encoder": self.encoder}
        return config_from_dict(DasConfig, {**values, "data": data, "model": {"source": model}})


def counterfactual_config(
    preset: str | None = None,
    scores: Sequence[Path | str] = (),
    overrides: Sequence[str] = (),
    *,
    file: Path | None = None,
) -> CounterfactualConfig:
    """Settings from a preset or from scores, then a TOML file, then overrides.

    Args:
        preset: ``digits``: a small model of 300 digits and 10 queries.
        scores: Folders of ``diffcal das score``; the recipe is the one that the model's checkpoint
            tells.
        overrides: As ``remove=100``.

    Raises:
        ConfigError: unknown preset or setting, or both a preset and scores.
        ArtifactError: no finished scores, or a model that does not tell how it was trained.
    """
    if not scores:
        return preset_config(CounterfactualConfig, "counterfactual", preset, overrides, file=file)
    if preset is not None:
        raise ConfigError("give a preset or scores: scores bring model and images of their own")
    folders = [str(folder) for folder in scores]
    base = {
        "training": recipe_of(manifest_of_scores(Path(folders[0]))),
        "scores": folders,
        "methods": ["pixel-cosine"],
    }
    return build_config(CounterfactualConfig, file, overrides, base)


def recipe_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How the model behind some scores was trained, with the place where its images are now.

    Raises:
        ArtifactError: the checkpoint does not tell, or it was trained on other images than those that
            were scored.
    """
    source = manifest["model"]["source"]
    folder = (
        bundled_checkpoint(source.removeprefix("bundled:"))
        if source.startswith("bundled:")
        else Path(source)
    )
    path = folder / "config.json"
    values = read_json(path) if path.is_file() else {}
    recipe = (values.get("training") or {}).get("config")
    if not isinstance(recipe, dict) or "optimizer" not in recipe:
        raise ArtifactError(
            f"'{source}' does not tell how it was trained, so no model can be trained without some "
            "images: counterfactuals need a checkpoint of diffcal train-diffusion"
        )
    recipe = config_to_dict(config_from_dict(TrainDiffusionConfig, recipe))
    data = manifest["data"]
    for name in ("first_row", "rows"):
        if recipe[name] != data[name]:
            raise ArtifactError(
                f"'{source}' was trained with {name} {recipe[name]}, but the scores are of training "
                f"images with {name} {data[name]}: make the index of the images it was trained on"
            )
    return recipe | {
        "data": data["name"],
        "image_column": data["image_column"],
        "label_column": data["label_column"],
    }
