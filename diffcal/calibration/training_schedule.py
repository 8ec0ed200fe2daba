"""What changes over a classifier's training: its learning rate, and the weight of mixed images."""

import torch

from diffcal.calibration.training_config import ClassifierConfig

__all__ = ["learning_rate_factor", "mixed_weight"]


def learning_rate_factor(config: ClassifierConfig, step: int, steps: int, per_epoch: int) -> float:
    """Multiplier of the learning rate at ``step`` (0-based) of ``steps``.

    Milestones fall on whole epochs: ``round(share * epochs)``.
    """
    warmup = config.warmup_epochs * per_epoch
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if config.schedule == "cosine":
        return warm * 0.5 * (1 + float(torch.tensor(step / steps * torch.pi).double().cos()))
    if config.schedule == "milestones":
        epochs = steps / per_epoch
        passed = sum(step >= round(share * epochs) * per_epoch for share in config.milestones)
        return warm * 0.1**passed
    return warm


def mixed_weight(config: ClassifierConfig, step: int, per_epoch: int) -> float:
    """Weight of the mixed images' loss at ``step``: 0 before they join, then the ramp."""
    mixed, epoch = config.mixed, step / per_epoch
    if epoch < mixed.start_epoch:
        return 0.0
    if mixed.ramp_epochs == 0:
        return mixed.weight
    ramped = (step + 1) / per_epoch - mixed.start_epoch
    return mixed.weight * min(1.0, ramped / mixed.ramp_epochs)
