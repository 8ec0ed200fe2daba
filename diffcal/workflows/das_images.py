"""Images as attribution sees them: clean samples with the conditions that the model was given."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffcal.attribution.feature_shards import RowId, require_distinct
from diffcal.core.runs import fingerprint, read_json, sha256_bytes, sha256_file
from diffcal.data.images import decode_image
from diffcal.data.shards import read_manifest, verified_shard
from diffcal.data.sources import IMAGE_SUFFIXES, ImageSource, ParquetSource, open_images
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ConfigError, DataError
from diffcal.workflows.das_config import TrainingImages

__all__ = ["ConditionedImages", "open_queries", "open_training_images", "query_source"]

GENERATED = "diffcal-generated/1"
PUBLISHED = "diffcal-dataset/1"


@dataclass(frozen=True)
class ConditionedImages:
    """Images by position, each with an id, words that describe it, and weights over the classes.

    Raises:
        DataError: an id comes twice.
    """

    source: ImageSource
    rows: range
    ids: tuple[RowId, ...]
    captions: tuple[str, ...]
    """Class names, with weights for images between classes; empty words for images without any."""
    groups: tuple[str, ...]
    """Name of the class with the largest weight."""
    weights: Float[Tensor, "n k"] | None
    """Condition of each image; None for unconditional models and for the unconditional branch."""

    def __post_init__(self) -> None:
        # Before any gradient is spent on them.
        require_distinct(self.ids, f"'{self.source.name}'")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of images, rows and conditions."""
        weights = None
        if self.weights is not None:
            weights = sha256_bytes(self.weights.float().contiguous().numpy().tobytes())
        return fingerprint([self.source.fingerprint, *_ends(self.rows), weights])

    def images(self, positions: Sequence[int]) -> UInt8[Tensor, "n h w c"]:
        """Pixels of the images at ``positions``, in that order."""
        if not positions:
            return torch.zeros(0, *self.source.image_shape, dtype=torch.uint8)
        rows = [self.rows[position] for position in positions]
        return torch.cat([torch.as_tensor(part) for _, part, _ in self.source.batches(1024, rows)])

    def condition(self, denoiser: Denoiser, positions: Sequence[int]) -> Tensor | None:
        """What ``denoiser`` is given for the images at ``positions``."""
        if denoiser.condition_kind == "none":
            return None
        if self.weights is None:
            return denoiser.unconditional(len(positions))
        return denoiser.condition(self.weights[list(positions)])


def open_training_images(data: TrainingImages, denoiser: Denoiser) -> ConditionedImages:
    """The training images with one-hot conditions; ids are row numbers of the source.

    Raises:
        DataError: no images there, or other classes than the model's.
        ConfigError: rows beyond the source.
    """
    source = open_images(data.name, image_column=data.image_column, label_column=data.label_column)
    return _labelled(source, _rows(source, data.first_row, data.rows), denoiser)


def open_queries(
    name: str,
    denoiser: Denoiser,
    *,
    first_row: int = 0,
    rows: int | None = None,
    stride: int = 1,
    unconditional: bool = False,
    image_column: str = "image",
    label_column: str = "label",
) -> ConditionedImages:
    """Images to explain.

    Args:
        name: A run of ``diffcal csm`` or its ``generated`` or ``dataset`` folder, whose images are
            conditioned on the weights they were drawn with; any source of
            :func:`~diffcal.data.sources.open_images`, conditioned on labels; or image files without
            labels: one of them, a glob, or a folder.
        first_row, rows, stride: ``rows`` images from ``first_row`` on, every ``stride``-th one; all of
            them if ``rows`` is None.
        unconditional: Take gradients through the branch without a class instead; needed for
            images without labels if the model has classes.

    Raises:
        DataError: no images there, or other classes than the model's.
        ConfigError: rows beyond the source, or a condition is missing.
    """
    source = query_source(name, image_column, label_column)
    if isinstance(source, MixedImages):
        queries = _mixed(source, _rows(source, first_row, rows, stride), denoiser)
    elif isinstance(source, LooseFiles):
        chosen = _rows(source, first_row, rows, stride)
        ids = tuple(source.files[row].name for row in chosen)
        empty = ("",) * len(ids)
        if denoiser.condition_kind != "none" and not unconditional:
            raise ConfigError(
                f"the images of '{name}' have no labels, but the model is conditioned on "
                f"{denoiser.num_classes} classes: put them into one subfolder for each class, or "
                "use the unconditional branch (--unconditional)"
            )
        queries = ConditionedImages(source, chosen, ids, empty, empty, None)
    else:
        queries = _labelled(source, _rows(source, first_row, rows, stride), denoiser)
    if unconditional or denoiser.condition_kind == "none":
        queries = ConditionedImages(
            queries.source, queries.rows, queries.ids, queries.captions, queries.groups, None
        )
    return queries


