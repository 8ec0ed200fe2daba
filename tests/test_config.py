import dataclasses
import importlib
import inspect
import pkgutil
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

import diffcal
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


def literal_fields():
    """(class, field) of every dataclass of diffcal whose field has fixed choices."""
    for found in pkgutil.walk_packages(diffcal.__path__, "diffcal."):
        if found.name in ("diffcal.__main__", "diffcal.calibration.metrics.torchmetrics_wrappers"):
            continue
        module = importlib.import_module(found.name)
        for cls in list(vars(module).values()):
            if not isinstance(cls, type) or cls.__module__ != found.name:
                continue
            if dataclasses.is_dataclass(cls) and not inspect.isabstract(cls):
                hints = typing.get_type_hints(cls)
                for field in dataclasses.fields(cls):
                    if field.init and typing.get_origin(hints[field.name]) is typing.Literal:
                        yield cls, field.name


def made_with(cls, **changes):
    """``cls(**changes)`` past the annotations of ``__init__``, which only tests check."""
    made = object.__new__(cls)
    for each in dataclasses.fields(cls):
        given = each.default
        if each.default_factory is not dataclasses.MISSING:
            given = each.default_factory()
        object.__setattr__(made, each.name, changes.get(each.name, given))
    made.__post_init__()
    return made


def test_no_object_takes_a_choice_that_there_is_not():
    checked = set()
    for cls, name in literal_fields():
        missing = {each.name for each in dataclasses.fields(cls) if each.init}
        missing -= {
            each.name
            for each in dataclasses.fields(cls)
            if each.default is not dataclasses.MISSING
            or each.default_factory is not dataclasses.MISSING
        }
        if missing:
            continue  # a result, or a description that is read from a checked file
        checked.add(cls.__name__)
        made_with(cls)
        with pytest.raises(ConfigError, match=r"no such choice"):
            made_with(cls, **{name: "no such choice"})
    assert {"TemperatureScaling", "ProjectionConfig", "ScoreConfig", "SamplerConfig"} <= checked
