"""The pickle machine: equal to Python's unpickler on plain values, and unable to do anything else."""

import codecs
import collections
import contextlib
import os
import pickle
import pickletools
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watching import nothing_runs, recorded

from diffcal.diffusion.edm_stand_ins import SNAPSHOT_NAMES
from diffcal.diffusion.pickle_machine import Buildable, PickleMachine, StandIn
from diffcal.errors import CheckpointError, UnsafeCheckpointError

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**100), 2**100)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=5) | st.integers(-99, 99), inner, max_size=4)
        | st.sets(st.text(max_size=5), max_size=4)
    ),
    max_leaves=12,
)


def load(data, allowed=None, **options):
    view = memoryview(data)
    value, end = PickleMachine(view, {} if allowed is None else allowed, **options).load()
    assert end <= len(data)
    return value


def with_bytes(value):
    """The value with the machine's slices of the file as bytes."""
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, list | tuple):
        return type(value)(map(with_bytes, value))
    if isinstance(value, dict):
        return {key: with_bytes(item) for key, item in value.items()}
    return value


class Calls:
    """An object whose pickle calls ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def protocol(*pieces):
    return b"\x80\x04" + b"".join(pieces) + b"."


def text(value):
    data = value.encode()
    return b"\x8c" + bytes([len(data)]) + data


@settings(deadline=None, max_examples=80)
@given(PLAIN, st.sampled_from([3, 4, 5]))
def test_plain_values_read_as_python_reads_them(value, version):
    allowed = {"builtins.set": SNAPSHOT_NAMES["builtins.set"]}  # how protocol 3 writes sets
    assert with_bytes(load(pickle.dumps(value, version), allowed)) == value


def test_shared_and_recursive_values_keep_their_identity():
    shared = [1]
    loop = []
    loop.append(loop)
    first, second, cycle = load(pickle.dumps((shared, shared, loop)))
    assert first is second
    assert cycle[0] is cycle


def test_every_opcode_is_decided():
    """What the machine does not know is refused by name; nothing falls through."""
    for opcode in pickletools.opcodes:
        try:
            value, _ = PickleMachine(memoryview(protocol(opcode.code.encode("latin-1"))), {}).load()
            assert opcode.name in {
                "NONE",
                "NEWTRUE",
                "NEWFALSE",
                "EMPTY_DICT",
                "EMPTY_LIST",
                "EMPTY_TUPLE",
                "EMPTY_SET",
            }, (opcode.name, value)
        except CheckpointError as error:
            refused = isinstance(error, UnsafeCheckpointError) and "opcode" in str(error)
            assert opcode.name in str(error) or not refused  # noqa: PT017


@pytest.mark.parametrize(
    "name",
    [
        *("EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEWOBJ_EX", "NEXT_BUFFER", "READONLY_BUFFER"),
        *("PERSID", "BYTEARRAY8", "POP", "DUP", "GET", "PUT", "INT", "LONG", "STRING", "LONG4"),
    ],
)
def test_forbidden_opcodes_are_refused_by_name(name):
    code = next(op.code for op in pickletools.opcodes if op.name == name).encode("latin-1")
    with nothing_runs(), pytest.raises(UnsafeCheckpointError, match=f"opcode {name} at byte 3"):
        load(b"\x80\x04N" + code + b"\x01\x00\x00\x00\x00\x00\x00\x00.")


def test_extension_registry_is_not_consulted():
    import copyreg

    copyreg.add_extension(os.name, "system", 251)
    try:
        data = pickle.dumps(os.system, 2)
        assert b"\x82\xfb" in data
        with nothing_runs(), pytest.raises(UnsafeCheckpointError, match="EXT1"):
            load(data, SNAPSHOT_NAMES)
    finally:
        copyreg.remove_extension(os.name, "system", 251)


@pytest.mark.parametrize("version", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("true",), f"{os.name}.system"),
        (eval, ("1 + 1",), "builtins.eval"),
        (exec, ("import this",), "builtins.exec"),
        (getattr, (1, "real"), "builtins.getattr"),
        (__import__, ("this",), "builtins.__import__"),
        (open, ("x",), "io.open"),
        (bytearray, (5,), "builtins.bytearray"),
        (codecs.decode, (b"", "zlib"), "_codecs.decode"),
        (collections.Counter, (), "collections.Counter"),
    ],
)
def test_calls_are_refused_by_name_before_anything_runs(function, arguments, name, version):
    data = pickle.dumps({"ema": Calls(function, *arguments)}, version)
    shown = name if version >= 3 else name.replace("builtins", "__builtin__")
    with nothing_runs(), pytest.raises(UnsafeCheckpointError) as caught:
        load(data, SNAPSHOT_NAMES)
    assert f"'{shown}'" in str(caught.value)
    assert "nothing was run" in str(caught.value)


def test_the_recorder_would_notice():
    """The control: Python's own unpickler runs the same bytes, and the recorder sees it."""
    with recorded() as seen:
        pickle.loads(pickle.dumps(Calls(os.system, "true")))
    assert {"pickle.find_class", "os.system"} <= {event for event, _ in seen}


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        # Names put together from values of the file, and names that are no text.
        ([text("posix"), text("system"), b"\x93"], "'posix.system'"),
        ([text("builtins"), text("eval.__call__"), b"\x93"], "'builtins.eval.__call__'"),
        ([text("os"), text("path.os.system"), b"\x93"], "'os.path.os.system'"),
        ([b"N", text("system"), b"\x93"], "not text"),
        ([text("a b\n"), text("x" * 200), b"\x93"], "not on the list"),
        ([b"cposix\nsystem\n"], "'posix.system'"),
        # Calls of what is no listed function.
        ([b"NNR"], "calls"),
        ([text("system"), b")R"], "calls 'str'"),
        ([b"})R"], "calls 'dict'"),
        ([b"ctorch.nn.modules.container\nModuleDict\n", b")R"], "calls 'torch.nn.modules"),
        ([b"N)\x81"], "makes an object"),
        ([b"ctorch._utils\n_rebuild_tensor_v2\n", b")\x81"], "makes an object"),
        ([b"ctorch.nn.modules.container\nModuleDict\n", b"N\x85\x81"], "makes an object"),
        # State of what is no stand-in: attribute setting in disguise.
        ([b"}}b"], "state of a dict"),
        ([b"]}b"], "state of a list"),
        ([b"ctorch.storage\n_load_from_bytes\n}b"], "state of a StandIn"),
        ([b"NQ"], "persistent id"),
        ([text("x"), b"Q"], "persistent id"),
    ],
)
def test_tricks_are_refused(pieces, message):
    with nothing_runs(), pytest.raises(UnsafeCheckpointError, match=message):
        load(protocol(*pieces), SNAPSHOT_NAMES)


