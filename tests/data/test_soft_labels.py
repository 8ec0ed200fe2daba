"""Reading a published data set: columns as tensors, images one at a time, damage named."""

import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mixed_run import NAMES, blended_digits
from published_set import publish_rows

import diffcal.data.soft_labels as soft_labels
from diffcal.data.images import decode_image
from diffcal.data.soft_labels import SoftLabelSet, published_schema
from diffcal.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve groups of five images in three files; do not write into it."""
    return publish_rows(tmp_path_factory.mktemp("set") / "dataset", groups=12, files=3)


def test_columns_are_those_written(folder):
    columns, annotation = blended_digits(12, 5)
    found = SoftLabelSet(folder, NAMES)
    assert len(found) == 60
    assert found.class_names == NAMES
    assert found.named
    labels = torch.tensor(annotation["soft_label"])
    torch.testing.assert_close(found.soft_labels(), labels, rtol=0, atol=0)
    assert found.groups().tolist() == columns["group"]
    weights, support = found.mixing_weights()
    for row in range(60):
        assert support[row].nonzero()[:, 0].tolist() == columns["classes"][row]
        assert weights[row, columns["classes"][row]].tolist() == columns["weights"][row]
    torch.testing.assert_close(weights.sum(1), torch.ones(60), rtol=0, atol=1e-6)


def test_rows_are_read_alone_in_any_order(folder):
    columns, annotation = blended_digits(12, 5)
    found = SoftLabelSet(folder)
    for row in np.random.default_rng(0).permutation(60).tolist():
        wanted = decode_image(columns["image"][row]["bytes"], "test")
        np.testing.assert_array_equal(found.image(row), wanted)
        assert found.soft_label(row).tolist() == annotation["soft_label"][row]
        assert found.record(row)["group"] == columns["group"][row]
    with pytest.raises(IndexError):
        found.image(60)


def test_few_files_and_little_data_stay_open(folder, monkeypatch):
    monkeypatch.setattr(soft_labels, "OPEN_FILES", 2)
    monkeypatch.setattr(soft_labels, "CACHE_BYTES", 10_000)
    found = SoftLabelSet(folder)
    for row in range(60):
        found.image(row)
        assert len(found._open) <= 2
        assert len(found._cache) == 1 or sum(t.nbytes for t in found._cache.values()) <= 10_000


def test_pickles_are_small_and_whole(folder):
    found = SoftLabelSet(folder)
    found.image(3)
    data = pickle.dumps(found)
    assert len(data) < 3000
    np.testing.assert_array_equal(pickle.loads(data).image(3), found.image(3))


def test_sets_without_metadata_take_the_names_they_are_given(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "plain")
    for path in (tmp_path / "plain" / "data").iterdir():
        pq.write_table(pq.read_table(path).replace_schema_metadata(), path)
    assert SoftLabelSet(tmp_path / "plain").class_names == NAMES
    found = SoftLabelSet(tmp_path / "plain", tuple("abcdefghij"))
    assert found.class_names == tuple("abcdefghij")
    assert not found.named


def test_datasets_library_agrees_on_the_schema():
    import datasets

    features = datasets.Features.from_arrow_schema(published_schema(["cat", "dog"]))
    assert features["label"] == datasets.ClassLabel(names=["cat", "dog"])
    assert features["soft_label"].length == 2
    assert features.arrow_schema.remove_metadata() == published_schema(
        ["cat", "dog"]
    ).remove_metadata().set(0, pa.field("image", features.arrow_schema.field("image").type))


def test_bad_sets_are_named(folder, tmp_path):
    with pytest.raises(DataError, match="no published mixed data set"):
        SoftLabelSet(tmp_path)
    with pytest.raises(DataError, match=r"has the classes 0, 1, 2, 3, 4 ..., the real images a, b"):
        SoftLabelSet(folder, ("a", "b"))
    shutil.copytree(folder, tmp_path / "set")
    path = sorted((tmp_path / "set" / "data").iterdir())[1]
    table = pq.read_table(path)

    def broken(name, values, rows=table, target=path):
        index = rows.schema.get_field_index(name)
        pq.write_table(rows.set_column(index, name, values), target)
        return SoftLabelSet(target.parents[1])

    with pytest.raises(DataError, match=r"00001-of-00003.parquet' has columns of other types"):
        broken("soft_label", pa.array([[0.5, 0.5]] * len(table))).soft_labels()
    (tmp_path / "one" / "data").mkdir(parents=True)
    one = {"target": tmp_path / "one" / "data" / "train.parquet"}
    with pytest.raises(DataError, match="expected one for each of 10 classes"):
        broken("soft_label", pa.array([[0.5, 0.5]] * len(table)), **one).soft_labels()
    with pytest.raises(DataError, match="has null entries"):
        broken("soft_label", pa.array([[0.5, None]] * len(table)), **one).soft_labels()
    with pytest.raises(DataError, match="class 11 of 10"):
        broken("classes", pa.array([[0, 11]] * len(table)), **one).mixing_weights()
    with pytest.raises(DataError, match="unequal lengths"):
        broken("classes", pa.array([[0]] * len(table)), **one).mixing_weights()
    image = pa.array([{"bytes": b"nothing", "path": None}] * len(table))
    with pytest.raises(DataError, match="row 20: the image cannot be decoded"):
        broken("image", image).image(20)
    with pytest.raises(DataError, match="row 20: the image has no bytes"):
        broken("image", pa.array([{"bytes": None, "path": "a.png"}] * len(table))).image(20)
    names = json.loads(table.schema.metadata[b"huggingface"])
    names["info"]["features"]["label"]["names"] = list("abcdefghij")
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), path)
    with pytest.raises(DataError, match="names other classes than"):
        SoftLabelSet(tmp_path / "set")
    pq.write_table(table.drop_columns(["group"]), path)
    with pytest.raises(DataError, match="lacks the columns group"):
        SoftLabelSet(tmp_path / "set")
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="cannot be read as a mixed data set"):
        SoftLabelSet(tmp_path / "set")
