"""Losses with state across epochs: their updates, their checkpoints, and the trainer that calls them."""

import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits

from diffcal.calibration.losses.adafocal import AdaFocal, adafocal, next_gammas
from diffcal.calibration.losses.adaptive_dual_focal import AdaDualFocal, dual_flsd
from diffcal.calibration.losses.dual_focal import dual_focal
from diffcal.calibration.losses.epoch_loss import EpochEnd
from diffcal.calibration.losses.focal import focal
from diffcal.calibration.losses.ranking import Crl, crl_term
from diffcal.calibration.losses.registry import build_loss
from diffcal.calibration.losses.soft_target import cross_entropy
from diffcal.calibration.training import ClassifierTrainer
from diffcal.calibration.training_config import (
    AugmentationConfig,
    ClassifierConfig,
    LossConfig,
    MixedConfig,
)
from diffcal.calibration.training_data import LabelledImages, TrainingData
from diffcal.calibration.training_loop import fit_classifier
from diffcal.errors import ConfigError, DataError
from diffcal.models.registry import build_classifier
from tests.calibration.losses.cases import GOLDEN, f64


def test_golden_updates_of_gammas():
    table = GOLDEN["tables"]["adafocal_update"]
    rows = table["rows"]
    gammas, gaps, expected = (f64([row[key] for row in rows]) for key in ("gamma", "gap", "next"))
    torch.testing.assert_close(next_gammas(gammas, gaps), expected, rtol=1e-12, atol=0)


