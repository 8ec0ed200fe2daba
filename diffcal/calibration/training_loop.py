"""A whole training run in a folder: epochs, validation, resuming, the classifier and its logits."""

import copy
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from diffcal.calibration.evaluation import fit_temperature, summarise
from diffcal.calibration.posthoc.last_layer import linear_head, named_linear
from diffcal.calibration.training import ClassifierTrainer
from diffcal.calibration.training_config import ClassifierConfig
from diffcal.calibration.training_data import LabelledImages, TrainingData
from diffcal.config import config_to_dict
from diffcal.core.progress import progress_bar
from diffcal.core.runs import write_atomic, write_json, write_text
from diffcal.data.logits import save_logits
from diffcal.errors import ArtifactError, CheckpointError, ConfigError, DataError
from diffcal.models.classifier import TrainedClassifier, save_classifier
from diffcal.models.registry import build_classifier

__all__ = ["fit_classifier"]

logger = logging.getLogger(__name__)

STATE_FORMAT = "diffcal-classifier-state/2"

FEATURE_BYTES = 32 * 2**20
"""Features of validation and test images that are saved unasked are at most this large."""


@dataclass
class _Progress:
    """What a run knows besides the trainer: its log and the best epoch so far."""

    records: list[dict[str, Any]] = field(default_factory=list)
    best_score: float | None = None
    best_epoch: float | None = None
    best: dict[str, Tensor] = field(default_factory=dict)


