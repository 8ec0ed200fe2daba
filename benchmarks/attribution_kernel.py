"""Seconds and memory to fit the kernel and to score at 27 dampings with leverage.

    python benchmarks/attribution_kernel.py [--rows 5000] [--dim 4096] [--queries 1000] [--out FILE.json]

Features are stored as float16 in shards and read back through memory maps, as after featurising. The
features have a common direction that holds most of the trace, as those with shared noise do.
``kernel`` reads the store, accumulates K (or G), factorises, and scores every query at every damping
with exact leverage, block by block, keeping predicted losses of 64 subsets and the ten best rows of
each query. ``inverses`` is the published way on the same features: one explicit inverse for each
damping, and the leverage from it; it is timed at ``--inverse-dampings`` of them and scaled up. Peak
memory is the growth of the resident set in a process of its own; ``memory`` repeats ``kernel`` at one
damping with 1, 2 and 4 times as many rows. ``cpu`` counts processor seconds over all threads: on a
machine that does other work (``environment.load``) they mean more than seconds on the clock.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _environment import environment
from _peak_memory import PeakMemory

from diffcal.attribution.damping_selection import OFFICIAL_DAMPINGS
from diffcal.attribution.feature_store import FeatureStore
from diffcal.attribution.kernel import fit_kernel
from diffcal.attribution.lds import stream_predictions
from diffcal.attribution.scores import ScoreBlock, score_path
from diffcal.attribution.subsets import subset_masks
from diffcal.attribution.topk import TopScores

SHARD_ROWS = 1024


def features(rows: int, dim: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(dim, generator=torch.Generator().manual_seed(7))
    decay = torch.arange(1, dim + 1) ** -0.5
    return (6 * common + torch.randn(rows, dim, generator=generator) * decay * 40) / dim


def write_store(folder: Path, rows: int, dim: int) -> None:
    store = FeatureStore.create(folder, spec={"rows": rows}, dim=dim, dtype="float16")
    for index, start in enumerate(range(0, rows, SHARD_ROWS)):
        ids = list(range(start, min(start + SHARD_ROWS, rows)))
        store.write(index, ids, features(len(ids), dim, index))


def relative_grid(kernel) -> list[float]:
    """27 dampings over as many decades as the published ones, around the relative default."""
    middle = OFFICIAL_DAMPINGS[len(OFFICIAL_DAMPINGS) // 2]
    return [kernel.damping(0.1) * value / middle for value in OFFICIAL_DAMPINGS]


def run_kernel(folder: Path, queries: int, count: int) -> dict[str, float]:
    store = FeatureStore.open(folder)
    query = features(queries, store.dim, 999)
    masks = subset_masks(len(store), 64, seed=0)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    kernel = fit_kernel(store)
    fitted, cpu_fitted = time.perf_counter(), time.process_time()
    dampings = relative_grid(kernel)[:: max(1, 27 // count)][:count]
    tops = [TopScores(10) for _ in dampings]
    totals: list[torch.Tensor | None] = [None] * len(dampings)
    for start, values in score_path(kernel, query, store, dampings, leverage=True):
        part = masks[:, start : start + values.shape[2]]
        for index, (top, scores) in enumerate(zip(tops, values, strict=True)):
            top.update(ScoreBlock(start, scores))
            more = stream_predictions([ScoreBlock(0, scores)], part)
            before = totals[index]
            totals[index] = more if before is None else before + more
    end, cpu_end = time.perf_counter(), time.process_time()
    return {
        "fit": fitted - begin,
        "score": end - fitted,
        "seconds": end - begin,
        "cpu_fit": cpu_fitted - cpu_begin,
        "cpu_score": cpu_end - cpu_fitted,
        "cpu": cpu_end - cpu_begin,
        "checksum": float(sum(top.values.double().sum() for top in tops)),
        "dampings": len(dampings),
    }


def run_inverses(folder: Path, queries: int, count: int) -> dict[str, float]:
    store = FeatureStore.open(folder)
    query = features(queries, store.dim, 999).double()
    begin, cpu_begin = time.perf_counter(), time.process_time()
    rows = store.rows().double()
    gram = rows.mT @ rows
    middle = OFFICIAL_DAMPINGS[len(OFFICIAL_DAMPINGS) // 2]
    base = 0.1 * float(gram.trace()) / len(rows) / middle
    ready, cpu_ready = time.perf_counter(), time.process_time()
    worst = 0.0
    for value in OFFICIAL_DAMPINGS[len(OFFICIAL_DAMPINGS) // 2 :][:count]:
        inverse = torch.linalg.inv(gram + base * value * torch.eye(len(gram), dtype=gram.dtype))
        spread = rows @ inverse
        h = (spread * rows).sum(dim=1)
        scores = (query @ spread.mT / (1 - h)).square()
        worst = max(worst, float(scores.max()))
    end, cpu_end = time.perf_counter(), time.process_time()
    return {
        "gram": ready - begin,
        "each_damping": (end - ready) / count,
        "seconds_for_27": ready - begin + 27 / count * (end - ready),
        "cpu_for_27": cpu_ready - cpu_begin + 27 / count * (cpu_end - cpu_ready),
        "largest": worst,
    }


def run_task(name: str, folder: Path, queries: int, count: int) -> dict[str, float]:
    torch.linalg.eigh(
        torch.eye(64, dtype=torch.float64)
    )  # loads LAPACK before anything is measured
    with PeakMemory() as memory:
        result = (run_kernel if name == "kernel" else run_inverses)(folder, queries, count)
    result["peak_bytes"] = memory.peak - memory.start
    return result


def in_process(name: str, folder: Path, queries: int, count: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--task", name, "--store", str(folder)]
    command += ["--queries", str(queries), "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--inverse-dampings", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--task", choices=("kernel", "inverses"), help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, default=27, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(run_task(args.task, args.store, args.queries, args.count)))
        return
    result: dict[str, object] = {
        "environment": environment(packages=("safetensors",)),
        "rows": args.rows,
        "dim": args.dim,
        "queries": args.queries,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_store(path / "main", args.rows, args.dim)
        kernel = in_process("kernel", path / "main", args.queries, 27)
        inverses = in_process("inverses", path / "main", args.queries, args.inverse_dampings)
        result["kernel"] = kernel
        result["inverses"] = inverses
        result["ratios"] = {
            "inverses_over_kernel": inverses["seconds_for_27"] / kernel["seconds"],
            "inverses_over_kernel_cpu": inverses["cpu_for_27"] / kernel["cpu"],
        }
        memory = {}
        small = max(64, args.dim // 8)
        for factor in (1, 2, 4):
            store = path / f"times-{factor}"
            write_store(store, args.rows * factor, small)
            task = in_process("kernel", store, 100, 1)
            memory[str(args.rows * factor)] = {"peak_bytes": task["peak_bytes"], "dim": small}
        result["memory"] = memory
    result["load_after"] = round(os.getloadavg()[0], 2)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
