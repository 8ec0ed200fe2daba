"""EK-FAC influence beside diffcal's default, judged by the same subset models; see PROTOCOL.md.

    python benchmarks/lds_ekfac.py [--digits FOLDER] [--cifar2 FOLDER] [--timesteps 10 100]

``--digits`` is the ``--work`` folder of ``lds_digits.py`` and ``lds_digits_again.py``, ``--cifar2`` the
output folder of ``lds_cifar2.py --set-up fresh``; problems that are not given keep the records of an
earlier run. Whole gradients are rotated by the curvature of all training images, so that no sketch
stands between the method and its figure. Writes ``lds_ekfac.json`` and ``lds_ekfac.md`` beside this
file.
"""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lds_digits_again
import torch
from _environment import environment
from _lds_digits_features import read_rows
from _lds_digits_models import denoiser_of, digits, subset_masks_of_recipe
from _lds_digits_stages import TOYS, TRAINING, base_states, losses, queries_of
from _lds_methods import Judge, gap_table, markdown
from torch import Tensor

from diffcal.attribution import PRESETS, ScoreConfig
from diffcal.attribution.ekfac import CurvatureConfig, CurvedProjection
from diffcal.attribution.ekfac_fit import fit_ekfac
from diffcal.attribution.featurise import FeatureConfig, Featuriser
from diffcal.attribution.parameters import Layout, select_parameters
from diffcal.attribution.projection import IdentityProjection, ProjectionConfig
from diffcal.config import config_from_dict
from diffcal.core.runs import read_json, write_json, write_text
from diffcal.diffusion.denoisers import Denoiser

HERE = Path(__file__).parent
DAMPINGS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
OWN = float(CurvatureConfig().damping)
NOISES = ("independent", "shared")
TRACKS = ("validation", "generated")


def judge(
    found: Judge, denoiser: Denoiser, images: Mapping[str, Tensor], timesteps: list[int]
) -> dict[str, float]:
    """Add EK-FAC's records at each number of timesteps; processor seconds of each."""
    seconds = {}
    for count in timesteps:
        for noise in NOISES:
            name = f"EK-FAC, {noise} noise, T={count}"
            started = time.process_time()
            table = curved_scores(denoiser, images, count, noise)
            seconds[name] = round(time.process_time() - started, 1)
            for track in TRACKS:
                found.dampings(name, track, table[track], DAMPINGS, OWN, damping_rule="eigenvalues")
    return seconds


