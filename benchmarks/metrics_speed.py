"""Speed and memory of calibration metrics beside torchmetrics and netcal, in one run.

    python benchmarks/metrics_speed.py [--sizes 1000000x10 50000x1000] [--repeats 5] [--out FILE.json]

Hard labels and float32 logits, of a model 1.5 times over-confident. Measures are those that a peer
has: of torchmetrics accuracy, ECE, RMSCE and MCE, from logits; of netcal ECE, MCE and average error
(its ACE), each over 15 bins of equal width and of equal mass. netcal takes probabilities only, so
that it is compared twice: both from ready probabilities, and both from logits, with a softmax counted
for netcal. Its MMCE is left out, whose kernel matrix of 50,000 examples needs 20 GB. ``summary`` is
all that ``calibration_summary`` returns.

Every task is timed once in each repeat, in turn, in one process, so that a change of the machine's
load meets all of them; ``seconds`` are medians by the clock, ``cpu_seconds`` of processor time, and
ratios are medians of the ratios within a repeat. ``floor_read`` is the largest and smallest logit
(reading them once), ``floor_exp`` one float64 exponential of each in blocks that fit the cache, and
``floor_exp_single`` the float32 exponentials that we take of float32 logits, NumPy's or torch's. Peak
memory is the growth of the resident set in the first call at full size, as a multiple of the logits
(``peak_over_input``); logits, labels and the probabilities that are given count as inputs. Each size
has a process of its own.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _environment import environment
from _peak_memory import PeakMemory

from diffcal.calibration.metrics.binned import (
    average_calibration_error,
    expected_calibration_error,
    maximum_calibration_error,
)
from diffcal.calibration.metrics.exponentials import exponentials
from diffcal.calibration.metrics.inputs import Predictions
from diffcal.calibration.metrics.summary import calibration_summary, evaluate

FROM_PROBS = ("ours_as_netcal", "netcal")
RATIOS = {
    "torchmetrics_over_ours": ("torchmetrics", "ours_as_torchmetrics"),
    "torchmetrics_over_our_whole_summary": ("torchmetrics", "ours_summary"),
    "netcal_over_ours_from_probabilities": ("netcal", "ours_as_netcal"),
    "netcal_over_ours_from_logits": ("netcal_from_logits", "ours_as_netcal_from_logits"),
    "netcal_over_our_whole_summary": ("netcal_from_logits", "ours_summary"),
    "ours_over_reading": ("ours_as_torchmetrics", "floor_read"),
    "ours_over_exponentials": ("ours_as_torchmetrics", "floor_exp"),
    "ours_over_single_exponentials": ("ours_as_torchmetrics", "floor_exp_single"),
}
N_BINS = 15

Task = Callable[[torch.Tensor, torch.Tensor], dict[str, float]]


def make_data(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, k, generator=generator) * (2.0 if k <= 100 else 3.0)
    labels = torch.empty(n, dtype=torch.int64)
    for rows in torch.arange(n).split(10_000):  # labels of a model 1.5 times over-confident
        p = (logits[rows] / 1.5).softmax(1)
        labels[rows] = torch.multinomial(p, 1, generator=generator)[:, 0]
    return logits, labels


def ours_as_torchmetrics(z: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    return evaluate(logits=z, labels=y, measures=("accuracy", "ece", "rmsce", "mce")).values_only


def torchmetrics(z: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
    )

    k = z.shape[1]
    values = {"accuracy": float(multiclass_accuracy(z, y, k, average="micro"))}
    for key, norm in (("ece", "l1"), ("rmsce", "l2"), ("mce", "max")):
        values[key] = float(multiclass_calibration_error(z, y, k, N_BINS, norm))
    return values


def as_netcal(made: Predictions) -> dict[str, float]:
    return {
        "ece": expected_calibration_error(made, N_BINS),
        "ece_mass": expected_calibration_error(made, N_BINS, "mass"),
        "average_ce": average_calibration_error(made, N_BINS),
        "average_ce_mass": average_calibration_error(made, N_BINS, "mass"),
        "mce": maximum_calibration_error(made, N_BINS),
        "mce_mass": maximum_calibration_error(made, N_BINS, "mass"),
    }


def netcal(p: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
    from netcal.metrics import ACE, ECE, MCE

    probs, labels = p.numpy(), y.numpy()
    values = {}
    for name, measure in (("ece", ECE), ("average_ce", ACE), ("mce", MCE)):
        values[name] = float(measure(N_BINS).measure(probs, labels))
        made = measure(N_BINS, equal_intervals=False).measure(probs, labels)
        values[f"{name}_mass"] = float(made)
    return values


def floor_exp(z: torch.Tensor, _: torch.Tensor) -> dict[str, float]:
    total = 0.0
    for block in z.flatten().split(1 << 16):
        e = block.numpy().astype(np.float64)
        total += float(np.exp(e, out=e)[0])
    return {"first_of_blocks": total}


def floor_exp_single(z: torch.Tensor, _: torch.Tensor) -> dict[str, float]:
    total, spare = 0.0, np.empty(1 << 17, dtype=np.float32)
    for block in z.flatten().split(len(spare)):
        e = spare[: len(block)]
        exponentials(block.numpy(), e)
        total += float(e[0])
    return {"first_of_blocks": total}


def floor_read(z: torch.Tensor, _: torch.Tensor) -> dict[str, float]:
    low, high = z.aminmax()
    return {"low": float(low), "high": float(high)}


TASKS: dict[str, Task] = {
    "ours_as_torchmetrics": ours_as_torchmetrics,
    "torchmetrics": torchmetrics,
    "ours_as_netcal": lambda p, y: as_netcal(Predictions(probs=p, labels=y, with_scores=False)),
    "netcal": netcal,
    "ours_as_netcal_from_logits": lambda z, y: as_netcal(
        Predictions(logits=z, labels=y, with_scores=False)
    ),
    "netcal_from_logits": lambda z, y: netcal(z.softmax(1), y),
    "ours_summary": lambda z, y: calibration_summary(logits=z, labels=y),
    "floor_read": floor_read,
    "floor_exp": floor_exp,
    "floor_exp_single": floor_exp_single,
}


def trim_heap() -> None:
    """Give freed memory back to the system, where the C library can, so that growth counts from 0."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def run_size(n: int, k: int, repeats: int) -> dict[str, dict[str, Any]]:
    z, y = make_data(n, k)
    p = z.softmax(1)
    result: dict[str, dict[str, Any]] = {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in TASKS}
    for name, task in TASKS.items():
        given = p if name in FROM_PROBS else z
        task(given[:1000], y[:1000])
        trim_heap()
        with PeakMemory() as memory:
            values = task(given, y)
        grown = memory.peak - memory.start
        result[name] = {"values": values, "peak_over_input": grown / (4 * z.numel())}
    for repeat in range(repeats):
        for name, task in TASKS.items():
            given = p if name in FROM_PROBS else z
            clock, cpu = time.perf_counter(), time.process_time()
            task(given, y)
            taken = time.perf_counter() - clock, time.process_time() - cpu
            print(f"{n}x{k} {repeat + 1}/{repeats} {name}: {taken}", file=sys.stderr, flush=True)
            times[name].append(taken)
    for name, pairs in times.items():
        clock, cpu = zip(*pairs, strict=True)
        medians = {"seconds": statistics.median(clock), "cpu_seconds": statistics.median(cpu)}
        result[name] = {**medians, "cpu_each": cpu, **result[name]}
    return result


def ratio(tasks: dict[str, dict[str, Any]], peer: str, own: str) -> dict[str, float]:
    pairs = zip(tasks[peer]["cpu_each"], tasks[own]["cpu_each"], strict=True)
    return {
        "cpu": statistics.median(a / b for a, b in pairs),
        "clock": tasks[peer]["seconds"] / tasks[own]["seconds"],
    }


def child(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1000000x10", "50000x1000"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.one:
        n, k = (int(part) for part in args.sizes[0].split("x"))
        print(json.dumps(run_size(n, k, args.repeats)))
        return
    result = environment(packages=("torchmetrics", "netcal"))
    result["repeats"] = args.repeats
    for size in args.sizes:
        tasks = child("--one", "--sizes", size, "--repeats", str(args.repeats))
        ratios = {name: ratio(tasks, *pair) for name, pair in RATIOS.items()}
        result[size] = {"ratios": ratios, "tasks": tasks}
        result["load_after"] = round(os.getloadavg()[0], 2)
        if args.out:
            args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
