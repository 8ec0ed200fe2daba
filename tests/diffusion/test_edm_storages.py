"""Storages and tensors of snapshots: exact numbers back, every lie about sizes refused."""

import contextlib
import math

import pytest
import torch
from edm_writer import MAGIC, Call, Global, storage, stream
from hypothesis import given, settings
from hypothesis import strategies as st
from watching import nothing_runs

from diffcal.diffusion.edm_storages import StoredTensor, parse_storage, rebuild_tensor
from diffcal.errors import CheckpointError, UnsafeCheckpointError

TYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
]


def parsed(tensor, **bent):
    return parse_storage(memoryview(storage(tensor, **bent)))


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_come_back_exactly(dtype):
    tensor = torch.arange(-12, 12).to(dtype).reshape(2, 3, 4)
    view = rebuild_tensor(parsed(tensor), 0, (2, 3, 4), (12, 4, 1))
    result = view.tensor()
    assert result.dtype == dtype
    torch.testing.assert_close(result, tensor, rtol=0, atol=0)


def test_views_with_strides_and_offset_come_back_exactly():
    base = torch.arange(60, dtype=torch.float32)
    source = parsed(base)
    for offset, shape, stride in [
        (3, (4, 5), (1, 4)),
        (10, (2, 2, 3), (20, 7, 3)),
        (59, (), ()),
        (0, (5,), (0,)),
        (60, (0, 3), (3, 1)),
    ]:
        result = rebuild_tensor(source, offset, shape, stride).tensor()
        expected = base.as_strided(shape, stride, offset)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
        assert result.is_contiguous()
        # Memory of its own, of no more than it needs: nothing keeps the file open.
        assert result.untyped_storage().nbytes() <= 4 * 60


def test_storages_written_by_torch_are_read():
    import io

    file = io.BytesIO()
    values = torch.randn(7, generator=torch.Generator().manual_seed(0))
    torch.save(values.untyped_storage(), file, _use_new_zipfile_serialization=False)
    data = file.getvalue()
    # torch writes an untyped storage of bytes as ByteStorage today; networks hold typed ones.
    with pytest.raises(UnsafeCheckpointError, match=r"torch\."):
        parse_storage(memoryview(data))
    file = io.BytesIO()
    torch.save(
        torch.storage.TypedStorage(
            wrap_storage=values.untyped_storage(), dtype=torch.float32, _internal=True
        ),
        file,
        _use_new_zipfile_serialization=False,
    )
    read = parse_storage(memoryview(file.getvalue()))
    torch.testing.assert_close(rebuild_tensor(read, 0, (7,), (1,)).tensor(), values, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bent", "message"),
    [
        ({"magic": MAGIC + 1}, "magic number"),
        ({"magic": "magic"}, "magic number"),
        ({"protocol": 1000}, "another version"),
        ({"system": {"protocol_version": 1001}}, "another version"),
        ({"count": 7}, "counts 7"),
        ({"count": -1}, "counts -1"),
        ({"count": 2**62}, "counts"),
        ({"promised": 7}, "promises 7"),
        ({"promised": -6}, "unknown form"),
        ({"promised": 2**41}, "unknown form"),
        ({"promised": True}, "unknown form"),
        ({"promised": 2**39, "count": 2**39}, "bytes of 4-byte elements"),
        ({"data": b"\0" * 23}, "23 bytes"),
        ({"data": b"\0" * 25}, "25 bytes"),
        ({"keys": []}, "other keys"),
        ({"keys": ["94128", "1"]}, "other keys"),
        ({"keys": [["94128"]]}, "other keys"),
        ({"reference": "storage"}, "unknown form"),
        ({"reference": ("storage", "torch.FloatStorage", "94128", "cpu", 6, None)}, "unknown form"),
        (
            {"reference": ("tensor", Global("torch.FloatStorage"), "94128", "cpu", 6, None)},
            "unknown form",
        ),
        (
            {"reference": ("storage", Global("torch.FloatStorage"), "94128", "cpu", 6, (0, 1))},
            "unknown form",
        ),
    ],
)
def test_lies_in_a_storage_are_told(bent, message):
    with nothing_runs(), pytest.raises(CheckpointError, match=message):
        parsed(torch.zeros(6), **bent)


