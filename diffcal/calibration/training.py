"""One training step of a classifier on real and mixed images, and the state it carries."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffcal.calibration.batchnorm import running_statistics_kept
from diffcal.calibration.data_methods import Blender, draw_blends
from diffcal.calibration.image_batches import (
    augment_images,
    channel_statistics,
    draw_augmentation,
)
from diffcal.calibration.losses.contract import RowLoss
from diffcal.calibration.losses.epoch_loss import EpochEnd, EpochLoss
from diffcal.calibration.losses.rank_mixup import MixedCopies
from diffcal.calibration.losses.registry import build_loss, loss_parameters
from diffcal.calibration.training_config import ClassifierConfig, LossConfig
from diffcal.calibration.training_data import TrainingData
from diffcal.calibration.training_schedule import learning_rate_factor, mixed_weight
from diffcal.core.rng import item_generator, item_seed
from diffcal.data.batch_policy import MixedGroups, epoch_order, uniform_rows
from diffcal.errors import CheckpointError, ConfigError, NumericalError
from diffcal.models.classifier import normalise

__all__ = ["ClassifierTrainer", "StepBatch"]

CHECK_EVERY = 50
"""Steps between looks at the loss, each of which waits for the device."""

_SUMS = (
    "loss",
    "real_loss",
    "mixed_loss",
    "correct",
    "images",
    "grad_norm",
    "clipped",
    "steps",
    "ranking",
)


@dataclass(frozen=True)
class StepBatch:
    """Normalised images and targets of one pass of one process, on its device."""

    real: Tensor
    real_targets: Tensor
    real_rows: Tensor
    """Which training images these are."""
    mixed: Tensor | None
    mixed_targets: Tensor | None
    copies: MixedCopies | None = None
    """Blends of the real images for RankMixup; mixup's are ``real`` itself."""


