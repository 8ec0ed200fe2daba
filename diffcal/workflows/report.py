"""The calibration report: logits files in, one self-contained HTML page and one JSON out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffcal import __version__
from diffcal.calibration import plots
from diffcal.calibration.metrics.inputs import Predictions
from diffcal.calibration.metrics.registry import MEASURES
from diffcal.calibration.metrics.summary import MetricReport, evaluate
from diffcal.calibration.metrics.temperature import TemperatureFit, fit_temperature
from diffcal.calibration.reliability_axes import IntervalKind
from diffcal.core.runs import sha256_file, write_json
from diffcal.data.logits import LogitsFile, load_logits
from diffcal.errors import ConfigError, DataError
from diffcal.workflows.html import (
    Html,
    Number,
    Page,
    columns,
    details,
    facts,
    figure,
    format_number,
    note,
    table,
)

__all__ = [
    "ReportConfig",
    "ReportModel",
    "calibration_report",
    "report_data",
    "report_model",
    "report_page",
    "report_sections",
]

HEADLINE = ("accuracy", "nll", "brier", "ece", "ece_mass", "cw_ece", "smece", "aurc")
SHORT = {"ece_mass": "Adaptive ECE", "aurc": "AURC"}
PERCENT = {
    "accuracy", "confidence", "correct_confidence", "incorrect_confidence", "calibration_gap",
    "ece", "ece_mass", "rmsce", "mce", "average_ce", "over_part", "under_part", "debiased_ce",
    "sweep_ece", "noise_floor", "smece", "ks", "kde_ce", "mmce", "cw_ece", "top1_agreement", "auroc",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Settings of a report."""

    title: str = "Calibration report"
    n_bins: int = 15
    n_resamples: int = 500  # bootstrap resamples of the intervals; 0 leaves them out
    level: float = 0.95
    seed: int = 0
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.n_bins < 1:
            raise ConfigError(f"n_bins must be at least 1, got {self.n_bins}")
        if self.n_resamples < 0:
            raise ConfigError(f"n_resamples must not be negative, got {self.n_resamples}")
        if not 0 < self.level < 1:
            raise ConfigError(f"level must lie strictly between 0 and 1, got {self.level}")


@dataclass(frozen=True)
class ReportModel:
    """One model of a report with everything measured on it."""

    name: str
    predictions: Predictions
    report: MetricReport
    best_temperature: TemperatureFit | None
    """Fitted on the very data of the report; a diagnosis, not a calibrated model. None if
    probabilities of exactly 0 forbid scaling."""
    source: dict[str, Any]


def calibration_report(
    files: Sequence[Path | str] | Mapping[str, Path | str],
    out: Path | str,
    config: ReportConfig | None = None,
) -> dict[str, Any]:
    """Write ``out/report.html`` and ``out/report.json`` for one or several logits files.

    Args:
        files: Paths (named after their files, or their folders if these coincide) or name to path;
            see :func:`~diffcal.data.logits.load_logits` for the formats.
        out: Folder of the report.
        config: Settings; None takes the defaults.

    Returns:
        The content of the JSON file.

    Raises:
        DataError: a file cannot be used; the message names it.
        ConfigError: no files, or two of one name.
    """
    config = config or ReportConfig()
    named = _named(files)
    models = []
    names: tuple[str, ...] = config.class_names
    for name, path in named.items():
        content = load_logits(path)
        names = names or content.class_names or ()
        models.append(report_model(name, content, config))
    out = Path(out)
    data = report_data(models, config)
    report_page(models, config, names).write(out / "report.html")
    write_json(out / "report.json", data)
    return data


def report_model(name: str, content: LogitsFile, config: ReportConfig) -> ReportModel:
    """Everything measured on one file."""
    try:
        predictions = Predictions(**content.inputs)  # type: ignore[arg-type]
    except DataError as error:
        raise DataError(f"'{content.path}': {error}") from error
    report = evaluate(
        predictions,
        n_bins=config.n_bins,
        n_resamples=config.n_resamples,
        level=config.level,
        seed=config.seed,
    )
    scaling = predictions.is_logits or bool((predictions.scores > 0).all())
    best = fit_temperature(predictions) if scaling else None
    source = {"file": content.path.name, "sha256": sha256_file(content.path)}
    return ReportModel(name, predictions, report, best, source)


def report_data(models: Sequence[ReportModel], config: ReportConfig) -> dict[str, Any]:
    """The numbers of a report as plain JSON content."""
    return {
        "format": "diffcal-report/1",
        "diffcal": __version__,
        "n_bins": config.n_bins,
        "n_resamples": config.n_resamples,
        "level": config.level,
        "seed": config.seed,
        "models": [
            {
                "name": model.name,
                **model.source,
                "examples": len(model.predictions),
                "classes": model.predictions.classes,
                "labels": "soft" if model.predictions.is_soft else "hard",
                "best_temperature": None
                if model.best_temperature is None
                else {
                    "temperature": model.best_temperature.temperature,
                    "nll": _finite(model.best_temperature.loss),
                    "note": model.best_temperature.note,
                },
                "measures": model.report.to_dict(),
            }
            for model in models
        ],
    }


