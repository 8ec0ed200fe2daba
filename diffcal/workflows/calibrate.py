"""Post-hoc calibration: validation logits and others in, calibrated files and a table out."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcal import __version__
from diffcal.calibration.metrics.inputs import Predictions
from diffcal.calibration.metrics.registry import MEASURES
from diffcal.calibration.metrics.summary import evaluate
from diffcal.calibration.posthoc.calibrator import Calibrator
from diffcal.calibration.posthoc.feature_clipping import FeatureClipping
from diffcal.calibration.posthoc.feature_consistency import FeatureConsistency
from diffcal.calibration.posthoc.pipeline import Pipeline
from diffcal.calibration.posthoc.registry import CALIBRATORS, build_calibrator
from diffcal.calibration.posthoc.storage import calibrator_settings, save_calibrator
from diffcal.config import build_config, config_to_dict
from diffcal.core.runs import claim_folder, sha256_file, write_json
from diffcal.data.logits import LogitsFile, load_logits, save_logits
from diffcal.errors import ConfigError, DataError, DiffcalError

__all__ = ["CalibrateConfig", "calibrate", "calibrate_config"]

TABLE = ("accuracy", "nll", "brier", "ece", "ece_mass", "cw_ece", "smece")
FORMATS = ("npz", "parquet", "safetensors")


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig:
    """Settings of a calibration run."""

    methods: tuple[str, ...] = ("temperature",)
    """Names of ``CALIBRATORS``; ``a+b`` fits b on what a makes of the validation data."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings by method, as ``settings.temperature.criterion``."""
    measures: tuple[str, ...] = TABLE
    n_bins: int = 15
    format: str = ""  # of calibrated files; empty keeps that of the input

    def __post_init__(self) -> None:
        if not self.methods:
            raise ConfigError("give at least one method")
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError("a method is named twice")
        if self.n_bins < 1:
            raise ConfigError(f"n_bins must be at least 1, got {self.n_bins}")
        if self.format and self.format not in FORMATS:
            raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got '{self.format}'")
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown:
            raise ConfigError(f"unknown measure '{unknown[0]}'; use {', '.join(MEASURES)}")
        used = {name for method in self.methods for name in method.split("+")}
        for name, values in self.settings.items():
            if name not in used:
                known = "is not among the methods" if name in CALIBRATORS else "is no method"
                raise ConfigError(
                    f"settings of '{name}', which {known} ({', '.join(sorted(used))})"
                )
            if not isinstance(values, Mapping):
                raise ConfigError(f"settings.{name} must be a table, as settings.{name}.seed=1")
        for method in self.methods:
            build_calibrator(method, self.settings)  # unknown names and settings end here


def calibrate_config(
    methods: Sequence[str] = (), overrides: Sequence[str] = (), preset: Path | None = None
) -> CalibrateConfig:
    """Settings from a TOML file, method names and overrides.

    An override of a method may be written without ``settings.``: ``temperature.criterion=ece``.
    """
    prefixed = [
        f"settings.{text}" if text.split(".")[0].strip() in CALIBRATORS else text
        for text in overrides
    ]
    base = {"methods": list(methods)} if methods else None
    made = build_config(CalibrateConfig, preset, prefixed, base)
    if preset is not None and methods and tuple(methods) != made.methods:
        raise ConfigError(
            f"'{preset}' names other methods ({', '.join(made.methods)}) than --method"
        )
    return made


