"""The gallery of an experiment: every query as it was, and as models draw it that lack some images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffcal.data.images import encode_png
from diffcal.workflows import html
from diffcal.workflows.das_counterfactual_config import CounterfactualConfig
from diffcal.workflows.das_counterfactual_effects import RANDOM, Distances, Kind, few_queries
from diffcal.workflows.das_counterfactual_queries import Asked

__all__ = ["write_page"]

SHOWN = 24
"""Queries on the page."""
REMOVED = 10
"""Removed images shown for each."""
DRAWS = 3
"""Models of a kind shown for each query."""


def write_page(
    config: CounterfactualConfig,
    out: Path,
    asked: Asked,
    kinds: Sequence[Kind],
    distances: Mapping[str, Distances],
    images: Mapping[str, Tensor],
    removals: Mapping[str, Sequence[Sequence[int]]],
    results: dict[str, Any],
) -> None:
    """Write ``out/gallery.html``.

    Args:
        images: The queries by every model, and by the attributed one as ``original``.
        removals: Positions of the removed training images, by method and query, best first.
        results: Of :func:`~.das_counterfactual_effects.write_results`.
    """
    page = html.Page(
        "What would these images be without their training images?",
        f"{config.remove} of {len(asked.rows)} training images removed, the model trained again and the "
        "image drawn again from the same noise",
    )
    page.section("Means", *_means(results))
    shown = range(min(SHOWN, len(asked.queries)))
    blocks = [_query(asked, query, kinds, distances, images, removals) for query in shown]
    page.section("Queries", *blocks)
    page.write(out / "gallery.html")


def _means(results: dict[str, Any]) -> list[str | html.Html]:
    differences = {row["kind"]: row for row in results["against_random"]}
    rows: list[list[Any]] = []
    for row in results["kinds"]:
        found = differences.get(row["kind"])
        cells: list[Any] = [
            _words(row["kind"]),
            row["models"],
            _number(row["pixel_l2"]),
            _number(row["cosine"]),
        ]
        if found is None:
            cells += [None, None]
        else:
            wins = found["pixel_l2"]["larger"]
            cells += [_number(found["pixel_l2"]), html.Number(wins, f"{100 * wins:.0f} %")]
        rows.append(cells)
    header = ["removed", "models", "pixel L2", "cosine", "L2 minus random", "wins"]
    return [
        "Distance between the original and what the retrained model draws: L2 of pixels in [-1, 1], and "
        "the cosine of embeddings (1: no change). Small figures are 95 % intervals. Wins: share of "
        "queries that changed more than without as many random images. Removing anything changes the "
        "order in which the rest is learnt, so that random removals change images as well; other seeds "
        "show what chance alone does." + few_queries(results["queries"]),
        html.table(header, rows),
    ]


def _query(
    asked: Asked,
    query: int,
    kinds: Sequence[Kind],
    distances: Mapping[str, Distances],
    images: Mapping[str, Tensor],
    removals: Mapping[str, Sequence[Sequence[int]]],
) -> html.Html:
    pictures, words = [], []
    for kind in kinds:
        chosen = [query] if kind.own else range(min(DRAWS, len(kind.models)))
        for at in chosen:
            pictures.append(_png(images[kind.models[at]][query]))
            distance = float(distances[kind.name].pixel_l2[query, at])
            cosine = float(distances[kind.name].cosine[query, at])
            label = _words(kind.name) if kind.own else f"{kind.name} {at + 1}"
            words.append(f"{label} L2\u00a0{distance:.2f} cos\u00a0{cosine:.2f}")
    caption = asked.queries.captions[query]
    title = f"{asked.queries.ids[query]}" + (f" · {caption}" if caption else "")
    original = html.image_grid(
        [_png(images["original"][query])], [title], per_row=1, size=109, caption="Original"
    )
    grids = html.image_grid(
        pictures, words, per_row=10, size=68, caption="Drawn again from the same noise"
    )
    for method, per_query in removals.items():
        removed = [asked.rows[position] for position in per_query[query][:REMOVED]]
        training = [
            (encode_png(image), f"#{row} · {asked.source.class_names[label]}")
            for row, image, label in _training(asked, removed)
        ]
        grids += html.image_grid(
            [picture for picture, _ in training],
            [name for _, name in training],
            per_row=10,
            size=68,
            caption=f"First of the {len(per_query[query])} removed by {method}",
        )
    left = f'<div style="flex:0 0 109px">{original}</div>'
    right = f'<div style="flex:1;min-width:0">{grids}</div>'
    return html.Html(
        f'<div style="display:flex;gap:1.6rem;align-items:flex-start">{left}{right}</div>'
    )


def _training(asked: Asked, rows: list[int]) -> list[tuple[int, Any, int]]:
    return [
        (row, image, int(label))
        for numbers, pixels, labels in asked.source.batches(len(rows), rows)
        for row, image, label in zip(numbers.tolist(), pixels, labels, strict=True)
    ]


def _png(image: Tensor) -> bytes:
    return encode_png(image.numpy())


def _words(kind: str) -> str:
    return kind if kind in (RANDOM, "other seed", "retrained") else f"top of {kind}"


def _number(value: dict[str, float]) -> html.Number:
    return html.Number(
        value["mean"], f"{value['mean']:.3f}", f"{value['low']:.3f} to {value['high']:.3f}"
    )
