"""EDM-family networks from a configuration: names and values checked, then built."""

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffcal.diffusion.edm_dhariwal_unet import DhariwalUNet
from diffcal.diffusion.edm_song_unet import SongUNet
from diffcal.diffusion.preconditioning import MODEL_TYPES, PRECONDITIONERS, Preconditioner
from diffcal.errors import ConfigError

__all__ = ["DhariwalUNet", "SongUNet", "build_network", "checked_kwargs"]

_INTEGERS = {
    "img_resolution": (1, 4096),
    "img_channels": (1, 64),
    "label_dim": (0, 1_000_000),
    "augment_dim": (0, 1024),
    "model_channels": (1, 8192),
    "channel_mult_emb": (1, 64),
    "channel_mult_noise": (1, 64),
    "num_blocks": (1, 64),
    "M": (2, 100_000),
}
_LISTS = {"channel_mult": (1, 64), "attn_resolutions": (1, 4096), "resample_filter": (None, None)}
_CHOICES = {
    "model_type": tuple(MODEL_TYPES),
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}
_FRACTIONS = ("dropout", "label_dropout")
_NOT_GIVEN = {"self", "in_channels", "out_channels", "model_kwargs"}


def checked_kwargs(preconditioner: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments as plain JSON values, after checking every name, type and range.

    The bounds also keep a hostile configuration from asking for unbounded work.

    Raises:
        ConfigError: names the argument that is unknown, missing or out of range.
    """
    if preconditioner not in PRECONDITIONERS:
        raise ConfigError(
            f"unknown preconditioner '{preconditioner}': use {', '.join(PRECONDITIONERS)}"
        )
    outer = inspect.signature(PRECONDITIONERS[preconditioner].__init__).parameters
    model_type = kwargs.get("model_type", outer["model_type"].default)
    values = dict(kwargs) | {"model_type": model_type}
    _check("model_type", model_type)
    inner = inspect.signature(MODEL_TYPES[model_type].__init__).parameters
    known = (set(outer) | set(inner)) - _NOT_GIVEN
    unknown = sorted(set(map(str, values)) - known)
    if unknown:
        raise ConfigError(
            f"{preconditioner} with {model_type} has no argument '{unknown[0]}'; "
            f"it takes {', '.join(sorted(known))}"
        )
    for name in ("img_resolution", "img_channels"):
        if name not in values:
            raise ConfigError(f"{preconditioner} needs the argument '{name}'")
    checked = {name: _check(name, value) for name, value in values.items()}
    levels = len(checked.get("channel_mult", inner["channel_mult"].default))
    if checked["img_resolution"] % (1 << (levels - 1)):
        raise ConfigError(
            f"img_resolution {checked['img_resolution']} cannot be halved {levels - 1} times "
            "as channel_mult asks"
        )
    return checked


def build_network(config: Mapping[str, Any]) -> Preconditioner:
    """Fresh network of ``{"preconditioner": "EDMPrecond", "kwargs": {...}}``, in training mode.

    ``kwargs`` are the arguments of the preconditioner and of its raw network together. The checked
    configuration stays on the network as ``config``. Weights come from torch's global generator.

    Raises:
        ConfigError: unknown names or impossible values.
    """
    unknown = sorted(set(config) - {"preconditioner", "kwargs"})
    if unknown or "preconditioner" not in config:
        raise ConfigError(
            "a network configuration has the keys 'preconditioner' and 'kwargs'"
            + (f", not '{unknown[0]}'" if unknown else "")
        )
    name = config["preconditioner"]
    kwargs = checked_kwargs(name, config.get("kwargs", {}))
    arguments: dict[str, Any] = {k: math.inf if v == "inf" else v for k, v in kwargs.items()}
    network = PRECONDITIONERS[name](**arguments)
    network.config = {"preconditioner": name, "kwargs": kwargs}
    return network


def _check(name: str, value: Any) -> Any:
    if name in _INTEGERS:
        return _integer(name, value, *_INTEGERS[name])
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise ConfigError(f"{name} must be one of {', '.join(_CHOICES[name])}, got {value!r}")
        return value
    if name in _LISTS:
        if isinstance(value, str) or not isinstance(value, Sequence) or len(value) > 16:
            raise ConfigError(f"{name} must be a list of at most 16 numbers, got {value!r}")
        if name == "resample_filter":
            taps = [_number(name, item) for item in value]
            if len(taps) % 2 or not taps or sum(taps) <= 0:
                raise ConfigError(f"{name} needs an even number of taps, got {value!r}")
            return taps
        if name == "channel_mult" and not value:
            raise ConfigError("channel_mult must have at least one entry")
        return [_integer(name, item, *_LISTS[name]) for item in value]
    if name == "use_fp16":
        if not isinstance(value, bool):
            raise ConfigError(f"use_fp16 must be true or false, got {value!r}")
        return value
    # JSON has no infinity, so it is spelled out.
    if name == "sigma_max" and value in ("inf", math.inf):
        return "inf"
    number = _number(name, value)
    if number < 0 or (name in _FRACTIONS and number >= 1):
        raise ConfigError(f"{name} is out of range: {value!r}")
    return number


def _integer(name: str, value: Any, low: int | None, high: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a whole number, got {value!r}")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ConfigError(f"{name} must lie in [{low}, {high}], got {value}")
    return value


def _number(name: str, value: Any) -> int | float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}")
    return value
