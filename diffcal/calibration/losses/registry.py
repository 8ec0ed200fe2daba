"""Losses by name: one line here makes a loss available to every trainer and command."""

import difflib
import inspect
from typing import Any

from torch import nn

from diffcal.calibration.losses.adafocal import AdaFocal
from diffcal.calibration.losses.adaptive_dual_focal import AdaDualFocal, DualFlsd
from diffcal.calibration.losses.bsce import Bsce, BsceGra
from diffcal.calibration.losses.confidence_frequency import Dca, Mdca
from diffcal.calibration.losses.contract import Contract
from diffcal.calibration.losses.dual_focal import DualFocal, DualFocalGra
from diffcal.calibration.losses.entropy_penalty import EntropyPenalty
from diffcal.calibration.losses.focal import Flsd, Focal, InverseFocal
from diffcal.calibration.losses.gradient_weighted import FocalGra, TlbsGra, UncertaintyWeighted
from diffcal.calibration.losses.margin import Acls, Mbls
from diffcal.calibration.losses.mmce import Mmce, WeightedMmce
from diffcal.calibration.losses.pairwise import Cpc
from diffcal.calibration.losses.rank_mixup import RankMixupMndcg, RankMixupMrl
from diffcal.calibration.losses.ranking import Crl
from diffcal.calibration.losses.scheduled_focal import ScheduledFocal
from diffcal.calibration.losses.soft_target import CrossEntropy, KlDivergence, SquaredError
from diffcal.errors import ConfigError

__all__ = ["LOSSES", "build_loss", "loss_parameters"]

LOSSES: dict[str, type[nn.Module]] = {
    # proper losses, hard and soft targets
    "cross_entropy": CrossEntropy,
    "kl_divergence": KlDivergence,
    "squared_error": SquaredError,
    # weights by the true class's probability
    "focal": Focal,
    "flsd": Flsd,
    "scheduled_focal": ScheduledFocal,  # state across epochs
    "adafocal": AdaFocal,  # state across epochs, reads validation examples
    "inverse_focal": InverseFocal,
    "dual_focal": DualFocal,
    "dual_flsd": DualFlsd,
    "ada_dual_focal": AdaDualFocal,  # state across epochs, reads validation examples
    # weights by the Brier score, and weights held constant
    "bsce": Bsce,
    "bsce_gra": BsceGra,
    "focal_gra": FocalGra,
    "dual_focal_gra": DualFocalGra,
    "tlbs_gra": TlbsGra,
    "uncertainty_weighted": UncertaintyWeighted,  # a weight function of one's own
    # cross-entropy plus a term for each example
    "entropy_penalty": EntropyPenalty,
    "mbls": Mbls,
    "acls": Acls,
    "cpc": Cpc,
    # cross-entropy plus a term of the batch
    "mmce": Mmce,
    "weighted_mmce": WeightedMmce,
    "mdca": Mdca,
    "dca": Dca,
    "crl": Crl,  # state across epochs, reads the examples' indices
    # raw batch and its mixed copies: loss(logits, targets, mixed_logits, mixed_targets)
    "rank_mixup_mndcg": RankMixupMndcg,
    "rank_mixup_mrl": RankMixupMrl,
}

_OTHER_NAMES = {
    "ce": "cross_entropy",
    "soft_ce": "cross_entropy",
    "label_smoothing": "cross_entropy",
    "ls": "cross_entropy",
    "nll": "cross_entropy",
    "kl": "kl_divergence",
    "l2": "squared_error",
    "mse": "squared_error",
    "brier": "squared_error",
    "fl": "focal",
    "focal_loss": "focal",
    "flsd53": "flsd",
    "focal_loss_adaptive": "flsd",
    "dfl": "dual_focal",
    "dual_focal_loss": "dual_focal",
    "dual_focal_loss_gra": "dual_focal_gra",
    "focal_loss_gra": "focal_gra",
    "ada_focal": "adafocal",
    "adadualfocal": "ada_dual_focal",
    "dual_focal_loss_sd": "dual_flsd",
    "tlbs": "tlbs_gra",
    "mmce_w": "weighted_mmce",
    "mmce_weighted": "weighted_mmce",
    "penalty_entropy": "entropy_penalty",
    "logit_margin": "mbls",
}
"""What people call them elsewhere; only for the error message, a loss has one name here."""


def loss_parameters(name: str) -> list[str]:
    """Names of the parameters that the loss ``name`` of :data:`LOSSES` takes."""
    parameters = inspect.signature(LOSSES[name].__init__).parameters.values()
    own = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD][1:]
    return [*own, *Contract.__annotations__]


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
    known = loss_parameters(name)
    for key in params:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else f"; it takes: {', '.join(known)}"
            raise ConfigError(f"loss '{name}' has no parameter '{key}'{hint}")
    try:
        return LOSSES[name](**params)
    except TypeError as error:
        raise ConfigError(f"loss '{name}': {error}") from error
