"""What ``generation_quality.py`` measures: real images, the independent classifier, and drawn images.

Drawn images are kept in ``--work``, in a folder named after the denoiser's weights, with the CPU
seconds that drawing them took; the same call reads them back.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from solvers import draw
from torch import Tensor

from diffcal.core.runs import read_json, write_atomic
from diffcal.data.sources import open_images
from diffcal.diffusion.denoisers import Denoiser
from diffcal.diffusion.sampler_config import SamplerConfig, evaluations
from diffcal.mixing.conditions import ConditionConfig, MixMode
from diffcal.mixing.generation import GenerationConfig, fixed_rows, generate_images
from diffcal.mixing.plan import MixPlan, PlanConfig
from diffcal.models.classifier import TrainedClassifier, load_classifier
from diffcal.workflows.generate import ModelConfig, open_model
from diffcal.workflows.train_classifier import classifier_config, train_classifier

MEMBERS = 8


@dataclass(frozen=True)
class SetUp:
    """Rows, sizes and settings of one data set."""

    checkpoint: str
    dtype: Any
    train: tuple[str, range]
    """Images that the denoiser was trained on."""
    fitted: range
    """Of these, some that the classifier was trained on too: annotators are fitted on them."""
    unseen: range
    """Of these, those that the classifier was not trained on."""
    held_out: tuple[str, range]
    parts: int
    images: int
    """Pure images in a part."""
    settings: tuple[tuple[str, float], ...]
    """(sampler preset, guidance scale) of the pure images."""
    groups: int
    compared: tuple[int, int]
    """Images of each setting, and held-out ones, that are compared with all training images."""
    accuracy: float
    """Of the classifier on held-out images, below which the experiment failed."""
    thorough: bool
    """Also measure with the denoiser's own features, and near copies by attribution."""


SCALES = (1.0, 1.5, 2.0, 4.0)
SET_UPS = {
    "digits": SetUp(
        checkpoint="checkpoints/digits",
        dtype="float32",
        train=("digits", range(1437)),
        fitted=range(1000),
        unseen=range(1000, 1437),
        held_out=("digits", range(1437, 1797)),
        parts=6,
        images=145,
        settings=tuple((preset, scale) for preset in ("fast", "edm-18") for scale in SCALES),
        groups=90,
        compared=(870, 360),
        accuracy=0.9,
        thorough=True,
    ),
    "cifar10": SetUp(
        checkpoint="checkpoints/cifar10",
        dtype="bfloat16",
        train=("train-*.parquet", range(50_000)),
        fitted=range(10_000),
        unseen=range(45_000, 50_000),
        held_out=("test-*.parquet", range(5_000, 10_000)),
        parts=3,
        images=120,
        settings=(*(("fast", scale) for scale in SCALES), ("edm-18", 1.0)),
        groups=45,
        compared=(120, 500),
        accuracy=0.7,
        thorough=False,
    ),
}


@dataclass(frozen=True)
class Ladder:
    """How images between two classes are drawn."""

    mode: MixMode = "label"
    interpolation: Any = "linear"
    weights: Any = "grid"
    grid_power: float = 1.0


LADDERS = {
    "label": Ladder(),
    "score": Ladder(mode="score"),
    "schedule": Ladder(mode="schedule"),
    # Linear interpolation of an EDM network's class vectors is what the mode label does.
    "embedding, slerp": Ladder(mode="embedding", interpolation="slerp"),
    "label, power 1.5": Ladder(grid_power=1.5),
    "label, bisected": Ladder(weights="bisect"),
}


@dataclass(frozen=True)
class Drawn:
    """Tensors of one set of images, and what drawing them cost."""

    tensors: dict[str, Tensor]
    cpu_seconds: float

    @property
    def images(self) -> Tensor:
        """uint8 ``[n, h, w, c]``."""
        return self.tensors["images"]

    @property
    def seconds_per_thousand(self) -> float:
        """CPU seconds for 1 000 images."""
        return 1000 * self.cpu_seconds / len(self.images)


