"""λ-ladders: the images of one group in order, from one pure class to the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from diffcal.core.rng import item_generator
from diffcal.data.soft_labels import SoftLabelSet

__all__ = ["Ladder", "LadderStep", "select_ladders"]

TOP = 3
"""Entries of a soft label that are named."""
VISIBLE = 0.01
"""Smallest probability worth a name."""
MAX_SETS = 20_000
"""Class sets that are looked at, so that memory stays small."""


@dataclass(frozen=True)
class LadderStep:
    """One image of a ladder."""

    row: int
    """Row in the data set."""
    image: bytes
    """PNG file."""
    weights: tuple[float, ...]
    """Requested weight of each class of the ladder; for a pair the first is λ."""
    lambda_hat: float | None
    """Re-estimated weight of the first class; None where the annotator has none."""
    soft_label: tuple[float, ...]
    """Probability of every class of the data set."""
    top: tuple[tuple[str, float], ...]
    """Largest entries of the soft label by name, descending, at most three."""


@dataclass(frozen=True)
class Ladder:
    """A group of images that share their noise, by falling weight of the first class."""

    group: int
    classes: tuple[int, ...]
    names: tuple[str, ...]
    """Names of ``classes``."""
    steps: tuple[LadderStep, ...]

    @property
    def caption(self) -> str:
        """One sentence about it."""
        if len(self.names) == 2:
            return f"From {self.names[0]} to {self.names[1]} (group {self.group})."
        return f"Between {', '.join(self.names)} (group {self.group})."


def select_ladders(
    published: SoftLabelSet | Path | str, count: int = 6, seed: int = 0
) -> list[Ladder]:
    """Up to ``count`` ladders of different class sets, pairs before larger sets.

    Not a choice of the prettiest: of each class set the first group with the most images stands for
    it, and sets are visited in a random order that ``seed`` decides, those with classes not shown yet
    first. Groups of a single image are left out.

    Raises:
        DataError: no published data set there, or a damaged one.
    """
    if not isinstance(published, SoftLabelSet):
        published = SoftLabelSet(published)
    groups: dict[tuple[int, ...], tuple[int, list[int]]] = {}
    for group, classes, rows in _groups(published):
        best = groups.get(classes)
        if len(rows) < 2 or len(classes) < 2 or (best is None and len(groups) >= MAX_SETS):
            continue
        if best is None or len(rows) > len(best[1]):
            groups[classes] = (group, rows)
    return [
        _ladder(published, classes, *groups[classes])
        for classes in _varied(sorted(groups), count, seed)
    ]


def _groups(published: SoftLabelSet) -> Iterator[tuple[int, tuple[int, ...], list[int]]]:
    """Number, class set and rows of each group; a group's rows follow one another."""
    current: tuple[int, tuple[int, ...]] | None = None
    rows: list[int] = []
    for start, table in published.file_columns(["group", "classes"]):
        values = zip(table["group"].to_pylist(), table["classes"].to_pylist(), strict=True)
        for row, (group, classes) in enumerate(values, start):
            key = (group, tuple(classes))
            if key != current:
                if current is not None:
                    yield *current, rows
                current, rows = key, []
            rows.append(row)
    if current is not None:
        yield *current, rows


def _varied(sets: Sequence[tuple[int, ...]], count: int, seed: int) -> list[tuple[int, ...]]:
    order = torch.randperm(len(sets), generator=item_generator(seed, "ladders", 0)).tolist()
    waiting = sorted((sets[index] for index in order), key=len)
    chosen: list[tuple[int, ...]] = []
    shown: set[int] = set()
    while waiting and len(chosen) < count:
        smallest = [classes for classes in waiting if len(classes) == len(waiting[0])]
        best = min(smallest, key=lambda classes: len(shown.intersection(classes)))
        shown.update(best)
        chosen.append(best)
        waiting.remove(best)
    return chosen


def _ladder(
    published: SoftLabelSet, classes: tuple[int, ...], group: int, rows: Sequence[int]
) -> Ladder:
    steps = [_step(published, row) for row in rows]
    steps.sort(key=lambda step: step.weights, reverse=True)
    names = tuple(published.class_names[index] for index in classes)
    return Ladder(group, classes, names, tuple(steps))


def _step(published: SoftLabelSet, row: int) -> LadderStep:
    soft = published.soft_label(row).tolist()
    largest = sorted(range(len(soft)), key=lambda index: -soft[index])[:TOP]
    return LadderStep(
        row=row,
        image=published.image_bytes(row),
        weights=tuple(published.cell(row, "weights")),
        lambda_hat=published.cell(row, "lambda_hat") if published.has("lambda_hat") else None,
        soft_label=tuple(soft),
        top=tuple((published.class_names[i], soft[i]) for i in largest if soft[i] >= VISIBLE),
    )
