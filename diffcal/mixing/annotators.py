"""Annotators by name, and their files."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffcal.core.rng import item_generator
from diffcal.core.runs import read_json, sha256_file, write_atomic, write_json
from diffcal.errors import ArtifactError, ConfigError, DataError
from diffcal.mixing.annotator_base import Annotator
from diffcal.mixing.diffusion_posterior import DiffusionPosterior
from diffcal.mixing.pair_annotators import (
    KClassProjection,
    ProjectionIsotonic,
    ProjectionSigmoid,
    ProjectionSlope,
    Ratio,
)
from diffcal.mixing.posterior import KClassPosterior
from diffcal.mixing.prototypes import FeatureBatches

__all__ = [
    "ANNOTATORS",
    "Annotator",
    "build_annotator",
    "hold_out",
    "load_annotator",
    "save_annotator",
]

FORMAT = "diffcal-annotator/1"

ANNOTATORS: Mapping[str, type[Annotator]] = MappingProxyType(
    {
        "ratio": Ratio,
        "projection_sigmoid": ProjectionSigmoid,
        "projection_slope": ProjectionSlope,
        "projection_isotonic": ProjectionIsotonic,
        "kclass_projection": KClassProjection,
        "kclass_posterior": KClassPosterior,
        "diffusion_posterior": DiffusionPosterior,
    }
)


def build_annotator(name: str, **settings: Any) -> Annotator:
    """Unfitted annotator ``name``.

    Raises:
        ConfigError: unknown name or setting (near matches are named), or a value out of range.
    """
    if name not in ANNOTATORS:
        close = difflib.get_close_matches(name, list(ANNOTATORS), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ConfigError(
            f"unknown annotator '{name}'; {hint or 'known: ' + ', '.join(ANNOTATORS)}"
        )
    cls = ANNOTATORS[name]
    known = [field.name for field in dataclasses.fields(cls)]
    for key in settings:
        if key not in known:
            raise ConfigError(
                f"annotator '{name}' has no setting '{key}'; it has "
                f"{', '.join(known) or 'no settings'}"
            )
    try:
        return cls(**settings)
    except TypeError as error:
        raise ConfigError(f"annotator '{name}': {error}") from error


def save_annotator(folder: Path, annotator: Annotator, info: Mapping[str, Any]) -> None:
    """Write ``annotator.safetensors`` and, after it, ``annotator.json`` with its hash.

    Args:
        folder: Made if needed.
        annotator: Fitted.
        info: JSON values that tell what it was fitted on.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    if not annotator.state:
        raise ConfigError(f"annotator '{annotator.name}' was not fitted, so it cannot be saved")
    data = save({key: value.contiguous() for key, value in annotator.state.items()})
    weights = folder / "annotator.safetensors"
    write_atomic(weights, lambda file: file.write(data))
    write_json(
        folder / "annotator.json",
        {
            "format": FORMAT,
            "name": annotator.name,
            "settings": annotator.settings,
            "report": annotator.report,
            "fitted": dict(info),
            "sha256": sha256_file(weights),
        },
    )


def load_annotator(folder: Path) -> Annotator:
    """The annotator saved in ``folder``.

    Raises:
        ArtifactError: none there, or it is damaged.
    """
    record = read_json(folder / "annotator.json")
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ArtifactError(f"'{folder / 'annotator.json'}' does not describe a {FORMAT}")
    weights = folder / "annotator.safetensors"
    if not weights.is_file() or sha256_file(weights) != record["sha256"]:
        raise ArtifactError(f"'{weights}' is missing or damaged; delete it to fit again")
    annotator = build_annotator(record["name"], **record["settings"])
    try:
        with safe_open(weights, framework="pt") as file:
            annotator.load({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"'{weights}' cannot be read: {error}") from error
    annotator.report = dict(record["report"])
    return annotator


class _Part:
    """The rows of batches that a mask chooses, to be iterated over any number of times."""

    def __init__(self, batches: FeatureBatches, held: Tensor, wanted: bool) -> None:
        self.batches, self.chosen = batches, held == wanted

    def __iter__(self) -> Iterator[tuple[Float[Tensor, "b d"], Tensor]]:
        start = 0
        for features, labels in self.batches:
            rows = self.chosen[start : start + len(labels)]
            start += len(labels)
            if bool(rows.any()):
                yield features[rows], labels[rows]


def hold_out(
    batches: FeatureBatches, count: int, share: float, seed: int = 0
) -> tuple[FeatureBatches, FeatureBatches]:
    """Two views of ``batches``: images to fit on, and a random ``share`` of them held out.

    Args:
        batches: Re-iterable; ``count`` images in all, always in the same order.
        count: See above.
        share: In (0, 1).
        seed: Decides which images are held out, together with ``count`` alone.

    Raises:
        ConfigError: share out of range.
        DataError: fewer than two images.
    """
    if not 0 < share < 1:
        raise ConfigError(f"held_out must be a share in (0, 1), got {share}")
    if count < 2:
        raise DataError(f"{count} real images are too few to hold some out")
    order = torch.randperm(count, generator=item_generator(seed, "annotator-hold-out", 0))
    held = torch.zeros(count, dtype=torch.bool)
    held[order[: min(max(round(share * count), 1), count - 1)]] = True
    return _Part(batches, held, False), _Part(batches, held, True)
