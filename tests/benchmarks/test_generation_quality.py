"""The measures of the generation benchmark, and the whole script on a few digits."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffcal.models.classifier import TrainedClassifier, save_classifier
from diffcal.models.registry import build_classifier

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def measures(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import _generation_measures

    return _generation_measures


@pytest.fixture
def copies(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import _generation_copies

    return _generation_copies


def test_wilson_interval_of_a_textbook_case(measures):
    assert measures.wilson(8, 10) == pytest.approx([0.8, 0.4902, 0.9433], abs=1e-4)
    assert measures.wilson(10, 10)[1:] == pytest.approx([0.7225, 1.0], abs=1e-4)


def test_bootstrap_leaves_nan_out_and_brackets_the_mean(measures):
    values = torch.tensor([0.0, 1.0, float("nan"), 2.0, 3.0])
    mean, low, high = measures.bootstrap(values)
    assert mean == 1.5
    assert 0 <= low < 1.5 < high <= 3
    with pytest.raises(ValueError, match="nothing to average"):
        measures.bootstrap(torch.tensor([float("nan")]))


def test_largest_step_of_a_straight_ladder_a_jump_and_no_passage(measures):
    straight = torch.arange(8).mul(10)[:, None, None, None].expand(8, 2, 2, 1)
    jump = torch.tensor([0, 0, 0, 70, 70, 70, 70, 70])[:, None, None, None].expand(8, 2, 2, 1)
    images = torch.stack([straight, jump, torch.zeros_like(jump)]).byte()
    found = measures.largest_steps(images)
    torch.testing.assert_close(found[:2], torch.tensor([1 / 7, 1.0], dtype=torch.float64))
    assert bool(found[2].isnan())


def test_curve_keeps_the_ends_apart_from_what_lies_beside_them(measures):
    requested = torch.tensor([0.0, 0.05, 0.5, 0.5, 0.97, 1.0], dtype=torch.float64)
    estimate = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], dtype=torch.float64)
    points = measures.curve(requested, estimate)
    assert [point["images"] for point in points] == [1, 1, 2, 1, 1]
    assert [point["median"] for point in points] == pytest.approx([0, 0.2, 0.5, 0.8, 1])


def _random(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 6, 6, 1), generator=generator).byte()


def test_copies_are_found_and_mirrored_ones_only_where_training_mirrored(copies):
    train = _random(300, 0)
    held = _random(240, 1)
    flipped = train[:50].flip(2)
    for mirrored, expected in ((False, 0.0), (True, 1.0)):
        rows = copies.CentredPixels(train, mirrored)
        reference = rows.likeness(held)
        exact = copies._judge(rows.likeness(train[:50]), reference, copies.LIKENESS)
        assert exact["alike"][0] == exact["near_copy"][0] == 1
        assert exact["median_likeness"] == pytest.approx(1, abs=1e-5)
        turned = copies._judge(rows.likeness(flipped), reference, ("near_copy",))
        assert turned["near_copy"][0] == pytest.approx(expected, abs=0.05)


def test_alike_asks_for_likeness_alone(copies):
    """A copy of an image of which there are many is no near copy: it is not isolated."""
    train = torch.cat([_random(1, 2).expand(200, 6, 6, 1), _random(100, 0)])
    rows = copies.CentredPixels(train, False)
    reference = rows.likeness(_random(240, 1))
    found = copies._judge(rows.likeness(train[:20]), reference, copies.LIKENESS)
    assert found["alike"][0] == 1
    assert found["near_copy"][0] == 0


def test_real_parts_hold_all_classes_alike(measures):
    labels = torch.arange(5).repeat_interleave(8)
    order = measures._in_turn(labels)
    assert sorted(order.tolist()) == list(range(40))
    for part in labels[order].split(10):
        assert part.bincount().tolist() == [2] * 5


def test_held_out_images_are_judged_by_their_other_half(copies):
    train, held = _random(300, 0), _random(240, 1)
    held[0::2][:60] = train[:60]  # a quarter of all, in one half alone
    rows = copies.CentredPixels(train, False)
    control = copies._control(rows.likeness(held), ("near_copy",))
    # Judged by themselves at their 99 % quantile at most 1 % of them could be flagged.
    assert control["near_copy"][0] == pytest.approx(0.25, abs=0.02)


@pytest.fixture
def classifier(tmp_path):
    """Not trained: the script asks for no accuracy, it reports that the experiment failed."""
    torch.manual_seed(0)
    network = build_classifier("cnn-small", 10, 1, 8).eval()
    names = tuple(map(str, range(10)))
    mean, std = torch.tensor([0.3]), torch.tensor([0.3])
    save_classifier(
        tmp_path / "classifier",
        TrainedClassifier(network, mean, std, names, (8, 8, 1), "cnn-small"),
    )
    return tmp_path / "classifier"


def _flat(value):
    """All numbers in a JSON value, in order."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _flat(part)
    elif isinstance(value, int | float):
        yield value


def test_script_writes_everything_and_draws_nothing_twice(
    measures, monkeypatch, classifier, tmp_path
):
    import _generation_images
    import generation_quality

    settings = (("fast", 1.0), ("fast", 2.0))
    small = replace(
        _generation_images.SET_UPS["digits"], settings=settings, compared=(20, 200), thorough=False
    )
    monkeypatch.setitem(_generation_images.SET_UPS, "digits", small)
    out, figure = tmp_path / "result.json", tmp_path / "docs" / "figure.png"
    sizes = ["--parts", "2", "--images", "10", "--groups", "2", "--classifier", str(classifier)]
    files = ["--work", str(tmp_path / "work"), "--out", str(out), "--figure", str(figure)]
    options = generation_quality.parsed(["digits", *sizes, *files])
    threads = torch.get_num_threads()
    try:
        generation_quality.main(options)
        first = json.loads(out.read_text("utf-8"))
        figure.unlink()
        for name in ("draw", "generate_images"):
            monkeypatch.setattr(_generation_images, name, None)
        generation_quality.main(options)
    finally:
        torch.set_num_threads(threads)
    again = json.loads(out.read_text("utf-8"))
    first.pop("environment")
    again.pop("environment")
    assert list(_flat(again)) == pytest.approx(list(_flat(first)), abs=1e-6)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert any("accuracy" in reason for reason in first["failed"])
    assert [row["rows_per_image"] for row in first["pure"]] == [13, 26]
    assert first["pure"][0]["images"] == 20
    kinds = first["ladders"]["kinds"]
    assert list(kinds) == list(_generation_images.LADDERS)
    for kind in kinds.values():
        assert kind["images"] == 16
        assert 1 / 7 - 1e-9 <= kind["measures"]["largest_step"][0] < 2
    # Halving the largest step is what the bisection is for.
    steps = {name: kind["measures"]["largest_step"][0] for name, kind in kinds.items()}
    assert steps["label, bisected"] < steps["label"]
    text = out.with_suffix(".md").read_text("utf-8")
    assert "Failed by the protocol" in text
    assert all(f"| {name} |" in text for name in kinds)


def test_cifar10_asks_for_its_files(measures, tmp_path):
    import generation_quality

    options = generation_quality.parsed(["cifar10", "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="--data and --classifier"):
        generation_quality.main(options)
