"""Semantic mixing against its controls: what of the gain is whose.

    python benchmarks/csm_controls.py digits --work FOLDER [--seeds N ...] [--out JSON]
    python benchmarks/csm_controls.py cifar10 --data DATA --encoder CLASSIFIER --work FOLDER ...
    python benchmarks/csm_controls.py cifar10-converged ...

``DATA`` holds ``train-*.parquet``, ``test-*.parquet`` and ``cifar10h-counts-first5000.npy`` (people's
counts, Peterson et al. 2019, arXiv:1908.07086); ``CLASSIFIER`` is the folder of a classifier whose
features annotate (``diffcal train-classifier``). Draws and annotates one mixed set from the bundled
denoiser, trains a network for each method and seed, and measures all of them before and after one
temperature. ``--work`` keeps images, networks and logits: stopped at any moment and started again, the
command goes on from there. Rows, recipe, methods and what would count as failure are in
``benchmarks/PROTOCOL.md``, written before the runs.
"""

import argparse
import itertools
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _csm_controls_tables import MEASURES, markdown
from _environment import environment
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffcal.calibration.losses.soft_target import smoothing_for_confidence
from diffcal.calibration.metrics.ood import ood_auroc, ood_scores
from diffcal.calibration.metrics.soft_label import kullback_leibler, squared_distance
from diffcal.calibration.metrics.summary import measure
from diffcal.calibration.posthoc.temperature import TemperatureScaling
from diffcal.calibration.training_config import (
    AugmentationConfig,
    ClassifierConfig,
    DataMethodConfig,
    LossConfig,
    MixedConfig,
)
from diffcal.calibration.training_data import LabelledImages, MixedImages, TrainingData
from diffcal.calibration.training_loop import fit_classifier
from diffcal.config import config_to_dict
from diffcal.core.rng import item_generator
from diffcal.core.runs import claim_folder, read_json, write_json, write_text
from diffcal.data.sources import open_images
from diffcal.mixing.annotators import load_annotator
from diffcal.mixing.encoding import build_encoder
from diffcal.models.classifier import load_classifier
from diffcal.workflows.csm import CsmConfig, csm_config, run_annotation, run_csm, run_publication
from diffcal.workflows.generate import open_model
from diffcal.workflows.train_classifier import MixedSource, read_mixed

FLOOR = 0.01
"""Of the uniform distribution, mixed into every prediction before its KL to people's labels."""


@dataclass(frozen=True)
class SetUp:
    """Rows, denoiser and recipe of one data set."""

    train: tuple[str, range]
    validation: tuple[str, range]
    test: tuple[str, range]
    human: tuple[str, range] | None
    mixing: tuple[str, ...]
    """Overrides of the mixing preset."""
    preset: str
    classifier: ClassifierConfig
    per_real: int
    seeds: tuple[int, ...]
    more_rows: int | None = None
    """Real images of a second annotator, which has seen more of them than the classifiers."""


SET_UPS = {
    "digits": SetUp(
        train=("digits", range(300)),
        validation=("digits", range(1150, 1437)),
        test=("digits", range(1437, 1797)),
        human=None,
        preset="digits",
        mixing=(
            "generate.plan.weights=grid",
            "generate.plan.grid_power=1.5",
            "generate.groups_per_shard=32",
            "annotation.real.rows=300",
        ),
        classifier=ClassifierConfig(
            model="cnn-small",
            epochs=40,
            batch_size=50,
            schedule="cosine",
            augmentation=AugmentationConfig(crop_padding=1, flip=False),
            precision="bf16",
            evaluate_every=40,
            save_every=40,
        ),
        per_real=2,
        seeds=tuple(range(6)),
        more_rows=1150,
    ),
    "cifar10": SetUp(
        train=("train-*.parquet", range(4_000)),
        validation=("train-*.parquet", range(45_000, 47_000)),
        test=("test-*.parquet", range(5_000, 10_000)),
        human=("test-*.parquet", range(5_000)),
        preset="cifar10",
        mixing=(
            "generate.plan.groups=180",
            "generate.plan.grid_power=1.5",
            "generate.generation.sampler.preset=fast",
            "generate.model.dtype=bfloat16",
            "annotation.real.rows=45000",
            "annotation.encoder.kind=classifier",
        ),
        classifier=ClassifierConfig(
            model="cnn-small",
            epochs=16,
            batch_size=50,
            schedule="cosine",
            reduction="sum",
            augmentation=AugmentationConfig(crop_padding=0, flip=True),
            precision="bf16",
            evaluate_every=16,
            save_every=4,
        ),
        per_real=1,
        seeds=(0, 1, 2),
    ),
}
SET_UPS["cifar10-converged"] = replace(
    SET_UPS["cifar10"],
    mixing=(
        *(part for part in SET_UPS["cifar10"].mixing if "plan.groups" not in part),
        "generate.plan.groups=360",
        "generate.generation.sampler.guidance_scale=2.0",
    ),
    classifier=replace(SET_UPS["cifar10"].classifier, epochs=40, evaluate_every=40, save_every=10),
)
"""The same with the better generator, guided, twice as many mixed images, 2.5 times the epochs."""


