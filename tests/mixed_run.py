"""A run folder fabricated from real digits: groups of blends with plausible annotations."""

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

from diffcal.data.images import encode_png

NAMES = tuple("0123456789")


@functools.cache
def blended_digits(groups, members=5, seed=0):
    """``(columns, annotation)``: lists of one entry per image, as the stages write them.

    Shared between tests: read only.
    """
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16))
    rng = np.random.default_rng(seed)
    pairs = [(a, b) for a in range(10) for b in range(a + 1, 10)]
    columns = {name: [] for name in ("id", "group", "member", "classes", "weights", "seed")}
    columns |= {name: [] for name in ("image", "height", "width")}
    names = ("soft_label", "lambda_hat", "residual", "third_mass", "group_spearman")
    annotation = {name: [] for name in ("id", "annotator", *names, "endpoint_ok", "nearest_cosine")}
    for group in range(groups):
        a, b = pairs[(7 * group) % len(pairs)]
        ends = [pixels[rng.choice(np.flatnonzero(digits.target == label))] for label in (a, b)]
        spearman = float(rng.uniform(0.5, 1))
        for member in range(members):
            weight = float(np.float32(member / (members - 1)))
            image = (weight * ends[0] + (1 - weight) * ends[1]).round().astype(np.uint8)
            number = group * members + member
            estimate = weight + float(rng.normal(0, 0.08))
            soft = np.full(10, 0.04 / 10)
            share = 1 / (1 + np.exp(-6 * (estimate - 0.5)))
            soft[a] += 0.96 * share
            soft[b] += 0.96 * (1 - share)
            name = f"{number:09d}.png"
            values = (number, group, member, [a, b], [weight, 1 - weight], 1000 + group)
            for key, value in zip(columns, values, strict=False):
                columns[key].append(value)
            columns["image"].append({"bytes": encode_png(image[:, :, None]), "path": name})
            columns["height"].append(8)
            columns["width"].append(8)
            annotation["id"].append(number)
            annotation["annotator"].append("blend")
            annotation["soft_label"].append((soft / soft.sum()).astype(np.float32).tolist())
            annotation["lambda_hat"].append(estimate)
            annotation["residual"].append(float(rng.uniform(0.2, 1.2)))
            annotation["third_mass"].append(0.032)
            annotation["group_spearman"].append(spearman)
            pure = member in (0, members - 1)
            annotation["endpoint_ok"].append(bool(rng.random() < 0.9) if pure else None)
            annotation["nearest_cosine"].append(None if group % 2 else float(rng.uniform(0, 1)))
    return columns, annotation


def make_run(folder, groups=12, members=5, groups_per_shard=4, seed=0):
    """``folder`` as generation and annotation leave it: ``generated`` and ``annotations/blend``."""
    columns, annotation = blended_digits(groups, members, seed)
    types = {
        "id": pa.int64(),
        "group": pa.int64(),
        "member": pa.int32(),
        "classes": pa.list_(pa.int32()),
        "weights": pa.list_(pa.float32()),
        "seed": pa.int64(),
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "height": pa.int32(),
        "width": pa.int32(),
    }
    quality = ("lambda_hat", "residual", "third_mass", "group_spearman", "nearest_cosine")
    annotated = {"id": pa.int64(), "annotator": pa.string(), "endpoint_ok": pa.bool_()}
    annotated |= {"soft_label": pa.list_(pa.float32(), 10)} | dict.fromkeys(quality, pa.float32())
    rows = groups_per_shard * members
    generated = _write(folder / "generated", columns, types, rows)
    labels = _write(folder / "annotations" / "blend", annotation, annotated, rows)
    _manifest(
        folder / "generated",
        format="diffcal-generated/1",
        class_names=list(NAMES),
        channels=1,
        groups=groups,
        members=members,
        config={"plan": {"groups": groups, "members": members}, "seed": seed},
        denoiser="0" * 64,
        versions={"diffcal": "0.1.0"},
        shards=generated,
    )
    _manifest(
        folder / "annotations" / "blend",
        format="diffcal-annotations/1",
        annotator="blend",
        encoder={"name": "pixels"},
        report={},
        shards=labels,
    )
    return folder


def sign(folder):
    """Bring a manifest's hashes up to date with files that a test has changed."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for entry in manifest["shards"]:
        file = folder / entry["file"]
        entry["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        entry["rows"] = pq.ParquetFile(file).metadata.num_rows
    path.write_text(json.dumps(manifest))


def _write(folder, columns, types, rows):
    folder.mkdir(parents=True)
    table = pa.table({name: pa.array(columns[name], kind) for name, kind in types.items()})
    shards = []
    for number, start in enumerate(range(0, len(table), rows)):
        path = folder / f"shard-{number:05d}.parquet"
        part = table.slice(start, rows)
        pq.write_table(part, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shards.append({"file": path.name, "rows": len(part), "sha256": digest})
    return shards


def _manifest(folder: Path, **content):
    (folder / "manifest.json").write_text(json.dumps(content))