def report_page(
    models: Sequence[ReportModel], config: ReportConfig, class_names: Sequence[str] = ()
) -> Page:
    """The page of a report.

    Raises:
        ConfigError: no model.
    """
    if not models:
        raise ConfigError("a report needs at least one logits file")
    count = f"{len(models)} models, " if len(models) > 1 else ""
    first = models[0].predictions
    page = Page(
        config.title,
        f"{count}{format_number(len(first))} examples, {first.classes} classes",
        f"Made with diffcal {__version__}. Intervals: {100 * config.level:g} % bootstrap "
        f"({config.n_resamples} resamples, basic method; for an ECE "
        "near the noise floor they cover less than they claim). Bins are (lower, upper]; float64.",
    )
    for title, blocks in report_sections(models, config, class_names):
        page.section(title, *blocks)
    return page


def report_sections(
    models: Sequence[ReportModel], config: ReportConfig, class_names: Sequence[str] = ()
) -> list[tuple[str, list[str | Html]]]:
    """Titles and blocks of a report, for pages that say more than that."""
    sections = [
        ("Summary", _summary(models, config)),
        ("Reliability", _reliability(models, config)),
        ("Confidence and selective prediction", _confidence(models)),
    ]
    if all(model.predictions.classes <= 1000 for model in models):
        sections.append(("Classes", _classes(models, config, class_names)))
    return [*sections, ("All measures", _all(models, config))]


def _summary(models: Sequence[ReportModel], config: ReportConfig) -> list[str | Html]:
    blocks: list[str | Html] = []
    if len(models) == 1:
        report = models[0].report
        blocks.append(facts({_title(name, short=True): _value(name, report) for name in HEADLINE}))
    else:
        header = ["model", *(_title(name, short=True) for name in HEADLINE)]
        rows = [
            [model.name, *(_value(name, model.report) for name in HEADLINE)] for model in models
        ]
        kinds = {"lower": "lowest", "higher": "highest"}
        best = {
            index + 1: kinds[MEASURES[name].better]
            for index, name in enumerate(HEADLINE)
            if MEASURES[name].better in kinds
        }
        caption = "The best value of each column is marked; small print: interval."
        blocks.append(table(header, rows, caption, best))
    blocks += [_reading(model) for model in models]
    sizes = {len(model.predictions) for model in models}
    if len(sizes) > 1:
        text = "The files hold different numbers of examples, so compare the models with care."
        blocks.append(note(text, "warning"))
    if any(model.predictions.is_soft for model in models):
        blocks.append(
            "Labels are soft: the outcome of a prediction is the label's probability of the "
            "predicted class, and NLL is the cross-entropy with the label."
        )
    return blocks


def _reading(model: ReportModel) -> str:
    """What the numbers say, in two sentences."""
    report = model.report
    gap, ece, nll = (report[name].value for name in ("calibration_gap", "ece", "nll"))
    floor = report["noise_floor"].value if "noise_floor" in report else 0.0
    if ece <= 1.25 * floor:
        finding = (
            f"ECE {100 * ece:.2f} % is what sampling alone gives a perfectly calibrated model on "
            f"these confidences ({100 * floor:.2f} %)"
        )
    else:
        direction = "more" if gap > 0 else "less"
        finding = (
            f"predictions are on average {100 * abs(gap):.1f} points {direction} confident than "
            f"right; ECE {100 * ece:.2f} %"
            + (f" against {100 * floor:.2f} % for a perfect model" if floor else "")
        )
    fit = model.best_temperature
    if fit is None or not math.isfinite(nll):
        return f"{model.name}: {finding}."
    hint = (
        "no single temperature fits (it runs to the bound)"
        if fit.note
        else f"the best temperature on these data would be {fit.temperature:.2f} and take the NLL "
        f"from {nll:.4f} to {fit.loss:.4f}"
    )
    return f"{model.name}: {finding}; {hint}."


