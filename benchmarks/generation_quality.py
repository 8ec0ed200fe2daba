"""What a checkpoint draws: label fidelity, Fréchet distance, ladders, near copies, and their cost.

    python benchmarks/generation_quality.py digits --work FOLDER
    python benchmarks/generation_quality.py cifar10 --data DATA --classifier CLASSIFIER --work FOLDER
        [--checkpoint FOLDER] [--parts N] [--images N] [--groups N] [--device DEVICE]
        [--out FILE.json] [--figure FILE.png]

``DATA`` holds CIFAR-10 as ``train-*.parquet`` and ``test-*.parquet``; ``CLASSIFIER`` is a folder of
``diffcal train-classifier``, trained on rows 0..44999 and independent of the denoiser. For digits one
is trained. What is measured, on which rows and what would count is in ``benchmarks/PROTOCOL.md``.
Writes the JSON, the same as tables beside it (``.md``), and a figure. ``--work`` keeps the drawn images:
stopped at any moment and started again, the command goes on from there, and another checkpoint gets a
folder of its own.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _generation_copies import near_copies
from _generation_figure import draw_figure
from _generation_images import SET_UPS, Bench, SetUp
from _generation_measures import ladders, pure_images, real_images
from _generation_tables import markdown

from diffcal.core.devices import resolve_device
from diffcal.core.runs import read_json, write_json, write_text

ROOT = Path(__file__).parents[1]
FLAGGED = 0.9
"""Share of the positive control that must be flagged."""


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    device = resolve_device(arguments.device)
    before = environment(device)
    set_up = _placed(arguments)
    bench = Bench(set_up, arguments.work, device, arguments.classifier)
    result: dict[str, Any] = {
        "question": "what a checkpoint draws, and what guidance, solver and mixing change about it",
        "environment": before,
        "set_up": arguments.set_up,
        "checkpoint": _card(bench),
        "classifier": bench.classifier.architecture,
        "sizes": {
            "parts": set_up.parts,
            "images": set_up.images,
            "groups": set_up.groups,
            "compared": list(set_up.compared),
        },
    }
    for name, measure in (
        ("real", real_images),
        ("pure", pure_images),
        ("ladders", ladders),
        ("copies", near_copies),
    ):
        started = time.process_time()
        result[name] = measure(bench)
        sys.stderr.write(f"{name}: {time.process_time() - started:.0f} CPU seconds\n")
    result["failed"] = _failures(set_up, result)
    write_json(arguments.out, result)
    write_text(arguments.out.with_suffix(".md"), markdown(result))
    draw_figure(result, bench, arguments.figure)
    return result


def _placed(arguments: argparse.Namespace) -> SetUp:
    """With the files of ``--data`` and the sizes that were asked for."""
    set_up = SET_UPS[arguments.set_up]
    if arguments.set_up == "cifar10":
        if arguments.data is None or arguments.classifier is None:
            raise SystemExit("cifar10 needs --data and --classifier")
        set_up = replace(
            set_up,
            train=(f"{arguments.data}/{set_up.train[0]}", set_up.train[1]),
            held_out=(f"{arguments.data}/{set_up.held_out[0]}", set_up.held_out[1]),
        )
    given = {"parts": arguments.parts, "images": arguments.images, "groups": arguments.groups}
    checkpoint = arguments.checkpoint or str(ROOT / set_up.checkpoint)
    sizes = {name: value for name, value in given.items() if value is not None}
    return replace(set_up, checkpoint=checkpoint, **sizes)


def _card(bench: Bench) -> dict[str, Any]:
    path = Path(bench.set_up.checkpoint) / "config.json"
    training = read_json(path).get("training", {}) if path.exists() else {}
    seen = training.get("images")
    if seen is not None:
        seen += training.get("earlier", {}).get("images", 0)  # of the run that it went on from
    return {
        "name": Path(bench.set_up.checkpoint).name,
        "fingerprint": bench.denoiser.fingerprint,
        "dtype": bench.set_up.dtype,
        "parameters": sum(p.numel() for p in bench.denoiser.module.parameters()),
        "images_seen": seen,
    }


def _failures(set_up: SetUp, result: dict[str, Any]) -> list[str]:
    """What the protocol calls a failure of the experiment."""
    failed = []
    if result["real"]["accuracy"][0] < set_up.accuracy:
        failed.append(f"the classifier's accuracy on held-out images is below {set_up.accuracy:g}")
    if result["copies"]["noisy_training_images"]["near_copy"][0] < FLAGGED:
        failed.append("near copies (likeness and isolation) miss noisy training images")
    if result["copies"]["noisy_training_images"]["alike"][0] < FLAGGED:
        failed.append("likeness alone misses noisy training images")
    return failed


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("set_up", choices=tuple(SET_UPS))
    parser.add_argument("--work", type=Path, required=True, help="drawn images; kept")
    parser.add_argument("--checkpoint", help="folder of the denoiser; the bundled one if not given")
    parser.add_argument("--data", help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--classifier", help="folder of the independent classifier")
    parser.add_argument("--parts", type=int)
    parser.add_argument("--images", type=int, help="pure images in a part")
    parser.add_argument("--groups", type=int, help="ladders of each kind")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args(arguments)
    given.out = given.out or ROOT / f"benchmarks/generation_quality_{given.set_up}.json"
    given.figure = given.figure or ROOT / f"docs/generation-quality-{given.set_up}.png"
    return given


if __name__ == "__main__":
    options = parsed()
    found = main(options)
    print(json.dumps({"out": options.out.name, "failed": found["failed"]}))