class ClassifierTrainer:
    """A network, its optimiser and its data, advanced one step at a time.

    Every draw of step ``s`` comes from (seed, s), so a trainer restored at ``s`` continues exactly
    as an uninterrupted one would on the CPU.

    Args:
        model: Maps ``[b, c, h, w]`` to logits ``[b, k]``.
        data: Real images, and mixed ones if they take part.
        config: See :class:`ClassifierConfig`.
        accelerator: Decides device and processes; precision is the config's.
        seed: Run seed.

    Raises:
        ConfigError: batch larger than the data, batch that does not divide over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        data: TrainingData,
        config: ClassifierConfig,
        accelerator: Accelerator,
        seed: int = 0,
    ) -> None:
        count = len(data.train)
        if config.batch_size > count:
            raise ConfigError(
                f"batch_size {config.batch_size} is larger than the {count} training images"
            )
        if (config.batch_size // config.accumulate) % accelerator.num_processes:
            raise ConfigError(
                f"batch_size {config.batch_size} does not divide into {config.accumulate} passes "
                f"on {accelerator.num_processes} processes"
            )
        self.network, self.data, self.config = model, data, config
        self.accelerator, self.seed = accelerator, seed
        self.steps_per_epoch = count // config.batch_size
        self.steps = config.steps or config.epochs * self.steps_per_epoch
        self.step = 0
        device = accelerator.device
        self.mean, self.std = channel_statistics(data.train.images)
        self._mean, self._std = self.mean.to(device), self.std.to(device)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.to(device)
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            fused=device.type in ("cpu", "cuda"),
        )
        self._model: Any = accelerator.prepare_model(model)
        self._forward: Any = torch.compile(self._model) if config.compile else self._model
        self._real_loss = _loss(config.loss).to(device)
        self._mixed_loss = _loss(config.mixed.loss).to(device)
        self._ranking: Any = None
        if config.data_method.name == "rank_mixup":
            self._ranking = _loss(config.data_method.ranking).to(device)
        self._check_losses()
        self._labels = data.train.labels
        self._groups = None
        if data.mixed is not None and config.mixed.policy == "paired":
            mixed = data.mixed
            self._groups = MixedGroups.build(mixed.targets, mixed.groups, mixed.support)
        self.ema: dict[str, Tensor] | None = None
        if config.ema is not None:
            self.ema = {name: t.detach().clone() for name, t in model.state_dict().items()}
        precise = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(len(_SUMS), dtype=precise, device=device)

    @property
    def epoch(self) -> float:
        """Epochs done, in steps over steps per epoch."""
        return self.step / self.steps_per_epoch

    def train_step(self) -> None:
        """Take one optimiser step; its sums are added to what :meth:`take_report` returns.

        Raises:
            NumericalError: a loss was NaN or infinite (noticed within :data:`CHECK_EVERY` steps).
        """
        config = self.config
        weight = (
            0.0
            if self.data.mixed is None
            else mixed_weight(config, self.step, self.steps_per_epoch)
        )
        torch.manual_seed(
            item_seed(self.seed, f"classifier-dropout-{self.accelerator.process_index}", self.step)
        )
        self._model.train()
        scale = (config.batch_size if config.reduction == "sum" else 1) / config.accumulate
        batches = self.batches(with_mixed=weight > 0)
        for index, batch in enumerate(batches):
            self._forward_backward(batch, weight, scale, last=index == len(batches) - 1)
        norm = self._clip()
        factor = learning_rate_factor(config, self.step, self.steps, self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._update_ema()
        if norm is not None:
            self._sums[5] += norm
            self._sums[6] += norm > (config.clip or 0.0)
        self._sums[7] += 1
        if self.step % CHECK_EVERY == 0:
            self.check_finite()

    def batches(self, *, with_mixed: bool = True) -> list[StepBatch]:
        """Batches of the present step for this process, one per accumulation pass."""
        config, data = self.config, self.data
        epoch, place = divmod(self.step, self.steps_per_epoch)
        order = epoch_order(self.seed, len(data.train), epoch)
        rows = order[place * config.batch_size :][: config.batch_size]
        generator = item_generator(self.seed, "classifier-batch", self.step)
        real_draws = draw_augmentation(len(rows), config.augmentation, generator)
        blends = draw_blends(config.data_method, len(rows), self.seed, self.step)
        blender = Blender(
            lambda places: self._input(data.train.images, rows[places], real_draws.part(places)),
            data.train.targets[rows],
            len(data.class_names),
        )
        mixed, mixed_rows, mixed_draws = data.mixed, None, None
        per_real = config.mixed.per_real
        if mixed is not None and with_mixed:
            if self._groups is not None:
                mixed_rows = self._groups.draw(
                    self._labels[rows], per_real, config.mixed.anchor_fraction, generator
                ).flatten()
            else:
                mixed_rows = uniform_rows(self.seed, len(mixed), len(rows) * per_real, self.step)
            mixed_draws = draw_augmentation(len(mixed_rows), config.augmentation, generator)
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = len(rows) // (config.accumulate * processes)
        batches = []
        for index in range(config.accumulate):
            start = (index * processes + rank) * size
            part = slice(start, start + size)
            mixed_images = mixed_targets = None
            if mixed is not None and mixed_rows is not None and mixed_draws is not None:
                wide = slice(start * per_real, (start + size) * per_real)
                mixed_images = self._input(mixed.images, mixed_rows[wide], mixed_draws.part(wide))
                mixed_targets = mixed.targets[mixed_rows[wide]].to(self._mean.device)
            real = self._input(data.train.images, rows[part], real_draws.part(part))
            targets = data.train.targets[rows[part]].to(self._mean.device)
            copies = None
            if blends and config.data_method.name == "mixup":
                real, targets = blender.mixup(real, part, blends[0])
            elif blends:
                copies = blender.copies(real, part, blends)
            batches.append(
                StepBatch(
                    real,
                    targets,
                    rows[part].to(self._mean.device),
                    mixed_images,
                    mixed_targets,
                    copies,
                )
            )
        return batches

    @property
    def epoch_loss(self) -> EpochLoss | None:
        """The real images' loss if it learns from epoch to epoch."""
        return self._real_loss if isinstance(self._real_loss, EpochLoss) else None

    def end_epoch(self, logits: Tensor | None = None) -> None:
        """Tell a loss with state that an epoch is over; on every process.

        Args:
            logits: Of the validation images, if the loss ``needs_validation``.
        """
        if self.epoch_loss is None:
            return
        validation = self.data.validation if logits is not None else None
        self.epoch_loss.end_epoch(
            EpochEnd(
                progress=self.step / self.steps,
                logits=logits,
                labels=None if validation is None else validation.labels,
                total=lambda tensor: self.accelerator.reduce(tensor, "sum"),  # type: ignore[return-value]
            )
        )

    def take_report(self) -> dict[str, float]:
        """Means over the steps since the last report, over all processes, and start again.

        Raises:
            NumericalError: a loss was NaN or infinite.
        """
        self.check_finite()
        sums: Any = self.accelerator.reduce(self._sums, "sum")
        values: dict[str, float] = dict(zip(_SUMS, sums.tolist(), strict=True))
        self._sums.zero_()
        passes = max(values["steps"] * self.config.accumulate, 1)
        names = ["loss", "real_loss", "mixed_loss", *(["ranking"] if self._ranking else [])]
        report = {name: values[name] / passes for name in names}
        report["accuracy"] = values["correct"] / max(values["images"], 1)
        report["grad_norm"] = values["grad_norm"] / max(values["steps"], 1)
        report["clipped"] = values["clipped"] / max(values["steps"], 1)
        return report

    def check_finite(self) -> None:
        """Raise :class:`NumericalError` if a loss since the last report was NaN or infinite."""
        if not bool(self._sums.isfinite().all()):
            raise NumericalError(
                f"the training loss became NaN or infinite by step {self.step}; "
                "lower learning_rate, add warmup_epochs or set clip"
            )

    def evaluated_state(self) -> dict[str, Tensor]:
        """Weights to evaluate and save: the average if there is one."""
        return dict(self.network.state_dict()) if self.ema is None else self.ema

    def tensors(self) -> dict[str, Tensor]:
        """Everything needed to continue, as named CPU tensors (``step`` goes beside them)."""
        state = {f"network/{name}": t for name, t in self.network.state_dict().items()}
        for name, tensor in (self.ema or {}).items():
            state[f"ema/{name}"] = tensor
        for name, parameter in self.network.named_parameters():
            momentum = self.optimizer.state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                state[f"momentum/{name}"] = momentum
        for name, tensor in self._real_loss.state_dict().items():
            state[f"loss/{name}"] = tensor
        state["sums"] = self._sums
        return {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Continue from :meth:`tensors` taken after ``step`` steps.

        Raises:
            CheckpointError: the tensors belong to another network or other settings.
        """
        groups: dict[str, dict[str, Tensor]] = {
            "network": {},
            "ema": {},
            "momentum": {},
            "loss": {},
            "sums": {},
        }
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            groups.setdefault(kind, {})[rest] = tensor
        if bool(groups["ema"]) != (self.ema is not None):
            raise CheckpointError("the saved state and the settings differ in ema")
        try:
            self.network.load_state_dict(groups["network"])
            for name, tensor in (self.ema or {}).items():
                tensor.copy_(groups["ema"][name])
            for name, parameter in self.network.named_parameters():
                if name in groups["momentum"]:
                    buffer = torch.empty_like(parameter).copy_(groups["momentum"][name])
                    self.optimizer.state[parameter]["momentum_buffer"] = buffer
            self._real_loss.load_state_dict(groups["loss"])
            self._sums.copy_(groups["sums"][""])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"the saved state does not fit the network: {error}") from error
        self.step = step

    def _forward_backward(self, batch: StepBatch, weight: float, scale: float, last: bool) -> None:
        mode = self.config.mixed.batchnorm
        if batch.mixed is None or batch.mixed_targets is None:
            logits = self._logits(batch.real)
            real = self._loss_of_real(logits, batch)
            self._backward(real * scale, last)
            self._count(logits, batch.real_targets, real, None, weight)
            return
        if mode == "joint":
            both = self._logits(torch.cat([batch.real, batch.mixed]))
            logits = both[: len(batch.real)]
            real = self._loss_of_real(logits, batch)
            mixed = self._mixed_loss(both[len(batch.real) :], batch.mixed_targets)
            self._backward((real + weight * mixed) * scale, last)
            self._count(logits, batch.real_targets, real, mixed, weight)
            return
        # one backward per pass: the same gradient, and the first pass's activations are freed
        logits = self._logits(batch.real)
        real = self._loss_of_real(logits, batch)
        self._backward(real * scale, False)
        keep = running_statistics_kept(self._model) if mode == "auxiliary" else nullcontext()
        with keep:
            mixed = self._mixed_loss(self._logits(batch.mixed), batch.mixed_targets)
        self._backward(weight * mixed * scale, last)
        self._count(logits, batch.real_targets, real, mixed, weight)

    def _loss_of_real(self, logits: Tensor, batch: StepBatch) -> Tensor:
        if self.epoch_loss is not None and self.epoch_loss.needs_examples:
            loss = self._real_loss(logits, batch.real_targets, batch.real_rows)
        else:
            loss = self._real_loss(logits, batch.real_targets)
        if self._ranking is None or batch.copies is None:
            return loss
        # all copies in one pass, as the released code has it
        flat = self._memory_format(batch.copies.images.flatten(0, 1))
        copy_logits = self._logits(flat).unflatten(0, batch.copies.targets.shape[:2])
        ranking = self._ranking.term(
            logits, batch.real_targets, copy_logits, batch.copies.targets, batch.copies.same_class
        )
        self._sums[8] += ranking.detach()
        return loss + self._ranking.coefficient * ranking

    def _check_losses(self) -> None:
        both = ((self.config.loss, self._real_loss), (self.config.mixed.loss, self._mixed_loss))
        for config, loss in both:
            if isinstance(loss, RowLoss) and loss.needs_copies:
                raise ConfigError(
                    f"loss '{config.name}' is a term beside a loss: set data_method.name = "
                    f"'rank_mixup' and data_method.ranking.name = '{config.name}', with any loss"
                )
        if isinstance(self._mixed_loss, EpochLoss):
            name = self.config.mixed.loss.name
            raise ConfigError(f"loss '{name}' has a state of the real images; not for mixed ones")
        if self.epoch_loss is None:
            return
        if self.epoch_loss.needs_examples and self.config.data_method.name == "mixup":
            raise ConfigError(
                f"loss '{self.config.loss.name}' keeps a history of single images; mixup has none"
            )
        if self.epoch_loss.needs_validation and self.data.validation is None:
            raise ConfigError(f"loss '{self.config.loss.name}' needs validation images")
        self.epoch_loss.begin(len(self.data.train))

    def _logits(self, x: Tensor) -> Tensor:
        half = self.config.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            return self._forward(x).float()

    def _backward(self, loss: Tensor, synchronise: bool) -> None:
        with nullcontext() if synchronise else self.accelerator.no_sync(self._model):
            self.accelerator.backward(loss)

    def _clip(self) -> Tensor | None:
        if self.config.clip is None:
            return None
        return torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)

    @torch.no_grad()
    def _update_ema(self) -> None:
        if self.ema is None:
            return
        # an average over few steps must not remember the random start
        decay = min(self.config.ema or 0.0, (1 + self.step) / (10 + self.step))
        state = self.network.state_dict()
        floating = [name for name, tensor in state.items() if tensor.is_floating_point()]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [self.ema[name] for name in floating], [state[name] for name in floating], 1 - decay
        )
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                self.ema[name].copy_(tensor)

    @torch.no_grad()
    def _count(
        self, logits: Tensor, targets: Tensor, real: Tensor, mixed: Tensor | None, weight: float
    ) -> None:
        labels = targets.argmax(dim=1) if targets.ndim == 2 else targets
        self._sums[1] += real.detach()
        self._sums[0] += real.detach()
        if mixed is not None:
            self._sums[2] += mixed.detach()
            self._sums[0] += weight * mixed.detach()
        self._sums[3] += (logits.argmax(dim=1) == labels).sum()
        self._sums[4] += len(labels)

    def _input(self, images: Tensor, rows: Tensor, draws: Any) -> Tensor:
        batch = images[rows].to(self._mean.device, non_blocking=True)
        augmented = augment_images(batch, self.config.augmentation, draws)
        return self._memory_format(normalise(augmented, self._mean, self._std))

    def _memory_format(self, x: Tensor) -> Tensor:
        channels_last = self.config.channels_last
        kind = torch.channels_last if channels_last else torch.contiguous_format
        return x.contiguous(memory_format=kind)


def _loss(config: LossConfig) -> nn.Module:
    params = dict(config.params)
    # targets were checked when the data came in; checking each batch would wait for the device
    if "validate" in loss_parameters(config.name):
        params.setdefault("validate", False)
    return build_loss(config.name, **params)
