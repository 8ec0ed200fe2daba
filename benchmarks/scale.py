"""What generation and attribution cost: against images, parameters and processes.

    python benchmarks/scale.py            # a few CPU minutes; writes scale.json

Random EDM networks of three widths on 8 x 8 images draw mixed images (``csm generate``: 13 evaluations
each) and are indexed (``das index``: gradients at one timestep, kernel included). CPU seconds of one
thread; imports and loading are not counted. Cost model: ``seconds = a + N (b + c P)`` with N images and
P parameters, fitted on all cells of a table but those with the most images, and checked on these. (A
first run without ``a`` missed the largest index by half: at these sizes what is done once counts.)
Then the same images are drawn by one and by two processes (torchrun): CPU seconds of each, and
wall-clock time beside the load of the machine, without which it means nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _environment import environment

from diffcal.diffusion.edm_denoiser import EDMDenoiser
from diffcal.diffusion.edm_networks import build_network
from diffcal.diffusion.samplers import SamplerConfig, evaluations
from diffcal.mixing.generation import GenerationConfig
from diffcal.mixing.plan import PlanConfig
from diffcal.workflows import das
from diffcal.workflows.generate import GenerateConfig, generate

WIDTHS = (16, 24, 40)
CELLS = ((16, 1), (16, 2), (24, 1), (24, 2), (40, 1), (40, 2), (24, 6))  # (width, blocks of images)
CSM_BLOCK, DAS_BLOCK = 128, 96  # images of one block
SAMPLER = SamplerConfig(preset="fast")
PROCESS_IMAGES = 512


def network(width: int) -> EDMDenoiser:
    """A network with random weights; what it draws does not matter here."""
    torch.manual_seed(0)
    kwargs = {
        "img_resolution": 8,
        "img_channels": 1,
        "label_dim": 10,
        "model_type": "SongUNet",
        "model_channels": width,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
        "dropout": 0.0,
        "label_dropout": 0.1,
    }
    return EDMDenoiser(build_network({"preconditioner": "EDMPrecond", "kwargs": kwargs}))


def csm(denoiser: EDMDenoiser, images: int, folder: Path) -> None:
    """Generate, in two shards."""
    groups = images // 8
    config = GenerateConfig(
        plan=PlanConfig(groups=groups, members=8),
        generation=GenerationConfig(sampler=SAMPLER),
        groups_per_shard=groups // 2,
    )
    generate(config, folder, denoiser=denoiser, device="cpu")


def attribution(denoiser: EDMDenoiser, images: int, folder: Path) -> None:
    """Index training images."""
    settings = [f"data.rows={images}", "features.timesteps=[500]", "features.projection.dim=512"]
    das.index(das.das_config("das-mean", settings), folder, denoiser=denoiser, device="cpu")


def seconds_of(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def table(work: Callable[..., None], block: int, folder: Path) -> list[dict[str, Any]]:
    """CPU seconds of every cell."""
    rows = []
    for width, blocks in CELLS:
        denoiser = network(width)
        images = blocks * block
        place = folder / f"{work.__name__}-{width}-{images}"
        cost = seconds_of(lambda: work(denoiser, images, place))  # noqa: B023 - called at once
        rows.append(
            {
                "images": images,
                "parameters": sum(p.numel() for p in denoiser.module.parameters()),
                "cpu_seconds": round(cost, 3),
            }
        )
        sys.stderr.write(f"{work.__name__}: {rows[-1]}\n")
    return rows


def fitted(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The cost model without the cells of the most images, and what it says about these."""
    most = max(row["images"] for row in rows)

    def features(row: dict[str, Any]) -> list[float]:
        return [1.0, row["images"], row["images"] * row["parameters"]]

    known = [row for row in rows if row["images"] < most]
    # Relative errors count, so that small cells are not drowned by large ones.
    scale = np.array([1 / row["cpu_seconds"] for row in known])
    matrix = np.array([features(row) for row in known]) * scale[:, None]
    (a, b, c), *_ = np.linalg.lstsq(matrix, np.ones(len(known)), rcond=None)
    checked = []
    for row in rows:
        guess = float(np.dot(features(row), (a, b, c)))
        checked.append(
            {
                **row,
                "predicted": round(guess, 3),
                "relative_error": round(guess / row["cpu_seconds"] - 1, 3),
                "fitted_on": row["images"] < most,
            }
        )
    return {
        "seconds_once": float(a),
        "seconds_per_image": float(b),
        "seconds_per_image_and_million_parameters": float(c) * 1e6,
        "cells": checked,
    }


def worker(folder: Path) -> None:
    """One process of a launch: generate its shards, and say what that cost."""
    denoiser = network(WIDTHS[1])
    started = time.monotonic()
    cpu = seconds_of(lambda: csm(denoiser, PROCESS_IMAGES, folder / "run"))
    record = {"cpu_seconds": round(cpu, 3), "wall_seconds": round(time.monotonic() - started, 3)}
    (folder / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(record), "utf-8")


def launched(processes: int, folder: Path) -> dict[str, Any]:
    """The same images by some processes."""
    folder.mkdir()
    load = os.getloadavg()[0]
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={processes}", __file__, "--worker", str(folder)),
        ],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        check=True,
    )
    ranks = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("rank-*.json"))]
    return {
        "processes": processes,
        "images": PROCESS_IMAGES,
        "cpu_seconds": [rank["cpu_seconds"] for rank in ranks],
        "cpu_seconds_in_all": round(sum(rank["cpu_seconds"] for rank in ranks), 3),
        "wall_seconds": max(rank["wall_seconds"] for rank in ranks),
        "load_before": round(load, 1),
    }


def main() -> None:
    """Measure, fit, check, and write the result."""
    parser = argparse.ArgumentParser(description="Cost against images, parameters, processes.")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    os.environ["DIFFCAL_PROGRESS"] = "0"
    torch.set_num_threads(1)
    if args.worker is not None:
        worker(args.worker)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        csm(network(WIDTHS[0]), 16, folder / "warm-csm")
        attribution(network(WIDTHS[0]), 16, folder / "warm-das")
        results = {
            "csm_generate": {
                "evaluations_per_image": evaluations(SAMPLER),
                **fitted(table(csm, CSM_BLOCK, folder)),
            },
            "das_index": fitted(table(attribution, DAS_BLOCK, folder)),
            "processes": [launched(count, folder / f"launch-{count}") for count in (1, 2)],
        }
    data = {"results": results, "environment": environment()}
    args.out.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
