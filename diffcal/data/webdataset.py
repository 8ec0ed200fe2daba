"""A published data set as tar shards in the WebDataset convention.

A sample is two files that follow one another and share their name up to the dot: ``000000042.png`` and
``000000042.json`` (label, soft label, mixing, diagnostics). Any reader of tar streams takes it.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from diffcal.core.progress import progress_bar
from diffcal.core.runs import (
    claim_folder,
    fingerprint,
    read_json,
    sha256_file,
    write_atomic,
    write_json,
)
from diffcal.data.shards import read_manifest, verified_shard
from diffcal.data.soft_labels import FORMAT, SoftLabelSet
from diffcal.errors import ConfigError, DataError

__all__ = ["export_webdataset"]

EXPORT = "export.json"
SIGNATURES = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpg"), (b"RIFF", "webp"))


def export_webdataset(dataset: Path, out: Path, shard_size: int = 1000) -> list[Path]:
    """Tar files ``out/mixed-000000.tar`` and so on, in order of rows, beside a ``manifest.json``.

    The same data set gives the same bytes: samples are named by their id, and owner, mode and time of
    every member are fixed. An interrupted export continues; a damaged finished file is written again.

    Args:
        dataset: A finished ``dataset`` folder.
        out: Folder of the export, outside ``dataset``.
        shard_size: Images per tar file; the last may hold fewer.

    Raises:
        ConfigError: ``shard_size`` below 1, or ``out`` inside ``dataset`` or around it.
        ArtifactError: no finished data set there, a damaged shard, or ``out`` holds something else.
        DataError: an image in a format other than PNG, JPEG and WebP.
    """
    if shard_size < 1:
        raise ConfigError(f"shard_size must be at least 1, got {shard_size}")
    here, there = dataset.resolve(), out.resolve()
    if there == here or here in there.parents or there in here.parents:
        raise ConfigError(f"'{out}' lies in the data set '{dataset}' or around it; choose another")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"'{out}' is a file; give a folder")
    manifest = read_manifest(dataset, FORMAT, ("class_names",))
    for entry in manifest["shards"]:
        verified_shard(dataset, entry)
    settings = {
        "format": "diffcal-webdataset/1",
        "dataset": fingerprint(manifest["shards"]),
        "shard_size": shard_size,
    }
    claim_folder(out, settings, name=EXPORT)
    source = SoftLabelSet(dataset)
    starts = range(0, len(source), shard_size)
    promised = _promised(out)
    paths, entries = [], []
    with progress_bar(len(source), "export", unit="image") as bar:
        for number, start in enumerate(starts):
            rows = range(start, min(start + shard_size, len(source)))
            path = out / f"mixed-{number:06d}.tar"
            wanted = promised.get(path.name)
            if not path.exists() or (wanted is not None and sha256_file(path) != wanted):
                # rows are bound here: write_atomic calls at once
                write_atomic(path, lambda file, rows=rows: _write_tar(file, source, rows))
            entries.append({"file": path.name, "rows": len(rows), "sha256": sha256_file(path)})
            paths.append(path)
            bar.update(len(rows))
    write_json(
        out / "manifest.json",
        {**settings, "class_names": list(manifest["class_names"]), "shards": entries},
    )
    return paths


def _promised(out: Path) -> dict[str, str]:
    path = out / "manifest.json"
    if not path.exists():
        return {}
    return {entry["file"]: entry["sha256"] for entry in read_json(path)["shards"]}


def _write_tar(file: IO[bytes], source: SoftLabelSet, rows: Sequence[int]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            record = source.record(row)
            image = record.pop("image")["bytes"]
            name = f"{record['id']:09d}"
            _add(tar, f"{name}.{_suffix(image, source, row)}", image)
            text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
            _add(tar, f"{name}.json", text.encode("utf-8"))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member: Any = tarfile.TarInfo(name)  # time, owner and group are 0, the mode 0644
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _suffix(image: bytes, source: SoftLabelSet, row: int) -> str:
    for signature, suffix in SIGNATURES:
        if image.startswith(signature):
            return suffix
    raise DataError(f"'{source.folder}', row {row}: the image is neither PNG, JPEG nor WebP")
