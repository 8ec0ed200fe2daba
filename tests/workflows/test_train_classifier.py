"""The train-classifier stage on digits and a small published mixed set."""

import io
import json
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import diffcal.workflows
from diffcal.calibration import training_loop
from diffcal.calibration.training_config import (
    AugmentationConfig,
    ClassifierConfig,
    LossConfig,
    MixedConfig,
)
from diffcal.config import build_config
from diffcal.data.logits import load_logits
from diffcal.errors import ArtifactError, ConfigError, DataError
from diffcal.models.classifier import load_classifier

pytest.importorskip("diffcal.data.sources")
from diffcal.workflows.train_classifier import (
    MixedSource,
    TrainClassifierConfig,
    read_mixed,
    train_classifier,
)

NAMES = tuple("0123456789")
PRESETS = Path(diffcal.workflows.__file__).parent / "presets"
CONFIG = TrainClassifierConfig(
    rows=600,
    test="digits",
    test_first_row=1600,
    posthoc=(),
    report=False,
    classifier=ClassifierConfig(
        model="cnn-tiny",
        epochs=2,
        batch_size=64,
        augmentation=AugmentationConfig(crop_padding=0, flip=False),
        mixed=MixedConfig(loss=LossConfig(name="kl_divergence")),
    ),
)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def published(tmp_path):
    """Three groups of three members in two files, as the publication writes them."""
    rng = np.random.default_rng(0)
    rows = []
    for group, (a, b) in enumerate(((0, 1), (2, 7), (3, 8))):
        for member, weight in enumerate((0.0, 0.5, 1.0)):
            soft = np.full(10, 0.01, np.float32)
            soft[a] += 0.9 * weight
            soft[b] += 0.9 * (1 - weight)
            rows.append(
                {
                    "id": 3 * group + member,
                    "group": group,
                    "image": {"bytes": png(rng.integers(0, 256, (8, 8), np.uint8)), "path": None},
                    "soft_label": soft.tolist(),
                    "classes": [a, b],
                    "weights": [weight, 1 - weight],
                }
            )
    features = {"info": {"features": {"label": {"names": list(NAMES), "_type": "ClassLabel"}}}}
    folder = tmp_path / "run" / "dataset"
    (folder / "data").mkdir(parents=True)
    for index, part in enumerate((rows[:4], rows[4:])):
        table = pa.Table.from_pylist(part)
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, folder / "data" / f"train-{index:05d}-of-00002.parquet")
    return folder


def test_reading_a_published_set(published):
    source = MixedSource(folder=str(published))
    mixed = read_mixed(source, NAMES)
    assert mixed.images.shape == (9, 8, 8, 1)
    assert mixed.groups.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert mixed.support[4].nonzero()[:, 0].tolist() == [2, 7]
    torch.testing.assert_close(mixed.targets.sum(1), torch.ones(9), rtol=0, atol=1e-6)
    assert float(mixed.targets[2, 0]) == pytest.approx(0.91)
    ratio = read_mixed(replace(source, labels="weights"), NAMES)
    assert ratio.targets[4].tolist() == [0, 0, 0.5, 0, 0, 0, 0, 0.5, 0, 0]
    pure = read_mixed(replace(source, members="pure", labels="one_hot"), NAMES)
    assert pure.targets.argmax(1).tolist() == [1, 0, 7, 2, 8, 3]
    assert set(pure.targets.flatten().tolist()) == {0.0, 1.0}


def test_train_with_and_without_the_mixed_set(published, tmp_path):
    config = replace(CONFIG, mixed=MixedSource(folder=str(published)))
    summary = train_classifier(config, tmp_path / "with", device="cpu")
    assert summary["mixed_images"] == 9
    assert summary["train_images"] == 540
    again = train_classifier(config, tmp_path / "with", device="cpu")
    assert again["steps_this_call"] == 0
    assert again["test"] == summary["test"]
    alone = train_classifier(CONFIG, tmp_path / "without", device="cpu")
    assert alone["mixed_images"] == 0
    assert load_classifier(tmp_path / "without").class_names == NAMES
    with pytest.raises(ArtifactError, match="seed: 0 there, 1 now"):
        train_classifier(replace(config, seed=1), tmp_path / "with", device="cpu")
    moved = train_classifier(
        replace(config, seed=1), tmp_path / "with", overwrite=True, device="cpu"
    )
    assert moved["steps_this_call"] == summary["steps"]


