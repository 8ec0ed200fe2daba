"""Labelled images by name: the bundled digits, Parquet files, image folders, data sets of a hub.

Images are decoded when asked for, so a source of any size needs the memory of one batch.
"""

import difflib
import glob
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from diffcal.core.runs import fingerprint, sha256_file
from diffcal.data.images import decode_image
from diffcal.errors import DataError

__all__ = ["IMAGE_SUFFIXES", "ImageSource", "ParquetSource", "open_images"]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.+-]+)?")

Batch = tuple[ndarray, ndarray, ndarray]


class ImageSource(ABC):
    """Images with integer labels, addressed by row."""

    name: str
    class_names: tuple[str, ...]

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of images and labels as stored."""

    @abstractmethod
    def _rows(self, rows: Sequence[int]) -> Iterator[tuple[ndarray, int]]:
        """Pixels ``[h, w, c]`` and label of each row."""

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the first image, which all others must have."""
        height, width, channels = next(self._rows([0]))[0].shape
        return height, width, channels

    def column(self, name: str, rows: Sequence[int]) -> list[Any]:
        """Values of another column than image and label, such as the artist; None where it is empty.

        Raises:
            DataError: there is no such column; sources without a table have none.
        """
        raise DataError(
            f"'{self.name}' has no column '{name}': it holds images and classes alone; "
            "a Parquet file can tell more"
        )

    def batches(self, size: int, rows: Sequence[int] | None = None) -> Iterator[Batch]:
        """Batches ``(rows int64 [b], images uint8 [b, h, w, c], labels int64 [b])``.

        Args:
            size: Images per batch; the last one may be smaller.
            rows: Which rows, in which order; all if None.

        Raises:
            DataError: an image that cannot be decoded or has another size than the first, or a label
                that is missing or out of range. Grey images of a coloured source become RGB.
        """
        rows = range(len(self)) if rows is None else rows
        for row in (min(rows, default=0), max(rows, default=0)):
            if not 0 <= row < len(self):
                raise DataError(f"row {row} asked for, but '{self.name}' has {len(self)} rows")
        numbers: list[int] = []
        images: list[ndarray] = []
        labels: list[int] = []
        for row, (image, label) in zip(rows, self._rows(rows), strict=True):
            if not 0 <= label < len(self.class_names):
                raise DataError(
                    f"'{self.name}', row {row}: label {label} is not one of the "
                    f"{len(self.class_names)} classes"
                )
            numbers.append(row)
            images.append(self._fitted(image, row))
            labels.append(label)
            if len(numbers) == size:
                yield np.array(numbers), np.stack(images), np.array(labels)
                numbers, images, labels = [], [], []
        if numbers:
            yield np.array(numbers), np.stack(images), np.array(labels)

    def _fitted(self, image: ndarray, row: int) -> ndarray:
        if image.shape[2] == 1 and self.image_shape[2] == 3:
            image = image.repeat(3, axis=2)
        if image.shape != self.image_shape:
            found, wanted = ("x".join(map(str, shape)) for shape in (image.shape, self.image_shape))
            raise DataError(
                f"'{self.name}', row {row}: the image is {found} (height x width x channels), the "
                f"first one {wanted}; bring all images to one size first"
            )
        return image


def open_images(
    name: str, *, image_column: str = "image", label_column: str = "label"
) -> ImageSource:
    """Source of labelled images.

    Args:
        name: One of

            * ``digits``: the 1797 8x8 digits that come with scikit-learn, scaled to 0..255;
            * a Parquet file, a glob of them, or a folder that holds some (also in ``data/``);
            * a folder with one subfolder of image files for each class, in alphabetic order;
            * a data set of the Hugging Face hub, with the split after a colon: ``mnist:train``.
        image_column: Parquet and hub: encoded bytes, or a struct with the field ``bytes``.
        label_column: Parquet and hub: integers (named by the ``datasets`` metadata if present) or
            strings.

    Raises:
        DataError: nothing there, or not in one of these forms.
    """
    if name == "digits":
        return DigitsSource()
    path = Path(name)
    if not path.exists() and any(character in name for character in "*?["):
        files = [Path(found) for found in sorted(glob.glob(name))]
        if not files:
            raise DataError(f"no file matches '{name}'")
        return ParquetSource(name, files, image_column, label_column)
    if path.is_file():
        return ParquetSource(name, [path], image_column, label_column)
    if path.is_dir():
        files = sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
        if files:
            return ParquetSource(name, files, image_column, label_column)
        return FolderSource(path)
    if not HUB_NAME.fullmatch(name) or path.suffix:
        raise DataError(f"'{name}' does not exist")
    return HubSource(name, image_column, label_column)


