"""The PyTorch data sets: what an item holds, and that it depends on (seed, epoch, index) alone."""

import json
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mixed_run import blended_digits
from PIL import Image
from published_set import publish_rows
from torch.utils.data import DataLoader

from diffcal.data.images import decode_image, encode_png
from diffcal.data.soft_label_dataset import (
    PairedSoftLabelDataset,
    SoftLabelDataset,
    _Transformed,
    image_tensor,
)
from diffcal.data.soft_labels import published_schema
from diffcal.data.sources import open_images
from diffcal.errors import ConfigError, DataError
from diffcal.mixing.quality import FilterConfig

GOLDEN = Path(__file__).parents[1] / "golden" / "csm.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty-five groups of five, one for each pair of digits; do not write into it."""
    return publish_rows(tmp_path_factory.mktemp("set") / "dataset", groups=45)


def jitter(image, generator):
    """A transform whose result shows what the generator gave."""
    value = torch.rand((), generator=generator)
    return torch.from_numpy(image).permute(2, 0, 1) / 255 + value


def flip(image):
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def test_items_are_images_and_soft_labels(folder):
    columns, annotation = blended_digits(45, 5)
    data = SoftLabelDataset(folder)
    assert len(data) == 225
    image, label = data[-1]
    pixels = decode_image(columns["image"][224]["bytes"], "test")
    assert image.shape == (1, 8, 8)
    torch.testing.assert_close(
        image, torch.from_numpy(pixels).permute(2, 0, 1) / 255, rtol=0, atol=0
    )
    assert label.tolist() == annotation["soft_label"][224]
    with pytest.raises(IndexError):
        data[225]
    images, labels = next(iter(DataLoader(data, batch_size=8)))
    assert images.shape == (8, 1, 8, 8)
    assert labels.shape == (8, 10)


def test_filters_apply_when_training(folder):
    _, annotation = blended_digits(45, 5)
    data = SoftLabelDataset(folder, keep=FilterConfig(max_residual=0.8).keep)
    kept = np.flatnonzero(np.float32(annotation["residual"]) <= 0.8)
    assert 0 < len(data) == len(kept) < 225
    for index in (0, len(kept) - 1):
        assert data[index][1].tolist() == annotation["soft_label"][kept[index]]
    with pytest.raises(DataError, match=r"no image of .* is kept \(225 are there\)"):
        SoftLabelDataset(folder, keep=FilterConfig(max_residual=0.0).keep)


def test_transforms_get_arrays_or_pillow_images(folder):
    plain = SoftLabelDataset(folder)[3][0]
    mirrored = SoftLabelDataset(folder, transform=flip, decode="pil")[3][0]
    torch.testing.assert_close(mirrored, plain.flip(2), rtol=0, atol=0)
    arrays = SoftLabelDataset(folder, transform=lambda image: image[:, ::-1].astype(np.float32))
    torch.testing.assert_close(arrays[3][0], plain.flip(2) * 255, rtol=0, atol=1e-4)
    with pytest.raises(DataError, match="str is no image"):
        SoftLabelDataset(folder, transform=lambda image: "image")[0]
    with pytest.raises(ConfigError, match="decode must be"):
        _Transformed(None, "opencv", 0)


def test_image_tensor_takes_what_transforms_return():
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    wanted = torch.arange(24).reshape(2, 4, 3).permute(2, 0, 1) / 255
    for image in (pixels, Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)):
        torch.testing.assert_close(image_tensor(image), wanted, rtol=0, atol=0)
    assert image_tensor(np.zeros((2, 4))).shape == (1, 2, 4)
    assert image_tensor(np.zeros((2, 4))).dtype == torch.float32
    with pytest.raises(DataError, match="must be uint8 or floating"):
        image_tensor(torch.zeros(3, 2, 2, dtype=torch.int64))


def test_random_transforms_follow_seed_epoch_and_index(folder):
    data = SoftLabelDataset(folder, transform=jitter)
    first = [data[i][0] for i in range(4)]
    assert all(torch.equal(data[i][0], first[i]) for i in (3, 1, 0, 2))
    assert not torch.equal(
        first[0] - SoftLabelDataset(folder)[0][0], first[1] - SoftLabelDataset(folder)[1][0]
    )
    data.set_epoch(1)
    assert not torch.equal(data[0][0], first[0])
    data.set_epoch(0)
    assert torch.equal(data[0][0], first[0])
    assert not torch.equal(SoftLabelDataset(folder, transform=jitter, seed=1)[0][0], first[0])


def test_pairs_hold_an_anchor_and_an_intermediate_of_a_group_with_the_class(folder):
    columns, annotation = blended_digits(45, 5)
    labels = torch.tensor(annotation["soft_label"])
    rows = {tuple(row.tolist()): index for index, row in enumerate(labels)}
    assert len(rows) == 225
    real = open_images("digits")
    pairs = PairedSoftLabelDataset(real, folder)
    assert len(pairs) == 1797
    _, images, hard = next(real.batches(60, range(60)))
    for index in range(60):
        item = pairs[index]
        assert item.label == hard[index]
        torch.testing.assert_close(
            item.image, torch.from_numpy(images[index]).permute(2, 0, 1) / 255, rtol=0, atol=0
        )
        anchor, between = (rows[tuple(row.tolist())] for row in item.soft_label)
        assert columns["group"][anchor] == columns["group"][between]
        group = [r for r in range(225) if columns["group"][r] == columns["group"][anchor]]
        assert item.label in columns["classes"][anchor]
        assert anchor == max(group, key=lambda r: float(labels[r, item.label]))
        for image, row in zip(item.mixed, (anchor, between), strict=True):
            pixels = decode_image(columns["image"][row]["bytes"], "test")
            assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1) / 255)