@dataclass(frozen=True)
class Method:
    """Which images and labels, which losses."""

    loss: LossConfig = field(default_factory=LossConfig)
    blending: DataMethodConfig = field(default_factory=DataMethodConfig)
    mixed: str | None = None
    """Name of a mixed set; None trains on real images alone."""
    mixed_loss: str = "squared_error"
    real_labels: str = "hard"
    """``encoder``: the annotator's soft labels of the real images."""
    smoothed: bool = False
    """Labels smoothed to the mean top target that the mixed training shows."""


METHODS = {
    "CE": Method(),
    "label smoothing, matched": Method(smoothed=True),
    "focal-3": Method(LossConfig(name="focal", params={"gamma": 3.0})),
    "Dual Focal": Method(LossConfig(name="dual_focal", params={"gamma": 5.0})),
    "BSCE-GRA": Method(LossConfig(name="bsce_gra", params={"norm": 2.0, "gamma": 2.0})),
    "Mixup": Method(blending=DataMethodConfig(name="mixup")),
    "RankMixup": Method(blending=DataMethodConfig(name="rank_mixup")),
    "encoder distillation": Method(real_labels="encoder"),
    "pure generated, CE": Method(mixed="pure", mixed_loss="cross_entropy"),
    "ratio labels, L2": Method(mixed="ratio"),
    "CSM as released": Method(mixed="released"),
    "CSM all-class, soft CE": Method(mixed="all_class", mixed_loss="cross_entropy"),
    "CSM all-class, L2": Method(mixed="all_class"),
    "CSM as released, better annotator": Method(mixed="released_more"),
    "CSM all-class, soft CE, better annotator": Method(
        mixed="all_class_more", mixed_loss="cross_entropy"
    ),
    "CSM all-class, L2, better annotator": Method(mixed="all_class_more"),
    "CSM all-class, soft CE, better annotator, bisected": Method(
        mixed="bisected_more", mixed_loss="cross_entropy"
    ),
    "CSM all-class, L2, better annotator, bisected": Method(mixed="bisected_more"),
}


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    before = environment("cpu")
    torch.set_num_threads(1)
    set_up = _placed(SET_UPS[arguments.set_up], arguments)
    work = Path(arguments.work)
    sets = _mixed_sets(set_up, work)
    methods = [name for name in arguments.methods if METHODS[name].mixed in (None, *sets)]
    data = _Images(set_up, arguments, sets)
    runs: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for seed, name in itertools.product(arguments.seeds or set_up.seeds, methods):
        runs[name][str(seed)] = _run(set_up, data, sets, name, seed, work / "networks")
    return {
        **before,
        "set_up": arguments.set_up,
        "rows": {
            part: [source[0].rsplit("/", 1)[-1], f"{source[1][0]}..{source[1][-1]}"]
            for part in ("train", "validation", "test", "human")
            if (source := getattr(set_up, part)) is not None
        },
        "mixing": [*SET_UPS[arguments.set_up].mixing],
        "mixed_images": {name: len(images) for name, images in sets.items()},
        "mean_top_target": {
            name: float(images.targets.max(1).values.mean()) for name, images in sets.items()
        },
        "smoothing": data.smoothing,
        "recipe": config_to_dict(set_up.classifier),
        "per_real": set_up.per_real,
        "runs": runs,
    }


def _placed(set_up: SetUp, arguments: argparse.Namespace) -> SetUp:
    """With the files of ``--data`` and ``--encoder``."""
    if arguments.set_up == "digits":
        return set_up
    if arguments.data is None or arguments.encoder is None:
        raise SystemExit(f"{arguments.set_up} needs --data and --encoder")

    def at(part: tuple[str, range]) -> tuple[str, range]:
        return f"{arguments.data}/{part[0]}", part[1]

    return replace(
        set_up,
        train=at(set_up.train),
        validation=at(set_up.validation),
        test=at(set_up.test),
        human=at(set_up.human) if set_up.human else None,
        mixing=(
            *set_up.mixing,
            f'annotation.real.name="{arguments.data}/{set_up.train[0]}"',
            # Images that neither the encoder nor the classifiers have seen.
            f'annotation.real.held_out_name="{arguments.data}/{set_up.train[0]}"',
            "annotation.real.held_out_first_row=47000",
            "annotation.real.held_out_rows=3000",
            f'annotation.encoder.source="{arguments.encoder}"',
        ),
    )


