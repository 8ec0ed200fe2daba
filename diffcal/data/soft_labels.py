"""The published data set of soft-labelled images: its columns, and reading them from disk.

``DATASET/data/*.parquet`` hold one row for each image. The ``datasets`` library opens the folder as it
is; here the label columns become tensors, and an image is decoded when it is asked for.
"""

import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy import ndarray
from torch import Tensor

from diffcal.data.images import decode_image
from diffcal.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = [
    "FORMAT",
    "QUALITY_COLUMNS",
    "ROW_GROUP",
    "ROW_GROUP_BYTES",
    "SoftLabelSet",
    "flat_lists",
    "published_schema",
]

FORMAT = "diffcal-dataset/1"
ROW_GROUP = 100
"""Images in a row group, the unit of a random read; fewer where images are large."""
ROW_GROUP_BYTES = 2**21
QUALITY_COLUMNS = ("residual", "third_mass", "group_spearman", "endpoint_ok", "nearest_cosine")
OPEN_FILES = 16
CACHE_BYTES = 2**25
"""Columns of row groups that stay in memory, the last one whatever its size."""


def published_schema(class_names: Sequence[str]) -> "pa.Schema":
    """Arrow schema of a published data set, with the metadata from which ``datasets`` takes features."""
    import pyarrow as pa

    types: dict[str, tuple[pa.DataType, dict[str, Any]]] = {
        "image": (pa.struct({"bytes": pa.binary(), "path": pa.string()}), {"_type": "Image"}),
        "label": (pa.int64(), {"names": list(class_names), "_type": "ClassLabel"}),
        "soft_label": _list(pa.float32(), len(class_names)),
        "id": _value(pa.int64()),
        "group": _value(pa.int64()),
        "member": _value(pa.int32()),
        "classes": _list(pa.int32()),
        "weights": _list(pa.float32()),
        "lambda": _value(pa.float32()),
        "lambda_hat": _value(pa.float32()),
        "residual": _value(pa.float32()),
        "third_mass": _value(pa.float32()),
        "group_spearman": _value(pa.float32()),
        "endpoint_ok": _value(pa.bool_()),
        "nearest_cosine": _value(pa.float32()),
        "seed": _value(pa.int64()),
    }
    features = {name: feature for name, (_, feature) in types.items()}
    fields = [pa.field(name, kind) for name, (kind, _) in types.items()]
    return pa.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


def _value(kind: "pa.DataType") -> tuple["pa.DataType", dict[str, Any]]:
    names = {"float": "float32", "double": "float64"}
    return kind, {"dtype": names.get(str(kind), str(kind)), "_type": "Value"}


def _list(kind: "pa.DataType", length: int = -1) -> tuple["pa.DataType", dict[str, Any]]:
    import pyarrow as pa

    # "Sequence" is read by all versions of datasets, its newer name "List" only by 4 and later
    feature = {"feature": _value(kind)[1], "length": length, "_type": "Sequence"}
    return (pa.list_(kind) if length < 0 else pa.list_(kind, length)), feature


