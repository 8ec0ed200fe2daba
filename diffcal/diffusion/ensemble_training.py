"""Many small denoisers trained at once, each as it would be trained alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcal.diffusion.ema import ExponentialMovingAverage, ema_decay
from diffcal.diffusion.losses import denoising_loss, edm_loss_weight
from diffcal.diffusion.module_stack import ModuleStack
from diffcal.diffusion.training import (
    OptimizerConfig,
    draw_step,
    learning_rate_factor,
    packed_state,
    take_label_dropout,
    unpacked_state,
)
from diffcal.errors import ConfigError, NumericalError

__all__ = ["EnsembleTrainer"]


@dataclass
class EnsembleTrainer:
    """Networks of one architecture, their optimiser and averages, advanced together.

    Member ``i`` meets the batches, noise, augmentation and dropped labels that
    :class:`~diffcal.diffusion.training.DiffusionTrainer` meets with ``seeds[i]``, its gradient is
    clipped by its own norm, and it ends with the same weights up to rounding. One process; state goes
    in and out by :meth:`tensors` and :meth:`restore`, so that a run continued from them is an
    uninterrupted one.

    Args:
        networks: Preconditioned networks ``D(x, sigma, class_labels, augment_labels)``, initialised.
        config: As for one network, without ``accumulate`` and reduced precision.
        seeds: Run seed of each network.
        sigma_data: Standard deviation of the data in model space, for the loss weight.
        device: Where the stack lives.

    Raises:
        ConfigError: settings that members cannot have each for itself, or networks that cannot be
            stacked.
    """

    networks: Sequence[nn.Module]
    config: OptimizerConfig
    seeds: Sequence[int]
    sigma_data: float = 0.5
    device: torch.device | str = "cpu"
    step: int = 0
    stack: ModuleStack = field(init=False)

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.networks):
            raise ConfigError(f"{len(self.seeds)} seeds for {len(self.networks)} networks")
        if self.config.accumulate > 1 or self.config.precision != "no":
            raise ConfigError(
                "networks trained together run in float32 and without accumulation: set "
                "optimizer.precision to 'no' and optimizer.accumulate to 1, or train one at a time"
            )
        for network in self.networks:
            if any(getattr(module, "dropout", 0.0) for module in network.modules()) or any(
                isinstance(module, nn.Dropout) and module.p for module in network.modules()
            ):
                raise ConfigError(
                    "networks trained together cannot drop activations (their draws would be those of "
                    "the whole stack): set network.dropout to 0, or train one at a time"
                )
        self._label_dropout = max(take_label_dropout(network) for network in self.networks)
        self.stack = ModuleStack(self.networks).to(self.device).train()
        self.optimizer = torch.optim.Adam(
            self.stack.parameters(),
            lr=self.config.learning_rate,
            betas=(self.config.beta1, self.config.beta2),
            fused=torch.device(self.device).type in ("cpu", "cuda"),
        )
        self.ema = ExponentialMovingAverage(self.stack)

    def train_step(
        self,
        batches: Sequence[Float[Tensor, "b c h w"]],
        class_labels: Sequence[Float[Tensor, "b k"]] | None,
    ) -> Float[Tensor, " m"]:
        """Take one optimiser step for every member on its own batch; their mean weighted losses.

        Raises:
            NumericalError: a loss is not finite; weights are left as they were.
        """
        config = self.config
        labels = class_labels or [None] * len(batches)
        draws = [
            draw_step(config, seed, self.step, x, y, self._label_dropout)
            for seed, x, y in zip(self.seeds, batches, labels, strict=True)
        ]
        x, sigma, noise = (
            torch.stack([getattr(draw, name) for draw in draws]).to(self.device)
            for name in ("x", "sigma", "noise")
        )
        conditions, augmentations = (
            None if parts[0] is None else torch.stack(parts).to(self.device)  # type: ignore[arg-type]
            for parts in ([d.class_labels for d in draws], [d.augment_labels for d in draws])
        )

        def denoise(noisy: Tensor, level: Tensor) -> Tensor:
            shape = (len(draws), -1)
            whole = self.stack(
                noisy.unflatten(0, shape),
                level.unflatten(0, shape),
                class_labels=conditions,
                augment_labels=augmentations,
            )
            return whole.flatten(0, 1).float()

        error = denoising_loss(denoise, x.flatten(0, 1), sigma.flatten(), noise.flatten(0, 1))
        weighted = error * edm_loss_weight(sigma.flatten(), self.sigma_data)
        losses = weighted.unflatten(0, (len(draws), -1)).mean(dim=1)
        # Members share no parameter, so that the gradient of the sum holds each member's own.
        losses.sum().backward()
        finite = losses.detach().isfinite()
        if not bool(finite.all()):
            self.optimizer.zero_grad(set_to_none=True)
            raise NumericalError(
                f"training loss of network {int((~finite).nonzero()[0, 0])} is not finite at step "
                f"{self.step}; lower optimizer.learning_rate"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(config, self.step)
        if config.clip is not None:
            self.stack.clip_gradient_norms_(config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        count = x.shape[1]
        self.ema.update(
            self.stack, ema_decay(config.ema, config.ema_value, self.step * count, count)
        )
        return losses.detach()

    def averages(self) -> list[dict[str, Tensor]]:
        """Averaged weights of each member by its own names: what a checkpoint holds."""
        held = self.stack.state_dict()
        self.ema.copy_to(self.stack)
        try:
            return list(self.stack.member_states())
        finally:
            self.stack.load_state_dict(held)

    def tensors(self) -> dict[str, Tensor]:
        """Everything needed to continue, as named CPU tensors (with ``step`` beside them)."""
        parts = {"stack": self.stack.state_dict(), "ema": self.ema.averages}
        return packed_state(parts, self.optimizer)

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from :meth:`tensors` taken after ``step`` steps."""
        parts = unpacked_state(tensors, self.optimizer)
        self.stack.load_state_dict(parts["stack"])
        self.ema.load(parts["ema"].items())
        self.step = step
