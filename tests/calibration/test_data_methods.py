"""Mixup and RankMixup in the classifier trainer: the objective, its draws, resuming, refusals."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from diffcal.calibration.data_methods import draw_blends
from diffcal.calibration.losses.registry import LOSSES, build_loss
from diffcal.calibration.losses.soft_target import cross_entropy, smoothing_for_confidence
from diffcal.calibration.training import ClassifierTrainer
from diffcal.calibration.training_config import (
    AugmentationConfig,
    DataMethodConfig,
    LossConfig,
    MixedConfig,
)
from diffcal.config import build_config, config_to_dict
from diffcal.errors import ConfigError
from tests.calibration.test_classifier_training import (
    SMALL,
    ClassifierConfig,
    digits,  # noqa: F401 - a fixture
    fit,
    mixed_digits,  # noqa: F401 - a fixture
    trainer_of,
)

MIXUP = DataMethodConfig(name="mixup", alpha=0.4)
RANKED = DataMethodConfig(name="rank_mixup")
MRL = DataMethodConfig(
    name="rank_mixup", ranking=LossConfig(name="rank_mixup_mrl", params={"margin": 1.0})
)
CROPPED = replace(SMALL, augmentation=AugmentationConfig(crop_padding=1, flip=True))


@pytest.mark.parametrize("per_example", [False, True])
def test_mixup_blends_augmented_images_and_targets(digits, per_example):  # noqa: F811
    method = replace(MIXUP, per_example=per_example)
    raw = trainer_of(digits, CROPPED).batches()[0]
    made = trainer_of(digits, replace(CROPPED, data_method=method)).batches()[0]
    (draws,) = draw_blends(method, 64, 0, 0)
    share = draws.share.float()
    assert share.unique().numel() == (64 if per_example else 1)
    wide = share[:, None, None, None]
    expected = wide * raw.real + (1 - wide) * raw.real[draws.partner]
    torch.testing.assert_close(made.real, expected, rtol=0, atol=1e-6)
    q = F.one_hot(raw.real_targets, 10).float()
    expected = share[:, None] * q + (1 - share[:, None]) * q[draws.partner]
    torch.testing.assert_close(made.real_targets, expected, rtol=0, atol=1e-6)
    assert made.copies is None


@pytest.mark.parametrize("method", [MIXUP, RANKED], ids=["mixup", "rank_mixup"])
def test_passes_share_the_blends_of_the_whole_batch(digits, method):  # noqa: F811
    config = replace(CROPPED, data_method=method)
    (whole,) = trainer_of(digits, config).batches()
    parts = trainer_of(digits, replace(config, accumulate=4)).batches()
    together = torch.cat([part.real for part in parts])
    torch.testing.assert_close(together, whole.real, rtol=0, atol=0)
    torch.testing.assert_close(
        torch.cat([part.real_targets for part in parts]), whole.real_targets, rtol=0, atol=0
    )
    if method is RANKED:
        for name in ("images", "targets", "same_class"):
            joined = torch.cat([getattr(part.copies, name) for part in parts], dim=1)
            torch.testing.assert_close(joined, getattr(whole.copies, name), rtol=0, atol=0)
        assert whole.copies.targets.shape == (3, 64, 10)
        # classes are compared, not the sharpness of targets
        same = whole.copies.targets.amax(2) > 1 - 1e-6
        assert whole.copies.same_class.equal(same)
        assert same.any()


@pytest.mark.parametrize("method", [RANKED, MRL], ids=["mndcg", "mrl"])
def test_gradient_of_a_rank_mixup_step_is_that_of_the_objective(digits, method):  # noqa: F811
    config = replace(SMALL, momentum=0.0, weight_decay=0.0, clip=None, data_method=method)
    trainer, reference = trainer_of(digits, config), trainer_of(digits, config)
    batch = reference.batches()[0]
    assert len(batch.copies.images) == method.copy_count
    model = reference.network.train()
    loss = build_loss(method.ranking.name, **method.ranking.params)
    logits = model(batch.real)
    copies = model(batch.copies.images.flatten(0, 1)).unflatten(0, (method.copy_count, 64))
    parts = loss.parts(logits, batch.real_targets, copies, batch.copies.targets)
    grads = torch.autograd.grad(parts.total, list(model.parameters()))
    before = [p.detach().clone() for p in trainer.network.parameters()]
    trainer.train_step()
    for old, new, grad in zip(before, trainer.network.parameters(), grads, strict=True):
        torch.testing.assert_close(new, old - 0.1 * grad, rtol=1e-4, atol=1e-6)
    report = trainer.take_report()
    assert report["real_loss"] == pytest.approx(parts.total.item(), rel=1e-5)
    assert report["ranking"] == pytest.approx(parts.term.item(), rel=1e-5)
    assert report["ranking"] > 0


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"crl", "uncertainty_weighted"}))
def test_every_loss_takes_blended_batches(digits, name):  # noqa: F811
    if getattr(LOSSES[name], "needs_copies", False):
        with pytest.raises(ConfigError, match=f"data_method.ranking.name = '{name}'"):
            trainer_of(digits, replace(SMALL, loss=LossConfig(name=name)))
        return
    trainer = trainer_of(digits, replace(SMALL, data_method=MIXUP, loss=LossConfig(name=name)))
    for _ in range(2):
        trainer.train_step()
    assert trainer.take_report()["grad_norm"] > 0
    assert all(p.isfinite().all() for p in trainer.network.parameters())


def test_mixup_goes_beside_semantically_mixed_images_and_soft_labels(mixed_digits):  # noqa: F811
    soft = 0.9 * F.one_hot(mixed_digits.train.targets, 10).float() + 0.01
    data = replace(mixed_digits, train=replace(mixed_digits.train, targets=soft))
    plain = trainer_of(data, SMALL).batches()[0]
    made = trainer_of(data, replace(SMALL, data_method=MIXUP)).batches()[0]
    torch.testing.assert_close(made.mixed, plain.mixed, rtol=0, atol=0)
    torch.testing.assert_close(made.mixed_targets, plain.mixed_targets, rtol=0, atol=0)
    assert not made.real.equal(plain.real)
    torch.testing.assert_close(made.real_targets.sum(1), torch.ones(64), rtol=0, atol=1e-5)
    ranked = trainer_of(data, replace(SMALL, data_method=MRL))
    (draws,) = draw_blends(MRL, 64, 0, 0)
    batch = ranked.batches()[0]
    likeliest = batch.real_targets.argmax(1)
    assert batch.copies.same_class[0].equal(likeliest == likeliest[draws.partner])
    ranked.train_step()
    assert ranked.take_report()["mixed_loss"] > 0


def test_probability_and_draws():
    half = replace(MIXUP, probability=0.5)
    blended = [len(draw_blends(half, 8, 3, step)) for step in range(400)]
    assert set(blended) == {0, 1}
    assert abs(sum(blended) - 200) < 4 * 10  # four standard errors
    each = replace(half, per_example=True)
    (draws,) = draw_blends(each, 4000, 0, 0)
    assert abs(int((draws.share == 1).sum()) - 2000) < 4 * 32
    one, two, other = (draw_blends(RANKED, 16, seed, 5) for seed in (0, 0, 1))
    for first, second, third in zip(one, two, other, strict=True):
        assert first.share.equal(second.share)
        assert first.partner.equal(second.partner)
        assert not first.share.equal(third.share)
    assert not one[0].partner.equal(one[1].partner)  # copies are independent
    assert draw_blends(DataMethodConfig(), 16, 0, 0) == ()


@pytest.mark.parametrize(
    "method", [replace(MIXUP, probability=0.7), RANKED], ids=["mixup", "rank_mixup"]
)
def test_resumed_run_equals_uninterrupted_run(digits, tmp_path, method, monkeypatch):  # noqa: F811
    config = replace(SMALL, data_method=method, steps=12, save_every_steps=5)
    fit(digits, config, tmp_path / "whole")

    class Stop(Exception):
        pass

    original = ClassifierTrainer.train_step

    def step(self):
        if self.step == 8:
            raise Stop
        original(self)

    monkeypatch.setattr(ClassifierTrainer, "train_step", step)
    with pytest.raises(Stop):
        fit(digits, config, tmp_path / "parts")
    monkeypatch.setattr(ClassifierTrainer, "train_step", original)
    assert fit(digits, config, tmp_path / "parts")["steps_this_call"] == 7
    for name in ("classifier/classifier.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_settings_from_the_command_line():
    config = build_config(
        ClassifierConfig,
        overrides=[
            "data_method.name=rank_mixup",
            "data_method.alpha=1",
            "data_method.ranking.name=rank_mixup_mrl",
            "data_method.ranking.params.coefficient=0.2",
        ],
    )
    method = config.data_method
    assert (method.strength, method.copy_count) == (1.0, 1)
    assert method.ranking.params == {"coefficient": 0.2}
    assert (RANKED.strength, RANKED.copy_count) == (2.0, 3)
    assert DataMethodConfig(name="mixup").strength == 0.2
    assert build_config(ClassifierConfig, base=config_to_dict(config)) == config


def test_unfit_settings_are_named(digits):  # noqa: F811
    for settings, words in (
        ({"name": "mixup", "alpha": 0.0}, "alpha must be positive"),
        ({"name": "mixup", "probability": 0.0}, "name = 'none'"),
        ({"name": "mixup", "copies": 2}, "'mixup' does not read data_method.copies"),
        ({"name": "rank_mixup", "copies": 0}, "copies must be at least 1"),
        ({"name": "rank_mixup", "per_example": True}, "does not read data_method.per_example"),
        ({"alpha": 0.3}, "'none' does not read data_method.alpha"),
        (
            {"name": "rank_mixup", "ranking": LossConfig(name="focal")},
            "rank_mixup_mndcg or rank_mixup_mrl, got 'focal'",
        ),
        ({"name": "mixup", "ranking": MRL.ranking}, "does not read data_method.ranking"),
    ):
        with pytest.raises(ConfigError, match=words):
            DataMethodConfig(**settings)
    history = replace(SMALL, loss=LossConfig(name="crl"))
    with pytest.raises(ConfigError, match="history of single images"):
        trainer_of(digits, replace(history, data_method=MIXUP))
    trainer_of(digits, replace(history, data_method=RANKED)).train_step()
    copies = MixedConfig(loss=LossConfig(name="rank_mixup_mrl"))
    with pytest.raises(ConfigError, match=r"data_method\.ranking"):
        trainer_of(digits, replace(SMALL, mixed=copies))


@pytest.mark.parametrize("spread", ["all", "others"])
def test_smoothing_that_reaches_a_mean_confidence(spread):
    generator = torch.Generator().manual_seed(0)
    for q in (torch.eye(5), (3 * torch.randn(5, 5, generator=generator)).softmax(1)):
        q = q.double()
        before = float(q.amax(1).mean())
        a = smoothing_for_confidence(0.6, 5, spread=spread, target_confidence=before)
        rest = 1 / 5 if spread == "all" else (1 - q) / 4
        smoothed = (1 - a) * q + a * rest
        assert float(smoothed.amax(1).mean()) == pytest.approx(0.6, rel=1e-12)
        # the loss with this smoothing is least at exactly these predictions
        z = smoothed.log().requires_grad_()
        cross_entropy(z, q, smoothing=a, spread=spread).backward()
        torch.testing.assert_close(z.grad, torch.zeros_like(z), rtol=0, atol=1e-12)
    assert smoothing_for_confidence(1.0, 5, spread=spread) == 0.0
    with pytest.raises(ConfigError, match="cannot be reached"):
        smoothing_for_confidence(0.2, 5, spread=spread)
    with pytest.raises(ConfigError, match="at most that of the targets"):
        smoothing_for_confidence(0.95, 5, spread=spread, target_confidence=0.9)
