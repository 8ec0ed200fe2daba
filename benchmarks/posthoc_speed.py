"""Application and fit times of post-hoc calibrators beside temperature scaling, in one run.

    python benchmarks/posthoc_speed.py [--sizes 1000000x10 50000x1000] [--repeats 3]
        [--methods temperature consistency_gaussian ...] [--out FILE.json]

From float32 logits and hard labels of a model 1.5 times over-confident. Application: the median of
``--repeats`` calls of ``predict_proba`` on all rows, and the plain ``softmax(z / T)`` of torch;
``cpu_seconds`` is processor time, which says more than the clock on a busy machine. Every method is
timed in turn within each repeat, so that a drift of the machine meets all of them. Fits are on the
first ``--fit-rows`` rows, once. ``ratios`` are application times over those of temperature scaling
(ours), ``ratios_to_torch`` over plain ``softmax(z / T)``, by the clock and by processor time; for exact
Gaussian consistency the aim is 3. Progress goes to stderr, and ``--out`` is written anew after each
size.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _environment import environment

from diffcal.calibration.posthoc.registry import build_calibrator

APPLIED = {
    "temperature": ("temperature", {}),
    "consistency_gaussian": ("consistency", {}),
    "consistency_gumbel": ("consistency", {"noise": "gumbel"}),
    "vector": ("vector", {}),
    "ets": ("ets", {}),
    "cts": ("cts", {}),
    "isotonic": ("isotonic", {"scheme": "top_label"}),
    "histogram": ("histogram", {"scheme": "top_label"}),
}
SMALL = {  # only for few classes: their cost grows faster than the number of logits
    "consistency_uniform": ("consistency", {"noise": "uniform", "criterion": "brier"}),
    "matrix": ("matrix", {}),
    "dirichlet": ("dirichlet", {}),
    "pts": ("pts", {}),
    "bbq": ("bbq", {"scheme": "top_label"}),
    "spline": ("spline", {}),
}


def make_data(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, k, generator=generator) * (2.0 if k <= 100 else 3.0)
    labels = torch.empty(n, dtype=torch.int64)
    for rows in torch.arange(n).split(10_000):
        p = (logits[rows] / 1.5).softmax(1)
        labels[rows] = torch.multinomial(p, 1, generator=generator)[:, 0]
    return logits, labels


def timed(function: Callable[[], object]) -> tuple[float, float]:
    clock, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - clock, time.process_time() - processor


def ratios(applied: dict[str, dict[str, float]], base: str) -> dict[str, dict[str, float]]:
    return {
        label: {
            "clock": entry["seconds"] / applied[base]["seconds"],
            "processor": entry["cpu_seconds"] / applied[base]["cpu_seconds"],
        }
        for label, entry in applied.items()
    }


def run_size(n: int, k: int, repeats: int, fit_rows: int, chosen: list[str]) -> dict[str, object]:
    z, y = make_data(n, k)
    rows = min(fit_rows, n if k <= 100 else fit_rows // 4)
    methods = APPLIED | (SMALL if k <= 100 else {})
    methods = {label: methods[label] for label in chosen if label in methods}
    fits, tasks, fitted = {}, {}, {}
    for label, (name, settings) in methods.items():
        made = build_calibrator(name, {name: settings})
        seconds, cpu = timed(lambda made=made: made.fit(z[:rows], y[:rows]))
        print(f"{n}x{k} {label}: fitted in {seconds:.2f} s", file=sys.stderr)
        fits[label] = {"seconds": seconds, "cpu_seconds": cpu}
        fitted[label] = made
        made.predict_proba(z[:1000])
        tasks[label] = lambda made=made: made.predict_proba(z)
    t = float(fitted["temperature"].temperature_)
    tasks["torch_softmax"] = lambda: torch.softmax(z / t, dim=1)
    times: dict[str, list[tuple[float, float]]] = {label: [] for label in tasks}
    for repeat in range(repeats):
        for label, task in tasks.items():
            times[label].append(timed(task))
            print(f"{n}x{k} {repeat + 1}/{repeats} {label}: {times[label][-1]}", file=sys.stderr)
    applied = {}
    for label, values in times.items():
        clock, cpu = zip(*values, strict=True)
        applied[label] = {
            "seconds": statistics.median(clock),
            "fastest": min(clock),
            "slowest": max(clock),
            "cpu_seconds": statistics.median(cpu),
        }
    exact = fitted["consistency_gaussian"]
    some = z[: min(n, 2000)]
    reference = exact.predict_proba(some.double())
    return {
        "fit_rows": rows,
        "ratios": ratios(applied, "temperature"),
        "ratios_to_torch": ratios(applied, "torch_softmax"),
        "consistency_float32_error": float((exact.predict_proba(some) - reference).abs().max()),
        "apply": applied,
        "fit": fits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["1000000x10", "50000x1000"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fit-rows", type=int, default=10_000)
    known = list(APPLIED | SMALL)
    parser.add_argument("--methods", nargs="+", choices=known, default=known)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    chosen = list(dict.fromkeys(["temperature", "consistency_gaussian", *args.methods]))
    result: dict[str, object] = environment(packages=("scikit-learn", "scipy"))
    result["repeats"] = args.repeats
    for size in args.sizes:
        n, k = (int(part) for part in size.split("x"))
        result[size] = run_size(n, k, args.repeats, args.fit_rows, chosen)
        result["load_after"] = round(os.getloadavg()[0], 2)
        result["peak_resident_kib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if args.out:
            args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