class Bench:
    """The denoiser, the classifier and the images of one run."""

    def __init__(self, set_up: SetUp, work: Path, device: torch.device, classifier: str | None):
        self.set_up, self.work, self.device = set_up, work, device
        self.model = ModelConfig(source=set_up.checkpoint, dtype=set_up.dtype)
        self.denoiser: Denoiser = open_model(self.model, str(device))
        self.folder = work / f"{self.denoiser.fingerprint[:12]}-{set_up.dtype}"
        self.classifier = _classifier(set_up, work, classifier, device)

    @cached_property
    def train(self) -> tuple[Tensor, Tensor]:
        """Images and labels that the denoiser was trained on."""
        return labelled(*self.set_up.train)

    @cached_property
    def held_out(self) -> tuple[Tensor, Tensor]:
        """Images and labels that neither network has seen."""
        return labelled(*self.set_up.held_out)

    @property
    def mirrored(self) -> bool:
        """Whether the denoiser was also trained on mirror images, as its configuration says."""
        path = Path(self.set_up.checkpoint) / "config.json"
        training = read_json(path).get("training", {}) if path.exists() else {}
        return bool(training.get("config", {}).get("optimizer", {}).get("flip", False))

    def pure(self, preset: str, scale: float, part: int) -> Drawn:
        """Images of single classes: item i shows class i modulo their number."""
        count = self.set_up.images
        items = range(part * count, (part + 1) * count)
        config = SamplerConfig(preset=preset, guidance_scale=scale)

        def make() -> dict[str, Tensor]:
            rows = fixed_rows(self.denoiser.sample_shape)
            states = draw(self.denoiser, config, items, self.device, rows)
            labels = torch.tensor(list(items)) % self.denoiser.num_classes
            return {"images": self.denoiser.decode(states.float()).cpu(), "labels": labels}

        return kept(
            self.folder / f"pure-{preset}-{scale:g}-{part}.safetensors",
            {"preset": preset, "scale": scale, "items": [items.start, items.stop]},
            make,
        )

    def ladder(self, name: str) -> Drawn:
        """Groups of eight images from class to class; ``lambda`` ``[g, m]``, ``classes`` ``[g, 2]``."""
        ladder, groups = LADDERS[name], self.set_up.groups
        plan = MixPlan(
            PlanConfig(
                groups=groups,
                members=MEMBERS,
                weights=ladder.weights,
                grid_power=ladder.grid_power,
            ),
            self.denoiser.class_names,
        )
        config = GenerationConfig(
            condition=ConditionConfig(mode=ladder.mode, interpolation=ladder.interpolation),
            sampler=SamplerConfig(preset="fast"),
        )

        def make() -> dict[str, Tensor]:
            batches = list(generate_images(self.denoiser, plan, range(groups * MEMBERS), config))
            weights = torch.cat([batch.weights for batch in batches])
            return {
                "images": torch.cat([torch.from_numpy(batch.images) for batch in batches]),
                "lambda": weights[:, 0].reshape(groups, MEMBERS).contiguous(),
                "classes": torch.tensor([plan[group].classes for group in range(groups)]),
            }

        file = name.replace(",", "").replace(" ", "-")
        return kept(
            self.folder / f"ladder-{file}.safetensors",
            {"ladder": list(vars(ladder).values()), "groups": groups},
            make,
        )


def rows_per_image(preset: str, scale: float) -> int:
    """Rows of network calls for one image: a guided evaluation costs two."""
    return evaluations(SamplerConfig(preset=preset)) * (1 if scale == 1 else 2)


def labelled(source: str, rows: range) -> tuple[Tensor, Tensor]:
    """Images uint8 ``[n, h, w, c]`` and labels int64 ``[n]``."""
    parts = [
        (torch.as_tensor(images), torch.as_tensor(labels))
        for _, images, labels in open_images(source).batches(1000, rows)
    ]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]).long()


def kept(path: Path, settings: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> Drawn:
    """The tensors of ``path`` if it was made with these settings; otherwise made now and kept."""
    asked = json.dumps(settings)
    if path.exists():
        with safe_open(path, framework="pt") as file:
            notes = file.metadata()
            if notes["settings"] == asked:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return Drawn(tensors, float(notes["cpu_seconds"]))
    started = time.process_time()
    tensors = make()
    seconds = time.process_time() - started
    data = save(tensors, metadata={"settings": asked, "cpu_seconds": repr(seconds)})
    write_atomic(path, lambda file: file.write(data))
    return Drawn(tensors, seconds)


def _classifier(
    set_up: SetUp, work: Path, given: str | None, device: torch.device
) -> TrainedClassifier:
    """The one at ``given``, or one trained on the rows that annotators are fitted on."""
    if given is not None:
        return load_classifier(given, device=device)
    folder = work / "classifier"
    overrides = (
        f'data="{set_up.train[0]}"',
        f"first_row={set_up.fitted.start}",
        f"rows={len(set_up.fitted)}",
        'test="none"',
        "validation=0",
        "posthoc=[]",
        "report=false",
    )
    config = classifier_config("digits", overrides)
    train_classifier(config, folder, device=device.type)
    return load_classifier(folder, device=device)
