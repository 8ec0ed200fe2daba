"""Settings that start from a preset that comes with diffcal (``presets/KIND-NAME.toml``)."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from diffcal.config import build_config
from diffcal.errors import ConfigError

__all__ = ["preset_config"]

T = TypeVar("T")

FOLDER = Path(__file__).parent / "presets"


def preset_config(
    cls: type[T],
    kind: str,
    preset: str | None = None,
    overrides: Sequence[str] = (),
    *,
    file: Path | None = None,
) -> T:
    """``cls`` from its defaults, then a preset, then a TOML file, then ``key.sub=value`` overrides.

    Args:
        cls: Class of the settings.
        kind: First part of the preset's file name.
        preset: Second part; no preset if None.

    Raises:
        ConfigError: no such preset (the known ones are listed), or settings that do not fit.
    """
    base = None
    if preset is not None:
        path = FOLDER / f"{kind}-{preset}.toml"
        if not path.exists():
            known = sorted(p.stem.removeprefix(f"{kind}-") for p in FOLDER.glob(f"{kind}-*.toml"))
            raise ConfigError(f"unknown preset '{preset}'; known: {', '.join(known)}")
        base = tomllib.loads(path.read_text("utf-8"))
    return build_config(cls, file, overrides, base)
