"""Generation as a stage: killed and resumed, by two processes, with damaged and foreign folders."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from launch import launch
from tiny_edm import tiny_edm

from diffcal.core.runs import sha256_file
from diffcal.data.images import decode_image
from diffcal.diffusion.checkpoints import save_denoiser
from diffcal.diffusion.samplers import SamplerConfig
from diffcal.errors import ArtifactError, NumericalError
from diffcal.mixing.generation import GenerationConfig
from diffcal.mixing.plan import PlanConfig
from diffcal.workflows.generate import GenerateConfig, ModelConfig, generate, shard_items

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    denoiser = tiny_edm()
    save_denoiser(folder, denoiser.network, denoiser.class_names, {})
    return str(folder)


def config_for(checkpoint, groups=10, batch_size=256, **changes):
    values = {
        "model": ModelConfig(source=checkpoint),
        "plan": PlanConfig(groups=groups, members=3),
        "generation": GenerationConfig(sampler=SamplerConfig(steps=2), batch_size=batch_size),
        "groups_per_shard": 4,
    }
    return GenerateConfig(**(values | changes))


def hashes(run):
    return {p.name: sha256_file(p) for p in sorted((run / "generated").glob("*"))}


def test_rows_and_manifest(checkpoint, tmp_path):
    config = config_for(checkpoint)
    summary = generate(config, tmp_path, device="cpu")
    assert (summary["images"], summary["shards"], summary["generated_now"]) == (30, 3, 30)
    manifest = json.loads((tmp_path / "generated/manifest.json").read_text())
    assert manifest["format"] == "diffcal-generated/1"
    assert (manifest["class_names"], manifest["channels"]) == (["a", "b", "c"], 1)
    assert [entry["rows"] for entry in manifest["shards"]] == [12, 12, 6]
    rows = []
    for entry in manifest["shards"]:
        rows += pq.read_table(tmp_path / "generated" / entry["file"]).to_pylist()
    assert [row["id"] for row in rows] == list(range(30))
    assert [row["classes"] for row in rows[::3]][:4] == [[0, 1], [0, 2], [1, 2], [0, 1]]
    assert [row["weights"] for row in rows[:3]] == [[0, 1], [0.5, 0.5], [1, 0]]
    pixels = decode_image(rows[4]["image"]["bytes"], "row 4")
    assert pixels.shape == (8, 8, 1) == (rows[4]["height"], rows[4]["width"], 1)
    assert len({row["seed"] for row in rows}) == 10


def test_bytes_do_not_depend_on_batch_size_or_the_way_there(checkpoint, tmp_path):
    generate(config_for(checkpoint), tmp_path / "whole", device="cpu")
    other = tmp_path / "other"
    generate(config_for(checkpoint, batch_size=7), other, device="cpu")
    wanted = hashes(tmp_path / "whole")
    config = json.loads((other / "generated/manifest.json").read_text())["config"]
    assert config["generation"]["batch_size"] == 7
    for name in wanted:
        if name != "manifest.json":
            assert hashes(other)[name] == wanted[name]
    # A shard that went missing is made again, alone, with the same bytes.
    (other / "generated/shard-00001.parquet").unlink()
    again = generate(config_for(checkpoint, batch_size=7), other, device="cpu")
    assert again["generated_now"] == 12
    assert hashes(other)["shard-00001.parquet"] == wanted["shard-00001.parquet"]


def command(checkpoint, run, groups):
    return [
        "csm",
        "generate",
        f"--set=generate.model.source={checkpoint}",
        f"--set=generate.plan.groups={groups}",
        "--set=generate.plan.members=3",
        "--set=generate.generation.sampler.steps=2",
        "--set=generate.groups_per_shard=4",
        "--device=cpu",
        "--out",
        str(run),
    ]


def environment():
    return os.environ | {"DIFFCAL_PROGRESS": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_killed_and_started_again_the_bytes_are_the_same(checkpoint, tmp_path):
    groups = 400
    generate(config_for(checkpoint, groups=groups), tmp_path / "whole", device="cpu")
    run = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "diffcal", *command(checkpoint, run, groups)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while len(list(run.glob("generated/shard-*.parquet"))) < 3 and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = len(list(run.glob("generated/shard-*.parquet")))
    assert 3 <= left < 100
    assert not (run / "generated/manifest.json").exists()
    generate(config_for(checkpoint, groups=groups), run, device="cpu")
    assert hashes(run) == hashes(tmp_path / "whole")


def test_two_processes_give_the_set_of_one(checkpoint, tmp_path):
    generate(config_for(checkpoint), tmp_path / "one", device="cpu")
    run = tmp_path / "two"
    summary = json.loads(launch(2, *command(checkpoint, run, 10)))
    assert (summary["processes"], summary["generated_now"]) == (2, 18)
    assert hashes(run) == hashes(tmp_path / "one")


def test_other_settings_and_other_weights_are_refused_by_name(checkpoint, tmp_path):
    generate(config_for(checkpoint), tmp_path, device="cpu")
    before = hashes(tmp_path)
    with pytest.raises(ArtifactError, match=r"plan\.groups: 10 there, 11 now"):
        generate(config_for(checkpoint, groups=11), tmp_path, device="cpu")
    with pytest.raises(ArtifactError, match="denoiser"):
        generate(config_for(checkpoint), tmp_path, denoiser=tiny_edm(seed=1), device="cpu")
    assert hashes(tmp_path) == before
    generate(config_for(checkpoint, groups=11), tmp_path, device="cpu", overwrite=True)
    assert len(pq.read_table(tmp_path / "generated/shard-00002.parquet")) == 9


def test_a_damaged_shard_is_named(checkpoint, tmp_path):
    generate(config_for(checkpoint), tmp_path, device="cpu")
    path = tmp_path / "generated/shard-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match=r"shard-00001\.parquet' is damaged"):
        generate(config_for(checkpoint), tmp_path, device="cpu")


def test_nan_leaves_earlier_shards(checkpoint, tmp_path):
    denoiser = tiny_edm()
    calls = []

    def poison(module, inputs, output):
        calls.append(1)
        return output * float("nan") if len(calls) > 3 else output

    denoiser.module.register_forward_hook(poison)
    # Three evaluations draw a shard of 12 images (they fit one call each).
    with pytest.raises(NumericalError, match="groups 4 to 7"):
        generate(config_for(checkpoint), tmp_path, denoiser=denoiser, device="cpu")
    names = {path.name for path in (tmp_path / "generated").iterdir()}
    assert names == {"config.json", "shard-00000.parquet", "shard-00000.json"}
    healthy = generate(config_for(checkpoint), tmp_path, denoiser=tiny_edm(), device="cpu")
    assert healthy["generated_now"] == 18


def test_a_full_disk_is_said_in_one_line(checkpoint, tmp_path, monkeypatch):
    import errno

    import pyarrow.parquet

    real, count = pyarrow.parquet.write_table, []

    def full(*args, **kwargs):
        count.append(1)
        if len(count) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(ArtifactError, match="no space left"):
        generate(config_for(checkpoint), tmp_path, device="cpu")
    assert generate(config_for(checkpoint), tmp_path, device="cpu")["generated_now"] == 18


def test_memory_holds_one_shard(checkpoint, tmp_path):
    import tracemalloc

    def peak(groups, run):
        tracemalloc.start()
        generate(config_for(checkpoint, groups=groups), run, device="cpu")
        value = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return value

    small = peak(8, tmp_path / "warm") and peak(40, tmp_path / "small")
    assert peak(160, tmp_path / "large") < 1.25 * small + 2**18


def test_images_are_images(checkpoint, tmp_path):
    torch.manual_seed(0)
    generate(config_for(checkpoint), tmp_path, device="cpu")
    rows = pq.read_table(tmp_path / "generated/shard-00000.parquet").to_pylist()
    stack = np.stack([decode_image(row["image"]["bytes"], "x") for row in rows])
    assert stack.std() > 5


def test_golden_sharding():
    golden = json.loads((TESTS / "golden/csm.json").read_text("utf-8"))["cases"]
    case = golden["proposed_sharding"]
    config = GenerateConfig(
        plan=PlanConfig(groups=case["groups"], members=2),
        groups_per_shard=case["groups_per_shard"],
    )
    items = [shard_items(config, shard) for shard in range(config.shards)]
    shard_of = [next(s for s, i in enumerate(items) if 2 * g in i) for g in range(case["groups"])]
    assert shard_of == case["shard_of_group"]
    workers = case["workers"]
    own = [list(range(w, config.shards, workers)) for w in range(workers)]
    assert own == case["shards_of_worker"]