class SoftLabelSet:
    """A published data set on disk: label columns as tensors, images one at a time.

    Files are memory-mapped, and a read touches one row group of about a hundred images. An object
    pickles without open files, so that it travels to the workers of a ``DataLoader``.

    Args:
        folder: The ``dataset`` folder of a run (with ``data/*.parquet``).
        class_names: The classes that it must have, in this order; its own if None.

    Raises:
        DataError: no data set there, not Parquet, missing columns, other classes.
    """

    NEEDED = ("image", "soft_label", "group", "classes", "weights")

    def __init__(self, folder: Path | str, class_names: Sequence[str] | None = None) -> None:
        self.folder = Path(folder)
        self.files = tuple(sorted((self.folder / "data").glob("*.parquet")))
        if not self.files:
            raise DataError(
                f"'{self.folder}' holds no published mixed data set (no data/*.parquet); give the "
                "'dataset' folder of a finished mixing run"
            )
        self._starts: list[int] = []  # first row of each row group
        self._places: list[tuple[int, int]] = []  # file and row group in it
        self._length = 0
        self._forget()
        names: tuple[str, ...] | None = None
        for index, path in enumerate(self.files):
            file = self._file(index)
            missing = [name for name in self.NEEDED if name not in file.schema_arrow.names]
            if missing:
                raise DataError(f"'{path}' lacks the columns {', '.join(missing)}")
            found = _class_names(file.schema_arrow.metadata or {})
            if index and found != names:
                raise DataError(f"'{path}' names other classes than '{self.files[0]}'")
            names = found
            for group in range(file.num_row_groups):
                self._starts.append(self._length)
                self._places.append((index, group))
                self._length += file.metadata.row_group(group).num_rows
        self.named = names is not None
        """Whether the files name their classes; otherwise the caller's names, or numbers, are used."""
        if names is not None and class_names is not None and names != tuple(class_names):
            raise DataError(
                f"the mixed set '{self.folder}' has the classes {', '.join(names[:5])} ..., the real "
                f"images {', '.join(tuple(class_names)[:5])} ..."
            )
        if names is None and class_names is not None:
            names = tuple(class_names)
        self.class_names = names or tuple(map(str, range(self._width())))

    def __len__(self) -> int:
        return self._length

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None, "_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def num_classes(self) -> int:
        """Number of classes k."""
        return len(self.class_names)

    def has(self, column: str) -> bool:
        """Whether the files have a column of this name."""
        return column in self._file(0).schema_arrow.names

    def columns(self, names: Sequence[str]) -> "pa.Table":
        """Some columns of all rows; leave ``image`` out of it for sets that do not fit in memory.

        Raises:
            DataError: a column is missing, a file is damaged.
        """
        import pyarrow as pa

        tables = [table for _, table in self.file_columns(names)]
        for path, table in zip(self.files, tables, strict=True):
            if table.schema != tables[0].schema:
                raise DataError(
                    f"'{path}' has columns of other types than '{self.files[0]}'; publish it again"
                )
        return pa.concat_tables(tables)

    def file_columns(self, names: Sequence[str]) -> "Iterator[tuple[int, pa.Table]]":
        """The same file by file: number of the first row, and the columns.

        Raises:
            DataError: a column is missing, a file is damaged.
        """
        import pyarrow as pa

        start = 0
        for index, path in enumerate(self.files):
            file = self._file(index)
            missing = [name for name in names if name not in file.schema_arrow.names]
            if missing:
                raise DataError(f"'{path}' lacks the columns {', '.join(missing)}")
            try:
                table = file.read(columns=list(names)).replace_schema_metadata()
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"'{path}' cannot be read: {error}") from error
            yield start, table.select(list(names))
            start += len(table)

    def soft_labels(self) -> Float[Tensor, "n k"]:
        """Soft label of every image.

        Raises:
            DataError: rows of another length than the number of classes, or with nulls.
        """
        column = self.columns(["soft_label"]).column(0)
        values, counts = flat_lists(column, np.float32)
        if (counts != self.num_classes).any():
            raise DataError(
                f"'{self.folder}': soft labels have {int(counts[counts != self.num_classes][0])} "
                f"entries, expected one for each of {self.num_classes} classes"
            )
        return torch.from_numpy(values.reshape(len(counts), self.num_classes))

    def mixing_weights(self) -> tuple[Float[Tensor, "n k"], Bool[Tensor, "n k"]]:
        """Weight of every class in the condition each image was generated from, and which were mixed.

        Raises:
            DataError: classes and weights of different lengths, classes out of range.
        """
        table = self.columns(["classes", "weights"])
        classes, counts = flat_lists(table.column("classes"), np.int64)
        weights, other = flat_lists(table.column("weights"), np.float32)
        if (counts != other).any():
            raise DataError(f"'{self.folder}': classes and weights do not fit: unequal lengths")
        if len(classes) and not (classes.min() >= 0 and classes.max() < self.num_classes):
            raise DataError(
                f"'{self.folder}': classes and weights do not fit: class {classes.max()} of "
                f"{self.num_classes}"
            )
        rows = np.repeat(np.arange(len(counts)), counts)
        dense = np.zeros((len(counts), self.num_classes), np.float32)
        support = np.zeros(dense.shape, bool)
        dense[rows, classes], support[rows, classes] = weights, True
        return torch.from_numpy(dense), torch.from_numpy(support)

    def groups(self) -> Int64[Tensor, " n"]:
        """Group of every image; its members share their noise."""
        values = self.columns(["group"]).column(0).to_numpy()
        return torch.from_numpy(values.astype(np.int64))

    def cell(self, row: int, column: str) -> Any:
        """One value as Python gives it: a list for lists, None for null.

        Raises:
            IndexError: there is no such row.
            DataError: the file is damaged or lacks the column.
        """
        place, offset = self._place(row)
        table = self._group(place, column)
        return table.column(0)[offset].as_py()

    def record(self, row: int) -> dict[str, Any]:
        """Every column of a row as Python values; ``image`` is a dict with ``bytes`` and ``path``."""
        return {name: self.cell(row, name) for name in self._file(0).schema_arrow.names}

    def image_bytes(self, row: int) -> bytes:
        """Encoded image (PNG) of a row."""
        value = self.cell(row, "image")
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise DataError(f"'{self.folder}', row {row}: the image has no bytes")
        return data

    def image(self, row: int) -> ndarray:
        """Pixels of a row, uint8 ``[h, w, c]`` with one channel (grey) or three.

        Raises:
            DataError: the image cannot be decoded.
        """
        return decode_image(self.image_bytes(row), f"'{self.folder}', row {row}")

    def soft_label(self, row: int) -> Float[Tensor, " k"]:
        """Soft label of a row."""
        return torch.tensor(self.cell(row, "soft_label"), dtype=torch.float32)

    def _width(self) -> int:
        for row in range(min(1, len(self))):
            return len(self.cell(row, "soft_label"))
        return 0

    def _place(self, row: int) -> tuple[int, int]:
        if not 0 <= row < self._length:
            raise IndexError(f"row {row} of {self._length}")
        place = bisect_right(self._starts, row) - 1
        return place, row - self._starts[place]

    def _group(self, place: int, column: str) -> "pa.Table":
        import pyarrow as pa

        key = (place, column)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        index, group = self._places[place]
        file = self._file(index)
        if column not in file.schema_arrow.names:
            raise DataError(f"'{self.files[index]}' lacks the columns {column}")
        try:
            # no threads: workers are forked, and one group is read faster without
            table = file.read_row_group(group, columns=[column], use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"'{self.files[index]}' cannot be read: {error}") from error
        self._cache[key] = table
        while len(self._cache) > 1 and sum(t.nbytes for t in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)
        return table

    def _file(self, index: int) -> "pq.ParquetFile":
        import pyarrow as pa
        import pyarrow.parquet as pq

        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index]
        path = self.files[index]
        try:
            file = pq.ParquetFile(path, memory_map=True)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"'{path}' cannot be read as a mixed data set: {error}") from error
        self._open[index] = file
        while len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return file

    def _forget(self) -> None:
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._cache: OrderedDict[tuple[int, str], pa.Table] = OrderedDict()


def flat_lists(column: "pa.ChunkedArray", dtype: Any) -> tuple[ndarray, ndarray]:
    """Values of a list column one after the other, and how many each row has."""
    import pyarrow.compute as pc

    counts = pc.list_value_length(column)  # type: ignore[attr-defined]
    values = pc.list_flatten(column)  # type: ignore[attr-defined]
    if counts.null_count or values.null_count:
        raise DataError("a list column has null entries")
    return values.to_numpy().astype(dtype), counts.to_numpy().astype(np.int64)


def _class_names(metadata: dict[bytes, bytes]) -> tuple[str, ...] | None:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(map(str, names))
