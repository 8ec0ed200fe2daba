"""Near copies among generated images, held-out real ones and noisy training images."""

import itertools
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from _generation_images import Bench
from _generation_measures import wilson
from torch import Tensor

from diffcal.attribution.baselines import cosine_blocks
from diffcal.attribution.memorisation import (
    MemorisationReport,
    flag_beyond,
    memorisation_report,
    memorisation_thresholds,
)
from diffcal.attribution.rows import BLOCK_ROWS
from diffcal.core.rng import item_normal
from diffcal.data.images import encode_png
from diffcal.models.encoders import PixelEncoder
from diffcal.workflows import das
from diffcal.workflows.das_queries import QueryConfig
from diffcal.workflows.das_score import ScoreRunConfig, score_queries

QUANTILE = 0.99
CONTROLS = {"noisy_training_images": 0.1, "training_images_themselves": 0.0}
"""Copies that should be found, with the deviation of their normal noise (pixels in [-1, 1])."""
CONTROL_IMAGES = 200
ATTRIBUTED = (("fast", 1.0), ("edm-18", 1.0))
ATTRIBUTED_IMAGES = 200
"""Of each of these settings: gradients cost far more than drawing."""
LIKENESS = ("alike", "near_copy")
KINDS = (*LIKENESS, "dominated", "memorised")
"""Of the memorisation report, and ``alike``: likeness alone, without isolation."""


class CentredPixels:
    """Training images as pixels less their mean image, and mirrored after that if wanted."""

    def __init__(self, images: Tensor, mirrored: bool) -> None:
        self.images, self.mirrored = images, mirrored
        height, width, channels = images.shape[1:]
        self.encoder = PixelEncoder((height, width, channels))
        self.dim = self.encoder.dim
        total = torch.zeros(self.dim, dtype=torch.float64)
        for part in images.split(BLOCK_ROWS):
            total += self.encoder.encode(part).double().sum(0)
        self.centre = (total / len(images)).float()

    def __len__(self) -> int:
        return len(self.images) * (2 if self.mirrored else 1)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[Tensor]:
        """All rows in order."""
        for images in (self.images, self.images.flip(2))[: 2 if self.mirrored else 1]:
            for part in images.split(size):
                yield self.of(part)

    def of(self, images: Tensor) -> Tensor:
        """Centred pixels of any images."""
        return self.encoder.encode(images) - self.centre

    def likeness(self, images: Tensor) -> MemorisationReport:
        """Likeness of ``images`` to all rows; what the report says of attribution is not used."""
        blocks = cosine_blocks(self.of(images), self)
        return memorisation_report(*itertools.tee(blocks))


def near_copies(bench: Bench) -> dict[str, Any]:
    """Share of near copies of every setting, of held-out images and of the positive control."""
    train = CentredPixels(bench.train[0], bench.mirrored)
    few, held_count = bench.set_up.compared
    held = train.likeness(bench.held_out[0][:held_count])
    results: dict[str, Any] = {
        "training_images": len(bench.train[0]),
        "mirrored": bench.mirrored,
        "quantile": QUANTILE,
        "held_out": _control(held, LIKENESS),
        **{
            name: _judge(train.likeness(_copies(bench, noise)[0]), held, LIKENESS)
            for name, noise in CONTROLS.items()
        },
        "settings": [],
    }
    for preset, scale in bench.set_up.settings:
        parts = [bench.pure(preset, scale, part).images for part in range(bench.set_up.parts)]
        report = train.likeness(torch.cat(parts)[:few])
        results["settings"].append(
            {"preset": preset, "scale": scale, **_judge(report, held, LIKENESS)}
        )
    if bench.set_up.thorough:
        results["attribution"] = _attributed(bench)
    return results


def _control_rows(bench: Bench) -> Tensor:
    images = len(bench.train[0])
    return torch.linspace(0, images - 1, min(CONTROL_IMAGES, images)).long()


def _copies(bench: Bench, deviation: float) -> tuple[Tensor, Tensor]:
    """Training images, evenly spaced, with noise, and their labels."""
    images, labels = bench.train
    rows = _control_rows(bench)
    chosen = images[rows].float() / 127.5 - 1
    shape = tuple(chosen.shape[1:])
    noise = torch.stack([item_normal(0, "copies", i, shape) for i in range(len(rows))])
    pixels = ((chosen + deviation * noise).clip(-1, 1) * 127.5 + 127.5).round().byte()
    return pixels, labels[rows]


def _halves(held: MemorisationReport) -> tuple[MemorisationReport, MemorisationReport]:
    rows = torch.arange(len(held.nearest))
    return _part(held, rows % 2 == 0), _part(held, rows % 2 == 1)


def _part(report: MemorisationReport, rows: Tensor) -> MemorisationReport:
    return MemorisationReport(**{f.name: getattr(report, f.name)[rows] for f in fields(report)})


