"""Speed of a classifier's training step: formats on this machine, and the trainer's overhead.

    python benchmarks/classifier_step.py [--model resnet20] [--steps 12] [--out step.json]

For each format (memory layout, precision, compilation) the median seconds of a bare step (forward,
cross-entropy, backward, SGD on a batch that is already there) and, in turn with it in the same
run, of the trainer's step on the same real images (order, augmentation, normalisation, clipping,
schedule, bookkeeping). Steps alternate, so that a busy machine slows both alike. ``network_share``
is the part of the trainer's own time that goes into forward, backward and optimiser, measured in
one run and so free of the noise between two.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from diffcal.calibration.training import ClassifierTrainer
from diffcal.calibration.training_config import ClassifierConfig
from diffcal.calibration.training_data import LabelledImages, TrainingData
from diffcal.models.registry import build_classifier


def bare_step(config: ClassifierConfig, size: int, device: torch.device) -> Callable[[], None]:
    model = build_classifier(config.model, 10, 3, size).to(device).train()
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    fused = device.type in ("cpu", "cuda")
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=fused
    )
    forward = torch.compile(model) if config.compile else model
    x = torch.randn(config.batch_size, 3, size, size, device=device)
    if config.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = torch.arange(config.batch_size, device=device) % 10

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits = forward(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _time_inside(trainer: ClassifierTrainer, total: list[float]) -> None:
    def timed(function: Callable[..., None]) -> Callable[..., None]:
        def run(*args: object, **kwargs: object) -> None:
            begin = time.perf_counter()
            function(*args, **kwargs)
            total[0] += time.perf_counter() - begin

        return run

    trainer._forward_backward = timed(trainer._forward_backward)
    trainer.optimizer.step = timed(trainer.optimizer.step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--formats", nargs="+", default=["plain", "last", "bf16", "bf16-last"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    accelerator = Accelerator(cpu=args.device == "cpu")
    device = accelerator.device
    generator = torch.Generator().manual_seed(0)
    shape = (max(2048, 4 * args.batch), args.size, args.size, 3)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    train = LabelledImages(images, torch.arange(len(images)) % 10)
    data = TrainingData(train, tuple("0123456789"))
    results = {}
    for name in args.formats:
        config = replace(
            ClassifierConfig(model=args.model, batch_size=args.batch),
            channels_last="last" in name,
            precision="bf16" if "bf16" in name else "float32",
            compile="compile" in name,
        )
        torch.manual_seed(0)
        bare = bare_step(config, args.size, device)
        trainer = ClassifierTrainer(
            build_classifier(args.model, 10, 3, args.size), data, config, accelerator
        )
        inside = [0.0]
        _time_inside(trainer, inside)
        times: dict[str, list[float]] = {"bare": [], "trainer": []}
        for turn in range(args.steps + 3):
            if turn == 3:
                inside[0] = 0.0
            for kind, step in (("bare", bare), ("trainer", trainer.train_step)):
                begin = time.perf_counter()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn >= 3:
                    times[kind].append(time.perf_counter() - begin)
        medians = {kind: statistics.median(values) for kind, values in times.items()}
        results[name] = {
            "bare_s": round(medians["bare"], 5),
            "trainer_s": round(medians["trainer"], 5),
            "trainer_over_bare": round(medians["trainer"] / medians["bare"], 4),
            "network_share": round(inside[0] / sum(times["trainer"]), 4),
            "quartiles_bare_s": [round(q, 5) for q in statistics.quantiles(times["bare"])],
            "images_per_s": round(args.batch / medians["trainer"], 1),
        }
    report = {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "torch": torch.__version__,
        "model": args.model,
        "batch": args.batch,
        "size": args.size,
        "steps": args.steps,
        "formats": results,
    }
    text = json.dumps(report, indent=2)
    if args.out:
        args.out.write_text(text + "\n")
    else:
        import sys

        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
