"""The LDS experiment at toy size: models, losses, tables, resumption, and what is refused."""

import dataclasses
import json

import pytest
import torch
from accelerate import PartialState
from launch import launch
from safetensors.torch import load_file

from diffcal.attribution.feature_store import FeatureStore
from diffcal.attribution.lds import linear_datamodeling_score, predictions_of
from diffcal.attribution.outputs import DenoiserObjective
from diffcal.attribution.timesteps import noise_levels
from diffcal.cli import main
from diffcal.core.rng import item_normal
from diffcal.core.runs import read_json, sha256_file
from diffcal.data.sources import open_images
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.denoisers import images_to_model
from diffcal.diffusion.ensemble_training import EnsembleTrainer
from diffcal.errors import ArtifactError, CheckpointError, ConfigError
from diffcal.workflows import das
from diffcal.workflows.das_lds import run_lds
from diffcal.workflows.das_lds_config import LdsConfig, LossConfig
from diffcal.workflows.das_losses import query_losses, write_queries
from diffcal.workflows.das_subset_models import SubsetSource, masks_of, train_models

SMALL = [
    "data.rows=20",
    "optimizer.steps=2",
    "optimizer.batch_size=4",
    "network.model_channels=8",
    "network.channel_mult=[1]",
    "subsets.count=4",
    "queries.validation=3",
    "queries.generated=2",
    "losses.timesteps=2",
    "features.timesteps=1",
    "features.projection.dim=32",
    "resamples=10",
    "methods=['das','gradient-dot','pixel-cosine']",
]


def small(*more):
    return das.lds_config("digits", [*SMALL, *more])


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    out = tmp_path_factory.mktemp("lds") / "run"
    return out, run_lds(small(), out, device="cpu")


def checkpoints(out):
    return {
        path.parent.parent.name: sha256_file(path)
        for path in sorted(out.glob("models/*/checkpoint/model.safetensors"))
    }


def test_every_subset_has_its_model_and_every_method_its_figures(experiment):
    out, summary = experiment
    assert summary["models"] == 5
    found = checkpoints(out)
    assert len(found) == 5 == len(set(found.values()))
    results = read_json(out / "lds.json")["results"]
    figures = {(row["method"], row["readout"], row["queries"]) for row in results}
    assert len(figures) == len(results) == 8
    for row in results:
        assert -1 <= row["lds"]["low"] <= row["lds"]["high"] <= 1
        assert {"shuffled", "query_average", "likeness:pixels"} <= {*row["controls"]}
        if row["method"] == "pixel-cosine":
            assert row["lds"]["mean"] == row["controls"]["likeness:pixels"]["mean"]
    assert (out / "lds.md").read_text("utf-8").count("| validation |") == 4


def test_models_see_their_subset_only(experiment):
    out, _ = experiment
    source = open_images("digits")
    labels = torch.as_tensor(source.labels[:20])
    masks = masks_of(small(), labels)
    assert masks.sum(dim=1).tolist() == [10] * 4
    rows = masks[2].nonzero()[:, 0].tolist()
    subset = SubsetSource(source, rows)
    (images, kinds) = next(subset.batches(50))[1:]
    assert (images == source.images[rows]).all()
    assert (kinds == source.labels[rows]).all()
    note = read_json(out / "models/subset-00002-seed-0/finished.json")
    assert note["data"] == subset.fingerprint


def test_losses_are_those_of_one_image_at_a_time(experiment):
    out, _ = experiment
    denoiser = load_denoiser(out / "models/subset-00001-seed-0/checkpoint")
    table = load_file(out / "losses/subset-00001-seed-0.safetensors")["losses"]
    assert table.shape == (1, 5)
    source = open_images("digits")
    objective, levels = DenoiserObjective(denoiser, "loss"), noise_levels(denoiser, 2)
    for query in range(3):
        clean = images_to_model(torch.as_tensor(source.images[1437 + query])[None])
        label = torch.eye(10)[[int(source.labels[1437 + query])]]
        errors = []
        for at, timestep in enumerate(levels.timesteps):
            noise = item_normal(0, f"lds-noise|{timestep}", query, denoiser.sample_shape)[None]
            inputs = objective.inputs(
                clean, noise, levels.sigmas[[at]], levels.weights[[at]], denoiser.condition(label)
            )
            errors.append(float(objective(*inputs)[1]))
        # Generated queries come first, in alphabetic order of the sets.
        assert float(table[0, 2 + query]) == pytest.approx(sum(errors) / 2, rel=1e-5)


