"""How far each query went from its original, by kind of removal: tables and comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from diffcal.attribution.counterfactual import (
    Effect,
    PairedEffect,
    embedding_cosine,
    paired_effect,
    pixel_distance,
    removal_effect,
)
from diffcal.config import config_to_dict
from diffcal.core.devices import one_thread
from diffcal.core.runs import write_json, write_text
from diffcal.data.sources import ImageSource
from diffcal.diffusion.denoisers import Denoiser
from diffcal.mixing.encoding import build_encoder
from diffcal.workflows.das_counterfactual_config import CounterfactualConfig
from diffcal.workflows.das_redraw import Redrawable
from diffcal.workflows.das_score_tables import write_table

__all__ = ["MEASURES", "RANDOM", "Distances", "Kind", "few_queries", "measure", "write_results"]

BATCH = 512
RANDOM = "random"
FEW = 10
"""Below so many queries a bootstrap over queries is too narrow to be believed."""
MEASURES = ("pixel_l2", "cosine")


@dataclass(frozen=True)
class Kind:
    """One kind of removal and its models."""

    name: str
    models: tuple[str, ...]
    own: bool = False
    """Model i lacks what query i owes itself to; otherwise every model serves all queries."""


@dataclass(frozen=True)
class Distances:
    """Between the original of every query and what every model of a kind draws: ``[q, m]``."""

    pixel_l2: Float64[Tensor, "q m"]
    cosine: Float64[Tensor, "q m"]

    def own(self, measure: str) -> Float64[Tensor, "q 1"]:
        """Query i with model i."""
        return getattr(self, measure).diagonal()[:, None]

    def others(self, measure: str) -> Float64[Tensor, "q _"]:
        """Query i with the models of the other queries."""
        table: Tensor = getattr(self, measure)
        count = len(table)
        apart = ~torch.eye(count, dtype=torch.bool)
        return table[apart].reshape(count, count - 1)


def measure(
    config: CounterfactualConfig,
    original: Tensor,
    images: Mapping[str, Tensor],
    kinds: Sequence[Kind],
    denoiser: Denoiser,
    source: ImageSource,
    rows: range,
    device: str,
) -> dict[str, Distances]:
    """Distances by kind.

    Args:
        original: The queries as the attributed model draws them, uint8 ``[q, h, w, c]``.
        images: The same by every model.
        denoiser: The attributed model, whose own layers may be the encoder.
        source, rows: Training images, for the centre of embeddings.

    Raises:
        ConfigError: an encoder that cannot be built.
    """
    encoder = build_encoder(
        config.encoder, denoiser=denoiser, image_shape=source.image_shape, device=device
    )
    with one_thread():
        centre = None
        if config.centre:
            total = torch.zeros(encoder.dim, dtype=torch.float64)
            for _, part, _ in source.batches(BATCH, rows):
                total += encoder.encode(torch.as_tensor(part)).double().cpu().sum(dim=0)
            centre = total / len(rows)
        embedded = {
            name: encoder.encode(part).double().cpu()
            for name, part in {**images, "": original}.items()
        }
        return {
            kind.name: Distances(
                torch.stack([pixel_distance(original, images[name]) for name in kind.models], 1),
                torch.stack(
                    [
                        embedding_cosine(embedded[""], embedded[name], centre)
                        for name in kind.models
                    ],
                    1,
                ),
            )
            for kind in kinds
        }


def write_results(
    config: CounterfactualConfig,
    out: Path,
    queries: Redrawable,
    kinds: Sequence[Kind],
    distances: Mapping[str, Distances],
    rows: range,
    removals: Mapping[str, Sequence[Sequence[int]]],
) -> dict[str, Any]:
    """Write ``effects.parquet``, ``counterfactual.json`` and ``.md``; returns what the JSON holds."""
    _write_effects(out / "effects.parquet", queries, kinds, distances)
    table = {
        kind.name: {
            name: distances[kind.name].own(name)
            if kind.own
            else getattr(distances[kind.name], name)
            for name in MEASURES
        }
        for kind in kinds
    }

    def both(compare: Any) -> dict[str, Any]:
        return {name: compare(name) for name in MEASURES}

    def against(kind: str, other: str) -> dict[str, Any]:
        return {"kind": kind, "other": other} | both(
            lambda name: _paired(
                paired_effect(
                    table[kind][name],
                    table[other][name],
                    n_resamples=config.resamples,
                    seed=config.seed,
                )
            )
        )

    methods = [kind for kind in kinds if kind.own]
    results: dict[str, Any] = {
        "config": config_to_dict(config),
        "queries": len(queries),
        "training_images": len(rows),
        "removed": config.remove,
        "kinds": [
            {"kind": kind.name, "models": len(kind.models)}
            | both(
                lambda name, kind=kind: _plain(
                    removal_effect(
                        table[kind.name][name], n_resamples=config.resamples, seed=config.seed
                    )
                )
            )
            for kind in kinds
        ],
        "against_random": [against(kind.name, RANDOM) for kind in kinds if kind.name != RANDOM],
        "between_methods": [
            against(first.name, second.name)
            for at, first in enumerate(methods)
            for second in methods[at + 1 :]
        ],
    }
    if len(queries) > 1:
        # Does a removal hit its own query more than those that nothing was removed for?
        results["own_against_other_queries"] = [
            {"kind": kind.name}
            | both(
                lambda name, kind=kind: _paired(
                    paired_effect(
                        distances[kind.name].own(name),
                        distances[kind.name].others(name),
                        n_resamples=config.resamples,
                        seed=config.seed,
                    )
                )
            )
            for kind in methods
        ]
    results["common_to_methods"] = [
        {"kind": first.name, "other": second.name, "share": _overlap(removals, first, second)}
        for at, first in enumerate(methods)
        for second in methods[at + 1 :]
    ]
    write_json(out / "counterfactual.json", results)
    write_text(out / "counterfactual.md", _markdown(results))
    return results


def _overlap(removals: Mapping[str, Sequence[Sequence[int]]], first: Kind, second: Kind) -> float:
    """Mean share of removed images that two methods have in common."""
    pairs = zip(removals[first.name], removals[second.name], strict=True)
    shares = [len({*a} & {*b}) / len(a) for a, b in pairs]
    return sum(shares) / len(shares)


def _write_effects(
    path: Path,
    queries: Redrawable,
    kinds: Sequence[Kind],
    distances: Mapping[str, Distances],
) -> None:
    columns: dict[str, list[Any]] = {
        name: [] for name in ("query", "caption", "kind", "model", "own", *MEASURES)
    }
    for kind in kinds:
        for at, model in enumerate(kind.models):
            columns["query"] += queries.ids
            columns["caption"] += queries.captions
            columns["kind"] += [kind.name] * len(queries)
            columns["model"] += [model] * len(queries)
            columns["own"] += [not kind.own or at == query for query in range(len(queries))]
            for name in MEASURES:
                columns[name] += getattr(distances[kind.name], name)[:, at].tolist()
    write_table(path, columns)


def _plain(effect: Effect) -> dict[str, Any]:
    return {
        "mean": effect.mean,
        "low": effect.spread.low,
        "high": effect.spread.high,
        "sd": effect.spread.sd,
        "per_query": effect.per_query.tolist(),
    }


def _paired(effect: PairedEffect) -> dict[str, Any]:
    return {
        "mean": effect.mean,
        "low": effect.spread.low,
        "high": effect.spread.high,
        "sd": effect.spread.sd,
        "larger": effect.larger,
    }


def few_queries(count: int) -> str:
    """A warning where intervals over queries say little; empty otherwise."""
    if count >= FEW:
        return ""
    return (
        f" With {count} queries the intervals are too narrow: read them as the spread of examples."
    )


def _markdown(results: dict[str, Any]) -> str:
    lines = [
        "# Counterfactual retraining",
        "",
        f"{results['removed']} of {results['training_images']} training images removed, "
        f"{results['queries']} generated queries drawn again from the same noise. Pixel L2: distance "
        "from the original, pixels in [-1, 1]. Cosine: of embeddings of the two. In brackets 95 % "
        "intervals over queries and models. Differences are paired by query; *wins* is the share of "
        "queries that changed more than with random removals." + few_queries(results["queries"]),
        "",
        "| removed | models | pixel L2 | cosine | L2 minus random | wins | cosine minus random |",
        "|---|---|---|---|---|---|---|",
    ]
    differences = {row["kind"]: row for row in results["against_random"]}
    for row in results["kinds"]:
        found = differences.get(row["kind"])
        cells = [
            row["kind"],
            str(row["models"]),
            _interval(row["pixel_l2"]),
            _interval(row["cosine"]),
            "–" if found is None else _interval(found["pixel_l2"]),
            "–" if found is None else f"{100 * found['pixel_l2']['larger']:.0f} %",
            "–" if found is None else _interval(found["cosine"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if results["between_methods"]:
        lines += ["", "| method | minus | pixel L2 | cosine |", "|---|---|---|---|"]
    for row in results["between_methods"]:
        cells = [row["kind"], row["other"], _interval(row["pixel_l2"]), _interval(row["cosine"])]
        lines.append(f"| {' | '.join(cells)} |")
    if results.get("own_against_other_queries"):
        lines += [
            "",
            "A removal's effect on its own query minus that on the other queries:",
            "",
            "| method | pixel L2 | cosine |",
            "|---|---|---|",
        ]
    for row in results.get("own_against_other_queries", ()):
        cells = [row["kind"], _interval(row["pixel_l2"]), _interval(row["cosine"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _interval(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