class DigitsSource(ImageSource):
    """Optical recognition of handwritten digits (scikit-learn), grey 8x8."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        data: Any = load_digits()
        self.name = "digits"
        self.class_names = tuple(str(digit) for digit in range(10))
        self.images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
        self.labels = data.target.astype(np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()

    def _rows(self, rows: Sequence[int]) -> Iterator[tuple[ndarray, int]]:
        return ((self.images[row], int(self.labels[row])) for row in rows)


class ParquetSource(ImageSource):
    """Rows of Parquet files in their order; one row group is in memory at a time."""

    def __init__(
        self, name: str, files: Sequence[Path], image_column: str, label_column: str
    ) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.name, self.files = name, tuple(files)
        self.columns = (image_column, label_column)
        self._groups: list[tuple[int, int, int]] = []  # (first row, file, row group)
        self._length = 0
        self._opened = (-1, [], [])
        labels: pa.DataType | None = None
        names: tuple[str, ...] | None = None
        for index, path in enumerate(self.files):
            try:
                file = pq.ParquetFile(path, memory_map=True)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"'{path}' cannot be read as Parquet: {error}") from error
            schema = file.schema_arrow
            for column in self.columns:
                if column not in schema.names:
                    raise DataError(
                        f"'{path}' has no column '{column}'{_near(column, schema.names)}"
                    )
            if labels is not None and schema.field(label_column).type != labels:
                raise DataError(f"'{path}': column '{label_column}' has another type than before")
            labels = schema.field(label_column).type
            found = _named_classes(schema.metadata or {}, label_column)
            if index and found != names:
                raise DataError(f"'{path}' names other classes than '{self.files[0]}'")
            names = found
            for group in range(file.num_row_groups):
                self._groups.append((self._length, index, group))
                self._length += file.metadata.row_group(group).num_rows
        if not self._length:
            raise DataError(f"'{name}' has no rows")
        self._strings: dict[str, int] | None = None
        self.class_names = names or self._classes_of_labels()

    def __len__(self) -> int:
        return self._length

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint([*self.columns, *(sha256_file(path) for path in self.files)])

    def column(self, name: str, rows: Sequence[int]) -> list[Any]:
        """See :meth:`ImageSource.column`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        values: list[Any] = []
        for path in self.files:
            names = pq.read_schema(path).names
            if name not in names:
                raise DataError(f"'{path}' has no column '{name}'{_near(name, names)}")
            try:
                values += pq.read_table(path, columns=[name]).column(0).to_pylist()
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"'{path}' cannot be read: {error}") from error
        return [values[row] for row in rows]

    def _classes_of_labels(self) -> tuple[str, ...]:
        import pyarrow.parquet as pq

        values: set[Any] = set()
        for path in self.files:
            column = pq.read_table(path, columns=[self.columns[1]]).column(0)
            values.update(column.unique().to_pylist())
        if None in values:
            raise DataError(f"'{self.name}': column '{self.columns[1]}' has rows without a label")
        if all(isinstance(value, str) for value in values):
            names = tuple(sorted(values))
            self._strings = {name: index for index, name in enumerate(names)}
            return names
        if not all(isinstance(value, int) and value >= 0 for value in values):
            raise DataError(
                f"'{self.name}': column '{self.columns[1]}' must hold class numbers or names"
            )
        return tuple(str(index) for index in range(max(values) + 1))

    def _rows(self, rows: Sequence[int]) -> Iterator[tuple[ndarray, int]]:
        starts = np.array([start for start, _, _ in self._groups])
        for row in rows:
            group = int(np.searchsorted(starts, row, side="right")) - 1
            images, labels = self._load(group)
            offset = row - int(starts[group])
            yield self._cell(images[offset], labels[offset].as_py(), row)

    def _load(self, group: int) -> tuple[Any, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._opened[0] != group:
            _, index, number = self._groups[group]
            try:
                file = pq.ParquetFile(self.files[index], memory_map=True)
                table = file.read_row_group(number, columns=list(self.columns))
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"'{self.files[index]}' cannot be read: {error}") from error
            columns = [table.column(column).combine_chunks() for column in self.columns]
            self._opened = (group, columns[0], columns[1])
        return self._opened[1], self._opened[2]

    def _cell(self, cell: Any, label: Any, row: int) -> tuple[ndarray, int]:
        where = f"'{self.name}', row {row}"
        value = cell.as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise DataError(
                f"{where}: column '{self.columns[0]}' must hold encoded images (bytes, or a struct "
                f"with the field 'bytes'), found {type(data).__name__}"
            )
        if isinstance(label, str) and self._strings is not None:
            label = self._strings[label]
        if not isinstance(label, int):
            raise DataError(f"{where}: the label {label!r} is no class number")
        return decode_image(data, where), label


