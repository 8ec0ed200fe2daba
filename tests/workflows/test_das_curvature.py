"""An index of curved gradients: what it keeps, kills, what is missing, other settings."""

import shutil
from dataclasses import replace

import pytest
import torch
from killing import kill_at_rename
from test_das_kills import digests
from test_das_methods import features, matrix

from diffcal.attribution.ekfac import Ekfac, load_ekfac
from diffcal.attribution.ekfac_fit import fit_ekfac
from diffcal.attribution.featurise import Featuriser
from diffcal.cli import main
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.errors import ArtifactError, ConfigError
from diffcal.workflows import das, das_curvature
from diffcal.workflows.das_images import open_training_images
from diffcal.workflows.das_score import score_queries

ROWS = 24
SETTINGS = [
    "model.source=bundled:digits",
    f"data.rows={ROWS}",
    "store.shard_rows=10",
    "store.dtype=float32",
    "features.timesteps=[400]",
    "features.params=dec.8x8_block1",
    "features.projection.dim=64",
    "features.curvature.images=10",
]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curved") / "index"
    das.index(das.das_config("ekfac", SETTINGS), folder, device="cpu")
    return folder


def scored(folder, out):
    config = das.score_config(folder, "digits", [f"top={ROWS}", "queries.rows=3"])
    score_queries(folder, config, out, device="cpu")
    return matrix(out, 3)


def test_scores_are_products_of_features_under_the_curvature_of_spread_images(index, tmp_path):
    found = scored(index, tmp_path / "scores")
    phi, psi = features(index, "")
    torch.testing.assert_close(found, psi @ phi.T, rtol=1e-4, atol=1e-5 * float(found.abs().max()))

    config = das.das_config("ekfac", SETTINGS)
    denoiser = load_denoiser("bundled:digits")
    images = open_training_images(config.data, denoiser)
    chosen = [i * ROWS // 10 for i in range(10)]
    samples = [(denoiser.encode(images.images(chosen)), chosen, images.condition(denoiser, chosen))]
    levels = Featuriser(denoiser, config.features).levels
    wanted = fit_ekfac(
        denoiser, samples, levels, config.features.curvature, params=config.features.params
    )
    kept = load_ekfac(index / "curvature.safetensors")
    assert set(kept.blocks) == set(wanted.blocks)
    for name, block in wanted.blocks.items():
        assert torch.equal(kept.blocks[name].eigenvalues, block.eigenvalues)
    featuriser = Featuriser(denoiser, config.features, curvature=kept)
    made = featuriser(
        denoiser.encode(images.images(range(ROWS))),
        range(ROWS),
        images.condition(denoiser, range(ROWS)),
    ).vectors
    torch.testing.assert_close(made.double(), phi, rtol=1e-3, atol=1e-4 * float(phi.abs().max()))


def test_killed_the_index_ends_in_the_same_bytes(index, tmp_path):
    config, out = das.das_config("ekfac", SETTINGS), tmp_path / "index"
    for pattern, renamed in (
        ("*/curvature.safetensors", False),
        ("*/curvature.safetensors", True),
        ("*/curvature.json", True),
        ("*/features/features-00001.json", False),
    ):
        kill_at_rename(pattern, lambda: das.index(config, out, device="cpu"), renamed=renamed)
        assert not (out / "manifest.json").exists()
    das.index(config, out, device="cpu")
    wanted = {name: value for name, value in digests(index).items() if "queries" not in name}
    assert digests(out) == wanted


def test_without_its_curvature_an_index_takes_no_queries(index, tmp_path):
    copy = shutil.copytree(index, tmp_path / "index")
    whole = digests(copy)
    for damage in (
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1"),
    ):
        damage(copy / "curvature.safetensors")
        with pytest.raises(ArtifactError, match="run diffcal das index again"):
            scored(copy, tmp_path / "scores")
        das.index(das.das_config("ekfac", SETTINGS), copy, device="cpu")
        assert digests(copy) == whole


def test_features_never_meet_another_curvature(index, tmp_path, monkeypatch):
    def another(*given, **settings):
        found = fit_ekfac(*given, **settings).blocks
        turned = {
            name: replace(one, eigenvalues=2 * one.eigenvalues) for name, one in found.items()
        }
        return Ekfac(turned)

    monkeypatch.setattr(das_curvature, "fit_ekfac", another)
    copy = shutil.copytree(index, tmp_path / "index")
    config = das.das_config("ekfac", SETTINGS)
    for lost in (["curvature.safetensors"], ["curvature.safetensors", "curvature.json"]):
        for name in lost:
            (copy / name).unlink(missing_ok=True)
        with pytest.raises(ArtifactError, match="not the same: delete that folder"):
            das.index(config, copy, device="cpu")
        assert not (copy / "curvature.safetensors").exists()
    shutil.rmtree(copy)
    das.index(config, copy, device="cpu")
    assert (copy / "curvature.safetensors").exists()


def test_another_damping_is_another_index(index, capsys):
    command = ["das", "index", "--preset", "ekfac", "--out", str(index), "--device", "cpu"]
    for setting in (*SETTINGS, "features.curvature.damping=0.2"):
        command += ["--set", setting]
    assert main(command) == 2
    assert "curvature.damping: 0.1 there, 0.2 now" in capsys.readouterr().err


def test_a_method_along_sampling_paths_has_none():
    with pytest.raises(ConfigError, match="along the sampling-path"):
        das.das_config("journey-trak", ["features.curvature.kind=ekfac", *SETTINGS])