def test_a_state_is_stored_and_not_applied():
    """BUILD calls ``__setstate__`` or sets attributes in Python; here a stand-in keeps the dict."""
    trap = protocol(
        b"ctorch.nn.modules.container\nModuleDict\n)\x81",
        b"}(",
        text("__class__"),
        text("evil"),
        text("__setstate__"),
        text("os.system"),
        b"ub",
    )
    with nothing_runs():
        record = load(trap, SNAPSHOT_NAMES)
    assert record.class_name == "ModuleDict"
    assert record.state == {"__class__": "evil", "__setstate__": "os.system"}
    assert isinstance(record, Buildable)
    with pytest.raises(CheckpointError, match="no dict"):
        load(protocol(b"ctorch.nn.modules.container\nModuleDict\n)\x81N}\x86b"), SNAPSHOT_NAMES)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated"),
        (b"\x80", "truncated"),
        (b"\x80\x04", "truncated"),
        (b"PK\x03\x04", "does not begin"),
        (b"(dp0\n.", "does not begin"),
        (b"\x80\x01N.", "protocol 1"),
        (b"\x80\x06N.", "protocol 6"),
        (b"\x80\x04.", "stops inside"),
        (b"\x80\x04NN.", "stops inside"),
        (b"\x80\x04(N.", "stops inside"),
        (b"\x80\x04Na.", "damaged"),
        (b"\x80\x04}Na.", "append to something else"),
        (b"\x80\x04]N(u.", "damaged|something else"),
        (b"\x80\x04}(Nu.", "something else than a dict"),
        (b"\x80\x04})Ns.", "no name or number"),
        (b"\x80\x04}(\x8a\x05\x00\x00\x00\x00\x01Nu.", "no name or number"),
        (b"\x80\x04\x8f(G\x7f\xf8\x00\x00\x00\x00\x00\x00\x90.", "set of something else"),
        (b"\x80\x04h\x07.", "KeyError"),
        (b"\x80\x04q\x00.", "IndexError"),
        (b"\x80\x04\x94.", "IndexError"),
        (b"\x80\x04t.", "IndexError"),
        (b"\x80\x04\x87.", "IndexError"),
        (b"\x80\x04R.", "IndexError"),
        (b"\x80\x04\x8c\x02\xff\xfe.", "UnicodeDecodeError"),
        (b"\x80\x04cabc.", "name without end"),
        (b"\x80\x04c" + b"a" * 300 + b"\nb\n.", "name without end"),
        (b"\x80\x04\x8a\xff" + b"\x01" * 255 + b".", "255 bytes is longer"),
    ],
)
def test_damage_is_told(data, message):
    with nothing_runs(), pytest.raises(CheckpointError, match=message):
        load(data, SNAPSHOT_NAMES)


