"""Processor time to sketch a batch of gradients, for every projection and for ways to write an SJLT.

    python benchmarks/attribution_projection.py [--params 4000000] [--rows 4] [--dim 4096] [--out FILE]

Nanoseconds of processor time for one entry of the gradient matrix, median of ``--repeats`` after one
call that draws what is kept (its cost for one coordinate is ``first_ns``). Dense projections run on
a slab of the coordinates, since their cost is the same for every coordinate. ``sjlt_ways`` does the
same signed bucket sums with other operations of torch; ``scatter`` is what diffcal uses.
"""

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from diffcal.attribution.projection import ProjectionConfig
from diffcal.attribution.projection_sjlt import SJLT, bucket_sums
from diffcal.attribution.projectors import make_projector

DENSE_SLAB = 1024


def cpu_time(function: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        begin = time.process_time()
        function()
        seconds.append(time.process_time() - begin)
    return statistics.median(seconds)


def projections(x: Tensor, dim: int, repeats: int) -> dict[str, dict[str, float]]:
    params = x.shape[1]
    side = int(params**0.5)
    shapes = [(side, side), (params - side * side,)]
    found = {}
    for name, config in {
        "sjlt": ProjectionConfig(kind="sjlt", dim=dim),
        "sjlt_4": ProjectionConfig(kind="sjlt", dim=dim, nonzeros=4),
        "mask": ProjectionConfig(kind="mask", dim=dim),
        "mask_sjlt": ProjectionConfig(kind="mask_sjlt", dim=dim),
        "factorised_64": ProjectionConfig(kind="factorised"),
        "gaussian": ProjectionConfig(kind="gaussian", dim=dim),
        "rademacher": ProjectionConfig(kind="rademacher", dim=dim),
    }.items():
        block = x[:, :DENSE_SLAB] if name in ("gaussian", "rademacher") else x
        begin = time.process_time()
        projector = make_projector(config, shapes)
        projector.project(block)
        first = time.process_time() - begin
        if name in ("gaussian", "rademacher"):
            projector._kept.clear()  # at real sizes the matrix is drawn again for every batch
        seconds = cpu_time(
            lambda p=projector, b=block: p.project(b), 1 if block is not x else repeats
        )
        found[name] = {
            "ns_per_entry": seconds / block.numel() * 1e9,
            "first_ns": first / block.shape[1] * 1e9,
        }
    return found


def sjlt_ways(x: Tensor, dim: int, repeats: int) -> dict[str, float]:
    rows, params = x.shape
    slots = SJLT(params, dim).buckets(0, params).long()
    index, sign = slots % dim, 1.0 - 2.0 * (slots >= dim)
    order = torch.argsort(slots, stable=True)
    starts = torch.bincount(slots, minlength=2 * dim).cumsum(0).roll(1)
    starts[0] = 0
    by_bucket = torch.argsort(index, stable=True)
    crow = torch.zeros(dim + 1, dtype=torch.int64)
    crow[1:] = torch.bincount(index, minlength=dim).cumsum(0)
    warnings.simplefilter("ignore")
    matrix = torch.sparse_csr_tensor(crow, by_bucket, sign[by_bucket], (dim, params))

    def signed(wide: Tensor) -> Tensor:
        return wide[:, :dim] - wide[:, dim:]

    def bags() -> Tensor:
        columns = x.T.contiguous()
        return signed(torch.nn.functional.embedding_bag(order, columns, starts, mode="sum").T)

    def counts() -> Tensor:
        sums = [torch.bincount(slots, weights=row, minlength=2 * dim) for row in x]
        return signed(torch.stack(sums)).float()

    ways: dict[str, Callable[[], Tensor]] = {
        "scatter": lambda: bucket_sums(x, slots, dim),
        "index_add": lambda: torch.zeros(rows, dim).index_add_(1, index, x * sign),
        "bincount": counts,
        "embedding_bag": bags,
        "sparse_csr": lambda: (matrix @ x.T).T,
    }
    reference = ways["scatter"]()
    found = {}
    for name, way in ways.items():
        torch.testing.assert_close(way(), reference, rtol=1e-3, atol=1e-2)
        found[name] = cpu_time(way, repeats) / x.numel() * 1e9
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=int, default=4_000_000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    x = torch.randn(args.rows, args.params, generator=torch.Generator().manual_seed(0))
    result = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg(),
        "versions": {"torch": version("torch")},
        "params": args.params,
        "rows": args.rows,
        "dim": args.dim,
        "repeats": args.repeats,
        "projections": projections(x, args.dim, args.repeats),
        "sjlt_ways_ns_per_entry": sjlt_ways(x, args.dim, args.repeats),
        "load_after": os.getloadavg(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
