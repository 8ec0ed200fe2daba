"""The feature store: exact bytes, clear refusals, kills, and two processes at once."""

import multiprocessing
import os
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcal.attribution.feature_encoding import decode_rows, encode_rows
from diffcal.attribution.feature_shards import shard_ranges
from diffcal.attribution.feature_store import FeatureStore
from diffcal.errors import ArtifactError, ConfigError, DataError, NumericalError

SPEC = {"functional": "mean", "timesteps": [0, 500], "model": {"sha256": "ab"}}
DIM = 12


def features(start, stop, dim=DIM):
    rows = [
        torch.randn(dim, generator=torch.Generator().manual_seed(i)) for i in range(start, stop)
    ]
    return torch.stack(rows)


def build(folder, rows=10, shard_rows=4, dtype="float32", spec=SPEC, only=None, **ranges):
    store = FeatureStore.create(folder, spec=spec, dim=DIM, dtype=dtype)
    for part in shard_ranges(rows, shard_rows, **ranges):
        if part.index in store.finished or (only is not None and part.index not in only):
            continue
        ids = [f"img-{i}" for i in range(part.start, part.stop)]
        error = features(part.start, part.stop, 3).square()
        store.write(part.index, ids, features(part.start, part.stop), {"error": error})
    return store


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_was_written_comes_back_in_order(tmp_path):
    build(tmp_path)
    store = FeatureStore.open(tmp_path)
    everything = features(0, 10)
    assert len(store) == 10
    assert store.ids == tuple(f"img-{i}" for i in range(10))
    assert store.columns == ("error",)
    assert torch.equal(store.rows(), everything)
    assert torch.equal(torch.cat(list(store.blocks(3))), everything)
    assert [len(block) for block in store.blocks(3)] == [3, 1, 3, 1, 2]
    for start in range(10):
        for stop in range(start, 12):
            assert torch.equal(store.rows(start, stop), everything[start:stop])
    assert torch.equal(store.column("error"), features(0, 10, 3).square())
    store.verify()
    store.require_spec(SPEC)
    store.require_ids([f"img-{i}" for i in range(10)])


