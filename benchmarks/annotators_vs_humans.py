"""Which annotator comes closest to people: soft labels of real CIFAR-10 images against CIFAR-10H.

    python benchmarks/annotators_vs_humans.py DATA [--classifier FOLDER] [--denoiser FOLDER]
        [--encoders NAME ...] [--work FOLDER] [--train-rows N] [--images N]
        [--error-images N] [--out JSON]

``DATA`` holds ``train-*.parquet`` and ``test-*.parquet`` of CIFAR-10 (images and labels as the datasets
library stores them) and ``cifar10h-counts-first5000.npy``: how many people chose each class for test
images 0..4999 (Peterson et al. 2019, arXiv:1908.07086; CC BY-NC-SA 4.0, for evaluation only).

Encoders (``--encoders``): penultimate features of ``--classifier`` (a folder of
``diffcal train-classifier``; if none is given a compact network is trained on rows 0..44999 for
``--epochs``), the layers of ``--denoiser`` with the settings of ``DENOISER_ENCODERS``, both together,
and, with ``--error-images N``, its denoising errors on N images of each part (slow).

Annotators are fitted on the first ``--train-rows`` training images and calibrated in two ways:

* ``hard``: on labels of training images 45000..49999, which the compact classifier has not seen. This
  is what a user without human labels can do, so it decides the default.
* ``human``: on people's label shares for one half of the test images; the other half is judged; then
  halves swap. The constant slope of the released form is chosen in this way from a grid too.

Every figure is judged on both halves (the same images for all) and averaged over them.

Annotators of pairs need to be told two classes of a real image, which mixing knows and a photograph does
not say. ``pairs: human`` takes the two classes that most people chose (ties, and second classes that
nobody chose, are settled by the encoder): an advantage that such labels have in use as well, because
there the mixed classes are known. ``pairs: encoder`` takes the two that the encoder's calibrated
posterior favours. The calibrated posterior is judged over all classes, and also, told the two classes of
``pairs: human``, within them: only the latter compares with the annotators of pairs. ``ratio`` has no
ratio to go by and says that the label is certain.

KL is infinite where a label excludes what a person chose, as labels over two classes must; ``kl_floor``
mixes every label with 1 % of the uniform distribution, alike for all annotators. ``se`` are standard
errors over images.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _environment import environment
from torch import Tensor

from diffcal.calibration.metrics.soft_label import (
    compare_soft_labels,
    kullback_leibler,
    squared_distance,
    total_variation,
)
from diffcal.data.sources import open_images
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.mixing.annotator_base import support_mask
from diffcal.mixing.annotators import Annotator, build_annotator
from diffcal.mixing.denoiser_features import DenoiserFeatures
from diffcal.mixing.diffusion_posterior import DenoisingErrors
from diffcal.models.classifier import load_classifier
from diffcal.models.encoders import FeatureEncoder, classifier_encoder

FLOOR = 0.01
UNSURE = 0.9
"""Images of which fewer people than this agree are reported apart."""
CLASSIFIER_ROWS = 45_000
SLOPES = tuple(float(s) for s in np.geomspace(1, 100, 25))
DENOISER_ENCODERS: dict[str, dict[str, Any]] = {
    "denoiser-default": {},
    "denoiser-3-levels": {"sigmas": (0.1, 0.3, 0.8), "pool": "mean_std"},
    "denoiser-grid2": {"pool": "grid2"},
    "denoiser-1-level": {"sigmas": (0.2,)},
}
ANNOTATORS: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("ratio", {}, ("hard",)),
    ("projection_sigmoid", {"slope": 4.0}, ("hard",)),
    ("projection_sigmoid", {"slope": 2.3}, ("hard",)),
    ("projection_sigmoid", {}, ("human",)),
    ("projection_slope", {"method": "isotropic"}, ("hard",)),
    ("projection_slope", {"method": "direction"}, ("hard",)),
    ("projection_slope", {"method": "logistic"}, ("hard", "human")),
    ("projection_isotonic", {}, ("hard", "human")),
    ("kclass_projection", {}, ("hard",)),
    ("kclass_projection", {"whiten": True}, ("hard",)),
    ("kclass_posterior", {"method": "lda"}, ("hard", "human")),
    ("kclass_posterior", {"method": "logistic"}, ("hard", "human")),
)

Part = tuple[Tensor, Tensor]


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    data, device = arguments.data, arguments.device
    counts = np.load(data / "cifar10h-counts-first5000.npy", allow_pickle=False)
    human = torch.from_numpy(counts[: arguments.images].astype(np.float64))
    human = human / human.sum(dim=1, keepdim=True)
    train, test = (str(data / f"{part}-*.parquet") for part in ("train", "test"))
    held_rows = range(CLASSIFIER_ROWS, min(CLASSIFIER_ROWS + arguments.held_rows, 50_000))

    def encode(encoder: FeatureEncoder, error_rows: int | None = None) -> tuple[Part, Part, Part]:
        few = error_rows or 10**9
        return (
            _features(encoder, train, range(min(arguments.train_rows, few)), arguments.batch_size),
            _features(encoder, train, held_rows[:few], arguments.batch_size),
            _features(encoder, test, range(min(len(human), few)), arguments.batch_size),
        )

    results: dict[str, Any] = {}
    parts: dict[str, tuple[Part, Part, Part]] = {}
    for name, make in _encoders(arguments, train).items():
        parts[name] = encode(make())
        results[name] = _judge_all(parts[name], human, ANNOTATORS)
    if {"classifier", "denoiser-default"} <= set(parts):
        both = tuple(
            (torch.cat([a[0], b[0]], dim=1), a[1])
            for a, b in zip(parts["classifier"], parts["denoiser-default"], strict=True)
        )
        results["classifier+denoiser"] = _judge_all(both, human, ANNOTATORS)  # type: ignore[arg-type]
    if arguments.error_images and "denoiser-default" in parts:
        encoder = DenoisingErrors(load_denoiser(str(arguments.denoiser), device=device))
        errors = encode(encoder, arguments.error_images)
        posterior = (("diffusion_posterior", {}, ("hard", "human")),)
        shown = human[: arguments.error_images]
        results["denoising_errors"] = _judge_all(errors, shown, posterior)
        few = [
            (f[: arguments.error_images], y[: arguments.error_images])
            for f, y in parts["denoiser-default"]
        ]
        same = ("kclass_posterior", {"method": "logistic"}, ("hard", "human"))
        results["denoiser-default, same images"] = _judge_all(tuple(few), shown, (same,))  # type: ignore[arg-type]
    return {
        **environment(device, ("scikit-learn", "scipy")),
        "settings": {
            key: value.name if isinstance(value, Path) else value
            for key, value in vars(arguments).items()
        },
        "images": len(human),
        "unsure_images": int((human.max(dim=1).values < UNSURE).sum()),
        "results": results,
    }


def _encoders(arguments: argparse.Namespace, train: str) -> dict[str, Callable[[], FeatureEncoder]]:
    device = arguments.device
    folder = arguments.classifier
    if folder is None and "classifier" in arguments.encoders:
        folder = _train_classifier(arguments, train)
    encoders: dict[str, Callable[[], FeatureEncoder]] = {}
    if folder is not None:
        encoders["classifier"] = lambda: classifier_encoder(load_classifier(folder, device=device))
    if arguments.denoiser:
        denoiser = load_denoiser(str(arguments.denoiser), device=device)
        for name, options in DENOISER_ENCODERS.items():
            encoders[name] = lambda options=options: DenoiserFeatures(denoiser, **options)
    return {name: make for name, make in encoders.items() if name in arguments.encoders}


def _train_classifier(arguments: argparse.Namespace, train: str) -> Path:
    from diffcal.calibration.training_config import ClassifierConfig
    from diffcal.workflows.train_classifier import TrainClassifierConfig, train_classifier

    config = TrainClassifierConfig(
        data=train,
        rows=CLASSIFIER_ROWS,
        validation=0,
        posthoc=(),
        classifier=ClassifierConfig(
            model=arguments.model, epochs=arguments.epochs, learning_rate=0.05
        ),
    )
    out = arguments.work / "classifier"
    train_classifier(config, out, device=arguments.device)
    return out


def _features(encoder: FeatureEncoder, source: str, rows: range, batch_size: int) -> Part:
    features, labels = [], []
    for _, images, targets in open_images(source).batches(batch_size, rows):
        features.append(encoder.encode(torch.from_numpy(images)))
        labels.append(torch.from_numpy(targets))
    return torch.cat(features), torch.cat(labels).long()


def _judge_all(
    parts: tuple[Part, Part, Part],
    human: Tensor,
    annotators: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...],
) -> list[dict[str, Any]]:
    train, held, (test, labels) = parts
    probe = build_annotator("kclass_posterior", method="lda").fit([train], [held], human.shape[1])
    blank = torch.zeros(len(test), 2, dtype=torch.int64)
    posterior = probe.annotate(test, blank, blank.float()).double()
    pairs = {
        # What people chose comes first; the posterior only orders what they chose equally often.
        "human": (human + 1e-6 * posterior).topk(2, dim=1).indices,
        "encoder": posterior.topk(2, dim=1).indices,
    }
    halves = torch.randperm(len(test), generator=torch.Generator().manual_seed(0)).chunk(2)
    rows = []
    for name, settings, calibrations in annotators:
        for calibration in calibrations:
            needs_pair = name.startswith("projection")
            choices = {"kclass_posterior": (None, "human")}.get(name, (None,))
            for choice in ("human", "encoder") if needs_pair else choices:
                predicted = torch.zeros_like(human)
                reports = []
                for judged, other in (halves, halves[::-1]):
                    annotator = build_annotator(name, **settings)
                    target = held if calibration == "hard" else (test[other], human[other])
                    if name == "projection_sigmoid" and calibration == "human":
                        annotator = _best_slope(train, target, pairs[choice or "human"][other])
                    else:
                        annotator.fit([train], [target], human.shape[1])
                    weights = torch.full((len(judged), 2), 0.5)
                    classes = pairs[choice or "human"][judged]
                    if name == "ratio":
                        classes = torch.stack([labels[judged], labels[judged]], dim=1)
                    found = annotator.annotate(test[judged], classes, weights).double()
                    if choice is not None:  # changes nothing for annotators of pairs
                        inside = torch.where(support_mask(classes, human.shape[1]), found, 0.0)
                        found = inside / inside.sum(dim=1, keepdim=True)
                    predicted[judged] = found
                    reports.append({**annotator.settings, **annotator.report})
                rows.append(
                    {
                        "annotator": name,
                        "settings": settings,
                        "calibration": calibration,
                        "pairs": choice,
                        "fit": reports,
                        **_judged(human, predicted),
                    }
                )
    return rows


def _best_slope(train: Part, target: Part, pairs: Tensor) -> Annotator:
    """The released form with the slope of least (floored) KL to people's shares."""
    features, shares = target
    weights = torch.full((len(features), 2), 0.5)
    best: tuple[float, Annotator] | None = None
    for slope in SLOPES:
        annotator = build_annotator("projection_sigmoid", slope=slope)
        annotator.fit([train], [target], shares.shape[1])
        found = _floored(annotator.annotate(features, pairs, weights).double())
        loss = float(kullback_leibler(shares, found).mean())
        if best is None or loss < best[0]:
            best = loss, annotator
    assert best is not None
    return best[1]