def test_posthoc_methods_and_report_follow_the_training(tmp_path, monkeypatch):
    methods = ("temperature", "feature_clipping+temperature")
    config = replace(
        CONFIG,
        posthoc=methods,
        posthoc_settings={"temperature": {"criterion": "ece", "search": "grid"}},
        report=True,
    )
    out = tmp_path / "run"
    summary = train_classifier(config, out, device="cpu")
    table = summary["posthoc"]
    assert list(table) == ["before", *methods]
    for name in ("accuracy", "nll", "brier"):
        assert table["before"][name] == pytest.approx(summary["test"][name], abs=1e-5)
    # the method was fitted with the settings given, on the validation images
    fitted = json.loads((out / "posthoc/temperature/calibrator.json").read_text())
    assert fitted["settings"][0]["search"] == "grid"
    raw = load_logits(out / "logits-test.safetensors")
    with pytest.raises(ConfigError, match="reads features"):
        replace(config, save_features=False)
    calibrated = load_logits(out / "posthoc/temperature/logits-test.safetensors")
    scaled = raw.logits / fitted["fitted"]["temperature"]
    torch.testing.assert_close(calibrated.logits, scaled, rtol=1e-5, atol=1e-5)
    metrics = json.loads((out / "posthoc/metrics.json").read_text())
    assert metrics["after"]["temperature"]["validation"]["ece"]["value"] <= (
        metrics["before"]["validation"]["ece"]["value"] + 1e-9
    )
    weight, bias = raw.head
    torch.testing.assert_close(raw.features @ weight.T + bias, raw.logits, rtol=1e-4, atol=1e-4)
    report = json.loads(Path(summary["report"]).with_suffix(".json").read_text())
    assert [model["name"] for model in report["models"]] == ["uncalibrated", *methods]
    assert Path(summary["report"]).stat().st_size > 10_000

    # other methods use the classifier that is there
    fewer = replace(config, posthoc=("isotonic",), posthoc_settings={}, report=False)
    again = train_classifier(fewer, out, device="cpu")
    assert again["steps_this_call"] == 0
    assert list(again["posthoc"]) == ["before", "isotonic"]
    assert again["posthoc"]["before"] == table["before"]
    assert not (out / "posthoc/temperature").exists()
    assert "report" not in again
    # small features are saved unasked, so that a method that reads them can come later
    assert load_logits(out / "logits-test.safetensors").head is not None
    train_classifier(replace(fewer, save_features=False), out, device="cpu")
    assert load_logits(out / "logits-test.safetensors").features is None
    monkeypatch.setattr(training_loop, "FEATURE_BYTES", 1000)
    train_classifier(fewer, out, device="cpu")
    assert load_logits(out / "logits-test.safetensors").features is None
    train_classifier(replace(fewer, save_features=True), out, device="cpu")
    assert load_logits(out / "logits-test.safetensors").features is not None


def test_without_a_test_set_the_measures_are_those_of_the_validation_set(tmp_path):
    config = replace(CONFIG, test=None, posthoc=("temperature",), report=True)
    summary = train_classifier(config, tmp_path / "run", device="cpu")
    assert summary["posthoc"]["before"]["accuracy"] == pytest.approx(
        summary["validation"]["accuracy"], abs=1e-5
    )
    report = json.loads(Path(summary["report"]).with_suffix(".json").read_text())
    assert [model["name"] for model in report["models"]] == ["uncalibrated"]
    alone = replace(CONFIG, validation=0.0, posthoc=(), test=None, report=True)
    summary = train_classifier(alone, tmp_path / "alone", device="cpu")
    assert not {"posthoc", "report"} & set(summary)


def test_posthoc_settings_are_checked_before_training():
    with pytest.raises(ConfigError, match="fitted on validation images"):
        replace(CONFIG, validation=0.0, posthoc=("temperature",))
    with pytest.raises(ConfigError, match="did you mean temperature"):
        replace(CONFIG, posthoc=("temperatur",))
    with pytest.raises(ConfigError, match="settings of 'isotonic'"):
        replace(CONFIG, posthoc=("temperature",), posthoc_settings={"isotonic": {"scheme": "x"}})
    with pytest.raises(ConfigError, match="names no method"):
        replace(CONFIG, posthoc=(), posthoc_settings={"temperature": {}})


def test_presets_are_valid():
    losses = {"cifar10": "squared_error", "digits": "squared_error", "quickstart": "cross_entropy"}
    for name, loss in losses.items():
        text = (PRESETS / f"classifier-{name}.toml").read_text()
        config = build_config(TrainClassifierConfig, base=tomllib.loads(text))
        assert config.classifier.mixed.loss.name == loss
        assert config.report == (name != "quickstart")


def test_bad_input_is_named(published, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no published mixed data set"):
        train_classifier(
            replace(CONFIG, mixed=MixedSource(folder=str(tmp_path))), out, device="cpu"
        )
    with pytest.raises(ConfigError, match="rows 0 to 99999"):
        train_classifier(replace(CONFIG, rows=99999), out, device="cpu")
    with pytest.raises(DataError, match="the real images a, b"):
        read_mixed(MixedSource(folder=str(published)), ("a", "b"))
    with pytest.raises(ConfigError, match="validation must be a share"):
        replace(CONFIG, validation=1.0)
    assert not out.exists()
    file = published / "data" / "train-00000-of-00002.parquet"
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["soft_label"]), file)
    with pytest.raises(DataError, match="soft_label"):
        read_mixed(MixedSource(folder=str(published)), NAMES)
    file.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="cannot be read as a mixed data set"):
        read_mixed(MixedSource(folder=str(published)), NAMES)
