"""Attribution end to end beside traker and dattri: CPU seconds, and how near to exact scores each comes.

    pip install traker dattri          # optional: the result says which are missing
    python benchmarks/attribution_peers.py [--data TRAIN.parquet] [--train 24] [--queries 8]
        [--dims 512 4096] [--timesteps 10] [--repeats 3] [--out benchmarks/attribution_peers.json]

A small ``UNet2DModel`` is trained briefly on rows of the data (32x32; the bundled digits, enlarged, if
no file is given), and training images 0 .. N-1 are attributed to held-out ones. Every tool takes the
gradient of the same number, the mean over T timesteps of the mean of the network's output under noise
that all images share, with the same relative damping, on one thread in float32, and gives signed
scores. Each is timed from its constructor to its scores. ``fidelity`` compares with scores from whole
gradients and a kernel in float64. Rounds go through all tools in turn; figures are medians over rounds
of the process's own CPU seconds; ratios divide by a diffcal tool's seconds in the same round.

- ``sketched``, ``sjlt``: diffcal, fused; layers sketched by two factors and then SJLT, or each layer's
  gradient formed and projected by SJLT.
- ``sketched_das``, ``sjlt_das``: the same with the settings of the preset ``das`` (each timestep's
  gradient normalised, scores squared); their fidelity is to exact scores of that kind.
- ``vmap_gaussian``: diffcal's own ``torch.func`` path and dense normal matrix, drawn for every batch.
- ``traker``, ``dattri_normal``: the tools' own choices on a CPU, a dense normal matrix that is drawn
  anew for every batch of ``--batch`` images (16 is what the published DAS scripts use). The larger the
  batch, the less that weighs, and the more memory it takes: ``without_drawing`` is their ratio if all
  draws, timed by themselves, were free, the best that any batch could do.
- ``dattri_mask``: dattri with a random mask, its cheapest projection on a CPU.

Peers run all T timesteps of an image in one pass, with one projection for each image, and with torch's
plain attention, which has a batching rule: the cheapest that their interfaces allow.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _attribution_tools import (
    Problem,
    Solved,
    correlations,
    drawing_seconds,
    exact_scores,
    installed,
    run_dattri,
    run_diffcal,
    run_traker,
    whole_features,
)
from _environment import environment
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from diffcal.attribution.projection import ProjectionConfig
from diffcal.core.runs import write_json
from diffcal.data.sources import open_images
from diffcal.diffusion.diffusers_unet import UNet2DDenoiser

SIDE = 32
REFERENCES = ("sketched", "sjlt")
Tool = Callable[[], Solved]


def images_of(source: str, count: int) -> Tensor:
    """Images 0 .. count-1 of a source, enlarged to 32x32 where smaller, in [-1, 1]."""
    _, pixels, _ = next(open_images(source).batches(count, range(count)))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    if images.shape[-1] != SIDE:
        images = F.interpolate(images, size=SIDE, mode="bilinear")
    return images.contiguous()


def trained_network(images: Tensor, steps: int, batch: int = 32) -> UNet2DModel:
    """A network of 0.45 million parameters after some steps of ordinary denoising training."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=SIDE,
        in_channels=images.shape[1],
        out_channels=images.shape[1],
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        clean = images[torch.randint(len(images), (batch,), generator=generator)]
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(1000, (batch,), generator=generator)
        output = network(scheduler.add_noise(clean, noise, times), times).sample
        loss = (output - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def make_tools(
    problem: Problem, dim: int, mean_square: float, batch: int, peers: set[str]
) -> dict[str, Tool]:
    """Every tool that is there, as a function without arguments."""
    sketch = ProjectionConfig(kind="factorised_sjlt", dim=dim)
    sjlt = ProjectionConfig(kind="sjlt", dim=dim)
    gaussian = ProjectionConfig(kind="gaussian", dim=dim)
    das: dict[str, Any] = {"normalise": True, "readout": "square"}
    tools: dict[str, Tool] = {
        "sketched": lambda: run_diffcal(problem, sketch),
        "sjlt": lambda: run_diffcal(problem, sjlt),
        "sketched_das": lambda: run_diffcal(problem, sketch, **das),
        "sjlt_das": lambda: run_diffcal(problem, sjlt, **das),
        "vmap_gaussian": lambda: run_diffcal(problem, gaussian, method="vmap"),
    }
    if "trak" in peers:
        tools["traker"] = lambda: run_traker(problem, dim, mean_square, batch)
    if "dattri" in peers:
        for kind in ("normal", "random_mask"):
            tools[f"dattri_{kind.removeprefix('random_')}"] = lambda kind=kind: run_dattri(
                problem, dim, mean_square, kind, batch
            )
    return tools


def summary(
    rounds: dict[str, list[Solved]], exact: dict[bool, Tensor], drawing: float
) -> dict[str, Any]:
    """Seconds, ratios and fidelity of each tool; ``drawing``: seconds that dense peers draw for."""
    report: dict[str, Any] = {}
    seconds = {
        name: [one.feature_seconds + one.score_seconds for one in runs]
        for name, runs in rounds.items()
    }
    for name, runs in rounds.items():
        ratios = {
            f"over_{reference}": statistics.median(
                a / b for a, b in zip(seconds[name], seconds[reference], strict=True)
            )
            for reference in REFERENCES
        }
        report[name] = {
            "cpu_seconds": statistics.median(seconds[name]),
            "fastest": min(seconds[name]),
            "slowest": max(seconds[name]),
            "features": statistics.median(one.feature_seconds for one in runs),
            "scores": statistics.median(one.score_seconds for one in runs),
            **ratios,
            "fidelity": correlations(runs[0].scores, exact[name.endswith("_das")]),
        }
        if name in ("traker", "dattri_normal"):
            report[name]["drawing"] = drawing
            report[name]["without_drawing"] = {
                f"over_{reference}": statistics.median(
                    (a - drawing) / b
                    for a, b in zip(seconds[name], seconds[reference], strict=True)
                )
                for reference in REFERENCES
            }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--train", type=int, default=24)
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--timesteps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16, help="images of a batch, of the peers")
    parser.add_argument("--functional", default="mean")
    parser.add_argument("--rho", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=60, help="training steps of the network")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="names of tools to run")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    missing = installed(("trak", "dattri"))
    peers = {name for name, reason in missing.items() if reason is None}
    where = environment(packages=("diffusers", "traker", "dattri"))
    pool = images_of(args.data, max(512, args.train + args.queries))
    network = trained_network(pool[: len(pool) - args.queries], args.steps)
    denoiser = UNet2DDenoiser(network, DDPMScheduler(), timesteps="integer")
    problem = Problem(
        denoiser,
        pool[: args.train],
        pool[len(pool) - args.queries :],
        args.timesteps,
        args.functional,
        args.rho,
    )
    exact: dict[bool, Tensor] = {}
    mean_square = 0.0
    for normalise in (False, True):
        phi, psi = (whole_features(problem, x, normalise) for x in (problem.train, problem.queries))
        scores = exact_scores(problem, phi, psi)
        exact[normalise] = scores.square() if normalise else scores
        mean_square = mean_square or float(phi.double().square().sum(dim=1).mean())
    report: dict[str, Any] = {
        "environment": where,
        "missing_peers": {name: reason for name, reason in missing.items() if reason},
        "data": Path(args.data).name,
        "parameters": problem.num_params,
        "training_steps": args.steps,
        "train": args.train,
        "queries": args.queries,
        "timesteps": args.timesteps,
        "peer_batch": args.batch,
        "functional": args.functional,
        "relative_damping": args.rho,
        "results": {},
    }
    tools = {
        dim: {
            name: tool
            for name, tool in make_tools(problem, dim, mean_square, args.batch, peers).items()
            if not args.only or name in (*args.only, *REFERENCES)
        }
        for dim in args.dims
    }
    draws = -(-args.train // args.batch) + -(-args.queries // args.batch)
    rounds: dict[int, dict[str, list[Solved]]] = {
        dim: {name: [] for name in tools[dim]} for dim in args.dims
    }
    for repeat in range(args.repeats):
        for dim in args.dims:
            for name, tool in tools[dim].items():
                rounds[dim][name].append(tool())
            drawing = draws * drawing_seconds(problem.num_params, dim)
            report["results"][str(dim)] = {
                "rounds": repeat + 1,
                **summary(rounds[dim], exact, drawing),
            }
            report["load_after"] = round(os.getloadavg()[0], 2)
            if args.out:  # after every part, so that a long run may be stopped
                write_json(args.out, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
