"""Solvers at small budgets: distance to the exact trajectory's end, and Fréchet distances.

    python benchmarks/solvers.py checkpoints/digits [checkpoints/cifar10 ...] [--budgets 7 9 11 13]
        [--solvers heun ...] [--samples 2000] [--trajectories 64] [--real SOURCE] [--device auto]
        [--out FILE.json]

For every solver and preset at every number of network evaluations:

* ``rms``: root mean square difference, in the units of the state (pixels in [-1, 1]), to Heun with
  200 steps from the same noise;
* ``frechet_heun``: Fréchet distance between features of its images and of images by Heun with 39
  evaluations from *other* noise;
* ``frechet_real``: the same to the real images that the checkpoint was trained on.

Features are pooled outputs of the checkpoint's own network at two noise levels (``DenoiserFeatures``,
the layer that its ``feature_modules`` name first): one fixed space for all sets. The matrix square
root is exact, from eigenvalues in float64. ``sampling_error`` is the Fréchet distance between two
disjoint sets by Heun with 39 evaluations: a solver whose ``frechet_heun`` is not above it cannot be
told from 39 evaluations with this number of images. Classes are balanced, and all rows start from
the same noise, so that they differ by the solver alone; the first values under ``heun_39`` are of that
noise too, which makes them the row of Heun with 39 evaluations.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from torch import Tensor

from diffcal.core.devices import resolve_device
from diffcal.core.rng import item_normal
from diffcal.data.sources import open_images
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.denoisers import Denoiser
from diffcal.diffusion.sampler_config import PRESETS, SamplerConfig, evaluations
from diffcal.diffusion.samplers import sample
from diffcal.mixing.denoiser_features import DenoiserFeatures

HEUN_39 = SamplerConfig(solver="heun", steps=20)
REFERENCE = SamplerConfig(solver="heun", steps=200)
SOLVERS = ("heun", "euler", "dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3")


def candidates(budgets: list[int], solvers: list[str]) -> Iterator[tuple[str, SamplerConfig]]:
    """Every solver at every budget on EDM's grid, and every preset within the largest budget."""
    for budget in budgets:
        for solver in solvers:
            if solver != "heun":
                yield solver, SamplerConfig(solver=solver, steps=budget)
            elif budget % 2 and budget >= 3:
                yield solver, SamplerConfig(solver=solver, steps=(budget + 1) // 2)
    for name in PRESETS:
        config = SamplerConfig(preset=name)
        if evaluations(config) <= max(budgets):
            yield f"preset {name}", config


@torch.no_grad()
def draw(
    denoiser: Denoiser, config: SamplerConfig, items: range, device: torch.device, batch: int
) -> Tensor:
    """Clean states of ``items``: noise of the item, class ``item % classes``."""
    states = []
    for start in range(items.start, items.stop, batch):
        part = range(start, min(start + batch, items.stop))
        noise = torch.stack([item_normal(0, "solvers", i, denoiser.sample_shape) for i in part])
        condition = None
        if denoiser.num_classes:
            labels = torch.tensor(list(part)) % denoiser.num_classes
            condition = denoiser.condition(torch.eye(denoiser.num_classes)[labels])
        states.append(sample(denoiser, noise.to(device), condition, config).cpu())
    return torch.cat(states)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    values = features.double()
    return values.mean(0), values.T.cov()


def frechet(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))``, by eigenvalues in float64."""
    (m1, c1), (m2, c2) = first, second
    values, vectors = torch.linalg.eigh(c1)
    root = vectors * values.clip(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clip(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)


class FeatureSpace:
    """Moments of images in the features of one network."""

    def __init__(self, denoiser: Denoiser, batch: int) -> None:
        self.encoder = DenoiserFeatures(denoiser, depth=1, pool="mean")
        self.batch = batch

    def of_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self.encoder.encode(part) for part in images.split(self.batch)]
        return moments(torch.cat(parts))

    def of_states(self, denoiser: Denoiser, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.of_images(denoiser.decode(states.float()).cpu())


def real_images(checkpoint: Path, source: str | None) -> Tensor | None:
    """Rows that the checkpoint says it was trained on."""
    path = checkpoint / "config.json"
    training = json.loads(path.read_text("utf-8")).get("training", {}) if path.exists() else {}
    config = training.get("config", {})
    name = source or config.get("data")
    if name is None:
        return None
    images = open_images(
        name,
        image_column=config.get("image_column", "image"),
        label_column=config.get("label_column", "label"),
    )
    first = config.get("first_row", 0)
    rows = range(first, len(images) if config.get("rows") is None else first + config["rows"])
    return torch.cat([torch.as_tensor(batch) for _, batch, _ in images.batches(512, rows)])


def run(checkpoint: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    denoiser = load_denoiser(checkpoint, device=str(device))
    space, count, few = FeatureSpace(denoiser, args.batch), args.samples, range(args.trajectories)

    def states(config: SamplerConfig, items: range) -> Tensor:
        return draw(denoiser, config, items, device, args.batch)

    exact = states(REFERENCE, few)
    heun = {part: states(HEUN_39, range(part * count, (part + 1) * count)) for part in (0, 1, 2)}
    first, second, third = (space.of_states(denoiser, heun[part]) for part in (0, 1, 2))
    # Three disjoint sets: one is the target, the others say how far apart equal sets are.
    error = [frechet(first, third), frechet(second, third), frechet(first, second)]
    images = real_images(Path(checkpoint), args.real)
    real = None if images is None else space.of_images(images)
    rows = []
    for name, config in candidates(args.budgets, args.solvers):
        x = states(config, range(count))
        found = space.of_states(denoiser, x)
        rows.append(
            {
                "solver": name,
                "evaluations": evaluations(config),
                "schedule": config.schedule,
                "rho": config.rho,
                "sigma_min": config.sigma_min,
                "sigma_max": config.sigma_max,
                "rms": float((x[: len(few)] - exact).square().mean().sqrt()),
                "frechet_heun": frechet(found, third),
                "frechet_real": None if real is None else frechet(found, real),
            }
        )
        sys.stderr.write(f"{checkpoint}: {json.dumps(rows[-1])}\n")
    return {
        "parameters": sum(p.numel() for p in denoiser.module.parameters()),
        "samples": count,
        "trajectories": len(few),
        "real_images": None if images is None else len(images),
        "feature_layer": space.encoder.modules[0],
        "feature_sigmas": list(space.encoder.sigmas),
        "feature_dim": len(first[0]),
        "heun_39": {
            "rms": float((heun[0][: len(few)] - exact).square().mean().sqrt()),
            "sampling_error": error,
            "frechet_real": None if real is None else [frechet(s, real) for s in (first, second)],
        },
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--budgets", type=int, nargs="+", default=[7, 9, 11, 13])
    parser.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=SOLVERS)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--trajectories", type=int, default=64, help="images compared one by one")
    parser.add_argument("--real", help="source of real images, if the checkpoint does not tell")
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = resolve_device(args.device)
    result: dict[str, Any] = {
        "question": "which solver matches Heun's 39 evaluations with at most a third of them",
        "environment": environment(device),
        "checkpoints": {name: run(name, args, device) for name in args.checkpoints},
    }
    text = json.dumps(result, indent=2)
    sys.stdout.write(text + "\n")
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
