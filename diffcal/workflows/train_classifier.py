"""``diffcal train-classifier``: real images and a soft-labelled mixed set in, a classifier out.

With it come its logits, calibrated by post-hoc methods, and a report of all of them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from diffcal.calibration.posthoc.registry import build_calibrator
from diffcal.calibration.training_config import ClassifierConfig
from diffcal.calibration.training_data import (
    LabelledImages,
    MixedImages,
    TrainingData,
    hold_out,
)
from diffcal.calibration.training_loop import fit_classifier
from diffcal.config import check_choices, config_to_dict
from diffcal.core.rng import item_generator
from diffcal.core.runs import claim_folder, fingerprint, sha256_file
from diffcal.data.soft_labels import SoftLabelSet
from diffcal.data.sources import open_images
from diffcal.errors import ConfigError, DataError
from diffcal.workflows.calibrate import CalibrateConfig, calibrate
from diffcal.workflows.preset_files import preset_config
from diffcal.workflows.report import ReportConfig, calibration_report

__all__ = [
    "MixedSource",
    "TrainClassifierConfig",
    "classifier_config",
    "read_mixed",
    "train_classifier",
]

logger = logging.getLogger(__name__)

AFTER_TRAINING = ("posthoc", "posthoc_settings", "report", "save_features")
"""Settings that may change without training again."""

PURE = 1 - 1e-6
"""Smallest weight of a class that makes an image a pure one."""


@dataclass(frozen=True, kw_only=True)
class MixedSource:
    """Which mixed images to use, with which labels; the defaults are the method, the others controls."""

    folder: str | None = None
    """Published data set (the ``dataset`` folder of a mixing run); None trains on real images alone."""
    labels: Literal["soft_label", "weights", "one_hot"] = "soft_label"
    """``soft_label``: the annotator's. ``weights``: the mixing weights, without reannotation.
    ``one_hot``: certainty for the class of the largest weight."""
    members: Literal["all", "pure"] = "all"
    """``pure``: only images generated from a single class. With ``one_hot`` this is the control
    that tells more data apart from soft labels."""

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True, kw_only=True)
class TrainClassifierConfig:
    """Data, mixed data and training settings of one classifier, and what is done with its logits."""

    data: str = "digits"
    first_row: int = 0
    rows: int | None = None
    """Train and validate on rows ``first_row`` to ``first_row + rows``; all that follow if None."""
    test: str | None = None
    """Source of test images; None for no test."""
    test_first_row: int = 0
    test_rows: int | None = None
    image_column: str = "image"
    label_column: str = "label"
    validation: float = 0.1
    """Share of the training rows held out at random; 0 for no validation."""
    split_seed: int = 1
    """Decides the held-out rows, so that runs of different ``seed`` share them."""
    mixed: MixedSource = field(default_factory=MixedSource)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    posthoc: tuple[str, ...] = ("temperature",)
    """Methods of :data:`diffcal.calibration.posthoc.registry.CALIBRATORS` (``a+b`` for one after
    the other), fitted on the validation logits; an empty list for none."""
    posthoc_settings: dict[str, Any] = field(default_factory=dict)
    """Settings by method, as ``posthoc_settings.temperature.criterion``."""
    save_features: bool | None = None
    """Save the inputs and weights of the last linear layer with the logits, for methods that read them
    (as feature_clipping). None: where ``posthoc`` names such a method, or they are small (32 MiB)."""
    report: bool = True
    """Write a report of the test logits, before and after every method; without a test, of the
    validation logits before."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.validation < 1:
            raise ConfigError(f"validation must be a share in [0, 1), got {self.validation}")
        if self.posthoc and self.validation == 0:
            raise ConfigError(
                "post-hoc methods are fitted on validation images: give a validation share, or "
                "posthoc = []"
            )
        if self.posthoc:
            self.calibration  # noqa: B018 - unknown methods and settings end here
            if self.save_features is False and self.needs_features:
                raise ConfigError(
                    "a method of posthoc reads features: save_features cannot be false"
                )
        elif self.posthoc_settings:
            raise ConfigError("posthoc_settings are given, but posthoc names no method")

    @property
    def calibration(self) -> CalibrateConfig:
        """The post-hoc methods as settings of :func:`diffcal.workflows.calibrate.calibrate`."""
        return CalibrateConfig(methods=self.posthoc, settings=self.posthoc_settings)

    @property
    def needs_features(self) -> bool:
        """Whether a post-hoc method reads the inputs of the last linear layer."""
        built = (build_calibrator(name, self.posthoc_settings) for name in self.posthoc)
        return any(calibrator.needs_features for calibrator in built)


def classifier_config(
    preset: str | None = None, overrides: Sequence[str] = (), *, file: Path | None = None
) -> TrainClassifierConfig:
    """Settings from a preset (``digits``, ``cifar10`` ...), then a TOML file, then overrides.

    Args:
        overrides: As ``classifier.loss.name=dual_focal``.

    Raises:
        ConfigError: unknown preset or setting.
    """
    return preset_config(TrainClassifierConfig, "classifier", preset, overrides, file=file)


