"""Pictures of a data set: right pixels, right size, the same bytes."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from published_set import publish_rows

from diffcal.data.images import decode_image, encode_png
from diffcal.data.ladders import Ladder, LadderStep, select_ladders
from diffcal.workflows.previews import IMAGE, draw_class_balance, draw_ladder, draw_ratios


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    return select_ladders(publish_rows(tmp_path_factory.mktemp("set") / "dataset"), 1)[0]


def pixels_of(data):
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def contains(picture, patch):
    """Whether ``patch`` stands in ``picture`` pixel for pixel."""
    height, width = patch.shape[:2]
    for top, left in zip(*np.nonzero((picture == patch[0, 0]).all(axis=2)), strict=True):
        if np.array_equal(picture[top : top + height, left : left + width], patch):
            return True
    return False


def test_images_stand_in_it_pixel_for_pixel(ladder):
    picture = pixels_of(draw_ladder(ladder))
    for step in ladder.steps:
        small = decode_image(step.image, "test").repeat(3, axis=2)
        scale = IMAGE // 8
        assert contains(picture, small.repeat(scale, axis=0).repeat(scale, axis=1))


def test_bar_shows_the_soft_label(ladder):
    """Blue, grey and orange pixels of a bar are as many as the probabilities say."""
    step = replace(ladder.steps[0], soft_label=tuple(np.eye(10)[ladder.classes[0]] * 0.5 + 0.05))
    picture = pixels_of(draw_ladder(replace(ladder, steps=(step,)))).astype(int)
    blue = (np.abs(picture - [0x2F, 0x6D, 0xB3]).sum(axis=2) < 12).sum(axis=1).max()
    grey = (np.abs(picture - [0xC3, 0xCC, 0xD6]).sum(axis=2) < 12).sum(axis=1).max()
    assert blue == pytest.approx(0.55 * IMAGE, abs=2)
    assert grey == pytest.approx(0.40 * IMAGE, abs=2)


def test_same_ladder_same_bytes(ladder):
    assert draw_ladder(ladder) == draw_ladder(ladder)
    assert draw_ladder(ladder) != draw_ladder(replace(ladder, steps=ladder.steps[:-1]))


def test_large_colour_images_and_three_classes():
    rng = np.random.default_rng(0)
    image = encode_png(rng.integers(0, 256, (300, 200, 3), dtype=np.uint8))
    steps = tuple(
        LadderStep(
            0, image, (w, 0.5 - w / 2, 0.5 - w / 2), None, (0.4, 0.3, 0.2, 0.1), (("a $x", 0.4),)
        )
        for w in (1.0, 0.5, 0.0)
    )
    triple = Ladder(0, (0, 1, 2), ("a $x", "b_2", "c" * 40), steps)
    assert pixels_of(draw_ladder(triple)).shape[1] > 3 * IMAGE


def test_balance_of_few_and_many_classes():
    for count in (3, 12, 300):
        mass = np.linspace(1, 2, count)
        statistics = {"mass_per_class": mass.tolist(), "images_per_class": [1] * count}
        names = [f"name of {index}" for index in range(count)]
        assert pixels_of(draw_class_balance(statistics, names)).std() > 5


def test_ratios_need_only_rows_with_estimates():
    row = {"images": 5, "first_class_probability": 0.5, "entropy": 0.6}
    rows = [
        {"ratio": 0.5, "estimates": 5, "estimate_mean": 0.4, "estimate_sd": 0.1, **row},
        {"ratio": 1.0, "estimates": 0, "estimate_mean": None, "estimate_sd": None, **row},
    ]
    assert pixels_of(draw_ratios({"ratios": rows})).std() > 5


def test_points_of_different_groups_are_not_joined():
    row = {"images": 5, "estimates": 5, "estimate_sd": 0.0, "first_class_probability": 0.5}
    rows = [
        {"ratio": ratio, "estimate_mean": ratio, "entropy": ratio, **row} for ratio in (0.0, 1.0)
    ]
    curves, points = (
        pixels_of(draw_ratios({"ratios": rows}, bisected=bisected)) for bisected in (False, True)
    )
    assert curves.shape == points.shape
    # two straight lines of colour are missing
    assert (points < 250).sum() < 0.95 * (curves < 250).sum()
