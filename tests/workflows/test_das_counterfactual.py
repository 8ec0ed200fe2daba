"""Retraining without images at toy size: models, distances, resumption, and what is refused."""

import json
import types

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from killing import kill_when
from launch import launch

from diffcal.cli import main
from diffcal.config import build_config
from diffcal.core.runs import read_json, sha256_file
from diffcal.data.sources import open_images
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.errors import ArtifactError, ConfigError, DataError
from diffcal.workflows import das
from diffcal.workflows.csm import csm_config, run_generation
from diffcal.workflows.das_counterfactual_models import (
    TrainedModel,
    drawn_images,
    train_and_draw,
)
from diffcal.workflows.das_redraw import ClassImages
from diffcal.workflows.train_diffusion import TrainDiffusionConfig, train_diffusion

TRAINING = [
    "optimizer.steps=3",
    "optimizer.batch_size=4",
    "optimizer.warmup_steps=1",
    "optimizer.ema_value=1.0",
    "network.model_channels=8",
    "network.channel_mult=[1]",
    "network.num_blocks=1",
    "save_every=1",
]
SMALL = [
    *(f"training.{setting}" for setting in TRAINING),
    "training.rows=20",
    "methods=['pixel-cosine']",
    "queries.count=2",
    "queries.sampler.steps=2",
    "remove=4",
    "together=1",
    "random_draws=2",
    "encoder.kind=pixels",
    "resamples=20",
]


def small(*more):
    return das.counterfactual_config("digits", (), [*SMALL, *more])


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    out = tmp_path_factory.mktemp("counterfactual") / "run"
    return out, das.counterfactual(small(), out, device="cpu")


def results(out):
    names = ("effects.parquet", "counterfactual.json", "counterfactual.md", "gallery.html")
    return {name: sha256_file(out / name) for name in names} | {
        path.stem: sha256_file(path) for path in sorted((out / "images").iterdir())
    }


def test_two_processes_write_the_bytes_of_one(experiment, tmp_path):
    out, summary = experiment
    flags = [flag for setting in SMALL for flag in ("--set", setting)]
    command = ["das", "counterfactual", "--preset", "digits", "--device", "cpu"]
    again = json.loads(launch(2, *command, *flags, "--out", str(tmp_path / "two")))
    assert results(tmp_path / "two") == results(out)
    assert again["pixel_l2"] == summary["pixel_l2"]


def test_models_lack_exactly_what_was_ranked_first(experiment):
    out, summary = experiment
    assert summary["models"] == 1 + 1 + 2 + 2
    removals = read_json(out / "removals.json")["pixel-cosine"]
    pixels = open_images("digits").images[:20].reshape(20, -1) / 127.5 - 1
    asked = drawn_images(out, "original").reshape(2, -1).numpy() / 127.5 - 1
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (asked, pixels)]
    # Features are kept in half precision: which images, not the order of near ties.
    for query, cosines in enumerate(unit[0] @ unit[1].T):
        assert len(set(removals[query])) == 4
        rest = [at for at in range(20) if at not in removals[query]]
        assert cosines[removals[query]].min() >= cosines[rest].max() - 1e-3
    for name, removed in (("pixel-cosine-00001", 4), ("random-001", 4), ("base", 0)):
        note = read_json(out / f"models/{name}/finished.json")
        assert note["images"] == 20 - removed
        assert not (out / f"models/{name}/state").exists()
    prints = {read_json(p)["data"] for p in out.glob("models/*/finished.json")}
    assert len(prints) == 5  # that of another seed has seen what the attributed one has
    # The attributed model is the one that nothing was removed from.
    assert torch.equal(drawn_images(out, "base"), drawn_images(out, "original"))


def test_distances_are_those_between_the_images(experiment):
    out, summary = experiment
    rows = pq.read_table(out / "effects.parquet").to_pylist()
    assert len(rows) == 2 * (2 + 2 + 1)
    original = drawn_images(out, "original").double()
    for row in rows:
        image = drawn_images(out, row["model"]).double()[row["query"]]
        expected = float((image - original[row["query"]]).norm()) / 127.5
        assert row["pixel_l2"] == pytest.approx(expected, rel=1e-9)
        assert row["own"] == (
            row["kind"] != "pixel-cosine" or row["model"][-1] == str(row["query"])
        )
    found = read_json(out / "counterfactual.json")
    by_kind = {row["kind"]: row for row in found["kinds"]}
    assert set(by_kind) == {"pixel-cosine", "random", "other seed"}
    for kind, values in by_kind.items():
        own = [row["pixel_l2"] for row in rows if row["kind"] == kind and row["own"]]
        assert values["pixel_l2"]["mean"] == pytest.approx(sum(own) / len(own))
        assert values["pixel_l2"]["mean"] > 0
        assert values["cosine"]["mean"] < 1
        assert summary["pixel_l2"][kind] == pytest.approx(values["pixel_l2"]["mean"], abs=1e-4)
    difference = found["against_random"][0]
    assert difference["pixel_l2"]["mean"] == pytest.approx(
        by_kind["pixel-cosine"]["pixel_l2"]["mean"] - by_kind["random"]["pixel_l2"]["mean"]
    )
    (own,) = found["own_against_other_queries"]
    mean = by_kind["pixel-cosine"]["pixel_l2"]["mean"]
    others = [r["pixel_l2"] for r in rows if r["kind"] == "pixel-cosine" and not r["own"]]
    assert own["pixel_l2"]["mean"] == pytest.approx(mean - sum(others) / 2)
    page = (out / "gallery.html").read_text("utf-8")
    # Each query: itself, one model of the method, two random ones, another seed, four removed images.
    assert page.count("data:image/png") == 2 * (1 + 1 + 2 + 1 + 4)
    words = (out / "counterfactual.md").read_text("utf-8")
    assert "| random | 2 |" in words
    assert "With 2 queries the intervals are too narrow" in words
    assert "With 2 queries the intervals are too narrow" in page


