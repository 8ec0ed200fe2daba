"""Scores without some training images: those of an index that never held them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffcal.cli import main
from diffcal.core.runs import read_json, sha256_file
from diffcal.data.images import encode_png
from diffcal.data.sources import open_images
from diffcal.errors import ArtifactError, ConfigError
from diffcal.workflows import das
from diffcal.workflows.das_score import score_queries
from diffcal.workflows.das_without import describe_ids

SMALL = [
    "model.source=bundled:digits",
    "features.timesteps=[400]",
    "features.projection.dim=64",
    "store.shard_rows=10",
    "store.dtype=float32",
]
ROWS = 36
GONE = [3, 4, 11, 20, 21, 22, 35]
KEPT = [row for row in range(ROWS) if row not in GONE]
QUERIES = 4


def write(path, rows):
    source = open_images("digits")
    columns = {
        "image": [{"bytes": encode_png(source.images[row]), "path": None} for row in rows],
        "label": source.labels[rows].astype(np.int64),
        "artist": [("Ada", "Ben", "Cyd")[row % 3] for row in rows],
    }
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    """An index of all images, and one of those that are left, with images of its own."""
    folder = tmp_path_factory.mktemp("without")
    for name, rows in (("all", range(ROWS)), ("left", KEPT)):
        data = write(folder / f"{name}.parquet", list(rows))
        config = das.das_config("das", [*SMALL, f"data.name={data}"])
        das.index(config, folder / name, device="cpu")
    return folder


def table(folder, name):
    return pq.read_table(folder / f"{name}.parquet").to_pylist()


def score(index, out, *overrides, **named):
    shared = [f"queries.rows={QUERIES}", f"top={ROWS}", "groups=['artist']", *overrides]
    return score_queries(
        index, das.score_config(index, "digits", shared), out, device="cpu", **named
    )


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["scores.leverage=true", "scores.residual=rms", "scores.norm=relative"],
        ["scores.damping_rule=rest", "scores.damping=4.0"],
        [
            "scores.damping_rule=dimension",
            "scores.damping_grid=[]",
            "scores.damping=0.06",
            "scores.readout=signed",
        ],
        ["scores.method=cosine", "scores.readout=abs"],
    ],
    ids=["default", "corrected", "rest", "dimension", "cosine"],
)
def test_scores_are_those_of_a_fresh_index_of_what_is_left(indexes, tmp_path, settings):
    found, expected = tmp_path / "found", tmp_path / "expected"
    summary = score(indexes / "all", found, f"without={GONE}", *settings)
    wanted = score(indexes / "left", expected, *settings)
    assert summary["training_images"] == wanted["training_images"] == len(KEPT)
    for name, value, close in (
        ("scores", "score", 1e-3),
        ("scores", "share", 1e-3),
        ("scores", "likeness", 1e-4),
        ("nearest", "likeness", 1e-4),
    ):
        mine = {(r["query"], r["training"]): r[value] for r in table(found, name)}
        # Rows of the smaller source are numbered anew.
        theirs = {(r["query"], KEPT[r["training"]]): r[value] for r in table(expected, name)}
        largest = max(map(abs, theirs.values()))
        assert mine == pytest.approx(theirs, rel=close, abs=close * largest)
    assert len(table(found, "scores")) == QUERIES * len(KEPT)
    for mine, theirs in zip(table(found, "queries"), table(expected, "queries"), strict=True):
        assert mine["nearest"] == KEPT[theirs["nearest"]]
        assert mine["copy_of"] == KEPT[theirs["copy_of"]]
        for name in ("contributors", "dominance", "isolation", "copy_score"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-3)
    mine, theirs = (
        {(r["column"], r["name"]): (r["share"], r["data_share"]) for r in table(path, "groups")}
        for path in (found, expected)
    )
    assert mine.keys() == theirs.keys()
    for key, values in mine.items():
        assert values == pytest.approx(theirs[key], rel=2e-3)


def test_it_is_not_the_same_as_dropping_their_columns(indexes, tmp_path):
    """The kernel changes as well: the test above would not see a kernel that stays."""
    score(indexes / "all", tmp_path / "all")
    score(indexes / "all", tmp_path / "found", f"without={GONE}")
    whole, left = (
        {(r["query"], r["training"]): r["score"] for r in table(tmp_path / name, "scores")}
        for name in ("all", "found")
    )
    apart = [abs(whole[key] / value - 1) for key, value in left.items() if value]
    assert float(np.median(apart)) > 0.02


def test_the_command_takes_ids_and_files_and_keeps_to_them(indexes, tmp_path, capsys):
    listed = tmp_path / "gone.txt"
    listed.write_text("\n".join(map(str, GONE[2:])) + "\n\n")
    index = indexes / "all"
    command = ["das", "score", "--index", str(index), "--queries", "digits", "--rows", "4"]
    command += ["--top", str(ROWS), "--groups", "artist", "--device", "cpu"]
    asked = ["--without", str(GONE[1]), str(listed), "--without", str(GONE[0])]
    out = tmp_path / "s"
    assert main([*command, *asked, "--out", str(out)]) == 0
    score(index, tmp_path / "python", f"without={GONE}")
    names = ("scores", "nearest", "queries", "groups")
    for name in names:
        assert table(out, name) == table(tmp_path / "python", name)
    assert "29 training images (7 left out)" in (out / "gallery.html").read_text("utf-8")
    # The same images in another order are the same scores; others are refused, and so are none.
    before = {name: sha256_file(out / f"{name}.parquet") for name in names}
    score(index, out, f"without={GONE[::-1]}")
    assert {name: sha256_file(out / f"{name}.parquet") for name in names} == before
    capsys.readouterr()
    for others, said in (
        (["--without", "3"], "now"),
        (["--without", *map(str, GONE[1:])], "6 images (4, 11, 20, 21, 22 ..., "),
        ([], "None now"),
    ):
        assert main([*command, *others, "--out", str(out)]) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("diffcal: ")]
        assert "without: '7 images (3, 4, 11, 20, 21 ..., " in line
        assert said in line
    assert main([*command, "--without", "3", "--out", str(out), "--overwrite"]) == 0
    assert {row["training"] for row in table(out, "scores")} == {*range(ROWS)} - {3}


def test_scores_of_all_images_are_claimed_as_before(indexes, tmp_path):
    score(indexes / "all", tmp_path / "s")
    assert "without" not in read_json(tmp_path / "s/config.json")
    assert describe_ids([4, 3]) == "2 images (3, 4)" == describe_ids([3, 4])
    assert describe_ids(range(9)) != describe_ids([*range(8), 9])


def test_shares_by_another_column_leave_them_out_too(indexes, tmp_path):
    index, out = indexes / "all", tmp_path / "s"
    das.score(index, "digits", out, rows=QUERIES, top=ROWS, without=GONE, device="cpu")
    shares = das.explain(out, groups=["artist"], out=tmp_path / "page.html")["groups"]["artist"]
    rows = table(out, "scores")
    totals = [sum(r["score"] for r in rows if r["query"] == q) for q in range(QUERIES)]
    expected = {"Ada": 0.0, "Ben": 0.0, "Cyd": 0.0}
    for row in rows:
        name = ("Ada", "Ben", "Cyd")[row["training"] % 3]
        expected[name] += row["score"] / totals[row["query"]] / QUERIES
    assert shares == pytest.approx(expected, abs=2e-4)


def test_images_that_cannot_be_left_out_are_one_clear_line(indexes, tmp_path, capsys):
    words, empty = tmp_path / "words.txt", tmp_path / "empty.txt"
    words.write_text("3\nfour\n")
    empty.write_text("\n")
    everything = list(map(str, range(ROWS)))
    command = ["das", "score", "--index", str(indexes / "all"), "--queries", "digits"]
    for asked, message in (
        (["36", "3", "99"], "without: the index holds no training image 36, 99; its ids are 0, 1"),
        (["3", "5", "3"], "without: example 3 comes twice"),
        (everything, "without: all 36 training images are left out"),
        (["gone.txt"], "'gone.txt' is neither a training id nor a file of ids"),
        (["-3"], "'-3' is neither a training id nor a file of ids"),
        ([str(words)], "words.txt', line 2: 'four' is not a training id"),
        ([str(empty)], "empty.txt' holds no training ids"),
        ([str(tmp_path)], f"training ids cannot be read from '{tmp_path}'"),
    ):
        out = tmp_path / "s"
        assert main([*command, "--without", *asked, "--out", str(out), "--device", "cpu"]) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("diffcal: ")]
        assert message in line
        assert not out.exists()
    with pytest.raises(ConfigError, match="comes twice"):
        das.score(indexes / "all", "digits", tmp_path / "t", without=[1, 1], device="cpu")


def test_scores_of_a_part_do_not_say_what_to_retrain_without(indexes, tmp_path):
    das.score(indexes / "all", "digits", tmp_path / "s", rows=2, without=[3], device="cpu")
    config = das.CounterfactualConfig(scores=(str(tmp_path / "s"),), methods=())
    with pytest.raises(ArtifactError, match=r"leave out training images .* score again without"):
        das.counterfactual(config, tmp_path / "out", device="cpu")
