"""The golden cases of calibration losses and what calls them by."""

import json
from pathlib import Path

import torch

from diffcal.calibration.losses import (
    adafocal,
    bsce,
    confidence_frequency,
    dual_focal,
    entropy_penalty,
    focal,
    gradient_weighted,
    margin,
    mmce,
    ranking,
    soft_target,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/losses.json").read_text())

POINTWISE = {
    "cross_entropy": soft_target.cross_entropy,
    "kl_divergence": soft_target.kl_divergence,
    "squared_error": soft_target.squared_error,
    "focal": focal.focal,
    "flsd": focal.flsd,
    "inverse_focal": focal.inverse_focal,
    "dual_focal": dual_focal.dual_focal,
    "dual_focal_gra": dual_focal.dual_focal_gra,
    "bsce": bsce.bsce,
    "bsce_gra": bsce.bsce_gra,
    "focal_gra": gradient_weighted.focal_gra,
    "tlbs_gra": gradient_weighted.tlbs_gra,
    "entropy_penalty": entropy_penalty.entropy_penalty,
}
TERMS = {
    "mdca_term": confidence_frequency.mdca_term,
    "dca_term": confidence_frequency.dca_term,
    "mmce_term": mmce.mmce_term,
    "mmce_weighted_term": mmce.weighted_mmce_term,
    "mbls_term": margin.mbls_term,
    "acls_term": margin.acls_term,
}
SOFT = {"native": "distance", "expectation": "expectation", "distance": "distance"}


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def fixture(name, dtype=torch.float64):
    """Logits and targets of a fixture; soft targets in ``dtype``."""
    data = GOLDEN["fixtures"][name]
    logits, raw = f64(data["logits"]).to(dtype), f64(data["targets"])
    return logits, raw.to(dtype) if raw.shape == logits.shape else raw.long()


def call(case, logits, targets, **kwargs):
    """Our loss for a golden case."""
    name, params = case["loss"].removeprefix("informative:").split(" ")[0], dict(case["params"])
    if name == "label_smoothing":
        kwargs |= {"smoothing": params["alpha"], "spread": params["spread"]}
        return soft_target.cross_entropy(logits, targets, **kwargs)
    if name == "brier":
        return soft_target.squared_error(logits, targets, **kwargs)
    if name == "adafocal":
        own = {key: f64(params[key]) for key in ("gammas", "edges")}
        return adafocal.adafocal(logits, targets, **own, **kwargs)
    if name == "crl_term":
        history, target = f64(params["history"]), params["rank_target"]
        return ranking.crl_term(logits, targets, history, rank_target=target)
    if name == "flsd":
        table = [*params["table"], [float("inf"), params["last"]]]
        return focal.flsd(logits, targets, table=table, **kwargs)
    if name.startswith("bsce"):
        params["soft"] = SOFT[params["soft"]]
        params["norm"] = float(params["norm"])
    elif name != "focal":
        params.pop("soft", None)
    if name in TERMS:
        return TERMS[name](logits, targets, **params)
    if name == "weighted":
        return mmce.weighted_mmce_term(logits, targets, **params, **kwargs)
    return POINTWISE[name](logits, targets, **params, **kwargs)


def value_and_gradient(function, logits, *args, **kwargs):
    """Detached value and the gradient of its sum."""
    logits = logits.clone().requires_grad_()
    value = function(logits, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]
