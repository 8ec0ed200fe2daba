from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from diffcal.config import build_config, config_from_dict, config_to_dict, flatten
from diffcal.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    dim: int = 4
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ConfigError(f"inner.dim must be at least 1, got {self.dim}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] | None = None
    where: Path = Path("x")
    flag: bool = False
    inner: Inner = field(default_factory=Inner)


def test_round_trip():
    config = Outer(rate=0.5, sizes=(3,), pair=(0.0, 1.0), inner=Inner(dim=7, kind="b"))
    assert config_from_dict(Outer, config_to_dict(config)) == config


def test_preset_then_overrides(tmp_path):
    preset = tmp_path / "p.toml"
    preset.write_text('rate = 1e-4\n[inner]\ndim = 9\nkind = "b"\n')
    config = build_config(Outer, preset, ["inner.dim=11", "sizes=[5, 6]", "where=some/folder"])
    assert config == Outer(
        rate=1e-4, sizes=(5, 6), where=Path("some/folder"), inner=Inner(dim=11, kind="b")
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("iner.dim=1", "unknown setting 'iner'; did you mean 'inner'"),
        ("inner.dmi=1", "unknown setting 'inner.dmi'; did you mean 'dim'"),
        ("inner.dim=1.5", "'inner.dim' must be int"),
        ("inner.dim=true", "'inner.dim' must be int"),
        ("inner.dim=0", "at least 1"),
        ("inner.kind=c", "must be one of 'a', 'b'"),
        ("pair=[1.0]", "must have 2 entries"),
        ("sizes=3", "must be a list"),
        ("flag=1", "must be bool"),
        ("rate", "must look like"),
    ],
)
def test_bad_settings_are_named(override, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        build_config(Outer, None, [override])


def test_flatten_names_nested_fields():
    assert flatten({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
