"""Features of the CIFAR-2 experiment: computed block by block, kept, and joined by timesteps."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffcal.attribution.featurise import FeatureConfig, Features, Featuriser
from diffcal.attribution.journey import path_features
from diffcal.attribution.projection import ProjectionConfig
from diffcal.core.rng import item_normal
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.denoisers import Denoiser
from diffcal.diffusion.samplers import sample
from diffcal.workflows.das_images import open_queries
from diffcal.workflows.das_lds_config import LdsConfig

KINDS = ("validation", "generated")
BLOCK = 50
DIM = 4096
ENCODER_SIGMA = 0.3
"""Noise level at which the denoiser's middle features are read."""

TENTHS = tuple(range(0, 1000, 100))
GROUPS = {
    "t0": (0,),
    "t500": (500,),
    "t10": tuple(t for t in TENTHS if t not in (0, 500)),
    "t20": tuple(t for t in range(0, 1000, 50) if t not in TENTHS),
    "t100": tuple(t for t in range(0, 1000, 10) if t % 50),
}
"""Disjoint timesteps: features are means, so that those of a grid are weighted means of them."""
GRIDS = {
    "1 (t=0)": ("t0",),
    "1 (t=500)": ("t500",),
    "2": ("t0", "t500"),
    "10": ("t0", "t500", "t10"),
    "20": ("t0", "t500", "t10", "t20"),
    "100": ("t0", "t500", "t10", "t20", "t100"),
}


@dataclass(frozen=True)
class FeatureSet:
    """What is featurised, besides model and images."""

    functional: str
    noise: str
    normalise: bool = False
    slot_batch: int = 16
    groups: tuple[str, ...] = ("t0", "t500", "t10")
    checkpoint: str = "checkpoint"
    combine: str = "mean"


SETS = {
    "mean-shared": FeatureSet("mean", "shared", True),
    "mean-slot": FeatureSet("mean", "slot", True, 16),
    "loss-shared": FeatureSet("loss", "shared"),
    "loss-slot": FeatureSet("loss", "slot", slot_batch=52),
    "square-shared": FeatureSet("mean-squared-l2-norm", "shared"),
    "square-slot": FeatureSet("mean-squared-l2-norm", "slot", slot_batch=52),
    "loss-slot-1": FeatureSet(
        "loss", "slot", slot_batch=52, groups=("t0", "t500"), checkpoint="quarter-1"
    ),
    "loss-slot-2": FeatureSet(
        "loss", "slot", slot_batch=52, groups=("t0", "t500"), checkpoint="quarter-2"
    ),
    "loss-slot-3": FeatureSet(
        "loss", "slot", slot_batch=52, groups=("t0", "t500"), checkpoint="quarter-3"
    ),
    "mean-slot-many": FeatureSet("mean", "slot", True, 16, groups=("t20", "t100")),
    "mean-shared-many": FeatureSet("mean", "shared", True, groups=("t20", "t100")),
    "square-slot-many": FeatureSet(
        "mean-squared-l2-norm", "slot", slot_batch=52, groups=("t20", "t100")
    ),
    "loss-slot-many": FeatureSet("loss", "slot", slot_batch=52, groups=("t20", "t100")),
    "loss-shared-normalised": FeatureSet("loss", "shared", True),
    "signs-stacked": FeatureSet("random-signs", "shared", True, combine="stack"),
    "signs-stacked-many": FeatureSet(
        "random-signs", "shared", True, groups=("t20", "t100"), combine="stack"
    ),
    "outputs-stacked": FeatureSet("all-outputs", "shared", True, combine="stack"),
    "outputs-stacked-many": FeatureSet(
        "all-outputs", "shared", True, groups=("t20", "t100"), combine="stack"
    ),
    "signs-shared": FeatureSet("random-signs", "shared", True),
    "mean-stacked": FeatureSet("mean", "shared", True, combine="stack"),
}


