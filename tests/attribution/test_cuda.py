"""A GPU gives the features and scores of the CPU, up to rounding."""

import pytest
import torch
from curvatures import diagonal
from gradient_models import dit, edm, mean_features, unet

from diffcal.attribution.ekfac_fit import fit_ekfac
from diffcal.attribution.featurise import Featuriser
from diffcal.attribution.kernel import fit_kernel, load_kernel
from diffcal.attribution.kernel_updates import update_kernel
from diffcal.attribution.projection import ProjectionConfig
from diffcal.attribution.scores import kernel_scores, leverage_scores, score_blocks
from diffcal.attribution.screening import candidate_scores
from diffcal.attribution.timesteps import noise_levels
from diffcal.attribution.topk import TopScores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = {"dim": 64, "factor_dim": 4, "mask_dim": 512}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Products in float32, not in the ten bits of TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def features(device, make, method="fused", kind="sjlt", channels_last=False, dtype=None, **changes):
    denoiser = make() if dtype is None else make(dtype=dtype)
    denoiser = denoiser.to(device)
    config = mean_features(timesteps=3, projection=ProjectionConfig(kind=kind, **SIZES), **changes)
    featuriser = Featuriser(
        denoiser,
        config,
        method=method,
        batch_rows=5,
        channels_last=channels_last,
        unknown="refuse",
    )
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(4, *denoiser.sample_shape, generator=generator) * 2 - 1
    weights = torch.rand(4, denoiser.num_classes, generator=generator)
    condition = denoiser.condition((weights / weights.sum(1, keepdim=True)).to(device))
    return featuriser(clean.to(device), range(4), condition)


def assert_same_features(there, here, tolerance=1e-4):
    assert there.vectors.is_cuda
    for name in ("vectors", "errors", "values"):
        found, wanted = getattr(there, name).cpu(), getattr(here, name)
        size = float(wanted.norm(dim=1).mean())
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("make", [unet, edm, dit])
def test_rows_of_all_outputs_are_those_of_the_cpu(make):
    options = {"functional": "all-outputs", "combine": "stack"}
    assert_same_features(features("cuda", make, **options), features("cpu", make, **options))


@pytest.mark.parametrize(
    "kind", ["sjlt", "factorised_sjlt", "factorised", "mask_sjlt", "gaussian", "rademacher"]
)
@pytest.mark.parametrize("make", [unet, edm, dit])
def test_features_are_those_of_the_cpu(make, kind):
    assert_same_features(features("cuda", make, kind=kind), features("cpu", make, kind=kind))


@pytest.mark.parametrize("noise", ["shared", "slot", "independent"])
@pytest.mark.parametrize("method", ["fused", "vmap", "loop"])
def test_methods_and_noise_agree(method, noise):
    assert_same_features(
        features("cuda", unet, method, noise=noise), features("cpu", unet, noise=noise)
    )


@pytest.mark.parametrize("kind", ["sjlt", "factorised_sjlt"])
def test_exact_norms_agree(kind):
    there, here = (features(d, unet, kind=kind, norms="exact") for d in ("cuda", "cpu"))
    assert_same_features(there, here)


def test_channels_last_agrees():
    there = features("cuda", unet, channels_last=True)
    assert_same_features(there, features("cpu", unet))


@pytest.mark.parametrize("kind", ["sjlt", "factorised_sjlt"])
def test_half_precision_stays_near(kind):
    there = features("cuda", unet, kind=kind, dtype="bfloat16").vectors.cpu()
    here = features("cpu", unet, kind=kind).vectors
    assert there.dtype == torch.float32
    # bfloat16 has 8 bits: layers of this depth add up to errors of a few percent.
    assert float(torch.cosine_similarity(there, here).min()) > 0.98
    torch.testing.assert_close(there.norm(dim=1), here.norm(dim=1), rtol=0.1, atol=0)


@pytest.mark.parametrize("rows", [40, 90])
def test_scores_are_those_of_the_cpu(rows, tmp_path):
    generator = torch.Generator().manual_seed(1)
    phi = torch.randn(rows, 64, generator=generator) + 3
    psi = torch.randn(7, 64, generator=generator) + 3
    here, there = fit_kernel(phi), fit_kernel(phi, device="cuda")
    assert there.device.type == "cuda"
    assert there.form == ("dual" if rows < 64 else "primal")
    damping = here.damping(0.1)
    wanted = kernel_scores(here, psi, phi, damping, leverage=True, readout="signed")
    for queries, training in ((psi, phi), (psi.cuda(), phi.cuda())):
        found = kernel_scores(there, queries, training, damping, leverage=True, readout="signed")
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    torch.testing.assert_close(
        leverage_scores(there, phi, [damping]), leverage_scores(here, phi, [damping])
    )
    there.save(tmp_path / "kernel.safetensors")
    loaded = load_kernel(tmp_path / "kernel.safetensors", "cuda")
    assert loaded.device.type == "cuda"
    found = kernel_scores(loaded, psi, phi, damping, leverage=True, readout="signed")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_updates_candidates_and_best_rows_agree():
    generator = torch.Generator().manual_seed(2)
    phi, psi = torch.randn(90, 32, generator=generator), torch.randn(5, 32, generator=generator)
    found = []
    for device in ("cpu", "cuda"):
        kernel = fit_kernel(phi[:80], device=device)
        changed = update_kernel(kernel, added=phi[80:].to(device), removed=phi[:3].to(device))
        scores = kernel_scores(changed, psi, phi[3:], 0.5)
        top = TopScores(4)
        for block in score_blocks(kernel, psi, phi[:80], 0.5, block_rows=32):
            top.update(block)
        chosen = candidate_scores(kernel, psi, phi[:80], top.index.to(device), 0.5)
        torch.testing.assert_close(chosen, top.values, rtol=1e-4, atol=0)
        found.append((scores, top.index))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-6)
    assert torch.equal(found[0][1], found[1][1])


def test_a_curvature_is_that_of_the_cpu():
    fitted = {}
    for device in ("cpu", "cuda"):
        denoiser = unet().to(device)
        generator = torch.Generator().manual_seed(0)
        clean = torch.rand(3, *denoiser.sample_shape, generator=generator) * 2 - 1
        condition = denoiser.condition(torch.eye(denoiser.num_classes)[:3].to(device))
        levels = noise_levels(denoiser, (100, 600))
        fitted[device] = fit_ekfac(denoiser, [(clean.to(device), range(3), condition)], levels)
    for name, block in fitted["cpu"].blocks.items():
        found, wanted = (diagonal(one) for one in (fitted["cuda"].blocks[name], block))
        assert fitted["cuda"].blocks[name].eigenvalues.is_cuda
        size = max(float(wanted.abs().max()), 1e-12)
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-2, atol=1e-3 * size)