def test_training_item_of_the_golden_case(tmp_path):
    """Anchor and intermediate of the published rule, for the group of the golden file."""
    case = json.loads(GOLDEN.read_text())["cases"]["training_item_selection"]
    first, second = case["inputs"]["pair"]
    estimates = torch.tensor([m["lambda_hat"] for m in case["inputs"]["group"]])
    top = torch.sigmoid(case["inputs"]["s"] * (estimates.double() - 0.5))
    soft = torch.zeros(8, 10)
    soft[:, first], soft[:, second] = top.float(), 1 - top.float()
    content = {name: [None] * 8 for name in published_schema([]).names}
    content |= {"soft_label": soft.tolist(), "group": [7] * 8, "classes": [[first, second]] * 8}
    content["weights"] = [[m["lambda_gen"], 1 - m["lambda_gen"]] for m in case["inputs"]["group"]]
    content["image"] = [
        {"bytes": encode_png(np.full((1, 1, 1), i, np.uint8)), "path": None} for i in range(8)
    ]
    schema = published_schema(list("0123456789"))
    table = pa.table([pa.array(content[f.name], f.type) for f in schema], schema=schema)
    (tmp_path / "data").mkdir()
    pq.write_table(table, tmp_path / "data" / "train.parquet")
    files = [member["file"] for member in case["inputs"]["group"]]
    for golden in case["cases"]:
        real = [(np.zeros((1, 1, 1), np.uint8), golden["real_label"])] * 64
        wanted = [files.index(member["file"]) for member in golden["expected"]]
        pairs = PairedSoftLabelDataset(real, tmp_path)
        drawn = [[round(255 * float(image)) for image in pairs[i].mixed] for i in range(64)]
        ranked = sorted(range(8), key=lambda i: -float(top[i]))
        assert {anchor for anchor, _ in drawn} == {wanted[0]}
        assert {between for _, between in drawn} == set(ranked[1:7])
        item = pairs[drawn.index(wanted)]
        for row, member in zip(item.soft_label, golden["expected"], strict=True):
            assert float(row[first]) == pytest.approx(member["target_c1"], abs=1e-6)
            assert float(row[second]) == pytest.approx(member["target_c2"], abs=1e-6)


def all_items(pairs, workers, **options):
    loader = DataLoader(pairs, batch_size=16, num_workers=workers, **options)
    batches = list(loader)
    return [torch.cat([getattr(b, name) for b in batches]) for name in batches[0]._fields]


def test_workers_change_nothing_and_see_new_epochs(folder):
    real = [(image, label) for _, (image,), (label,) in open_images("digits").batches(1, range(48))]
    pairs = PairedSoftLabelDataset(real, folder, transform=jitter, per_real=3)
    alone = all_items(pairs, 0)
    assert alone[2].shape == (48, 3, 1, 8, 8)
    for one, two in zip(alone, all_items(pairs, 2), strict=True):
        assert torch.equal(one, two)
    loader = DataLoader(pairs, batch_size=48, num_workers=1, persistent_workers=True)
    first = next(iter(loader))
    assert torch.equal(first.soft_label, alone[3])
    pairs.set_epoch(1)
    second = next(iter(loader))
    assert not torch.equal(second.soft_label, first.soft_label)
    pairs.set_epoch(0)
    assert torch.equal(next(iter(loader)).soft_label, first.soft_label)


def test_pickles_are_small_and_draw_the_same(folder):
    real = [(np.zeros((8, 8, 1), np.uint8), 3)]
    pairs = PairedSoftLabelDataset(real, folder)
    pairs.set_epoch(2)
    wanted = pairs[0]
    data = pickle.dumps(pairs)
    assert len(data) < 8000
    again = pickle.loads(data)[0]
    assert torch.equal(again.soft_label, wanted.soft_label)
    assert torch.equal(again.mixed, wanted.mixed)


def test_real_images_come_in_many_forms(folder):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    wanted = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    soft = np.float32([0, 0, 0, 0.4, 0.6, 0, 0, 0, 0, 0])
    for image, label in (
        (Image.fromarray(pixels[:, :, 0]), 4),
        (pixels[:, :, 0], np.int64(4)),
        (torch.from_numpy(pixels).permute(2, 0, 1), torch.tensor(4)),
        (pixels, soft),
    ):
        for item in ((image, label), {"image": image, "label": label}):
            found = PairedSoftLabelDataset([item], folder)[0]
            assert torch.equal(found.image, wanted)
            assert (found.soft_label[0] > 0.1)[4]
            if label is soft:
                assert torch.equal(found.label, torch.from_numpy(soft))
            else:
                assert found.label == 4
    for bad in (torch.zeros(1, 8, 8), np.zeros((8, 8)), "file.png"):
        with pytest.raises(DataError, match="real images must"):
            PairedSoftLabelDataset([(bad, 4)], folder)[0]
    with pytest.raises(DataError, match="real image 0 has label 10, but there are 10 classes"):
        PairedSoftLabelDataset([(pixels, 10)], folder)[0]


def test_bad_settings_are_named(folder):
    real = open_images("digits")
    with pytest.raises(ConfigError, match="per_real must be at least 1"):
        PairedSoftLabelDataset(real, folder, per_real=0)
    with pytest.raises(ConfigError, match="anchor_fraction must be in"):
        PairedSoftLabelDataset(real, folder, anchor_fraction=1.5)
    real.class_names = tuple("abcdefghij")
    with pytest.raises(DataError, match=r"the real images a, b, c"):
        PairedSoftLabelDataset(real, folder)
