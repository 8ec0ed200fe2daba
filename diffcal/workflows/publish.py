"""Generated images and one of their annotations become a data set that others can use."""

import logging
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy import ndarray

from diffcal.config import config_to_dict
from diffcal.core.progress import progress_bar
from diffcal.core.runs import (
    claim_folder,
    fingerprint,
    read_json,
    sha256_bytes,
    sha256_file,
    write_atomic,
    write_json,
    write_text,
)
from diffcal.data.card import dataset_card
from diffcal.data.ladders import select_ladders
from diffcal.data.soft_label_statistics import SoftLabelStatistics
from diffcal.data.soft_label_writer import requested_ratios, write_rows
from diffcal.data.soft_labels import FORMAT, SoftLabelSet, flat_lists
from diffcal.errors import DataError
from diffcal.mixing.quality import FilterConfig
from diffcal.workflows.annotated_run import AnnotatedRun, quality_columns
from diffcal.workflows.previews import draw_class_balance, draw_ladder, draw_ratios

__all__ = ["publish_dataset"]

logger = logging.getLogger(__name__)

PUBLICATION = "publication.json"
ORDERED = 0.8
"""Rank correlation from which a group counts as ordered (specification: Spearman >= 0.8)."""
LADDERS = 6


def publish_dataset(
    run: Path,
    annotator: str,
    filter: FilterConfig | None = None,
    *,
    out: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write ``RUN/dataset``: Parquet that ``datasets`` opens, a card, previews and a manifest.

    One row for each image that passes ``filter``: ``image``, ``label`` (largest entry of the soft
    label), ``soft_label``, the mixing (``group``, ``member``, ``classes``, ``weights``, ``lambda``,
    ``seed``), and the annotation's diagnostics. Files are made from one generated shard each, in the
    memory of one row group; an interrupted publication continues, and the same inputs give the same
    bytes. A finished file that was damaged since is written again.

    Args:
        run: Folder of a mixing run with ``generated`` and ``annotations/ANNOTATOR``.
        annotator: Which annotation.
        filter: Thresholds on the quality columns; none if None.
        out: Another place for the data set than ``RUN/dataset``.
        overwrite: Discard a data set there that was made with other settings or inputs.

    Returns:
        ``dataset`` (folder), ``images``, ``generated``, ``dropped`` (images, by threshold), ``shards``,
        ``statistics`` (see :class:`~diffcal.data.soft_label_statistics.SoftLabelStatistics`).

    Raises:
        ArtifactError: a shard is damaged or missing, images and annotation do not belong together, or
            ``out`` holds something else.
        ConfigError: no such annotation.
        DataError: no image passes the filter.
    """
    filter = filter or FilterConfig()
    out = out or run / "dataset"
    inputs = AnnotatedRun.open(run, annotator)
    settings = {
        "format": FORMAT,
        "annotator": annotator,
        "filter": config_to_dict(filter),
        "generated": fingerprint(inputs.generated["shards"]),
        "annotations": fingerprint(inputs.annotations["shards"]),
    }
    tally = _tally(inputs, filter)
    if not sum(tally.kept):
        raise DataError(
            f"the filter keeps none of {tally.generated} images ({_dropped_text(tally.dropped)}); "
            "loosen its thresholds"
        )
    claim_folder(out, settings, name=PUBLICATION, overwrite=overwrite)
    shards = _write_shards(inputs, filter, out, tally.kept)
    summary = {
        "images": sum(tally.kept),
        "generated": tally.generated,
        "dropped": tally.dropped,
        "statistics": tally.statistics.summary(),
    }
    manifest = {
        **settings,
        "class_names": list(inputs.class_names),
        "members": inputs.generated["members"],
        "channels": inputs.generated.get("channels"),
        "provenance": {
            "config": inputs.generated.get("config"),
            "denoiser": inputs.generated.get("denoiser"),
            "encoder": inputs.annotations.get("encoder"),
            "report": inputs.annotations.get("report"),
            "versions": inputs.generated.get("versions"),
        },
        **summary,
        "shards": shards,
    }
    manifest["previews"] = _write_previews(out, manifest, bisected=_bisected(inputs))
    write_text(out / "README.md", dataset_card(manifest))
    write_json(out / "manifest.json", manifest)
    return {"dataset": str(out), "shards": len(shards), **summary}


@dataclass
class _Tally:
    """What a pass over the labels finds."""

    statistics: SoftLabelStatistics
    kept: list[int]
    """Images that pass the filter, for each shard."""
    dropped: dict[str, int]
    """Images that each threshold refuses by itself; one may be counted more than once."""
    generated: int = 0


def _tally(inputs: AnnotatedRun, filter: FilterConfig) -> _Tally:
    values = {item.name: getattr(filter, item.name) for item in fields(filter)}
    thresholds = {
        name: replace(FilterConfig(), **{name: value})
        for name, value in values.items()
        if value is not None and value is not False  # 0.0 is a threshold
    }
    tally = _Tally(SoftLabelStatistics(len(inputs.class_names)), [], dict.fromkeys(thresholds, 0))
    with progress_bar(len(inputs), "check labels", unit="shard") as bar:
        for index in range(len(inputs)):
            table = inputs.labels(*inputs.verified(index))
            columns = quality_columns(table)
            keep = filter.keep(columns)
            for name, single in thresholds.items():
                tally.dropped[name] += int((~single.keep(columns)).sum())
            tally.generated += len(keep)
            tally.kept.append(int(keep.sum()))
            if keep.any():
                _update(tally.statistics, table.filter(pa.array(keep)))
            bar.update(1)
    return tally


def _update(statistics: SoftLabelStatistics, table: pa.Table) -> None:
    soft, _ = flat_lists(table["soft_label"], np.float32)
    quality = {
        name: np.array([np.nan if v is None else float(v) for v in values])
        for name, values in quality_columns(table).items()
    }
    spearman = quality["group_spearman"]
    quality["in_ordered_group"] = np.where(np.isnan(spearman), np.nan, spearman >= ORDERED)
    statistics.update(
        soft.reshape(len(table), -1),
        pc.list_element(table["classes"], 0).to_numpy().astype(np.int64),  # type: ignore[attr-defined]
        requested_ratios(table),
        _floats(table["lambda_hat"]),
        quality,
    )


def _floats(column: pa.ChunkedArray) -> ndarray:
    return np.array([np.nan if v is None else v for v in column.to_pylist()], np.float64)


def _write_shards(
    inputs: AnnotatedRun, filter: FilterConfig, out: Path, kept: list[int]
) -> list[dict[str, Any]]:
    sources = [index for index, count in enumerate(kept) if count]
    promised = _promised(out)
    entries = []
    with progress_bar(len(sources), "publish", unit="shard") as bar:
        for number, index in enumerate(sources):
            file = f"data/train-{number:05d}-of-{len(sources):05d}.parquet"
            path = out / file
            if not _is_complete(path, kept[index], promised.get(file)):
                images, annotation = inputs.verified(index)
                table = inputs.labels(images, annotation)
                keep = filter.keep(quality_columns(table))
                # a partial binds the present shard
                write_atomic(path, partial(write_rows, images, table, keep, inputs.class_names))
            entries.append({"file": file, "rows": kept[index], "sha256": sha256_file(path)})
            bar.update(1)
    return entries


def _promised(out: Path) -> dict[str, str]:
    """Hashes in the manifest of a finished publication."""
    if not (out / "manifest.json").exists():
        return {}
    return {entry["file"]: entry["sha256"] for entry in read_json(out / "manifest.json")["shards"]}


def _is_complete(path: Path, rows: int, sha256: str | None) -> bool:
    """Whether a file that carries its final name can stay; it was renamed when complete."""
    if not path.exists():
        return False
    try:
        sound = pq.ParquetFile(path).metadata.num_rows == rows
    except (OSError, pa.ArrowException):
        sound = False
    if sound and sha256 is not None:
        sound = sha256_file(path) == sha256
    if not sound:
        logger.warning("'%s' is damaged and will be written again", path)
    return sound


def _bisected(inputs: AnnotatedRun) -> bool:
    """Whether each group was asked for ratios of its own."""
    return inputs.generated.get("config", {}).get("plan", {}).get("weights") == "bisect"


def _write_previews(out: Path, manifest: dict[str, Any], *, bisected: bool) -> list[dict[str, str]]:
    """PNG files in ``previews``, each with the sentence that stands under it in the card."""
    previews = []

    def add(name: str, data: bytes, caption: str) -> None:
        write_atomic(out / "previews" / name, lambda file: file.write(data))
        previews.append(
            {"file": f"previews/{name}", "caption": caption, "sha256": sha256_bytes(data)}
        )

    published = SoftLabelSet(out)
    for number, ladder in enumerate(select_ladders(published, LADDERS)):
        add(f"ladder-{number}.png", draw_ladder(ladder), ladder.caption)
    statistics, names = manifest["statistics"], manifest["class_names"]
    if any(row["estimates"] for row in statistics["ratios"]):
        caption = "Requested and re-estimated ratio."
        if bisected:
            caption = (
                "Requested and re-estimated ratio. Every group was asked for the ratios of its own "
                "passage, so that inner points hold different groups."
            )
        add("ratios.png", draw_ratios(statistics, bisected), caption)
    add("classes.png", draw_class_balance(statistics, names), "Images and label mass per class.")
    return previews


def _dropped_text(dropped: dict[str, int]) -> str:
    return ", ".join(f"{name} refuses {count}" for name, count in dropped.items())
