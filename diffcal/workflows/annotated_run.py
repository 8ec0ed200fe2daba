"""Generated images and one of their annotations, shard by shard, verified."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diffcal.data.shards import read_manifest, verified_shard
from diffcal.data.soft_labels import QUALITY_COLUMNS, flat_lists
from diffcal.errors import ArtifactError, ConfigError

__all__ = ["AnnotatedRun", "quality_columns"]

GENERATED = "diffcal-generated/1"
ANNOTATIONS = "diffcal-annotations/1"
SUM_TOLERANCE = 1e-3

_CARRIED = ("id", "group", "member", "classes", "weights", "seed")
_ANNOTATED = ("soft_label", "lambda_hat", *QUALITY_COLUMNS)


@dataclass(frozen=True)
class AnnotatedRun:
    """Images and annotation of a run, checked to belong together; ``len`` is the number of shards."""

    generated_folder: Path
    generated: dict[str, Any]
    annotations_folder: Path
    annotations: dict[str, Any]

    @classmethod
    def open(cls, run: Path, annotator: str) -> "AnnotatedRun":
        """The run's images with one of its annotations.

        Raises:
            ConfigError: no such annotation.
            ArtifactError: a manifest is missing or damaged, or they list different shards.
        """
        generated_folder, everything = run / "generated", run / "annotations"
        folder = everything / annotator
        if Path(annotator).name != annotator or not folder.is_dir():
            known = sorted(p.name for p in everything.glob("*") if p.is_dir())
            raise ConfigError(
                f"'{run}' has no annotation '{annotator}'; "
                + (f"it has {', '.join(known)}" if known else "run diffcal csm annotate first")
            )
        generated = read_manifest(generated_folder, GENERATED, ("class_names", "members"))
        annotations = read_manifest(folder, ANNOTATIONS)
        here, there = (
            [(entry["file"], entry["rows"]) for entry in manifest["shards"]]
            for manifest in (generated, annotations)
        )
        if here != there:
            raise ArtifactError(
                f"annotation '{annotator}' covers {sum(n for _, n in there)} images in {len(there)} "
                f"shards, '{generated_folder}' has {sum(n for _, n in here)} in {len(here)}; "
                "annotate again"
            )
        return cls(generated_folder, generated, folder, annotations)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Classes of the soft labels, in order."""
        return tuple(self.generated["class_names"])

    def __len__(self) -> int:
        return len(self.generated["shards"])

    def verified(self, index: int) -> tuple[Path, Path]:
        """Files of a shard: images and annotation, their hashes checked."""
        return (
            verified_shard(self.generated_folder, self.generated["shards"][index]),
            verified_shard(self.annotations_folder, self.annotations["shards"][index]),
        )

    def labels(self, images: Path, annotation: Path) -> pa.Table:
        """Every column of a shard but the image.

        Raises:
            ArtifactError: unreadable, columns missing, other images than those annotated, or soft
                labels that are no distributions over the classes.
        """
        table = _read(images, _CARRIED)
        annotated = _read(annotation, ("id", *_ANNOTATED))
        if not table["id"].equals(annotated["id"]):
            raise ArtifactError(f"'{annotation}' does not annotate the images of '{images}'")
        for name in _ANNOTATED:
            table = table.append_column(name, annotated[name])
        soft, counts = flat_lists(table["soft_label"], np.float32)
        classes = len(self.class_names)
        if (counts != classes).any():
            raise ArtifactError(f"'{annotation}': soft labels must have {classes} entries")
        soft = soft.reshape(-1, classes)
        wrong = ~(soft >= 0).all(axis=1) | ~(np.abs(soft.sum(axis=1) - 1) <= SUM_TOLERANCE)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise ArtifactError(
                f"'{annotation}', row {row}: the soft label is no distribution (sum {soft[row].sum()})"
            )
        return table


def quality_columns(table: pa.Table) -> dict[str, list[Any]]:
    """Quality columns as lists, None for null: what a filter reads."""
    return {name: table[name].to_pylist() for name in QUALITY_COLUMNS}


def _read(path: Path, columns: tuple[str, ...]) -> pa.Table:
    try:
        file = pq.ParquetFile(path)
        missing = [name for name in columns if name not in file.schema_arrow.names]
        if missing:
            raise ArtifactError(f"'{path}' lacks the columns {', '.join(missing)}")
        return file.read(columns=list(columns)).select(list(columns))
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(f"'{path}' cannot be read: {error}") from error
