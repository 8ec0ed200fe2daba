"""Training of denoisers: the same result however it is divided, killed or started again."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from diffcal.config import build_config
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.edm_networks import build_network
from diffcal.diffusion.training import (
    DiffusionTrainer,
    OptimizerConfig,
    batch_indices,
    learning_rate_factor,
)
from diffcal.errors import ArtifactError, CheckpointError, ConfigError, NumericalError
from diffcal.workflows.train_diffusion import TrainDiffusionConfig, train_diffusion

SETTINGS = {
    "rows": "64",
    "network.model_channels": "8",
    "network.channel_mult": "[1]",
    "network.num_blocks": "1",
    "network.attn_resolutions": "[]",
    "network.label_dropout": "0.3",
    "optimizer.steps": "6",
    "optimizer.batch_size": "16",
    "optimizer.warmup_steps": "2",
    "optimizer.channels_last": "false",
    "save_every": "2",
    "sample_every": "1000",
    "sample_steps": "2",
    "weights": "float32",
}


def overrides(**changed):
    values = SETTINGS | {key.replace("__", "."): value for key, value in changed.items()}
    return [f"{key}={value}" for key, value in values.items()]


def config(**changed):
    return build_config(TrainDiffusionConfig, None, overrides(**changed))


def train(out, **changed):
    return train_diffusion(config(**changed), out, device="cpu")


def weights(out):
    return load_file(out / "checkpoint/model.safetensors")


def network_of(out):
    """Weights of the latest training state."""
    (state,) = (out / "state").iterdir()
    tensors = load_file(state)
    return {key: value for key, value in tensors.items() if key.startswith("network/")}


def where_training_starts(tmp_path):
    """A run that stops after one step of almost no length, so where training starts."""
    train(tmp_path / "start", optimizer__steps="1", optimizer__learning_rate="1e-12")
    return tmp_path / "start"


def contents(out):
    """Every artefact but the plot and pictures, whose libraries may write dates."""
    files = sorted(p for p in out.rglob("*") if p.suffix in (".safetensors", ".json", ".jsonl"))
    assert {p.name for p in files} >= {"model.safetensors", "config.json", "loss.jsonl"}
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run that nothing disturbs."""
    out = tmp_path_factory.mktemp("plain") / "run"
    summary = train(out)
    assert summary["steps"] == 6
    assert summary["images"] == 96
    return out


def trainer_of(seed=0, label_dropout=0.3, **options):
    torch.manual_seed(seed)
    kwargs = {
        "img_resolution": 8,
        "img_channels": 1,
        "label_dim": 3,
        "model_channels": 8,
        "channel_mult": [1],
        "num_blocks": 1,
        "model_type": "SongUNet",
        "dropout": 0.0,
        "label_dropout": label_dropout,
    }
    network = build_network({"preconditioner": "EDMPrecond", "kwargs": kwargs})
    values = {"steps": 20, "batch_size": 12, "warmup_steps": 1, "channels_last": False} | options
    return DiffusionTrainer(network, OptimizerConfig(**values), Accelerator(cpu=True), seed)


