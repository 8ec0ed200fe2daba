"""``diffcal das score``: which training images matter for each query, how much, and for what reason."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diffcal.attribution.ensemble import ScoredModel
from diffcal.attribution.feature_store import FeatureStore
from diffcal.attribution.functionals import NamedFunctional
from diffcal.attribution.score_config import ScoreConfig
from diffcal.config import config_to_dict
from diffcal.core.devices import one_thread
from diffcal.core.processes import process_state
from diffcal.core.runs import claim_folder
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ConfigError
from diffcal.mixing.encoding import EncoderConfig, build_encoder
from diffcal.workflows.das_config import StoreConfig
from diffcal.workflows.das_features import ImageRows, write_features
from diffcal.workflows.das_groups import CLASS, group_labels
from diffcal.workflows.das_held_out import open_held_out
from diffcal.workflows.das_images import ConditionedImages, open_queries
from diffcal.workflows.das_index import AttributionIndex, index_fingerprint, open_index
from diffcal.workflows.das_likeness import Likeness
from diffcal.workflows.das_path import path_rows
from diffcal.workflows.das_queries import HeldOut, QueryConfig
from diffcal.workflows.das_score_pass import Found, search
from diffcal.workflows.das_score_tables import FORMAT, headline, write_scores
from diffcal.workflows.das_without import describe_ids, kept_positions

__all__ = ["FORMAT", "HeldOut", "QueryConfig", "ScoreRunConfig", "score_queries"]


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
    held_out: HeldOut | None = None
    """Images that cannot be copies, against which copies are told."""
    groups: tuple[str, ...] = ()
    """Columns of the training images by which attribution is shared out, besides the class."""
    royalties: float | None = None
    """An amount to divide among the groups in proportion to their shares."""
    without: tuple[int, ...] = ()
    """Ids of training images to leave out: scores are those of an index without them, from the
    stored features and the changed kernel. Model and queries stay as they are."""

    def __post_init__(self) -> None:
        for name in ("top", "nearest"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.background < 2:
            raise ConfigError(f"background must be at least 2, got {self.background}")
        if self.royalties is not None and not 0 < self.royalties < float("inf"):
            raise ConfigError(f"royalties must be a positive amount, got {self.royalties}")


def score_queries(
    index: Path,
    config: ScoreRunConfig,
    out: Path | None = None,
    *,
    model: str | None = None,
    data: str | None = None,
    denoiser: Denoiser | None = None,
    functional: NamedFunctional | None = None,
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
      likeness and isolation of the nearest, ``copy_score`` and the image it belongs to, shares of each
      group of training images and, with held-out images, ``near_copy``, ``dominated``, ``memorised``
      and the chance that a held-out image comes as far;
    - ``groups.parquet``: share, interval, lift and royalty of each group of training images;
    - ``scores.json``: settings, the same shares, thresholds, hashes;
    - ``gallery.html``: the images, for reading.

    Args:
        index: Folder of ``diffcal das index``.
        config: Queries, scores, number of images to list.
        out: Output folder; ``INDEX/scores`` if None.
        model, data: Where model and training images are now, if they moved.
        denoiser: The model, already loaded.
        functional: Your own functional, if the index was made with one.
        overwrite: Discard scores of other queries or settings.

    Returns:
        Summary: queries, training images, first contributors' mean share, effective contributors,
        share of first contributors among the nearest, flagged queries, files.

    Raises:
        ArtifactError: the index is unfinished or damaged, model or images are not those of the index,
            or ``out`` holds something else.
        ConfigError, DataError: queries that the model cannot take, held-out images that are training
            images, a column that is not there, or images to leave out that the index does not hold.
    """
    state = process_state(device)
    where = str(state.device) if device == "auto" else device
    started = time.monotonic()
    models = open_index(
        index, model=model, data=data, denoiser=denoiser, functional=functional, device=where
    )
    last = models[-1]
    queries = _open(config.queries, last.denoiser)
    held_out = None
    if config.held_out is not None:
        held_out = open_held_out(config.held_out, last.training, last.config.data, last.denoiser)
    kept = kept_positions(last.training.ids, config.without)
    if config.without and last.config.method == "datamodel":
        raise ConfigError(
            "'datamodel' is fitted on all training images at once, so that none can be left out"
        )
    rows_kept = [last.training.rows[position] for position in kept]
    labels = {
        column: group_labels(last.training.source, column, rows_kept)
        for column in dict.fromkeys((CLASS, *config.groups))
    }
    config = replace(config, scores=config.scores or last.config.scores)
    out = out or index / "scores"
    if state.is_main_process:
        claim_folder(out, _claim(config, models, queries, held_out), overwrite=overwrite)
    state.wait_for_everyone()
    stores: list[list[FeatureStore]] = []
    made = 0
    for one in models:
        rows, name = _query_rows(config.queries, one, queries)
        sets = [(rows, queries, name)]
        if held_out is not None:
            sets.append((one.rows, held_out, held_out.fingerprint[:16]))
        stores.append([])
        for maker, images, folder in sets:
            store, count = write_features(
                maker,
                images,
                one.folder / "queries" / folder,
                # Their rows are few: kept as they are.
                StoreConfig(dtype="float32", shard_rows=one.config.store.shard_rows),
                state,
                role="query",
                title="das score",
            )
            stores[-1].append(store)
            made += count
    found: Found | None = None
    if state.is_main_process:
        scored = [
            _scored(config, one, parts, kept, where)
            for one, parts in zip(models, stores, strict=True)
        ]
        found = _search(config, last, scored, queries, held_out, labels, kept, where)
        features = [str(parts[0].folder.relative_to(index)) for parts in stores]
        write_scores(out, index, config, models, queries, held_out, found, features, kept)
    state.wait_for_everyone()
    summary: dict[str, Any] = {
        "queries": len(queries),
        "training_images": len(kept),
        "featurised_now": made,
        "seconds": round(time.monotonic() - started, 1),
        "folder": str(out),
    }
    if found is not None:
        from diffcal.workflows.das_report import explain_scores

        summary |= headline(config, found) | {"gallery": explain_scores(out)["gallery"]}
    return summary


