"""Networks trained together end where each would end alone."""

import pytest
import torch
from accelerate import Accelerator

from diffcal.diffusion.augmentation import AUGMENT_LABELS, AugmentConfig
from diffcal.diffusion.edm_networks import build_network
from diffcal.diffusion.ensemble_training import EnsembleTrainer
from diffcal.diffusion.training import DiffusionTrainer, OptimizerConfig
from diffcal.errors import ConfigError, NumericalError

SEEDS = (5, 5, 9)


def network(seed, **changed):
    torch.manual_seed(seed)
    kwargs = {
        "img_resolution": 8,
        "img_channels": 1,
        "label_dim": 3,
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
        "dropout": 0.0,
        "label_dropout": 0.3,
        **changed,
    }
    return build_network({"preconditioner": "EDMPrecond", "kwargs": kwargs})


def settings(**changed):
    values = {
        "steps": 20,
        "batch_size": 6,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "ema_value": 30.0,
        "channels_last": False,
        **changed,
    }
    return OptimizerConfig(**values)


def batches(step):
    """Images and labels of each member: the first two members differ by their data alone."""
    g = torch.Generator().manual_seed(step)
    labels = torch.eye(3)[torch.randint(3, (3, 6), generator=g)]
    return list(torch.rand(3, 6, 1, 8, 8, generator=g) * 2 - 1), list(labels)


def trained(config, steps=4, **changed):
    together = EnsembleTrainer([network(seed, **changed) for seed in SEEDS], config, SEEDS)
    losses = [together.train_step(*batches(step)) for step in range(steps)]
    return together, torch.stack(losses)


@pytest.mark.parametrize(
    ("changed", "network_changed"),
    [
        ({}, {}),
        ({"clip": None, "flip": True, "ema": "power", "ema_value": 6.0}, {"label_dropout": 0.0}),
        ({"augment": AugmentConfig(), "clip": 0.01}, {"augment_dim": AUGMENT_LABELS}),
    ],
)
def test_each_member_is_what_training_it_alone_gives(changed, network_changed):
    config = settings(**changed)
    together, losses = trained(config, **network_changed)
    for i, (seed, averages) in enumerate(zip(SEEDS, together.averages(), strict=True)):
        trainer = DiffusionTrainer(
            network(seed, **network_changed), config, Accelerator(cpu=True), seed
        )
        start = {name: t.clone() for name, t in trainer.network.state_dict().items()}
        for step in range(4):
            x, labels = batches(step)
            assert trainer.train_step(x[i], labels[i]) == pytest.approx(
                float(losses[step, i]), rel=1e-5
            )
        # Single entries may differ more: Adam's first steps are signs of gradients, and rounding decides
        # the sign of a gradient of 1e-8.
        expected = trainer.ema.averages
        assert averages.keys() == expected.keys()
        moved = sum(float((expected[n] - start[n]).square().sum()) for n in start) ** 0.5
        apart = sum(float((expected[n] - averages[n]).square().sum()) for n in start) ** 0.5
        assert moved > 0.1
        assert apart < 1e-3 * moved
    assert len({round(float(loss), 6) for loss in losses[0]}) == 3


def test_a_restored_ensemble_continues_exactly():
    config = settings()
    whole, _ = trained(config, steps=4)
    first, _ = trained(config, steps=2)
    again = EnsembleTrainer([network(seed + 70) for seed in SEEDS], config, SEEDS)
    again.restore(first.tensors(), 2)
    for step in (2, 3):
        again.train_step(*batches(step))
    assert again.step == 4
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, again.tensors()[name]), name


def test_unconditional_networks():
    config = settings()
    nets = [network(seed, label_dim=0, label_dropout=0.0) for seed in SEEDS]
    trainer = EnsembleTrainer(nets, config, SEEDS)
    losses = trainer.train_step(batches(0)[0], None)
    assert losses.shape == (3,)
    assert bool(losses.isfinite().all())


def test_what_members_cannot_have_each_for_itself_is_refused():
    nets = [network(seed) for seed in SEEDS]
    with pytest.raises(ConfigError, match="without accumulation"):
        EnsembleTrainer(nets, settings(accumulate=2), SEEDS)
    with pytest.raises(ConfigError, match="float32"):
        EnsembleTrainer(nets, settings(precision="bf16"), SEEDS)
    with pytest.raises(ConfigError, match="drop activations"):
        EnsembleTrainer([network(0, dropout=0.1)], settings(), [0])
    with pytest.raises(ConfigError, match="2 seeds for 3 networks"):
        EnsembleTrainer(nets, settings(), [0, 1])


def test_a_loss_that_is_not_finite_is_named_and_weights_stay():
    trainer, _ = trained(settings(), steps=1)
    before = trainer.tensors()
    images, labels = batches(1)
    images[1] = images[1] * float("inf")
    with pytest.raises(NumericalError, match="network 1 is not finite at step 1"):
        trainer.train_step(images, labels)
    for name, tensor in trainer.tensors().items():
        assert torch.equal(tensor, before[name]), name