def curved_scores(
    denoiser: Denoiser, images: Mapping[str, Tensor], timesteps: int, noise: str
) -> dict[str, Tensor]:
    """Signed scores ``[dampings and the own one, queries, training images]``, float64."""
    config = FeatureConfig(
        functional="loss",
        combine="mean",
        timesteps=timesteps,
        noise=noise,  # type: ignore[arg-type]
        normalise=False,
        projection=ProjectionConfig(kind="identity"),
    )
    featuriser = Featuriser(denoiser, config, batch_rows=max(50, timesteps))
    training = images["training"]
    rows = {
        role: featuriser(
            these, range(len(these)), role="train" if role == "training" else "query"
        ).vectors
        for role, these in images.items()
    }
    at_once = max(1, 200 // timesteps)
    samples = [
        (part, range(start, start + len(part)), None)
        for start, part in zip(
            range(0, len(training), at_once), training.split(at_once), strict=True
        )
    ]
    curvature = fit_ekfac(
        denoiser, samples, featuriser.levels, CurvatureConfig(kind="ekfac", images=len(training))
    )
    layout = Layout.of(
        {n: tuple(p.shape) for n, p in select_parameters(denoiser.module, "all").items()}
    )
    tables: dict[str, list[Tensor]] = {track: [] for track in TRACKS}
    for damping in (*DAMPINGS, OWN):
        projector = CurvedProjection(IdentityProjection(layout.size), curvature, layout, damping)
        curved = {role: _projected(projector, layout, part) for role, part in rows.items()}
        for track in TRACKS:
            tables[track].append(curved[track].double() @ curved["training"].double().T)
    return {track: torch.stack(parts) for track, parts in tables.items()}


def _projected(projector: CurvedProjection, layout: Layout, rows: Tensor) -> Tensor:
    out = torch.zeros(len(rows), projector.dim)
    for block, (_, _, offset) in zip(layout.split(rows).values(), layout, strict=True):
        projector.accumulate(out, block.flatten(1), offset)
    return out


def of_digits(name: str, work: Path, timesteps: list[int]) -> dict[str, Any]:
    """The MLP by its own subset models, the convolutional network by those trained for it again."""
    toy = next(toy for toy in TOYS if toy.name == name)
    folder = work / name
    if name == "mlp":
        masks, table = subset_masks_of_recipe(toy.subsets), losses(toy, folder)
    else:
        masks = subset_masks_of_recipe(lds_digits_again.SUBSETS, draw=lds_digits_again.DRAW)
        whole = lds_digits_again.read_losses(work).mean(dim=1)
        table = dict(zip(TRACKS, whole.split(whole.shape[1] // 2, dim=1), strict=True))
    found = Judge(masks, table)
    for t in timesteps:
        rows = read_rows(work, toy, f"outputs, T={t}")
        found.kernel(
            f"das, T={t}",
            rows["training"],
            {track: rows[track] for track in TRACKS},
            settings=config_from_dict(ScoreConfig, PRESETS["das"]["scores"]),
        )
    images = {"training": digits(0, TRAINING), **queries_of(folder)}
    denoiser = denoiser_of(toy.make, base_states(toy, folder)[-1])
    return _result(found, judge(found, denoiser, images, timesteps), timesteps)


def of_cifar2(out: Path, timesteps: list[int]) -> dict[str, Any]:
    """The fourth run on CIFAR-2."""
    from _lds_cifar2_features import clean_images, read_features
    from _lds_cifar2_judge import OUTPUTS, RHOS, own_scores, subset_losses
    from lds_cifar2 import SET_UPS, experiment

    from diffcal.diffusion.checkpoints import load_denoiser

    config = experiment(out, SET_UPS["fresh"])
    masks, table = subset_losses(config, out)
    found = Judge(masks, table)
    for t in timesteps:
        rows = {
            role: read_features(out, "outputs-stacked", role, str(t))["vectors"]
            for role in ("training", *TRACKS)
        }
        found.kernel(
            f"das, T={t}",
            rows["training"],
            {track: rows[track] for track in TRACKS},
            settings=own_scores(OUTPUTS, rows["training"]),
            dampings=list(RHOS),
        )
    denoiser = load_denoiser(out / "models" / "base" / "checkpoint", device="cpu")
    images = clean_images(config, out, denoiser)
    return _result(found, judge(found, denoiser, images, timesteps), timesteps)


def _result(found: Judge, seconds: dict[str, float], timesteps: list[int]) -> dict[str, Any]:
    gaps = [
        found.gap((f"das, T={t}", "square"), (f"EK-FAC, {noise} noise, T={t}", readout), track)
        for track in TRACKS
        for t in timesteps
        for noise in NOISES
        for readout in ("signed", "square", "signed_square")
    ]
    return {"cpu_seconds": seconds, "gaps": gaps, "records": found.records}


TITLES = {
    "mlp": "Digits, MLP",
    "conv": "Digits, convolutional, new subset models",
    "cifar2": "CIFAR-2, fourth run",
}


def tables(result: dict[str, Any]) -> str:
    """The result file as Markdown."""
    parts = [
        "# EK-FAC influence",
        "Made by `python benchmarks/lds_ekfac.py`; protocol and reading in `PROTOCOL.md`. LDS in "
        "percent; in brackets 95 % intervals over subsets and queries.",
    ]
    for name, title in TITLES.items():
        if name not in result["problems"]:
            continue
        found = result["problems"][name]
        spent = "; ".join(f"{k} {v:.0f}" for k, v in found["cpu_seconds"].items())
        parts += [
            f"## {title}",
            "Dampings chosen on other subsets:",
            markdown(found["records"], TRACKS),
            f"Own dampings (`das`: rest {PRESETS['das']['scores']['damping']:g}; EK-FAC: {OWN:g} of the "
            "mean eigenvalue):",
            markdown(found["records"], TRACKS, by="default"),
            gap_table(found["gaps"]),
            f"Processor seconds with the curvature of all training images, seven dampings: {spent}.",
        ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    before = read_json(arguments.out)["problems"] if arguments.out.exists() else {}
    problems = dict(before)
    jobs = []
    if arguments.digits:
        jobs += [(name, of_digits, (name, arguments.digits)) for name in ("mlp", "conv")]
    if arguments.cifar2:
        jobs.append(("cifar2", of_cifar2, (arguments.cifar2,)))
    for name, make, where in jobs:
        if arguments.only and name not in arguments.only:
            continue
        problems[name] = make(*where, arguments.timesteps)
        result = {**environment("cpu", ("scikit-learn",)), "problems": problems}
        write_json(arguments.out, result)
        write_text(arguments.out.with_suffix(".md"), tables(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--digits", type=Path)
    parser.add_argument("--cifar2", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(TITLES))
    parser.add_argument("--timesteps", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--out", type=Path, default=HERE / "lds_ekfac.json")
    main(parser.parse_args())