def batch(count=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1
    return x, torch.eye(3)[torch.arange(count) % 3]


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulation_changes_only_rounding(accumulate):
    once, often = trainer_of(), trainer_of(accumulate=accumulate)
    for _ in range(3):
        assert often.train_step(*batch()) == pytest.approx(once.train_step(*batch()), rel=1e-5)
    start = trainer_of().network.state_dict()
    for key, value in once.network.state_dict().items():
        torch.testing.assert_close(often.network.state_dict()[key], value, rtol=0, atol=2e-5)
    moved = max(float((v - start[k]).abs().max()) for k, v in once.network.state_dict().items())
    assert moved > 1e-3  # the weights moved by far more than they differ


def test_labels_are_dropped_by_image():
    """The share of examples without a class is label_dropout, and the network drops none itself."""
    trainer = trainer_of(batch_size=600)
    seen = []
    trainer.network.model.map_label.register_forward_pre_hook(
        lambda module, given: seen.append(given[0])
    )
    trainer.train_step(*batch(600))
    dropped = float((seen[0] == 0).all(dim=1).float().mean())
    assert 0.2 < dropped < 0.4  # 600 draws: standard error 0.019
    trainer = trainer_of(label_dropout=0.0)
    trainer.network.model.map_label.register_forward_pre_hook(
        lambda module, given: seen.append(given[0])
    )
    trainer.train_step(*batch())
    assert not bool((seen[-1] == 0).all(dim=1).any())


def test_restored_trainer_continues_exactly():
    straight, first = trainer_of(), trainer_of()
    for _ in range(4):
        straight.train_step(*batch())
    for _ in range(2):
        first.train_step(*batch())
    second = trainer_of(seed=0)
    second.restore(first.tensors(), first.step)
    for _ in range(2):
        second.train_step(*batch())
    assert second.step == straight.step == 4
    expected = straight.tensors()
    assert any(name.startswith("optimizer/") for name in expected)
    for name, tensor in second.tensors().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_nan_is_refused_and_weights_stay():
    trainer = trainer_of()
    trainer.train_step(*batch())
    before = trainer.tensors()
    x, labels = batch()
    x[3, 0, 2, 2] = torch.nan
    with pytest.raises(NumericalError, match="loss is nan at step 1"):
        trainer.train_step(x, labels)
    assert trainer.step == 1
    for name, tensor in trainer.tensors().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_loss_falls_on_a_single_image():
    trainer = trainer_of(learning_rate=3e-3, steps=200, decay="constant")
    x = torch.full((12, 1, 8, 8), 0.5)
    losses = [trainer.train_step(x, torch.eye(3)[[0] * 12]) for _ in range(60)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_batches_walk_through_permuted_epochs():
    steps = [batch_indices(0, 10, 4, step) for step in range(5)]
    assert [len(rows) for rows in steps] == [4] * 5
    walk = torch.cat(steps)
    for epoch in (walk[:10], walk[10:]):
        assert sorted(epoch.tolist()) == list(range(10))
    assert walk[:10].tolist() != walk[10:].tolist()
    # A batch larger than the data set still counts every image equally.
    assert torch.bincount(batch_indices(0, 3, 9, 0)).tolist() == [3, 3, 3]


def test_learning_rate_schedules():
    tail = OptimizerConfig(steps=100, warmup_steps=10, tail=0.2)
    factors = [learning_rate_factor(tail, step) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:80] == [1.0] * 71
    assert factors[90] == pytest.approx(0.5)
    cosine = OptimizerConfig(steps=100, warmup_steps=0, decay="cosine")
    assert learning_rate_factor(cosine, 50) == pytest.approx(0.5)
    constant = OptimizerConfig(steps=100, warmup_steps=0, decay="constant")
    assert learning_rate_factor(constant, 99) == 1.0


def test_kill_and_resume_give_the_same_bytes(tmp_path):
    """SIGKILL to a process of its own after its first saved state; then the same command again."""
    longer = {"optimizer__steps": "60", "save_every": "4"}  # so that it can be hit in the middle
    out = tmp_path / "run"
    command = [sys.executable, "-m", "diffcal", "train-diffusion", "--device", "cpu"]
    command += ["--out", str(out)]
    for item in overrides(**longer):
        command += ["--set", item]
    # The bytes depend on the number of threads.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, env=environment)
        try:
            deadline = time.monotonic() + 300
            while not list(out.glob("state/step-*.safetensors")):
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, "no state was saved"
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "checkpoint").exists()
    assert train(out, **longer)["steps"] == 60
    train(tmp_path / "straight", **longer)
    assert contents(out) == contents(tmp_path / "straight")


def test_finished_run_is_left_as_it_is(plain):
    before = contents(plain)
    assert train(plain)["steps"] == 6
    assert contents(plain) == before


def test_other_settings_in_the_same_folder_are_refused(plain):
    before = contents(plain)
    with pytest.raises(ArtifactError, match=r"optimizer\.learning_rate: 0\.001 there, 0\.5 now"):
        train(plain, optimizer__learning_rate="0.5")
    assert contents(plain) == before


def test_two_processes_equal_one(plain, tmp_path):
    out = tmp_path / "two"
    # What "accelerate launch" does on several GPUs; on CPUs it would need MPI for two processes.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launch += ["-m", "diffcal", "train-diffusion", "--device", "cpu", "--out", str(out)]
    for item in overrides():
        launch += ["--set", item]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["processes"] == 2  # one summary, by the main process
    # The trained weights themselves: the average has hardly left the first ones after six steps.
    one, two = (network_of(folder) for folder in (plain, out))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-4)
    start = network_of(where_training_starts(tmp_path))
    assert max(float((one[key] - start[key]).abs().max()) for key in one) > 2e-3


