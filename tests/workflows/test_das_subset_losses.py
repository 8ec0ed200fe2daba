"""Empirical influence and datamodels through the commands, on the models of a tiny LDS run."""

import dataclasses
import json

import pyarrow.parquet as pq
import pytest
import torch
from launch import launch
from safetensors.torch import load_file

from diffcal.attribution.datamodels import datamodel_scores, empirical_influence
from diffcal.attribution.lds import predictions_of, spearman
from diffcal.attribution.lds_folds import rest_of, subset_folds
from diffcal.cli import main
from diffcal.core.runs import read_json, sha256_file
from diffcal.data.sources import open_images
from diffcal.errors import ArtifactError, ConfigError, DataError
from diffcal.workflows import das
from diffcal.workflows.das_subset_models import masks_of

ROWS = 8
SUBSETS = 14
SMALL = [
    f"data.rows={ROWS}",
    "optimizer.steps=2",
    "optimizer.batch_size=4",
    "network.model_channels=8",
    "network.channel_mult=[1]",
    f"subsets.count={SUBSETS}",
    "subsets.stratified=false",
    "queries.validation=3",
    "queries.generated=2",
    "losses.timesteps=2",
    "resamples=10",
    "methods=['empirical-influence','datamodel']",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("subsets") / "lds"
    das.lds(das.lds_config("digits", SMALL), out, device="cpu")
    return out


def tables(run):
    """Masks and losses of validation queries, which come after the two generated ones."""
    config = das.lds_config("digits", SMALL)
    masks = masks_of(config, torch.as_tensor(open_images("digits").labels[:ROWS]))
    losses = [load_file(path)["losses"] for path in sorted((run / "losses").iterdir())]
    return masks, torch.cat(losses)[:, 2:].double()


def matrix(folder, queries):
    found = torch.zeros(queries, ROWS, dtype=torch.float64)
    order = pq.read_table(folder / "queries.parquet")["query"].to_pylist()
    for row in pq.read_table(folder / "scores.parquet").to_pylist():
        found[order.index(row["query"]), row["training"]] = row["score"]
    return found


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("method", ["empirical-influence", "datamodel"])
def test_scores_are_those_of_the_subset_losses(run, method, tmp_path):
    index = tmp_path / "index"
    command = ["das", "index", "--preset", method, "--set", f"subset_run={run}", "--device", "cpu"]
    assert main([*command, "--out", str(index)]) == 0
    masks, losses = tables(run)
    compute = empirical_influence if method == "empirical-influence" else datamodel_scores
    expected = compute(masks, losses)
    assert not (index / "kernel.safetensors").exists()
    # The run's own queries: its tables.
    own = run / "queries/validation.parquet"
    scoring = ["das", "score", "--index", str(index), "--top", str(ROWS), "--device", "cpu"]
    assert main([*scoring, "--queries", str(own), "--out", str(tmp_path / "own")]) == 0
    close(matrix(tmp_path / "own", 3), expected)
    names = pq.read_table(tmp_path / "own/scores.parquet").column_names
    assert names == ["query", "training", "rank", "score", "share", "likeness"]
    assert (tmp_path / "own/gallery.html").stat().st_size > 1000
    # The same images from elsewhere are measured by the models, under the same noise.
    config = das.score_config(
        index, "digits", ["queries.first_row=1437", "queries.rows=3", "top=8"]
    )
    das.score_queries(index, config, tmp_path / "other", device="cpu")
    close(matrix(tmp_path / "other", 3), expected)
    assert read_json(tmp_path / "other/scores.json")["method"] == method
    # An image's influence does not depend on the others; a regression has no part without it.
    config = dataclasses.replace(config, without=(2,))
    if method == "datamodel":
        with pytest.raises(ConfigError, match="'datamodel' is fitted on all training images"):
            das.score_queries(index, config, tmp_path / "less", device="cpu")
    else:
        das.score_queries(index, config, tmp_path / "less", device="cpu")
        first = pq.read_table(tmp_path / "other/scores.parquet").to_pylist()
        less = pq.read_table(tmp_path / "less/scores.parquet").to_pylist()
        scores = {(row["query"], row["training"]): row["score"] for row in first}
        assert len(less) == 3 * (ROWS - 1)
        assert all(row["score"] == scores[row["query"], row["training"]] for row in less)


def test_lds_judges_them_on_subsets_they_have_not_seen(run):
    masks, losses = tables(run)
    results = read_json(run / "lds.json")["results"]
    assert {(row["method"], row["queries"]) for row in results} == {
        (method, kind)
        for method in ("empirical-influence", "datamodel")
        for kind in ("validation", "generated")
    }
    expected = []
    for held in subset_folds(SUBSETS, 2):
        rest = rest_of(held, SUBSETS)
        guess = predictions_of(datamodel_scores(masks[rest], losses[rest]), masks)
        expected.append(spearman(guess[held].mT, losses[held].mT).mean())
    (row,) = [r for r in results if (r["method"], r["queries"]) == ("datamodel", "validation")]
    assert row["lds"]["mean"] == pytest.approx(float(sum(expected)) / 2, abs=1e-9)
    # Fitted on what it is judged on, it would look far better.
    seen = spearman(predictions_of(datamodel_scores(masks, losses), masks).mT, losses.mT).mean()
    assert row["lds"]["mean"] < float(seen)
    assert {"shuffled", "query_average", "centred", "likeness:pixels"} == {*row["controls"]}


def test_two_processes_measure_what_one_does(run, tmp_path):
    config = das.das_config("empirical-influence", [f"subset_run={run}", "store.shard_rows=2"])
    shards = {}
    for name, processes in (("one", 1), ("two", 2)):
        index = tmp_path / name
        das.index(config, index, device="cpu")
        flags = ["--rows", "4", "--device", "cpu", "--queries", "digits", "--index", str(index)]
        if processes == 1:
            das.score(index, "digits", rows=4, device="cpu")
        else:
            assert json.loads(launch(2, "das", "score", *flags))["queries"] == 4
        (store,) = (index / "queries").iterdir()
        shards[name] = {path.name: sha256_file(path) for path in store.glob("*.safetensors")}
    assert len(shards["one"]) == 2
    assert shards["one"] == shards["two"]


def test_what_is_not_there_is_one_clear_line(run, tmp_path):
    with pytest.raises(ConfigError, match="name a run of diffcal das lds"):
        das.index(das.das_config("datamodel"), tmp_path / "a", device="cpu")
    with pytest.raises(ConfigError, match="'datamodel' is fitted on some of the 8 subsets"):
        das.lds_config("digits", ["subsets.count=8", "methods=['datamodel']"])
    nowhere = das.das_config("datamodel", [f"subset_run={tmp_path}"])
    with pytest.raises(ArtifactError, match="is not a finished run of diffcal das lds"):
        das.index(nowhere, tmp_path / "b", device="cpu")
    other = das.das_config("datamodel", [f"subset_run={run}", "data.rows=9"])
    with pytest.raises(DataError, match="not trained on subsets of rows 0 to 9 of"):
        das.index(other, tmp_path / "c", device="cpu")
    with pytest.raises(ConfigError, match=r"scores\.method is dot"):
        das.das_config("datamodel", ["scores.method=cosine"])
    with pytest.raises(ConfigError, match="'datamodel' needs models trained on subsets"):
        das.counterfactual_config("digits", [], ["methods=['datamodel']"])
