"""The annotation stage on blends of real digits: columns, reuse, resumption, damage."""

import hashlib
import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from launch import launch

from diffcal.config import build_config
from diffcal.core.runs import write_json
from diffcal.data.images import encode_png
from diffcal.data.sources import open_images
from diffcal.diffusion.edm_denoiser import EDMDenoiser
from diffcal.diffusion.edm_networks import build_network
from diffcal.errors import ArtifactError, ConfigError, DataError
from diffcal.mixing.encoding import EncoderConfig
from diffcal.models.encoders import PixelEncoder
from diffcal.workflows.annotate import annotate_run
from diffcal.workflows.annotated_run import AnnotatedRun
from diffcal.workflows.annotation_config import AnnotationConfig, RealConfig

PIXELS = AnnotationConfig(
    encoder=EncoderConfig(kind="pixels"), real=RealConfig(rows=700), settings={"method": "lda"}
)
RELEASED = replace(PIXELS, annotator="projection_sigmoid", settings={})
MEMBERS = 5


def write_generated(run, groups=6, groups_per_shard=3, class_names=tuple("0123456789")):
    """Groups of pixel blends of two real digits: λ of one image, 1 - λ of the other."""
    _, images, labels = next(open_images("digits").batches(1797))
    rng = np.random.default_rng(0)
    folder, shards = run / "generated", []
    folder.mkdir(parents=True)
    for shard, start in enumerate(range(0, groups, groups_per_shard)):
        rows = []
        for group in range(start, min(start + groups_per_shard, groups)):
            classes = sorted(rng.choice(10, 2, replace=False).tolist())
            pair = [images[rng.choice(np.flatnonzero(labels == k))] for k in classes]
            for member, share in enumerate(np.linspace(0, 1, MEMBERS)):
                pixels = np.round(share * pair[0] + (1 - share) * pair[1]).astype(np.uint8)
                rows.append(
                    {
                        "id": group * MEMBERS + member,
                        "group": group,
                        "member": member,
                        "classes": classes,
                        "weights": [share, 1 - share],
                        "seed": 0,
                        "image": {"bytes": encode_png(pixels), "path": f"{group}.png"},
                        "height": 8,
                        "width": 8,
                    }
                )
        path = folder / f"shard-{shard:05d}.parquet"
        schema = pa.schema(
            [
                ("id", pa.int64()),
                ("group", pa.int64()),
                ("member", pa.int32()),
                ("classes", pa.list_(pa.int32())),
                ("weights", pa.list_(pa.float32())),
                ("seed", pa.int64()),
                ("image", pa.struct({"bytes": pa.binary(), "path": pa.string()})),
                ("height", pa.int32()),
                ("width", pa.int32()),
            ]
        )
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shards.append({"file": path.name, "rows": len(rows), "sha256": digest})
    manifest = {
        "format": "diffcal-generated/1",
        "class_names": list(class_names),
        "channels": 1,
        "groups": groups,
        "members": MEMBERS,
        "shards": shards,
    }
    write_json(folder / "manifest.json", manifest)
    return run


@pytest.fixture
def run(tmp_path):
    return write_generated(tmp_path / "run")


def annotated(run, name="kclass_posterior"):
    files = sorted((run / "annotations" / name).glob("shard-*.parquet"))
    return pa.concat_tables([pq.read_table(path) for path in files])


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def counting(monkeypatch):
    """How many images the encoder was given."""
    seen = []
    encode = PixelEncoder.encode

    def counted(self, images):
        seen.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(PixelEncoder, "encode", counted)
    return seen


