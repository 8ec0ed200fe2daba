"""Manifests that come from elsewhere."""

import pytest

from diffcal.core.runs import sha256_bytes, write_json
from diffcal.data.shards import read_manifest, verified_shard
from diffcal.errors import ArtifactError

FORMAT = "diffcal-generated/1"


def manifest(folder, *shards):
    write_json(folder / "manifest.json", {"format": FORMAT, "shards": list(shards)})
    return folder


def test_shards_of_the_folder_and_of_folders_in_it(tmp_path):
    for name in ("shard-00000.parquet", "data/train..v2.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"rows")
        entry = {"file": name, "sha256": sha256_bytes(b"rows")}
        read = read_manifest(manifest(tmp_path, entry), FORMAT)
        assert verified_shard(tmp_path, read["shards"][0]) == tmp_path / name


@pytest.mark.parametrize(
    "name",
    [
        "../shard.parquet",
        "data/../../shard.parquet",
        "/etc/passwd",
        "..\\shard.parquet",
        "C:\\shard.parquet",
        "C:shard.parquet",
    ],
)
def test_a_shard_outside_of_the_folder_is_refused(tmp_path, name):
    folder = manifest(tmp_path, {"file": name, "sha256": "0" * 64})
    with pytest.raises(ArtifactError, match="is no file of this folder"):
        read_manifest(folder, FORMAT)


@pytest.mark.parametrize("shard", ["shard.parquet", {}, {"file": "a"}, {"file": 1, "sha256": "a"}])
def test_a_shard_that_tells_too_little_is_refused(tmp_path, shard):
    with pytest.raises(ArtifactError, match="a shard has no file and sha256"):
        read_manifest(manifest(tmp_path, shard), FORMAT)
