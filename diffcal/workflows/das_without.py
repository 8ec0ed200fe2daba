"""Training images that scores leave out, as if the index did not hold them."""

from collections.abc import Sequence
from pathlib import Path

from diffcal.attribution.feature_shards import RowId, require_distinct
from diffcal.core.runs import fingerprint
from diffcal.errors import ConfigError, DataError

__all__ = ["describe_ids", "kept_positions", "read_ids"]

SHOWN = 5
"""Ids that a message lists."""


def read_ids(values: Sequence[str]) -> list[int]:
    """Training ids as written in a command: numbers, or text files with one id on each line.

    Raises:
        ConfigError: neither a number nor a readable file, or a line that holds anything else.
    """
    found: list[int] = []
    for value in values:
        found += [int(value)] if value.isdecimal() else _ids_of_file(Path(value))
    return found


def _ids_of_file(path: Path) -> list[int]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError as error:
        raise ConfigError(f"'{path}' is neither a training id nor a file of ids") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"training ids cannot be read from '{path}': {error}") from error
    ids = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if text and not text.isdecimal():
            raise ConfigError(f"'{path}', line {number}: '{text[:40]}' is not a training id")
        ids += [int(text)] if text else []
    if not ids:
        raise ConfigError(f"'{path}' holds no training ids")
    return ids


def kept_positions(ids: Sequence[RowId], without: Sequence[int]) -> Sequence[int]:
    """Positions of the training images that are left.

    Args:
        ids: Of all training images of the index.
        without: Ids of those to leave out.

    Raises:
        ConfigError: an id that the index does not hold or that comes twice, or nothing is left.
    """
    try:
        require_distinct(without, "without")
    except DataError as error:
        raise ConfigError(str(error)) from error
    gone = set(without)
    unknown = sorted(gone.difference(ids))
    if unknown:
        raise ConfigError(
            f"without: the index holds no training image {_listed(unknown)}; its ids are "
            f"{_listed(ids)}"
        )
    kept = [position for position, row in enumerate(ids) if row not in gone]
    if not kept:
        raise ConfigError(
            f"without: all {len(ids)} training images are left out, so none is scored"
        )
    return kept


def describe_ids(ids: Sequence[int]) -> str:
    """Any number of ids in a few words, different for different ids."""
    whole = "" if len(ids) <= SHOWN else f", {fingerprint(sorted(ids))[:16]}"
    return f"{len(ids)} images ({_listed(sorted(ids))}{whole})"


def _listed(ids: Sequence[RowId]) -> str:
    return ", ".join(map(str, ids[:SHOWN])) + (" ..." if len(ids) > SHOWN else "")