class FolderSource(ImageSource):
    """Image files in one subfolder for each class, both in alphabetic order."""

    def __init__(self, folder: Path) -> None:
        self.name, self.folder = str(folder), folder
        classes = sorted(
            child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")
        )
        self.class_names = tuple(child.name for child in classes)
        self.files = [
            (path, label)
            for label, child in enumerate(classes)
            for path in sorted(child.rglob("*"))
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]
        if not self.files:
            raise DataError(
                f"'{folder}' holds neither Parquet files nor one subfolder of images for each class"
            )

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(
            [[str(p.relative_to(self.folder)), sha256_file(p), n] for p, n in self.files]
        )

    def _rows(self, rows: Sequence[int]) -> Iterator[tuple[ndarray, int]]:
        for row in rows:
            path, label = self.files[row]
            try:
                data = path.read_bytes()
            except OSError as error:
                raise DataError(f"'{path}' cannot be read: {error.strerror or error}") from error
            yield decode_image(data, f"'{path}'"), label


class HubSource(ImageSource):
    """One split of a data set that the ``datasets`` library finds by name."""

    def __init__(self, name: str, image_column: str, label_column: str) -> None:
        import datasets

        identifier, _, split = name.partition(":")
        self.name, self.columns = name, (image_column, label_column)
        try:
            data = datasets.load_dataset(identifier, split=split or "train")
        except Exception as error:  # the library raises whatever its downloads raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise DataError(
                f"'{name}' is neither a file nor a folder here, and as a data set of the hub it "
                f"cannot be loaded: {reason}"
            ) from error
        assert isinstance(data, datasets.Dataset)
        for column in self.columns:
            if column not in data.column_names:
                raise DataError(
                    f"'{name}' has no column '{column}'{_near(column, data.column_names)}"
                )
        self._data = data.cast_column(image_column, datasets.Image(decode=False))
        feature = data.features[label_column]
        if isinstance(feature, datasets.ClassLabel):
            self.class_names = tuple(feature.names)
        else:
            self.class_names = tuple(str(i) for i in range(int(max(data[label_column])) + 1))

    def __len__(self) -> int:
        return len(self._data)

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.name, *self.columns, self._data._fingerprint])

    def column(self, name: str, rows: Sequence[int]) -> list[Any]:
        """See :meth:`ImageSource.column`."""
        if name not in self._data.column_names:
            names = self._data.column_names
            raise DataError(f"'{self.name}' has no column '{name}'{_near(name, names)}")
        return list(self._data.select(list(rows))[name])

    def _rows(self, rows: Sequence[int]) -> Iterator[tuple[ndarray, int]]:
        image_column, label_column = self.columns
        for row in rows:
            record = self._data[row]
            cell, where = record[image_column], f"'{self.name}', row {row}"
            data = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
            yield decode_image(data, where), int(record[label_column])


def _named_classes(metadata: dict[bytes, bytes], label_column: str) -> tuple[str, ...] | None:
    """Class names in the metadata that the ``datasets`` library writes, if they are there."""
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][label_column]
        names = feature["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def _near(column: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{hint} It has {', '.join(names)}" if hint else f"; it has {', '.join(names)}"