def test_what_is_missing_is_made_again_by_two_processes_with_the_same_bytes(experiment):
    out, summary = experiment
    models, tables = checkpoints(out), {p: sha256_file(p) for p in out.glob("losses/*")}
    for name in ("subset-00001-seed-0", "subset-00002-seed-0"):
        (out / f"models/{name}/finished.json").unlink()
        (out / f"losses/{name}.safetensors").unlink()
        for path in (out / f"models/{name}/state").iterdir():
            path.unlink()
    flags = [f"--set={override}" for override in SMALL]
    command = ["das", "lds", "--preset", "digits", "--device", "cpu", "--out", str(out)]
    again = json.loads(launch(2, *command, *flags))
    assert checkpoints(out) == models
    assert {p: sha256_file(p) for p in out.glob("losses/*")} == tables
    assert again["lds"] == summary["lds"]


def test_models_trained_together_are_those_trained_alone_also_after_a_kill(tmp_path, monkeypatch):
    config = small("subsets.together=3", "optimizer.steps=4", "network.label_dropout=0.3")
    labels = torch.as_tensor(open_images("digits").labels[:20])
    settings = LdsConfig.training_config
    monkeypatch.setattr(
        LdsConfig,
        "training_config",
        lambda self, seed: dataclasses.replace(settings(self, seed), save_every=1),
    )
    states = {}
    for name, kill in (("whole", None), ("killed", 2)):
        step = EnsembleTrainer.train_step

        def killed(self, *batch, kill=kill, step=step):
            if self.step == kill:
                raise KeyboardInterrupt
            return step(self, *batch)

        run = lambda out: train_models(config, out, PartialState(cpu=True), "cpu")  # noqa: E731
        if kill is not None:
            monkeypatch.setattr(EnsembleTrainer, "train_step", killed)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / name)
            assert not list((tmp_path / name).glob("subset-*/finished.json"))
            monkeypatch.setattr(EnsembleTrainer, "train_step", step)
        masks = run(tmp_path / name)
        states[name] = {
            path.parent.parent.name: sha256_file(path)
            for path in sorted((tmp_path / name).glob("*/checkpoint/model.safetensors"))
        }
    assert torch.equal(masks, masks_of(config, labels.long()))
    assert len(states["whole"]) == 5
    assert states["killed"] == states["whole"]
    # The fourth subset model is a group of its own; the others against training them alone.
    assert {p.name for p in (tmp_path / "whole/groups").iterdir()} == {"subset-00000-seed-0"}
    one_by_one = dataclasses.replace(
        config, subsets=dataclasses.replace(config.subsets, together=1)
    )
    train_models(one_by_one, tmp_path / "alone", PartialState(cpu=True), "cpu")
    for subset in range(4):
        name = f"subset-{subset:05d}-seed-0/checkpoint/model.safetensors"
        found, expected = (load_file(tmp_path / run / name) for run in ("whole", "alone"))
        assert found.keys() == expected.keys()
        apart = sum(float((found[n] - expected[n]).square().sum()) for n in found) ** 0.5
        size = sum(float(expected[n].square().sum()) for n in found) ** 0.5
        assert apart < 1e-4 * size
    other = dataclasses.replace(
        config, seed=1, optimizer=dataclasses.replace(config.optimizer, steps=5)
    )
    (tmp_path / "whole/subset-00001-seed-0/finished.json").unlink()
    with pytest.raises(ArtifactError, match="steps: 4 there, 5 now"):
        train_models(other, tmp_path / "whole", PartialState(cpu=True), "cpu")
    with pytest.raises(ConfigError, match="together must be at least 1"):
        small("subsets.together=0")


