"""Writes snapshots as EDM's own code would, opcode by opcode, so that tests can bend each part."""

import struct
from dataclasses import dataclass
from typing import Any

import torch

MAGIC = 0x1950A86A20F9469CFC6C
SYSTEM = {
    "protocol_version": 1001,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}
STORAGES = {
    torch.float32: "FloatStorage",
    torch.float64: "DoubleStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
}
SOURCE = "raise RuntimeError('the embedded source was executed')\n" * 8


@dataclass
class Global:
    """A name, without a call."""

    name: str


@dataclass
class Call:
    """``name(*arguments)``."""

    name: str
    arguments: tuple[Any, ...]


@dataclass
class New:
    """``name.__new__(name)``, then its state."""

    name: str
    state: Any


@dataclass
class Raw:
    """Opcodes as they are; they must leave one value."""

    opcodes: bytes


def emit(value: Any) -> bytes:
    """Opcodes that leave ``value`` on the stack."""
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        data = value.to_bytes(12, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data
    if isinstance(value, bytes):
        return b"B" + struct.pack("<I", len(value)) + value
    if isinstance(value, tuple):
        return b"(" + b"".join(map(emit, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(emit, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(emit(k) + emit(v) for k, v in value.items()) + b"u"
    if isinstance(value, Global):
        module, _, name = value.name.rpartition(".")
        return b"c" + module.encode() + b"\n" + name.encode() + b"\n"
    if isinstance(value, Call):
        return emit(Global(value.name)) + emit(value.arguments) + b"R"
    if isinstance(value, New):
        return emit(Global(value.name)) + b")\x81" + emit(value.state) + b"b"
    assert isinstance(value, Raw)
    return value.opcodes


def stream(value: Any, version: int = 2) -> bytes:
    """A whole pickle of ``value``."""
    return b"\x80" + bytes([version]) + emit(value) + b"."


def storage(tensor: torch.Tensor, **bent: Any) -> bytes:
    """torch's legacy stream of the numbers of ``tensor``; ``bent`` replaces parts of it."""
    key, count = "94128", tensor.numel()
    reference = (
        "storage",
        Global(f"torch.{STORAGES[tensor.dtype]}"),
        key,
        "cuda:0",
        bent.get("promised", count),
        None,
    )
    return b"".join(
        [
            stream(bent.get("magic", MAGIC)),
            stream(bent.get("protocol", 1001)),
            stream(bent.get("system", SYSTEM)),
            b"\x80\x02" + emit(bent.get("reference", reference)) + b"Q.",
            stream(bent.get("keys", [key])),
            struct.pack("<q", bent.get("count", count)),
            bent.get("data", tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()),
        ]
    )


def stored(tensor: torch.Tensor, **bent: Any) -> Call:
    """A tensor; ``offset``, ``shape`` and ``stride`` may be bent, or the whole ``storage``."""
    data = bent.get("storage", storage(tensor))
    return Call(
        "torch._utils._rebuild_tensor_v2",
        (
            Call("torch.storage._load_from_bytes", (data,)),
            bent.get("offset", 0),
            bent.get("shape", tuple(tensor.shape)),
            bent.get("stride", tensor.contiguous().stride()),
            False,
            Call("collections.OrderedDict", ()),
        ),
    )


def number(value: float) -> Call:
    """A numpy float64 scalar."""
    dtype = Raw(
        emit(Call("numpy.dtype", ("f8", False, True)))
        + emit((3, "<", None, None, None, -1, -1, 0))
        + b"b"
    )
    return Call("numpy.core.multiarray.scalar", (dtype, struct.pack("<d", value)))


def persistent(class_name: str, state: dict[str, Any], **bent: Any) -> Call:
    """An instance of one of EDM's decorated classes."""
    meta = {
        "type": "class",
        "version": 6,
        "module_src": SOURCE,
        "class_name": class_name,
        "state": state,
    } | bent
    return Call("torch_utils.persistence._reconstruct_persistent_obj", (meta,))


def module(source: torch.nn.Module, init_kwargs: dict[str, Any] | None = None) -> Any:
    """A module of ours as EDM would have written it."""
    state = {
        "training": False,
        "_parameters": {
            name: None
            if p is None
            else Call(
                "torch._utils._rebuild_parameter",
                (stored(p.detach()), False, Call("collections.OrderedDict", ())),
            )
            for name, p in source._parameters.items()
        },
        "_buffers": {name: None if b is None else stored(b) for name, b in source._buffers.items()},
        "_modules": {
            name: None if child is None else module(child)
            for name, child in source._modules.items()
        },
    }
    if isinstance(source, torch.nn.ModuleDict):
        return New("torch.nn.modules.container.ModuleDict", state)
    state |= {"_init_args": (), "_init_kwargs": init_kwargs, "skip_scale": number(0.5)}
    return persistent(type(source).__name__, state)


def snapshot(network: torch.nn.Module) -> dict[str, Any]:
    """Content of a ``network-snapshot-*.pkl`` with the weights of ``network``."""
    kwargs = dict(network.config["kwargs"])
    if kwargs.get("sigma_max") == "inf":
        kwargs["sigma_max"] = float("inf")
    return {
        "ema": module(network, kwargs),
        "loss_fn": persistent("EDMLoss", {"P_mean": -1.2}),
        "augment_pipe": None,
        "dataset_kwargs": {"path": "x.zip", "max_size": 5},
    }