def test_loss_that_becomes_nan_leaves_the_saved_state(tmp_path):
    out = tmp_path / "run"
    settings = {"optimizer__steps": "40", "optimizer__clip": "1e30", "save_every": "1"}
    settings |= {"optimizer__learning_rate": "1e30", "optimizer__warmup_steps": "0"}
    with pytest.raises(NumericalError, match=r"lower optimizer\.learning_rate"):
        train(out, **settings)
    (state,) = (out / "state").iterdir()
    saved = load_file(state)
    assert all(bool(t.isfinite().all()) for name, t in saved.items() if "network/" in name)
    before = state.read_bytes()
    with pytest.raises(NumericalError):
        train(out, **settings)  # resumes there and fails in the same way
    assert [p.read_bytes() for p in (out / "state").iterdir()] == [before]


def test_damaged_state_is_told(plain, tmp_path):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(plain, out)
    (state,) = (out / "state").iterdir()
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="cannot be read"):
        train(out)


def test_initialise_from_starts_at_those_weights(plain, tmp_path):
    settings = {"initialise_from": str(plain / "checkpoint"), "seed": "7"}
    tiny_steps = {"optimizer__steps": "1", "optimizer__learning_rate": "1e-12"}
    train(tmp_path / "run", **settings, **tiny_steps)
    expected = weights(plain)
    for key, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)
    with pytest.raises(CheckpointError, match=r"initialise_from .*(shape|tensors)"):
        train(tmp_path / "other", **settings, network__model_channels="12")
    assert not (tmp_path / "other").exists()
    with pytest.raises(CheckpointError, match="is missing"):
        train(tmp_path / "other", initialise_from=str(tmp_path / "absent"))


def test_unconditional_training(tmp_path):
    train(tmp_path / "run", conditional="false", optimizer__steps="1")
    denoiser = load_denoiser(tmp_path / "run/checkpoint")
    assert denoiser.condition_kind == "none"


def test_augmented_training_knows_its_labels(tmp_path):
    # What augmentation did enters the network, so the checkpoint has that layer.
    train(tmp_path / "run", optimizer__augment="{}", optimizer__steps="1")
    module = load_denoiser(tmp_path / "run/checkpoint").module
    assert module.model.map_augment is not None


def test_what_is_written_is_complete(plain):
    names = {str(p.relative_to(plain)) for p in plain.rglob("*") if p.is_file()}
    assert names == {
        "config.json",
        "loss.jsonl",
        "samples/step-0000006.png",
        "state/step-00000006.safetensors",
        "checkpoint/config.json",
        "checkpoint/model.safetensors",
    }
    denoiser = load_denoiser(plain / "checkpoint")
    assert denoiser.class_names == tuple("0123456789")
    training = json.loads((plain / "checkpoint/config.json").read_text("utf-8"))["training"]
    assert training["steps"] == 6
    assert training["config"]["optimizer"]["batch_size"] == 16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"optimizer__learnin_rate": "1"}, "learning_rate"),
        ({"nework": "1"}, "network"),
        ({"network__extra": '{"hidden" = 1}'}, "no argument 'hidden'"),
        ({"network__model_type": "GPT"}, "GPT"),
        ({"optimizer__accumulate": "3"}, "multiple of"),
        ({"optimizer__steps": "0"}, "at least 1"),
        ({"optimizer__learning_rate": "-1"}, "positive"),
        ({"optimizer__clip": "0"}, "positive"),
        ({"save_every": "0"}, "save_every must be at least 1"),
        ({"sample_steps": "1"}, "sample_steps must be at least 2"),
        ({"rows": "99999"}, "but 'digits' has 1797"),
    ],
)
def test_unknown_and_impossible_settings_are_refused(changed, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        train(tmp_path / "run", **changed)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
