"""Frozen dataclasses from presets (TOML) and ``--set`` overrides, checked strictly."""

import dataclasses
import difflib
import functools
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from diffcal.errors import ConfigError

__all__ = ["build_config", "check_choices", "config_from_dict", "config_to_dict", "flatten"]

T = TypeVar("T")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a config dataclass, ready for JSON (tuples become lists)."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def config_from_dict(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """``cls`` built from a nested mapping; unknown keys and wrong types raise :class:`ConfigError`."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    kwargs = {}
    for key, value in values.items():
        path = f"{where}.{key}" if where else key
        if key not in names:
            raise ConfigError(f"unknown setting '{path}'{_near(key, names, cls, where)}")
        kwargs[key] = _convert(hints[key], value, path)
    try:
        return cls(**kwargs)
    except TypeError as error:
        raise ConfigError(f"{where or cls.__name__}: {error}") from error


def check_choices(config: Any) -> None:
    """Raise :class:`ConfigError` where a ``Literal`` field of a dataclass holds something else.

    Presets and overrides are checked as they are read; this is for objects made in Python, which
    would otherwise take the branch of another choice.
    """
    for name, choices in _choices(type(config)).items():
        value = getattr(config, name)
        if value not in choices:
            raise ConfigError(
                f"{name} of {type(config).__name__} must be one of "
                f"{', '.join(map(repr, choices))}; got {value!r}"
            )


@functools.cache
def _choices(cls: type) -> dict[str, tuple[Any, ...]]:
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        hint = hints[field.name]
        if typing.get_origin(hint) is typing.Literal:
            found[field.name] = typing.get_args(hint)
    return found


def build_config(
    cls: type[T],
    preset: Path | None = None,
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
) -> T:
    """``cls`` from its defaults, then ``base``, then a TOML preset, then ``key.sub=value`` overrides.

    Raises:
        ConfigError: unreadable preset, unknown key (near matches are named), wrong type or range.
    """
    values: dict[str, Any] = {}
    if base is not None:
        _merge(values, base)
    if preset is not None:
        try:
            _merge(values, tomllib.loads(preset.read_text("utf-8")))
        except OSError as error:
            raise ConfigError(f"preset '{preset}' cannot be read: {error.strerror}") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"preset '{preset}' is not valid TOML: {error}") from error
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override '{override}' must look like section.key=value")
        parts = key.strip().split(".")
        nested: dict[str, Any] = {parts[-1]: _parse_value(text)}
        for part in reversed(parts[:-1]):
            nested = {part: nested}
        _merge(values, nested)
    return config_from_dict(cls, values)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping as ``{"a.b": value}``, for naming the field in which two configs differ."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        return text.strip()  # a bare word is a string


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return config_to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity; reading takes the word back
    return str(value) if isinstance(value, Path) else value


def _near(key: str, names: Sequence[str], cls: type, where: str) -> str:
    """What ``key`` may have meant: a setting of a section below, or one that is written alike."""
    below = _paths(cls, f"{where}." if where else "")
    meant = [path for path in below if path.endswith(f".{key}")][:3]
    meant = meant or difflib.get_close_matches(key, names, n=3, cutoff=0.6)
    if not meant:
        leaves = {path.rsplit(".", 1)[-1]: path for path in reversed(below)}
        close = difflib.get_close_matches(key, leaves, n=3, cutoff=0.75)
        meant = [leaves[leaf] for leaf in close]
    if meant:
        return f"; did you mean {' or '.join(repr(name) for name in meant)}?"
    return f"; known settings: {', '.join(names)}"


def _paths(cls: type, prefix: str) -> list[str]:
    """Dotted names of the settings of ``cls`` and its sections, shallow ones first."""
    hints = typing.get_type_hints(cls)
    own, deeper = [], []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if not field.init:
            continue
        own.append(prefix + field.name)
        for hint in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(hint) and isinstance(hint, type):
                deeper += _paths(hint, f"{prefix}{field.name}.")
    return sorted(own + deeper, key=lambda path: path.count("."))


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(typing.get_args(hint), value, path)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(
                f"'{path}' must be one of {', '.join(map(repr, choices))}; got {value!r}"
            )
        return value
    if origin is tuple:
        return _convert_tuple(typing.get_args(hint), value, path)
    if origin in (dict, Mapping) or hint is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"'{path}' must be a table, got {value!r}")
        return dict(value)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"'{path}' must be a table, got {value!r}")
        return config_from_dict(hint, value, path)  # type: ignore[arg-type]
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is float and value in ("inf", "-inf"):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"'{path}' must be {hint.__name__}, got {value!r}")
    return value


def _convert_union(args: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None or (value == "none" and type(None) in args):
        if type(None) in args:
            return None
        raise ConfigError(f"'{path}' must not be empty")
    errors = []
    for arg in args:
        if arg is type(None):
            continue
        try:
            return _convert(arg, value, path)
        except ConfigError as error:
            errors.append(str(error))
    raise ConfigError(" or ".join(errors))


def _convert_tuple(args: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"'{path}' must be a list, got {value!r}")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if len(args) != len(value):
        raise ConfigError(f"'{path}' must have {len(args)} entries, got {len(value)}")
    pairs = zip(args, value, strict=True)
    return tuple(_convert(arg, item, f"{path}[{i}]") for i, (arg, item) in enumerate(pairs))
