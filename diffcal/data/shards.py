"""Shards of an artefact against the hashes in its manifest."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from diffcal.core.runs import read_json, sha256_file
from diffcal.errors import ArtifactError

__all__ = ["read_manifest", "verified_shard"]


def read_manifest(folder: Path, format: str, needs: Sequence[str] = ()) -> dict[str, Any]:
    """``folder/manifest.json``, which must be of ``format`` and list its shards.

    Args:
        folder: Folder of the artefact.
        format: Value of the manifest's ``format``, as ``diffcal-generated/1``.
        needs: Further keys that must be there.

    Raises:
        ArtifactError: no manifest, another format, no shards, a key is missing, or a shard's file is
            not one within the folder (stages write files of the same names elsewhere).
    """
    path = folder / "manifest.json"
    manifest = read_json(path)
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != format:
        raise ArtifactError(f"'{path}' is of format {found!r}, expected {format!r}")
    for key in ("shards", *needs):
        if key not in manifest:
            raise ArtifactError(f"'{path}' lacks '{key}'")
    if not manifest["shards"]:
        raise ArtifactError(f"'{path}' lists no shards")
    for entry in manifest["shards"]:
        named = entry if isinstance(entry, dict) else {}
        if not all(isinstance(named.get(key), str) for key in ("file", "sha256")):
            raise ArtifactError(f"'{path}': a shard has no file and sha256")
        if not _stays_within(named["file"]):
            raise ArtifactError(f"'{path}': shard '{named['file']}' is no file of this folder")
    return manifest


def _stays_within(name: str) -> bool:
    # both kinds of paths, as a manifest may come from another system
    return all(
        not path.is_absolute() and not path.drive and ".." not in path.parts
        for path in (PurePosixPath(name), PureWindowsPath(name))
    )


def verified_shard(folder: Path, entry: Mapping[str, Any]) -> Path:
    """Path of a shard whose bytes are those that the manifest's ``entry`` (file, sha256) promises.

    Raises:
        ArtifactError: the file is missing, or its SHA-256 differs.
    """
    path = folder / entry["file"]
    if not path.is_file():
        raise ArtifactError(f"shard '{path}' is missing; run the stage that writes it again")
    found = sha256_file(path)
    if found != entry["sha256"]:
        raise ArtifactError(
            f"shard '{path}' is damaged: its SHA-256 is {found[:12]}..., the manifest says "
            f"{str(entry['sha256'])[:12]}...; delete it and run the stage that writes it again"
        )
    return path