def _configs(set_up: SetUp) -> dict[str, CsmConfig]:
    """The mixed set with each annotator; the images are the same but for the bisected ones."""
    released = ("annotation.annotator=projection_sigmoid", "annotation.settings={slope=4.0}")
    configs = {
        "all_class": csm_config(set_up.preset, set_up.mixing),
        "released": csm_config(set_up.preset, (*set_up.mixing, *released)),
    }
    if set_up.more_rows is not None:
        more = (*set_up.mixing, f"annotation.real.rows={set_up.more_rows}")
        configs |= {
            "all_class_more": csm_config(set_up.preset, (*more, "annotation.name=more")),
            "released_more": csm_config(
                set_up.preset, (*more, *released, "annotation.name=released-more")
            ),
            # Other images: lambda where they change.
            "bisected_more": csm_config(set_up.preset, (*more, "generate.plan.weights=bisect")),
        }
    return configs


def _mixed_sets(set_up: SetUp, work: Path) -> dict[str, MixedImages]:
    """Mixed images with the labels of each method, made once."""
    names = tuple(open_images(set_up.train[0]).class_names)
    sets: dict[str, MixedImages] = {}
    for name, config in _configs(set_up).items():
        own_images = config.generate.plan.weights == "bisect"
        run = work / ("mixed-bisected" if own_images else "mixed")
        kept = work / f"mixed-{name}.safetensors"
        if not kept.exists():
            if name == "all_class" or own_images:
                run_csm(config, run, device="cpu")
            else:
                run_annotation(config, run, device="cpu")
                run_publication(config, run, overwrite=True)
            _save(read_mixed(MixedSource(folder=str(run / "dataset")), names), kept)
            if name == "all_class":
                for other, source in {
                    "ratio": MixedSource(folder=str(run / "dataset"), labels="weights"),
                    "pure": MixedSource(
                        folder=str(run / "dataset"), labels="one_hot", members="pure"
                    ),
                }.items():
                    _save(read_mixed(source, names), work / f"mixed-{other}.safetensors")
    for name in (*_configs(set_up), "ratio", "pure"):
        kept = load_file(work / f"mixed-{name}.safetensors")
        sets[name] = MixedImages(kept["images"], kept["targets"], kept["groups"], kept["support"])
    return sets


def _save(images: MixedImages, path: Path) -> None:
    assert images.support is not None
    tensors = {
        "images": images.images, "targets": images.targets,
        "groups": images.groups, "support": images.support,
    }  # fmt: skip
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


class _Images:
    """Real images with hard and soft labels, foreign images, people's labels."""

    def __init__(
        self, set_up: SetUp, arguments: argparse.Namespace, sets: dict[str, MixedImages]
    ) -> None:
        self.class_names = tuple(open_images(set_up.train[0]).class_names)
        self.train, self.validation, self.test = (
            _images(*part) for part in (set_up.train, set_up.validation, set_up.test)
        )
        self.human: tuple[LabelledImages, Tensor] | None = None
        if set_up.human is not None:
            counts = np.load(Path(arguments.data) / "cifar10h-counts-first5000.npy")
            shares = torch.from_numpy(counts / counts.sum(1, keepdims=True))
            self.human = _images(*set_up.human), shares
        size, channels = self.train.images.shape[1], self.train.images.shape[3]
        self.foreign = {"ood_patches": _patches(size, channels)}
        if set_up.human is not None:
            self.foreign["ood_digits"] = _enlarged_digits(size, channels)
        self.soft = _annotated(set_up, Path(arguments.work), self.train)
        # Mean top target of a step: one certain label for each real image, per_real mixed ones.
        top = float(sets["all_class"].targets.max(1).values.mean())
        mean = (1 + set_up.per_real * top) / (1 + set_up.per_real)
        self.smoothing = smoothing_for_confidence(mean, len(self.class_names))


def _annotated(set_up: SetUp, work: Path, train: LabelledImages) -> Tensor:
    """The all-class annotator's labels of the real training images."""
    kept = work / "soft-labels-of-real.safetensors"
    if not kept.exists():
        config = _configs(set_up)["all_class"]
        denoiser = open_model(config.generate.model, "cpu")
        encoder = build_encoder(config.annotation.encoder, denoiser=denoiser, device="cpu")
        annotations = work / "mixed" / "annotations" / config.annotation.folder
        annotator = load_annotator(annotations / "annotator")
        features = torch.cat([encoder.encode(part) for part in train.images.split(256)])
        blank = torch.zeros(len(features), 2, dtype=torch.int64)
        labels = annotator.annotate(features, blank, blank.float()).float()
        save_file({"labels": labels.contiguous()}, kept)
    return load_file(kept)["labels"]


def _images(source: str, rows: range) -> LabelledImages:
    parts = [
        (torch.as_tensor(images), torch.as_tensor(labels))
        for _, images, labels in open_images(source).batches(1000, rows)
    ]
    return LabelledImages(
        torch.cat([images for images, _ in parts]),
        torch.cat([labels for _, labels in parts]).long(),
    )


