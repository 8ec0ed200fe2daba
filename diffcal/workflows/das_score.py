"""``diffcal das score``: which training images matter for each query, how much, and for what reason."""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcal.attribution.groups import GroupShares, group_shares
from diffcal.attribution.memorisation import MemorisationReport, memorisation_report
from diffcal.attribution.score_config import ScoreConfig, score_features
from diffcal.attribution.scores import ScoreBlock
from diffcal.attribution.topk import TopScores
from diffcal.config import config_to_dict
from diffcal.core.devices import one_thread
from diffcal.core.runs import claim_folder, sha256_file, write_atomic, write_json
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ConfigError
from diffcal.mixing.encoding import EncoderConfig, build_encoder
from diffcal.workflows.das_config import StoreConfig
from diffcal.workflows.das_features import write_features
from diffcal.workflows.das_images import ConditionedImages, open_queries
from diffcal.workflows.das_index import AttributionIndex
from diffcal.workflows.das_likeness import Likeness

__all__ = ["FORMAT", "QueryConfig", "ScoreRunConfig", "score_queries"]

FORMAT = "diffcal-scores/1"


@dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """Which images to explain; see :func:`~diffcal.workflows.das_images.open_queries`."""

    name: str = ""
    first_row: int = 0
    rows: int | None = None
    stride: int = 1
    """Take every so many rows."""
    unconditional: bool = False
    """Take gradients through the branch without a class."""
    image_column: str = "image"
    label_column: str = "label"


