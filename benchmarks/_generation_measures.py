"""Measures of ``generation_quality.py``: fidelity, Fréchet distances, ladders, and their intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _generation_images import LADDERS, MEMBERS, Bench, rows_per_image
from solvers import frechet, moments
from torch import Tensor

from diffcal.core.rng import item_generator
from diffcal.mixing.annotators import Annotator, build_annotator
from diffcal.mixing.denoiser_features import DenoiserFeatures
from diffcal.mixing.prototypes import class_statistics
from diffcal.mixing.quality import group_spearman, off_axis_residual, third_class_mass
from diffcal.models.encoders import FeatureEncoder, classifier_encoder

BETWEEN = (0.1, 0.9)
RESAMPLES = 2000
FLOOR_PARTS = 10
Z = 1.959964


def wilson(hits: float, count: int) -> list[float]:
    """[share, low, high]: 95 % score interval of a share of ``count`` images."""
    share, square = hits / count, Z * Z / count
    centre = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / count + square / (4 * count)) / (1 + square)
    return [share, max(centre - half, 0.0), min(centre + half, 1.0)]


def bootstrap(values: Tensor, seed: int = 0) -> list[float]:
    """[mean, low, high]: 95 % percentile interval over resampled entries, NaN left out."""
    values = values.double()[values.isfinite()]
    if not len(values):
        raise ValueError("there is nothing to average")
    generator = item_generator(seed, "bootstrap", len(values))
    rows = torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)
    means = values[rows].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [float(values.mean()), low, high]


def extent(values: Sequence[float]) -> list[float]:
    """[mean, smallest, largest]."""
    return [sum(values) / len(values), min(values), max(values)]


def real_images(bench: Bench) -> dict[str, Any]:
    """The classifier on held-out images, and Fréchet distances of real images to them."""
    images, labels = bench.held_out
    right = bench.classifier.logits(images).argmax(1) == labels
    count = bench.set_up.images
    unseen, unseen_labels = _unseen(bench)
    # Consecutive rows may be alike (digits: one writer after the other) and generated parts hold all
    # classes alike, so that a part of real images is a random one with all classes in turn.
    features = bench.classifier.features(unseen[_in_turn(unseen_labels)])
    target = moments(bench.classifier.features(images))
    starts = range(0, len(features) - count + 1, count)[:FLOOR_PARTS]
    floor = [frechet(moments(features[start : start + count]), target) for start in starts]
    return {
        "held_out": len(images),
        "accuracy": wilson(int(right.sum()), len(right)),
        "accuracy_by_class": _by_class(right, labels, bench.denoiser.num_classes),
        "frechet_floor": extent(floor),
        "floor_parts": len(floor),
        "feature_dim": features.shape[1],
    }


def pure_images(bench: Bench) -> list[dict[str, Any]]:
    """Fidelity, Fréchet distances and cost of every setting; differences to the first one."""
    target = moments(bench.classifier.features(bench.held_out[0]))
    rows: list[dict[str, Any]] = []
    first: tuple[Tensor, list[float]] | None = None
    for preset, scale in bench.set_up.settings:
        drawn = [bench.pure(preset, scale, part) for part in range(bench.set_up.parts)]
        images = torch.cat([part.images for part in drawn])
        labels = torch.cat([part.tensors["labels"] for part in drawn])
        right = bench.classifier.logits(images).argmax(1) == labels
        distances = [
            frechet(moments(bench.classifier.features(part.images)), target) for part in drawn
        ]
        row = {
            "preset": preset,
            "scale": scale,
            "rows_per_image": rows_per_image(preset, scale),
            "images": len(images),
            "fidelity": wilson(int(right.sum()), len(right)),
            "fidelity_by_class": _by_class(right, labels, bench.denoiser.num_classes),
            "frechet": extent(distances),
            "frechet_parts": distances,
            "cpu_seconds_per_1000": sum(d.seconds_per_thousand for d in drawn) / len(drawn),
        }
        if first is None:
            first = right.double(), distances
        else:
            changes = [b - a for a, b in zip(first[1], distances, strict=True)]
            row["fidelity_change"] = bootstrap(right.double() - first[0])
            row["frechet_change"] = extent(changes)
        rows.append(row)
    return rows


def _by_class(right: Tensor, labels: Tensor, classes: int) -> list[float]:
    return [float(right[labels == number].double().mean()) for number in range(classes)]


def _in_turn(labels: Tensor) -> Tensor:
    """Random order of rows in which the classes take turns as long as all have images left."""
    shuffled = torch.randperm(len(labels), generator=item_generator(0, "floor", len(labels)))
    turn = torch.zeros_like(labels)
    for number in labels.unique().tolist():
        these = labels[shuffled] == number
        turn[these] = torch.arange(int(these.sum()))
    return shuffled[turn.argsort(stable=True)]


def _unseen(bench: Bench) -> tuple[Tensor, Tensor]:
    return tuple(part[_inside(bench, bench.set_up.unseen)] for part in bench.train)  # type: ignore[return-value]


def _inside(bench: Bench, rows: range) -> slice:
    start = bench.set_up.train[1].start
    return slice(rows.start - start, rows.stop - start)


@dataclass(frozen=True)
class Reader:
    """Tells from an image how much of two classes it shows, as ``diffcal csm`` does."""

    encoder: FeatureEncoder
    annotator: Annotator
    prototypes: Tensor

    def read(self, images: Tensor, classes: Tensor, weights: Tensor) -> dict[str, Tensor]:
        """``projection`` and ``posterior`` (both λ̂ of the first class) and ``third`` ``[n]``."""
        features = encoded(self.encoder, images)
        labels = self.annotator.annotate(features, classes, weights).double()
        pair = labels.gather(1, classes)
        _, places = off_axis_residual(features, self.prototypes, classes)
        return {
            "projection": places[:, 0],
            "posterior": pair[:, 0] / pair.sum(1).clamp(min=1e-300),
            "third": third_class_mass(labels, classes),
        }


def readers(bench: Bench) -> dict[str, Reader]:
    """The annotator on the classifier's features and, if affordable, on the denoiser's own."""
    encoders: dict[str, FeatureEncoder] = {"classifier": classifier_encoder(bench.classifier)}
    if bench.set_up.thorough:
        encoders["denoiser"] = DenoiserFeatures(bench.denoiser)
    images, labels = (part[_inside(bench, bench.set_up.fitted)] for part in bench.train)
    unseen, unseen_labels = _unseen(bench)
    classes = bench.denoiser.num_classes
    made = {}
    for name, encoder in encoders.items():
        fitted = [(encoded(encoder, images), labels)]
        annotator = build_annotator("kclass_posterior")
        annotator.fit(fitted, [(encoded(encoder, unseen), unseen_labels)], classes)
        means = class_statistics(fitted, classes, covariance=False).means
        made[name] = Reader(encoder, annotator, means)
    return made


def encoded(encoder: FeatureEncoder, images: Tensor) -> Tensor:
    """Features of all images, a batch at a time."""
    return torch.cat([encoder.encode(part) for part in images.split(256)])


def ladders(bench: Bench, names: Sequence[str] = tuple(LADDERS)) -> dict[str, Any]:
    """Every kind of ladder, read by every reader; differences to the first kind, by group."""
    reading = readers(bench)
    made: dict[str, Any] = {}
    first: dict[str, Tensor] = {}
    for name in names:
        drawn = bench.ladder(name)
        by_group, curves = _read_ladders(drawn.tensors, reading)
        made[name] = {
            "images": len(drawn.images),
            "cpu_seconds_per_1000": drawn.seconds_per_thousand,
            "measures": {key: bootstrap(values) for key, values in by_group.items()},
            "without_order": {
                key: int((~values.isfinite()).sum()) for key, values in by_group.items()
            },
            "curves": curves,
        }
        if first:
            made[name]["changes"] = {
                key: bootstrap(values - first[key]) for key, values in by_group.items()
            }
        else:
            first = by_group
    return {
        "kinds": made,
        "annotators": {name: reader.annotator.report for name, reader in reading.items()},
    }


def _read_ladders(
    tensors: dict[str, Tensor], reading: dict[str, Reader]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    lambdas = tensors["lambda"].double()
    groups = len(lambdas)
    classes = tensors["classes"].repeat_interleave(MEMBERS, dim=0)
    flat = lambdas.flatten()
    weights = torch.stack([flat, 1 - flat], dim=1).float()
    number = torch.arange(groups).repeat_interleave(MEMBERS)
    inner = (lambdas > 0) & (lambdas < 1)
    measures = {"largest_step": largest_steps(tensors["images"].unflatten(0, (groups, MEMBERS)))}
    curves = {}
    for name, reader in reading.items():
        found = reader.read(tensors["images"], classes, weights)
        third = found["third"].reshape(groups, MEMBERS)
        measures[f"{name}/third"] = _mean_inside(third, inner)
        for kind in ("projection", "posterior"):
            estimate = found[kind]
            order = group_spearman(number, flat, estimate).reshape(groups, MEMBERS)[:, 0]
            places = estimate.reshape(groups, MEMBERS)
            between = (places >= BETWEEN[0]) & (places <= BETWEEN[1])
            measures[f"{name}/{kind}/between"] = _mean_inside(between.double(), inner)
            measures[f"{name}/{kind}/spearman"] = order
            measures[f"{name}/{kind}/ends_between"] = _mean_inside(between.double(), ~inner)
            measures[f"{name}/{kind}/passage"] = places[:, -1] - places[:, 0]
            curves[f"{name}/{kind}"] = curve(flat, estimate)
    return measures, curves


def _mean_inside(values: Tensor, inner: Tensor) -> Tensor:
    return torch.where(inner, values, 0.0).sum(1) / inner.sum(1)


def largest_steps(images: Tensor) -> Tensor:
    """Largest distance between neighbours over that between the ends ``[g]``; NaN if those are equal.

    Args:
        images: uint8 ``[g, m, h, w, c]``, in the order of λ.
    """
    x = images.double().flatten(2)
    steps = (x[:, 1:] - x[:, :-1]).norm(dim=2).amax(1)
    ends = (x[:, -1] - x[:, 0]).norm(dim=1)
    return torch.where(ends > 0, steps / ends, torch.nan)


def curve(requested: Tensor, estimate: Tensor) -> list[dict[str, float]]:
    """λ̂ in bins of the requested λ: both ends by themselves, tenths in between."""
    inside = (requested * 10).floor().clamp(0, 9) + 1
    place = torch.where(requested <= 0, 0, torch.where(requested >= 1, 11, inside))
    made = []
    for bin_ in place.unique().tolist():
        these = place == bin_
        low, middle, high = (
            estimate[these].quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        )
        made.append(
            {
                "lambda": float(requested[these].mean()),
                "images": int(these.sum()),
                "mean": float(estimate[these].mean()),
                "q10": low,
                "median": middle,
                "q90": high,
            }
        )
    return made