@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 0), ("float16", 2**-11), ("bfloat16", 2**-8), ("int8", None)]
)
@settings(deadline=None, max_examples=30)
@given(exponent=st.integers(-100, 100), seed=st.integers(0, 1000))
def test_rows_keep_their_precision_at_any_magnitude(dtype, bound, exponent, seed):
    rows = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed))
    rows = rows * 2.0**exponent
    rows[1] = 0
    stored, scale = encode_rows(rows, dtype)
    back = decode_rows(stored, scale)
    assert torch.equal(back[1], rows[1])
    error = (back - rows).abs()
    if bound is None:
        assert bool((error <= rows.abs().amax(1, keepdim=True) / 127 * 0.5001).all())
    else:
        # Entries far below the row's largest are denormal in float16: bounded by the row instead.
        floor = rows.abs().amax(1, keepdim=True) * 2.0**-36
        assert bool((error <= bound * rows.abs() * 1.0001 + floor).all())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_sharding_and_processes_do_not_change_the_rows(tmp_path, dtype):
    build(tmp_path / "one", dtype=dtype, shard_rows=4)
    build(tmp_path / "other", dtype=dtype, shard_rows=3)
    for process in (1, 0):
        build(tmp_path / "two", dtype=dtype, shard_rows=4, process=process, processes=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    one, other = FeatureStore.open(tmp_path / "one"), FeatureStore.open(tmp_path / "other")
    assert torch.equal(one.rows(), other.rows())
    assert torch.equal(torch.cat(list(one.blocks(3))), one.rows())
    assert torch.equal(one.rows(5, 9), one.rows()[5:9])
    assert one.fingerprint == FeatureStore.open(tmp_path / "two").fingerprint != other.fingerprint


def test_appended_rows_follow_and_leave_old_bytes_alone(tmp_path):
    store = build(tmp_path, rows=10, shard_rows=4)
    before = content(tmp_path)
    assert store.next_index == 3
    store.write(3, ["new"], features(50, 51), {"error": features(50, 51, 3)})
    after = content(tmp_path)
    assert {name: after[name] for name in before} == before
    reopened = FeatureStore.open(tmp_path)
    assert reopened.ids[-1] == "new"
    assert torch.equal(reopened.rows(10), features(50, 51))


def test_every_process_owns_whole_shards_and_all_are_owned():
    owned = [shard_ranges(10, 3, process=p, processes=3, first=5) for p in range(3)]
    flat = sorted((part for parts in owned for part in parts), key=lambda part: part.index)
    assert [(p.index, p.start, p.stop) for p in flat] == [
        (5, 0, 3),
        (6, 3, 6),
        (7, 6, 9),
        (8, 9, 10),
    ]
    assert shard_ranges(0, 3) == []
    with pytest.raises(DataError, match="process 2 of 2"):
        shard_ranges(10, 3, process=2, processes=2)


def test_mixing_two_specifications_names_the_field(tmp_path):
    build(tmp_path)
    other = {**SPEC, "model": {"sha256": "cd"}}
    message = r"other settings \(spec\.model\.sha256: 'ab' there, 'cd' here\)"
    with pytest.raises(ArtifactError, match=message):
        build(tmp_path, spec=other)
    with pytest.raises(ArtifactError, match=r"model\.sha256: 'ab' there, 'cd' here"):
        FeatureStore.open(tmp_path).require_spec(other)
    with pytest.raises(ArtifactError, match="dtype: 'float32' there, 'int8' here"):
        build(tmp_path, dtype="int8")
    with pytest.raises(ArtifactError, match="noise: 'nothing' there, 'shared' here"):
        FeatureStore.open(tmp_path).require_spec({**SPEC, "noise": "shared"})


def test_a_shard_copied_from_another_store_is_recognised(tmp_path):
    build(tmp_path / "a")
    build(tmp_path / "b", spec={**SPEC, "functional": "loss"})
    for suffix in ("json", "safetensors"):
        name = f"features-00001.{suffix}"
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
    with pytest.raises(
        ArtifactError, match=r"features-00001.*functional: 'loss' there, 'mean' here"
    ):
        FeatureStore.open(tmp_path / "a")


def test_a_truncated_shard_is_named_and_rebuilt_after_deletion(tmp_path):
    build(tmp_path)
    before = content(tmp_path)
    victim = tmp_path / "features-00001.safetensors"
    victim.write_bytes(before[victim.name][:-7])
    for action in (lambda: FeatureStore.open(tmp_path), lambda: build(tmp_path)):
        with pytest.raises(
            ArtifactError, match=r"features-00001\.safetensors' is damaged: \d+ bytes"
        ):
            action()
    victim.unlink()
    with pytest.raises(ArtifactError, match=r"features-00001\.safetensors' is missing"):
        FeatureStore.open(tmp_path)
    build(tmp_path)
    assert content(tmp_path) == before


def test_changed_content_of_the_same_size_is_found_by_verify(tmp_path):
    build(tmp_path)
    victim = tmp_path / "features-00002.safetensors"
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    store = FeatureStore.open(tmp_path)
    with pytest.raises(
        ArtifactError, match=r"features-00002\.safetensors' does not match its checksum"
    ):
        store.verify()


def test_a_gap_is_reported_as_an_interrupted_build(tmp_path):
    build(tmp_path, only={0, 2})
    with pytest.raises(ArtifactError, match=r"features-00001\.safetensors' is missing: building"):
        FeatureStore.open(tmp_path)


def test_duplicate_ids_are_refused(tmp_path):
    store = build(tmp_path, rows=4)
    with pytest.raises(DataError, match="example 'x' comes twice"):
        store.write(1, ["x", "y", "x"], features(0, 3))
    with pytest.raises(DataError, match=r"example 'img-2' is already in .*features-00000"):
        store.write(1, ["img-9", "img-2"], features(0, 2))
    # Two processes that do not see each other: found when the store is read.
    blind = FeatureStore.create(tmp_path, spec=SPEC, dim=DIM, dtype="float32")
    store.write(1, ["z"], features(4, 5))
    blind.write(2, ["z"], features(4, 5))
    with pytest.raises(ArtifactError, match=r"'z' is in 'features-00001.* and in 'features-00002"):
        FeatureStore.open(tmp_path)


def test_nan_is_refused_with_the_example_and_nothing_is_written(tmp_path):
    store = build(tmp_path, rows=4)
    before = content(tmp_path)
    bad = features(0, 3)
    bad[1, 5] = float("nan")
    bad[2, 0] = float("inf")
    with pytest.raises(
        NumericalError, match="'features' of 2 rows is NaN or infinite, first of example 8"
    ):
        store.write(1, [7, 8, 9], bad)
    with pytest.raises(NumericalError, match="'error' of 1 rows"):
        store.write(1, [7, 8, 9], features(0, 3), {"error": bad[[0, 0, 1]]})
    assert content(tmp_path) == before


def test_bad_calls_are_one_clear_line(tmp_path):
    store = build(tmp_path / "store", rows=4)
    with pytest.raises(DataError, match="features have 5 entries"):
        store.write(1, ["a"], torch.zeros(1, 5))
    with pytest.raises(DataError, match="2 ids for 1 feature rows"):
        store.write(1, ["a", "b"], torch.zeros(1, DIM))
    with pytest.raises(DataError, match="2 rows of 'error' for 1 ids"):
        store.write(1, ["a"], torch.zeros(1, DIM), {"error": torch.zeros(2, 1)})
    with pytest.raises(DataError, match="cannot be called 'scale'"):
        store.write(1, ["a"], torch.zeros(1, DIM), {"scale": torch.zeros(1)})
    with pytest.raises(ArtifactError, match="exists; shards are never rewritten"):
        store.write(0, ["a"], torch.zeros(1, DIM))
    with pytest.raises(ArtifactError, match="is not a feature store"):
        FeatureStore.open(tmp_path)
    with pytest.raises(ConfigError, match="unknown feature dtype 'float8'"):
        FeatureStore.create(tmp_path / "x", spec={}, dim=3, dtype="float8")
    with pytest.raises(ConfigError, match="plain JSON values"):
        FeatureStore.create(tmp_path / "x", spec={"a": object()}, dim=3)
    reader = FeatureStore.open(tmp_path / "store")
    with pytest.raises(DataError, match="has no column 'norm'; it has error"):
        reader.column("norm")
    with pytest.raises(DataError, match="row 1 is example 'other' now and 'img-1' in the store"):
        reader.require_ids(["img-0", "other", "img-2", "img-3"])
    with pytest.raises(DataError, match=r"the data set has 5 examples, the store .* 4"):
        reader.require_ids([f"img-{i}" for i in range(5)])
    (tmp_path / "store" / "store.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not the header of a feature store"):
        FeatureStore.open(tmp_path / "store")


def _work(folder, process, processes, pause):
    torch.set_num_threads(1)
    store = FeatureStore.create(folder, spec={"seed": 3}, dim=64, dtype="int8")
    for part in shard_ranges(640, 20, process=process, processes=processes):
        if part.index in store.finished:
            continue
        time.sleep(pause)
        rows = features(part.start, part.stop, 64)
        store.write(part.index, list(range(part.start, part.stop)), rows)


def worker(folder, process=0, processes=1, pause=0.0):
    # Forked, because importing torch again would take longer than everything else here.
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=_work, args=(folder, process, processes, pause))
    child.start()
    return child


def finish(child):
    child.join(60)
    return child.exitcode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_kill_and_rerun_and_two_processes_give_the_same_bytes(tmp_path):
    both = [worker(tmp_path / "two", process, 2) for process in (0, 1)]
    slow = worker(tmp_path / "killed", pause=0.05)
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "killed").glob("features-*.json"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    slow.kill()
    slow.join()
    assert all(finish(process) for process in both)
    reference = content(tmp_path / "two")
    assert len(reference) == 1 + 2 * 32
    left = len(list((tmp_path / "killed").glob("features-*.json")))
    assert 3 <= left < 32
    # What a kill between the two files, and one in the middle of a file, would leave behind.
    (tmp_path / "killed" / f"features-{left:05d}.safetensors").write_bytes(b"not renamed yet")
    (tmp_path / "killed" / f".features-{left + 1:05d}.safetensors.partial").write_bytes(b"half")
    assert finish(worker(tmp_path / "killed"))
    assert content(tmp_path / "killed") == reference
    store = FeatureStore.open(tmp_path / "killed")
    assert store.ids == tuple(range(640))
    store.verify()
