"""Speed and memory of calibration metrics beside torchmetrics and netcal, in one run.

    python benchmarks/metrics_speed.py [--sizes 1000000x10 50000x1000] [--repeats 3] [--out FILE.json]

From float32 logits and hard labels. Every timing runs in a process of its own that first makes the
data and warms up on a thousand rows; the peers get what they take (torchmetrics the logits; netcal
probabilities, whose softmax is not counted). ``same_*`` compares the measures that a peer has:
torchmetrics accuracy, ECE, RMSCE and MCE; netcal ECE, equal-mass ECE, MCE and average error
(its MMCE is left out: the kernel matrix of a million examples needs 8 TB). ``summary`` is all
that ``calibration_summary`` returns. Peak memory is the growth of the process's resident set over the
inputs while measuring, as a multiple of the logits; for netcal the float32 probabilities count as
inputs too.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

TASKS = (
    "ours_same_torchmetrics",
    "torchmetrics",
    "ours_same_netcal",
    "netcal",
    "ours_summary",
    "ours_intervals",
)


def make_data(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, k, generator=generator) * (2.0 if k <= 100 else 3.0)
    labels = torch.empty(n, dtype=torch.int64)
    for rows in torch.arange(n).split(10_000):  # labels of a model 1.5 times over-confident
        p = (logits[rows] / 1.5).softmax(1)
        labels[rows] = torch.multinomial(p, 1, generator=generator)[:, 0]
    return logits, labels


def ours(names: tuple[str, ...]) -> Callable[[torch.Tensor, torch.Tensor], dict[str, float]]:
    from diffcal.calibration.metrics.summary import evaluate

    return lambda z, y: evaluate(logits=z, labels=y, measures=names).values_only


def task_function(name: str) -> Callable[[torch.Tensor, torch.Tensor], dict[str, float]]:
    if name == "ours_same_torchmetrics":
        return ours(("accuracy", "ece", "rmsce", "mce"))
    if name == "ours_same_netcal":
        return ours(("ece", "ece_mass", "mce", "average_ce"))
    if name == "ours_summary":
        from diffcal.calibration.metrics.summary import calibration_summary

        return lambda z, y: calibration_summary(logits=z, labels=y)
    if name == "ours_intervals":
        from diffcal.calibration.metrics.summary import evaluate

        names = ("accuracy", "nll", "brier", "ece", "mce", "smece", "ks", "aurc")
        return lambda z, y: {
            key: entry.high or 0.0
            for key, entry in evaluate(logits=z, labels=y, measures=names, n_resamples=1000).items()
        }
    if name == "torchmetrics":
        from torchmetrics.functional.classification import (
            multiclass_accuracy,
            multiclass_calibration_error,
        )

        def peer(z: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
            k = z.shape[1]
            values = {"accuracy": multiclass_accuracy(z, y, k, average="micro")}
            for key, norm in (("ece", "l1"), ("rmsce", "l2"), ("mce", "max")):
                values[key] = multiclass_calibration_error(z, y, k, 15, norm)
            return {key: float(value) for key, value in values.items()}

        return peer
    from netcal.metrics import ACE, ECE, MCE

    def netcal(p: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        probs, labels = p.numpy(), y.numpy()
        return {
            "ece": float(ECE(15).measure(probs, labels)),
            "ece_mass": float(ECE(15, equal_intervals=False).measure(probs, labels)),
            "mce": float(MCE(15).measure(probs, labels)),
            "average_ce": float(ACE(15).measure(probs, labels)),
        }

    return netcal


class PeakMemory:
    """Largest resident set while inside, sampled every two milliseconds."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()


def run_task(name: str, n: int, k: int, repeats: int) -> dict[str, object]:
    warnings.simplefilter("ignore")
    z, y = make_data(n, k)
    if name == "netcal":
        z = z.softmax(1)
    function = task_function(name)
    function(z[:1000], y[:1000])
    with PeakMemory() as memory:
        values = function(z, y)
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function(z, y)
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "peak_bytes": memory.peak - memory.start,
        "peak_over_input": (memory.peak - memory.start) / (z.numel() * z.element_size()),
        "values": values,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1000000x10", "50000x1000"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        n, k = (int(part) for part in args.sizes[0].split("x"))
        print(json.dumps(run_task(args.task, n, k, args.repeats)))
        return
    result: dict[str, object] = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg(),
        "versions": {name: version(name) for name in ("torch", "torchmetrics", "netcal", "numpy")},
        "repeats": args.repeats,
    }
    for size in args.sizes:
        tasks = {}
        for name in TASKS:
            command = [sys.executable, __file__, "--task", name, "--sizes", size]
            command += ["--repeats", str(args.repeats)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            tasks[name] = json.loads(done.stdout.splitlines()[-1])
        seconds = {name: task["seconds"] for name, task in tasks.items()}
        result[size] = {
            "ratios": {
                "torchmetrics_over_ours": seconds["torchmetrics"]
                / seconds["ours_same_torchmetrics"],
                "netcal_over_ours": seconds["netcal"] / seconds["ours_same_netcal"],
                "torchmetrics_over_our_whole_summary": seconds["torchmetrics"]
                / seconds["ours_summary"],
                "netcal_over_our_whole_summary": seconds["netcal"] / seconds["ours_summary"],
            },
            "tasks": tasks,
        }
    result["load_after"] = os.getloadavg()
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
