"""Bad input of every das command ends in one clear line, a kill anywhere in the same bytes."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from killing import kill_when
from mixed_run import make_run, sign
from torch import nn

from diffcal.cli import main
from diffcal.core.runs import sha256_file
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.edm_denoiser import EDMDenoiser
from diffcal.errors import ArtifactError, ConfigError, DataError, NumericalError
from diffcal.workflows import das

SMALL = [
    "data.rows=24",
    "features.timesteps=[400]",
    "features.functional=mean",
    "features.combine=mean",
    "features.params=dec.8x8_block1",
    "features.projection.dim=64",
    "store.shard_rows=6",
    "batch_rows=2",
]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals") / "index"
    das.index(das.das_config("digits", SMALL), folder, device="cpu")
    return folder


@pytest.fixture
def copy(index, tmp_path):
    return shutil.copytree(index, tmp_path / "copy")


def changed(change):
    """The bundled denoiser after ``change(network)``, with a fingerprint of its own."""
    network = load_denoiser("bundled:digits").network
    change(network)
    other = EDMDenoiser(network)
    other._fingerprint = None
    return other


def one_line(arguments, capsys):
    capsys.readouterr()
    assert main([*arguments, "--device", "cpu"]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("diffcal: ")]
    return line


def test_a_truncated_shard_is_named_and_made_again(index, copy, capsys):
    path = copy / "features/features-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    command = ["das", "score", "--index", str(copy), "--queries", "digits", "--rows", "2"]
    message = one_line(command, capsys)
    assert "features-00002.safetensors' is damaged: " in message
    flags = [f"--set={setting}" for setting in SMALL]
    again = ["das", "index", "--preset", "digits", "--out", str(copy), *flags]
    assert "delete it and run the same command again" in one_line(again, capsys)
    path.unlink()
    assert main([*again, "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["featurised_now"] == 6
    assert sha256_file(path) == sha256_file(index / "features/features-00002.safetensors")


def test_a_truncated_shard_of_query_features_is_named(copy, tmp_path, capsys):
    das.score(copy, "digits", tmp_path / "a", rows=2, device="cpu")
    (path,) = copy.glob("queries/*/features-00000.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    command = ["das", "score", "--index", str(copy), "--queries", "digits", "--rows", "2"]
    assert "features-00000.safetensors' is damaged" in one_line(
        [*command, "--out", str(tmp_path / "b")], capsys
    )


def test_ids_that_come_twice_are_named(copy, tmp_path, capsys):
    run = make_run(tmp_path / "run", groups=2, members=5)
    shard = run / "generated/shard-00000.parquet"
    table = pq.read_table(shard)
    ids = table["id"].to_pylist()
    ids[3] = ids[1]
    table = table.set_column(0, "id", [ids])
    pq.write_table(table, shard)
    sign(run / "generated")
    command = ["das", "score", "--index", str(copy), "--queries", str(run)]
    assert "example 1 comes twice; ids must be unique" in one_line(
        [*command, "--out", str(tmp_path / "s")], capsys
    )
    assert not (copy / "queries").exists()
    # Two shards with the same training images.
    for suffix in ("safetensors", "json"):
        shutil.copy(
            copy / f"features/features-00001.{suffix}", copy / f"features/features-00003.{suffix}"
        )
    assert "ids must be unique" in one_line(
        [*command[:4], "--queries", "digits", "--out", str(tmp_path / "s")], capsys
    )


def test_gradients_that_are_not_numbers_lose_nothing(copy, tmp_path):
    def spoil(network):
        with torch.no_grad():
            next(network.parameters())[0] = float("nan")

    config = das.das_config("digits", SMALL)
    with pytest.raises(NumericalError, match=r"per-sample gradients: \d+ of"):
        das.index(config, tmp_path / "nan", denoiser=changed(spoil), device="cpu")
    assert not (tmp_path / "nan/manifest.json").exists()
    # Gradients that turn bad in the middle: the shards before stay, and the rest follows.
    out, denoiser, calls = tmp_path / "half", load_denoiser("bundled:digits"), []
    predict = denoiser.predict

    def failing(x, sigma, condition=None):
        calls.append(len(x))
        found = predict(x, sigma, condition)
        return found * float("nan") if sum(calls) > 16 else found

    denoiser.predict = failing
    with pytest.raises(NumericalError):
        das.index(config, out, denoiser=denoiser, device="cpu")
    left = sorted(path.name for path in out.glob("features/*.safetensors"))
    assert 0 < len(left) < 4
    denoiser.predict = predict
    das.index(config, out, denoiser=denoiser, device="cpu")
    for path in out.glob("features/*.safetensors"):
        assert sha256_file(path) == sha256_file(copy / "features" / path.name)


def test_a_sketch_larger_than_what_it_sketches_is_refused(tmp_path, capsys):
    flags = [f"--set={setting}" for setting in [*SMALL, "features.projection.dim=1000000"]]
    command = ["das", "index", "--preset", "digits", "--out", str(tmp_path / "x"), *flags]
    assert "projection.dim 1000000 is larger than the" in one_line(command, capsys)
    assert not (tmp_path / "x").exists()
    arguments = ["das", "lds", "--preset", "digits", "--out", str(tmp_path / "y")]
    assert "must be at least" in one_line([*arguments, "--set=losses.noises=0"], capsys)


class Gain(nn.Module):
    """A layer with a parameter that acts through an operation without a rule, over another one."""

    def __init__(self, inner, *, looks):
        super().__init__()
        self.inner, self.looks = inner, looks
        self.gain = nn.Parameter(torch.zeros(1, 1))

    def forward(self, *inputs):
        found = self.inner(*inputs)
        seen = found.detach().abs().max().item() if self.looks else 1.0
        return found * torch.linalg.matrix_exp(self.gain)[0, 0] * (seen / seen)


@pytest.mark.parametrize("looks", [False, True])
def test_an_unknown_layer_is_computed_or_refused_by_name(looks, tmp_path, caplog):
    def insert(network):
        layers = network.model.dec
        layers["8x8_block1"] = Gain(layers["8x8_block1"], looks=looks)

    settings = [*SMALL, "data.rows=6", "features.projection.dim=8"]
    config = das.das_config("digits", settings)
    if looks:
        # It cannot be vectorised, so it is refused: a wrong number would be worse.
        with pytest.raises(ConfigError, match=r"no per-sample gradients of .*8x8_block1\.gain"):
            das.index(config, tmp_path / "x", denoiser=changed(insert), device="cpu")
        return
    das.index(config, tmp_path / "x", denoiser=changed(insert), device="cpu")
    assert "8x8_block1.gain" in caplog.text
    by_loop = das.das_config("digits", [*settings, "gradients=loop"])
    das.index(by_loop, tmp_path / "y", denoiser=changed(insert), device="cpu")
    rows = [das.AttributionIndex.open(tmp_path / name, denoiser=changed(insert)) for name in "xy"]
    first, second = (index.store.rows() for index in rows)
    torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-3 * float(second.abs().max()))


def test_scores_of_another_model_or_of_changed_images_are_refused(index, copy, tmp_path):
    def nudge(network):
        with torch.no_grad():
            next(network.parameters()).mul_(1.01)

    with pytest.raises(ArtifactError, match=r"\(model: '\w+' there, '\w+' here\)"):
        das.score(index, "digits", tmp_path / "s", rows=2, denoiser=changed(nudge), device="cpu")
    das.score(copy, "digits", tmp_path / "t", rows=2, device="cpu")
    with pytest.raises(ArtifactError, match="other settings"):
        das.score(copy, "digits", tmp_path / "t", rows=3, device="cpu")
    table = tmp_path / "t/scores.parquet"
    table.write_bytes(table.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match=r"scores\.parquet' is missing or damaged"):
        das.explain(tmp_path / "t")
    with pytest.raises(DataError, match="does not exist"):
        das.score(index, "gone.parquet", tmp_path / "s", device="cpu")


def test_a_killed_scoring_ends_in_the_same_bytes(index, copy, tmp_path):
    settings = {"rows": 18, "device": "cpu", "held_out": None}
    das.score(index, "digits", tmp_path / "whole", **settings)
    out = tmp_path / "killed"
    for mark in (copy.glob, "queries/*/features-00000.json"), (out.glob, "scores.parquet"):
        find, pattern = mark
        kill_when(
            lambda find=find, pattern=pattern: any(find(pattern)),
            lambda: das.score(copy, "digits", out, **settings),
        )
    das.score(copy, "digits", out, **settings)
    names = ("scores.parquet", "nearest.parquet", "queries.parquet", "groups.parquet")
    for name in (*names, "gallery.html"):
        assert sha256_file(out / name) == sha256_file(tmp_path / "whole" / name)


def test_a_killed_lds_ends_in_the_same_figures(tmp_path):
    settings = [
        "data.rows=12",
        "optimizer.steps=2",
        "optimizer.batch_size=4",
        "network.model_channels=8",
        "network.channel_mult=[1]",
        "subsets.count=2",
        "queries.validation=2",
        "queries.generated=2",
        "queries.sampler.steps=2",
        "losses.timesteps=1",
        "resamples=5",
        "methods=['pixel-cosine']",
    ]
    config = das.lds_config("digits", settings)
    das.lds(config, tmp_path / "whole", device="cpu")
    out = tmp_path / "killed"
    for mark in (
        "models/subset-00000-seed-0/config.json",
        "queries/validation.parquet",
        "losses/subset-00000-seed-0.safetensors",
    ):
        kill_when(
            lambda mark=mark: (out / mark).exists(), lambda: das.lds(config, out, device="cpu")
        )
    assert not (out / "lds.json").exists()
    das.lds(config, out, device="cpu")
    for name in ("lds.json", "lds.md", "queries/generated.parquet"):
        assert sha256_file(out / name) == sha256_file(tmp_path / "whole" / name)
