"""diffcal calibrate: files in, calibrated files and a table out, bad input in one line."""

import json

import numpy as np
import pytest
import torch

from diffcal.calibration.metrics.summary import calibration_summary
from diffcal.calibration.posthoc.feature_clipping import FeatureClipping
from diffcal.calibration.posthoc.storage import load_calibrator
from diffcal.calibration.posthoc.temperature import TemperatureScaling
from diffcal.cli import main
from diffcal.data.logits import load_logits, save_logits


def write(path, n=300, k=4, d=5, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(k, d, generator=torch.Generator().manual_seed(9))
    h = torch.randn(n, d, generator=generator).relu()
    z = h @ weight.T
    y = torch.multinomial((z / 2).softmax(1), 1, generator=generator)[:, 0]
    arrays = {"logits": z, "labels": y, "features": h, "head_weight": weight}
    arrays = arrays | {"head_bias": torch.zeros(k)} | changes
    np.savez(path, **{name: value.numpy() for name, value in arrays.items() if value is not None})
    return z, y, h


def run(tmp_path, *flags, out="out"):
    command = ["calibrate", "--logits", str(tmp_path / "val.npz"), "--apply"]
    command += [str(tmp_path / "test.npz"), "--out", str(tmp_path / out), *flags]
    return main(command)


@pytest.fixture
def files(tmp_path):
    write(tmp_path / "val.npz")
    return write(tmp_path / "test.npz", seed=1)


def test_whole_run(tmp_path, files, capsys):
    z, y, h = files
    methods = [
        "temperature",
        "isotonic",
        "matrix",
        "vector",
        "dirichlet",
        "feature_clipping+temperature",
        "feature_consistency",
    ]
    flags = [part for method in methods for part in ("--method", method)]
    flags += ["--set", "feature_clipping.grid_size=10", "--set", "n_bins=10"]
    flags += ["--set", "feature_consistency.num_samples=20"]
    flags += ["--set", "feature_consistency.fit_samples=5"]
    assert run(tmp_path, *flags) == 0
    printed = json.loads(capsys.readouterr().out)
    table = json.loads((tmp_path / "out" / "metrics.json").read_text())
    before = calibration_summary(logits=z, labels=y, n_bins=10)
    for name in ("accuracy", "nll", "ece"):
        assert table["before"]["test"][name]["value"] == pytest.approx(before[name], abs=1e-6)
        assert printed["summary"]["test"]["before"][name] == pytest.approx(before[name], abs=1e-5)
    head = load_logits(tmp_path / "val.npz").head
    for method in methods:
        made = load_calibrator(tmp_path / "out" / method / "calibrator.safetensors")
        content = load_logits(tmp_path / "out" / method / "test.npz")
        assert torch.equal(content.labels, y)
        if made.last_layer(h, *head) is None:
            assert content.head is None
            torch.testing.assert_close(content.features, h)
        else:  # the layer in the file is the one that gives its logits
            weight, bias = content.head
            layer = content.features @ weight.T + bias
            torch.testing.assert_close(layer, content.logits, rtol=1e-5, atol=1e-5)
            FeatureClipping(grid_size=5).with_head(weight, bias).fit(
                content.logits, content.labels, features=content.features
            )
        expected = made.predict_proba(z, features=h)
        found = content.probs if content.logits is None else content.logits.softmax(1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        after = calibration_summary(
            probs=expected,
            labels=y,
            n_bins=10,
        )
        value = table["after"][method]["test"]["ece"]["value"]
        assert value == pytest.approx(after["ece"], abs=1e-5)
    val = load_logits(tmp_path / "val.npz")
    described = json.loads((tmp_path / "out" / "temperature" / "calibrator.json").read_text())
    scaling = TemperatureScaling().fit(val.logits, val.labels)
    assert described["fitted"]["temperature"] == scaling.temperature
    assert table["after"]["temperature"]["test"]["nll"]["value"] < before["nll"]
    assert load_logits(tmp_path / "out" / "isotonic" / "test.npz").probs is not None
    # the same command again is fine, another one in the same folder is not
    assert run(tmp_path, *flags) == 0
    assert run(tmp_path, "--method", "temperature") == 2
    assert "other settings" in capsys.readouterr().err
    assert run(tmp_path, "--method", "temperature", "--overwrite") == 0
    assert not (tmp_path / "out" / "isotonic").exists()


@pytest.mark.parametrize("suffix", ["parquet", "safetensors"])
def test_formats_and_soft_labels(tmp_path, suffix):
    for name, seed in (("val", 0), ("test", 1)):
        z, _, h = write(tmp_path / "unused.npz", seed=seed)
        q = (z / 2).softmax(1)
        save_logits(tmp_path / f"{name}.{suffix}", logits=z, soft_labels=q, features=h)
    command = ["calibrate", "--logits", str(tmp_path / f"val.{suffix}"), "--apply"]
    command += [str(tmp_path / f"test.{suffix}"), "--out", str(tmp_path / "out")]
    assert main(command) == 0  # temperature is the default
    content = load_logits(tmp_path / "out" / "temperature" / f"test.{suffix}")
    torch.testing.assert_close(content.logits, z / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(content.soft_labels, q)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--method", "temprature"], "did you mean temperature"),
        (["--method", "temperature", "--method", "temperature"], "named twice"),
        (["--set", "temperature.serch=grid"], "did you mean 'search'"),
        (["--set", "vector.bias=false"], "not among the methods"),
        (["--set", "measures=['eec']"], "unknown measure"),
        (["--method", "isotonic+temperature"], "only be the last"),
    ],
)
def test_bad_settings(tmp_path, files, capsys, flags, message):
    assert run(tmp_path, *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_files(tmp_path, files, capsys):
    z, y, h = files
    cases = [
        ({"logits": z.clone().index_fill_(0, torch.tensor([3]), torch.nan)}, "NaN or infinite"),
        ({"labels": y + 1}, "labels run from"),
        ({"logits": None, "probs": z.softmax(1)}, "holds probabilities"),
        ({"logits": z[:, :3], "labels": y.clamp(max=2), "head_weight": None, "head_bias": None},
         "3 classes"),
        ({"features": h[:7]}, "features must be"),
        ({"head_bias": None}, "both head_weight and head_bias"),
        ({"head_bias": torch.zeros(3)}, "head_bias [4]"),
    ]  # fmt: skip
    for changes, message in cases:
        write(tmp_path / "test.npz", seed=1, **changes)
        assert run(tmp_path) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "test.npz" in error
        assert error.count("\n") == 1
    write(tmp_path / "test.npz")
    assert run(tmp_path) == 2
    assert "judged on" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    write(tmp_path / "test.npz", seed=1, features=None, head_weight=None, head_bias=None)
    assert run(tmp_path, "--method", "group", "--set", "group.partitions=1") == 2
    assert "features" in capsys.readouterr().err
    write(tmp_path / "val.npz", head_weight=None, head_bias=None)
    assert run(tmp_path, "--method", "feature_clipping+temperature") == 2
    assert "last linear layer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # a run in it with these mended would be refused


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path, files, capsys, monkeypatch):
    folder = tmp_path / "später im Jahr"
    folder.mkdir()
    write(folder / "test.npz", seed=2)
    monkeypatch.chdir(folder)
    command = ["calibrate", "--logits", "../val.npz", "--apply", "test.npz", "../test.npz"]
    assert main([*command, "--out", "out"]) == 0
    named = {path.name for path in (folder / "out" / "temperature").glob("*.npz")}
    assert named == {"test.npz", f"{tmp_path.name}-test.npz"}
