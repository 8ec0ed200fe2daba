"""Run folders: atomic files, hashes, and the rule that one folder holds one configuration."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from diffcal.config import flatten
from diffcal.errors import ArtifactError

__all__ = [
    "claim_folder",
    "fingerprint",
    "read_json",
    "sha256_bytes",
    "sha256_file",
    "write_atomic",
    "write_json",
    "write_text",
]


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a partial file beside ``path``, flush it to disk, then rename it.

    A reader never sees half a file, and a killed run leaves at most one ``.NAME.partial``, which
    the next run overwrites.

    Raises:
        ArtifactError: the disk is full or the folder is not writable; earlier files stay as they are.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # where the folder itself is the trouble
            partial.unlink()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ArtifactError(
                f"no space left while writing '{path}'; what was written before is intact: "
                "free some space and run the same command again"
            ) from error
        raise ArtifactError(f"'{path}' cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomic(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Parsed JSON of ``path``, or :class:`ArtifactError` that names the file."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"'{path}' does not exist") from error
    except OSError as error:
        raise ArtifactError(f"'{path}' cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ArtifactError(f"'{path}' is not valid JSON: {error}") from error


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """SHA-256 of the canonical JSON of ``value`` (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256_bytes(text.encode("utf-8"))


def claim_folder(
    folder: Path, config: Mapping[str, Any], *, name: str = "config.json", overwrite: bool = False
) -> bool:
    """Make ``folder`` this configuration's own; True if it was begun earlier (resume).

    The first claim writes ``config`` to ``folder/name``. A later claim with the same config is a
    resume; with another one it is refused, naming the fields that differ. ``overwrite`` removes
    the folder's content first, and only if it carries a ``name`` file of this kind, so that a folder
    which is not ours is never emptied: many a model's folder has a ``config.json`` too.

    Raises:
        ArtifactError: other configuration, a non-empty folder without a ``name`` file, or with one of
            another command or program.
    """
    path = folder / name
    wanted = json.loads(json.dumps(config, allow_nan=False))
    if path.exists():
        found = read_json(path)
        if found == wanted:
            return True
        if not _same_kind(found, wanted):
            raise ArtifactError(
                f"'{path}' was not written by this command, so that '{folder}' is left as it is; "
                "choose another output folder"
            )
        if not overwrite:
            raise ArtifactError(_difference(folder, found, wanted))
        for child in folder.iterdir():
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    elif folder.is_dir() and any(not p.name.endswith(".partial") for p in folder.iterdir()):
        raise ArtifactError(
            f"'{folder}' is not empty and was not made by this command (it has no {name}); "
            "choose another output folder"
        )
    write_json(path, wanted)
    return False


def _same_kind(found: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether two configurations are of one command: they share half of their settings' names."""
    if not isinstance(found, dict):
        return False
    # versions add and drop settings, so that not all names can be asked for
    return 2 * len(found.keys() & wanted.keys()) >= min(len(found), len(wanted)) > 0


def _difference(folder: Path, found: Any, wanted: Any) -> str:
    old, new = flatten(found), flatten(wanted)
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    parts = [f"{key}: {old.get(key)!r} there, {new.get(key)!r} now" for key in keys[:4]]
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return (
        f"'{folder}' holds a run with other settings ({'; '.join(parts)}{more}); "
        "use another --out, the same settings, or --overwrite to start again"
    )
