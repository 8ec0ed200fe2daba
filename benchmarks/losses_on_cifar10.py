"""Losses and post-hoc methods on real logits: compact networks on a fixed subset of CIFAR-10.

    python benchmarks/losses_on_cifar10.py DATA --runs FOLDER [--part final] [--workers 2]
        [--losses NAME ...] [--seeds N ...] [--out benchmarks/losses_on_cifar10.json]

``DATA`` holds ``train-*.parquet`` and ``test-*.parquet`` of CIFAR-10 (images and labels as the
datasets library stores them). Trains one network for each loss and seed, fits every post-hoc
method on the validation rows, measures all of it on one part of the test set, and writes
``--out`` (every figure of every run) and the tables beside it as Markdown. ``--runs`` keeps the
trained networks and their logits: stopped at any moment and started again, the command goes on
from there. Rows, recipe, seeds and what was decided when are in ``benchmarks/PROTOCOL.md``.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from _environment import environment

from diffcal.calibration.posthoc.last_layer import linear_head
from diffcal.calibration.training_config import AugmentationConfig, ClassifierConfig, LossConfig
from diffcal.calibration.training_data import LabelledImages, TrainingData
from diffcal.calibration.training_loop import fit_classifier
from diffcal.config import config_to_dict
from diffcal.core.runs import claim_folder, read_json, write_json, write_text
from diffcal.data.logits import save_logits
from diffcal.data.sources import open_images
from diffcal.models.classifier import load_classifier
from diffcal.workflows.calibrate import CalibrateConfig, calibrate

LOSSES: dict[str, LossConfig] = {
    "CE": LossConfig(name="cross_entropy"),
    "focal-3": LossConfig(name="focal", params={"gamma": 3.0}),
    "FLSD-53": LossConfig(name="flsd"),
    "Dual Focal": LossConfig(name="dual_focal", params={"gamma": 5.0}),
    "BSCE-GRA": LossConfig(name="bsce_gra", params={"norm": 2.0, "gamma": 2.0}),
}
METHODS = (
    "temperature", "vector", "matrix", "dirichlet", "ets", "pts", "cts", "group", "procal",
    "histogram", "isotonic", "bbq", "spline", "consistency", "feature_clipping",
    "feature_clipping+temperature", "temperature+procal", "temperature+isotonic", "temperature+spline",
)  # fmt: skip
BY_ECE: dict[str, dict[str, Any]] = {
    "temperature": {"criterion": "ece", "search": "grid"},
    "consistency": {"criterion": "ece"},
    "feature_clipping": {"criterion": "ece"},
}
"""The same chosen by validation ECE, as the papers' released searches do; NLL is our default."""
ALL = (*METHODS, *(f"{method}, by ECE" for method in BY_ECE))
MEASURES = {
    "ece": "ECE", "ece_mass": "adaptive ECE", "cw_ece": "classwise ECE", "smece": "smECE",
    "nll": "NLL", "brier": "Brier", "accuracy": "accuracy",
}  # fmt: skip
READ_ALSO = ("confidence", "noise_floor", "debiased_ce")
"""For reading the tables: over- or under-confidence, and what a calibrated model would score."""
PERCENT = {"ece", "ece_mass", "cw_ece", "smece", "accuracy", "confidence", "noise_floor"}
PAPERS = ("CE", "focal-3", "FLSD-53", "Dual Focal", "BSCE-GRA")
"""The papers' order of ECE before calibration, worst first (arXiv:2305.13665, 2503.22725)."""
COMPARED = (
    ("ece", "before"), ("smece", "before"), ("nll", "before"),
    ("ece", "temperature"), ("smece", "temperature"), ("nll", "temperature"),
)  # fmt: skip
NOTE_ORDER = (
    "Second less first, paired by seed. By the papers every ECE falls from step to step. Bold: one "
    "sign in all seeds and, for calibration errors, a mean beyond the noise floor."
)
NOTE_METHODS = "Above 0: temperature scaling is better. Bold as above."
SEEDS = (0, 1, 2)
TRAIN, VALIDATION = range(8_000), range(45_000, 47_000)
TEST = {"development": range(5_000), "final": range(5_000, 10_000)}


def recipe(loss: LossConfig) -> ClassifierConfig:
    return ClassifierConfig(
        model="cnn-small",
        epochs=20,
        batch_size=125,
        learning_rate=0.1,
        weight_decay=5e-4,
        schedule="cosine",
        clip=2.0,
        reduction="sum",
        loss=loss,
        augmentation=AugmentationConfig(crop_padding=0, flip=True),
        precision="bf16",
        evaluate_every=20,
        save_every=3,
    )


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    before = environment("cpu", ("scikit-learn", "netcal"))
    jobs = list(itertools.product(arguments.seeds, arguments.losses))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        waiting = [
            pool.submit(run, arguments.data, arguments.runs, loss, seed, arguments.part)
            for seed, loss in jobs
        ]
        results = [job.result() for job in waiting]
    by_loss: dict[str, dict[str, Any]] = {loss: {} for loss in arguments.losses}
    for (seed, loss), result in zip(jobs, results, strict=True):
        by_loss[loss][str(seed)] = result
    return {
        **before,
        "part": arguments.part,
        "rows": {
            "train": _span(TRAIN),
            "validation": _span(VALIDATION),
            "test": _span(TEST[arguments.part]),
        },
        "recipe": config_to_dict(recipe(LOSSES["CE"])),
        "losses": {name: config_to_dict(LOSSES[name]) for name in arguments.losses},
        "runs": by_loss,
        "summary": {loss: _summary(list(runs.values())) for loss, runs in by_loss.items()},
    }


