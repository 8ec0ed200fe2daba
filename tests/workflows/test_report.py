"""The report: numbers equal the metrics, the page stands alone, bad files are named."""

import json

import pytest
import torch

from diffcal.calibration.metrics.inputs import Predictions
from diffcal.calibration.metrics.summary import calibration_summary
from diffcal.calibration.metrics.temperature import fit_temperature
from diffcal.data.logits import save_logits
from diffcal.errors import ConfigError, DataError
from diffcal.workflows.report import ReportConfig, calibration_report

QUICK = ReportConfig(n_resamples=30)


def write(path, n=400, k=5, factor=2.0, soft=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, k, generator=generator) * 1.5
    y = torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]
    labels = {"soft_labels": z.softmax(1)} if soft else {"labels": y}
    save_logits(path, logits=z * factor, **labels)
    return {"logits": z * factor, **labels}


def test_two_models(tmp_path):
    inputs = write(tmp_path / "before.npz")
    write(tmp_path / "after.safetensors", factor=1.0)
    data = calibration_report(
        [tmp_path / "before.npz", tmp_path / "after.safetensors"], tmp_path / "out", QUICK
    )
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == data
    first = data["models"][0]
    assert first["name"] == "before"
    summary = calibration_summary(**inputs)
    for name, entry in first["measures"].items():
        assert entry["value"] == pytest.approx(summary[name], abs=1e-12), name
        if entry["low"] is not None:
            assert entry["low"] <= entry["value"] <= entry["high"]
    best = fit_temperature(Predictions(**inputs))
    assert first["best_temperature"]["temperature"] == pytest.approx(best.temperature, rel=1e-9)
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert page.count("data:image/svg+xml") >= 8
    assert "http" not in page.split("</style>")[1].replace("http://www.w3.org", "")
    again = calibration_report(
        {"before": tmp_path / "before.npz", "after": tmp_path / "after.safetensors"},
        tmp_path / "again",
        QUICK,
    )
    assert again == data
    assert (tmp_path / "again" / "report.html").read_text("utf-8") == page


@pytest.mark.parametrize("kind", ["soft", "all right", "one example"])
def test_single_model_of_unusual_data(tmp_path, kind):
    path = tmp_path / "model.parquet"
    if kind == "soft":
        write(path, soft=True)
    elif kind == "one example":
        save_logits(path, logits=torch.tensor([[1.0, 2.0]]), labels=torch.tensor([0]))
    else:
        z = torch.eye(3).repeat(5, 1) * 900  # saturated: confidences of exactly 1
        save_logits(path, logits=z, labels=torch.arange(15) % 3)
    data = calibration_report([path], tmp_path, QUICK)
    assert data["models"][0]["labels"] == ("soft" if kind == "soft" else "hard")
    measures = data["models"][0]["measures"]
    assert ("kl" in measures) == (kind == "soft")
    if kind != "soft":
        assert measures["auroc"]["value"] is None
        assert measures["auroc"]["note"]


def test_bad_files_and_names(tmp_path):
    write(tmp_path / "a.npz")
    torch_inf = torch.tensor([[1.0, float("inf")]])
    save_logits(tmp_path / "inf.npz", logits=torch_inf, labels=torch.tensor([0]))
    with pytest.raises(DataError, match=r"inf\.npz.*NaN or infinite"):
        calibration_report([tmp_path / "inf.npz"], tmp_path / "out", QUICK)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="at least one"):
        calibration_report([], tmp_path / "out", QUICK)
    with pytest.raises(ConfigError, match="same name"):
        calibration_report([tmp_path / "a.npz"] * 2, tmp_path / "out", QUICK)
    with pytest.raises(ConfigError, match="level"):
        ReportConfig(level=95.0)
