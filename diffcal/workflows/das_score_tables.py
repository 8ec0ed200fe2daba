"""What ``diffcal das score`` leaves on disk: tables, and a manifest that vouches for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffcal.attribution.feature_shards import RowId
from diffcal.config import config_to_dict
from diffcal.core.runs import sha256_file, write_atomic, write_json
from diffcal.workflows.das_groups import group_records
from diffcal.workflows.das_held_out import copy_columns, copy_facts
from diffcal.workflows.das_images import ConditionedImages
from diffcal.workflows.das_index import AttributionIndex
from diffcal.workflows.das_score_pass import Found, Ranked

if TYPE_CHECKING:
    from diffcal.workflows.das_score import ScoreRunConfig

__all__ = ["FORMAT", "headline", "write_scores", "write_table"]

FORMAT = "diffcal-scores/1"


def write_scores(
    out: Path,
    folder: Path,
    config: "ScoreRunConfig",
    models: Sequence[AttributionIndex],
    queries: ConditionedImages,
    held_out: ConditionedImages | None,
    found: Found,
    features: Sequence[str],
    kept: Sequence[int],
) -> None:
    """Write tables and, last, ``scores.json``.

    Args:
        folder: Of the index.
        features: Where the query features of each model lie in it.
        kept: Positions of the training images that were scored.
    """
    index = models[-1]
    ids = [index.training.ids[position] for position in kept]
    shares = found.top.values.double() / found.total[:, None]
    scores = _ranked(queries, ids, found.top, "score")
    scores |= {
        "share": shares.flatten().tolist(),
        "likeness": found.top_likeness.flatten().tolist(),
    }
    tables: dict[str, dict[str, list[Any]]] = {
        "scores": scores,
        "nearest": _ranked(queries, ids, found.nearest, "likeness"),
    }
    if config.scores is not None and config.scores.readout in ("signed", "signed_square"):
        tables["lowest"] = _ranked(queries, ids, found.lowest, "score")
    report = found.memorisation
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
    }
    copies = None
    if config.held_out is not None and found.held_out is not None:
        quantile = config.held_out.quantile
        tables["queries"] |= copy_columns(report, found.held_out, quantile)
        copies = copy_facts(report, found.held_out, quantile)
    for column, group in found.groups.items():
        tables["queries"][f"{column}_shares"] = group.per_query.tolist()
    groups = {
        column: group_records(group, config.royalties) for column, group in found.groups.items()
    }
    tables["groups"] = _flat(groups)
    files = {}
    for name, columns in tables.items():
        path = out / f"{name}.parquet"
        write_table(path, columns)
        files[path.name] = sha256_file(path)
    write_json(
        out / "scores.json",
        {
            "format": FORMAT,
            "config": config_to_dict(config),
            "index": str(folder.resolve()),
            "model": config_to_dict(index.config.model),
            "data": config_to_dict(index.config.data),
            "data_fingerprint": index.training.source.fingerprint,
            "method": index.config.method,
            "features": [one.store.fingerprint for one in models],
            "query_features": list(features),
            "queries": queries.fingerprint,
            "held_out": None if held_out is None else held_out.fingerprint,
            "training_images": len(kept),
            "group_order": {
                column: [str(name) for name in group.names]
                for column, group in found.groups.items()
            },
            "groups": groups,
            "copies": copies,
            "summary": headline(config, found),
            "files": files,
        },
    )


def headline(config: "ScoreRunConfig", found: Found) -> dict[str, Any]:
    """The figures of a scoring that matter most."""
    report = found.memorisation
    first = found.top.index[:, :1]
    figures: dict[str, Any] = {
        "mean_top_share": round(float(report.dominance.mean()), 4),
        "median_contributors": round(float(report.contributors.median()), 1),
        "first_is_near": round(float((found.nearest.index == first).any(dim=1).double().mean()), 4),
        "largest_copy_score": round(float(report.copy_score.max()), 4),
    }
    if config.held_out is not None and found.held_out is not None:
        facts = copy_facts(report, found.held_out, config.held_out.quantile)
        figures["flagged"] = {
            name: {"queries": facts["flagged"][name], "expected": round(expected, 2)}
            for name, expected in facts["expected"].items()
        }
    return figures


def write_table(path: Path, columns: dict[str, list[Any]]) -> None:
    """Columns as Parquet, atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(columns)
    write_atomic(path, lambda file: pq.write_table(table, file, compression="zstd"))


def _ranked(
    queries: ConditionedImages, ids: Sequence[RowId], best: Ranked, value: str
) -> dict[str, list[Any]]:
    count = best.index.shape[1]
    return {
        "query": [name for name in queries.ids for _ in range(count)],
        "training": [ids[row] for row in best.index.flatten().tolist()],
        "rank": list(range(1, count + 1)) * len(queries),
        value: best.values.flatten().tolist(),
    }


def _flat(groups: dict[str, list[dict[str, Any]]]) -> dict[str, list[Any]]:
    """Groups of all columns as one table."""
    rows = [
        {"column": column, **record} for column, records in groups.items() for record in records
    ]
    return {name: [row[name] for row in rows] for name in rows[0]}