def _reliability(models: Sequence[ReportModel], config: ReportConfig) -> list[str | Html]:
    scores = {model.name: model.predictions for model in models}
    soft = any(model.predictions.is_soft for model in models)  # outcomes then are no coin tosses
    interval: IntervalKind = "bootstrap" if soft else "wilson"
    bars = f"95 % {'bootstrap' if soft else 'Wilson'} intervals"
    if len(models) == 1:
        name, one = next(iter(scores.items()))
        pair = (
            plots.reliability_diagram(
                one, config.n_bins, interval=interval, title=f"{name}: {config.n_bins} bins"
            ),
            plots.reliability_diagram(
                one, config.n_bins, kind="smooth", title=f"{name}: smooth", seed=config.seed
            ),
        )
        caption = (
            f"Accuracy against confidence with {bars}; pale bars hold fewer than ten examples.",
            "Kernel regression at the bandwidth of the smooth ECE; thicker where there are more "
            "examples.",
        )
        return [columns(*(_svg(f, c) for f, c in zip(pair, caption, strict=True)))]
    binned = plots.reliability_comparison(scores, config.n_bins, interval=interval)
    smooth = plots.reliability_comparison(scores, config.n_bins, kind="smooth")
    return [
        _svg(binned, f"Accuracy against confidence with {bars}."),
        details("Smooth reliability", _svg(smooth, "At the bandwidth of the smooth ECE.")),
        columns(*(_points(models, name) for name in ("ece", "smece"))),
    ]


def _points(models: Sequence[ReportModel], name: str) -> Html:
    values = {}
    for model in models:
        entry = model.report[name]
        values[model.name] = (entry.value, entry.low, entry.high)
    floors = [m.report["noise_floor"].value for m in models if "noise_floor" in m.report]
    floor = floors[0] if name == "ece" and len(floors) == len(models) else None
    return _svg(plots.measure_intervals(values, MEASURES[name].title, floor))


def _confidence(models: Sequence[ReportModel]) -> list[str | Html]:
    shown = models[:6]
    histograms = [
        _svg(plots.confidence_histogram(model.predictions, title=model.name)) for model in shown
    ]
    risk = plots.risk_coverage({model.name: model.predictions for model in models})
    caption = "Dashed: the best any ranking could do at this accuracy."
    blocks: list[str | Html] = [columns(*histograms, _svg(risk, caption))]
    if len(models) > len(shown):
        blocks.append(f"Confidences of the first {len(shown)} models are shown.")
    return blocks


def _classes(
    models: Sequence[ReportModel], config: ReportConfig, names: Sequence[str]
) -> list[str | Html]:
    maps = []
    for model in models[:4]:
        fitting = names if len(names) == model.predictions.classes else None
        drawn = plots.class_heat_map(
            model.predictions, config.n_bins, fitting, title=model.name if len(models) > 1 else ""
        )
        maps.append(_svg(drawn, "Grey: fewer than five examples."))
    return [columns(*maps)]


def _all(models: Sequence[ReportModel], config: ReportConfig) -> list[str | Html]:
    names = list(dict.fromkeys(name for model in models for name in model.report))
    arrows = {"lower": "↓", "higher": "↑", "zero": "→ 0", "": ""}
    rows = [
        [
            _title(name),
            arrows[MEASURES[name].better],
            *(_value(name, model.report) if name in model.report else None for model in models),
        ]
        for name in names
    ]
    header = ["measure", "better", *(model.name for model in models)]
    text = f"Small print: {100 * config.level:g} % interval." if config.n_resamples else ""
    return [table(header, rows, text)]


def _title(name: str, short: bool = False) -> str:
    title = SHORT.get(name, MEASURES[name].title) if short else MEASURES[name].title
    return title + (" (%)" if name in PERCENT else "")


def _value(name: str, report: MetricReport) -> Number:
    entry = report[name]
    scale, places = (100, 2) if name in PERCENT else (1, 4)
    if not math.isfinite(entry.value):
        shown = "∞" if entry.value > 0 else "undefined"
        return Number(math.nan, shown)
    small = ""
    if entry.low is not None and entry.high is not None and math.isfinite(entry.low):
        small = f"{entry.low * scale:.{places}f} – {entry.high * scale:.{places}f}"
    value = entry.value * scale
    text = f"{value:.{places}f}".replace("-", "−")
    return Number(entry.value, text, small.replace("-", "−"))


def _svg(drawn: Any, caption: str = "") -> Html:
    inches = float(drawn.get_size_inches()[0])
    return figure(plots.figure_to_svg(drawn), caption, width=round(inches * 96) + 34)


def _named(files: Sequence[Path | str] | Mapping[str, Path | str]) -> dict[str, Path]:
    if isinstance(files, Mapping):
        named = {name: Path(path) for name, path in files.items()}
    else:
        paths = [Path(path) for path in files]
        names = [path.stem for path in paths]
        if len(set(names)) < len(names):  # runs often call their files alike: add the folder
            names = [f"{path.parent.name}/{path.stem}" for path in paths]
        if len(set(names)) < len(names):
            raise ConfigError("two files have the same name; pass name=path for each")
        named = dict(zip(names, paths, strict=True))
    if not named:
        raise ConfigError("a report needs at least one logits file")
    return named


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
