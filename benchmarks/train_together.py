"""Small networks trained at once against one after another: processor time of a step, member by member.

    python benchmarks/train_together.py [--rounds 5] [--device auto] [--out FILE.json]

Networks: the fully connected and the convolutional one of ``lds_digits.py``, each with 1, 2, 4, 8, 16
members, batch 64 each, AdamW, clipped. ``ratio`` is the time of the stack over that of its members one
after another: below 1 training together is faster. Rounds are interleaved; medians of processor time
(wall time on a GPU).
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _environment import environment
from _lds_digits_models import BATCH, DigitsMlp, DigitsUNet
from torch import Tensor, nn

from diffcal.core.devices import resolve_device
from diffcal.core.runs import write_json
from diffcal.diffusion.module_stack import ModuleStack

NETWORKS: dict[str, Callable[[], nn.Module]] = {"mlp": DigitsMlp, "conv": DigitsUNet}
MEMBERS = (1, 2, 4, 8, 16)


def optimizer_of(module: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, fused=device.type in ("cpu", "cuda"))


def one_by_one(
    networks: list[nn.Module], x: Tensor, t: Tensor, device: torch.device
) -> Callable[[], None]:
    optimizers = [optimizer_of(network, device) for network in networks]

    def step() -> None:
        for network, optimizer, images, times in zip(networks, optimizers, x, t, strict=True):
            network(images, times).square().mean().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def together(
    networks: list[nn.Module], x: Tensor, t: Tensor, device: torch.device
) -> Callable[[], None]:
    stack = ModuleStack(networks).to(device)
    optimizer = optimizer_of(stack, device)

    def step() -> None:
        stack(x, t).square().flatten(1).mean(dim=1).sum().backward()
        stack.clip_gradient_norms_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Callable[[], None], repeats: int, device: torch.device) -> float:
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - started) / repeats


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(resolve_device(arguments.device))
    torch.set_num_threads(1)
    before = environment(device)
    results = []
    for name, make in NETWORKS.items():
        for count in MEMBERS:
            networks = [make().to(device) for _ in range(count)]
            x = torch.randn(count, BATCH, 1, 8, 8, device=device)
            t = torch.randint(1000, (count, BATCH), device=device)
            ways = {"apart": one_by_one, "together": together}
            steps = {way: start(networks, x, t, device) for way, start in ways.items()}
            repeats = max(2, (64 if name == "mlp" else 16) // count)
            times: dict[str, list[float]] = {way: [] for way in ways}
            for round_ in range(arguments.rounds + 1):
                for way, step in steps.items():
                    spent = timed(step, repeats, device)
                    if round_:  # the first warms up
                        times[way].append(1e3 * spent / count)
            found = {way: round(median(values), 3) for way, values in times.items()}
            pairs = zip(times["together"], times["apart"], strict=True)
            ratio = round(median(a / b for a, b in pairs), 3)
            results.append(
                {
                    "network": name,
                    "members": count,
                    "ms_per_member_step": found,
                    "ratio": ratio,
                }
            )
    return {**before, "rounds": arguments.rounds, "batch": BATCH, "results": results}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    write_json(options.out, run(options))
