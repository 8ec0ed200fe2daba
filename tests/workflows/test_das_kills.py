"""SIGKILL while das explains or while an LDS featurises: the same command ends in the same bytes."""

import dataclasses
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from killing import kill_at_rename

from diffcal.cli import main
from diffcal.core.runs import sha256_file
from diffcal.data.images import encode_png
from diffcal.data.sources import open_images
from diffcal.workflows import das
from diffcal.workflows.das_config import StoreConfig
from diffcal.workflows.das_lds_config import LdsConfig

SMALL = [
    "model.source=bundled:digits",
    "features.timesteps=[400]",
    "features.projection.dim=64",
]
TINY_LDS = [
    "data.rows=12",
    "optimizer.steps=4",
    "optimizer.batch_size=4",
    "network.model_channels=8",
    "network.channel_mult=[1]",
    "network.num_blocks=1",
    "network.attn_resolutions=[]",
    "subsets.count=2",
    "queries.validation=2",
    "queries.generated=2",
    "queries.sampler.steps=2",
    "losses.timesteps=1",
    "features.timesteps=1",
    "features.projection.dim=16",
    "resamples=5",
    "methods=['das','tracincp']",
]


def digests(folder):
    """Every file below ``folder``, half-written ones included."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def images_with_artists(path, count):
    source = open_images("digits")
    columns = {
        "image": [{"bytes": encode_png(image), "path": None} for image in source.images[:count]],
        "label": source.labels[:count].astype(np.int64),
        "artist": [("Ada", "Ben")[row % 2] for row in range(count)],
    }
    pq.write_table(pa.table(columns), path)
    return path


def test_a_killed_explanation_ends_in_the_same_page(tmp_path):
    data = images_with_artists(tmp_path / "train.parquet", 24)
    index, scores = tmp_path / "index", tmp_path / "index/scores"
    das.index(das.das_config("das", [*SMALL, f"data.name={data}"]), index, device="cpu")
    das.score(index, "digits", rows=3, top=5, device="cpu")
    # Shares by a column that was not scored need the kernel, which is fitted again where it is gone.
    command = ["das", "explain", str(scores), "--query", "1", "--groups", "artist"]
    command += ["--royalties", "10", "--out", str(tmp_path / "page/one.html")]

    def forget():
        for path in (index / "kernel.safetensors", index / "kernel.json"):
            path.unlink()

    before = digests(index)
    forget()
    assert main(command) == 0
    whole = digests(tmp_path)
    assert digests(index) == before
    forget()
    (tmp_path / "page/one.html").unlink()
    for pattern, renamed in (
        ("*/kernel.safetensors", False),
        ("*/kernel.safetensors", True),
        ("*/kernel.json", True),
        ("*/one.html", False),
        ("*/one.html", True),
    ):
        kill_at_rename(pattern, lambda: main(command), renamed=renamed)
        assert (tmp_path / "page/one.html").exists() == (pattern == "*/one.html" and renamed)
    assert digests(tmp_path) == whole
    assert main(command) == 0
    assert digests(tmp_path) == whole


def test_an_lds_that_is_killed_while_it_featurises_ends_in_the_same_bytes(tmp_path, monkeypatch):
    settings = LdsConfig.index_config
    monkeypatch.setattr(
        LdsConfig,
        "index_config",
        lambda *names: dataclasses.replace(settings(*names), store=StoreConfig(shard_rows=8)),
    )
    config, run = das.lds_config("digits", TINY_LDS), tmp_path / "run"
    das.lds(config, run, device="cpu")
    whole = digests(run)
    # Models and losses stay: kills of those stages are tested where they are.
    shutil.rmtree(run / "indexes")
    for name in ("lds.json", "lds.md"):
        (run / name).unlink()
    for pattern, renamed in (
        ("*/indexes/*/features/features-00000.json", False),  # a shard without its record
        ("*/indexes/*/features/features-00001.json", True),
        ("*/indexes/*/kernel.safetensors", True),
        ("*/indexes/*/queries/generated/features-00000.safetensors", False),
        ("*/indexes/*/models/02/features/features-00001.json", True),
        ("*/lds.json", False),
    ):
        kill_at_rename(pattern, lambda: das.lds(config, run, device="cpu"), renamed=renamed)
        assert not (run / "lds.json").exists()
    das.lds(config, run, device="cpu")
    assert digests(run) == whole
