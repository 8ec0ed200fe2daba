"""Peak memory of the mixing stages against the number of images.

    python benchmarks/memory.py --out benchmarks/memory.json

Generates, annotates and publishes 8x8 images of a tiny random network, each size in a process of its
own, and records the largest resident set (ru_maxrss, MiB) after every stage. It should not depend on
the number of images.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIZES = (5_000, 20_000, 100_000)
MEMBERS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        sys.stdout.write(json.dumps(run_one(args.one)) + "\n")
        return
    from _environment import environment

    results = []
    for size in args.sizes:
        command = [sys.executable, __file__, "--one", str(size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        sys.stderr.write(json.dumps(results[-1]) + "\n")
    record = {"benchmark": "memory", "environment": environment(), "results": results}
    args.out.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def run_one(images: int) -> dict[str, float]:
    """Peak MiB after each stage, and the seconds it took."""
    from _tiny_denoiser import tiny_denoiser

    from diffcal.diffusion.samplers import SamplerConfig
    from diffcal.mixing.encoding import EncoderConfig
    from diffcal.mixing.generation import GenerationConfig
    from diffcal.mixing.plan import PlanConfig
    from diffcal.workflows.annotate import AnnotationConfig, RealConfig, annotate_run
    from diffcal.workflows.generate import GenerateConfig, generate
    from diffcal.workflows.publish import publish_dataset

    denoiser = tiny_denoiser()
    config = GenerateConfig(
        plan=PlanConfig(groups=images // MEMBERS, members=MEMBERS),
        generation=GenerationConfig(sampler=SamplerConfig(solver="euler", steps=2)),
    )
    annotation = AnnotationConfig(
        encoder=EncoderConfig(kind="pixels"), real=RealConfig(name="digits")
    )
    result: dict[str, float] = {"images": images}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        stages = {
            "generate": lambda: generate(config, run, denoiser=denoiser, device="cpu"),
            "annotate": lambda: annotate_run(annotation, run, denoiser=denoiser, device="cpu"),
            "publish": lambda: publish_dataset(run, annotation.folder),
        }
        for name, stage in stages.items():
            started = time.perf_counter()
            stage()
            result[f"{name}_peak_mib"] = round(_peak(), 1)
            result[f"{name}_seconds"] = round(time.perf_counter() - started, 1)
    return result


def _peak() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
