"""Every method on the two toys, judged alike; the records and comparisons of ``lds_digits.py``."""

import math
from pathlib import Path
from typing import Any

from _lds_digits_features import SIZE, embeddings, has_features, read_errors, read_rows
from _lds_digits_models import subset_masks_of_recipe
from _lds_digits_stages import TRACKS, Toy, losses
from _lds_methods import READOUTS, Judge

from diffcal.attribution import (
    PRESETS,
    ScoreConfig,
    cosine_blocks,
    dot_blocks,
    fit_kernel,
    gas_blocks,
    gaussian_blocks,
    leverage_scores,
    stream_predictions,
    tracin_blocks,
)
from diffcal.config import config_from_dict

PLAIN = ("signed", "square")
BANDWIDTHS = (1.0, 2.0, 4.0)
T = (1, 2, 10, 100)
REFERENCE = "mean, shared, T=10"


def judge(toy: Toy, work: Path) -> tuple[Judge, dict[str, Any]]:
    """All records of one toy, and what else is said about its kernel."""
    pictures = embeddings(toy, work)
    masks = subset_masks_of_recipe(toy.subsets)
    pixels = pictures["pixel"]
    alike = {
        track: {
            "pixel cosine": stream_predictions(
                cosine_blocks(pixels[track], pixels["training"]), masks
            )
        }
        for track in TRACKS
    }
    judge = Judge(masks, losses(toy, work / toy.name), likeness=alike)
    absent: list[str] = []

    def kernel(
        name: str,
        features: str,
        kind: str = "exact",
        preset: str | None = None,
        readouts: tuple[str, ...] = READOUTS,
        controls: tuple[str, ...] = (),
        tracks: tuple[str, ...] = TRACKS,
        role: str | None = None,
        **scores: Any,
    ) -> None:
        if not has_features(work, toy, features):
            absent.append(name)
            return
        rows = read_rows(work, toy, features, kind)
        start = PRESETS[preset or "das-mean"]["scores"]
        scale = sketch_scale(preset) if kind == "exact" else 1.0
        judge.kernel(
            name,
            rows["training"] * scale,
            {track: rows[role or track] * scale for track in tracks},
            settings=config_from_dict(ScoreConfig, {**start, **scores}),
            errors=read_errors(work, toy, features),
            readouts=readouts,
            controls=controls,
            features=features,
            sketch=kind,
        )

    # The methods as they come, at equal T.
    for t in T:
        controls = PLAIN if t in (2, 10) else ()
        kernel(f"das, T={t}", f"outputs, T={t}", preset="das", controls=controls)
        kernel(
            f"das-mean, T={t}",
            f"mean, shared, T={t}",
            f"sjlt-{SIZE}",
            "das-mean",
            controls=controls,
        )
        kernel(f"das-official, T={t}", f"mean, slot, T={t}", preset="das-official")
        kernel(f"dtrak, T={t}", f"dtrak, T={t}", preset="dtrak")
        kernel(f"trak, T={t}", f"trak, T={t}", preset="trak")
    # Exact features: what noise and functional do.
    for noise in ("shared", "slot", "independent"):
        for t in T:
            kernel(f"mean, {noise}, T={t}", f"mean, {noise}, T={t}")
    for functional in ("loss", "mean-squared-l2-norm"):
        for noise, t in (("shared", 2), ("shared", 10), ("slot", 10), ("slot", 100)):
            kernel(f"{functional}, {noise}, T={t}", f"{functional}, {noise}, T={t}")
    for functional in ("l1-norm", "l2-norm"):
        kernel(f"{functional}, shared, T=10", f"{functional}, shared, T=10")
    # Variants of the default.
    kernel("leverage", REFERENCE, leverage=True, readouts=PLAIN)
    kernel("residual rms", REFERENCE, residual="rms", readouts=PLAIN)
    kernel("not normalised", "mean, not normalised, T=10", readouts=PLAIN)
    for size in (256, 1024, SIZE):
        kernel(f"SJLT {size}", REFERENCE, f"sjlt-{size}", readouts=PLAIN)
    kernel("last layer only", "last layer", readouts=PLAIN)
    if toy.name == "conv":
        kernel("middle block only", "middle block", readouts=PLAIN)
        kernel("up block only", "up block", readouts=PLAIN)
    _baselines(toy, work, judge, pictures, kernel)
    return judge, {
        "not_judged": absent,
        "leverage": _leverages(toy, work),
        "gaps": _gaps(judge, set(absent)),
    }