def test_columns_of_blended_digits(run):
    summary = annotate_run(PIXELS, run, device="cpu")
    table = annotated(run)
    assert table["id"].to_pylist() == list(range(30))
    assert set(table["annotator"].to_pylist()) == {"kclass_posterior"}
    kinds = {name: str(table.schema.field(name).type) for name in table.column_names}
    assert kinds == {
        "id": "int64",
        "annotator": "string",
        "soft_label": "fixed_size_list<element: float>[10]",
        "lambda_hat": "float",
        "residual": "float",
        "third_mass": "float",
        "group_spearman": "float",
        "endpoint_ok": "bool",
        "nearest_cosine": "float",
    }
    labels = np.array(table["soft_label"].to_pylist())
    np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
    ratio = np.array(table["lambda_hat"].to_pylist()).reshape(-1, MEMBERS)
    # Features are linear in the blend, so re-estimated ratios are equally spaced in a group.
    np.testing.assert_allclose(np.diff(ratio, 2), 0, atol=0.02)
    assert bool((np.diff(ratio) > 0).all())
    assert set(table["group_spearman"].to_pylist()) == {1.0}
    ends = np.array(table["endpoint_ok"].to_pylist()).reshape(-1, MEMBERS)
    assert [value is None for value in ends[0]] == [False, True, True, True, False]
    # Ends are real images, found again among the real ones where those were used.
    nearest = np.array(table["nearest_cosine"].to_pylist()).reshape(-1, MEMBERS)
    assert nearest[:, [0, -1]].mean() > nearest[:, 2].mean()
    assert summary["images"] == 30
    assert summary["encoded_now"] == 730
    assert summary["report"]["held_out_accuracy"] > 0.8
    assert summary["quality"]["monotone"] == 1
    assert 0.5 < summary["quality"]["endpoint_ok"] <= 1
    opened = AnnotatedRun.open(run, "kclass_posterior")
    assert [opened.labels(*opened.verified(i)).num_rows for i in range(2)] == [15, 15]


def test_a_second_annotation_encodes_nothing_again_and_leaves_the_first(run, monkeypatch):
    seen = counting(monkeypatch)
    annotate_run(PIXELS, run, device="cpu")
    assert sum(seen) == 730
    before = contents(run / "annotations" / "kclass_posterior")
    summary = annotate_run(RELEASED, run, device="cpu")
    assert sum(seen) == 730
    assert summary["encoded_now"] == 0
    assert contents(run / "annotations" / "kclass_posterior") == before
    released = annotated(run, "projection_sigmoid")
    share = np.array(released["lambda_hat"].to_pylist())
    labels = np.array(released["soft_label"].to_pylist())
    classes = np.array(
        [
            row
            for f in sorted((run / "generated").glob("*.parquet"))
            for row in pq.read_table(f)["classes"].to_pylist()
        ]
    )
    found = labels[np.arange(30), classes[:, 0]]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-4 * (share - 0.5))), rtol=1e-4)
    # Two-class labels are silent about third classes; the probe is not.
    assert max(released["third_mass"].to_pylist()) > 0.01


def test_an_encoder_at_hand_goes_before_the_configured_one(run):
    nowhere = replace(PIXELS, encoder=EncoderConfig(kind="classifier", source="nowhere"))
    annotate_run(replace(nowhere, name="hand"), run, encoder=PixelEncoder((8, 8, 1)), device="cpu")
    annotate_run(PIXELS, run, device="cpu")
    labels = [annotated(run, name)["soft_label"] for name in ("hand", "kclass_posterior")]
    assert labels[0].equals(labels[1])
    manifest = json.loads((run / "annotations/hand/manifest.json").read_text("utf-8"))
    assert manifest["encoder"]["encoder"] == "pixels"


@pytest.mark.parametrize("stop_after", [1, 4, 8, 11])
def test_interrupted_anywhere_the_result_is_the_same(tmp_path, monkeypatch, stop_after):
    whole, broken = (write_generated(tmp_path / name) for name in ("whole", "broken"))
    annotate_run(RELEASED, whole, device="cpu")
    import diffcal.core.runs as runs

    real_replace, calls = runs.os.replace, []

    def replace_until(source, target):
        calls.append(target)
        if len(calls) > stop_after:
            raise KeyboardInterrupt
        real_replace(source, target)

    monkeypatch.setattr(runs.os, "replace", replace_until)
    with pytest.raises(KeyboardInterrupt):
        annotate_run(RELEASED, broken, device="cpu")
    monkeypatch.setattr(runs.os, "replace", real_replace)
    assert not (broken / "annotations/projection_sigmoid/manifest.json").exists()
    annotate_run(RELEASED, broken, device="cpu")
    assert contents(broken) == contents(whole)


def test_batch_size_changes_nothing_and_is_no_other_setting(tmp_path):
    small, large = (write_generated(tmp_path / name) for name in "ab")
    annotate_run(replace(PIXELS, batch_size=7), small, device="cpu")
    annotate_run(PIXELS, large, device="cpu")
    assert annotated(small).equals(annotated(large))
    annotate_run(replace(PIXELS, batch_size=9), small, device="cpu")


