"""What a counterfactual experiment asks about: the model's own queries, or those of finished scores."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from diffcal.core.runs import sha256_file
from diffcal.data.sources import ImageSource, open_images
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ArtifactError, ConfigError, DataError
from diffcal.workflows.das_counterfactual_config import CounterfactualConfig, recipe_of
from diffcal.workflows.das_images import open_queries
from diffcal.workflows.das_redraw import ClassImages, MixImages, Redrawable
from diffcal.workflows.das_report import manifest_of_scores
from diffcal.workflows.generate import ModelConfig, open_model

__all__ = ["Asked", "GivenScores", "ranked_removals"]


@dataclass(frozen=True)
class GivenScores:
    """Finished scores that say what to remove."""

    folders: tuple[Path, ...]
    manifests: tuple[dict[str, Any], ...]

    @classmethod
    def open(cls, config: CounterfactualConfig) -> "GivenScores | None":
        """The scores of a configuration, checked to belong together; None without any.

        Raises:
            ArtifactError: unfinished scores, scores that leave training images out, or of other images,
                queries or models than the first.
            ConfigError: they list fewer images than are to be removed.
        """
        folders = tuple(Path(name) for name in config.scores)
        manifests = tuple(manifest_of_scores(folder) for folder in folders)
        for folder, manifest in zip(folders, manifests, strict=True):
            for name in ("data_fingerprint", "queries", "data"):
                if manifest[name] != manifests[0][name]:
                    raise ArtifactError(
                        f"the scores in '{folder}' are of other {name} than those in '{folders[0]}': "
                        "compare scores of the same queries and training images"
                    )
            if manifest["config"].get("without"):
                raise ArtifactError(
                    f"the scores in '{folder}' leave out training images that the model was trained on: "
                    "score again without --without"
                )
            recipe_of(manifest)
            top = manifest["config"]["top"]
            if min(top, manifest["training_images"]) < config.remove:
                raise ConfigError(
                    f"'{folder}' lists {top} training images for each query, {config.remove} are to be "
                    f"removed: score again with --top {config.remove}, or remove fewer"
                )
        return cls(folders, manifests) if folders else None

    @property
    def claim(self) -> list[dict[str, str]]:
        """Hashes of what decides the removals."""
        return [manifest["files"] for manifest in self.manifests]

    def names(self) -> list[str]:
        """One name for each, made of its method."""
        names: list[str] = []
        for manifest in self.manifests:
            name, number = manifest["method"], 2
            while name in names:
                name, number = f"{manifest['method']}-{number}", number + 1
            names.append(name)
        return names


@dataclass(frozen=True)
class Asked:
    """Training images and queries of an experiment."""

    source: ImageSource
    rows: range
    """Rows of the source that the attributed model was trained on."""
    queries: Redrawable
    original: Denoiser | None
    """The attributed model where it was given; it is trained here otherwise."""

    @classmethod
    def open(cls, config: CounterfactualConfig, given: GivenScores | None, device: str) -> "Asked":
        """What ``config`` asks about.

        Raises:
            ConfigError: rows beyond the source, or nothing left after a removal.
            ArtifactError: the model or the queries are not those that were scored.
            DataError: queries that cannot be drawn again.
        """
        training = config.training
        source = open_images(
            training.data, image_column=training.image_column, label_column=training.label_column
        )
        end = len(source) if training.rows is None else training.first_row + training.rows
        if not 0 <= training.first_row < end <= len(source):
            raise ConfigError(
                f"rows {training.first_row} to {end} asked for, but '{source.name}' has {len(source)}"
            )
        rows = range(training.first_row, end)
        if config.remove >= len(rows):
            raise ConfigError(f"cannot remove {config.remove} of {len(rows)} training images")
        if given is None:
            names = source.class_names if training.conditional else ()
            queries = ClassImages(
                config.queries.count, names, config.queries.sampler, seed=config.seed
            )
            return cls(source, rows, queries, None)
        manifest = given.manifests[0]
        if source.fingerprint != manifest["data_fingerprint"]:
            raise ArtifactError(f"'{source.name}' holds other images than those that were scored")
        original = open_model(ModelConfig(**manifest["model"]), device)
        return cls(source, rows, _scored_queries(manifest, original, config), original)


def ranked_removals(
    folder: Path, rows: range, queries: Redrawable, count: int
) -> list[tuple[int, ...]]:
    """For each query the positions of the ``count`` training images that its scores rank first.

    Raises:
        ArtifactError: the table was changed, or ranks fewer.
    """
    manifest = manifest_of_scores(folder)
    path = folder / "scores.parquet"
    if not path.is_file() or sha256_file(path) != manifest["files"][path.name]:
        raise ArtifactError(f"'{path}' is missing or damaged: run diffcal das score again")
    table = pq.read_table(path, columns=["query", "training", "rank"])
    chosen = np.flatnonzero(table["rank"].to_numpy() <= count)
    found: dict[Any, list[int]] = {}
    for query, row in zip(
        table["query"].take(chosen).to_pylist(),
        table["training"].take(chosen).to_pylist(),
        strict=True,
    ):
        found.setdefault(query, []).append(row - rows.start)
    removals = [tuple(found.get(query, ())) for query in _query_ids(folder)[: len(queries)]]
    if len(removals) < len(queries) or any(len(one) != count for one in removals):
        raise ArtifactError(f"'{path}' does not rank {count} training images for every query")
    return removals


def _query_ids(folder: Path) -> list[Any]:
    return pq.read_table(folder / "queries.parquet", columns=["query"])["query"].to_pylist()


def _scored_queries(
    manifest: dict[str, Any], original: Denoiser, config: CounterfactualConfig
) -> MixImages:
    asked = manifest["config"]["queries"]
    if asked["unconditional"]:
        raise DataError(
            "the queries were scored without a class, but drawn with one: score them again"
        )
    total = open_queries(
        asked["name"],
        original,
        first_row=asked["first_row"],
        rows=asked["rows"],
        stride=asked["stride"],
        image_column=asked["image_column"],
        label_column=asked["label_column"],
    )
    if total.fingerprint != manifest["queries"]:
        raise ArtifactError(f"'{asked['name']}' holds other images than those that were scored")
    count = min(config.queries.count, len(total))
    queries = MixImages(Path(asked["name"]), total.rows[:count], total.captions[:count])
    if queries.denoiser != original.fingerprint:
        raise ArtifactError(
            f"the images of '{asked['name']}' were drawn by another model than the attributed one "
            f"(model: '{queries.denoiser[:12]}' there, '{original.fingerprint[:12]}' here)"
        )
    return queries