def _patches(size: int, channels: int, count: int = 2000) -> Tensor:
    """Random patches of scikit-learn's two photographs, at a third of their resolution."""
    from sklearn.datasets import load_sample_images

    generator = item_generator(0, "patches", 0)
    made = []
    for photograph in load_sample_images().images:
        x = torch.from_numpy(photograph.copy()).permute(2, 0, 1)[None].float()
        x = torch.nn.functional.interpolate(x, scale_factor=1 / 3, mode="area")[0]
        for _ in range(count // 2):
            top, left = (
                int(torch.randint(extent - size + 1, (), generator=generator))
                for extent in x.shape[1:]
            )
            made.append(x[:, top : top + size, left : left + size])
    patches = torch.stack(made)
    if channels == 1:
        patches = patches.mean(1, keepdim=True)
    return patches.round().byte().permute(0, 2, 3, 1)


def _enlarged_digits(size: int, channels: int) -> Tensor:
    digits = _images("digits", range(1797)).images.permute(0, 3, 1, 2).float()
    larger = torch.nn.functional.interpolate(digits, size=(size, size), mode="bilinear")
    return larger.round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, channels).contiguous()


def _run(
    set_up: SetUp,
    data: _Images,
    sets: dict[str, MixedImages],
    name: str,
    seed: int,
    networks: Path,
) -> dict[str, Any]:
    method = METHODS[name]
    loss = method.loss
    if method.smoothed:
        loss = LossConfig(name="cross_entropy", params={"smoothing": round(data.smoothing, 4)})
    config = replace(
        set_up.classifier,
        loss=loss,
        data_method=method.blending,
        mixed=MixedConfig(
            loss=LossConfig(name=method.mixed_loss),
            per_real=set_up.per_real,
            # The pure set has no members between the classes to pair an anchor with.
            policy="uniform" if method.mixed == "pure" else "paired",
        ),
    )
    folder = networks / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    claim_folder(folder, {"classifier": config_to_dict(config), "seed": seed, "method": name})
    figures = folder / "figures.json"
    if figures.exists():
        return read_json(figures)
    train = data.train
    if method.real_labels == "encoder":
        train = LabelledImages(train.images, data.soft)
    training = TrainingData(
        train,
        data.class_names,
        mixed=sets[method.mixed] if method.mixed else None,
        validation=data.validation,
    )
    if not (folder / "classifier" / "summary.json").exists():
        fit_classifier(training, config, folder / "classifier", seed=seed)
    made = _judged(load_classifier(folder / "classifier"), data)
    write_json(figures, made)
    return made


def _judged(classifier: Any, data: _Images) -> dict[str, Any]:
    validation = classifier.logits(data.validation.images).double()
    test = classifier.logits(data.test.images).double()
    foreign = {name: classifier.logits(x).double() for name, x in data.foreign.items()}
    # Where every validation image is right the likelihood only grows as T falls: no T is best.
    errors = int((validation.argmax(1) != data.validation.labels).sum())
    temperature = 1.0
    if errors:
        temperature = TemperatureScaling().fit(validation, data.validation.labels).temperature
    train = classifier.logits(data.train.images)
    made: dict[str, Any] = {
        "temperature": temperature,
        "validation_errors": errors,
        "train_accuracy": float((train.argmax(1) == data.train.labels).double().mean()),
    }
    for stage, t in (("before", 1.0), ("after", temperature)):
        found = {
            name: float(measure(name, logits=test / t, labels=data.test.labels))
            for name in MEASURES
        }
        found["confidence"] = float((test / t).softmax(1).max(1).values.mean())
        inside = ood_scores(logits=test / t)
        for name, logits in foreign.items():
            found[name] = ood_auroc(inside, ood_scores(logits=logits / t))
        if data.human is not None:
            images, shares = data.human
            p = (classifier.logits(images.images).double() / t).softmax(1)
            floored = (1 - FLOOR) * p + FLOOR / p.shape[1]
            found["human_kl"] = float(kullback_leibler(shares, floored).mean())
            found["human_l2"] = float(squared_distance(shares, p).mean())
        made[stage] = found
    return made


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("set_up", choices=tuple(SET_UPS))
    parser.add_argument("--data", help="folder of CIFAR-10's Parquet files and people's counts")
    parser.add_argument("--encoder", help="folder of the annotating classifier")
    parser.add_argument("--work", type=Path, required=True, help="images, networks, figures; kept")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=tuple(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or Path(f"benchmarks/csm_controls_{given.set_up.replace('-', '_')}.json")
    results = main(given)
    write_json(out, results)
    write_text(out.with_suffix(".md"), markdown(results))
    print(json.dumps({"out": str(out), "methods": list(results["runs"])}))