def overconfident(n=3000):
    """Validation logits of a model that is right 3 times in 4 and claims more the larger they are."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (n,), generator=generator)
    logits = torch.zeros(n, 4)
    shown = torch.where(torch.rand(n, generator=generator) < 0.75, labels, (labels + 1) % 4)
    logits[torch.arange(n), shown] = 1 + 5 * torch.rand(n, generator=generator)
    return logits, labels


def test_adafocal_follows_validation_and_survives_a_checkpoint():
    loss = AdaFocal(bins=5)
    logits, labels = overconfident()
    z, y = logits[:50].double(), labels[:50]
    torch.testing.assert_close(loss(z, y), focal(z, y, gamma=1.0), rtol=1e-12, atol=0)
    loss.end_epoch(EpochEnd(0.5, logits, labels))
    # the first edges are equal widths; p ranges over (0.47, 0.99) and accuracy is 0.75 everywhere
    p = logits.softmax(1).amax(1)
    bins = torch.bucketize(p, torch.tensor([0.2, 0.4, 0.6, 0.8]))
    right = (logits.argmax(1) == labels).float()
    for index in range(5):
        inside = bins == index
        gap = float(p[inside].mean() - right[inside].mean()) if inside.any() else 0.0
        assert float(loss.gammas[index]) == pytest.approx(torch.tensor(gap).exp().item(), rel=1e-4)
    assert loss.gammas[4] > 1.1 > 0.95 > loss.gammas[2]
    edges = loss.edges
    assert (torch.bincount(torch.bucketize(p, edges[1:-1].contiguous())) - 600).abs().max() <= 1
    for _ in range(30):
        loss.end_epoch(EpochEnd(1.0, logits, labels))
    # equal-mass bins: the least confident fifth is under-confident, so that its gamma turned round
    assert float(loss.gammas[0]) == pytest.approx(-2.0)
    assert float(loss.gammas[4]) > 20 - 1e-3
    other = AdaFocal(bins=5)
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other(z, y), loss(z, y), rtol=0, atol=0)
    expected = adafocal(z, y, gammas=loss.gammas, edges=loss.edges)
    torch.testing.assert_close(loss(z, y), expected, rtol=0, atol=0)


def test_ada_dual_focal_follows_validation_on_the_gap():
    loss = AdaDualFocal(bins=5)
    logits, labels = overconfident()
    z, y = logits[:50].double(), labels[:50]
    torch.testing.assert_close(loss(z, y), dual_focal(z, y, gamma=1.0), rtol=1e-12, atol=0)
    twin = AdaFocal(bins=5)
    for part in (loss, twin):
        part.end_epoch(EpochEnd(0.5, logits, labels))
    # the first step of the common rule, and its edges
    torch.testing.assert_close(loss.gammas, twin.gammas, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.edges, twin.edges, rtol=0, atol=0)
    # beside a plain loop: the gamma of the bin that holds p_y - p_j
    p = z.softmax(1)
    values = []
    for row, label in zip(p.tolist(), y.tolist(), strict=True):
        below = max((q for q in row if q < row[label] - 1e-12), default=0.0)
        gap = row[label] - below
        place = int((loss.edges[1:-1].double() < gap).sum())
        values.append(-((1 - gap) ** float(loss.gammas[place])) * math.log(row[label]))
    torch.testing.assert_close(
        loss(z, y), torch.tensor(values).double().mean(), rtol=1e-6, atol=1e-9
    )
    for _ in range(60):
        loss.end_epoch(EpochEnd(1.0, logits, labels))
    # under-confident bins lose their weight but never turn round
    assert 0 < float(loss.gammas[0]) < 0.1
    assert float(loss.gammas[4]) == 20.0
    other = AdaDualFocal(bins=5)
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other(z, y), loss(z, y), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="0 < initial <= highest"):
        AdaDualFocal(initial=-1.0)


def test_dual_flsd_takes_its_gamma_from_the_gap():
    # gaps of the true class to the runner-up below it: 0.1, 0.3, 0.5 (an edge) and 0.8
    probs = torch.tensor(
        [[0.5, 0.4, 0.1], [0.6, 0.3, 0.1], [0.7, 0.2, 0.1], [0.9, 0.1, 0.0]], dtype=torch.float64
    )
    z, y = probs.clamp(min=1e-12).log(), torch.zeros(4).long()
    gammas = [5.0, 3.0, 1.5, 1.5]
    found = dual_flsd(z, y, gamma=1.5, reduction="none")
    for i, gamma in enumerate(gammas):
        expected = dual_focal(z[i : i + 1], y[:1], gamma=gamma, reduction="none")
        if i != 2:  # rounding decides at an edge
            torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-9, atol=0)
    with pytest.raises(ConfigError, match="gamma"):
        dual_flsd(z, y, gamma=-1.0)


def test_crl_keeps_records_by_example():
    loss = Crl()
    loss.begin(6)
    z = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0]], dtype=torch.float64)
    examples = torch.tensor([4, 0, 2])
    y = torch.tensor([0, 0, 0])
    first = loss.parts(z, y, examples)
    torch.testing.assert_close(first.term.item(), 0.0)  # no records, no ranks
    torch.testing.assert_close(loss(z, y, examples), cross_entropy(z, y), rtol=1e-12, atol=0)
    # two processes have seen the same: their notes are added
    loss.end_epoch(EpochEnd(0.5, total=lambda notes: 2 * notes))
    assert loss.seen.tolist() == [2, 0, 2, 0, 2, 0]
    assert loss.right.tolist() == [0, 0, 2, 0, 2, 0]
    loss(z, torch.tensor([1, 0, 0]), examples)
    torch.testing.assert_close(loss.history(examples), torch.tensor([2 / 3, 0.0, 1.0]))
    parts = loss.parts(z, y, examples)
    term = crl_term(z, y, loss.history(examples))
    assert term > 0
    torch.testing.assert_close(parts.total, parts.base + term, rtol=1e-12, atol=0)
    before = loss.newly_seen.clone()
    loss.eval()(z, y, examples)
    assert loss.newly_seen.equal(before)  # validation leaves no trace
    other = Crl()
    other.begin(6)
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other.history(examples), loss.history(examples), rtol=0, atol=0)
    loss.train()(z, torch.tensor([[0.25, 0.75]] * 3).double(), torch.tensor([1, 3, 5]))
    assert loss.newly_right[[1, 3, 5]].tolist() == [0.25, 0.75, 0.25]


def test_released_records_of_crl():
    loss = Crl(released=True)
    loss.begin(3)
    z, examples = torch.tensor([[1.0, 0.0]] * 3), torch.arange(3)
    for labels in ([0, 0, 1], [0, 1, 1], [0, 0, 0]):
        loss(z, torch.tensor(labels), examples)
        loss.end_epoch(EpochEnd(0.1))
    # right 3, 2, 1 times in 3 epochs: (c - 1) / (3 - 1)
    assert loss.history(examples).tolist() == [1.0, 0.5, 0.0]


def test_scheduled_focal_keeps_its_place_in_the_run():
    loss, z, y = build_loss("scheduled_focal"), torch.randn(6, 4).double(), torch.arange(6) % 4
    # gamma changes with the epoch that reaches the share, float32 or not
    for progress, gamma in ((0.0, 5.0), (99 / 350, 5.0), (100 / 350, 3.0), (0.7, 3.0), (0.72, 1.0)):
        if progress:
            loss.end_epoch(EpochEnd(progress))
        torch.testing.assert_close(loss(z, y), focal(z, y, gamma=gamma), rtol=1e-12, atol=0)
        other = build_loss("scheduled_focal")
        other.load_state_dict(loss.state_dict())
        assert other.gamma == gamma


def test_bad_use_is_named():
    crl = Crl()
    z, y = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ConfigError, match="begin"):
        crl(z, y, torch.arange(2))
    crl.begin(2)
    with pytest.raises(DataError, match="examples run from 0 to 2"):
        crl(z, y, torch.tensor([0, 2]))
    with pytest.raises(DataError, match="examples must be"):
        crl(z, y, torch.tensor([0, 1, 0]))
    with pytest.raises(DataError, match="history"):
        crl_term(z, y, torch.zeros(3))
    with pytest.raises(ConfigError, match="whole batch"):
        build_loss("crl", reduction="none")
    with pytest.raises(ConfigError, match="validation"):
        AdaFocal().end_epoch(EpochEnd(1.0))
    with pytest.raises(ConfigError, match="bins"):
        AdaFocal(bins=0)
    with pytest.raises(ConfigError, match="initial"):
        AdaFocal(initial=30.0)
    with pytest.raises(DataError, match="edges"):
        adafocal(z, y, gammas=torch.ones(2), edges=torch.tensor([0.0, 1.0]))
    with pytest.raises(ConfigError, match="3 gammas"):
        build_loss("scheduled_focal", gammas=(5.0, 3.0), shares=(0.2, 0.5))


NAMES = tuple("0123456789")
SMALL = ClassifierConfig(
    model="cnn-tiny",
    epochs=3,
    batch_size=64,
    augmentation=AugmentationConfig(crop_padding=0, flip=False),
)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = torch.tensor((data.images * 255 / 16).round()).to(torch.uint8)[..., None]
    everything = LabelledImages(images, torch.tensor(data.target))
    train, validation = everything.rows(torch.arange(320)), everything.rows(torch.arange(320, 420))
    return TrainingData(train, NAMES, validation=validation)


def trainer_of(data, name, **params):
    torch.manual_seed(0)
    config = replace(SMALL, loss=LossConfig(name=name, params=params))
    model = build_classifier("cnn-tiny", 10, 1, 8)
    return ClassifierTrainer(model, data, config, Accelerator(cpu=True))


@pytest.mark.parametrize("name", ["adafocal", "ada_dual_focal", "crl", "scheduled_focal"])
def test_training_with_state_resumes_exactly(digits, tmp_path, name, monkeypatch):
    config = replace(
        SMALL, loss=LossConfig(name=name), save_every_steps=2, evaluate_every=2, schedule="constant"
    )

    def fit(folder):
        return fit_classifier(digits, config, tmp_path / folder, accelerator=Accelerator(cpu=True))

    trainers = []
    original = ClassifierTrainer.train_step

    class Stop(Exception):
        pass

    def step(self):
        if self not in trainers:
            trainers.append(self)
        if self.step == 9 and len(trainers) == 2:  # in the second epoch of 5 steps
            raise Stop
        original(self)

    monkeypatch.setattr(ClassifierTrainer, "train_step", step)
    whole = fit("whole")
    with pytest.raises(Stop):
        fit("parts")
    assert fit("parts")["steps_this_call"] == 15 - 8
    for file in ("classifier/classifier.safetensors", "metrics.jsonl", "summary.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    assert whole["steps"] == 15
    one, _, two = (trainer.epoch_loss.state_dict() for trainer in trainers)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=0, atol=0)
    if name in ("adafocal", "ada_dual_focal"):
        assert (one["gammas"] != 1).any()
        assert not one["edges"].equal(torch.linspace(0, 1, 16))
    elif name == "crl":
        assert one["seen"].tolist() == [3.0] * 320
        assert 0 < one["right"].sum() < 960
    else:
        assert trainers[0].epoch_loss.gamma == 1.0


def test_trainer_gives_records_to_the_right_examples(digits):
    trainer = trainer_of(digits, "crl")
    batch = trainer.batches()[0]
    labels = digits.train.labels[batch.real_rows]
    assert labels.equal(batch.real_targets)
    trainer.network.train()
    with torch.no_grad():
        right = trainer.network(batch.real).argmax(1) == labels
    trainer.train_step()
    torch.testing.assert_close(
        trainer.epoch_loss.newly_right[batch.real_rows], right.float(), rtol=0, atol=0
    )


def test_trainer_refuses_what_it_cannot_serve(digits):
    with pytest.raises(ConfigError, match="needs validation images"):
        trainer_of(replace(digits, validation=None), "adafocal")
    with pytest.raises(ConfigError, match=r"data_method\.ranking"):
        trainer_of(digits, "rank_mixup_mndcg")
    mixed = MixedConfig(loss=LossConfig(name="crl"))
    with pytest.raises(ConfigError, match="not for mixed"):
        ClassifierTrainer(
            build_classifier("cnn-tiny", 10, 1, 8),
            digits,
            replace(SMALL, mixed=mixed),
            Accelerator(cpu=True),
        )