def fit_classifier(
    data: TrainingData,
    config: ClassifierConfig,
    folder: Path,
    *,
    model: nn.Module | None = None,
    accelerator: Accelerator | None = None,
    seed: int = 0,
    with_features: bool | None = False,
) -> dict[str, Any]:
    """Train a classifier on real and mixed images; resumes what ``folder`` holds.

    Leaves in ``folder``: ``classifier/`` (weights and config, for
    :func:`diffcal.models.classifier.load_classifier`), ``metrics.jsonl`` (one line per epoch),
    ``logits-validation.safetensors`` and ``logits-test.safetensors`` (for
    :func:`diffcal.data.logits.load_logits`), ``summary.json`` and ``state/`` (the latest training
    state, no pickle). Killed at any moment and started again it continues from the latest state, and
    on a CPU ends with the same weights as a run that was never stopped. The caller sees to it that a
    folder keeps to one set of data and settings (:func:`diffcal.core.runs.claim_folder`).

    Args:
        data: Images in memory.
        config: See :class:`ClassifierConfig`.
        folder: Output folder.
        model: A network of one's own, freshly initialised; by default ``config.model`` is built.
        accelerator: Decides device and processes; by default accelerate's own choice.
        seed: Decides initial weights, order, augmentation and mixed images.
        with_features: Save the inputs and the weights of the last linear layer with the logits, for
            post-hoc methods that read them. The network then needs ``forward_features`` and ``fc``,
            as every network of the registry has them. None: if it has them and they are at most
            :data:`FEATURE_BYTES`.

    Returns:
        Summary, as in ``summary.json``: steps, selected epoch, and for each evaluated set accuracy,
        NLL and Brier score, before and after temperature scaling (fitted on the validation set;
        ``temperature`` is None where that has no optimum).

    Raises:
        ConfigError: the settings contradict each other or the data.
        NumericalError: the loss became NaN or infinite; the saved state stays.
        ArtifactError: the saved state is damaged or the disk is full.
    """
    if config.select != "last" and data.validation is None:
        raise ConfigError(f"select '{config.select}' needs validation images; use select = 'last'")
    accelerator = accelerator or Accelerator()
    architecture = None
    if model is None:
        architecture = config.model
        height, width, channels = data.image_shape
        torch.manual_seed(seed)
        model = build_classifier(config.model, len(data.class_names), channels, min(height, width))
    if with_features:
        _check_features(model)
    elif with_features is None:
        with_features = _features_are_small(model, data)
    trainer = ClassifierTrainer(model, data, config, accelerator, seed)
    progress = _Progress()
    _restore(folder / "state", trainer, progress)
    evaluated = copy.deepcopy(model)  # holds averages or the best epoch while training goes on
    main, started, first = accelerator.is_main_process, time.monotonic(), trainer.step
    with progress_bar(trainer.steps, "train-classifier", unit="step", initial=trainer.step) as bar:
        while trainer.step < trainer.steps:
            trainer.train_step()
            bar.update(1)
            finished = trainer.step == trainer.steps
            epoch, place = divmod(trainer.step, trainer.steps_per_epoch)
            if place == 0 or finished:
                record = {"epoch": round(trainer.epoch, 6), "step": trainer.step}
                record |= {"train": trainer.take_report()}
                evaluate = epoch % config.evaluate_every == 0 or finished
                asked = trainer.epoch_loss is not None and trainer.epoch_loss.needs_validation
                logits = None
                if data.validation is not None and (evaluate or asked):
                    evaluated.load_state_dict(trainer.evaluated_state())
                    logits = _logits(evaluated, trainer, data.validation, accelerator)
                if place == 0:
                    trainer.end_epoch(logits)
                if data.validation is not None and logits is not None and evaluate:
                    record["validation"] = summarise(logits, data.validation.labels)
                    _select(config, progress, record, evaluated)
                progress.records.append(record)
                if main:
                    _write_log(folder, progress)
                bar.set_postfix_str(_describe(record), refresh=False)
            due = place == 0 and epoch % config.save_every == 0
            if config.save_every_steps is not None:
                due = due or trainer.step % config.save_every_steps == 0
            if due or finished:
                trainer.check_finite()  # never replace a good state by a spoilt one
            if main and (due or finished):
                _save(folder / "state", trainer, progress)
    accelerator.wait_for_everyone()
    seconds = time.monotonic() - started

    selected = config.select != "last"
    evaluated.load_state_dict(progress.best if selected else trainer.evaluated_state())
    summary: dict[str, Any] = {
        "steps": trainer.step,
        "epoch": progress.best_epoch if selected else round(trainer.epoch, 6),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_images": len(data.train),
        "mixed_images": 0 if data.mixed is None else len(data.mixed),
        "batchnorm": None if data.mixed is None else config.mixed.batchnorm,
        "temperature": None,
    }
    for name, part in (("validation", data.validation), ("test", data.test)):
        if part is None:
            continue
        logits = _logits(evaluated, trainer, part, accelerator)
        features = _features(evaluated, trainer, part, accelerator) if with_features else None
        if main:
            save_logits(
                folder / f"logits-{name}.safetensors",
                logits=logits,
                labels=part.labels,
                soft_labels=part.targets if part.targets.ndim == 2 else None,
                features=features,
                head=linear_head(evaluated, "fc") if with_features else None,
            )
        if name == "validation":
            try:
                summary["temperature"] = fit_temperature(logits, part.labels)
            except DataError as error:
                logger.warning("no temperature: %s", error)
        summary[name] = summarise(logits, part.labels)
        if summary["temperature"] is not None:
            scaled = summarise(logits, part.labels, summary["temperature"])
            summary[f"{name}_after_temperature"] = scaled
    if main:
        classifier = TrainedClassifier(
            evaluated, trainer.mean, trainer.std, data.class_names, data.image_shape, architecture
        )
        training = {"config": config_to_dict(config), "seed": seed, "summary": summary}
        save_classifier(folder / "classifier", classifier, training=training)
        write_json(folder / "summary.json", summary)
    accelerator.wait_for_everyone()
    done = trainer.step - first
    return summary | {"seconds": round(seconds, 2), "steps_this_call": done}


def _logits(
    module: nn.Module, trainer: ClassifierTrainer, part: LabelledImages, accelerator: Accelerator
) -> Tensor:
    """Float32 logits of every image on every process, each process computing its share."""
    classifier = _shared(module, trainer, accelerator)
    return _gathered(classifier.logits, part, accelerator)


def _features(
    module: nn.Module, trainer: ClassifierTrainer, part: LabelledImages, accelerator: Accelerator
) -> Tensor:
    """Float32 penultimate features, likewise."""
    classifier = _shared(module, trainer, accelerator)
    return _gathered(classifier.features, part, accelerator)