def _floored(labels: Tensor) -> Tensor:
    return (1 - FLOOR) * labels + FLOOR / labels.shape[1]


def _judged(human: Tensor, predicted: Tensor) -> dict[str, Any]:
    unsure = human.max(dim=1).values < UNSURE
    return {
        name: dict(_measures(human[rows], predicted[rows]))
        for name, rows in (("all", torch.ones_like(unsure)), ("unsure", unsure))
        if bool(rows.any())
    }


def _measures(human: Tensor, predicted: Tensor) -> Iterator[tuple[str, Any]]:
    for name, value in compare_soft_labels(human, predicted).items():
        yield name, round(value, 5) if math.isfinite(value) else None
    values = {
        "kl_floor": kullback_leibler(human, _floored(predicted)),
        "tv": total_variation(human, predicted),
        "l2": squared_distance(human, predicted),
    }
    yield "kl_floor", round(float(values["kl_floor"].mean()), 5)
    errors = {name: float(v.std() / len(v) ** 0.5) for name, v in values.items()}
    yield "se", {name: round(error, 5) for name, error in errors.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder with the CIFAR-10 files and human counts")
    parser.add_argument("--classifier", type=Path, help="folder of diffcal train-classifier")
    parser.add_argument("--denoiser", type=Path, help="checkpoint folder of a 32x32 denoiser")
    parser.add_argument(
        "--encoders",
        nargs="+",
        default=["classifier", "denoiser-default"],
        choices=["classifier", *DENOISER_ENCODERS],
    )
    parser.add_argument("--work", type=Path, default=Path("runs/annotators"))
    parser.add_argument("--model", default="cnn-small", help="compact network, if one is trained")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--train-rows", type=int, default=20_000)
    parser.add_argument("--held-rows", type=int, default=5000)
    parser.add_argument("--images", type=int, default=5000, help="test images 0..N-1")
    parser.add_argument("--error-images", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    return parser


if __name__ == "__main__":
    chosen = _parser().parse_args()
    text = json.dumps(main(chosen), indent=1)
    if chosen.out:
        chosen.out.write_text(text + "\n", "utf-8")
    else:
        print(text)
