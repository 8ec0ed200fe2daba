"""Tables of an annotation: labels and quality columns of one shard, and their means over all."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy import ndarray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffcal.core.devices import one_thread
from diffcal.data.images import decode_image
from diffcal.data.shards import verified_shard
from diffcal.data.soft_labels import flat_lists
from diffcal.errors import ArtifactError, DataError
from diffcal.mixing.annotators import load_annotator
from diffcal.mixing.quality import (
    endpoint_agreement,
    group_spearman,
    nearest_cosine,
    off_axis_residual,
    third_class_mass,
)
from diffcal.workflows.annotation_config import AnnotationConfig
from diffcal.workflows.feature_cache import FeatureCache, FeatureShards

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Labeller", "quality_summary"]

MONOTONE = 0.8
"""Rank correlation from which a group counts as monotone in the summary."""


class Labeller:
    """Fitted annotator, probe and references; makes the table of one shard."""

    def __init__(
        self, config: AnnotationConfig, folder: Path, real: FeatureShards, device: str
    ) -> None:
        self.config, self.real, self.device = config, real, device
        self.annotator = load_annotator(folder / "annotator")
        self.probe = self.annotator
        if not self.annotator.all_classes:
            self.probe = load_annotator(folder / "probe")
        path = folder / "reference.safetensors"
        try:
            reference = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"'{path}' is damaged ({error}); delete it and run again"
            ) from error
        self.prototypes, self.centre = reference["prototypes"], reference["centre"]
        self.residual = max(float(reference["residual"]), 1e-300)

    def table(
        self,
        folder: Path,
        entry: dict[str, Any],
        cache: FeatureCache,
        image_shape: tuple[int, int, int],
    ) -> "pa.Table":
        """Annotation of the shard ``entry`` of ``folder``."""
        import pyarrow.parquet as pq

        path = verified_shard(folder, entry)
        plain = pq.read_table(path, columns=["id", "group", "classes", "weights"])
        ids, groups = (torch.tensor(plain[name].to_numpy()) for name in ("id", "group"))
        classes, weights = _padded(plain["classes"], plain["weights"])
        found = cache.generated(path.stem, entry["sha256"])
        if found is None:
            batches = _images(path, self.config.batch_size, image_shape)
            features = cache.encode_generated(path.stem, entry["sha256"], ids, batches)
        else:
            features = found[0]
        with one_thread():
            return self._columns(features, ids, groups, classes, weights)

    def _columns(
        self, features: Tensor, ids: Tensor, groups: Tensor, classes: Tensor, weights: Tensor
    ) -> "pa.Table":
        import pyarrow as pa

        labels = self.annotator.annotate(features, classes, weights)
        posterior = labels
        if self.probe is not self.annotator:
            posterior = self.probe.annotate(features, classes, weights)
        distance, estimate = off_axis_residual(features, self.prototypes, classes)
        pure, agrees = endpoint_agreement(posterior, classes, weights)
        pair = (classes >= 0).sum(dim=1) == 2
        columns = {
            "id": pa.array(ids.numpy(), pa.int64()),
            "annotator": pa.array([self.config.annotator] * len(ids), pa.string()),
            "soft_label": _fixed(labels, pa.float32()),
            "lambda_hat": _nullable(estimate[:, 0], pair),
            "residual": _nullable(distance / self.residual),
            "third_mass": _nullable(third_class_mass(posterior, classes)),
            "group_spearman": _nullable(group_spearman(groups, weights[:, 0], estimate[:, 0])),
            "endpoint_ok": pa.array(agrees.numpy(), pa.bool_(), mask=~pure.numpy()),
            "nearest_cosine": pa.nulls(len(ids), pa.float32()),
        }
        if self.config.nearest:
            near = nearest_cosine(features, self.real, self.centre, self.device)
            columns["nearest_cosine"] = _nullable(near)
        if self.config.store_features:
            columns["feature"] = _fixed(features.half(), pa.float16())
        return pa.table(columns)


def _padded(classes: "pa.ChunkedArray", weights: "pa.ChunkedArray") -> tuple[Tensor, Tensor]:
    """Classes ``[b, m]`` with -1 where a row has fewer, and weights with 0 there."""
    numbers, counts = flat_lists(classes, np.int64)
    shares, same = flat_lists(weights, np.float32)
    if not (counts == same).all():
        raise ArtifactError("a generated shard has rows with more classes than weights, or fewer")
    present = np.arange(max(int(counts.max()), 1)) < counts[:, None]
    padded, mixed = np.full(present.shape, -1), np.zeros(present.shape, dtype=np.float32)
    padded[present], mixed[present] = numbers, shares
    return torch.from_numpy(padded.astype(np.int64)), torch.from_numpy(mixed)


def _images(path: Path, batch_size: int, image_shape: tuple[int, int, int]) -> Iterator[ndarray]:
    import pyarrow.parquet as pq

    row = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=batch_size, columns=["image"]):
        images = []
        for cell in batch.column(0):
            image = decode_image(cell.as_py()["bytes"], f"'{path}', row {row}")
            if image.shape != image_shape:
                raise DataError(
                    f"'{path}', row {row}: the image is {image.shape}, real images are {image_shape}"
                )
            images.append(image)
            row += 1
        yield np.stack(images)


def _fixed(values: Tensor, kind: "pa.DataType") -> "pa.Array":
    import pyarrow as pa

    flat = pa.array(values.contiguous().reshape(-1).numpy(), kind)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _nullable(values: Tensor, known: Tensor | None = None) -> "pa.Array":
    """Float32 column; null where NaN or not known."""
    import pyarrow as pa

    known = values.isfinite() if known is None else known & values.isfinite()
    return pa.array(values.float().numpy(), pa.float32(), mask=~known.numpy())


def quality_summary(folder: Path, entries: list[dict[str, Any]]) -> dict[str, float | None]:
    """Means over all images; of a column that is null everywhere, None."""
    import pyarrow.parquet as pq

    sums: dict[str, list[float]] = {}

    def add(name: str, values: ndarray) -> None:
        known = values[np.isfinite(values)]
        total = sums.setdefault(name, [0.0, 0.0])
        total[0] += float(known.sum())
        total[1] += len(known)

    for entry in entries:
        table = pq.read_table(folder / entry["file"])
        column = {
            name: table[name].cast("float32").to_numpy().astype(np.float64)
            for name in (
                "residual",
                "third_mass",
                "group_spearman",
                "endpoint_ok",
                "nearest_cosine",
            )
        }
        labels = flat_lists(table["soft_label"], np.float64)[0].reshape(len(table), -1)
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -np.nansum(labels * np.log(labels), axis=1)
        spearman = column["group_spearman"]
        add("top_probability", labels.max(axis=1))
        add("entropy", entropy)
        add("third_mass", column["third_mass"])
        add("off_axis", np.where(np.isnan(column["residual"]), np.nan, column["residual"] > 1))
        add("group_spearman", spearman)
        add("monotone", np.where(np.isnan(spearman), np.nan, spearman >= MONOTONE))
        add("endpoint_ok", column["endpoint_ok"])
        add("nearest_cosine", column["nearest_cosine"])
    return {name: total / count if count else None for name, (total, count) in sums.items()}
