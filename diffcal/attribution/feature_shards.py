"""One shard of a feature store: a safetensors file and the record that vouches for it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.attribution.feature_encoding import decode_rows, encode_rows
from diffcal.core.runs import read_json, sha256_bytes, sha256_file, write_atomic, write_json
from diffcal.errors import ArtifactError, DataError, NumericalError

__all__ = [
    "RowId",
    "Shard",
    "ShardRange",
    "read_shard",
    "require_distinct",
    "shard_ranges",
    "write_shard",
]

RowId = int | str

_FEATURES, _SCALE = "features", "scale"


@dataclass(frozen=True)
class ShardRange:
    """Rows ``start .. stop`` of the data make shard ``index``."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """A finished shard: where it lies and what its record says."""

    path: Path
    index: int
    ids: tuple[RowId, ...]
    columns: tuple[str, ...]
    size: int
    sha256: str

    def __len__(self) -> int:
        return len(self.ids)


def shard_ranges(
    rows: int, shard_rows: int, *, process: int = 0, processes: int = 1, first: int = 0
) -> list[ShardRange]:
    """The shards that ``process`` of ``processes`` owns: every ``processes``-th one.

    ``rows`` new rows go to shards ``first, first + 1, ...`` of ``shard_rows`` rows each (the last may
    be shorter). Which process makes a shard does not change its bytes.

    Raises:
        DataError: sizes or process numbers out of range.
    """
    if shard_rows < 1 or rows < 0 or not 0 <= process < processes:
        raise DataError(
            f"cannot share {rows} rows in shards of {shard_rows} for process {process} of {processes}"
        )
    count = -(-rows // shard_rows)
    return [
        ShardRange(first + i, i * shard_rows, min((i + 1) * shard_rows, rows))
        for i in range(process, count, processes)
    ]


def shard_path(folder: Path, index: int) -> Path:
    """``features-00012.safetensors``; the record beside it ends in ``.json``."""
    return folder / f"features-{index:05d}.safetensors"


def write_shard(
    folder: Path,
    index: int,
    spec: Mapping[str, Any],
    dtype: str,
    ids: Sequence[RowId],
    features: Float[Tensor, "n k"],
    columns: Mapping[str, Float[Tensor, "_ ..."]],
) -> Shard:
    """Write the tensors, then the record; a shard without a record does not exist yet.

    Raises:
        NumericalError: NaN or infinity, naming the first row.
        DataError: counts differ, or an id comes twice.
    """
    from safetensors.torch import save

    path = shard_path(folder, index)
    if len(ids) != len(features):
        raise DataError(f"'{path.name}': {len(ids)} ids for {len(features)} feature rows")
    require_distinct(ids, f"'{path.name}'")
    tensors: dict[str, Tensor] = {}
    for name, column in {_FEATURES: features, **columns}.items():
        if len(column) != len(ids):
            raise DataError(f"'{path.name}': {len(column)} rows of '{name}' for {len(ids)} ids")
        bad = (~column.isfinite()).flatten(1).any(dim=1) if column.numel() else torch.tensor([])
        if bool(bad.any()):
            first = int(bad.nonzero()[0, 0])
            raise NumericalError(
                f"'{path.name}': '{name}' of {int(bad.sum())} rows is NaN or infinite, first of "
                f"example {ids[first]!r}; earlier shards are intact"
            )
        if name != _FEATURES:
            tensors[name] = column.detach().to("cpu", torch.float32).contiguous()
    tensors[_FEATURES], scale = encode_rows(features, dtype)
    if scale is not None:
        tensors[_SCALE] = scale
    # The specification travels in the file, so that a shard copied from elsewhere is recognised.
    data = save(tensors, metadata={"spec": json.dumps(spec, sort_keys=True)})
    write_atomic(path, lambda file: file.write(data))
    shard = Shard(path, index, tuple(ids), tuple(sorted(columns)), len(data), sha256_bytes(data))
    record = {
        "rows": len(shard),
        "bytes": shard.size,
        "sha256": shard.sha256,
        "columns": list(shard.columns),
        "ids": list(ids),
    }
    write_json(path.with_suffix(".json"), record)
    return shard


def read_shard(record_path: Path) -> Shard:
    """The shard of a record, its file size checked.

    Raises:
        ArtifactError: the record is damaged, the file missing or truncated.
    """
    record = read_json(record_path)
    path = record_path.with_suffix(".safetensors")
    try:
        index = int(path.stem.rpartition("-")[2])
        ids, columns = tuple(record["ids"]), tuple(record["columns"])
        size, digest = record["bytes"], record["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"'{record_path}' is not the record of a feature shard") from error
    if record.get("rows") != len(ids):
        raise ArtifactError(f"'{record_path}' promises {record.get('rows')} rows, lists {len(ids)}")
    if not path.is_file():
        raise ArtifactError(
            f"feature shard '{path}' is missing though its record exists; "
            "run the same command again to rebuild it"
        )
    found = path.stat().st_size
    if found != size:
        raise ArtifactError(
            f"feature shard '{path}' is damaged: {found} bytes instead of {size}; delete it and run "
            "the same command again to rebuild it, other shards are kept"
        )
    return Shard(path, index, ids, columns, size, digest)


def verify_shard(shard: Shard) -> None:
    """Compare the file with its checksum.

    Raises:
        ArtifactError: the content changed.
    """
    if sha256_file(shard.path) != shard.sha256:
        raise ArtifactError(
            f"feature shard '{shard.path}' does not match its checksum; delete it and run the same "
            "command again to rebuild it, other shards are kept"
        )


def shard_spec(shard: Shard) -> Any:
    """The specification that was written into the shard's file."""
    with _opened(shard) as file:
        return json.loads((file.metadata() or {}).get("spec", "null"))


def shard_rows(shard: Shard, start: int, stop: int) -> Float[Tensor, "n k"]:
    """Feature rows ``start .. stop`` as float32, read through a memory map."""
    with _opened(shard) as file:
        stored = file.get_slice(_FEATURES)[start:stop]
        scale = file.get_slice(_SCALE)[start:stop] if _SCALE in file.keys() else None  # noqa: SIM118
    return decode_rows(stored, scale)


def shard_column(shard: Shard, name: str) -> Float[Tensor, "n ..."]:
    """A further column of the shard, float32."""
    with _opened(shard) as file:
        return file.get_tensor(name)


def require_distinct(ids: Sequence[RowId], where: str) -> None:
    """Refuse an id that comes twice, naming it."""
    seen: set[RowId] = set()
    for row in ids:
        if row in seen:
            raise DataError(f"{where}: example {row!r} comes twice; ids must be unique")
        seen.add(row)


def _opened(shard: Shard) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(shard.path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"feature shard '{shard.path}' cannot be read: {error}") from error
