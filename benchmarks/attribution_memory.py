"""Peak memory of ``diffcal das index`` and ``score`` against the number of training images.

    python benchmarks/attribution_memory.py [--sizes 1000 4000 16000] [--out FILE.json]

8x8 images of noise, a tiny network with random weights, one timestep, 256 dimensions, 16 queries and
their 20 first images. Each size runs in a process of its own, which records its largest resident set
(ru_maxrss, MiB) when everything is imported, after the index and after the scores; images are written
by another process. ``store_mib`` is what lies on disk. Peaks should not depend on the number of
images, apart from what each row leaves in memory for good (its id).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = (1_000, 4_000, 16_000)
QUERIES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        write_images(args.one, args.make)
        return
    if args.one:
        sys.stdout.write(json.dumps(run_one(args.one)) + "\n")
        return
    from _environment import environment

    record: dict[str, Any] = {
        "benchmark": "attribution_memory",
        "environment": environment(),
        "results": [],
    }
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--one", folder]
            subprocess.run([*command, "--make", str(size)], check=True)
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = {"images": size, **json.loads(done.stdout.splitlines()[-1])}
        record["results"].append(found)
        sys.stderr.write(json.dumps(found) + "\n")
        args.out.write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def write_images(folder: Path, count: int) -> None:
    """``count`` random grey images in row groups of 500, as the datasets library would store them."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from diffcal.data.images import encode_png

    generator = np.random.default_rng(0)
    schema = pa.schema(
        {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()}), "label": pa.int64()}
    )
    with pq.ParquetWriter(folder / "images.parquet", schema) as writer:
        for start in range(0, count, 500):
            rows = [
                {
                    "image": {
                        "bytes": encode_png(generator.integers(0, 256, (8, 8, 1)).astype(np.uint8)),
                        "path": None,
                    },
                    "label": row % 10,
                }
                for row in range(start, min(start + 500, count))
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def run_one(folder: Path) -> dict[str, float]:
    """Peak MiB at each stage, seconds, and MiB on disk."""
    from _tiny_denoiser import tiny_denoiser

    from diffcal.workflows import das

    denoiser = tiny_denoiser()
    images = folder / "images.parquet"
    config = das.das_config(
        "das-mean",
        [
            f"data.name={images}",
            "features.timesteps=[400]",
            "features.projection.dim=256",
        ],
    )
    stages = {
        "index": lambda: das.index(config, folder / "index", denoiser=denoiser, device="cpu"),
        "score": lambda: das.score(
            folder / "index", images, rows=QUERIES, denoiser=denoiser, device="cpu"
        ),
    }
    result: dict[str, float] = {"imported_peak_mib": round(_peak(), 1)}
    for name, stage in stages.items():
        started = time.process_time()
        stage()
        result[f"{name}_peak_mib"] = round(_peak(), 1)
        result[f"{name}_cpu_seconds"] = round(time.process_time() - started, 1)
    store = (folder / "index" / "features").glob("*.safetensors")
    result["store_mib"] = round(sum(path.stat().st_size for path in store) / 2**20, 2)
    return result


def _peak() -> float:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