def test_other_experiments_and_training_images_as_queries_are_refused(experiment, tmp_path):
    out, _ = experiment
    with pytest.raises(ArtifactError, match=r"subsets\.count: 4 there, 5 now"):
        run_lds(small("subsets.count=5"), out, device="cpu")
    with pytest.raises(ConfigError, match="held-out images must be others"):
        write_queries(small("queries.first_row=18"), tmp_path, out / "models", "cpu")
    with pytest.raises(ConfigError, match="unknown method 'datamodels'"):
        small("methods=['datamodels']")
    arguments = ["das", "lds", "--preset", "digits", "--set", "losses.timesteps=0"]
    assert main([*arguments, "--out", str(tmp_path / "x")]) == 2


def test_losses_do_not_depend_on_the_batch(experiment):
    out, _ = experiment
    from diffcal.workflows.das_images import open_queries

    denoiser = load_denoiser(out / "models/base/checkpoint")
    queries = open_queries("digits", denoiser, rows=5)
    whole = query_losses(denoiser, queries, LossConfig(timesteps=2, noises=2))
    parts = query_losses(denoiser, queries, LossConfig(timesteps=2, noises=2, batch=2))
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=0)
    assert not torch.equal(whole[0], whole[1])


def test_checkpoints_paths_and_embeddings_are_judged_as_well(tmp_path):
    methods = "methods=['tracincp','journey-trak','encoder-cosine']"
    more = ["optimizer.steps=4", "features.projection.dim=16", "queries.sampler.steps=2"]
    config = small(methods, *more)
    run_lds(config, tmp_path, device="cpu")
    kept = sorted(path.name for path in (tmp_path / "models/base/checkpoints").iterdir())
    assert kept == ["step-0000001", "step-0000002", "step-0000003"]
    assert not (tmp_path / "models/subset-00000-seed-0/checkpoints").exists()
    found = {
        (row["method"], row["queries"], row["readout"]): row["lds"]["mean"]
        for row in read_json(tmp_path / "lds.json")["results"]
    }
    assert {key[:2] for key in found} == {
        *(("tracincp", kind) for kind in ("validation", "generated")),
        *(("encoder-cosine", kind) for kind in ("validation", "generated")),
        ("journey-trak", "generated"),
    }
    # TracInCP by hand: the mean of the products at four stages.
    ((group,),) = [[path.parent for path in tmp_path.glob("indexes/*/models")]]
    scores = torch.zeros(3, 20, dtype=torch.float64)
    for at in range(4):
        folder = group / f"models/{at:02d}"
        rows = FeatureStore.open(folder / "features").rows().double()
        asked = FeatureStore.open(folder / "queries/validation").rows().double()
        scores += asked @ rows.T
    masks = masks_of(config, torch.as_tensor(open_images("digits").labels[:20]))
    tables = [load_file(path)["losses"] for path in sorted((tmp_path / "losses").iterdir())]
    losses = torch.stack(tables).mean(dim=1)[:, 2:]
    expected = linear_datamodeling_score(predictions_of(scores, masks), losses, n_resamples=10)
    assert found["tracincp", "validation", "signed"] == pytest.approx(expected.mean, abs=1e-6)
    with pytest.raises(ConfigError, match="judges generated queries alone"):
        small("methods=['journey-trak']", "queries.generated=0")


def test_stages_that_a_training_does_not_have_are_refused_before_it(tmp_path, capsys):
    flags = [f"--set={setting}" for setting in [*SMALL, "optimizer.steps=1"]]
    for method in ("tracincp", "gas"):
        out = tmp_path / method
        asked = f"--set=methods=['das','{method}']"
        command = ["das", "lds", "--preset", "digits", "--out", str(out), *flags, asked]
        assert main([*command, "--device", "cpu"]) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("diffcal: ")]
        assert f"'{method}' compares the model at several stages of its training" in line
        assert not out.exists()
    overrides = ["training.optimizer.steps=1", "methods=['tracincp']"]
    with pytest.raises(ConfigError, match="several stages"):
        das.counterfactual_config("digits", (), overrides)
    # A method that is added later finds the model finished: refused before the others are trained.
    out = tmp_path / "later"
    train_models(small("methods=['das']"), out, PartialState(cpu=True), "cpu")
    other = out / "subset-00000-seed-0/finished.json"
    other.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 1 .* named from the start"):
        train_models(small("methods=['tracincp']"), out, PartialState(cpu=True), "cpu")
    assert not other.exists()
