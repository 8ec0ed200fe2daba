"""Attribution end to end beside traker and dattri: CPU seconds, and how near to exact scores each comes.

    pip install traker dattri          # optional: the result says which are missing
    python benchmarks/attribution_peers.py [--data TRAIN.parquet] [--train 24] [--queries 8]
        [--dims 512 4096] [--timesteps 10] [--repeats 3] [--out benchmarks/attribution_peers.json]

A small ``UNet2DModel`` is trained briefly on rows of the data (32x32; the bundled digits, enlarged, if
no file is given), and training images 0 .. N-1 are attributed to held-out ones. Every tool takes the
gradient of the same number, the mean over T timesteps of the mean of the network's output under noise
that all images share, with the same relative damping, on one thread, and gives signed scores. Each is
timed from its constructor to its scores. ``fidelity`` compares with scores from whole float32 gradients
and a kernel in float64. Rounds go through all tools in turn, each round with its own seed of every
tool's projection; seconds and ratios are medians over rounds of the process's own CPU seconds (ratios
divide by a diffcal tool's seconds in the same round), fidelity is the mean over rounds. The default
takes about ten minutes on a quiet core.

diffcal as it comes: ``das``, the preset, whose rows of all outputs take a forward pass and no gradient
(and ``das_half``, in bfloat16 autocast); it answers the same question by another kernel, so that its
fidelity is to exact scores of that kernel.

diffcal, fused gradients:

- ``sketched``: layers sketched by two factors of at most 64 and then SJLT; ``sketched96``: of 96;
- ``sjlt``: each layer's gradient formed and projected by SJLT;
- the same with ``_half``: the network in bfloat16 autocast, which a processor with such instructions
  (AVX-512 BF16, AMX) runs faster;
- ``_das_mean``: the settings of the preset ``das-mean`` (each timestep's gradient normalised, scores
  squared); their fidelity is to exact scores of that kind.
- ``vmap_gaussian`` (only if asked for by ``--only``): diffcal's own ``torch.func`` path and dense
  normal matrix, drawn for every batch.

Peers, in float32 (their half precision is float16, which a CPU emulates), with all T timesteps of an
image in one pass, one projection for each image, and torch's plain attention, which has a batching
rule: the cheapest that their interfaces allow.

- ``traker``, ``dattri_normal``: their own choices on a CPU, a dense normal matrix of 100 columns at a
  time that is drawn anew for every batch of ``--batch`` images (16 is what the published DAS scripts
  use). ``without_drawing`` is their ratio if all draws, timed by themselves, were free.
- ``traker_best``: all images in one batch, and its own ``BasicProjector`` in a single block that it is
  made to keep, so that it draws its matrix once: parameters x columns x 4 bytes (7.4 GB here at 4 096
  columns, 627 GB for the network of the papers; above ``--matrix-gb`` it stays with 100 columns).
- ``dattri_best`` (only if asked for): all images in one batch, which took it 1.6 times as long at 512
  columns and as long at 4 096. Its ``TRAKAttributor`` cannot keep a matrix. Random signs instead of
  normal numbers take both tools 2.5 times as long to draw on a CPU.
- ``dattri_mask``: dattri with a random mask, its cheapest projection on a CPU.

``fidelity_by_dim`` tells at how many columns diffcal's sketches come as near as a dense matrix of the
largest of ``--dims``: scores from whole gradients projected afterwards, over five seeds.
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
    all_output_rows,
    correlations,
    default_scores,
    drawing_seconds,
    exact_scores,
    installed,
    run_dattri,
    run_default,
    run_diffcal,
    run_traker,
    whole_features,
)
from _environment import environment
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor

from diffcal.attribution.projection import ProjectionConfig, project_rows
from diffcal.attribution.projectors import make_projector
from diffcal.core.runs import write_json
from diffcal.data.sources import open_images
from diffcal.diffusion.diffusers_unet import UNet2DDenoiser

SIDE = 32
REFERENCES = (
    "das",
    "das_half",
    "sketched",
    "sjlt",
    "sketched_half",
    "sketched96_half",
    "sjlt_half",
)
FIDELITY_DIMS = (512, 1024, 2048, 4096, 8192, 16384, 65536)
FIDELITY_SEEDS = 5
ON_DEMAND = ("vmap_gaussian", "dattri_best")
Tool = Callable[[int], Solved]


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
    problem: Problem,
    dim: int,
    mean_square: float,
    batch: int,
    peers: set[str],
    matrix_bytes: float,
) -> dict[str, Tool]:
    """Every tool that is there, as a function of the seed of its projection."""

    def ours(kind: str, factor_dim: int = 64, **options: Any) -> Tool:
        def run(seed: int) -> Solved:
            projection = ProjectionConfig(kind=kind, dim=dim, factor_dim=factor_dim, seed=seed)  # type: ignore[arg-type]
            return run_diffcal(problem, projection, **options)

        return run

    mean: dict[str, Any] = {"normalise": True, "readout": "square"}
    tools: dict[str, Tool] = {
        "das": lambda seed: run_default(problem, dim, seed),
        "das_half": lambda seed: run_default(problem, dim, seed, half=True),
        "sketched": ours("factorised_sjlt"),
        "sjlt": ours("sjlt"),
        "sketched_half": ours("factorised_sjlt", half=True),
        "sketched96_half": ours("factorised_sjlt", 96, half=True),
        "sjlt_half": ours("sjlt", half=True),
        "sketched_das_mean": ours("factorised_sjlt", **mean),
        "sjlt_das_mean": ours("sjlt", **mean),
        "sketched_half_das_mean": ours("factorised_sjlt", half=True, **mean),
        "sjlt_half_das_mean": ours("sjlt", half=True, **mean),
        "vmap_gaussian": ours("gaussian", method="vmap"),
    }
    together = max(len(problem.train), len(problem.queries))
    if "trak" in peers:
        block = dim if 4 * dim * problem.num_params <= matrix_bytes else 100
        tools["traker"] = lambda seed: run_traker(problem, dim, mean_square, batch, seed)
        tools["traker_best"] = lambda seed: run_traker(
            problem, dim, mean_square, together, seed, block
        )
    if "dattri" in peers:
        for name, kind, size in (
            ("normal", "normal", batch),
            ("best", "normal", together),
            ("mask", "random_mask", batch),
        ):
            tools[f"dattri_{name}"] = lambda seed, kind=kind, size=size: run_dattri(
                problem, dim, mean_square, kind, size, seed
            )
    return tools


def fidelity_by_dim(
    problem: Problem, phi: Tensor, psi: Tensor, wanted: Tensor, peer_dim: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Mean fidelity over seeds of signed scores from projected gradients, by sketch and columns."""
    shapes = [tuple(p.shape) for p in problem.network.parameters()]
    sketches = {
        "sketched": ("factorised_sjlt", 64, FIDELITY_DIMS),
        "sketched96": ("factorised_sjlt", 96, FIDELITY_DIMS),
        "sjlt": ("sjlt", 64, FIDELITY_DIMS),
        "dense": ("gaussian", 64, (peer_dim,)),
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, (kind, factor_dim, dims) in sketches.items():
        found[name] = {}
        for dim in dims:
            if dim > problem.num_params:
                continue
            # A dense matrix of 4 096 columns takes as long to draw as all else here together.
            seeds = 1 if kind == "gaussian" else FIDELITY_SEEDS
            each = []
            for seed in range(seeds):
                config = ProjectionConfig(kind=kind, dim=dim, factor_dim=factor_dim, seed=seed)  # type: ignore[arg-type]
                projector = make_projector(config, shapes)
                both = project_rows(projector, torch.cat([phi, psi])).split(len(phi))
                each.append(correlations(exact_scores(problem, *both), wanted))
            found[name][str(dim)] = {
                key: statistics.mean(one[key] for one in each) for key in each[0]
            }
    return found


def mean_fidelity(runs: list[Solved], wanted: Tensor) -> dict[str, float]:
    """Mean over rounds, each of another projection."""
    each = [correlations(one.scores, wanted) for one in runs]
    return {key: statistics.mean(one[key] for one in each) for key in each[0]}


def yardstick(tool: str) -> str:
    """Which exact scores a tool's are compared with."""
    if tool in ("das", "das_half"):
        return "das"
    return "das-mean" if tool.endswith("_das_mean") else "signed"


def summary(
    rounds: dict[str, list[Solved]], exact: dict[str, Tensor], drawing: float
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
            if reference in seconds
        }
        report[name] = {
            "cpu_seconds": statistics.median(seconds[name]),
            "fastest": min(seconds[name]),
            "slowest": max(seconds[name]),
            "features": statistics.median(one.feature_seconds for one in runs),
            "scores": statistics.median(one.score_seconds for one in runs),
            **ratios,
            "fidelity": mean_fidelity(runs, exact[yardstick(name)]),
        }
        if name in ("traker", "dattri_normal"):
            report[name]["drawing"] = drawing
            report[name]["without_drawing"] = {
                f"over_{reference}": statistics.median(
                    (a - drawing) / b
                    for a, b in zip(seconds[name], seconds[reference], strict=True)
                )
                for reference in REFERENCES
                if reference in seconds
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
    parser.add_argument(
        "--matrix-gb", type=float, default=8.0, help="largest matrix that traker_best may keep"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    missing = installed(("trak", "dattri"))
    peers = {name for name, reason in missing.items() if reason is None}
    where = environment(packages=("diffusers", "traker", "dattri"))
    pool = images_of(args.data, max(512, args.train + args.queries))
    network = trained_network(pool[: len(pool) - args.queries], args.steps)
    denoiser, half = (
        UNet2DDenoiser(network, DDPMScheduler(), timesteps="integer", dtype=dtype)
        for dtype in ("float32", "bfloat16")
    )
    problem = Problem(
        denoiser,
        pool[: args.train],
        pool[len(pool) - args.queries :],
        args.timesteps,
        args.functional,
        args.rho,
        half,
    )
    exact = {
        "das": default_scores(
            problem, *(all_output_rows(problem, x) for x in (problem.train, problem.queries))
        )
    }
    mean_square = 0.0
    by_dim: dict[str, Any] = {}
    for normalise in (False, True):
        phi, psi = (whole_features(problem, x, normalise) for x in (problem.train, problem.queries))
        scores = exact_scores(problem, phi, psi)
        exact["das-mean" if normalise else "signed"] = scores.square() if normalise else scores
        if not normalise:
            mean_square = float(phi.double().square().sum(dim=1).mean())
            if not args.only:
                by_dim = fidelity_by_dim(problem, phi, psi, scores, max(args.dims))
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
        "fidelity_by_dim": by_dim,
        "results": {},
    }
    tools = {
        dim: {
            name: tool
            for name, tool in make_tools(
                problem, dim, mean_square, args.batch, peers, args.matrix_gb * 1e9
            ).items()
            if (name in (*args.only, "sketched", "sjlt") if args.only else name not in ON_DEMAND)
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
                rounds[dim][name].append(tool(repeat))
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
