"""Time of the calibration losses, forward and backward, beside torch's cross-entropy in one run.

    python benchmarks/losses_speed.py [--sizes 1000000x10 50000x1000] [--repeats 3]
        [--losses focal bsce ...] [--targets hard soft mixed] [--out FILE.json]

From float32 logits that require a gradient, mean reduction, targets already checked (as the trainer
calls the losses) unless ``--validate``. Each repeat times cross-entropy and then every loss once, so
that all see the same machine. ``ratio`` is the median over the repeats of a loss's processor time over
the cross-entropy's of its own repeat, ``ratio_clock`` the same by the clock, which other work on the
machine disturbs: for hard labels against ``F.cross_entropy(z, y)``, for soft targets against
``F.cross_entropy(z, q)``. Targets are ``hard``, ``soft`` (all classes have mass) or ``mixed`` (two
classes, as mixed images have). Progress goes to stderr, and ``--out`` is written anew after each kind
of target.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _environment import environment
from torch.nn import functional as F

from diffcal.calibration.losses.registry import build_loss

LOSSES: dict[str, dict[str, object]] = {
    "cross_entropy": {},
    "cross_entropy (smoothing)": {"smoothing": 0.05},
    "squared_error": {},
    "focal": {},
    "flsd": {},
    "adafocal": {},
    "adafocal (moved)": {},
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
"""The losses of one value per row, and the two terms of a batch that cost as little.

Adafocal is timed as it starts, with one gamma, and as training leaves it, with one for each bin.
"""

TARGETS = ["hard", "soft", "mixed"]

Target = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def seconds_of(loss: Target, z: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    z.grad = None
    clock, cpu = time.perf_counter(), time.process_time()
    loss(z, targets).backward()
    return time.perf_counter() - clock, time.process_time() - cpu


def build(name: str, validate: bool) -> Target:
    loss = build_loss(name.split(" ")[0], validate=validate, **LOSSES[name])
    if name == "adafocal (moved)":
        loss.gammas.copy_(torch.linspace(-1.5, 4, len(loss.gammas)))
    return loss


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
    n: int, k: int, kind: str, names: list[str], repeats: int, validate: bool
) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    z = (2 * torch.randn(n, k, generator=generator)).requires_grad_()
    targets = make_targets(kind, n, k, generator)
    losses: dict[str, Target] = {name: build(name, validate) for name in names}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("torch", *losses)}
    for repeat in range(repeats + 1):  # the first warms up
        for name, loss in {"torch": F.cross_entropy, **losses}.items():
            taken = seconds_of(loss, z, targets)
            print(f"{n}x{k} {kind} {repeat}/{repeats} {name}: {taken}", file=sys.stderr)
            if repeat:
                times[name].append(taken)
    base = times["torch"]
    result = {}
    for name, pairs in times.items():
        both = list(zip(pairs, base, strict=True))
        cpu = [own[1] for own in pairs]
        result[name] = {
            "ratio": statistics.median([own[1] / other[1] for own, other in both]),
            "ratio_clock": statistics.median([own[0] / other[0] for own, other in both]),
            "cpu_seconds": statistics.median(cpu),
            "fastest": min(cpu),
            "slowest": max(cpu),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1000000x10", "50000x1000"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result: dict[str, object] = environment()
    result |= {"repeats": args.repeats, "validate": args.validate}
    for size in args.sizes:
        n, k = (int(part) for part in size.split("x"))
        result[size] = kinds = {}
        for kind in args.targets:
            kinds[kind] = measure(n, k, kind, args.losses, args.repeats, args.validate)
            result["load_after"] = round(os.getloadavg()[0], 2)
            if args.out:
                args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
