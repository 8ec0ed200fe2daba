"""Losses by name: one line here makes a loss available to every trainer and command."""

import difflib
import inspect
from typing import Any

from torch import nn

from diffcal.calibration.losses.soft_target import CrossEntropy, KlDivergence, SquaredError
from diffcal.errors import ConfigError

__all__ = ["LOSSES", "build_loss"]

LOSSES: dict[str, type[nn.Module]] = {
    # proper losses, hard and soft targets
    "cross_entropy": CrossEntropy,
    "kl_divergence": KlDivergence,
    "squared_error": SquaredError,
}

_OTHER_NAMES = {
    "ce": "cross_entropy",
    "soft_ce": "cross_entropy",
    "label_smoothing": "cross_entropy",
    "nll": "cross_entropy",
    "kl": "kl_divergence",
    "l2": "squared_error",
    "mse": "squared_error",
    "brier": "squared_error",
}
"""What people call them elsewhere; only for the error message, a loss has one name here."""


def build_loss(name: str, **params: Any) -> nn.Module:
    """The loss module called ``name``, called as ``loss(logits, targets)``.

    Args:
        name: A key of :data:`LOSSES`.
        params: Constructor arguments of that class.

    Raises:
        ConfigError: unknown name (near matches are listed), unknown or unfit parameters.
    """
    if name not in LOSSES:
        close = [_OTHER_NAMES[name.lower()]] if name.lower() in _OTHER_NAMES else []
        close += difflib.get_close_matches(name.lower(), list(LOSSES), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, dict.fromkeys(close)))}?" if close else ""
        raise ConfigError(
            f"unknown loss '{name}'; {hint or 'known losses: ' + ', '.join(sorted(LOSSES))}"
        )
    known = list(inspect.signature(LOSSES[name].__init__).parameters)[1:]
    for key in params:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else f"; it takes: {', '.join(known)}"
            raise ConfigError(f"loss '{name}' has no parameter '{key}'{hint}")
    try:
        return LOSSES[name](**params)
    except TypeError as error:
        raise ConfigError(f"loss '{name}': {error}") from error
