"""Feature rows of a whole data set on disk: sharded, append-only, larger than memory."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.attribution.feature_encoding import storage_dtype
from diffcal.attribution.feature_shards import (
    RowId,
    Shard,
    read_shard,
    shard_column,
    shard_path,
    shard_rows,
    shard_spec,
    verify_shard,
    write_shard,
)
from diffcal.config import flatten
from diffcal.core.runs import fingerprint, read_json, write_json
from diffcal.errors import ArtifactError, ConfigError, DataError

__all__ = ["FeatureStore", "require_same_spec"]

FORMAT = "diffcal-features/1"
HEADER = "store.json"


class FeatureStore:
    """Rows of features with ids, in shards of a folder that holds one specification.

    A shard is a safetensors file with a JSON record (ids, size, SHA-256). The record is written last
    and both are renamed into place, so that a kill at any time leaves whole shards only, and a rerun
    that skips :meth:`finished` shards ends in the same bytes. Any number of processes may write
    different shards at once (:func:`shard_ranges`). Rows come in the order of shard numbers.

    The object sees the shards that were there when it was made; :meth:`refresh` looks again.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], *, reading: bool) -> None:
        self.folder = folder
        self.dim: int = header["dim"]
        self.dtype: str = header["dtype"]
        self.spec: dict[str, Any] = dict(header["spec"])
        self._reading = reading
        self._shards: list[Shard] = []
        self.refresh()

    @classmethod
    def create(
        cls, folder: Path | str, *, spec: Mapping[str, Any], dim: int, dtype: str = "float16"
    ) -> "FeatureStore":
        """A store to write to: a new one, or the unfinished one of the same specification.

        Args:
            spec: Everything that decides the features, as plain JSON values (nested tables allowed).
            dim: Entries of a row.
            dtype: ``float32``, ``float16``, ``bfloat16`` or ``int8``.

        Raises:
            ArtifactError: the folder holds another specification (the fields that differ are
                named), or a damaged shard (named).
        """
        folder = Path(folder)
        storage_dtype(dtype)
        if dim < 1:
            raise ConfigError(f"features need at least one dimension, got {dim}")
        header = {"format": FORMAT, "dim": dim, "dtype": dtype, "spec": _plain(spec)}
        path = folder / HEADER
        if not path.exists():
            _write_once(path, header)
        require_same_spec(_header(path), header, f"feature store '{folder}'")
        return cls(folder, header, reading=False)

    @classmethod
    def open(cls, folder: Path | str) -> "FeatureStore":
        """A finished store to read.

        Raises:
            ArtifactError: not a store, a shard is missing, truncated, of another specification, or
                two shards hold the same example.
        """
        folder = Path(folder)
        store = cls(folder, _header(folder / HEADER), reading=True)
        for shard in store._shards:
            require_same_spec(shard_spec(shard), store.spec, f"feature shard '{shard.path}'")
        return store

    def refresh(self) -> None:
        """Look which shards are finished now."""
        records = sorted(self.folder.glob("features-*.json"))
        if not self._reading:
            # While writing, a record whose file was deleted is a shard to build again.
            records = [path for path in records if path.with_suffix(".safetensors").exists()]
        self._shards = [read_shard(path) for path in records]
        indices = [shard.index for shard in self._shards]
        if self._reading and indices != list(range(len(indices))):
            missing = next(i for i in range(len(indices)) if i not in indices)
            raise ArtifactError(
                f"'{shard_path(self.folder, missing)}' is missing: building the store was "
                "interrupted; run the same command again to finish it"
            )
        owner: dict[RowId, Shard] = {}
        for shard in self._shards:
            for row in shard.ids:
                if row in owner:
                    raise ArtifactError(
                        f"example {row!r} is in '{owner[row].path.name}' and in "
                        f"'{shard.path.name}' of '{self.folder}'; ids must be unique"
                    )
                owner[row] = shard

    # Writing

    @property
    def finished(self) -> frozenset[int]:
        """Numbers of the shards that need not be made again."""
        return frozenset(shard.index for shard in self._shards)

    @property
    def next_index(self) -> int:
        """The first shard number for rows that are appended to a finished store."""
        return max(self.finished, default=-1) + 1

    def write(
        self,
        index: int,
        ids: Sequence[RowId],
        features: Float[Tensor, "n k"],
        columns: Mapping[str, Float[Tensor, "_ ..."]] | None = None,
    ) -> None:
        """Write shard ``index``.

        Args:
            ids: Stable, unique names of the examples, integers or strings.
            features: ``[n, dim]`` on any device.
            columns: Further float32 values of every row, such as the error table ``[n, t]``.

        Raises:
            NumericalError: NaN or infinite values, naming the example.
            DataError: wrong shapes, or ids that come twice here or in another shard.
            ArtifactError: the shard exists.
        """
        if index in self.finished:
            raise ArtifactError(
                f"'{shard_path(self.folder, index)}' exists; shards are never rewritten"
            )
        if features.shape[1] != self.dim:
            raise DataError(
                f"features have {features.shape[1]} entries, the store '{self.folder}' holds {self.dim}"
            )
        for name in columns or {}:
            if name in ("features", "scale"):
                raise DataError(f"a column of a feature store cannot be called '{name}'")
        new = set(ids)
        for shard in self._shards:
            common = new.intersection(shard.ids)
            if common:
                raise DataError(
                    f"example {next(row for row in ids if row in common)!r} is already in "
                    f"'{shard.path}'; ids must be unique"
                )
        shard = write_shard(self.folder, index, self.spec, self.dtype, ids, features, columns or {})
        self._shards = sorted([*self._shards, shard], key=lambda item: item.index)

    # Reading

    def __len__(self) -> int:
        return sum(len(shard) for shard in self._shards)

    @property
    def ids(self) -> tuple[RowId, ...]:
        """Names of all rows, in order."""
        return tuple(row for shard in self._shards for row in shard.ids)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the further columns that every shard has."""
        names = [set(shard.columns) for shard in self._shards]
        return tuple(sorted(set.intersection(*names))) if names else ()

    @property
    def fingerprint(self) -> str:
        """Hash of specification, number format and the content of every shard."""
        digests = [shard.sha256 for shard in self._shards]
        return fingerprint([FORMAT, self.dim, self.dtype, self.spec, digests])

    def blocks(self, size: int = 1024) -> Iterator[Float[Tensor, "b k"]]:
        """All rows in order as float32 blocks of at most ``size``; one block is in memory at a time.

        Blocks end at shard boundaries.
        """
        for shard in self._shards:
            for start in range(0, len(shard), size):
                yield shard_rows(shard, start, min(start + size, len(shard)))

    def rows(self, start: int = 0, stop: int | None = None) -> Float[Tensor, "n k"]:
        """Rows ``start .. stop`` as one float32 tensor."""
        stop = len(self) if stop is None else min(stop, len(self))
        parts, first = [], 0
        for shard in self._shards:
            low, high = max(start - first, 0), min(stop - first, len(shard))
            if low < high:
                parts.append(shard_rows(shard, low, high))
            first += len(shard)
        return torch.cat(parts) if parts else torch.zeros(0, self.dim)

    def column(self, name: str) -> Float[Tensor, "n ..."]:
        """A further column of all rows, float32.

        Raises:
            DataError: a shard lacks it.
        """
        for shard in self._shards:
            if name not in shard.columns:
                raise DataError(
                    f"'{shard.path}' has no column '{name}'; it has "
                    f"{', '.join(shard.columns) or 'none'}"
                )
        if not self._shards:
            raise DataError(f"feature store '{self.folder}' is empty")
        return torch.cat([shard_column(shard, name) for shard in self._shards])

    # Checking

    def verify(self) -> None:
        """Compare every shard with its checksum (reads everything once)."""
        for shard in self._shards:
            verify_shard(shard)

    def require_spec(self, spec: Mapping[str, Any]) -> None:
        """Refuse features of another model, data set or setting, naming the fields that differ."""
        require_same_spec(self.spec, _plain(spec), f"feature store '{self.folder}'")

    def require_ids(self, ids: Sequence[RowId]) -> None:
        """Refuse a data set whose examples are not those of the store, in its order."""
        here = self.ids
        for row, (old, new) in enumerate(zip(here, ids, strict=False)):
            if old != new:
                raise DataError(
                    f"the data set is not the one of '{self.folder}': row {row} is example {new!r} "
                    f"now and {old!r} in the store"
                )
        if len(here) != len(ids):
            raise DataError(
                f"the data set has {len(ids)} examples, the store '{self.folder}' {len(here)}"
            )


def require_same_spec(found: Any, wanted: Any, where: str) -> None:
    """Refuse two specifications that differ, naming up to four fields.

    Raises:
        ArtifactError: they differ.
    """
    if found == wanted:
        return
    old = flatten(found) if isinstance(found, Mapping) else {"spec": found}
    new = flatten(wanted) if isinstance(wanted, Mapping) else {"spec": wanted}
    absent = "nothing"
    keys = [key for key in {**old, **new} if old.get(key, absent) != new.get(key, absent)]
    parts = [
        f"{key}: {old.get(key, absent)!r} there, {new.get(key, absent)!r} here" for key in keys
    ]
    more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
    raise ArtifactError(f"{where} was made with other settings ({'; '.join(parts[:4])}{more})")


def _plain(spec: Mapping[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(spec, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a feature specification must be plain JSON values: {error}") from error


def _header(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ArtifactError(f"'{path.parent}' is not a feature store: it has no {path.name}")
    header = read_json(path)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ArtifactError(f"'{path}' is not the header of a feature store ({FORMAT})")
    return header


def _write_once(path: Path, header: Mapping[str, Any]) -> None:
    """Write the header unless another process does so at the same moment; the first one wins."""
    mine = path.with_name(f".{path.stem}-{os.getpid()}.json")
    write_json(mine, header)
    try:
        os.link(mine, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.replace(mine, path)
    finally:
        mine.unlink(missing_ok=True)
