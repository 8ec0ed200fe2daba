"""Classifier training: accuracy on real digits, resuming, batch and BatchNorm policies, artefacts."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from diffcal.calibration.evaluation import fit_temperature, summarise
from diffcal.calibration.training import ClassifierTrainer
from diffcal.calibration.training_config import (
    AugmentationConfig,
    ClassifierConfig,
    LossConfig,
    MixedConfig,
)
from diffcal.calibration.training_data import LabelledImages, MixedImages, TrainingData, hold_out
from diffcal.calibration.training_loop import fit_classifier
from diffcal.calibration.training_schedule import learning_rate_factor, mixed_weight
from diffcal.data.logits import load_logits
from diffcal.errors import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    DataError,
    NumericalError,
)
from diffcal.models.classifier import load_classifier, save_classifier

NAMES = tuple("0123456789")
NO_CROP = AugmentationConfig(crop_padding=0, flip=False)
SMALL = ClassifierConfig(model="cnn-tiny", epochs=2, batch_size=64, augmentation=NO_CROP)


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = torch.tensor((data.images * 255 / 16).round()).to(torch.uint8)[..., None]
    everything = LabelledImages(images, torch.tensor(data.target))
    train, test = everything.rows(torch.arange(1437)), everything.rows(torch.arange(1437, 1797))
    train, validation = hold_out(train, 0.1, torch.Generator().manual_seed(1))
    return TrainingData(train, NAMES, validation=validation, test=test)


@pytest.fixture(scope="module")
def mixed_digits(digits):
    """Digits with pixel mixes of two classes as groups of four: enough structure for the trainer."""
    generator = torch.Generator().manual_seed(0)
    images, targets, groups = [], [], []
    labels = digits.train.labels
    for group, (one, two) in enumerate((a, b) for a in range(10) for b in range(a + 1, 10)):
        rows = [
            int((labels == c).nonzero()[int(torch.randint(90, (1,), generator=generator)), 0])
            for c in (one, two)
        ]
        first, second = digits.train.images[rows].float()
        for share in (1.0, 2 / 3, 1 / 3, 0.0):
            images.append((share * first + (1 - share) * second).round().to(torch.uint8))
            targets.append(share * F.one_hot(torch.tensor(one), 10).float())
            targets[-1][two] += 1 - share
            groups.append(group)
    mixed = MixedImages(torch.stack(images), torch.stack(targets), torch.tensor(groups))
    return replace(digits, mixed=mixed)


def fit(data, config, folder, **kwargs):
    return fit_classifier(data, config, folder, accelerator=Accelerator(cpu=True), **kwargs)


def trainer_of(data, config, seed=0, model=None):
    from diffcal.models.registry import build_classifier

    torch.manual_seed(seed)
    model = model or build_classifier(config.model, 10, 1, 8)
    return ClassifierTrainer(model, data, config, Accelerator(cpu=True), seed)


def states_equal(one, two):
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=0, msg=name)


def test_digits_are_learnt_in_seconds(mixed_digits, tmp_path):
    config = replace(
        SMALL,
        model="cnn-small",
        epochs=6,
        schedule="cosine",
        augmentation=AugmentationConfig(crop_padding=1, flip=False),
        mixed=MixedConfig(loss=LossConfig(name="cross_entropy")),
    )
    summary = fit(mixed_digits, config, tmp_path)
    # 360 digits of writers unseen in training; plain logistic regression gets about 90 %
    assert summary["test"]["accuracy"] > 0.95
    assert summary["test"]["nll"] < 0.25
    content = load_logits(tmp_path / "logits-test.safetensors")
    logits, labels = content.logits, content.labels
    assert content.features is None
    assert (logits.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert summarise(logits, labels) == summary["test"]
    loaded = load_classifier(tmp_path)
    torch.testing.assert_close(loaded.logits(mixed_digits.test.images), logits, rtol=0, atol=0)
    features = loaded.features(mixed_digits.test.images, batch_size=100)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module.fc(features), logits, rtol=1e-4, atol=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 7))
    assert lines[-1]["train"]["mixed_loss"] < lines[0]["train"]["mixed_loss"]
    assert not list(tmp_path.rglob("*.p*"))  # neither .pt nor .pkl


@pytest.mark.parametrize("every", [1, 7], ids=["epoch", "step"])
def test_resumed_run_equals_uninterrupted_run(mixed_digits, tmp_path, every, monkeypatch):
    config = replace(
        SMALL,
        ema=0.9,
        select="best_nll",
        save_every_steps=every if every > 1 else None,
        augmentation=AugmentationConfig(crop_padding=1, flip=True),
    )
    whole = fit(mixed_digits, config, tmp_path / "whole")

    class Stop(Exception):
        pass

    original = ClassifierTrainer.train_step
    for stop in (9, 24):  # in the first and in the second epoch of 20 steps

        def step(self, stop=stop):
            if self.step == stop:
                raise Stop
            original(self)

        monkeypatch.setattr(ClassifierTrainer, "train_step", step)
        with pytest.raises(Stop):
            fit(mixed_digits, config, tmp_path / "parts")
    monkeypatch.setattr(ClassifierTrainer, "train_step", original)
    parts = fit(mixed_digits, config, tmp_path / "parts")
    assert parts["steps_this_call"] < whole["steps_this_call"]
    state = f"state/step-{whole['steps']:08d}.safetensors"
    for name in ("classifier/classifier.safetensors", "metrics.jsonl", "summary.json", state):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    again = fit(mixed_digits, config, tmp_path / "parts")
    assert again["steps_this_call"] == 0
    assert again["test"] == whole["test"]


KILLED = """
import sys, torch
from pathlib import Path
from accelerate import Accelerator
from diffcal.calibration.training_config import *
from diffcal.calibration.training_data import *
from diffcal.calibration.training_loop import fit_classifier
from diffcal.data.logits import load_logits
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
images = torch.randint(256, (128, 8, 8, 1), generator=generator, dtype=torch.uint8)
data = TrainingData(LabelledImages(images, torch.arange(128) % 4), tuple("abcd"))
config = ClassifierConfig(model="cnn-tiny", epochs=int(sys.argv[2]), batch_size=32)
fit_classifier(data, config, Path(sys.argv[1]), accelerator=Accelerator(cpu=True))
"""


def test_sigkill_and_rerun_gives_the_same_weights(tmp_path):
    environment = os.environ | {"DIFFCAL_PROGRESS": "0", "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", KILLED]
    order = [str(killed), "40"]
    process = subprocess.Popen([*command, *order], env=environment)
    deadline = time.monotonic() + 120
    while not list(killed.glob("state/step-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, *order], env=environment, check=True)
    subprocess.run([*command, str(whole), "40"], env=environment, check=True)
    name = "classifier/classifier.safetensors"
    assert (whole / name).read_bytes() == (killed / name).read_bytes()


@pytest.mark.parametrize("mode", ["separate", "joint", "auxiliary"])
def test_batchnorm_modes(mixed_digits, mode):
    config = replace(SMALL, mixed=MixedConfig(batchnorm=mode), momentum=0.0, channels_last=False)
    trainer = trainer_of(mixed_digits, config)
    reference = trainer_of(mixed_digits, config)
    batch = reference.batches()[0]
    trainer.train_step()
    model = reference.network.train()
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    with torch.no_grad():
        first = model.stages[0]
        real, mixed = first(batch.real), first(batch.mixed)
    passes = {
        "separate": [real, mixed],
        "joint": [torch.cat([real, mixed])],
        "auxiliary": [real],  # the mixed pass leaves no trace in what is used at test
    }[mode]
    mean = torch.zeros_like(norm.running_mean)
    for values in passes:
        mean = 0.9 * mean + 0.1 * values.mean(dim=(0, 2, 3))
    trained = next(m for m in trainer.network.modules() if isinstance(m, nn.BatchNorm2d))
    torch.testing.assert_close(trained.running_mean, mean, rtol=1e-4, atol=1e-6)
    assert int(trained.num_batches_tracked) == len(passes)
    assert trained.track_running_stats


def test_gradient_of_a_step_is_that_of_the_objective(mixed_digits):
    from diffcal.calibration.losses.soft_target import csm_objective

    config = replace(
        SMALL, mixed=MixedConfig(weight=0.7), momentum=0.0, weight_decay=0.0, clip=None
    )
    trainer, reference = trainer_of(mixed_digits, config), trainer_of(mixed_digits, config)
    batch = reference.batches()[0]
    assert batch.real.shape[0] * 2 == batch.mixed.shape[0]
    model = reference.network.train()
    objective = csm_objective(
        model(batch.real), batch.real_targets, model(batch.mixed), batch.mixed_targets, weight=0.7
    )
    grads = torch.autograd.grad(objective.total, list(model.parameters()))
    before = [p.detach().clone() for p in trainer.network.parameters()]
    trainer.train_step()
    for old, new, grad in zip(before, trainer.network.parameters(), grads, strict=True):
        torch.testing.assert_close(new, old - 0.1 * grad, rtol=1e-4, atol=1e-6)
    report = trainer.take_report()
    assert report["loss"] == pytest.approx(objective.total.item(), rel=1e-5)
    assert report["mixed_loss"] == pytest.approx(objective.mixed.item(), rel=1e-5)


def test_one_hot_soft_labels_train_as_hard_ones(digits):
    soft = replace(
        digits,
        train=LabelledImages(digits.train.images, F.one_hot(digits.train.targets, 10).float()),
    )
    one, two = trainer_of(digits, SMALL), trainer_of(soft, SMALL)
    for _ in range(3):
        one.train_step()
        two.train_step()
    for p, q in zip(one.network.parameters(), two.network.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_accumulation_sum_and_ema(digits):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 10)

        def forward(self, x):
            return self.fc(x.flatten(1))

    def run(**settings):
        trainer = trainer_of(
            digits, replace(SMALL, channels_last=False, **settings), model=Linear()
        )
        with torch.no_grad():
            trainer.network.fc.weight.fill_(0.01)
            trainer.network.fc.bias.zero_()
        weights = []
        for _ in range(3):
            trainer.train_step()
            weights.append(trainer.network.fc.weight.detach().clone())
        return trainer, weights

    _, plain = run()
    _, accumulated = run(accumulate=4)
    torch.testing.assert_close(accumulated[-1], plain[-1], rtol=1e-4, atol=1e-6)
    # the sum of 64 losses at a 64th of the rate is the mean, where nothing is clipped
    _, unclipped = run(clip=None, weight_decay=0.0)
    _, summed = run(clip=None, weight_decay=0.0, reduction="sum", learning_rate=0.1 / 64)
    torch.testing.assert_close(summed[-1], unclipped[-1], rtol=1e-4, atol=1e-6)
    trainer, weights = run(ema=0.3)
    average = torch.full_like(weights[0], 0.01)
    for step, weight in enumerate(weights, start=1):
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    if trainer.ema is None:
        pytest.fail("no average")
    # the average started from the weights before they were overwritten by run()
    start = trainer.ema["fc.weight"] - average
    assert start.abs().max() < 0.3 * 0.3 * 0.3 * 0.2


def test_bf16_is_stable_and_close(mixed_digits):
    whole, half = (
        trainer_of(mixed_digits, replace(SMALL, precision=precision))
        for precision in ("float32", "bf16")
    )
    for _ in range(10):
        whole.train_step()
        half.train_step()
    assert all(p.dtype == torch.float32 for p in half.network.parameters())
    reports = whole.take_report(), half.take_report()
    assert reports[1]["loss"] == pytest.approx(reports[0]["loss"], rel=0.15)


def test_schedules():
    config = replace(SMALL, epochs=200, milestones=(0.4, 0.6), warmup_epochs=1.0)

    def rate(epoch, config=config):
        return learning_rate_factor(config, int(epoch * 351), 200 * 351, 351)

    assert rate(0) == pytest.approx(1 / 351)
    assert [rate(e) for e in (1, 79, 80, 119, 120, 199)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    cosine = replace(config, schedule="cosine")
    assert [rate(e, cosine) for e in (50, 100)] == pytest.approx([0.8535534, 0.5])
    late = replace(SMALL, mixed=MixedConfig(weight=2.0, start_epoch=1.0, ramp_epochs=2.0))
    weights = [mixed_weight(late, step, 10) for step in (0, 9, 10, 19, 29, 50)]
    assert weights == pytest.approx([0, 0, 0.1, 1.0, 2.0, 2.0])


def test_late_mixed_images_and_uniform_policy(mixed_digits):
    config = replace(SMALL, mixed=MixedConfig(policy="uniform", per_real=3, start_epoch=0.1))
    trainer = trainer_of(mixed_digits, config)
    trainer.train_step()
    assert trainer.take_report()["mixed_loss"] == 0
    trainer.train_step()
    trainer.train_step()
    assert trainer.take_report()["mixed_loss"] > 0
    assert trainer.batches()[0].mixed.shape[0] == 192


def test_selection_keeps_the_best_epoch(digits, tmp_path):
    config = replace(SMALL, epochs=4, select="best_accuracy", schedule="constant")
    summary = fit(digits, config, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = [line["validation"]["accuracy"] for line in lines]
    assert summary["validation"]["accuracy"] == max(scores)
    assert summary["epoch"] == 1 + scores.index(max(scores))
    assert load_classifier(tmp_path).num_classes == 10


def test_network_of_ones_own(digits, tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(64, 10)

        def forward(self, x):
            return self.last(x.flatten(1))

    torch.manual_seed(0)
    summary = fit(digits, replace(SMALL, channels_last=False), tmp_path, model=Own())
    assert summary["parameters"] == 650
    with pytest.raises(CheckpointError, match="module="):
        load_classifier(tmp_path)
    loaded = load_classifier(tmp_path, module=Own())
    logits = load_logits(tmp_path / "logits-test.safetensors").logits
    torch.testing.assert_close(loaded.logits(digits.test.images), logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match="forward_features"):
        loaded.features(digits.test.images)
    with pytest.raises(ConfigError, match="forward_features"):
        fit_classifier(digits, SMALL, tmp_path / "x", model=Own(), with_features=True)


def test_temperature_of_scaled_logits_is_found():
    generator = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]
    base = fit_temperature(z, labels)
    assert base == pytest.approx(1.0, abs=0.1)
    assert fit_temperature(3 * z, labels) == pytest.approx(3 * base, rel=1e-9)
    best = summarise(z, labels, base)["nll"]
    with pytest.raises(DataError, match="classified correctly"):
        fit_temperature(z, z.argmax(dim=1))
    assert best <= min(summarise(z, labels, base * f)["nll"] for f in (0.98, 1.02))


def test_bad_input_is_named(digits, tmp_path):
    with pytest.raises(ConfigError, match="larger than the 1293 training images"):
        trainer_of(digits, replace(SMALL, batch_size=4096))
    with pytest.raises(ConfigError, match="needs validation images"):
        fit(replace(digits, validation=None), replace(SMALL, select="best_nll"), tmp_path)
    with pytest.raises(DataError, match="labels run from 0 to 9"):
        TrainingData(digits.train, NAMES[:9])
    large = LabelledImages(torch.zeros(2, 16, 16, 1).byte(), torch.zeros(2).long())
    with pytest.raises(DataError, match="validation images are 16x16x1"):
        replace(digits, validation=large)
    with pytest.raises(DataError, match="test set: soft targets must sum to 1"):
        replace(digits, test=LabelledImages(digits.train.images[:2], torch.zeros(2, 10)))
    nothing = MixedImages(digits.train.images[:0], torch.zeros(0, 10), torch.zeros(0).long())
    with pytest.raises(DataError, match="the mixed set is empty"):
        replace(digits, mixed=nothing)
    with pytest.raises(DataError, match="leaves 360 of 360"):
        hold_out(digits.test, 0.0, torch.Generator())
    for settings, words in (
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"milestones": (80.0,)}, "shares of the run"),
        ({"accumulate": 3}, "multiple of accumulate"),
        ({"clip": 0.0}, "clip"),
        ({"ema": 1.0}, "ema"),
    ):
        with pytest.raises(ConfigError, match=words):
            replace(SMALL, **settings)
    with pytest.raises(ConfigError, match="did you mean 'squared_error'"):
        MixedConfig(loss=LossConfig(name="l2"))
    with pytest.raises(ConfigError, match="anchor_fraction"):
        MixedConfig(anchor_fraction=1.5)


def test_divergence_and_damaged_state(digits, tmp_path):
    config = replace(SMALL, clip=None, learning_rate=1e20)
    with pytest.raises(NumericalError, match="lower learning_rate"):
        fit(digits, replace(config, save_every_steps=1), tmp_path / "diverged")
    steps = [int(p.stem.split("-")[1]) for p in (tmp_path / "diverged/state").iterdir()]
    assert steps == [1]  # of the losses up to here only the first was finite
    fit(digits, replace(SMALL, steps=2), tmp_path / "run")
    (state,) = (tmp_path / "run/state").iterdir()
    state.write_bytes(state.read_bytes()[:500])
    with pytest.raises(ArtifactError, match="delete it to start again"):
        fit(digits, replace(SMALL, steps=2), tmp_path / "run")
    weights = tmp_path / "run/classifier/classifier.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        load_classifier(tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds no"):
        load_classifier(tmp_path / "nowhere")


def test_saved_classifier_round_trip_and_foreign_logits(digits, tmp_path):
    trainer = trainer_of(digits, SMALL)
    from diffcal.models.classifier import TrainedClassifier

    saved = TrainedClassifier(
        trainer.network, trainer.mean, trainer.std, NAMES, (8, 8, 1), "cnn-tiny"
    )
    save_classifier(tmp_path, saved, training={"note": "untrained"})
    loaded = load_classifier(tmp_path)
    states_equal(dict(loaded.module.state_dict()), dict(trainer.network.state_dict()))
    assert (
        load_file(tmp_path / "classifier.safetensors").keys() == loaded.module.state_dict().keys()
    )


TWO_PROCESSES = """
import sys, torch
from pathlib import Path
from accelerate import Accelerator
from diffcal.calibration.training_config import *
from diffcal.calibration.training_data import *
from diffcal.calibration.training_loop import fit_classifier
from diffcal.data.logits import load_logits
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
labels = torch.arange(130) % 4
images = torch.randint(64, (130, 8, 8, 1), generator=generator, dtype=torch.uint8)
images[torch.arange(130), labels, labels] = 255
real = LabelledImages(images, labels)
mixed = MixedImages(images, torch.eye(4)[labels], torch.arange(130) // 4)
data = TrainingData(real, tuple("abcd"), mixed, validation=real.rows(torch.arange(51)))
torch.manual_seed(0)
linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
accelerator = Accelerator(cpu=True)
ranked = DataMethodConfig(name="rank_mixup")
for name, model in (("linear", linear), ("normalised", None), ("ranked", linear)):
    config = ClassifierConfig(
        data_method=ranked if name == "ranked" else DataMethodConfig(),
        model="cnn-tiny", epochs=3, batch_size=32, accumulate=2, select="best_nll",
        channels_last=model is None, mixed=MixedConfig(batchnorm="auxiliary"), ema=0.5,
    )
    folder = Path(sys.argv[1]) / name
    fit_classifier(
        data, config, folder, accelerator=accelerator, model=model, with_features=model is None
    )
"""


def test_two_processes_train_the_same_classifier_as_one(tmp_path):
    environment = os.environ | {"DIFFCAL_PROGRESS": "0", "OMP_NUM_THREADS": "1"}
    script, one, two = tmp_path / "train.py", tmp_path / "one", tmp_path / "two"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for command in ([sys.executable, script, one], [*launch, script, two]):
        subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
    file = "classifier/classifier.safetensors"
    for run in ("linear", "ranked"):
        expected, found = load_file(one / run / file), load_file(two / run / file)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    made = load_logits(two / "linear/logits-validation.safetensors")
    alone = load_logits(one / "linear/logits-validation.safetensors")
    assert len(made.labels) == 51  # an odd number, shared out over two processes
    torch.testing.assert_close(made.logits, alone.logits, rtol=1e-4, atol=1e-4)
    reports = [
        json.loads((folder / "linear/metrics.jsonl").read_text().splitlines()[-1])["train"]
        for folder in (one, two)
    ]
    assert reports[1] == pytest.approx(reports[0], rel=1e-4)
    # with BatchNorm each process normalises its own half; what is saved is what was evaluated
    loaded = load_classifier(two / "normalised")
    made = load_logits(two / "normalised/logits-validation.safetensors")
    assert made.logits.isfinite().all()
    weight, bias = made.head
    torch.testing.assert_close(made.features @ weight.T + bias, made.logits, rtol=1e-4, atol=1e-4)
    assert loaded.num_classes == 4