@pytest.mark.parametrize("code", [b"\x8d", b"\x8e", b"\x95"])
@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**12])
def test_huge_lengths_cost_nothing(code, length):
    with pytest.raises(CheckpointError, match="truncated"):
        load(b"\x80\x04" + code + struct.pack("<Q", length) + b"abc.")


@pytest.mark.parametrize("code", [b"X", b"B"])
def test_long_lengths_are_checked_against_the_file(code):
    with pytest.raises(CheckpointError, match="truncated"):
        load(b"\x80\x04" + code + b"\xff\xff\xff\xffabc.")


def test_memo_with_far_numbers_takes_no_memory():
    assert load(b"\x80\x04Nr\xff\xff\xff\xff.") is None


def test_billion_laughs_cost_nothing():
    """Each level refers ten times to the one below: 10^30 leaves, if anyone unfolded them."""
    pieces = [b"]q\x00"]
    for level in range(30):
        pieces.append(b"](" + bytes([ord("h"), level]) * 10 + b"eq" + bytes([level + 1]))
    # The value is on top of 30 others; a tuple of all keeps the stream well-formed.
    data = b"\x80\x04(" + b"".join(pieces) + b"t."
    top = load(data)[-1]
    assert len(top) == 10
    for name, arguments in (("torch\ndevice\n", b"\x85"), ("torch\nSize\n", b"\x85")):
        attack = (
            b"\x80\x04(" + b"".join(pieces) + b"c" + name.encode() + b"h\x1e" + arguments + b"Rt."
        )
        with pytest.raises(CheckpointError):
            load(attack, SNAPSHOT_NAMES)


@pytest.mark.parametrize(
    ("name", "argument", "pack"),
    [
        ("_codecs\nencode\n", b"X" + struct.pack("<I", 5000) + b"a" * 5000, b"h\x02\x86"),
        ("builtins\nset\n", b"](" + b"K\x01" * 5000 + b"e", b"\x85"),
    ],
)
def test_one_long_value_in_many_calls_is_refused(name, argument, pack):
    """A text of 5 kB that is encoded a million times would be 5 GB out of a small file."""
    calls = b"h\x00h\x01" + pack + b"R"
    data = (
        b"\x80\x04(c"
        + name.encode()
        + b"q\x00"
        + argument
        + b"q\x01"
        + text("latin1")
        + b"q\x02"
        + calls * 200
        + b"t."
    )
    with pytest.raises(CheckpointError, match="repeats its values"):
        load(data, SNAPSHOT_NAMES)


def test_bytes_of_protocol_2_are_read():
    data = pickle.dumps({"a": bytes(range(256)), "b": b"\x00"}, 2)
    assert with_bytes(load(data, SNAPSHOT_NAMES)) == {"a": bytes(range(256)), "b": b"\x00"}


def test_deep_nesting_ends_in_one_error():
    with pytest.raises(CheckpointError, match="deeper than 100"):
        load(b"\x80\x04" + b"(" * 101 + b".")
    # Tuples of one need no mark; they nest without recursion, here and when they are freed.
    value = load(b"\x80\x04)" + b"\x85" * 20_000 + b".")
    assert len(value) == 1


def test_stand_ins_are_found_by_full_name_only():
    seen = []
    allowed = {"a.b.c": StandIn("a.b.c", call=lambda arguments: seen.append(arguments))}
    assert load(b"\x80\x02ca.b\nc\nK\x05\x85R.", allowed) is None
    assert seen == [(5,)]
    for name in ("ca.b\nd\n", "cA.b\nc\n", "c\na.b.c\n", "ca.b.c\n\n", "ca.b\nc.__call__\n"):
        with pytest.raises(UnsafeCheckpointError):
            load(b"\x80\x02" + name.encode() + b"K\x05\x85R.", allowed)


FRAGMENTS = st.one_of(
    st.sampled_from([op.code.encode("latin-1") for op in pickletools.opcodes]),
    st.sampled_from(sorted(SNAPSHOT_NAMES)).map(
        lambda name: b"c" + b"\n".join(part.encode() for part in name.rsplit(".", 1)) + b"\n"
    ),
    st.sampled_from(["posix", "system", "builtins", "eval", "latin1", "f8", "<", "class"]).map(
        text
    ),
    st.sampled_from([b"cposix\nsystem\n", b"cbuiltins\neval\n", b"h\x00", b"q\x00", b"K\x05"]),
    st.sampled_from(
        [b")R", b"\x85R", b"\x86R", b"\x87R", b")\x81", b"}b", b"(t", b"}", b"]", b"("]
    ),
    st.binary(max_size=6),
)


@settings(deadline=None, max_examples=300)
@given(st.lists(FRAGMENTS, max_size=25))
def test_random_programs_end_in_a_value_or_a_checkpoint_error(fragments):
    data = protocol(*fragments)
    with nothing_runs(), contextlib.suppress(CheckpointError):
        load(data, SNAPSHOT_NAMES)