def test_other_settings_are_refused_by_name_unless_overwritten(run):
    annotate_run(RELEASED, run, device="cpu")
    other = replace(RELEASED, settings={"slope": 2.3})
    with pytest.raises(ArtifactError, match=r"settings\.slope: None there, 2\.3 now"):
        annotate_run(other, run, device="cpu")
    annotate_run(replace(other, name="cifar100"), run, device="cpu")
    first, second = (annotated(run, name) for name in ("projection_sigmoid", "cifar100"))
    assert not first["soft_label"].equals(second["soft_label"])
    annotate_run(other, run, device="cpu", overwrite=True)
    assert annotated(run, "projection_sigmoid")["soft_label"].equals(second["soft_label"])


def test_regenerated_images_are_not_given_old_labels(run):
    annotate_run(PIXELS, run, device="cpu")
    shutil.rmtree(run / "generated")
    write_generated(run, groups=6, groups_per_shard=2)
    with pytest.raises(ArtifactError, match="generated"):
        annotate_run(PIXELS, run, device="cpu")
    fresh = annotate_run(PIXELS, run, device="cpu", overwrite=True)
    assert fresh["encoded_now"] == 30
    assert len(annotated(run)) == 30


@pytest.mark.parametrize(
    "victim",
    [
        "generated/shard-00001.parquet",
        "annotations/kclass_posterior/shard-00000.parquet",
        "annotations/kclass_posterior/annotator/annotator.safetensors",
        "features/*/generated/shard-00001.safetensors",
        "features/*/real-*/shard-00000.safetensors",
    ],
)
@pytest.mark.parametrize("cut", [True, False])
def test_damaged_files_are_named(run, victim, cut):
    annotate_run(PIXELS, run, device="cpu")
    (path,) = run.glob(victim)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data[: len(data) // 2] if cut else data)
    again = PIXELS if "annotations" in victim else RELEASED
    with pytest.raises(ArtifactError, match=path.name):
        annotate_run(again, run, device="cpu")


def test_a_shard_lost_is_made_again(run):
    annotate_run(PIXELS, run, device="cpu")
    folder = run / "annotations/kclass_posterior"
    before = contents(folder)
    for name in ("shard-00001.parquet", "shard-00001.json"):
        (folder / name).unlink()
    annotate_run(PIXELS, run, device="cpu")
    assert contents(folder) == before


def test_people_calibrate_in_place_of_hard_labels(run, tmp_path):
    """People who are never more than 60 % sure make every label as unsure."""
    _, _, labels = next(open_images("digits").batches(1797))
    counts = np.full((1797, 10), 4)
    counts[np.arange(1797), labels] = 54
    np.save(tmp_path / "people.npy", counts)
    human = replace(PIXELS.real, human=str(tmp_path / "people.npy"))
    sure = annotate_run(PIXELS, run, device="cpu")["quality"]["top_probability"]
    unsure = annotate_run(replace(PIXELS, name="people", real=human), run, device="cpu")
    assert unsure["quality"]["top_probability"] < sure - 0.1
    assert unsure["report"]["temperature"] > 1.5
    for values, message in ((counts[:500], "cover rows 0 to 499"), (counts[:, :9], r"\(1797, 9\)")):
        np.save(tmp_path / "people.npy", values)
        with pytest.raises(DataError, match=message):
            annotate_run(
                replace(PIXELS, name="x" + message[:3].strip("\\("), real=human), run, device="cpu"
            )


def test_held_out_images_of_their_own(run):
    real = replace(PIXELS.real, held_out_name="digits", held_out_first_row=1500, held_out_rows=297)
    summary = annotate_run(replace(PIXELS, real=real), run, device="cpu")
    assert summary["encoded_now"] == 700 + 297 + 30
    assert summary["report"]["held_out_accuracy"] > 0.8


def tiny_denoiser():
    torch.manual_seed(0)
    specification = {
        "preconditioner": "EDMPrecond",
        "kwargs": {
            "img_resolution": 8,
            "img_channels": 1,
            "label_dim": 10,
            "model_type": "SongUNet",
            "model_channels": 8,
            "channel_mult": [1, 2],
            "num_blocks": 1,
            "attn_resolutions": [],
        },
    }
    return EDMDenoiser(build_network(specification))


def test_the_denoiser_as_encoder_and_stored_features(run):
    config = AnnotationConfig(
        real=RealConfig(rows=200),
        encoder=EncoderConfig(options={"sigmas": [0.3], "pool": "mean"}, unit_length=True),
        settings={"method": "lda"},
        store_features=True,
        feature_dtype="float16",
        nearest=False,
    )
    annotate_run(config, run, denoiser=tiny_denoiser(), device="cpu")
    table = annotated(run)
    assert table["nearest_cosine"].null_count == 30
    features = np.array(table["feature"].to_pylist(), dtype=np.float32)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=2e-3)
    errors = replace(
        config,
        annotator="diffusion_posterior",
        encoder=EncoderConfig(kind="denoising_errors", options={"sigmas": [0.5], "draws": 1}),
        settings={},
        store_features=False,
    )
    summary = annotate_run(errors, run, denoiser=tiny_denoiser(), device="cpu")
    assert summary["encoded_now"] == 230
    with pytest.raises(ConfigError, match="needs a denoiser"):
        annotate_run(config, run, device="cpu")