@dataclass(frozen=True, kw_only=True)
class ScoreRunConfig:
    """What to explain and what to keep."""

    queries: QueryConfig = field(default_factory=QueryConfig)
    scores: ScoreConfig | None = None
    """How features become scores; the index's own settings if None."""
    top: int = 20
    """Training images to list for each query."""
    nearest: int = 8
    """Nearest training images to list for contrast."""
    background: int = 50
    """Likeness ranks against which a near copy stands out."""
    likeness: EncoderConfig = field(default_factory=lambda: EncoderConfig(kind="pixels"))
    """Embedding in which likeness is measured; pixels by default, as for copies."""

    def __post_init__(self) -> None:
        for name in ("top", "nearest"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.background < 2:
            raise ConfigError(f"background must be at least 2, got {self.background}")


@dataclass(frozen=True)
class _Found:
    """Everything that one pass over the training images gives."""

    top: TopScores
    lowest: TopScores
    nearest: TopScores
    top_likeness: Tensor
    total: Tensor
    """Sum of absolute scores of each query."""
    memorisation: MemorisationReport
    groups: GroupShares


def score_queries(
    index: Path,
    config: ScoreRunConfig,
    out: Path | None = None,
    *,
    model: str | None = None,
    data: str | None = None,
    denoiser: Denoiser | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score every query against every training image; write tables and a gallery.

    Query features are kept in ``INDEX/queries``, so that other scores of the same queries cost no
    gradients, and are written by all processes of an ``accelerate launch``; scores are streamed by
    the first. ``out`` receives

    - ``scores.parquet``: ``query`` (id), ``training`` (row of the training source), ``rank`` (from 1),
      ``score``, ``share`` (of the absolute scores of all training images), ``likeness`` (cosine);
    - ``nearest.parquet``: the nearest training images of each query, by likeness;
    - ``queries.parquet``: one row per query: effective number of contributors, share of the first,
      likeness and isolation of the nearest, ``copy_score`` and the image it belongs to, and the shares
      of each class of training images;
    - ``scores.json``: settings, shares of the classes with intervals, hashes;
    - ``gallery.html``: the images, for reading.

    Args:
        index: Folder of ``diffcal das index``.
        config: Queries, scores, number of images to list.
        out: Output folder; ``INDEX/scores`` if None.
        model, data: Where model and training images are now, if they moved.
        denoiser: The model, already loaded.
        overwrite: Discard scores of other queries or settings.

    Returns:
        Summary: queries, training images, first contributors' mean share, effective contributors,
        share of first contributors among the nearest, files.

    Raises:
        ArtifactError: the index is unfinished or damaged, model or images are not those of the index,
            or ``out`` holds something else.
        ConfigError, DataError: queries that the model cannot take.
    """
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    where = str(state.device) if device == "auto" else device
    started = time.monotonic()
    opened = AttributionIndex.open(index, model=model, data=data, denoiser=denoiser, device=where)
    queries = open_queries(
        config.queries.name,
        opened.denoiser,
        first_row=config.queries.first_row,
        rows=config.queries.rows,
        stride=config.queries.stride,
        unconditional=config.queries.unconditional,
        image_column=config.queries.image_column,
        label_column=config.queries.label_column,
    )
    config = replace(config, scores=config.scores or opened.config.scores)
    out = out or index / "scores"
    if state.is_main_process:
        claim_folder(out, _claim(config, opened, queries), overwrite=overwrite)
    state.wait_for_everyone()
    store, made = write_features(
        opened.featuriser,
        queries,
        index / "queries" / queries.fingerprint[:16],
        # Their rows are few: kept as they are.
        StoreConfig(dtype="float32", shard_rows=opened.config.store.shard_rows),
        state,
        role="query",
        title="das score",
    )
    found: _Found | None = None
    if state.is_main_process:
        found = _search(config, opened, queries, store.rows(), where)
        _write(out, config, opened, queries, found)
    state.wait_for_everyone()
    summary: dict[str, Any] = {
        "queries": len(queries),
        "training_images": len(opened.training),
        "featurised_now": made,
        "seconds": round(time.monotonic() - started, 1),
        "folder": str(out),
    }
    if found is not None:
        from diffcal.workflows.das_report import explain_scores

        summary |= _headline(found) | {"gallery": explain_scores(out)["gallery"]}
    return summary


def _claim(
    config: ScoreRunConfig, index: AttributionIndex, queries: ConditionedImages
) -> dict[str, Any]:
    values = config_to_dict(config)
    # Where the images lie does not decide the scores; what they are does.
    values["queries"] = queries.fingerprint
    return {"format": FORMAT, **values, "index": index.fingerprint}


def _search(
    config: ScoreRunConfig,
    index: AttributionIndex,
    queries: ConditionedImages,
    features: Tensor,
    device: str,
) -> _Found:
    scores = config.scores or ScoreConfig()
    n = len(index.training)
    encoder = build_encoder(
        config.likeness,
        denoiser=index.denoiser,
        image_shape=index.training.source.image_shape,
        device=device,
    )
    likeness = Likeness(encoder, index.training, queries)
    kernel = index.kernel(device) if scores.method == "kernel" else None
    errors = None if scores.residual == "none" else index.store.column("error")
    top, lowest = TopScores(config.top), TopScores(config.nearest, largest=False)
    nearest = TopScores(config.nearest)
    totals: list[Tensor] = []

    def scored() -> Iterator[ScoreBlock]:
        # Negative scores matter as well: what is shared out is their size.
        for start, values in score_features(
            scores, features, index.store, kernel=kernel, errors=errors
        ):
            yield ScoreBlock(start, values.cpu())

    def ranked() -> Iterator[ScoreBlock]:
        for block in scored():
            top.update(block)
            lowest.update(block)
            totals.append(block.values.double().abs().sum(dim=1))
            yield ScoreBlock(block.start, block.values.abs())

    def alike(blocks: Iterator[ScoreBlock]) -> Iterator[ScoreBlock]:
        for start, values in blocks:
            block = ScoreBlock(start, likeness.block(range(start, start + values.shape[1])))
            nearest.update(block)
            yield block

    with one_thread():
        # Both sides advance together, so that one block is held; the classes take a second pass,
        # which costs little beside gradients.
        sizes, twins = itertools.tee(ranked())
        memorisation = memorisation_report(
            sizes, alike(twins), top=1, neighbours=max(2, min(config.background, n))
        )
        groups = group_shares(scored(), index.training.groups, part="absolute")
        chosen = top.index.unique()
        column = torch.searchsorted(chosen, top.index)
        top_likeness = likeness.block(chosen.tolist()).gather(1, column)
    return _Found(
        top, lowest, nearest, top_likeness, torch.stack(totals).sum(dim=0), memorisation, groups
    )


def _write(
    out: Path,
    config: ScoreRunConfig,
    index: AttributionIndex,
    queries: ConditionedImages,
    found: _Found,
) -> None:
    shares = found.top.values.double() / found.total[:, None]
    scores = _ranked(queries, index, found.top, "score")
    scores |= {
        "share": shares.flatten().tolist(),
        "likeness": found.top_likeness.flatten().tolist(),
    }
    tables: dict[str, dict[str, list[Any]]] = {
        "scores": scores,
        "nearest": _ranked(queries, index, found.nearest, "likeness"),
    }
    if config.scores is not None and config.scores.readout in ("signed", "signed_square"):
        tables["lowest"] = _ranked(queries, index, found.lowest, "score")
    report, ids = found.memorisation, index.training.ids
    tables["queries"] = {
        "query": list(queries.ids),
        "caption": list(queries.captions),
        "contributors": report.contributors.tolist(),
        "dominance": report.dominance.tolist(),
        "nearest": [ids[i] for i in report.nearest_index.tolist()],
        "likeness": report.nearest.tolist(),
        "isolation": report.isolation.tolist(),
        "copy_score": report.copy_score.tolist(),
        "copy_of": [ids[i] for i in report.copy_index.tolist()],
        "class_shares": found.groups.per_query.tolist(),
    }
    files = {}
    for name, columns in tables.items():
        path = out / f"{name}.parquet"
        _write_table(path, columns)
        files[path.name] = sha256_file(path)
    write_json(
        out / "scores.json",
        {
            "format": FORMAT,
            "config": config_to_dict(config),
            "index": str(index.folder.resolve()),
            "model": config_to_dict(index.config.model),
            "data": config_to_dict(index.config.data),
            "method": index.config.method,
            "features": index.fingerprint,
            "queries": queries.fingerprint,
            "training_images": len(index.training),
            "classes": [
                {
                    "name": name,
                    "share": float(found.groups.mean[at]),
                    "low": found.groups.spread[at].low,
                    "high": found.groups.spread[at].high,
                    "lift": float(found.groups.lift[at]),
                }
                for at, name in enumerate(found.groups.names)
            ],
            "summary": _headline(found),
            "files": files,
        },
    )


def _ranked(
    queries: ConditionedImages, index: AttributionIndex, best: TopScores, value: str
) -> dict[str, list[Any]]:
    count = best.index.shape[1]
    ids = index.training.ids
    return {
        "query": [name for name in queries.ids for _ in range(count)],
        "training": [ids[row] for row in best.index.flatten().tolist()],
        "rank": list(range(1, count + 1)) * len(queries),
        value: best.values.flatten().tolist(),
    }


def _write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns)
    write_atomic(path, lambda file: pq.write_table(table, file, compression="zstd"))


def _headline(found: _Found) -> dict[str, float]:
    report = found.memorisation
    first = found.top.index[:, :1]
    return {
        "mean_top_share": round(float(report.dominance.mean()), 4),
        "median_contributors": round(float(report.contributors.median()), 1),
        "first_is_near": round(float((found.nearest.index == first).any(dim=1).double().mean()), 4),
        "largest_copy_score": round(float(report.copy_score.max()), 4),
    }