def _labelled(source: ImageSource, rows: range, denoiser: Denoiser) -> ConditionedImages:
    labels = torch.cat([torch.as_tensor(part) for _, _, part in source.batches(1024, rows)]).long()
    names = tuple(source.class_names[label] for label in labels.tolist())
    weights = None
    if denoiser.condition_kind != "none":
        _require_classes(source.name, source.class_names, denoiser)
        weights = torch.eye(denoiser.num_classes)[labels]
    return ConditionedImages(source, rows, tuple(rows), names, names, weights)


def query_source(name: str, image_column: str, label_column: str) -> ImageSource:
    """Where the images of ``name`` are read from; see :func:`open_queries`."""
    folder = Path(name)
    if (folder / "generated" / "manifest.json").is_file():
        folder = folder / "generated"
    if folder.is_dir() and (folder / "manifest.json").is_file():
        return MixedImages(folder)
    if loose := _loose_files(name):
        return LooseFiles(name, loose)
    return open_images(name, image_column=image_column, label_column=label_column)


class MixedImages(ParquetSource):
    """Images of a mixing run, generated or published, with the weights that each was drawn with.

    Raises:
        ArtifactError, DataError: another kind of folder, or a damaged shard.
    """

    def __init__(self, folder: Path) -> None:
        kind = read_json(folder / "manifest.json").get("format")
        if kind not in (GENERATED, PUBLISHED):
            raise DataError(f"'{folder}' is of format {kind!r}; give {GENERATED} or {PUBLISHED}")
        manifest = read_manifest(folder, kind, ("class_names",))
        files = [verified_shard(folder, entry) for entry in manifest["shards"]]
        # A source wants integers for labels; the weights say more, so any such column will do.
        super().__init__(str(folder), files, "image", "member")
        self.mixed = tuple(manifest["class_names"])
        """Names of the classes that were mixed."""


def _mixed(source: MixedImages, rows: range, denoiser: Denoiser) -> ConditionedImages:
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {"id": [], "classes": [], "weights": []}
    for path in source.files:
        table = pq.read_table(path, columns=list(columns))
        for name, values in columns.items():
            values += table[name].to_pylist()
    names = source.mixed
    mixes = np.zeros((len(rows), len(names)), np.float32)
    captions = []
    for at, row in enumerate(rows):
        mixes[at, columns["classes"][row]] = columns["weights"][row]
        parts = sorted(zip(columns["weights"][row], columns["classes"][row], strict=True))[::-1]
        shown = [(weight, kind) for weight, kind in parts if weight > 0]
        captions.append(
            names[shown[0][1]]
            if len(shown) == 1
            else " + ".join(f"{weight:.2f} · {names[kind]}" for weight, kind in shown)
        )
    if denoiser.condition_kind != "none":
        _require_classes(source.name, names, denoiser)
    ids = tuple(columns["id"][row] for row in rows)
    groups = tuple(names[kind] for kind in mixes.argmax(axis=1))
    weights = None if denoiser.condition_kind == "none" else torch.from_numpy(mixes)
    return ConditionedImages(source, rows, ids, tuple(captions), groups, weights)


class LooseFiles(ImageSource):
    """Image files without labels, in alphabetic order."""

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name, self.files, self.class_names = name, files, ("",)

    def __len__(self) -> int:
        return len(self.files)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names and contents."""
        return fingerprint([[path.name, sha256_file(path)] for path in self.files])

    def _rows(self, rows: Sequence[int]) -> Any:
        for row in rows:
            path = self.files[row]
            yield decode_image(path.read_bytes(), f"'{path}'"), 0


def _loose_files(name: str) -> list[Path]:
    """Image files right in a folder, or those that ``name`` itself or as a glob stands for."""
    path = Path(name)
    if path.is_dir():
        found = list(path.iterdir())
    else:
        found = [path] if path.is_file() else [Path(match) for match in glob.glob(name)]
    return sorted(p for p in found if p.suffix.lower() in IMAGE_SUFFIXES)


def _rows(source: ImageSource, first: int, count: int | None, stride: int = 1) -> range:
    if stride < 1:
        raise ConfigError(f"stride must be at least 1, got {stride}")
    end = len(source) if count is None else first + (count - 1) * stride + 1
    if not 0 <= first < end <= len(source):
        raise ConfigError(f"rows {first} to {end} asked for, but '{source.name}' has {len(source)}")
    return range(first, end, stride)


def _ends(rows: range) -> list[int]:
    return [rows.start, len(rows), rows.step]


def _require_classes(name: str, classes: Sequence[str], denoiser: Denoiser) -> None:
    """Refuse labels that do not number the model's classes."""
    mine, theirs = list(map(str, classes)), list(map(str, denoiser.class_names))
    unnamed = list(map(str, range(len(theirs))))
    if mine != theirs and (len(mine) > len(theirs) or unnamed[: len(mine)] not in (mine, theirs)):
        raise DataError(
            f"'{name}' has the classes {', '.join(mine[:5])} ({len(mine)}), the model "
            f"{', '.join(theirs[:5])} ({len(theirs)}); give images of the model's classes"
        )