def run(data: Path, runs: Path, loss: str, seed: int, part: str) -> dict[str, Any]:
    """Figures of one network before and after each method; what ``runs`` holds is not made again."""
    torch.set_num_threads(1)
    folder = runs / f"{LOSSES[loss].name}-{seed}"
    config = recipe(LOSSES[loss])
    asked = {"classifier": config_to_dict(config), "seed": seed}
    claim_folder(folder, asked | {"train": _span(TRAIN), "validation": _span(VALIDATION)})
    logits = {name: folder / "logits" / f"{name}.npz" for name in ("validation", *TEST)}
    train = data / "train-*.parquet"
    if not (folder / "classifier" / "summary.json").exists():
        content, names = _images(train, TRAIN)
        validation, _ = _images(train, VALIDATION)
        training = TrainingData(content, names, validation=validation)
        fit_classifier(training, config, folder / "classifier", seed=seed)
    wanted = {"validation": (train, VALIDATION), part: (data / "test-*.parquet", TEST[part])}
    classifier = load_classifier(folder / "classifier")
    head = linear_head(classifier.module, "fc")
    for name, (source, rows) in wanted.items():
        if not logits[name].exists():
            logits[name].parent.mkdir(exist_ok=True)
            content, _ = _images(source, rows)
            features = classifier.features(content.images)
            z = features.double() @ head[0].T + head[1]
            labels = {"labels": content.labels, "features": features, "head": head}
            save_logits(logits[name], logits=z, **labels)
    table, fitted = _calibrated(folder / "calibration" / part, METHODS, {}, logits, part)
    by_ece, _ = _calibrated(folder / "calibration" / f"{part}-ece", BY_ECE, BY_ECE, logits, part)
    after = table["after"] | {f"{name}, by ECE": made for name, made in by_ece["after"].items()}
    log = (folder / "classifier" / "metrics.jsonl").read_text().splitlines()
    return {
        "train_accuracy": json.loads(log[-1])["train"]["accuracy"],
        "fitted_temperature": fitted,
        "before": _plain(table["before"][part]),
        **{method: _plain(after[method][part]) for method in ALL},
    }


def _calibrated(
    folder: Path,
    methods: Iterable[str],
    settings: dict[str, dict[str, Any]],
    logits: dict[str, Path],
    part: str,
) -> tuple[dict[str, Any], float]:
    """The table of measures of ``diffcal calibrate``, and the temperature that it fitted."""
    path, methods = folder / "metrics.json", tuple(methods)
    if not path.exists() or list(read_json(path)["after"]) != list(methods):
        asked = CalibrateConfig(
            methods=methods, settings=settings, measures=(*MEASURES, *READ_ALSO)
        )
        calibrate(asked, logits["validation"], [logits[part]], folder, overwrite=True)
    fitted = read_json(folder / "temperature" / "calibrator.json")["fitted"]
    return read_json(path), fitted["temperature"]


