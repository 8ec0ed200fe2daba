"""An index and its scores on an accelerator (a stand-in with values) are those of the CPU."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from curvatures import diagonal
from stand_in_device import StandIn, stand_in_device

from diffcal.attribution.ekfac_fit import fit_ekfac
from diffcal.attribution.feature_store import FeatureStore
from diffcal.attribution.featurise import Featuriser
from diffcal.attribution.kernel_updates import update_kernel
from diffcal.attribution.projection import ProjectionConfig
from diffcal.data.sources import open_images
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.workflows import das
from diffcal.workflows.das_index import AttributionIndex

SMALL = [
    "data.rows=16",
    "features.timesteps=[400]",
    "features.projection.dim=64",
    "store.shard_rows=8",
    "store.dtype=float32",
    "scores.leverage=true",
    "scores.residual=rms",
]


@pytest.fixture
def there(monkeypatch):
    with stand_in_device(monkeypatch) as device:
        yield device


def test_index_and_scores_are_those_of_the_cpu(there, tmp_path):
    for device in ("cpu", "meta"):
        folder = tmp_path / device
        das.index(das.das_config("digits", SMALL), folder, device=device)
        das.score(folder, "digits", rows=3, device=device)
    here, found = (FeatureStore.open(tmp_path / name / "features") for name in ("cpu", "meta"))
    torch.testing.assert_close(found.rows(), here.rows(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.column("error"), here.column("error"), rtol=1e-4, atol=0)
    first, second = (
        pq.read_table(tmp_path / name / "scores/scores.parquet").to_pydict()
        for name in ("cpu", "meta")
    )
    values = torch.tensor(first["score"]), torch.tensor(second["score"])
    torch.testing.assert_close(values[1], values[0], rtol=1e-3, atol=1e-5 * float(values[0].max()))


def test_a_curvature_and_its_features_are_those_of_the_cpu(there):
    features = das.das_config("ekfac", ["features.params=dec.8x8_block1"]).features
    features = replace(features, timesteps=(400,), projection=ProjectionConfig(dim=64))
    fitted, rows = {}, {}
    for device in ("cpu", "meta"):
        denoiser = load_denoiser("bundled:digits", device=device)
        clean = denoiser.encode(torch.as_tensor(open_images("digits").images[:6]))
        condition = denoiser.condition(torch.eye(10)[:6])
        levels = Featuriser(denoiser, features).levels
        sample = (clean, range(6), condition)
        fitted[device] = fit_ekfac(denoiser, [sample], levels, params=features.params)
        # Few images leave directions without curvature, whose basis is arbitrary: features of one.
        made = Featuriser(denoiser, features, curvature=fitted["cpu"])
        rows[device] = made(clean, range(6), condition).vectors
    assert isinstance(rows["meta"], StandIn)
    torch.testing.assert_close(
        rows["meta"].cpu(), rows["cpu"], rtol=0, atol=1e-4 * float(rows["cpu"].abs().max())
    )
    for name, block in fitted["cpu"].blocks.items():
        found, wanted = (diagonal(one) for one in (fitted["meta"].blocks[name], block))
        torch.testing.assert_close(
            found.cpu(), wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max())
        )


def test_a_changed_kernel_stays_on_its_device(there, tmp_path):
    das.index(das.das_config("digits", SMALL), tmp_path / "i", device="meta")
    index = AttributionIndex.open(tmp_path / "i", device="meta")
    kernel = index.kernel("meta")
    assert isinstance(kernel.basis, StandIn)
    rows = index.store.rows()
    changed = update_kernel(kernel, added=rows[:2] + 1, removed=rows[2:4])
    again = update_kernel(index.kernel("cpu"), added=rows[:2] + 1, removed=rows[2:4])
    found = changed.leverages(changed.rotate(rows), [1.0])
    wanted = again.leverages(again.rotate(rows), [1.0])
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-6, atol=1e-9)


def test_the_stand_in_refuses_what_an_accelerator_refuses(there):
    tensor = torch.ones(3, device=there)
    with pytest.raises(RuntimeError, match="several devices"):
        tensor + torch.ones(3)
    with pytest.raises(RuntimeError, match="indices on the accelerator"):
        torch.ones(3)[torch.arange(2, device=there)]
    with pytest.raises(RuntimeError, match="generator of the CPU"):
        torch.rand(3, device=there, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="numpy"):
        tensor.numpy()
    assert tensor.sum().item() == 3
