"""Nothing of the path from samples to features stays behind on the CPU.

The ``meta`` device stands for an accelerator: it has shapes and no numbers. Torch lets some of its
operations mix with CPU tensors, so that :class:`OneDevice` looks at all of them, as CUDA would. What an
accelerator computes is in ``test_cuda.py``.
"""

from contextlib import nullcontext

import pytest
import torch
from gradient_models import dit, edm, mean_features, unet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffcal.attribution import featurise, gradients
from diffcal.attribution.featurise import Featuriser
from diffcal.attribution.projection import ProjectionConfig
from diffcal.attribution.projection_dense import RademacherProjection

SIZES = {"dim": 64, "factor_dim": 4, "mask_dim": 512}
NAMES = [
    "sjlt",
    "factorised_sjlt",
    "mask_sjlt",
    "factorised",
    "gaussian",
    "rademacher",
    "mask",
    "identity",
]


MAY_MIX = {torch.ops.aten.copy_, torch.ops.aten.index, torch.ops.aten.index_put_}
"""Copies between devices, and indices on the CPU, which CUDA takes as well."""


class OneDevice(TorchDispatchMode):
    """Refuses operations whose tensors lie on two devices; numbers in tensors without axes may."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.ndim}
        if len(devices) > 1 and func.overloadpacket not in MAY_MIX:
            raise RuntimeError(f"{func} got tensors of several devices: {sorted(devices)}")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def meta(monkeypatch):
    """The device; torch has no autocast for it, and it has no values to be checked."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def there(kind, *args, **kwargs):
        return nullcontext() if kind == "meta" else autocast(kind, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", there)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind != "meta" and enabled(kind))
    monkeypatch.setattr(gradients, "require_finite", lambda tensor, name: tensor)
    return torch.device("meta")


def moved(denoiser, device, samples=3):
    """The denoiser and a condition, made while there are values to look at."""
    assert denoiser.fingerprint
    weights = torch.full((samples, denoiser.num_classes), 1 / denoiser.num_classes)
    condition = denoiser.condition(weights).to(device)
    denoiser.module.to(device)  # the table of noise levels keeps its values
    return denoiser, condition


def features_on(device, denoiser, method="fused", kind="sjlt", **changes):
    denoiser, condition = moved(denoiser, device)
    config = mean_features(timesteps=2, projection=ProjectionConfig(kind=kind, **SIZES), **changes)
    featuriser = Featuriser(denoiser, config, method=method, batch_rows=4, unknown="refuse")
    if method == "fused":
        featuriser.gradients._to_check = False  # compares values
    clean = torch.empty(3, *denoiser.sample_shape, device=device)
    with OneDevice():
        features = featuriser(clean, range(3), condition)
    return features, featuriser, clean, condition


@pytest.mark.parametrize("kind", NAMES)
def test_every_projection_follows_the_network(meta, kind):
    features, featuriser, *_ = features_on(meta, unet(), kind=kind)
    assert features.vectors.shape == (3, featuriser.dim)
    assert {features.vectors.device, features.errors.device, features.values.device} == {meta}


@pytest.mark.parametrize("norms", ["exact", "projected"])
@pytest.mark.parametrize("make", [unet, edm, dit])
def test_every_family_follows_its_parameters(meta, make, norms):
    features, *_ = features_on(meta, make(), kind="factorised_sjlt", norms=norms)
    assert features.vectors.device == meta


@pytest.mark.parametrize("noise", ["slot", "independent"])
@pytest.mark.parametrize("method", ["loop", "vmap"])
def test_every_method_and_noise_follow_the_network(meta, method, noise):
    features, *_ = features_on(meta, unet(), method=method, noise=noise)
    assert features.vectors.device == meta


def test_shared_noise_is_moved_once(meta, monkeypatch):
    drawn = []
    draw = featurise.attribution_noise

    def counted(policy, seed, timestep, indices, shape, **kwargs):
        drawn.append((timestep, len(indices)))
        return draw(policy, seed, timestep, indices, shape, **kwargs)

    monkeypatch.setattr(featurise, "attribution_noise", counted)
    _, featuriser, clean, condition = features_on(meta, unet())
    featuriser(clean, range(3, 6), condition)
    assert drawn == [(0, 1), (500, 1)]


def test_what_stays_on_the_cpu_is_refused(meta, monkeypatch):
    # The stand-in notices: without this, the tests above could not fail.
    draw, here = RademacherProjection._draw, torch.device("cpu")
    monkeypatch.setattr(RademacherProjection, "_draw", lambda self, tile, _: draw(self, tile, here))
    with pytest.raises(RuntimeError, match="several devices"):
        features_on(meta, unet(), kind="rademacher")