def _judge(
    report: MemorisationReport, held: MemorisationReport, kinds: tuple[str, ...]
) -> dict[str, Any]:
    """Flagged shares beyond the thresholds of one half of the held-out images, mean of both halves."""
    count = len(report.nearest)
    flags = [_flags(report, half) for half in _halves(held)]
    return {
        "images": count,
        "median_likeness": float(report.nearest.median()),
        **{
            kind: wilson(sum(float(flag[kind].sum()) for flag in flags) / 2, count)
            for kind in kinds
        },
    }


def _control(held: MemorisationReport, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The same for held-out images: one half judged by the thresholds of the other."""
    one, two = _halves(held)
    count = len(held.nearest)
    flags = [_flags(a, b) for a, b in ((one, two), (two, one))]
    return {
        "images": count,
        "median_likeness": float(held.nearest.median()),
        **{kind: wilson(sum(int(flag[kind].sum()) for flag in flags), count) for kind in kinds},
    }


def _flags(report: MemorisationReport, reference: MemorisationReport) -> dict[str, Tensor]:
    limits = memorisation_thresholds(reference, QUANTILE)
    return {"alike": report.nearest > limits["nearest"], **flag_beyond(report, limits)}


def _attributed(bench: Bench) -> dict[str, Any]:
    """Attribution beside likeness, by the workflow itself: index, then scores of each set."""
    folder = bench.folder / "das"
    source, rows = bench.set_up.train
    overrides = (
        f'model.source="{bench.set_up.checkpoint}"',
        f'model.dtype="{bench.set_up.dtype}"',
        f'data.name="{source}"',
        f"data.first_row={rows.start}",
        f"data.rows={len(rows)}",
    )
    place = bench.device.type
    das.index(das.das_config("digits", overrides), folder, denoiser=bench.denoiser, device=place)
    name, held_rows = bench.set_up.held_out
    asked = QueryConfig(name=name, first_row=held_rows.start, rows=len(held_rows))
    held = _scored(bench, folder, asked, "held-out")
    made: dict[str, Any] = {"held_out": _control(held, KINDS) | _share(held), "settings": []}
    for preset, scale in ATTRIBUTED:
        drawn = [bench.pure(preset, scale, part) for part in range(bench.set_up.parts)]
        images = torch.cat([part.images for part in drawn])[:ATTRIBUTED_IMAGES]
        labels = torch.cat([part.tensors["labels"] for part in drawn])[:ATTRIBUTED_IMAGES]
        path = bench.folder / f"queries-{preset}-{scale:g}.parquet"
        report = _scored(bench, folder, _queries(images, labels, path), path.stem)
        judged = _judge(report, held, KINDS) | _share(report)
        made["settings"].append({"preset": preset, "scale": scale, **judged})
    for name, noise in CONTROLS.items():
        asked = _queries(*_copies(bench, noise), bench.folder / f"queries-{name}.parquet")
        report = _scored(bench, folder, asked, name)
        originals = _control_rows(bench) + rows.start
        named = {
            what: wilson(int((found == originals).sum()), len(found))
            for what, found in (
                ("top_is_original", report.top_index[:, 0]),
                ("copy_of_original", report.copy_index),
            )
        }
        made[name] = _judge(report, held, KINDS) | _share(report) | named
    return made


def _share(report: MemorisationReport) -> dict[str, float]:
    return {"median_largest_share": float(report.dominance.median())}


def _queries(images: Tensor, labels: Tensor, path: Path) -> QueryConfig:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pixels = images.numpy()
    cells = [{"bytes": encode_png(image), "path": f"{i:05d}.png"} for i, image in enumerate(pixels)]
    pq.write_table(pa.table({"image": cells, "label": labels.tolist()}), path)
    return QueryConfig(name=str(path))


def _scored(bench: Bench, index: Path, asked: QueryConfig, name: str) -> MemorisationReport:
    import pyarrow.parquet as pq

    out = index / f"scores-{name}"
    score_queries(
        index,
        ScoreRunConfig(queries=asked, top=1, nearest=1),
        out,
        denoiser=bench.denoiser,
        device=bench.device.type,
        overwrite=True,
    )
    table = pq.read_table(out / "queries.parquet")
    first = pq.read_table(out / "scores.parquet")

    def column(name: str) -> Tensor:
        return torch.tensor(table[name].to_pylist())

    return MemorisationReport(
        top_index=torch.tensor(first["training"].to_pylist())[:, None],
        top_share=column("dominance").double()[:, None],
        contributors=column("contributors").double(),
        nearest_index=column("nearest"),
        nearest=column("likeness").double(),
        isolation=column("isolation").double(),
        copy_score=column("copy_score").double(),
        copy_index=column("copy_of"),
    )
