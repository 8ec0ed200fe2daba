"""Network time over total time of the generation stage, in one run.

    python benchmarks/generation_speed.py checkpoints/digits [--groups 128] [--members 11]
        [--preset edm-18] [--weights grid] [--device auto] [--repeats 3] [--out FILE.json]

Runs the stage itself (``diffcal.workflows.generate.generate``: plan, noise, sampling, PNG, Parquet
shards, hashes, manifest) into a temporary folder with a loaded denoiser whose network is timed by
hooks around every call. ``network_share`` is the time inside those calls divided by the time of the
whole stage, both by the wall clock; the aim is at least 0.95. ``network_share_cpu`` is the same by
the process's own CPU time, which other programs on the machine do not disturb (CPU only). On a GPU
the calls are timed by events on the stream. The network of the smallest checkpoint is the worst case,
as everything else costs the same per image whatever the network.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _environment import environment

from diffcal.core.devices import resolve_device
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.denoisers import Denoiser
from diffcal.diffusion.sampler_config import SamplerConfig
from diffcal.mixing.generation import GenerationConfig
from diffcal.mixing.plan import PlanConfig
from diffcal.workflows.generate import GenerateConfig, ModelConfig, generate


class NetworkClock:
    """Time spent inside the calls of a network, by hooks before and after each."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self.device = device
        self.calls = self.rows = 0
        self.marks: list[Any] = []
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter(), time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _before(self, module: torch.nn.Module, given: tuple[Any, ...]) -> None:
        self.calls += 1
        self.rows += len(given[0])
        self.marks.append(self._mark())

    def _after(self, module: torch.nn.Module, given: tuple[Any, ...], result: Any) -> None:
        self.marks.append(self._mark())

    def seconds(self) -> tuple[float, float | None]:
        """Wall-clock and process time of all calls."""
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return sum(a.elapsed_time(b) for a, b in pairs) / 1000, None
        return sum(b[0] - a[0] for a, b in pairs), sum(b[1] - a[1] for a, b in pairs)


def run_once(denoiser: Denoiser, config: GenerateConfig, device: torch.device) -> dict[str, Any]:
    clock = NetworkClock(denoiser.module, device)
    with tempfile.TemporaryDirectory() as folder:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        summary = generate(config, Path(folder), denoiser=denoiser, device=str(device))
        total, total_cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    network, network_cpu = clock.seconds()
    return {
        "images": summary["images"],
        "network_calls": clock.calls,
        "rows_per_image": clock.rows / summary["images"],
        "total_seconds": total,
        "network_seconds": network,
        "network_share": network / total,
        "network_share_cpu": None if network_cpu is None else network_cpu / total_cpu,
        "images_per_second": summary["images"] / total,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", help="folder or hub name")
    parser.add_argument("--groups", type=int, default=128)
    parser.add_argument("--members", type=int, default=11)
    parser.add_argument("--preset", default="edm-18", help="sampler preset")
    parser.add_argument("--weights", default="grid", choices=("grid", "bisect"))
    parser.add_argument("--batch-size", type=int, default=256, help="on a GPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = resolve_device(args.device)
    config = GenerateConfig(
        model=ModelConfig(source=args.checkpoint),
        plan=PlanConfig(groups=args.groups, members=args.members, weights=args.weights),
        generation=GenerationConfig(
            sampler=SamplerConfig(preset=args.preset), batch_size=args.batch_size
        ),
    )
    where = environment(device, ("pyarrow", "numpy"))
    # The first run pays for memory and kernels that are set up once; it is not counted.
    warm = GenerateConfig(
        model=config.model,
        plan=PlanConfig(groups=8, members=args.members, weights=args.weights),
        generation=config.generation,
    )
    run_once(load_denoiser(args.checkpoint, device=str(device)), warm, device)
    runs = []
    for _ in range(args.repeats):
        denoiser = load_denoiser(args.checkpoint, device=str(device))
        runs.append(run_once(denoiser, config, device))
    shares = [run["network_share"] for run in runs]
    result = {
        "question": "network time over total time of the generation stage",
        "environment": where,
        "checkpoint": args.checkpoint,
        "parameters": sum(p.numel() for p in denoiser.module.parameters()),
        "sample_shape": list(denoiser.sample_shape),
        "sampler": args.preset,
        "weights": args.weights,
        "aim": 0.95,
        "network_share": statistics.median(shares),
        "network_share_range": [min(shares), max(shares)],
        "runs": runs,
    }
    text = json.dumps(result, indent=2)
    sys.stdout.write(text + "\n")
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
