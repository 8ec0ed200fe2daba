"""One training step of a class-conditional denoiser, and the state it carries."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn

from diffcal.config import check_choices
from diffcal.core.rng import item_generator, item_seed
from diffcal.core.tensors import append_dims
from diffcal.diffusion.augmentation import AugmentConfig, augment
from diffcal.diffusion.ema import EmaKind, ExponentialMovingAverage, ema_decay
from diffcal.diffusion.losses import denoising_loss, edm_loss_weight, log_normal_sigma
from diffcal.errors import ConfigError, NumericalError

__all__ = [
    "DiffusionTrainer",
    "OptimizerConfig",
    "StepDraws",
    "batch_indices",
    "draw_step",
    "learning_rate_factor",
    "take_label_dropout",
]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam, its schedule, the noise levels and the moving average."""

    steps: int = 20_000
    batch_size: int = 128
    """Images per step over all processes and accumulation passes."""
    accumulate: int = 1
    """Forward-backward passes per step; without dropout the result changes only by rounding."""
    learning_rate: float = 1e-3
    warmup_steps: int = 500
    decay: Literal["constant", "cosine", "linear_tail"] = "linear_tail"
    tail: float = 0.3
    """Share of the steps, at the end, over which ``linear_tail`` goes to zero."""
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float | None = 1.0
    sigma_mean: float = -1.2
    """Mean of ln sigma (Karras et al. 2022, table 1)."""
    sigma_std: float = 1.2
    flip: bool = False
    """Mirror half of the images, unlabelled: right where mirrored images are real ones."""
    augment: AugmentConfig | None = None
    ema: EmaKind = "half_life"
    ema_value: float = 50_000.0
    """Half-life in images, or the exponent of the power profile."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        if self.steps < 1 or self.batch_size < 1 or self.accumulate < 1:
            raise ConfigError("optimizer: steps, batch_size and accumulate must be at least 1")
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"optimizer.batch_size {self.batch_size} must be a multiple of "
                f"optimizer.accumulate {self.accumulate}"
            )
        if self.learning_rate <= 0 or not 0 <= self.tail <= 1:
            raise ConfigError("optimizer: learning_rate must be positive and tail in [0, 1]")
        if (
            self.sigma_std <= 0
            or self.warmup_steps < 0
            or (self.clip is not None and self.clip <= 0)
        ):
            raise ConfigError(
                "optimizer: sigma_std and clip must be positive, warmup_steps not negative"
            )


def learning_rate_factor(config: OptimizerConfig, step: int) -> float:
    """Multiplier of the learning rate at ``step`` (0-based): linear warm-up, then the decay."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.decay == "cosine":
        progress = min(step / config.steps, 1.0)
        return warm * 0.5 * (1 + float(torch.cos(torch.tensor(progress * torch.pi))))
    if config.decay == "linear_tail" and config.tail > 0:
        return warm * min(1.0, (config.steps - step) / (config.tail * config.steps))
    return warm


def batch_indices(seed: int, count: int, batch_size: int, step: int) -> Int[Tensor, " b"]:
    """Image indices of a step: epochs in freshly permuted order, batches running across their ends."""
    start = step * batch_size
    pieces: list[Tensor] = []
    while batch_size > 0:
        epoch, offset = divmod(start, count)
        order = torch.randperm(count, generator=item_generator(seed, "train-order", epoch))
        pieces.append(order[offset : offset + batch_size])
        start += len(pieces[-1])
        batch_size -= len(pieces[-1])
    return torch.cat(pieces)


class StepDraws(NamedTuple):
    """A batch of one step, and everything random about it."""

    x: Tensor
    sigma: Tensor
    noise: Tensor
    class_labels: Tensor | None
    augment_labels: Tensor | None


def draw_step(
    config: OptimizerConfig,
    seed: int,
    step: int,
    x: Float[Tensor, "b c h w"],
    class_labels: Float[Tensor, "b k"] | None,
    label_dropout: float = 0.0,
) -> StepDraws:
    """Noise levels, noise, augmentation and dropped labels of a batch, from (seed, step) alone."""
    generator = item_generator(seed, "train-noise", step)
    count = x.shape[0]
    sigma = log_normal_sigma(
        torch.randn(count, generator=generator), config.sigma_mean, config.sigma_std
    )
    noise = torch.randn(x.shape, generator=generator)
    if config.flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        x = torch.where(append_dims(mirrored, x), x.flip(-1), x)
    augment_labels = None
    if config.augment is not None:
        x, augment_labels = augment(x, config.augment, generator)
    if class_labels is not None and label_dropout:
        keep = torch.rand(count, 1, generator=generator) >= label_dropout
        class_labels = class_labels * keep
    return StepDraws(x, sigma, noise, class_labels, augment_labels)


def take_label_dropout(network: nn.Module) -> float:
    """The network's chance of losing a class, which is set to 0: labels are dropped before it.

    Image by image and from the step's generator; the network's own draws would depend on how a batch
    is divided.
    """
    model = getattr(network, "model", None)
    chance = float(getattr(model, "label_dropout", 0.0))
    if chance:
        model.label_dropout = 0.0  # type: ignore[union-attr]
    return chance


