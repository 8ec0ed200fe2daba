"""Whom the training images belong to: classes, sources, artists, and what each would be paid."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffcal.attribution.ensemble import ScoredModel
from diffcal.attribution.feature_store import FeatureStore
from diffcal.attribution.groups import GroupShares
from diffcal.attribution.score_config import ScoreConfig
from diffcal.config import config_from_dict
from diffcal.data.sources import ImageSource, open_images
from diffcal.errors import ArtifactError, DataError
from diffcal.workflows import html
from diffcal.workflows.das_config import TrainingImages
from diffcal.workflows.das_index import fitted_kernel, read_manifest_of_index
from diffcal.workflows.das_score_pass import shares_of_groups
from diffcal.workflows.das_without import kept_positions

__all__ = ["CLASS", "group_labels", "group_records", "group_section", "stored_shares"]

CLASS = "class"
"""The column that every source has."""
NOBODY = "(none)"
"""Group of the images whose cell is empty."""
LONGEST = 50
"""Groups that a page lists."""


def group_labels(source: ImageSource, column: str, rows: Sequence[int]) -> list[str]:
    """Group of each training image.

    Raises:
        DataError: no such column, or values that name nobody.
    """
    if column == CLASS:
        labels = [label for _, _, part in source.batches(1024, rows) for label in part.tolist()]
        return [source.class_names[label] for label in labels]
    found: list[str] = []
    for row, value in zip(rows, source.column(column, rows), strict=True):
        if value is not None and not isinstance(value, str | int | bool):
            raise DataError(
                f"'{source.name}', row {row}: column '{column}' must hold names or numbers to group "
                f"by, found {type(value).__name__}"
            )
        found.append(NOBODY if value is None or value == "" else str(value))
    return found


def group_records(shares: GroupShares, amount: float | None = None) -> list[dict[str, Any]]:
    """Groups as JSON values, the largest share first; ``royalty`` where there is an amount."""
    size = shares.data_share.tolist()
    records = [
        {
            "name": str(name),
            "share": float(shares.mean[at]),
            "low": shares.spread[at].low,
            "high": shares.spread[at].high,
            "data_share": size[at],
            "lift": float(shares.lift[at]),
        }
        for at, name in enumerate(shares.names)
    ]
    if amount is not None:
        paid = {str(name): value for name, value in shares.royalties(amount).items()}
        records = [record | {"royalty": paid[str(record["name"])]} for record in records]
    return sorted(records, key=lambda record: -record["share"])


def group_section(
    column: str, records: Sequence[dict[str, Any]], amount: float | None = None
) -> list[str | html.Html]:
    """Blocks of a page: a table of groups and how to read it."""
    header = [column, "share", "of the images", "lift"]
    rows: list[list[Any]] = []
    for record in records[:LONGEST]:
        interval = f"{_percent(record['low'])} to {_percent(record['high'])}"
        row = [
            record["name"],
            html.Number(record["share"], _percent(record["share"]), interval),
            html.Number(record["data_share"], _percent(record["data_share"])),
            record["lift"],
        ]
        if amount is not None:
            value = record["share"] * amount
            row.append(html.Number(value, f"{value:,.2f}"))
        rows.append(row)
    if amount is not None:
        header.append(f"of {amount:,.2f}")
    blocks: list[str | html.Html] = [
        f"Share of all attribution that goes to training images of each {column}, with a 95 % interval "
        "over queries; lift is the share divided by the part of the training set.",
        html.table(header, rows),
    ]
    if amount is not None:
        blocks.append(
            "The last column divides the amount in proportion to the shares. Scores say how much an "
            "image matters to the model, not what anybody is owed by law."
        )
    if len(records) > LONGEST:
        blocks.append(f"{len(records) - LONGEST} smaller groups are left out here.")
    return blocks


def stored_shares(
    manifest: dict[str, Any], column: str, data: str | None = None
) -> list[dict[str, Any]]:
    """Shares of finished scores by another column, from stored features: no model, no gradients.

    Args:
        manifest: Of the scores.
        data: Where the training images are now, if they moved.

    Raises:
        ArtifactError: the index behind the scores is not there any more, or another one by now.
        DataError: no such column.
    """
    folder = Path(manifest["index"])
    parts = read_manifest_of_index(folder).get("models", [""])
    stores = [FeatureStore.open(folder / part / "features") for part in parts]
    if [store.fingerprint for store in stores] != manifest["features"]:
        raise ArtifactError(f"'{folder}' is not the index that was scored any more: score again")
    training = config_from_dict(TrainingImages, manifest["data"])
    source = open_images(
        data or training.name,
        image_column=training.image_column,
        label_column=training.label_column,
    )
    if source.fingerprint != manifest["data_fingerprint"]:
        raise ArtifactError(f"'{source.name}' holds other images than those that were scored")
    kept = kept_positions(stores[0].ids, manifest["config"].get("without", []))
    rows = [training.first_row + position for position in kept]
    labels = group_labels(source, column, rows)
    config = config_from_dict(ScoreConfig, manifest["config"]["scores"])
    models = []
    for part, store, asked in zip(parts, stores, manifest["query_features"], strict=True):
        kernel = None
        if config.method == "kernel":
            kernel = fitted_kernel(folder / part / "kernel.safetensors", store, "cpu")
        errors = None if config.residual == "none" else store.column("error")
        queries = FeatureStore.open(folder / asked).rows()
        models.append(ScoredModel(queries, store, kernel, errors).keeping(kept))
    count = len(models[0].queries)
    return group_records(shares_of_groups(config, models, {column: labels}, count)[column])


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