def write_features(config: LdsConfig, out: Path, only: Iterable[str] | None) -> dict[str, float]:
    """Compute what is not there yet; CPU seconds of each set of this call."""
    chosen = list(only or (*SETS, "encoder", "journey"))
    jobs: list[tuple[str, Callable[[], None]]] = []
    if "encoder" in chosen:
        jobs.append(("encoder", lambda: _write_encoder(config, out)))
    # The fewest timesteps of all sets first: a run that is stopped has them all.
    for group in GROUPS:
        for name in chosen:
            if name in SETS and group in SETS[name].groups:
                jobs.append(
                    (f"{name}, {group}", lambda n=name, g=group: _write_set(config, out, n, g))
                )
        if group == "t500" and "journey" in chosen:
            jobs.append(("journey", lambda: _write_journey(config, out)))
    seconds = {}
    for title, work in jobs:
        started = time.process_time()
        work()
        seconds[title] = round(time.process_time() - started, 1)
        print(title, seconds[title], flush=True)
    return seconds


def _write_set(config: LdsConfig, out: Path, name: str, group: str) -> None:
    chosen = SETS[name]
    denoiser = load_denoiser(out / "models" / "base" / chosen.checkpoint, device="cpu")
    featurise = Featuriser(denoiser, feature_config(chosen, GROUPS[group]), batch_rows=80)
    for role, images in clean_images(config, out, denoiser).items():
        _write_blocks(
            out / "features" / name / group / role,
            images,
            lambda clean, rows, role=role: _plain(
                featurise(clean, rows, role="train" if role == "training" else "query")
            ),
        )


def feature_config(chosen: FeatureSet, timesteps: tuple[int, ...]) -> FeatureConfig:
    """One sketch for all methods: a method is its functional, noise, timesteps and score."""
    return FeatureConfig(
        functional=chosen.functional,
        noise=chosen.noise,  # type: ignore[arg-type]
        normalise=chosen.normalise,
        combine=chosen.combine,  # type: ignore[arg-type]
        slot_batch=chosen.slot_batch,
        timesteps=timesteps,
        projection=ProjectionConfig(kind="sjlt", dim=DIM),
    )


def clean_images(config: LdsConfig, out: Path, denoiser: Denoiser) -> dict[str, Tensor]:
    """Clean samples of training images and of both kinds of queries."""
    count = config.data.rows
    assert count is not None
    opened = {
        kind: open_queries(str(out / "queries" / f"{kind}.parquet"), denoiser) for kind in KINDS
    }
    opened["training"] = open_queries(config.data.name, denoiser, rows=count)
    return {role: denoiser.encode(x.images(range(len(x)))) for role, x in opened.items()}


def _plain(features: Features) -> dict[str, Tensor]:
    return {"vectors": features.vectors, "errors": features.errors}


def _write_blocks(
    folder: Path, images: Tensor, compute: Callable[[Tensor, range], dict[str, Tensor]]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(images), BLOCK):
        path = folder / f"{start:05d}.safetensors"
        if path.exists():
            continue
        rows = range(start, min(start + BLOCK, len(images)))
        tensors = compute(images[rows.start : rows.stop], rows)
        partial = path.with_suffix(".partial")
        save_file({key: value.contiguous() for key, value in tensors.items()}, partial)
        partial.rename(path)


def read_features(
    out: Path, name: str, role: str, grid: str, count: int | None = None
) -> dict[str, Tensor]:
    """Features ``vectors`` [n, k] and ``errors`` [n, t] of a set at a grid of timesteps.

    Args:
        count: Of the first images only, which alone need be finished.
    """
    vectors, errors, total = None, [], 0
    for group in GRIDS[grid]:
        source = f"{name}-many" if group in ("t20", "t100") else name
        part = _joined(out / "features" / source / group / role, count)
        weight = len(GROUPS[group])
        vectors = part["vectors"] * weight + (0 if vectors is None else vectors)
        errors.append(part["errors"])
        total += weight
    assert vectors is not None
    return {"vectors": vectors / total, "errors": torch.cat(errors, dim=1)}


