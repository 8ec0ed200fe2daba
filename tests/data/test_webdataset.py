"""Tar shards: content, bytes, resumption, refusals."""

import hashlib
import json
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mixed_run import NAMES, blended_digits
from published_set import publish_rows

import diffcal.data.webdataset as webdataset
from diffcal.data.webdataset import export_webdataset
from diffcal.errors import ArtifactError, ConfigError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty images in two files; do not write into it."""
    return publish_rows(tmp_path_factory.mktemp("set") / "dataset")


def samples(paths):
    """``{key: {suffix: bytes}}`` in order, as a reader of the convention groups a stream."""
    found = {}
    for path in paths:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                found.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    return found


def digests(out):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}


@settings(deadline=None, max_examples=5)
@given(st.integers(1, 70))
def test_every_image_is_there_once_whatever_the_shard_size(folder, tmp_path_factory, size):
    out = tmp_path_factory.mktemp("tar")
    paths = export_webdataset(folder, out, shard_size=size)
    assert [p.name for p in paths] == [f"mixed-{i:06d}.tar" for i in range(-(-60 // size))]
    columns, annotation = blended_digits(12, 5)
    found = samples(paths)
    assert list(found) == [f"{number:09d}" for number in range(60)]
    for number, sample in enumerate(found.values()):
        assert sorted(sample) == ["json", "png"]
        assert sample["png"] == columns["image"][number]["bytes"]
        record = json.loads(sample["json"])
        assert record["soft_label"] == annotation["soft_label"][number]
        assert record["classes"] == columns["classes"][number]
        assert record["lambda"] == columns["weights"][number][0]
        assert record["endpoint_ok"] is annotation["endpoint_ok"][number]
        assert "image" not in record
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["class_names"] == list(NAMES)
    assert sum(entry["rows"] for entry in manifest["shards"]) == 60


def test_samples_are_contiguous_and_anonymous(folder, tmp_path):
    (path,) = export_webdataset(folder, tmp_path / "out")
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    names = [member.name for member in members]
    assert names == [f"{i:09d}.{suffix}" for i in range(60) for suffix in ("png", "json")]
    found = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members}
    assert found == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}


def test_interrupted_or_damaged_it_ends_in_the_same_bytes(folder, tmp_path, monkeypatch):
    export_webdataset(folder, tmp_path / "whole", shard_size=16)
    out, real, calls = tmp_path / "out", webdataset._write_tar, []

    def failing(file, source, rows):
        calls.append(rows)
        if len(calls) == 3:
            file.write(b"half a file")
            raise OSError(28, "No space left on device")
        real(file, source, rows)

    monkeypatch.setattr(webdataset, "_write_tar", failing)
    with pytest.raises(ArtifactError, match="no space left while writing"):
        export_webdataset(folder, out, shard_size=16)
    assert sorted(p.name for p in out.glob("*.tar")) == ["mixed-000000.tar", "mixed-000001.tar"]
    export_webdataset(folder, out, shard_size=16)
    assert [rows.start for rows in calls] == [0, 16, 32, 32, 48]
    assert digests(out) == digests(tmp_path / "whole")
    (out / "mixed-000002.tar").write_bytes(b"damaged")
    export_webdataset(folder, out, shard_size=16)
    assert digests(out) == digests(tmp_path / "whole")
    with pytest.raises(ArtifactError, match="shard_size: 16 there, 8 now"):
        export_webdataset(folder, out, shard_size=8)


def test_unsafe_places_are_refused(folder, tmp_path):
    for out in (folder, folder / "data", folder / "tar", folder.parent):
        with pytest.raises(ConfigError, match="lies in the data set"):
            export_webdataset(folder, out)
    (tmp_path / "link").symlink_to(folder / "data", target_is_directory=True)
    with pytest.raises(ConfigError, match="lies in the data set"):
        export_webdataset(folder, tmp_path / "link")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        export_webdataset(folder, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not empty and was not made by this command"):
        export_webdataset(folder, tmp_path / "full")
    with pytest.raises(ConfigError, match="shard_size must be at least 1"):
        export_webdataset(folder, tmp_path / "out", shard_size=0)


def test_damaged_sets_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    path = sorted((tmp_path / "set" / "data").iterdir())[1]
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"train-00001-of-00002.parquet' is damaged"):
        export_webdataset(tmp_path / "set", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "set" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"manifest.json' does not exist"):
        export_webdataset(tmp_path / "set", tmp_path / "out")


def test_formats_without_a_name_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    path = sorted((tmp_path / "set" / "data").iterdir())[0]
    table = pq.read_table(path)
    images = pa.array([{"bytes": b"BM000", "path": None}] * len(table))
    pq.write_table(table.set_column(0, "image", images), path)
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    manifest["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="row 0: the image is neither PNG, JPEG nor WebP"):
        export_webdataset(tmp_path / "set", tmp_path / "out")