@pytest.mark.parametrize(("rows", "warned"), [(60, True), (200, False)])
def test_an_annotator_that_cannot_read_single_classes_is_named(run, caplog, rows, warned):
    # Four or five digits of a class are too few for its covariance; fifteen are enough.
    config = AnnotationConfig(
        encoder=PIXELS.encoder,
        settings=PIXELS.settings,
        real=RealConfig(rows=rows, held_out=0.25),
    )
    with caplog.at_level(logging.WARNING):
        summary = annotate_run(config, run, device="cpu")
    assert (summary["quality"]["endpoint_ok"] < 0.9) is warned
    assert ("images of a single class are recognised" in caplog.text) is warned


def test_groups_of_three_classes(tmp_path):
    run = write_generated(tmp_path / "run", groups=2)
    path = run / "generated/shard-00000.parquet"
    table = pq.read_table(path)
    names, n = table.column_names, len(table)
    three = pa.array([[0, 1, 2]] * n, pa.list_(pa.int32()))
    weights = pa.array([[0.5, 0.25, 0.25]] * n, pa.list_(pa.float32()))
    table = table.set_column(names.index("classes"), "classes", three)
    pq.write_table(table.set_column(names.index("weights"), "weights", weights), path)
    manifest = json.loads((run / "generated/manifest.json").read_text())
    manifest["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_json(run / "generated/manifest.json", manifest)
    annotate_run(PIXELS, run, device="cpu")
    table = annotated(run)
    assert table["lambda_hat"].null_count == table["endpoint_ok"].null_count == n
    assert table["residual"].null_count == 0
    with pytest.raises(DataError, match="mixes 3 classes"):
        annotate_run(RELEASED, run, device="cpu")


def test_bad_settings_end_before_any_work(run, tmp_path):
    for wrong, message in (
        ({"annotator": "kclass"}, "did you mean"),
        ({"settings": {"slope": 1}}, "no setting 'slope'"),
        ({"name": "../x"}, "plain folder name"),
        ({"batch_size": 0}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(PIXELS, **wrong)
    with pytest.raises(ConfigError, match="share in"):
        RealConfig(held_out=1.0)
    for encoder, message in (
        (EncoderConfig(kind="classifier"), "needs a source"),
        (EncoderConfig(kind="pixels", options={"sigma": 1}), "sigma"),
    ):
        with pytest.raises(ConfigError, match=message):
            annotate_run(replace(PIXELS, encoder=encoder), run, device="cpu")
    with pytest.raises(ConfigError, match="rows 0 to 1800"):
        annotate_run(replace(PIXELS, real=RealConfig(rows=1800)), run, device="cpu")
    with pytest.raises(ArtifactError, match="does not exist"):
        annotate_run(PIXELS, tmp_path, device="cpu")
    other = write_generated(tmp_path / "other", class_names=("cat", "dog"))
    with pytest.raises(DataError, match="mix 2 classes"):
        annotate_run(PIXELS, other, device="cpu")
    assert not (run / "annotations").exists()
    parsed = build_config(
        AnnotationConfig, overrides=["encoder.kind=pixels", "settings.method=lda", "real.rows=50"]
    )
    assert parsed == replace(PIXELS, real=RealConfig(rows=50))


def test_two_processes_write_what_one_writes(tmp_path):
    one, two = (write_generated(tmp_path / name, groups=7, groups_per_shard=2) for name in "ab")
    whole = annotate_run(PIXELS, one, device="cpu")
    settings = ["encoder.kind=pixels", "settings.method=lda", "real.rows=700"]
    overrides = [f"--set=annotation.{setting}" for setting in settings]
    half = json.loads(launch(2, "csm", "annotate", str(two), "--device=cpu", *overrides))
    assert half["processes"] == 2
    assert half["encoded_now"] < whole["encoded_now"]
    assert contents(two) == contents(one)
