"""Rows of a published data set to Parquet, with settings that fix every byte."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Bool, Float
from numpy import ndarray

from diffcal.data.soft_labels import ROW_GROUP, ROW_GROUP_BYTES, flat_lists, published_schema

__all__ = ["requested_ratios", "write_rows"]


def requested_ratios(table: pa.Table) -> Float[ndarray, " n"]:
    """Requested weight λ of the first class of each row."""
    return pc.list_element(table["weights"], 0).to_numpy()  # type: ignore[attr-defined]


def write_rows(
    images: Path,
    table: pa.Table,
    keep: Bool[ndarray, " n"],
    names: Sequence[str],
    target: IO[bytes],
) -> None:
    """Write one file of a published data set, row group by row group, the same bytes each time.

    Args:
        images: Parquet file with a column ``image``, ``n`` rows.
        table: The other columns of the same rows: ``id``, ``group``, ``member``, ``classes``,
            ``weights``, ``seed``, ``soft_label``, ``lambda_hat`` and the quality columns.
        keep: Which rows to write.
        names: Class names.
        target: Open binary file.
    """
    schema = published_schema(names)
    plain = [field.name for field in schema if field.name != "image"]
    # encoded images neither shrink nor repeat; the rest does
    options: dict[str, Any] = {
        "compression": {"image.bytes": "NONE", "image.path": "ZSTD"}
        | {_leaf(schema, name): "ZSTD" for name in plain},
        "use_dictionary": [_leaf(schema, name) for name in plain if name != "soft_label"],
        "write_statistics": ["id", "group", "label"],
        "version": "2.6",
        "data_page_version": "1.0",
    }
    with pq.ParquetWriter(target, schema, **options) as writer:
        for batch in _published_rows(images, table, keep, schema):
            writer.write_table(batch, row_group_size=len(batch))


def _leaf(schema: pa.Schema, name: str) -> str:
    return f"{name}.list.element" if pa.types.is_nested(schema.field(name).type) else name


def _published_rows(
    images: Path, table: pa.Table, keep: ndarray, schema: pa.Schema
) -> Iterator[pa.Table]:
    """Tables of one row group of kept rows (the last may be shorter) in their order."""
    waiting: list[pa.Table] = []
    count = start = size = 0
    file = pq.ParquetFile(images, memory_map=True)
    for batch in file.iter_batches(batch_size=ROW_GROUP, columns=["image"], use_threads=False):
        rows = slice(start, start + len(batch))
        start += len(batch)
        pixels = pa.Table.from_batches([batch])
        # the first images tell for all of a shard, whatever is filtered
        size = size or max(1, min(ROW_GROUP, ROW_GROUP_BYTES * len(batch) // pixels.nbytes))
        part = table.slice(rows.start, len(batch)).append_column("image", pixels["image"])
        part = part.filter(pa.array(keep[rows]))
        waiting.append(_columns(part, schema))
        count += len(part)
        while count >= size:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, size).combine_chunks()
            waiting, count = [joined.slice(size)], count - size
    if count:
        yield pa.concat_tables(waiting).combine_chunks()


def _columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Columns of the published form, computed and cast."""
    classes = schema.field("soft_label").type.list_size
    soft, _ = flat_lists(table["soft_label"], np.float32)
    soft_label = pa.FixedSizeListArray.from_arrays(pa.array(soft, pa.float32()), classes)
    made = {
        "label": pa.array(soft.reshape(-1, classes).argmax(axis=1), pa.int64()),
        "soft_label": soft_label,
        "lambda": pa.array(requested_ratios(table), pa.float32()),
    }
    arrays = [
        made[field.name] if field.name in made else table[field.name].cast(field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)