def calibrate(
    config: CalibrateConfig,
    validation: Path | str,
    apply: Sequence[Path | str],
    out: Path | str,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Fit every method on one logits file and apply it to others; returns the summary of a run.

    Writes ``out/METHOD/calibrator.safetensors`` (and ``calibrator.json`` with its settings),
    ``out/METHOD/NAME.SUFFIX`` for each applied file (logits where the method has them, else
    probabilities, with the labels and features of the input), and ``out/metrics.json``: every measure
    of every file before and after, the validation file included (where "after" is in-sample).
    Where calibrated logits come from a last linear layer, as under temperature scaling and feature
    clipping, their file holds this layer's inputs and head.

    Raises:
        DataError: a file cannot be used, holds probabilities, or does not fit the others (nothing is
            written then), or a method cannot be fitted.
        ConfigError: unknown method or setting.
        ArtifactError: ``out`` holds another run.
    """
    out = Path(out)
    files = {"validation": _read(Path(validation)), **_named(apply)}
    val = files["validation"]
    for name, content in files.items():
        _check_fits(name, content, val)
    for method in config.methods:
        _check_layer(method, build_calibrator(method, config.settings), files.values(), val)
    inputs = {name: _source(content) for name, content in files.items()}
    claim_folder(out, config_to_dict(config) | {"inputs": inputs}, overwrite=overwrite)
    fitted: dict[str, Calibrator] = {}
    for method in config.methods:
        fitted[method] = _fit(method, config, val)
    before = {name: _measured(content, None, config) for name, content in files.items()}
    results: dict[str, Any] = {}
    outputs: dict[tuple[str, str], dict[str, Tensor]] = {}
    for method, calibrator in fitted.items():
        results[method] = {}
        for name, content in files.items():
            made = _applied(calibrator, content)
            outputs[method, name] = made
            results[method][name] = _measured(content, made, config)
    for method, calibrator in fitted.items():
        folder = out / method
        save_calibrator(calibrator, folder / "calibrator.safetensors")
        described = {"method": method, "settings": calibrator_settings(calibrator)}
        write_json(folder / "calibrator.json", described | {"fitted": _small_state(calibrator)})
        for name, content in files.items():
            if name == "validation":
                continue
            suffix = f".{config.format}" if config.format else content.path.suffix
            labels: dict[str, Any] = {
                "labels": content.labels,
                "soft_labels": content.soft_labels,
            }
            made: dict[str, Any] = outputs[method, name]
            layer = _last_layer(calibrator, content, made, suffix)
            save_logits(folder / f"{name}{suffix}", **made, **labels, **layer)
    table = {
        "format": "diffcal-calibration/1",
        "version": __version__,
        "n_bins": config.n_bins,
        "inputs": inputs,
        "before": before,
        "after": results,
    }
    write_json(out / "metrics.json", table)
    return {"out": str(out), "summary": _summary(before, results, config.measures)}


def _read(path: Path) -> LogitsFile:
    content = load_logits(path)
    if content.logits is None:
        raise DataError(f"'{path}' holds probabilities; post-hoc methods start from logits")
    try:
        Predictions(**content.inputs)  # type: ignore[arg-type]
    except DataError as error:
        raise DataError(f"'{path}': {error}") from error
    return content


def _named(paths: Sequence[Path | str]) -> dict[str, LogitsFile]:
    named: dict[str, LogitsFile] = {}
    for path in map(Path, paths):
        name = path.stem
        if name in named or name in ("validation", "calibrator"):
            name = f"{path.resolve().parent.name or 'file'}-{path.stem}"
        if name in named:
            raise ConfigError(f"two files to calibrate are called '{name}': rename one")
        named[name] = _read(path)
    return named


def _check_fits(name: str, content: LogitsFile, val: LogitsFile) -> None:
    assert content.logits is not None
    assert val.logits is not None
    if content.logits.shape[1] != val.logits.shape[1]:
        raise DataError(
            f"'{content.path}' has {content.logits.shape[1]} classes, "
            f"the validation file {val.logits.shape[1]}"
        )
    if name != "validation" and torch.equal(content.logits, val.logits):
        raise DataError(
            f"'{content.path}' holds the validation logits: a calibrator must not be judged on "
            "the data that it was fitted on (metrics.json has the validation figures anyway)"
        )


def _stages(calibrator: Calibrator) -> list[Calibrator]:
    return list(calibrator.stages) if isinstance(calibrator, Pipeline) else [calibrator]


def _check_layer(
    method: str, calibrator: Calibrator, files: Iterable[LogitsFile], val: LogitsFile
) -> None:
    """Raise :class:`DataError` where a file lacks the features, or ``val`` the layer, of a method."""
    reads_head = any(
        isinstance(s, FeatureClipping | FeatureConsistency) for s in _stages(calibrator)
    )
    if reads_head and val.head is None:
        raise DataError(
            f"'{val.path}': {method} needs the last linear layer; "
            "store it as head_weight and head_bias (.npz or .safetensors)"
        )
    for content in files:
        if calibrator.needs_features and content.features is None:
            raise DataError(f"'{content.path}': {method} needs the array 'features'")


def _fit(method: str, config: CalibrateConfig, val: LogitsFile) -> Calibrator:
    calibrator = build_calibrator(method, config.settings)
    for stage in _stages(calibrator):
        if isinstance(stage, FeatureClipping):
            assert val.head is not None
            stage.with_head(*val.head)
        elif isinstance(stage, FeatureConsistency):
            assert val.head is not None
            stage.with_weight(val.head[0])
    try:
        return calibrator.fit(
            val.logits,  # type: ignore[arg-type]
            None if val.soft_labels is not None else val.labels,
            soft_labels=val.soft_labels,
            features=val.features,
        )
    except DiffcalError as error:
        raise type(error)(f"{method} on '{val.path}': {error}") from error


def _applied(calibrator: Calibrator, content: LogitsFile) -> dict[str, Tensor]:
    assert content.logits is not None
    if calibrator.gives_logits:
        z = calibrator.calibrated_logits(content.logits, features=content.features)
        return {"logits": z}
    return {"probs": calibrator.predict_proba(content.logits, features=content.features)}


def _last_layer(
    calibrator: Calibrator, content: LogitsFile, made: Mapping[str, Tensor], suffix: str
) -> dict[str, Any]:
    """Features and head of a calibrated file: a layer that gives its logits, if there is one."""
    if content.features is None or content.head is None or "logits" not in made:
        return {"features": content.features}
    layer = calibrator.last_layer(content.features, *content.head)
    if layer is None:
        return {"features": content.features}
    features, weight, bias = layer
    return {"features": features, "head": None if suffix == ".parquet" else (weight, bias)}


def _measured(
    content: LogitsFile, made: dict[str, Tensor] | None, config: CalibrateConfig
) -> dict[str, Any]:
    inputs = dict(content.inputs)
    if made is not None:
        del inputs["logits"]
        inputs.update(made)
    predictions = Predictions(**inputs)  # type: ignore[arg-type]
    report = evaluate(predictions, measures=config.measures, n_bins=config.n_bins).to_dict()
    return {
        name: {"value": entry["value"], **({"note": entry["note"]} if entry["note"] else {})}
        for name, entry in report.items()
    }


def _source(content: LogitsFile) -> dict[str, Any]:
    assert content.logits is not None
    return {
        "path": str(content.path),
        "sha256": sha256_file(content.path),
        "examples": len(content.logits),
        "classes": content.logits.shape[1],
        "labels": "hard" if content.soft_labels is None else "soft",
    }


def _small_state(calibrator: Calibrator) -> dict[str, Any]:
    """Fitted values of a few numbers, for reading; the safetensors file has all of them."""
    state = {}
    for name, value in calibrator.state_dict().items():
        if value.numel() <= 16 and not name.endswith("sizes"):
            numbers = value.double().flatten().tolist()
            plain = [v if math.isfinite(v) else str(v) for v in numbers]
            state[name.rstrip("_")] = plain[0] if value.ndim == 0 else plain
    return state


def _summary(
    before: dict[str, Any], after: dict[str, Any], measures: Sequence[str]
) -> dict[str, dict[str, dict[str, float | None]]]:
    """For each applied file: a row of measures before, and one after each method."""

    def row(values: dict[str, Any]) -> dict[str, float | None]:
        return {
            name: None if values[name]["value"] is None else round(values[name]["value"], 5)
            for name in measures
        }

    return {
        name: {
            "before": row(before[name]),
            **{method: row(by_file[name]) for method, by_file in after.items()},
        }
        for name in before
        if name != "validation" or len(before) == 1
    }
