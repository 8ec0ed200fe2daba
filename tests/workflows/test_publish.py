"""A run becomes a data set: content, bytes, interruptions, damaged inputs."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_run import NAMES, blended_digits, make_run, sign

import diffcal.data.soft_label_writer as writer
import diffcal.workflows.previews as previews
import diffcal.workflows.publish as publish
from diffcal.data.images import decode_image, encode_png
from diffcal.data.soft_labels import SoftLabelSet
from diffcal.errors import ArtifactError, ConfigError, DataError
from diffcal.mixing.quality import FilterConfig
from diffcal.workflows.publish import publish_dataset

FILTER = FilterConfig(max_residual=0.9, min_group_spearman=0.6, require_endpoints=True)


@pytest.fixture(scope="module", autouse=True)
def plain_pictures():
    """Stand-ins for the pictures, which are drawn for real in one test below."""
    picture = encode_png(np.zeros((1, 1, 1), np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_ladder", "draw_ratios", "draw_class_balance"):
            patch.setattr(publish, name, lambda *_: picture)
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A run of 12 groups of 5 images in 3 shards, published as it is; do not write into it."""
    run = make_run(tmp_path_factory.mktemp("original") / "run")
    return run, publish_dataset(run, "blend")


@pytest.fixture
def run(original, tmp_path):
    shutil.copytree(original[0], tmp_path / "run", ignore=shutil.ignore_patterns("dataset"))
    return tmp_path / "run"


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_datasets_opens_it_with_the_right_features(original, tmp_path):
    import datasets

    run, summary = original
    assert (summary["images"], summary["generated"], summary["shards"]) == (60, 60, 3)
    opened = datasets.load_dataset(
        str(run / "dataset"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(opened.features["image"], datasets.Image)
    assert opened.features["label"] == datasets.ClassLabel(names=list(NAMES))
    assert opened.features["soft_label"].length == 10
    columns, annotation = blended_digits(12, 5)
    assert opened["id"][:] == columns["id"]
    for row in (0, 23, 59):
        item = opened[row]
        wanted = decode_image(columns["image"][row]["bytes"], "test")[:, :, 0]
        np.testing.assert_array_equal(np.array(item["image"]), wanted)
        np.testing.assert_array_equal(
            np.float32(item["soft_label"]), np.float32(annotation["soft_label"][row])
        )
        assert item["label"] == int(np.argmax(annotation["soft_label"][row]))
        assert item["classes"] == columns["classes"][row]
        assert item["lambda"] == item["weights"][0] == columns["weights"][row][0]
        assert item["lambda_hat"] == np.float32(annotation["lambda_hat"][row])
        assert item["endpoint_ok"] is annotation["endpoint_ok"][row]


def test_statistics_are_those_of_the_images(original):
    _, annotation = blended_digits(12, 5)
    soft = np.array(annotation["soft_label"])
    statistics = original[1]["statistics"]
    entropy = -(soft * np.log(soft)).sum(axis=1)
    assert statistics["means"]["entropy"] == pytest.approx(entropy.mean(), abs=1e-6)
    assert statistics["images_per_class"] == np.bincount(soft.argmax(1), minlength=10).tolist()
    np.testing.assert_allclose(statistics["mass_per_class"], soft.sum(axis=0), atol=1e-4)
    estimates = np.array(annotation["lambda_hat"]).reshape(12, 5)
    found = [(row["ratio"], row["images"], row["estimate_mean"]) for row in statistics["ratios"]]
    wanted = estimates.mean(axis=0)
    for member, (ratio, images, mean) in enumerate(found):
        assert (ratio, images) == (member / 4, 12)
        assert mean == pytest.approx(wanted[member], abs=1e-6)
    known = [v for v in annotation["nearest_cosine"] if v is not None]
    assert statistics["means"]["nearest_cosine"] == pytest.approx(np.mean(known), abs=1e-6)


def test_filter_keeps_what_its_thresholds_say(run):
    summary = publish_dataset(run, "blend", FILTER)
    _, annotation = blended_digits(12, 5)
    residual = np.float32(annotation["residual"]) <= 0.9
    ordered = np.float32(annotation["group_spearman"]) >= 0.6
    endpoint = np.array([ok is not False for ok in annotation["endpoint_ok"]])
    keep = residual & ordered & endpoint
    published = SoftLabelSet(run / "dataset")
    ids = published.columns(["id"])["id"].to_pylist()
    assert ids == np.flatnonzero(keep).tolist()
    assert 0 < len(ids) < 60
    assert summary["dropped"] == {
        "max_residual": int((~residual).sum()),
        "min_group_spearman": int((~ordered).sum()),
        "require_endpoints": int((~endpoint).sum()),
    }
    card = (run / "dataset" / "README.md").read_text()
    assert f"| `max_residual` | 0.9 | {int((~residual).sum())} |" in card
    # images and labels stay together through the filter
    columns, _ = blended_digits(12, 5)
    for row, number in enumerate(ids):
        assert published.image_bytes(row) == columns["image"][number]["bytes"]
        np.testing.assert_array_equal(
            published.soft_label(row).numpy(), np.float32(annotation["soft_label"][number])
        )


def test_a_shard_without_kept_images_has_no_file(run):
    path = run / "annotations" / "blend" / "shard-00001.parquet"
    table = pq.read_table(path)
    bad = pa.array([9.0] * len(table), pa.float32())
    index = table.schema.get_field_index("residual")
    pq.write_table(table.set_column(index, "residual", bad), path)
    sign(path.parent)
    summary = publish_dataset(run, "blend", FilterConfig(max_residual=5.0))
    assert summary["shards"] == 2
    names = sorted(p.name for p in (run / "dataset" / "data").iterdir())
    assert names == ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert len(SoftLabelSet(run / "dataset")) == 40


def test_the_same_run_gives_the_same_bytes(original, run):
    publish_dataset(run, "blend")
    assert digests(run / "dataset") == digests(original[0] / "dataset")


def test_row_groups_shrink_with_large_images_and_lose_nothing(run, monkeypatch, original):
    monkeypatch.setattr(writer, "ROW_GROUP_BYTES", 350)
    publish_dataset(run, "blend", FILTER)
    file = pq.ParquetFile(next((run / "dataset" / "data").iterdir()))
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert max(sizes) < 4
    assert len(sizes) > 1
    ids = SoftLabelSet(run / "dataset").columns(["id"])["id"].to_pylist()
    publish_dataset(original[0], "blend", FILTER, out=run / "other")
    assert ids == SoftLabelSet(run / "other").columns(["id"])["id"].to_pylist()


KILLER = """
import os, signal, sys
from pathlib import Path
import diffcal.core.runs as runs
calls, limit, replace = 0, int(sys.argv[2]), os.replace
def counting(*args):
    global calls
    calls += 1
    if calls > limit:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
runs.os.replace = counting
from diffcal.workflows.publish import publish_dataset
publish_dataset(Path(sys.argv[1]), "blend")
"""


def test_killed_and_started_again_it_is_the_same(original, run):
    """SIGKILL with the third shard written beside its place, not yet renamed."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(run), "3"],
        capture_output=True,
        env=os.environ | {"DIFFCAL_PROGRESS": "0"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    data = run / "dataset" / "data"
    assert len(list(data.glob("train-*.parquet"))) == 2
    assert len(list(data.glob(".*.partial"))) == 1
    first = data / "train-00000-of-00003.parquet"
    before = first.stat().st_mtime_ns
    publish_dataset(run, "blend")
    assert digests(run / "dataset") == digests(original[0] / "dataset")
    assert first.stat().st_mtime_ns == before


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 13))
def test_stopped_before_any_rename_it_continues(original, tmp_path_factory, limit):
    run, out = original[0], tmp_path_factory.mktemp("stopped") / "dataset"
    real, calls = os.replace, 0

    def failing(*paths):
        nonlocal calls
        calls += 1
        if calls > limit:
            raise OSError(28, "No space left on device")
        real(*paths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffcal.core.runs.os.replace", failing)
        with contextlib.suppress(ArtifactError):
            publish_dataset(run, "blend", out=out)
    publish_dataset(run, "blend", out=out)
    assert digests(out) == digests(run / "dataset")


def test_a_damaged_output_is_written_again(original, run, caplog):
    publish_dataset(run, "blend")
    path = run / "dataset" / "data" / "train-00001-of-00003.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        publish_dataset(run, "blend")
    assert "is damaged and will be written again" in caplog.text
    assert digests(run / "dataset") == digests(original[0] / "dataset")


def test_other_settings_in_the_same_folder_are_refused(original, run):
    publish_dataset(run, "blend")
    with pytest.raises(ArtifactError, match=r"filter.max_residual: None there, 0.9 now"):
        publish_dataset(run, "blend", FILTER)
    assert digests(run / "dataset") == digests(original[0] / "dataset")
    publish_dataset(run, "blend", FILTER, overwrite=True)
    publish_dataset(run, "blend", overwrite=True)
    assert digests(run / "dataset") == digests(original[0] / "dataset")


@pytest.mark.parametrize("stage", ["generated", "annotations/blend"])
def test_a_damaged_shard_is_refused_before_anything_is_written(run, stage):
    path = run / stage / "shard-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ArtifactError, match=r"shard-00001.parquet' is damaged: its SHA-256"
    ) as error:
        publish_dataset(run, "blend")
    assert "\n" not in str(error.value)
    assert not (run / "dataset").exists()
    path.unlink()
    with pytest.raises(ArtifactError, match=r"shard-00001.parquet' is missing"):
        publish_dataset(run, "blend")


def test_inputs_that_do_not_belong_together_are_named(run):
    with pytest.raises(ConfigError, match="has no annotation 'clip'; it has blend"):
        publish_dataset(run, "clip")
    with pytest.raises(ConfigError, match=r"has no annotation '\.\./blend'"):
        publish_dataset(run, "../blend")
    with pytest.raises(DataError, match=r"keeps none of 60 images .max_residual refuses 60"):
        publish_dataset(run, "blend", FilterConfig(max_residual=0.0))
    annotations = run / "annotations" / "blend"
    path = annotations / "shard-00002.parquet"
    table = pq.read_table(path)
    index = table.schema.get_field_index("soft_label")
    halves = pa.array((np.float32(table["soft_label"].to_pylist()) / 2).tolist())
    pq.write_table(table.set_column(index, "soft_label", halves), path)
    sign(annotations)
    with pytest.raises(ArtifactError, match=r"row 0: the soft label is no distribution"):
        publish_dataset(run, "blend")
    swapped = table.set_column(0, "id", pa.array(table["id"].to_pylist()[::-1]))
    pq.write_table(swapped, path)
    sign(annotations)
    with pytest.raises(ArtifactError, match="does not annotate the images of"):
        publish_dataset(run, "blend")
    pq.write_table(table.drop_columns(["third_mass"]), path)
    sign(annotations)
    with pytest.raises(ArtifactError, match="lacks the columns third_mass"):
        publish_dataset(run, "blend")
    pq.write_table(table.slice(1), path)
    sign(annotations)
    with pytest.raises(ArtifactError, match=r"covers 59 images in 3 shards.*has 60 in 3"):
        publish_dataset(run, "blend")
    manifest = json.loads((annotations / "manifest.json").read_text())
    (annotations / "manifest.json").write_text(json.dumps(manifest | {"format": "else/1"}))
    with pytest.raises(ArtifactError, match="is of format 'else/1', expected 'diffcal-ann"):
        publish_dataset(run, "blend")


def test_previews_are_listed_and_shown(run, monkeypatch):
    for name in ("draw_ladder", "draw_ratios", "draw_class_balance"):
        monkeypatch.setattr(publish, name, getattr(previews, name))
    publish_dataset(run, "blend")
    folder = run / "dataset"
    card = (folder / "README.md").read_text()
    assert "different groups" not in card
    listed = json.loads((folder / "manifest.json").read_text())["previews"]
    names = [preview["file"] for preview in listed]
    assert names == [
        *(f"previews/ladder-{number}.png" for number in range(6)),
        "previews/ratios.png",
        "previews/classes.png",
    ]
    for preview in listed:
        pixels = decode_image((folder / preview["file"]).read_bytes(), "preview")
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 10
        assert f"]({preview['file']})" in card


def test_nothing_is_read_of_other_shards_while_one_is_written(run, monkeypatch):
    """One shard's labels and one row group of images are held at a time."""
    sizes = []
    real = publish.write_rows

    def recording(images, table, *rest):
        sizes.append((images.name, len(table)))
        real(images, table, *rest)

    monkeypatch.setattr(publish, "write_rows", recording)
    publish_dataset(run, "blend", replace(FILTER, require_endpoints=False))
    assert sizes == [(f"shard-{number:05d}.parquet", 20) for number in range(3)]
