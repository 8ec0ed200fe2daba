"""What a second process gains in ``diffcal das index``: seconds of each process, and equal bytes.

    python benchmarks/attribution_processes.py [--rows 1437] [--repeats 2] [--out FILE.json]

Indexes digits with the bundled digits network, started with ``torch.distributed.run`` as ``accelerate
launch`` does, one thread for each process. ``cpu`` is what each process spent on the index itself
(model, features; on the first also the kernel), imports left out. ``speed_up_by_cpu`` is the CPU time
of one process over that of the busiest of several: the speed-up where each has a core of its own.
``speed_up_by_wall`` means something only where ``environment.load`` was below the number of cores less
the processes. ``same_bytes``: whether features and kernel have the same SHA-256 as with one process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1437)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.rows)
        return
    from _environment import environment

    record: dict[str, Any] = {
        "benchmark": "attribution_processes",
        "environment": environment(packages=("accelerate",)),
        "rows": args.rows,
        "repeats": args.repeats,
        "results": {},
    }
    runs: dict[int, list[dict[str, Any]]] = {count: [] for count in args.processes}
    for _ in range(args.repeats):
        for count in args.processes:
            runs[count].append(launch(count, args.rows))
    first = args.processes[0]
    for count, found in runs.items():
        busiest = [max(one["cpu"]) for one in found]
        record["results"][str(count)] = {
            "cpu": [one["cpu"] for one in found],
            "wall": [one["wall"] for one in found],
            "speed_up_by_cpu": statistics.median(
                max(one["cpu"]) / most for one, most in zip(runs[first], busiest, strict=True)
            ),
            "speed_up_by_wall": statistics.median(
                one["wall"] / other["wall"] for one, other in zip(runs[first], found, strict=True)
            ),
            "same_bytes": all(one["bytes"] == runs[first][0]["bytes"] for one in found),
        }
    record["load_after"] = round(os.getloadavg()[0], 2)
    args.out.write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    sys.stdout.write(json.dumps(record, indent=2) + "\n")


def launch(count: int, rows: int) -> dict[str, Any]:
    """CPU seconds of each process, wall seconds of the slowest, and hashes of what was written."""
    from diffcal.core.runs import sha256_file

    variables = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DIFFCAL_PROGRESS": "0",
        "ACCELERATE_USE_CPU": "true",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={count}", __file__, "--rows", str(rows), "--worker", name]
        subprocess.run(command, env=variables, check=True, stdout=subprocess.DEVNULL)
        parts = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("cpu-*.json"))]
        index = folder / "index"
        files = [*(index / "features").glob("*.safetensors"), index / "kernel.safetensors"]
        return {
            "cpu": [round(part["cpu"], 3) for part in parts],
            "wall": round(max(part["wall"] for part in parts), 3),
            "bytes": {path.name: sha256_file(path) for path in files},
        }


def work(folder: Path, rows: int) -> None:
    """One process of the index."""
    import accelerate  # noqa: F401  (loaded by the index itself, and no part of what is measured)

    from diffcal.data.sources import open_images
    from diffcal.workflows import das

    open_images("digits")
    config = das.das_config(
        "digits",
        [
            f"data.rows={rows}",
            "features.functional=mean",
            "features.combine=mean",
            "features.timesteps=[100,400]",
            "features.projection.dim=512",
            "store.shard_rows=24",
        ],
    )
    wall, cpu = time.perf_counter(), time.process_time()
    das.index(config, folder / "index", device="cpu")
    spent = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    path = folder / f"cpu-{os.environ.get('RANK', '0')}.json"
    path.write_text(json.dumps(spent), "utf-8")


if __name__ == "__main__":
    main()
