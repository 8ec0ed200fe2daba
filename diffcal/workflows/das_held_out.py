"""Held-out images: what no copy looks like, and which queries go beyond it."""

from collections.abc import Sequence
from typing import Any

from diffcal.attribution.memorisation import (
    MemorisationReport,
    exceedance,
    flag_beyond,
    memorisation_thresholds,
)
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ConfigError
from diffcal.workflows import html
from diffcal.workflows.das_config import TrainingImages
from diffcal.workflows.das_images import ConditionedImages, open_queries
from diffcal.workflows.das_queries import REST, HeldOut

__all__ = ["copy_columns", "copy_facts", "copy_section", "open_held_out"]

KINDS = ("near_copy", "dominated", "memorised")
WORDS = {
    "near_copy": "likeness and isolation beyond held-out images",
    "dominated": "share of one training image beyond held-out images",
    "memorised": "share times likeness beyond held-out images",
}


def open_held_out(
    asked: HeldOut, training: ConditionedImages, data: TrainingImages, denoiser: Denoiser
) -> ConditionedImages:
    """The held-out images.

    Raises:
        ConfigError: they are training images, there are none left, or too few for the quantile.
    """
    name, first, rows = asked.name, asked.first_row, asked.rows
    columns = (asked.image_column, asked.label_column)
    if name == REST:
        name, columns = data.name, (data.image_column, data.label_column)
        inside, total = training.rows, len(training.source)
        if inside.start == 0 and inside.stop == total:
            raise ConfigError(
                f"the model was trained on all {total} images of '{name}', so none are held out: name "
                "others (--held-out NAME)"
            )
        if inside.stop < total:
            first += inside.stop
            end = total
        else:
            end = inside.start
        rows = end - first if rows is None else rows
    found = open_queries(
        name,
        denoiser,
        first_row=first,
        rows=rows,
        unconditional=asked.unconditional,
        image_column=columns[0],
        label_column=columns[1],
    )
    inside = training.rows
    if found.source.fingerprint == training.source.fingerprint and (
        max(found.rows.start, inside.start) < min(found.rows.stop, inside.stop)
    ):
        raise ConfigError(
            f"rows {found.rows.start} to {found.rows.stop} of '{name}' are training images "
            f"({inside.start} to {inside.stop}); held-out images must be others"
        )
    needed = -int(-(1 - 1e-9) // (1 - asked.quantile))
    if len(found) < needed:
        raise ConfigError(
            f"{len(found)} held-out images cannot tell the {asked.quantile} quantile: give at least "
            f"{needed} or lower held_out.quantile"
        )
    return found


def copy_columns(
    report: MemorisationReport, held_out: MemorisationReport, quantile: float
) -> dict[str, list[Any]]:
    """What each query is flagged for, and how likely a held-out image comes as far."""
    flags = flag_beyond(report, memorisation_thresholds(held_out, quantile))
    chances = {
        "likeness_chance": exceedance(report.nearest, held_out.nearest),
        "copy_chance": exceedance(report.copy_score, held_out.copy_score),
    }
    return {name: column.tolist() for name, column in (flags | chances).items()}


def copy_facts(
    report: MemorisationReport, held_out: MemorisationReport, quantile: float
) -> dict[str, Any]:
    """Thresholds, and how many queries are beyond them against what held-out images give."""
    limits = memorisation_thresholds(held_out, quantile)
    queries, reference = flag_beyond(report, limits), flag_beyond(held_out, limits)
    return {
        "held_out": len(held_out.nearest),
        "quantile": quantile,
        "thresholds": limits,
        "likeness": {
            "queries_median": float(report.nearest.median()),
            "held_out_median": float(held_out.nearest.median()),
        },
        "flagged": {name: int(queries[name].sum()) for name in KINDS},
        # What as many harmless images would give.
        "expected": {
            name: float(reference[name].double().mean()) * len(report.nearest) for name in KINDS
        },
    }


def copy_section(facts: dict[str, Any], queries: int) -> list[str | html.Html]:
    """Blocks of a page: how many queries are flagged, and how many are by chance."""
    rows: list[Sequence[Any]] = [
        [name.replace("_", " "), WORDS[name], facts["flagged"][name], facts["expected"][name]]
        for name in KINDS
    ]
    medians = facts["likeness"]
    return [
        f"{facts['held_out']} real images that the model was not trained on tell what is chance: the "
        f"thresholds are their {100 * facts['quantile']:g} % quantiles. The nearest training image of a "
        f"held-out image has a median likeness of {medians['held_out_median']:.2f}, that of a query "
        f"{medians['queries_median']:.2f}. Expected: how many of {queries} held-out images are beyond "
        "the same thresholds.",
        html.table(["flag", "meaning", "queries", "expected"], rows),
    ]