def sketch_scale(preset: str | None) -> float:
    """What a dense sketch of unit variance multiplies lengths by: sqrt(k).

    Published presets are given exact gradients of that scale, so that their absolute dampings mean what
    they mean there, without the error of the sketch.
    """
    projection = PRESETS[preset]["features"]["projection"] if preset else {}
    return math.sqrt(projection["dim"]) if projection.get("unit_variance") else 1.0


def _baselines(toy: Toy, work: Path, judge: Judge, pictures: dict[str, Any], kernel: Any) -> None:
    trak = "trak, T=10"
    kernel("relative influence", trak, preset="relative-influence", readouts=PLAIN)
    kernel("renormalised influence", trak, preset="renormalised-influence", readouts=PLAIN)
    kernel(
        "Journey-TRAK",
        trak,
        preset="journey-trak",
        readouts=PLAIN,
        tracks=("generated",),
        role="journey",
    )
    for name, rows in pictures.items():
        judge.rows(f"{name} dot", lambda track, r=rows: dot_blocks(r[track], r["training"]))
        judge.rows(f"{name} cosine", lambda track, r=rows: cosine_blocks(r[track], r["training"]))
    pixels = pictures["pixel"]
    for width in BANDWIDTHS:
        judge.rows(
            f"pixel Gaussian, width {width:g}",
            lambda track, w=width: gaussian_blocks(pixels[track], pixels["training"], w),
        )
    final = read_rows(work, toy, trak)
    judge.rows("gradient dot", lambda track: dot_blocks(final[track], final["training"]))
    judge.rows("gradient cosine", lambda track: cosine_blocks(final[track], final["training"]))
    stages = [*(read_rows(work, toy, f"trak, checkpoint {i}") for i in range(3)), final]
    for name, blocks in (("TracInCP", tracin_blocks), ("GAS", gas_blocks)):
        judge.rows(
            name, lambda track, b=blocks: b([(rows[track], rows["training"]) for rows in stages])
        )
    judge.retrained(folds=2 if toy.subsets >= 48 else 4)


def _leverages(toy: Toy, work: Path) -> dict[str, float]:
    """Of the kernel of ``das-mean`` at its damping."""
    rows = read_rows(work, toy, REFERENCE)["training"]
    fitted = fit_kernel(rows)
    settings = config_from_dict(ScoreConfig, PRESETS["das-mean"]["scores"])
    damping = settings.absolute_damping(fitted)
    values = leverage_scores(fitted, rows, [damping])[0]
    return {
        "rho": settings.damping,
        "mean": round(float(values.mean()), 4),
        "max": round(float(values.max()), 4),
        "effective_dimension": round(fitted.effective_dimension(damping), 2),
        "share_of_largest_eigenvalue": round(float(fitted.eigenvalues.max()) / fitted.trace, 4),
    }


def _gaps(judge: Judge, absent: set[str]) -> list[dict[str, Any]]:
    """The comparisons that the protocol names, each with its paired interval."""
    own = {"das-official": "square", "dtrak": "signed", "trak": "signed"}
    pairs = [
        *((("das", t, "square"), (name, t, readout)) for t in T for name, readout in own.items()),
        *((("das", 2, "square"), (name, 100, readout)) for name, readout in own.items()),
        *((("das", t, "square"), ("das-mean", t, "square")) for t in T),
        *((("das-mean", t, "square"), (n, t, readout)) for t in T for n, readout in own.items()),
        *((("mean, shared", 2, "square"), ("mean, slot", t, "square")) for t in (10, 100)),
        *((("mean, shared", t, "square"), ("mean, shared", t, "signed")) for t in (2, 10)),
    ]
    named = [((f"{a}, T={t}", x), (f"{b}, T={u}", y)) for (a, t, x), (b, u, y) in pairs]
    named += [
        (("leverage", "square"), (REFERENCE, "square")),
        (("das, T=10", "square"), ("pixel cosine", "signed")),
        (("das, T=10", "square"), ("loss, shared, T=10", "square")),
    ]
    return [
        judge.gap(first, second, track)
        for track in TRACKS
        for first, second in named
        if not {first[0], second[0]} & absent
    ]


__all__ = ["judge", "sketch_scale"]
