"""Time of the calibration losses, forward and backward, beside torch's cross-entropy in one run.

    python benchmarks/losses_speed.py [--sizes 1000000x10 50000x1000] [--repeats 3]
        [--losses focal bsce ...] [--targets hard soft mixed] [--out FILE.json]

From float32 logits that require a gradient, mean reduction, targets already checked (as the trainer
calls the losses) unless ``--validate``. Each repeat times cross-entropy and then every loss once, so
that all see the same machine; ``ratio`` is the median over the repeats of a loss's time over the
cross-entropy's of its own repeat, for hard labels against ``F.cross_entropy(z, y)`` and for soft
targets against ``F.cross_entropy(z, q)``. Targets are ``hard``, ``soft`` (all classes have mass) or
``mixed`` (two classes, as mixed images have). ``--clock cpu`` counts processor instead of wall time,
which other work on the machine disturbs less. Progress goes to stderr, and ``--out`` is written anew
after each kind of target.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from diffcal.calibration.losses.registry import build_loss

LOSSES: dict[str, dict[str, object]] = {
    "cross_entropy": {},
    "cross_entropy (smoothing)": {"smoothing": 0.05},
    "squared_error": {},
    "focal": {},
    "flsd": {},
    "adafocal": {},
    "inverse_focal": {},
    "dual_focal": {},
    "bsce": {},
    "bsce_gra": {},
    "focal_gra": {},
    "dual_focal_gra": {},
    "tlbs_gra": {},
    "entropy_penalty": {},
    "mbls": {},
    "acls": {},
    "mdca": {},
    "dca": {},
}
"""The losses of one value per row, and the two terms of a batch that cost as little."""

TARGETS = ["hard", "soft", "mixed"]

Target = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def seconds_of(loss: Target, z: torch.Tensor, targets: torch.Tensor, clock: str) -> float:
    now = time.process_time if clock == "cpu" else time.perf_counter
    z.grad = None
    begin = now()
    loss(z, targets).backward()
    return now() - begin


def make_targets(kind: str, n: int, k: int, generator: torch.Generator) -> torch.Tensor:
    y = torch.randint(k, (n,), generator=generator)
    if kind == "hard":
        return y
    if kind == "soft":
        return torch.rand(n, k, generator=generator).softmax(1)
    other = (y + torch.randint(1, k, (n,), generator=generator)) % k
    share = torch.rand(n, 1, generator=generator)
    q = torch.zeros(n, k).scatter_(1, y[:, None], share)
    return q.scatter_(1, other[:, None], 1 - share)


def measure(
    n: int, k: int, kind: str, names: list[str], repeats: int, clock: str, validate: bool
) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    z = (2 * torch.randn(n, k, generator=generator)).requires_grad_()
    targets = make_targets(kind, n, k, generator)
    losses: dict[str, Target] = {
        name: build_loss(name.split(" ")[0], validate=validate, **LOSSES[name]) for name in names
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("torch", *losses)}
    for repeat in range(repeats + 1):  # the first warms up
        for name, loss in {"torch": F.cross_entropy, **losses}.items():
            taken = seconds_of(loss, z, targets, clock)
            print(f"{n}x{k} {kind} {repeat}/{repeats} {name}: {taken:.3f} s", file=sys.stderr)
            if repeat:
                seconds[name].append(taken)
    base = seconds["torch"]
    return {
        name: {
            "seconds": statistics.median(times),
            "ratio": statistics.median([a / b for a, b in zip(times, base, strict=True)]),
            "fastest": min(times),
            "slowest": max(times),
        }
        for name, times in seconds.items()
    }


def commit() -> str:
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1000000x10", "50000x1000"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, object] = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
        "repeats": args.repeats,
        "clock": args.clock,
        "validate": args.validate,
    }
    for size in args.sizes:
        n, k = (int(part) for part in size.split("x"))
        result[size] = kinds = {}
        for kind in args.targets:
            kinds[kind] = measure(n, k, kind, args.losses, args.repeats, args.clock, args.validate)
            result["load_after"] = os.getloadavg()
            if args.out:
                args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
