"""Attribution as a user runs it, on the bundled digits: index, score, explain, and what is refused."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from launch import launch
from mixed_run import make_run
from PIL import Image

from diffcal.attribution.feature_store import FeatureStore
from diffcal.attribution.featurise import Featuriser
from diffcal.cli import main
from diffcal.core.runs import sha256_file
from diffcal.data.images import encode_png
from diffcal.data.sources import open_images
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.edm_denoiser import EDMDenoiser
from diffcal.errors import ArtifactError, ConfigError, DataError
from diffcal.workflows import das
from diffcal.workflows.das_gallery import draw_gallery
from diffcal.workflows.das_images import open_queries
from diffcal.workflows.das_index import AttributionIndex
from diffcal.workflows.das_report import load_explanations
from diffcal.workflows.das_score import QueryConfig, ScoreRunConfig, score_queries

SMALL = [
    "data.rows=60",
    "features.timesteps=[400]",
    "features.functional=mean",
    "features.combine=mean",
    "features.params=dec.8x8_block1",
    "features.projection.dim=128",
    "store.shard_rows=12",
]
FLAGS = [f"--set={override}" for override in SMALL]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("das") / "index"
    das.index(das.das_config("digits", SMALL), folder, device="cpu")
    return folder


def hashes(folder):
    files = [*folder.glob("features/*.safetensors"), *folder.glob("*.*")]
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def rows_of(path):
    return pq.read_table(path).to_pylist()


def test_scores_are_those_of_the_formula_on_the_stored_features(index, tmp_path):
    summary = das.score(index, "digits", tmp_path / "s", top=60, rows=5, device="cpu")
    phi = FeatureStore.open(index / "features").rows().double()
    (queries,) = (index / "queries").iterdir()
    psi = FeatureStore.open(queries).rows().double()
    gram = phi.T @ phi
    damping = 20.0 * torch.linalg.eigvalsh(gram)[:-1].sum() / 59
    scores = (psi @ torch.linalg.solve(gram + damping * torch.eye(128).double(), phi.T)).square()
    rows = rows_of(tmp_path / "s/scores.parquet")
    found = torch.zeros(5, 60, dtype=torch.float64)
    for row in rows:
        found[row["query"], row["training"]] = row["score"]
    torch.testing.assert_close(found, scores, rtol=1e-3, atol=1e-6 * float(scores.max()))
    for query in range(5):
        mine = [row for row in rows if row["query"] == query]
        assert [row["rank"] for row in mine] == list(range(1, 61))
        assert mine[0]["training"] == query  # a training image matters most to itself
        assert mine[0]["likeness"] == pytest.approx(1, abs=1e-5)
        assert sum(row["share"] for row in mine) == pytest.approx(1, abs=1e-5)
    report = rows_of(tmp_path / "s/queries.parquet")
    assert [row["copy_of"] for row in report] == [row["nearest"] for row in report] == [*range(5)]
    labels = open_images("digits").labels[:60]
    classes = json.loads((tmp_path / "s/scores.json").read_text())["groups"]["class"]
    zero = next(group for group in classes if group["name"] == "0")
    expected = (scores[:, labels == 0].sum(1) / scores.sum(1)).mean()
    assert zero["share"] == pytest.approx(float(expected), rel=1e-3)
    assert summary["first_is_near"] == 1


def test_the_picture_of_a_gallery_holds_the_images(index, tmp_path):
    das.score(index, "digits", tmp_path / "s", top=4, rows=3, device="cpu")
    items = load_explanations(tmp_path / "s", top=4)
    data = draw_gallery(items[:2], top=3, nearest=2)
    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.asarray(picture.convert("L"))
    # A row of pictures is the query, its contributors and its neighbours; each has black pixels.
    band = (pixels[45:130] < 8).any(axis=0)
    assert (np.diff(band.astype(int)) == 1).sum() >= 1 + 3 + 2
    assert data == draw_gallery(items[:2], top=3, nearest=2)
    with pytest.raises(ConfigError, match="at least one"):
        draw_gallery([])


def test_gallery_shows_the_query_its_contributors_and_its_neighbours(index, tmp_path):
    das.score(index, "digits", tmp_path / "s", top=7, rows=4, device="cpu")
    page = (tmp_path / "s/gallery.html").read_text("utf-8")
    assert page.count("data:image/png") == 4 * (1 + 7 + 8)
    row = rows_of(tmp_path / "s/scores.parquet")[0]
    words = f"#{row['training']} · 0 {100 * row['share']:.1f} %"
    assert words in page.replace("\u00a0", " ")
    das.explain(tmp_path / "s", ["2"], top=3, out=tmp_path / "two.html")
    page = (tmp_path / "two.html").read_text("utf-8")
    assert page.count("data:image/png") == 1 + 3 + 3
    assert "http://" not in page
    with pytest.raises(ConfigError, match="'99' was not scored; ids are 0, 1, 2"):
        das.explain(tmp_path / "s", ["99"])


def test_signed_scores_list_opponents_and_cost_no_gradients(index, tmp_path):
    das.score(index, "digits", tmp_path / "first", rows=4, device="cpu")
    config = das.score_config(index, "digits", ["scores.readout=signed", "queries.rows=4"])
    summary = score_queries(index, config, tmp_path / "signed", device="cpu")
    assert summary["featurised_now"] == 0
    assert "Most opposing" in (tmp_path / "signed/gallery.html").read_text("utf-8")
    lowest = rows_of(tmp_path / "signed/lowest.parquet")
    assert min(row["score"] for row in lowest) < 0
    squares = {
        (row["query"], row["training"]): row["score"]
        for row in rows_of(tmp_path / "first/scores.parquet")
    }
    top = rows_of(tmp_path / "signed/scores.parquet")[0]
    assert squares[top["query"], top["training"]] == pytest.approx(top["score"] ** 2, rel=1e-4)


def test_mixed_images_are_conditioned_on_the_weights_they_were_drawn_with(tmp_path):
    run = make_run(tmp_path / "run", groups=2, members=5)
    denoiser = load_denoiser("bundled:digits")
    queries = open_queries(str(run), denoiser, rows=4, stride=2)
    assert queries.ids == (0, 2, 4, 6)
    table = pq.read_table(run / "generated/shard-00000.parquet").to_pylist()
    for at, row in enumerate(table[0:8:2]):
        weights = torch.zeros(10)
        weights[row["classes"]] = torch.tensor(row["weights"])
        torch.testing.assert_close(queries.weights[at], weights)
    assert re.fullmatch(r"0\.50 · \d \+ 0\.50 · \d", queries.captions[1])
    torch.testing.assert_close(queries.condition(denoiser, [1]), queries.weights[1:2])


def test_files_without_labels_need_the_unconditional_branch(index, tmp_path):
    folder = tmp_path / "loose"
    folder.mkdir()
    for row in (1, 2):
        Image.fromarray(open_images("digits").images[row, :, :, 0]).save(folder / f"{row}.png")
    with pytest.raises(ConfigError, match="have no labels, but the model is conditioned on 10"):
        das.score(index, folder, tmp_path / "s", device="cpu")
    config = ScoreRunConfig(queries=QueryConfig(name=str(folder), unconditional=True))
    score_queries(index, config, tmp_path / "s", device="cpu")
    assert [row["query"] for row in rows_of(tmp_path / "s/queries.parquet")] == ["1.png", "2.png"]
    assert rows_of(tmp_path / "s/queries.parquet")[0]["nearest"] == 1


def test_one_image_file_or_a_glob_of_them_is_explained(tmp_path):
    denoiser = load_denoiser("bundled:digits")
    digits = open_images("digits").images
    for row in (2, 0, 1):
        Image.fromarray(digits[row, :, :, 0]).save(tmp_path / f"drawn [{row}].png")
    one = open_queries(str(tmp_path / "drawn [2].png"), denoiser, unconditional=True)
    assert one.ids == ("drawn [2].png",)
    np.testing.assert_array_equal(one.images([0]).numpy(), digits[2:3])
    some = open_queries(str(tmp_path / "drawn*[[]?].png"), denoiser, unconditional=True)
    assert some.ids == ("drawn [0].png", "drawn [1].png", "drawn [2].png")
    np.testing.assert_array_equal(some.images([0, 1, 2]).numpy(), digits[:3])
    with pytest.raises(ConfigError, match="have no labels"):
        open_queries(str(tmp_path / "drawn [2].png"), denoiser)


def test_killed_and_by_two_processes_the_bytes_are_the_same(index, tmp_path):
    environment = os.environ | {"DIFFCAL_PROGRESS": "0", "OMP_NUM_THREADS": "1"}
    command = ["das", "index", "--preset", "digits", "--device", "cpu", *FLAGS]
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "diffcal", *command, "--out", str(killed)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 200
    while not [*killed.glob("features/features-*.json")] and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "manifest.json").exists()
    with pytest.raises(ArtifactError, match="was not finished: run diffcal das index again"):
        das.score(killed, "digits", rows=2, device="cpu")
    # Two processes finish what one began.
    summary = json.loads(launch(2, *command, "--out", str(killed)))
    assert summary["processes"] == 2
    assert 0 < summary["featurised_now"] < 60
    assert hashes(killed) == hashes(index)
    assert len(hashes(index)) == 5 + 4  # configuration, manifest, kernel and its note


def test_an_index_from_before_timesteps_could_be_stacked_is_opened(index, tmp_path):
    old = tmp_path / "old"
    shutil.copytree(index, old)
    manifest = json.loads((old / "manifest.json").read_text())
    assert manifest["config"]["features"].pop("combine") == "mean"
    (old / "manifest.json").write_text(json.dumps(manifest))
    das.score(old, "digits", tmp_path / "s", rows=1, device="cpu")


def test_another_model_and_changed_images_are_refused_by_name(index, tmp_path):
    network = load_denoiser("bundled:digits").network
    with torch.no_grad():
        next(network.parameters()).mul_(1.01)
    other = EDMDenoiser(network)  # anew: a fingerprint is computed once
    other._fingerprint = None  # type checks of the test run have asked for it already
    config = das.das_config("digits", SMALL)
    before = hashes(index)
    with pytest.raises(ArtifactError, match=r"\(model: '\w+' there, '\w+' here\)"):
        das.score(index, "digits", tmp_path / "s", rows=2, denoiser=other, device="cpu")
    with pytest.raises(ArtifactError, match=r"other settings \(model: "):
        das.index(config, index, denoiser=other, device="cpu")
    changed = das.das_config("digits", [*SMALL, "features.timesteps=[300]"])
    with pytest.raises(ArtifactError, match=r"timesteps: \[400\] there, \[300\] now"):
        das.index(changed, index, device="cpu")
    source = open_images("digits")
    images = source.images[:60].copy()
    images[7, 0, 0] = 1
    cells = [{"bytes": encode_png(image), "path": None} for image in images]
    path = tmp_path / "changed.parquet"
    pq.write_table(pa.table({"image": cells, "label": source.labels[:60].astype(np.int64)}), path)
    arguments = ["das", "score", "--index", str(index), "--queries", "digits", "--rows", "2"]
    assert main([*arguments, "--data", str(path), "--out", str(tmp_path / "s")]) == 2
    with pytest.raises(ArtifactError, match=r"images\.fingerprint: "):
        das.index(das.das_config("digits", [*SMALL, f"data.name={path}"]), index, device="cpu")
    assert hashes(index) == before


def test_a_damaged_shard_is_named(index, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(index, copy)
    path = copy / "features/features-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 255
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"features-00001\.safetensors' does not match"):
        das.score(copy, "digits", rows=2, device="cpu")


def test_methods_by_name():
    assert das.das_config().features.projection.kind == "sjlt"
    published = das.das_config("das-official")
    assert (published.features.noise, published.scores.residual) == ("slot", "released")
    mixed = das.das_config("digits", ["method=dtrak", "features.projection.dim=64"])
    assert mixed.features.functional == "mean-squared-l2-norm"
    assert (mixed.scores.readout, mixed.features.projection.dim) == ("signed", 64)
    assert (mixed.data.rows, mixed.features.projection.seed) == (1437, 42)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "--preset", "digit"], "unknown preset 'digit'; known: das, das-signs, das-mean"),
        (["index", "--set", "method=datamodels"], "unknown method 'datamodels': use das"),
        (["index", "--set", "features.timestep=3"], "did you mean 'timesteps'"),
        (["index", "--model", "nowhere"], "checkpoint 'nowhere' is missing"),
        (["index", "--preset", "digits", "--data", "gone.parquet"], "gone.parquet"),
        (["score", "--index", "nowhere", "--queries", "digits"], "'nowhere' is not an index"),
    ],
)
def test_bad_settings_end_in_one_line(arguments, message, tmp_path, capsys):
    assert main(["das", *arguments, "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("diffcal: ")


def test_classes_of_the_images_must_be_those_of_the_model(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / name / "0.png")
    with pytest.raises(DataError, match=r"has the classes cat, dog \(2\), the model 0, 1, 2"):
        open_queries(str(tmp_path), load_denoiser("bundled:digits"))


def test_a_loss_of_ones_own_goes_through_every_stage_under_its_name(index, tmp_path):
    def huber(outputs):
        error = torch.nn.functional.huber_loss(outputs.prediction, outputs.target, reduction="none")
        return error.flatten(1).mean(1)

    mine = das.NamedFunctional("huber/1", huber)
    out, config = tmp_path / "index", das.das_config("digits", [*SMALL, "data.rows=12"])
    das.index(config, out, functional=mine, device="cpu")
    das.score(out, "digits", rows=3, functional=mine, device="cpu")
    phi = FeatureStore.open(out / "features")
    assert phi.spec["functional"] == "custom:huber/1"
    # By hand: the gradient of the callable at one image.
    denoiser = load_denoiser("bundled:digits")
    featuriser = Featuriser(
        denoiser,
        dataclasses.replace(config.features, functional="custom"),
        functional=huber,
        method="loop",
    )
    images = open_queries("digits", denoiser, rows=2)
    rows = featuriser(
        denoiser.encode(images.images(range(2))), range(2), images.condition(denoiser, range(2))
    )
    torch.testing.assert_close(phi.rows()[:2], rows.vectors, rtol=2e-3, atol=1e-4)
    assert not torch.allclose(
        phi.rows(), FeatureStore.open(index / "features").rows()[:12], atol=1e-2
    )
    # The same command goes on; another name is refused with the field, and so is none.
    das.index(config, out, functional=mine, device="cpu")
    other = das.NamedFunctional("huber/2", huber)
    with pytest.raises(
        ArtifactError, match=r"functional: 'custom:huber/1' there, 'custom:huber/2'"
    ):
        das.index(config, out, functional=other, device="cpu")
    with pytest.raises(ArtifactError, match=r"functional: .*'custom:huber/1'"):
        das.score(out, "digits", rows=3, functional=other, device="cpu")
    with pytest.raises(ArtifactError, match=r"functional: .*'mean'"):
        das.score(index, "digits", rows=3, functional=mine, device="cpu")
    with pytest.raises(ConfigError, match="'custom:huber/1' is a callable: give it in Python"):
        das.score(out, "digits", rows=3, device="cpu")
    assert main(["das", "score", "--index", str(out), "--queries", "digits", "--rows", "3"]) == 2
    with pytest.raises(ConfigError, match="needs a name"):
        das.NamedFunctional(" ", huber)
    with pytest.raises(ConfigError, match="takes no gradients"):
        das.index(das.das_config("pixel-dot"), tmp_path / "p", functional=mine, device="cpu")
    with pytest.raises(ConfigError, match="the callable's 'huber/2'"):
        Featuriser(
            denoiser,
            dataclasses.replace(config.features, functional="custom:huber/1"),
            functional=other,
        )


def test_how_gradients_are_computed_is_a_setting(index, tmp_path):
    how = ["channels_last=true", "unknown=refuse", "batch_rows=7", "data.rows=12"]
    das.index(das.das_config("digits", [*SMALL, *how]), tmp_path / "i", device="cpu")
    found = AttributionIndex.open(tmp_path / "i", device="cpu")
    weights = [p for p in found.denoiser.module.parameters() if p.ndim == 4 and min(p.shape) > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    expected = FeatureStore.open(index / "features").rows()[:12]
    torch.testing.assert_close(found.store.rows(), expected, rtol=2e-3, atol=2e-4)
    with pytest.raises(ConfigError, match=r"unknown.*skip"):
        das.index(das.das_config("digits", ["unknown=skip"]), tmp_path / "j", device="cpu")