def test_killed_in_every_stage_the_results_are_the_same(experiment, tmp_path):
    whole, _ = experiment
    out = tmp_path / "run"
    for mark in (
        "models/base/state/step-*",
        "images/base.safetensors",
        "images/random-000.safetensors",
        "indexes/pixel-cosine/config.json",
        "scores/pixel-cosine/config.json",
        "removals.json",
        "models/pixel-cosine-00001/state/step-*",
    ):
        kill_when(
            lambda mark=mark: any(out.glob(mark)),
            lambda: das.counterfactual(small(), out, device="cpu"),
        )
    assert not (out / "counterfactual.json").exists()
    das.counterfactual(small(), out, device="cpu")
    assert results(out) == results(whole)
    # What is there is not made again.
    before = {path: path.stat().st_mtime_ns for path in out.glob("models/*/checkpoint/*")}
    das.counterfactual(small(), out, device="cpu")
    assert {path: path.stat().st_mtime_ns for path in out.glob("models/*/checkpoint/*")} == before
    assert results(out) == results(whole)


def test_processes_share_the_models_and_draw_the_same_bytes(experiment, tmp_path):
    whole, _ = experiment
    config, source = small(), open_images("digits")
    queries = ClassImages(2, source.class_names, config.queries.sampler)
    models = [TrainedModel("base", (), 42), TrainedModel("seed-1001", (), 1001)]
    for process in (1, 0):
        state = types.SimpleNamespace(
            process_index=process, num_processes=2, wait_for_everyone=lambda: None
        )
        arguments = (config.training, source, range(20), queries, state, "cpu")
        train_and_draw(models, tmp_path, *arguments, together=1, title="models")
        made = {path.stem for path in (tmp_path / "images").iterdir()}
        assert made == ({"seed-1001"} if process else {"base", "seed-1001"})
    for name in made:
        path = f"images/{name}.safetensors"
        assert sha256_file(tmp_path / path) == sha256_file(whole / path)


def test_models_trained_together_draw_the_same_images_up_to_rounding(experiment, tmp_path):
    whole, _ = experiment
    config = small("together=3", "training.optimizer.steps=3")
    kill_when(
        lambda: any(tmp_path.glob("models/groups/seed-1001/state/step-*")),
        lambda: das.counterfactual(config, tmp_path, device="cpu"),
    )
    das.counterfactual(config, tmp_path, device="cpu")
    for path in sorted((whole / "images").glob("*.safetensors")):
        found, expected = (drawn_images(out, path.stem).double() for out in (tmp_path, whole))
        assert float((found - expected).abs().max()) <= 1
    assert not any((tmp_path / "models/groups").iterdir())
    assert read_json(tmp_path / "removals.json") == read_json(whole / "removals.json")