@dataclass
class DiffusionTrainer:
    """A preconditioned network, its optimiser and its average, advanced one step at a time.

    Every draw of step ``s`` comes from (seed, s), so a trainer restored at ``s`` continues exactly
    as an uninterrupted one would on the CPU. Noise, augmentation and dropped labels belong to the
    images of the step, so that the number of processes and of accumulation passes only changes
    rounding; dropout of activations, where the network has it, is drawn by each process and pass.

    Args:
        network: Preconditioned network ``D(x, sigma, class_labels, augment_labels=...)``.
        config: See :class:`OptimizerConfig`.
        accelerator: Decides device, precision and processes.
        seed: Run seed.
        sigma_data: Standard deviation of the data in model space, for the loss weight.
    """

    network: nn.Module
    config: OptimizerConfig
    accelerator: Accelerator
    seed: int = 0
    sigma_data: float = 0.5
    step: int = 0
    _model: Any = field(init=False)
    _label_dropout: float = field(init=False)

    def __post_init__(self) -> None:
        processes = self.accelerator.num_processes
        if (self.config.batch_size // self.config.accumulate) % processes:
            raise ConfigError(
                f"optimizer.batch_size {self.config.batch_size} does not divide into "
                f"{self.config.accumulate} passes on {processes} processes"
            )
        self._label_dropout = take_label_dropout(self.network)
        if self.config.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network.to(self.accelerator.device)
        optimizer = torch.optim.Adam(
            self.network.parameters(),
            lr=self.config.learning_rate,
            betas=(self.config.beta1, self.config.beta2),
            fused=self.accelerator.device.type in ("cpu", "cuda"),
        )
        self._model, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        self.ema = ExponentialMovingAverage(self.network)

    def train_step(
        self, x: Float[Tensor, "b c h w"], class_labels: Float[Tensor, "b k"] | None
    ) -> float:
        """Take one optimiser step on the whole batch; the mean weighted loss.

        Every process is given the same whole batch and works on its own slice.

        Raises:
            NumericalError: the loss is not finite; weights are left as they were.
        """
        config, device = self.config, self.accelerator.device
        count = x.shape[0]
        x, sigma, noise, class_labels, augment_labels = draw_step(
            config, self.seed, self.step, x, class_labels, self._label_dropout
        )
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed(item_seed(self.seed, f"train-dropout-{rank}", self.step))

        self._model.train()
        passes = config.accumulate
        per_pass = count // (passes * processes)
        losses = torch.zeros((), device=device)
        for index in range(passes):
            start = (index * processes + rank) * per_pass
            part = slice(start, start + per_pass)
            last = index == passes - 1
            context = self.accelerator.no_sync(self._model) if not last else nullcontext()
            with context:
                loss = self._loss(
                    x[part].to(device),
                    None if class_labels is None else class_labels[part].to(device),
                    sigma[part].to(device),
                    noise[part].to(device),
                    None if augment_labels is None else augment_labels[part].to(device),
                )
                self.accelerator.backward(loss / passes)
            losses += loss.detach() / passes
        mean_loss = float(self.accelerator.reduce(losses, "mean"))  # type: ignore[arg-type]
        if not mean_loss < float("inf"):
            raise NumericalError(
                f"training loss is {mean_loss} at step {self.step}; lower optimizer.learning_rate or "
                "use precision bf16 or no"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(config, self.step)
        if config.clip is not None:
            self.accelerator.clip_grad_norm_(self._model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = ema_decay(config.ema, config.ema_value, self.step * count, count)
        self.ema.update(self.network, decay)
        return mean_loss

    def _loss(
        self,
        x: Tensor,
        class_labels: Tensor | None,
        sigma: Tensor,
        noise: Tensor,
        augment_labels: Tensor | None,
    ) -> Tensor:
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)

        def denoise(noisy: Tensor, level: Tensor) -> Tensor:
            return self._model(noisy, level, class_labels, augment_labels=augment_labels).float()

        error = denoising_loss(denoise, x, sigma, noise)
        return (error * edm_loss_weight(sigma, self.sigma_data)).mean()

    def tensors(self) -> dict[str, Tensor]:
        """Everything needed to continue, as named CPU tensors (with ``step`` beside them)."""
        parts = {"network": self.network.state_dict(), "ema": self.ema.averages}
        return packed_state(parts, self.optimizer)

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from :meth:`tensors` taken after ``step`` steps."""
        parts = unpacked_state(tensors, self.optimizer)
        self.network.load_state_dict(parts["network"])
        self.ema.load(parts["ema"].items())
        self.step = step


def packed_state(
    parts: Mapping[str, Mapping[str, Tensor]], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Tensors of ``parts`` as ``part/name`` and of the optimiser as ``optimizer/index/name``.

    Copies on the CPU: optimisers and averages work in place.
    """
    state = {
        f"{part}/{name}": tensor
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }
    for index, values in optimizer.state_dict()["state"].items():
        for name, tensor in values.items():
            state[f"optimizer/{index}/{name}"] = torch.as_tensor(tensor)
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}


def unpacked_state(
    tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """Load the optimiser from :func:`packed_state`; the other parts by name."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts.setdefault(part, {})[rest] = tensor
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in parts.pop("optimizer", {}).items():
        index, _, entry = name.partition("/")
        state.setdefault(int(index), {})[entry] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return parts
