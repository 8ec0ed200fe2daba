"""``diffcal train-diffusion``: images and labels in, a class-conditional denoiser out."""

import dataclasses
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from diffcal.config import check_choices, config_to_dict
from diffcal.core.progress import progress_bar
from diffcal.core.rng import item_normal
from diffcal.core.runs import claim_folder, write_atomic
from diffcal.data.sources import ImageSource, open_images
from diffcal.diffusion.augmentation import AUGMENT_LABELS
from diffcal.diffusion.checkpoints import compare_layout, load_denoiser, save_denoiser
from diffcal.diffusion.denoisers import images_to_model
from diffcal.diffusion.edm_networks import build_network
from diffcal.diffusion.preconditioning import Preconditioner
from diffcal.diffusion.samplers import SamplerConfig, sample
from diffcal.diffusion.training import DiffusionTrainer, OptimizerConfig, batch_indices
from diffcal.errors import ArtifactError, ConfigError

__all__ = ["NetworkConfig", "TrainDiffusionConfig", "network_specification", "train_diffusion"]

STATE_FORMAT = "diffcal-training-state/2"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Shape of the EDM network (names as in Karras et al. 2022); image size comes from the data."""

    model_type: Literal["SongUNet", "DhariwalUNet"] = "SongUNet"
    model_channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2, 2)
    num_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.0
    label_dropout: float = 0.1
    """Share of examples trained without their class; above 0 the model can be guided."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further constructor arguments by name, for instance ``{"resample_filter": [1, 3, 3, 1]}``."""

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True, kw_only=True)
class TrainDiffusionConfig:
    """What to train on, what to train, and how often to save and look."""

    data: str = "digits"
    first_row: int = 0
    rows: int | None = None
    """Train on rows ``first_row`` to ``first_row + rows`` of the source; all that follow if None."""
    image_column: str = "image"
    label_column: str = "label"
    conditional: bool = True
    network: NetworkConfig = field(default_factory=NetworkConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    initialise_from: str | None = None
    """A checkpoint folder of ours whose weights to start from (same network)."""
    seed: int = 0
    save_every: int = 1000
    sample_every: int = 2000
    sample_steps: int = 18
    weights: Literal["float32", "float16", "bfloat16"] = "float16"
    """Number format of the finished checkpoint."""
    keep: tuple[float, ...] = ()
    """Shares of the steps, as (0.25, 0.5, 0.75), after which a checkpoint stays in ``checkpoints``:
    attributions that follow the training (TracInCP, GAS) want several."""

    def __post_init__(self) -> None:
        check_choices(self)
        outside = [share for share in self.keep if not 0 < share <= 1]
        if outside:
            raise ConfigError(f"keep: shares of the training lie in (0, 1], got {outside[0]:g}")
        for name in ("save_every", "sample_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sample_steps < 2:
            raise ConfigError(f"sample_steps must be at least 2, got {self.sample_steps}")


def train_diffusion(
    config: TrainDiffusionConfig,
    out: Path,
    *,
    source: ImageSource | None = None,
    accelerator: Accelerator | None = None,
    overwrite: bool = False,
    device: str = "auto",
) -> dict[str, Any]:
    """Train, and leave the averaged weights in ``out/checkpoint``; resumes what ``out`` holds.

    Writes ``config.json``, ``loss.jsonl`` (one line per 50 steps), ``loss.png``,
    ``samples/step-*.png`` (one row per class, the same noise every time), ``state/`` (the latest
    training state), ``checkpoint/`` and, where ``config.keep`` asks for them, ``checkpoints/step-*``.
    Killed at any moment and started again it continues from the latest state, and on a CPU ends with
    the same bytes as a run that was never stopped.

    Args:
        source: Images already opened, in place of ``config.data``.
        accelerator: Decides device and processes in place of ``device``; by default all processes of
            a launch train one model.

    Returns:
        Summary: steps, images, processes, final loss, seconds of this call, checkpoint folder.

    Raises:
        ConfigError, DataError, CheckpointError: before any training, without touching ``out``.
        ArtifactError: ``out`` belongs to other settings.
        NumericalError: the loss became NaN or infinite; the saved state stays.
    """
    opt = config.optimizer
    # On a GPU the device follows accelerate's launch; "cpu" forces the processor.
    accelerator = accelerator or Accelerator(cpu=device == "cpu", mixed_precision=opt.precision)
    source = source or open_images(
        config.data, image_column=config.image_column, label_column=config.label_column
    )
    images, labels = _load_rows(source, config)
    class_names = source.class_names if config.conditional else ()
    specification = network_specification(config, images.shape[1:], len(class_names))
    torch.manual_seed(config.seed)
    network = build_network(specification)
    if config.initialise_from is not None:
        _copy_weights(config.initialise_from, network)
    trainer = DiffusionTrainer(network, opt, accelerator, config.seed, network.sigma_data)
    # Claimed only now, so that a setting which is refused above leaves no folder behind.
    claim = config_to_dict(config) | {"data_fingerprint": source.fingerprint}
    if not config.keep:
        del claim["keep"]  # runs that were begun before it existed go on
    kept = {max(1, round(share * opt.steps)) for share in config.keep} - {opt.steps}
    if accelerator.is_main_process:
        claim_folder(out, claim, overwrite=overwrite)
    accelerator.wait_for_everyone()
    log = _LossLog(out / "loss.jsonl", enabled=accelerator.is_main_process)
    _restore(out / "state", trainer, log)
    started, first_step = time.monotonic(), trainer.step
    one_hot = torch.eye(len(class_names))[labels] if class_names else None
    with progress_bar(opt.steps, "train-diffusion", unit="step", initial=first_step) as bar:
        while trainer.step < opt.steps:
            rows = batch_indices(config.seed, len(labels), opt.batch_size, trainer.step)
            batch = images_to_model(images[rows])
            loss = trainer.train_step(batch, None if one_hot is None else one_hot[rows])
            log.add(trainer.step, loss)
            bar.update(1)
            bar.set_postfix_str(f"loss {log.smooth:.4f}", refresh=False)
            finished = trainer.step == opt.steps
            if accelerator.is_main_process and trainer.step in kept:
                # Before the state: a run that goes on from it has this behind it.
                folder = out / "checkpoints" / f"step-{trainer.step:07d}"
                _export(folder, trainer, specification, class_names, config, log.smooth)
            if accelerator.is_main_process and (trainer.step % config.save_every == 0 or finished):
                log.write()
                _save(out / "state", trainer, log)
            if accelerator.is_main_process and (
                trainer.step % config.sample_every == 0 or finished
            ):
                folder = out / "checkpoint"
                _export(folder, trainer, specification, class_names, config, log.smooth)
                _draw_samples(folder, out / "samples" / f"step-{trainer.step:07d}.png", config)
                log.plot(out / "loss.png")
    accelerator.wait_for_everyone()
    return {
        "steps": trainer.step,
        "images": trainer.step * opt.batch_size,
        "processes": accelerator.num_processes,
        "parameters": sum(p.numel() for p in network.parameters()),
        "loss": log.smooth,
        "seconds": round(time.monotonic() - started, 1),
        "checkpoint": str(out / "checkpoint"),
    }


def _load_rows(source: ImageSource, config: TrainDiffusionConfig) -> tuple[Tensor, Tensor]:
    end = len(source) if config.rows is None else config.first_row + config.rows
    if not 0 <= config.first_row < end <= len(source):
        raise ConfigError(
            f"rows {config.first_row} to {end} asked for, but '{config.data}' has {len(source)}"
        )
    parts = [
        (torch.as_tensor(images), torch.as_tensor(labels))
        for _, images, labels in source.batches(1024, range(config.first_row, end))
    ]
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _copy_weights(source: str, network: Preconditioner) -> None:
    found = load_denoiser(source).module.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in found.items()}
    compare_layout(shapes, network, f"initialise_from '{source}'")
    network.load_state_dict(found)


def network_specification(
    config: TrainDiffusionConfig, image_shape: torch.Size, num_classes: int
) -> dict[str, Any]:
    """What ``build_network`` takes for images (h, w, c) of ``num_classes`` classes (0: unconditional).

    Raises:
        ConfigError: images that are not square.
    """
    height, width, channels = image_shape
    if height != width:
        raise ConfigError(
            f"images must be square to train on, got {height}x{width}; crop them first"
        )
    values = dataclasses.asdict(config.network)
    extra = values.pop("extra")
    lists = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    return {
        "preconditioner": "EDMPrecond",
        "kwargs": {
            "img_resolution": height,
            "img_channels": channels,
            "label_dim": num_classes,
            "augment_dim": AUGMENT_LABELS if config.optimizer.augment else 0,
            **lists,
            **extra,
        },
    }


def _export(
    folder: Path,
    trainer: DiffusionTrainer,
    specification: dict[str, Any],
    class_names: tuple[str, ...],
    config: TrainDiffusionConfig,
    loss: float,
) -> None:
    network = build_network(specification)
    trainer.ema.copy_to(network)
    training = {
        "steps": trainer.step,
        "images": trainer.step * config.optimizer.batch_size,
        "loss": round(loss, 6),
        "config": config_to_dict(config),
    }
    save_denoiser(
        folder, network, class_names=class_names, training_info=training, dtype=config.weights
    )


def _draw_samples(checkpoint: Path, path: Path, config: TrainDiffusionConfig) -> None:
    from diffcal.data.images import image_grid

    denoiser = load_denoiser(str(checkpoint))
    rows, columns = max(denoiser.num_classes, 1), 8
    shape = denoiser.sample_shape
    noise = torch.stack([item_normal(config.seed, "preview", i, shape) for i in range(columns)])
    condition = None
    if denoiser.num_classes:
        weights = torch.eye(denoiser.num_classes).repeat_interleave(columns, 0)
        condition = denoiser.condition(weights)
    with torch.no_grad():
        x = sample(
            denoiser,
            noise.repeat(rows, 1, 1, 1),
            condition,
            SamplerConfig(solver="heun", steps=config.sample_steps),
        )
    image_grid(denoiser.decode(x.float()).numpy(), columns=columns, path=path)


def _save(folder: Path, trainer: DiffusionTrainer, log: "_LossLog") -> None:
    path = folder / f"step-{trainer.step:08d}.safetensors"
    # One entry: safetensors writes several in an order that changes from call to call.
    progress = {"format": STATE_FORMAT, "step": trainer.step, "loss_window": log.window}
    data = save(trainer.tensors(), metadata={"progress": json.dumps(progress)})
    write_atomic(path, lambda file: file.write(data))
    for other in folder.iterdir():
        if other != path:
            other.unlink()


def _restore(folder: Path, trainer: DiffusionTrainer, log: "_LossLog") -> None:
    states = sorted(folder.glob("step-*.safetensors")) if folder.is_dir() else []
    if not states:
        log.cut_to(0, [])
        return
    try:
        with safe_open(states[-1], framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") == "diffcal-training-state/1":
            progress = {key: json.loads(metadata[key]) for key in ("step", "loss_window")}
        else:
            progress = json.loads(metadata["progress"])
        trainer.restore(tensors, progress["step"])
        log.cut_to(trainer.step, progress["loss_window"])
    except Exception as error:
        raise ArtifactError(
            f"training state '{states[-1]}' cannot be read ({error}); delete it to start again"
        ) from error
    logger.info("resumed at step %d", trainer.step)


class _LossLog:
    """Mean loss per 50 steps, as JSON lines; cut back to the restored step on resume."""

    def __init__(self, path: Path, *, enabled: bool, every: int = 50) -> None:
        self.path, self.enabled, self.every = path, enabled, every
        self.records: list[dict[str, float]] = []
        self.window: list[float] = []

    @property
    def smooth(self) -> float:
        """Mean over the last records (about 500 steps)."""
        values = [r["loss"] for r in self.records[-10:]] or self.window
        return sum(values) / len(values) if values else float("nan")

    def cut_to(self, step: int, window: list[float]) -> None:
        lines = self.path.read_text("utf-8").splitlines() if self.path.exists() else []
        records = [json.loads(line) for line in lines if line]
        self.records = [record for record in records if record["step"] <= step]
        self.window = window

    def add(self, step: int, loss: float) -> None:
        self.window.append(loss)
        if step % self.every == 0:
            mean = sum(self.window) / len(self.window)
            self.records.append({"step": step, "loss": round(mean, 6)})
            self.window = []

    def write(self) -> None:
        if self.enabled:
            text = "".join(json.dumps(record) + "\n" for record in self.records)
            write_atomic(self.path, lambda file: file.write(text.encode()))

    def plot(self, path: Path) -> None:
        from matplotlib.figure import Figure

        if not self.enabled or not self.records:
            return
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot([r["step"] for r in self.records], [r["loss"] for r in self.records], lw=1)
        axes.set(xlabel="step", ylabel="weighted denoising loss", yscale="log")
        axes.grid(alpha=0.3)
        write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))