def markdown(results: dict[str, Any]) -> str:
    """The tables, means over seeds with standard deviations; percent where it says so."""
    summary, seeds = results["summary"], len(next(iter(results["runs"].values())))
    rows, part = results["rows"], results["part"]
    lines = [
        "# Losses and post-hoc methods on a subset of CIFAR-10",
        "",
        f"Written by `benchmarks/losses_on_cifar10.py`. {results['recipe']['model']}, training rows "
        f"{rows['train']}, {results['recipe']['epochs']} epochs; post-hoc methods fitted on rows "
        f"{rows['validation']}; judged on test rows {rows['test']} ({part} part). Mean ± standard "
        f"deviation over {seeds} seeds; all but NLL, Brier score and T in percent, 15 bins. ∞: a label "
        "whose probability is 0.",
        "",
        "## Before any post-hoc method",
        "",
    ]
    before_columns = [*MEASURES, "confidence", "noise_floor"]
    head = ["loss", *(_title(m) for m in before_columns), "T", "training accuracy"]
    body = [
        [
            loss,
            *(_cell(values["before"][m], m) for m in before_columns),
            _cell(values["fitted_temperature"], "temperature"),
            _cell(values["train_accuracy"], "accuracy"),
        ]
        for loss, values in summary.items()
    ]
    lines += [*_table(head, body), ""]
    for measure in ("ece", "nll", "accuracy"):
        title = f"## {MEASURES[measure][0].upper()}{MEASURES[measure][1:]} after each method"
        body = [
            [method, *(_cell(values[method][measure], measure) for values in summary.values())]
            for method in ("before", *ALL)
        ]
        lines += [title, "", *_table(["method", *summary], body), ""]
    lines += ["## The papers' order of the losses", "", NOTE_ORDER, ""]
    head = ["step", *(f"{MEASURES[m]}, {method}" for m, method in COMPARED)]
    steps = [pair for pair in itertools.pairwise(PAPERS) if set(pair) <= set(summary)]
    body = [
        [f"{a} → {b}", *(_difference(results, (a, *c), (b, *c)) for c in _figures())]
        for a, b in steps
    ]
    lines += [*_table(head, body), ""]
    lines += ["## ECE of each method less that of temperature scaling", "", NOTE_METHODS, ""]
    body = [
        [
            method,
            *(
                _difference(results, (loss, "temperature", "ece"), (loss, method, "ece"))
                for loss in summary
            ),
        ]
        for method in ALL
        if method != "temperature"
    ]
    lines += [*_table(["method", *summary], body), ""]
    body = [
        [loss, method, *(_cell(values[method][m], m) for m in MEASURES)]
        for loss, values in summary.items()
        for method in ("before", *ALL)
    ]
    lines += ["## Every measure", ""]
    lines += [*_table(["loss", "method", *(_title(m) for m in MEASURES)], body), ""]
    return "\n".join(lines)


def _figures() -> list[tuple[str, str]]:
    return [(method, measure) for measure, method in COMPARED]


def _difference(
    results: dict[str, Any], first: tuple[str, str, str], second: tuple[str, str, str]
) -> str:
    """Second less first (each loss, method, measure), paired by seed; bold where it counts."""
    runs, measure = results["runs"], first[2]

    def values(of: tuple[str, str, str]) -> list[float | None]:
        loss, method, name = of
        return [one[method][name] for one in runs[loss].values()]

    pairs = zip(values(first), values(second), strict=True)
    changes = [b - a for a, b in pairs if a is not None and b is not None]
    if len(changes) < len(runs[first[0]]):
        return "∞"
    floors = [one[first[1]]["noise_floor"] for one in runs[first[0]].values()]
    floor = statistics.fmean(floors) if measure in PERCENT else 0.0
    counts = abs(statistics.fmean(changes)) > floor and (
        all(change > 0 for change in changes) or all(change < 0 for change in changes)
    )
    cell = _cell(_moments(changes), measure, sign="+")
    return f"**{cell}**" if counts else cell


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over runs, in the nesting of one run."""
    made: dict[str, Any] = {}
    for name, value in runs[0].items():
        if isinstance(value, dict):
            made[name] = _summary([one[name] for one in runs])
        else:
            made[name] = _moments([one[name] for one in runs])
    return made


def _moments(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation; None and None if a value is infinite, which JSON writes as null."""
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return {"mean": None, "sd": None}
    sd = statistics.stdev(finite) if len(finite) > 1 else None
    return {"mean": statistics.fmean(finite), "sd": sd}


def _plain(measured: dict[str, Any]) -> dict[str, float | None]:
    return {name: entry["value"] for name, entry in measured.items()}


def _images(source: Path, rows: range) -> tuple[LabelledImages, tuple[str, ...]]:
    opened = open_images(str(source))
    parts = [
        (torch.as_tensor(images), torch.as_tensor(labels))
        for _, images, labels in opened.batches(1000, rows)
    ]
    images = torch.cat([images for images, _ in parts])
    labels = torch.cat([labels for _, labels in parts]).long()
    return LabelledImages(images, labels), tuple(opened.class_names)


def _span(rows: range) -> str:
    return f"{rows[0]}..{rows[-1]}"


def _title(measure: str) -> str:
    return MEASURES.get(measure, measure.replace("_", " "))


def _cell(values: dict[str, float | None], measure: str, sign: str = "") -> str:
    mean, sd = values["mean"], values["sd"]
    if mean is None:
        return "∞"
    scale, digits = (100.0, 2) if measure in PERCENT else (1.0, 3)
    text = f"{scale * mean:{sign}.{digits}f}"
    return text if sd is None else f"{text} ± {scale * sd:.{digits}f}"


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *("---:" for _ in head[1:])]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *body)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--runs", type=Path, required=True, help="networks and logits, kept")
    parser.add_argument("--part", choices=tuple(TEST), default="final")
    parser.add_argument("--losses", nargs="+", choices=tuple(LOSSES), default=tuple(LOSSES))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=1, help="networks trained at a time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/losses_on_cifar10.json"))
    given = parser.parse_args()
    out, made = given.out, main(given)
    write_json(out, made)
    write_text(out.with_suffix(".md"), markdown(made))
    print(json.dumps({"out": str(out), "part": made["part"], "losses": list(made["summary"])}))
