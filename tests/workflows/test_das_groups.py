"""Whom images belong to, and which queries are copies: shares, royalties, thresholds, flags."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from diffcal.cli import main
from diffcal.core.runs import read_json
from diffcal.data.images import encode_png
from diffcal.data.sources import open_images
from diffcal.errors import ArtifactError, ConfigError, DataError
from diffcal.workflows import das
from diffcal.workflows.das_score import HeldOut, QueryConfig, ScoreRunConfig, score_queries

ROWS = 24
ARTISTS = ["Ada", "Ben", None]


def write(path, rows, **columns):
    source = open_images("digits")
    cells = [{"bytes": encode_png(source.images[row]), "path": None} for row in rows]
    labels = source.labels[list(rows)].astype(np.int64)
    pq.write_table(pa.table({"image": cells, "label": labels, **columns}), path)
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    columns = {
        "artist": [ARTISTS[row % 3] for row in range(60)],
        "year": [1900 + row // 12 for row in range(60)],
        "size": [float(row) for row in range(60)],
    }
    data = write(folder / "train.parquet", range(60), **columns)
    settings = [
        "model.source=bundled:digits",
        f"data.name={data}",
        "data.first_row=10",
        f"data.rows={ROWS}",
        "features.timesteps=[400]",
        "features.projection.dim=64",
    ]
    das.index(das.das_config("das", settings), folder / "index", device="cpu")
    return folder / "index"


def test_shares_of_artists_are_sums_of_scores(index, tmp_path):
    out = tmp_path / "s"
    das.score(
        index, "digits", out, top=ROWS, rows=4, groups=["artist"], royalties=200.0, device="cpu"
    )
    rows = pq.read_table(out / "scores.parquet").to_pylist()
    total = np.zeros((4, 3))
    for row in rows:
        total[row["query"], row["training"] % 3] += row["score"]
    shares = total / total.sum(axis=1, keepdims=True)
    groups = {row["name"]: row for row in read_json(out / "scores.json")["groups"]["artist"]}
    assert set(groups) == {"Ada", "Ben", "(none)"}
    for at, name in enumerate(("Ada", "Ben", "(none)")):
        mean = shares[:, at].mean()
        assert groups[name]["share"] == pytest.approx(mean, rel=1e-4)
        assert groups[name]["royalty"] == pytest.approx(200 * mean, rel=1e-4)
        assert groups[name]["data_share"] == 8 / ROWS
        assert groups[name]["lift"] == pytest.approx(3 * mean, rel=1e-4)
        assert groups[name]["low"] <= mean <= groups[name]["high"]
    table = pq.read_table(out / "groups.parquet").to_pylist()
    assert {row["column"] for row in table} == {"class", "artist"}
    assert sum(row["royalty"] for row in table) == pytest.approx(400)
    page = (out / "gallery.html").read_text("utf-8")
    assert "Shares by artist" in page
    assert f"{200 * groups['Ada']['share']:,.2f}" in page
    names = read_json(out / "scores.json")["group_order"]["artist"]
    listed = pq.read_table(out / "queries.parquet")["artist_shares"].to_pylist()
    assert listed[2][names.index("Ben")] == pytest.approx(shares[2, 1], rel=1e-4)


def test_explain_shares_out_by_other_columns_without_gradients(index, tmp_path, monkeypatch):
    out = tmp_path / "s"
    das.score(index, "digits", out, top=ROWS, rows=4, device="cpu")
    rows = pq.read_table(out / "scores.parquet").to_pylist()
    monkeypatch.setattr("diffcal.attribution.featurise.Featuriser.__call__", None)
    found = das.explain(out, ["1"], groups=["year"], royalties=10.0, out=tmp_path / "year.html")[
        "groups"
    ]["year"]
    total = {}
    for row in rows:
        whole = sum(other["score"] for other in rows if other["query"] == row["query"])
        year = str(1900 + row["training"] // 12)
        total[year] = total.get(year, 0) + 10 * row["score"] / whole / 4
    assert found == pytest.approx(total, rel=1e-3)
    page = (tmp_path / "year.html").read_text("utf-8")
    assert "Shares by year" in page
    assert "of 10.00" in page
    with pytest.raises(DataError, match=r"has no column 'artits'; did you mean 'artist'\?"):
        das.explain(out, groups=["artits"])
    with pytest.raises(DataError, match="column 'size' must hold names or numbers"):
        das.explain(out, groups=["size"])
    with pytest.raises(ConfigError, match="royalties must be a positive amount, got -1"):
        das.explain(out, royalties=-1.0)
    manifest = read_json(out / "scores.json")
    (out / "scores.json").write_text(json.dumps(manifest | {"features": ["0"]}))
    with pytest.raises(ArtifactError, match="is not the index that was scored any more"):
        das.explain(out, groups=["artist"])


def test_columns_of_sources_without_a_table_are_refused(index, tmp_path, capsys):
    with pytest.raises(DataError, match="it holds images and classes alone"):
        open_images("digits").column("artist", range(3))
    command = ["das", "score", "--index", str(index), "--queries", "digits", "--rows", "2"]
    arguments = [*command, "--out", str(tmp_path / "s"), "--device", "cpu"]
    assert main([*arguments, "--groups", "place"]) == 2
    assert "has no column 'place'" in capsys.readouterr().err
    assert main([*arguments, "--royalties", "0"]) == 2
    assert "royalties must be a positive amount" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


HELD_OUT = range(100, 140)


def test_thresholds_are_what_held_out_images_show(index, tmp_path):
    # Queries: three training images, which are copies, among images that nobody has seen.
    copies = [12, 17, 30]
    queries = write(tmp_path / "q.parquet", [*copies, *range(200, 217)])
    held_out = write(tmp_path / "h.parquet", HELD_OUT)
    # Under other names the held-out images are ordinary queries, which tells what they show.
    das.score(index, held_out, tmp_path / "reference", device="cpu")
    reference = pq.read_table(tmp_path / "reference/queries.parquet").to_pydict()
    config = ScoreRunConfig(
        queries=QueryConfig(name=str(queries)),
        held_out=HeldOut(name=str(held_out), quantile=0.9),
    )
    summary = score_queries(index, config, tmp_path / "s", device="cpu")
    found = pq.read_table(tmp_path / "s/queries.parquet").to_pydict()
    facts = read_json(tmp_path / "s/scores.json")["copies"]
    limits = {}
    for name, column in (
        ("nearest", "likeness"),
        ("isolation", "isolation"),
        ("dominance", "dominance"),
        ("copy_score", "copy_score"),
    ):
        values = torch.tensor(reference[column], dtype=torch.float64)
        limits[name] = float(values.quantile(0.9))
        assert facts["thresholds"][name] == pytest.approx(limits[name], rel=1e-4)
    for query in range(20):
        near = found["likeness"][query] > limits["nearest"]
        alone = found["isolation"][query] > limits["isolation"]
        assert found["near_copy"][query] == (near and alone)
        assert found["memorised"][query] == (found["copy_score"][query] > limits["copy_score"])
        beyond = sum(value >= found["copy_score"][query] for value in reference["copy_score"])
        assert found["copy_chance"][query] == pytest.approx((1 + beyond) / 41)
    assert found["near_copy"][:3] == [True] * 3
    assert sum(found["memorised"][:3]) >= 2
    assert found["likeness_chance"][:3] == pytest.approx([1 / 41] * 3)
    assert sum(found["memorised"]) < 8
    assert facts["flagged"]["memorised"] == sum(found["memorised"])
    assert facts["expected"]["memorised"] == pytest.approx(20 * 4 / 40)
    assert summary["flagged"]["memorised"]["queries"] == sum(found["memorised"])
    # Held-out images leave the rest as it is.
    plain = das.score(index, queries, tmp_path / "plain", device="cpu")
    for name in ("scores", "nearest"):
        assert pq.read_table(tmp_path / f"s/{name}.parquet").equals(
            pq.read_table(tmp_path / f"plain/{name}.parquet")
        )
    assert "flagged" not in plain
    page = (tmp_path / "s/gallery.html").read_text("utf-8")
    assert "Beyond chance" in page
    assert "near copy, " in page


def test_the_rest_of_the_training_source_is_held_out(index, tmp_path, capsys):
    command = ["das", "score", "--index", str(index), "--queries", "digits", "--rows", "2"]
    arguments = [*command, "--out", str(tmp_path / "s"), "--device", "cpu"]
    assert main([*arguments, "--held-out", "rest", "--set", "held_out.quantile=0.9"]) == 0
    assert read_json(tmp_path / "s/scores.json")["copies"]["held_out"] == 60 - 10 - ROWS
    capsys.readouterr()
    source = read_json(index / "manifest.json")["config"]["data"]["name"]
    for flags, message in (
        (["--held-out", "rest"], "26 held-out images cannot tell the 0.99 quantile: give at least"),
        (
            ["--held-out", source, "--set", "held_out.quantile=0.9"],
            "are training images (10 to 34); held-out images must be others",
        ),
        (["--held-out", "gone.parquet"], "'gone.parquet' does not exist"),
        (["--set", "held_out.quantile=1.5"], "held_out.quantile must lie between 0 and 1"),
    ):
        assert main([*arguments, *flags]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert message in lines[-1]


def test_without_a_rest_nothing_is_held_out(tmp_path):
    data = write(tmp_path / "all.parquet", range(12))
    settings = ["model.source=bundled:digits", f"data.name={data}"]
    das.index(das.das_config("pixel-cosine", settings), tmp_path / "index", device="cpu")
    with pytest.raises(ConfigError, match="was trained on all 12 images of"):
        das.score(tmp_path / "index", "digits", rows=2, held_out="rest", device="cpu")