def test_more_methods_are_added_without_training_again(experiment):
    out, _ = experiment
    before = (out / "images/base.safetensors").stat().st_mtime_ns
    summary = das.counterfactual(
        small("methods=['pixel-cosine','pixel-dot']", "encoder.kind=denoiser"), out, device="cpu"
    )
    assert summary["models"] == 8
    found = read_json(out / "counterfactual.json")
    assert [row["other"] for row in found["between_methods"]] == ["pixel-dot"]
    assert 0 <= found["common_to_methods"][0]["share"] <= 1
    assert (out / "images/base.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ArtifactError, match=r"remove: 4 there, 5 now"):
        das.counterfactual(small("remove=5"), out, device="cpu")


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A model of our own, images that it drew, and scores of these."""
    folder = tmp_path_factory.mktemp("scored")
    training = build_config(
        TrainDiffusionConfig, overrides=["rows=20", "weights=float32", "sample_steps=2", *TRAINING]
    )
    train_diffusion(training, folder / "model", device="cpu")
    source = str(folder / "model/checkpoint")
    plan = [
        f"generate.model.source={source}",
        "generate.plan.groups=2",
        "generate.plan.members=2",
        "generate.generation.sampler.steps=2",
    ]
    run_generation(csm_config(None, plan), folder / "run", device="cpu")
    config = das.das_config("pixel-cosine", [f"model.source={source}", "data.rows=20"])
    das.index(config, folder / "index", device="cpu")
    das.score(folder / "index", folder / "run", folder / "scores", top=6, device="cpu")
    return folder


def test_scores_of_ones_own_model_bring_its_recipe_and_its_queries(scored, tmp_path):
    overrides = ["remove=6", "random_draws=1", "methods=[]", "queries.count=3", "resamples=20"]
    config = das.counterfactual_config(
        None, [scored / "scores"], [*overrides, "encoder.kind=pixels"]
    )
    assert config.training.optimizer.steps == 3
    das.counterfactual(config, tmp_path / "out", device="cpu")
    found = read_json(tmp_path / "out/counterfactual.json")
    by_kind = {row["kind"]: row["pixel_l2"]["mean"] for row in found["kinds"]}
    # The recipe gives the very model again, which draws the very images.
    assert by_kind["retrained"] == 0
    assert by_kind["pixel-cosine"] > 0
    assert found["queries"] == 3
    ranked = pq.read_table(scored / "scores/scores.parquet").to_pylist()
    removals = read_json(tmp_path / "out/removals.json")["pixel-cosine"]
    assert removals[1] == [row["training"] for row in ranked if row["query"] == 1]


def test_what_cannot_be_retrained_or_drawn_again_is_refused(scored, tmp_path, capsys):
    def config(*overrides, scores=scored / "scores"):
        return das.counterfactual_config(None, [scores], ["methods=[]", *overrides])

    with pytest.raises(ConfigError, match="lists 6 training images for each query, 7 are to be"):
        das.counterfactual(config("remove=7"), tmp_path / "a", device="cpu")
    # Scores of held-out images: nobody knows their noise.
    index = scored / "index"
    das.score(index, "digits", tmp_path / "real", rows=2, top=6, device="cpu")
    with pytest.raises(DataError, match="their noise is not known"):
        das.counterfactual(
            config("remove=3", scores=tmp_path / "real"), tmp_path / "a", device="cpu"
        )
    two = das.counterfactual_config(
        None, [scored / "scores", tmp_path / "real"], ["methods=[]", "remove=3"]
    )
    with pytest.raises(ArtifactError, match="are of other queries than those in"):
        das.counterfactual(two, tmp_path / "a", device="cpu")
    # Models that do not tell their recipe, or were trained on other images than those indexed.
    bundled = das.das_config("pixel-cosine", ["model.source=bundled:digits", "data.rows=20"])
    das.index(bundled, tmp_path / "bundled", device="cpu")
    das.score(tmp_path / "bundled", scored / "run", top=6, device="cpu")
    with pytest.raises(ArtifactError, match="was trained with rows 1437, but the scores are of"):
        config(scores=tmp_path / "bundled/scores")
    manifest = read_json(scored / "scores/scores.json")
    assert load_denoiser(manifest["model"]["source"]).num_classes == 10
    with pytest.raises(ConfigError, match="give a preset or scores"):
        das.counterfactual_config("digits", [scored / "scores"])
    with pytest.raises(ArtifactError, match="holds no finished scores"):
        das.counterfactual_config(None, [tmp_path])
    for settings, message in (
        (["methods=['journey-trak']"], "needs queries of diffcal csm"),
        (["methods=['datamodels']"], "unknown method 'datamodels': use das"),
        (["methods=[]"], "give scores, or methods"),
        (["other_seeds=[42]"], "which is the seed of the attributed model"),
        (["training.initialise_from=bundled:digits"], "starts from weights which have seen"),
        (["queries.count=0"], "queries.count must be at least 1"),
        (["random_draws=0"], "remove, random_draws and together must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            small(*settings)
    arguments = ["das", "counterfactual", "--preset", "digits", "--remove", "300"]
    assert main([*arguments, "--device", "cpu", "--out", str(tmp_path / "z")]) == 2
    assert "cannot remove 300 of 300 training images" in capsys.readouterr().err
    assert not (tmp_path / "z").exists()


def test_damaged_results_are_named(experiment, scored, tmp_path):
    out, _ = experiment
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    path = copy / "images/random-001.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ArtifactError, match=r"random-001\.safetensors' is damaged"):
        das.counterfactual(small(), copy, device="cpu")
    path.unlink()
    das.counterfactual(small(), copy, device="cpu")
    assert sha256_file(path) == sha256_file(out / "images/random-001.safetensors")
    scores = tmp_path / "scores"
    shutil.copytree(scored / "scores", scores)
    table = scores / "scores.parquet"
    table.write_bytes(table.read_bytes()[:-9])
    config = das.counterfactual_config(None, [scores], ["methods=[]", "remove=3"])
    with pytest.raises(ArtifactError, match=r"scores\.parquet' is missing or damaged"):
        das.counterfactual(config, tmp_path / "out", device="cpu")