def _open(asked: QueryConfig, denoiser: Denoiser) -> ConditionedImages:
    return open_queries(
        asked.name,
        denoiser,
        first_row=asked.first_row,
        rows=asked.rows,
        stride=asked.stride,
        unconditional=asked.unconditional,
        image_column=asked.image_column,
        label_column=asked.label_column,
    )


def _query_rows(
    asked: QueryConfig, index: AttributionIndex, queries: ConditionedImages
) -> tuple[ImageRows, str]:
    """What makes the query features, and the folder they are kept in."""
    source = index.config.queries_from if asked.features == "auto" else asked.features
    name = queries.fingerprint[:16]
    if source == "images":
        return index.rows, name
    rows = path_rows(index.config, index.denoiser, Path(asked.name), queries, index.functional)
    return rows, f"{name}-path"


def _scored(
    config: ScoreRunConfig,
    index: AttributionIndex,
    stores: list[FeatureStore],
    kept: Sequence[int],
    device: str,
) -> ScoredModel:
    scores = config.scores or ScoreConfig()
    whole = ScoredModel(
        torch.cat([store.rows() for store in stores]),
        index.store,
        index.kernel(device) if scores.method == "kernel" else None,
        None if scores.residual == "none" else index.store.column("error"),
    )
    with one_thread():
        return whole.keeping(kept)


def _claim(
    config: ScoreRunConfig,
    models: list[AttributionIndex],
    queries: ConditionedImages,
    held_out: ConditionedImages | None,
) -> dict[str, Any]:
    values = config_to_dict(config)
    # Where the images lie does not decide the scores; what they are does.
    values["queries"] = [queries.fingerprint, config.queries.features]
    values["held_out"] = None
    if config.held_out is not None and held_out is not None:
        values["held_out"] = [held_out.fingerprint, config.held_out.quantile]
    # A list of thousands would drown the message that names what differs.
    del values["without"]
    if config.without:
        values["without"] = describe_ids(config.without)
    return {"format": FORMAT, **values, "index": index_fingerprint(models)}


def _search(
    config: ScoreRunConfig,
    index: AttributionIndex,
    models: list[ScoredModel],
    queries: ConditionedImages,
    held_out: ConditionedImages | None,
    labels: dict[str, list[str]],
    kept: Sequence[int],
    device: str,
) -> Found:
    encoder = build_encoder(
        config.likeness,
        denoiser=index.denoiser,
        image_shape=index.training.source.image_shape,
        device=device,
    )
    sets = [queries] if held_out is None else [queries, held_out]
    return search(
        config.scores or ScoreConfig(),
        models,
        Likeness(encoder, index.training, *sets, kept=kept),
        labels,
        len(queries),
        top=config.top,
        nearest=config.nearest,
        background=config.background,
    )
