"""Cost of attribution gradients beside an ordinary training pass of the same network, in one run.

    python benchmarks/gradient_speed.py [--network cifar|small] [--batch 4] [--repeats 3]
        [--device cpu] [--dtype float32] [--threads 1] [--methods ...] [--out FILE.json]

Every method runs on the same ``UNet2DModel``, rows and functional; ``step`` is an ordinary batched
forward and backward pass with weight gradients and is what the ratios divide by:

- ``sketched``: fused, layers sketched by two factors and then SJLT, no weight gradients formed;
- ``exact_sjlt``: fused, each layer's per-sample gradient formed, its norm taken, projected by SJLT;
- ``outputs``: rows of the kernel of all outputs by the output layer, SJLT (the default of ``das``), for
  which there is nothing to differentiate;
- ``vmap_sjlt``: ``torch.func.vmap(grad)`` and the same SJLT;
- ``forward``: a forward pass without gradients.

Rounds go through the methods in turn, so that other load on the machine meets all of them; times are
the process's own CPU seconds (on a GPU: wall seconds), and ratios are medians over the rounds.
``fidelity`` compares inner products of sketched features of the rows with those of whole gradients.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from diffusers import DDPMScheduler, UNet2DModel

from diffcal.attribution.gradient_fused import FusedGradients
from diffcal.attribution.gradient_outputs import OutputLayerRows
from diffcal.attribution.gradient_vmap import VmapGradients
from diffcal.attribution.outputs import DenoiserObjective
from diffcal.attribution.projection import ProjectionConfig, Projector
from diffcal.attribution.projectors import make_projector
from diffcal.core.rng import item_signs
from diffcal.diffusion.diffusers_denoisers import UNet2DDenoiser

METHODS = ("forward", "step", "outputs", "sketched", "exact_sjlt", "vmap_sjlt")
NETWORKS: dict[str, dict[str, Any]] = {
    "cifar": {  # the network of D-TRAK and DAS: 38.3 million parameters
        "block_out_channels": (128, 256, 256, 256),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "small": {  # 2.6 million parameters
        "block_out_channels": (64, 96, 96),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
}


def make_objective(
    network: str, batch: int, device: str, dtype: str
) -> tuple[DenoiserObjective, tuple[torch.Tensor, ...]]:
    """A fresh network that is not quite untrained-like (no zeros), and rows at spread noise levels."""
    torch.manual_seed(0)
    module = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        resnet_time_scale_shift="scale_shift",
        **NETWORKS[network],
    )
    denoiser = UNet2DDenoiser(module, DDPMScheduler(), dtype=dtype).to(device)
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(batch, 3, 32, 32, generator=generator) * 2 - 1
    noise = torch.randn(1, 3, 32, 32, generator=generator).expand(batch, -1, -1, -1)
    sigma = torch.logspace(-1, 1, batch, dtype=torch.float64)
    objective = DenoiserObjective(denoiser, "mean")
    tensors = (t.to(device) for t in (clean, noise, sigma, torch.ones(batch)))
    return objective, objective.inputs(*tensors)


def make_methods(
    names: list[str], objective: DenoiserObjective, inputs: tuple[torch.Tensor, ...], dim: int
) -> dict[str, Callable[[], object]]:
    module = objective.denoiser.module
    parameters = dict(module.named_parameters())
    shapes = [tuple(p.shape) for p in parameters.values()]

    def projector(kind: Any) -> Projector:
        return make_projector(ProjectionConfig(kind=kind, dim=dim), shapes)

    def forward() -> None:
        with torch.no_grad():
            objective(*inputs)

    def step() -> None:
        module.zero_grad()
        objective(*inputs)[0].mean().backward()

    def outputs() -> Callable[[], object]:
        whole = DenoiserObjective(objective.denoiser, "all-outputs")
        sketch = ProjectionConfig(kind="sjlt", dim=dim)
        engine = OutputLayerRows(module, whole, parameters, sketch)
        shape = tuple(inputs[0].shape[1:])
        signs = item_signs(0, "benchmark", 0, shape).to(inputs[0]).expand_as(inputs[0])
        return lambda: engine(*inputs, signs)

    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "forward": lambda: forward,
        "step": lambda: step,
        "sketched": lambda: bind(
            FusedGradients(
                module, objective, parameters, projector("factorised_sjlt"), norms="projected"
            )
        ),
        "exact_sjlt": lambda: bind(
            FusedGradients(module, objective, parameters, projector("sjlt"))
        ),
        "outputs": outputs,
        "vmap_sjlt": lambda: bind(VmapGradients(module, objective, parameters, projector("sjlt"))),
    }

    def bind(engine: Any) -> Callable[[], object]:
        return lambda: engine(*inputs)

    return {name: makers[name]() for name in names}


def cosines(vectors: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    above = torch.triu_indices(len(unit), len(unit), 1)
    return (unit @ unit.mT)[above[0], above[1]]


def fidelity(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Largest difference of row cosines, and spread of norm ratios, to the exact gradients' ones."""
    if "exact_sjlt" not in results:
        return {}
    wanted = cosines(results["exact_sjlt"].vectors)
    exact = results["exact_sjlt"].norms
    report = {}
    for name in ("sketched", "vmap_sjlt"):
        if name in results:
            ratio = results[name].vectors.norm(dim=1) / exact
            report[name] = {
                "cosine_error_max": float((cosines(results[name].vectors) - wanted).abs().max()),
                "norm_ratio_mean": float(ratio.mean()),
                "norm_ratio_spread": float(ratio.std() / ratio.mean()),
            }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="cifar")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_gpu = args.device.startswith("cuda")
    objective, inputs = make_objective(args.network, args.batch, args.device, args.dtype)
    names = list(dict.fromkeys(["step", *args.methods]))
    methods = make_methods(names, objective, inputs, args.dim)
    where = environment(args.device, packages=("diffusers",))
    results = {name: method() for name, method in methods.items()}  # warms up, hashes buckets
    seconds: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, int] = {}
    for _ in range(args.repeats):
        for name, method in methods.items():
            if on_gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            begin, cpu = time.perf_counter(), time.process_time()
            method()
            if on_gpu:
                torch.cuda.synchronize()
                peaks[name] = torch.cuda.max_memory_allocated()
            wall[name].append(time.perf_counter() - begin)
            seconds[name].append(wall[name][-1] if on_gpu else time.process_time() - cpu)
    parameters = sum(p.numel() for p in objective.denoiser.module.parameters())
    report = {
        "environment": where,
        "load_after": round(os.getloadavg()[0], 2),
        "network": args.network,
        "parameters": parameters,
        "batch": args.batch,
        "dtype": args.dtype,
        "dim": args.dim,
        "repeats": args.repeats,
        "seconds_are": "wall" if on_gpu else "CPU",
        "over_step": {
            name: {
                "median": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
            for name in names
            for ratios in [[a / b for a, b in zip(seconds[name], seconds["step"], strict=True)]]
        },
        "seconds": {
            name: {
                "median": statistics.median(values),
                "fastest": min(values),
                "slowest": max(values),
                "wall_median": statistics.median(wall[name]),
                "per_row": statistics.median(values) / args.batch,
            }
            for name, values in seconds.items()
        },
        "peak_bytes": peaks
        or {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10},
        "fidelity": fidelity(results),
    }
    text = json.dumps(report, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