@pytest.mark.parametrize("part", ["magic", "protocol", "system", "keys", "reference"])
def test_every_part_of_a_storage_is_read_with_suspicion(part):
    evil = Call("posix.system", ("true",))
    with nothing_runs(), pytest.raises(UnsafeCheckpointError, match=r"'posix\.system'"):
        parsed(torch.zeros(6), **{part: evil})


@pytest.mark.parametrize("part", ["magic", "protocol", "system", "keys"])
def test_types_are_named_only_where_they_belong(part):
    with pytest.raises(UnsafeCheckpointError, match=r"'torch\.FloatStorage'"):
        parsed(torch.zeros(6), **{part: Global("torch.FloatStorage")})


def test_storage_type_cannot_be_called():
    evil = Call("torch.FloatStorage", (10**12,))
    with nothing_runs(), pytest.raises(UnsafeCheckpointError, match=r"calls 'torch\.FloatStorage'"):
        parsed(torch.zeros(6), reference=evil)


def test_two_references_are_no_storage():
    data = storage(torch.zeros(6))
    reference = ("storage", Global("torch.FloatStorage"), "94128", "cpu", 6, None)
    # A list of two persistent ids in the place of one.
    from edm_writer import emit

    pair = b"\x80\x02](" + emit(reference) + b"Q" + emit(reference) + b"Qe."
    single = b"\x80\x02" + emit(("storage", *reference[1:3], "cuda:0", 6, None)) + b"Q."
    assert single in data
    with pytest.raises(CheckpointError, match="one storage"):
        parse_storage(memoryview(data.replace(single, pair)))


def test_every_truncation_is_told():
    data = storage(torch.arange(6.0))
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            parse_storage(memoryview(data[:length]))


@pytest.mark.parametrize(
    ("offset", "shape", "stride", "message"),
    [
        (-1, (2,), (1,), ">= 0"),
        (0, (-2,), (1,), ">= 0"),
        (0, (2,), (-1,), ">= 0"),
        (0, (2.0,), (1,), ">= 0"),
        (0, (True,), (1,), ">= 0"),
        (0, [2], (1,), ">= 0"),
        (0, (1,) * 9, (1,) * 9, ">= 0"),
        (2**40, (1,), (1,), ">= 0"),
        (0, (2, 3), (1,), "2 sizes but 1 strides"),
        (0, (7,), (1,), "beyond its storage"),
        (1, (6,), (1,), "beyond its storage"),
        (0, (2, 2), (5, 1), "beyond its storage"),
        (7, (0,), (1,), "beyond its storage"),
        (0, (7,), (0,), "beyond its storage"),
        (0, (10**6, 10**6), (0, 0), "beyond its storage"),
    ],
)
def test_views_outside_their_storage_are_refused(offset, shape, stride, message):
    with pytest.raises(CheckpointError, match=message):
        rebuild_tensor(parsed(torch.zeros(6)), offset, shape, stride)


def test_tensor_of_no_storage_is_refused():
    with pytest.raises(CheckpointError, match="something else than a storage"):
        rebuild_tensor(b"\0" * 24, 0, (6,), (1,))


SMALL = st.integers(0, 6)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 30), st.lists(st.tuples(SMALL, SMALL), max_size=4))
def test_whatever_is_accepted_lies_inside(offset, axes):
    shape, stride = tuple(s for s, _ in axes), tuple(s for _, s in axes)
    base = torch.arange(24.0)
    try:
        view = rebuild_tensor(parsed(base), offset, shape, stride)
    except CheckpointError:
        touched = offset + sum((s - 1) * t for s, t in axes) if 0 not in shape else offset - 1
        assert touched >= 24 or math.prod(shape) > 24
        return
    assert isinstance(view, StoredTensor)
    expected = base.as_strided(shape, stride, offset)
    torch.testing.assert_close(view.tensor(), expected, rtol=0, atol=0)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_changed_bytes_give_a_storage_or_a_checkpoint_error(data):
    bent = bytearray(storage(torch.arange(3.0)))
    for _ in range(data.draw(st.integers(1, 4))):
        bent[data.draw(st.integers(0, len(bent) - 1))] = data.draw(st.integers(0, 255))
    with nothing_runs(), contextlib.suppress(CheckpointError):
        read = parse_storage(memoryview(bytes(bent)))
        assert read.count * read.dtype.itemsize == len(read.data)


def test_writer_agrees_with_python():
    import pickle

    value = {"a": [1, -(2**70), 2.5, None, True, ("x", b"\0\xff")], "b": {}}
    assert pickle.loads(stream(value)) == value