def train_classifier(
    config: TrainClassifierConfig,
    out: Path | str,
    *,
    overwrite: bool = False,
    device: str = "auto",
) -> dict[str, Any]:
    """Train, and leave classifier, logits, calibrated logits and a report in ``out``.

    Resumes the training that ``out`` holds. See
    :func:`diffcal.calibration.training_loop.fit_classifier` for its files; ``config.json`` holds its
    settings with the fingerprints of the data. Then come ``posthoc/`` (see
    :func:`diffcal.workflows.calibrate.calibrate`) and ``report/`` with ``report.html`` and
    ``report.json``. These two are made anew on every call, so that the same command with other
    methods does not train again.

    Returns:
        The summary of the run with the output folder; ``posthoc``, the measures of the test set (of
        the validation set, in-sample, if there is no test) before and after every method, and
        ``report``, the page, where they were asked for.

    Raises:
        ConfigError, DataError: before any training.
        ArtifactError: ``out`` belongs to other settings or data.
        NumericalError: the loss became NaN or infinite; the saved state stays.
    """
    from accelerate import Accelerator

    out = Path(out)
    accelerator = Accelerator(cpu=device == "cpu")
    data, fingerprints = _load(config)
    if accelerator.is_main_process:
        claimed = config_to_dict(config) | {"inputs": fingerprints}
        for name in AFTER_TRAINING:
            del claimed[name]
        claim_folder(out, claimed, overwrite=overwrite)
    accelerator.wait_for_everyone()
    summary = fit_classifier(
        data,
        config.classifier,
        out,
        accelerator=accelerator,
        seed=config.seed,
        with_features=config.needs_features or config.save_features,
    )
    if accelerator.is_main_process:
        summary |= _after_training(config, out, data.class_names)
    accelerator.wait_for_everyone()
    return summary | {"out": str(out)}


def read_mixed(source: MixedSource, class_names: tuple[str, ...]) -> MixedImages:
    """Mixed images of a published data set, in memory.

    Args:
        source: Folder and which of its images and labels.
        class_names: Classes of the real images; the data set's must be the same in the same order.

    Raises:
        DataError: no data set there, other classes, missing columns, images of several sizes.
    """
    published = _published(source, class_names)
    if not published.named:
        logger.warning(
            "'%s' does not name its classes; they are taken to be the real ones", source.folder
        )
    weights, support = published.mixing_weights()
    if source.labels == "soft_label":
        targets = published.soft_labels()
    elif source.labels == "weights":
        targets = weights
    else:
        targets = torch.eye(len(class_names))[weights.argmax(dim=1)]
    rows = torch.arange(len(published))
    if source.members == "pure":
        rows = (weights.max(dim=1).values >= PURE).nonzero()[:, 0]
    if not len(rows):
        raise DataError(f"'{source.folder}' has no {source.members} images")
    images = [published.image(row) for row in rows.tolist()]
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        raise DataError(f"'{source.folder}' has images of several sizes: {sorted(sizes)}")
    return MixedImages(
        images=torch.from_numpy(np.stack(images)),
        targets=targets[rows],
        groups=published.groups()[rows],
        support=support[rows],
    )


def _after_training(
    config: TrainClassifierConfig, out: Path, class_names: tuple[str, ...]
) -> dict[str, Any]:
    """Post-hoc methods and report from the logits in ``out``; what they add to the summary."""
    files = {name: out / f"logits-{name}.safetensors" for name in ("validation", "test")}
    judged = "validation" if config.test is None else "test"
    made: dict[str, Any] = {}
    shown = {"uncalibrated": files[judged]}
    if config.posthoc:
        folder = out / "posthoc"
        applied = [] if config.test is None else [files["test"]]
        table = calibrate(config.calibration, files["validation"], applied, folder, overwrite=True)
        made["posthoc"] = next(iter(table["summary"].values()))
        if config.test is not None:
            shown |= {name: folder / name / files["test"].name for name in config.posthoc}
    if config.report and (config.test is not None or config.validation > 0):
        settings = ReportConfig(
            title=f"{config.classifier.model} on '{config.data}', {judged} images",
            seed=config.seed,
            class_names=class_names,
        )
        calibration_report(shown, out / "report", settings)
        made["report"] = str(out / "report" / "report.html")
    return made


def _load(config: TrainClassifierConfig) -> tuple[TrainingData, dict[str, str | None]]:
    train, class_names, train_print = _read_source(
        config, config.data, config.first_row, config.rows
    )
    inputs: dict[str, str | None] = {"data": train_print, "test": None, "mixed": None}
    validation = test = mixed = None
    if config.validation > 0:
        generator = item_generator(config.split_seed, "validation-split", 0)
        train, validation = hold_out(train, config.validation, generator)
    if config.test is not None:
        test, test_names, inputs["test"] = _read_source(
            config, config.test, config.test_first_row, config.test_rows
        )
        if test_names != class_names:
            raise DataError(
                f"the classes of '{config.test}' ({', '.join(test_names[:5])} ...) are not those of "
                f"'{config.data}' ({', '.join(class_names[:5])} ...)"
            )
    if config.mixed.folder is not None:
        mixed = read_mixed(config.mixed, class_names)
        files = _published(config.mixed, class_names).files
        inputs["mixed"] = fingerprint([sha256_file(path) for path in files])
    return TrainingData(train, class_names, mixed, validation, test), inputs


def _read_source(
    config: TrainClassifierConfig, name: str, first_row: int, rows: int | None
) -> tuple[LabelledImages, tuple[str, ...], str]:
    source = open_images(name, image_column=config.image_column, label_column=config.label_column)
    end = len(source) if rows is None else first_row + rows
    if not 0 <= first_row < end <= len(source):
        raise ConfigError(f"rows {first_row} to {end} asked for, but '{name}' has {len(source)}")
    parts = [
        (torch.as_tensor(images), torch.as_tensor(labels))
        for _, images, labels in source.batches(1024, range(first_row, end))
    ]
    images = torch.cat([images for images, _ in parts])
    labels = torch.cat([labels for _, labels in parts]).long()
    return LabelledImages(images, labels), tuple(source.class_names), source.fingerprint


def _published(source: MixedSource, class_names: tuple[str, ...]) -> SoftLabelSet:
    assert source.folder is not None
    return SoftLabelSet(source.folder, class_names)