def _shared(
    module: nn.Module, trainer: ClassifierTrainer, accelerator: Accelerator
) -> TrainedClassifier:
    """The same classifier on every process: running statistics are those of the main one."""
    from accelerate.utils import broadcast

    for tensor in module.state_dict().values():
        if accelerator.num_processes > 1:
            broadcast(tensor)
    data = trainer.data
    return TrainedClassifier(module, trainer.mean, trainer.std, data.class_names, data.image_shape)


def _gathered(
    compute: Callable[[Tensor], Tensor], part: LabelledImages, accelerator: Accelerator
) -> Tensor:
    per_process = -(-len(part) // accelerator.num_processes)
    start = accelerator.process_index * per_process
    # the last process repeats the last image, because gathering wants equal lengths
    rows = torch.arange(start, start + per_process).clamp(max=len(part) - 1)
    computed: Any = compute(part.images[rows]).to(accelerator.device)
    return accelerator.gather(computed)[: len(part)].cpu()  # type: ignore[union-attr]


def _check_features(model: nn.Module) -> None:
    if not hasattr(model, "forward_features"):
        raise ConfigError(
            f"{type(model).__name__} has no forward_features(x), which saving features needs"
        )
    named_linear(model, "fc")


def _features_are_small(model: nn.Module, data: TrainingData) -> bool:
    head = getattr(model, "fc", None)
    if not hasattr(model, "forward_features") or not isinstance(head, nn.Linear):
        return False
    rows = sum(len(part) for part in (data.validation, data.test) if part is not None)
    return 4 * rows * head.in_features <= FEATURE_BYTES


def _select(
    config: ClassifierConfig, progress: _Progress, record: dict[str, Any], module: nn.Module
) -> None:
    if config.select == "last":
        return
    values = record["validation"]
    score = values["accuracy"] if config.select == "best_accuracy" else -values["nll"]
    if progress.best_score is None or score > progress.best_score:
        progress.best_score, progress.best_epoch = score, record["epoch"]
        state = module.state_dict()
        progress.best = {name: t.detach().cpu().contiguous().clone() for name, t in state.items()}


def _describe(record: dict[str, Any]) -> str:
    text = f"loss {record['train']['loss']:.4f}"
    if "validation" in record:
        text += f", validation accuracy {record['validation']['accuracy']:.4f}"
    return text


def _write_log(folder: Path, progress: _Progress) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in progress.records)
    write_text(folder / "metrics.jsonl", lines)


def _save(folder: Path, trainer: ClassifierTrainer, progress: _Progress) -> None:
    tensors = trainer.tensors() | {f"best/{name}": t for name, t in progress.best.items()}
    about = {
        "format": STATE_FORMAT,
        "step": trainer.step,
        "records": progress.records,
        "best": [progress.best_score, progress.best_epoch],
    }
    path = folder / f"step-{trainer.step:08d}.safetensors"
    # one key: several would be written in random order, and files would differ
    data = save(tensors, metadata={"progress": json.dumps(about)})
    write_atomic(path, lambda file: file.write(data))
    for other in folder.iterdir():
        if other != path:
            other.unlink()


def _restore(folder: Path, trainer: ClassifierTrainer, progress: _Progress) -> None:
    states = sorted(folder.glob("step-*.safetensors")) if folder.is_dir() else []
    if not states:
        return
    try:
        with safe_open(states[-1], framework="pt") as file:
            about = json.loads((file.metadata() or {})["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["format"] != STATE_FORMAT:
            raise CheckpointError(f"format '{about['format']}', expected '{STATE_FORMAT}'")
        progress.records = about["records"]
        progress.best_score, progress.best_epoch = about["best"]
        for name in [name for name in tensors if name.startswith("best/")]:
            progress.best[name.removeprefix("best/")] = tensors.pop(name)
        trainer.restore(tensors, about["step"])
    except Exception as error:
        raise ArtifactError(
            f"training state '{states[-1]}' cannot be used ({error}); delete it to start again"
        ) from error
    logger.info("resumed at step %d of %d", trainer.step, trainer.steps)
