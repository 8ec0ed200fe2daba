"""The data set card: a header that parses, and the numbers of the manifest."""

import json

import pytest
from huggingface_hub import DatasetCard

from diffcal.data.card import dataset_card


def manifest(**changes):
    ratio = {"images": 50, "first_class_probability": 0.4, "entropy": 0.5}
    estimated = {"estimates": 50, "estimate_mean": 0.45, "estimate_sd": 0.1}
    return {
        "annotator": "all-class",
        "filter": {"max_residual": None, "max_third_mass": None, "require_endpoints": False},
        "class_names": ["cat", "dog|hound"],
        "members": 8,
        "images": 12345,
        "generated": 20000,
        "dropped": {},
        "statistics": {
            "means": {"entropy": 0.25, "top_probability": 0.9, "residual": None},
            "images_per_class": [6000, 6345],
            "mass_per_class": [6100.25, 6244.75],
            "ratios": [{"ratio": 0.5, **ratio, **estimated}],
            "ratio_rows": "values",
        },
        "provenance": {"config": {"seed": 3}, "denoiser": "abc", "encoder": None},
        "previews": [{"file": "previews/ladder-0.png", "caption": "From cat to dog."}],
        **changes,
    }


def test_header_is_read_by_data_set_hubs():
    card = DatasetCard(dataset_card(manifest()))
    assert card.data.size_categories == ["10K<n<100K"]
    assert card.data.task_categories == ["image-classification"]
    (config,) = card.data.to_dict()["configs"]
    assert config["data_files"] == [{"split": "train", "path": "data/train-*.parquet"}]


@pytest.mark.parametrize(
    ("images", "size"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (10**7, "n>10M"), (999_999, "100K<n<1M")],
)
def test_sizes(images, size):
    assert DatasetCard(dataset_card(manifest(images=images))).data.size_categories == [size]


def test_numbers_and_pictures_are_shown():
    text = dataset_card(manifest())
    assert "| images | 12 345 |" in text
    assert "| mean entropy of the soft label (nats) | 0.250 |" in text
    assert "off-axis residual |" not in text.split("## Columns")[0]
    assert "| 0.500 | 50 | 0.450 ± 0.100 | 0.400 | 0.500 |" in text
    assert "| 1 | dog/hound | 6 345 | 6244.8 |" in text
    assert "![From cat to dog.](previews/ladder-0.png)" in text
    assert "None: every generated image is here" in text
    assert json.dumps({"seed": 3}, indent=2) in text
    # every table row has the cells of its header
    cells = {}
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        cells[block[:30]] = {row.count("|") for row in rows}
    assert all(len(counts) <= 1 for counts in cells.values())


def test_filters_and_continuous_ratios_are_told():
    values = manifest(
        filter={"max_residual": 1.5, "max_third_mass": None, "require_endpoints": True},
        dropped={"max_residual": 7000, "require_endpoints": 900},
    )
    values["statistics"]["ratio_rows"] = "tenths"
    values["statistics"]["ratios"][0].update(estimate_mean=None, estimate_sd=None, estimates=0)
    text = dataset_card(values)
    assert "| `max_residual` | 1.5 | 7 000 |" in text
    assert "| `require_endpoints` | True | 900 |" in text
    assert "7 655 of 20 000 images were left out" in text
    assert "rows gather tenths of it" in text
    assert "| 0.500 | 50 |  | 0.400 | 0.500 |" in text


def test_many_classes_are_cut():
    names = [f"class {index}" for index in range(250)]
    values = manifest(class_names=names)
    values["statistics"] |= {"images_per_class": [1] * 250, "mass_per_class": [1.0] * 250}
    text = dataset_card(values)
    assert "class 199 |" in text
    assert "class 200 |" not in text
    assert "50 more classes are listed" in text
