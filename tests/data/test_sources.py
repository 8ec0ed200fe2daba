"""Image sources by name, and images as bytes."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffcal.data.images import decode_image, encode_png, image_grid
from diffcal.data.sources import open_images
from diffcal.errors import DataError


def pictures(count, side=4, channels=3, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def write_parquet(path, images, labels, names=None, plain_bytes=False, row_group_size=3):
    cells = [encode_png(image) for image in images]
    if not plain_bytes:
        cells = [{"bytes": cell, "path": None} for cell in cells]
    table = pa.table({"image": cells, "label": labels})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        meta = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(meta)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_size)


def everything(source, size=4, rows=None):
    parts = list(source.batches(size, rows))
    return tuple(np.concatenate([part[i] for part in parts]) for i in range(3))


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    source, data = open_images("digits"), load_digits()
    rows, images, labels = everything(source, 500)
    assert len(source) == 1797
    assert source.image_shape == (8, 8, 1)
    np.testing.assert_array_equal(rows, np.arange(1797))
    np.testing.assert_array_equal(labels, data.target)
    assert np.abs(images[..., 0] / 255 * 16 - data.images).max() < 0.04
    assert images.max() == 255


@pytest.mark.parametrize("plain_bytes", [False, True])
def test_parquet_files_in_any_form(tmp_path, plain_bytes):
    images, labels = pictures(10), [0, 2, 1, 0, 1, 2, 0, 0, 1, 2]
    names = ["ant", "bee", "cat"]
    for part, rows in enumerate((slice(0, 4), slice(4, 10))):
        path = tmp_path / "set/data" / f"train-{part}.parquet"
        write_parquet(path, images[rows], labels[rows], names, plain_bytes)
    for name in (tmp_path / "set", tmp_path / "set/data", tmp_path / "set/data/train-*.parquet"):
        source = open_images(str(name))
        assert source.class_names == ("ant", "bee", "cat")
        rows, found, targets = everything(source)
        np.testing.assert_array_equal(found, images)
        np.testing.assert_array_equal(targets, labels)
        np.testing.assert_array_equal(rows, np.arange(10))
    one = open_images(str(tmp_path / "set/data/train-1.parquet"))
    np.testing.assert_array_equal(everything(one)[1], images[4:])
    (tmp_path / "set/data").rename(tmp_path / "set [v2]")
    for name in (tmp_path / "set [v2]", tmp_path / "set [v2]/train-1.parquet"):
        assert len(open_images(str(name))) in (6, 10)  # these brackets are no pattern


@given(order=st.permutations(range(7)), size=st.integers(1, 8))
def test_rows_come_in_the_order_asked_for(tmp_path_factory, order, size):
    path = tmp_path_factory.getbasetemp() / "order.parquet"
    images = pictures(7)
    if not path.exists():
        write_parquet(path, images, list(range(7)))
    rows, found, labels = everything(open_images(str(path)), size, order)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_array_equal(labels, order)
    np.testing.assert_array_equal(found, images[list(order)])


def test_string_labels_become_classes_in_alphabetic_order(tmp_path):
    write_parquet(tmp_path / "a.parquet", pictures(3), ["owl", "ape", "owl"])
    source = open_images(str(tmp_path / "a.parquet"))
    assert source.class_names == ("ape", "owl")
    assert everything(source)[2].tolist() == [1, 0, 1]


def test_a_folder_for_each_class(tmp_path):
    images = pictures(4)
    for index, name in enumerate(["b/1.png", "a/2.png", "b/0.png", "a/1.bmp"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(images[index]).save(path)
    (tmp_path / "a/notes.txt").write_text("not an image")
    source = open_images(str(tmp_path))
    assert source.class_names == ("a", "b")
    _, found, labels = everything(source)
    np.testing.assert_array_equal(found, images[[3, 1, 2, 0]])
    assert labels.tolist() == [0, 0, 1, 1]


def test_grey_images_join_coloured_ones_but_not_the_other_way(tmp_path):
    mixed = [encode_png(pictures(1)[0]), encode_png(pictures(1, channels=1)[0])]
    for name, cells in (("rgb", mixed), ("grey", mixed[::-1])):
        pq.write_table(pa.table({"image": cells, "label": [0, 0]}), tmp_path / f"{name}.parquet")
    assert everything(open_images(str(tmp_path / "rgb.parquet")))[1].shape == (2, 4, 4, 3)
    with pytest.raises(DataError, match="row 1: the image is 4x4x3"):
        everything(open_images(str(tmp_path / "grey.parquet")))


def test_a_fingerprint_tells_content_and_order(tmp_path):
    prints = set()
    for name, labels in (("a", [0, 1]), ("b", [1, 0]), ("c", [0, 1])):
        write_parquet(tmp_path / f"{name}.parquet", pictures(2), labels)
        prints.add(open_images(str(tmp_path / f"{name}.parquet")).fingerprint)
    assert len(prints) == 2


def test_what_cannot_be_used_is_said(tmp_path):
    good = pictures(2)
    write_parquet(tmp_path / "good.parquet", good, [0, 1])
    with pytest.raises(DataError, match=r"no column 'picture'.*it has image, label|image"):
        open_images(str(tmp_path / "good.parquet"), image_column="picture")
    with pytest.raises(DataError, match="did you mean 'label'"):
        open_images(str(tmp_path / "good.parquet"), label_column="labels")
    with pytest.raises(DataError, match=r"'.*gone\.parquet' does not exist"):
        open_images(str(tmp_path / "gone.parquet"))
    with pytest.raises(DataError, match="no file matches"):
        open_images(str(tmp_path / "*.pq"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="neither Parquet files nor"):
        open_images(str(tmp_path / "empty"))
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        open_images(str(tmp_path / "text.parquet"))
    bad = {"image": [encode_png(good[0]), b"junk"], "label": [0, 0]}
    pq.write_table(pa.table(bad), tmp_path / "junk.parquet")
    with pytest.raises(DataError, match="row 1: the image cannot be decoded"):
        everything(open_images(str(tmp_path / "junk.parquet")))
    write_parquet(tmp_path / "range.parquet", good, [0, 5], names=["a", "b"])
    with pytest.raises(DataError, match="row 1: label 5 is not one of the 2 classes"):
        everything(open_images(str(tmp_path / "range.parquet")))
    write_parquet(tmp_path / "null.parquet", good, [0, None], names=["a", "b"])
    with pytest.raises(DataError, match="row 1: the label None"):
        everything(open_images(str(tmp_path / "null.parquet")))
    with pytest.raises(DataError, match="row 2 asked for"):
        everything(open_images(str(tmp_path / "good.parquet")), rows=[0, 2])


def test_a_name_that_no_hub_knows(tmp_path, monkeypatch):
    import datasets

    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub\nlong details")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError, match=r"neither a file nor a folder here.*Couldn't reach the hub$"
    ):
        open_images("owner/name:train")


def test_a_hub_data_set_is_read_like_any_other(monkeypatch):
    import datasets

    images = pictures(5)
    data = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": encode_png(i), "path": None} for i in images],
            "label": [1, 0, 1, 1, 0],
        },
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])}
        ),
    )
    asked = []

    def load(name, split):
        asked.append((name, split))
        return data

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = open_images("owner/name:test")
    assert asked == [("owner/name", "test")]
    assert source.class_names == ("no", "yes")
    np.testing.assert_array_equal(everything(source)[1], images)


@given(side=st.integers(1, 9), channels=st.sampled_from([1, 3]), seed=st.integers(0, 9))
def test_png_keeps_every_pixel(side, channels, seed):
    image = pictures(1, side, channels, seed)[0]
    data = encode_png(image)
    assert encode_png(image) == data
    np.testing.assert_array_equal(decode_image(data, "x"), image)


def test_contact_sheet(tmp_path):
    images = pictures(5, side=8)
    sheet = image_grid(images, columns=3, path=tmp_path / "s.png", scale=2, gap=1)
    assert sheet.shape == (2 * 17 + 1, 3 * 17 + 1, 3)
    np.testing.assert_array_equal(sheet[18:34:2, 1:17:2], images[3])
    np.testing.assert_array_equal(decode_image((tmp_path / "s.png").read_bytes(), "s"), sheet)