def read_rows(out: Path, name: str, role: str) -> Tensor:
    """Rows of the encoder or of the sampling path."""
    return _joined(out / "features" / name / role)["vectors"]


def has_features(config: LdsConfig, out: Path, name: str, groups: Iterable[str]) -> bool:
    """Whether a set is complete."""
    assert config.data.rows is not None
    sizes = {kind: getattr(config.queries, kind) for kind in KINDS}
    sizes["training"] = config.data.rows
    for group in groups:
        source = f"{name}-many" if group in ("t20", "t100") else name
        for role, count in sizes.items():
            folder = out / "features" / source / group / role
            if len(list(folder.glob("*.safetensors"))) < -(-count // BLOCK):
                return False
    return True


def finished_rows(config: LdsConfig, out: Path, name: str, grid: str) -> int:
    """How many training images, from the first on, have features at a grid, queries all done."""
    assert config.data.rows is not None
    whole = config.data.rows
    for group in GRIDS[grid]:
        source = f"{name}-many" if group in ("t20", "t100") else name
        folder = out / "features" / source / group
        for kind in KINDS:
            asked = -(-getattr(config.queries, kind) // BLOCK)
            if len(list((folder / kind).glob("*.safetensors"))) < asked:
                return 0
        done = 0
        while (folder / "training" / f"{done:05d}.safetensors").exists():
            done += BLOCK
        whole = min(whole, done)
    return whole


def _joined(folder: Path, count: int | None = None) -> dict[str, Tensor]:
    paths = sorted(folder.glob("*.safetensors"))
    parts = [load_file(path) for path in paths if count is None or int(path.stem) < count]
    return {key: torch.cat([part[key] for part in parts])[:count] for key in parts[0]}


def _write_encoder(config: LdsConfig, out: Path) -> None:
    """Mean over positions of the innermost block's output, at a low noise level, without noise."""
    denoiser = load_denoiser(out / "models" / "base" / "checkpoint", device="cpu")
    kept: list[Tensor] = []
    innermost = 32 >> (len(config.network.channel_mult) - 1)
    layer = denoiser.module.get_submodule(f"model.dec.{innermost}x{innermost}_in1")
    handle = layer.register_forward_hook(lambda _m, _i, output: kept.append(output.mean((2, 3))))

    def compute(clean: Tensor, rows: range) -> dict[str, Tensor]:
        kept.clear()
        with torch.no_grad():
            denoiser(clean.float(), torch.full((len(rows),), ENCODER_SIGMA))
        return {"vectors": kept[0].float()}

    for role, images in clean_images(config, out, denoiser).items():
        _write_blocks(out / "features" / "encoder" / role, images, compute)
    handle.remove()


def _write_journey(config: LdsConfig, out: Path) -> None:
    """Loss gradients at the clean images that the sampler predicted, noised again at their level."""
    denoiser = load_denoiser(out / "models" / "base" / "checkpoint", device="cpu")
    sampler = config.queries.sampler
    seed, shape = config.queries.seed, denoiser.sample_shape

    def compute(_: Tensor, rows: range) -> dict[str, Tensor]:
        path: list[tuple[float, Tensor]] = []
        # The noise that the queries were drawn from.
        start = torch.stack([item_normal(seed, "lds-query", i, shape) for i in rows])
        sample(
            denoiser,
            start,
            None,
            sampler,
            on_step=lambda _i, sigma, _x, denoised: path.append((sigma, denoised.float())),
        )
        settings = replace(
            feature_config(FeatureSet("loss", "independent"), (0,)),
            sigmas=tuple(sigma for sigma, _ in path),
        )
        denoised = torch.stack([clean for _, clean in path])
        return {"vectors": path_features(Featuriser(denoiser, settings), denoised, rows)}

    empty = torch.zeros(config.queries.generated, *shape)
    _write_blocks(out / "features" / "journey" / "generated", empty, compute)
