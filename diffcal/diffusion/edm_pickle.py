"""EDM snapshot pickles into checkpoint folders, without running anything in them."""

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcal.core.runs import sha256_file
from diffcal.diffusion.checkpoints import compare_layout, empty_network, write_checkpoint
from diffcal.diffusion.edm_layers import resampling_filter
from diffcal.diffusion.edm_snapshot import Snapshot, read_snapshot
from diffcal.diffusion.preconditioning import PRECONDITIONERS, Preconditioner
from diffcal.errors import CheckpointError

__all__ = ["import_edm_pickle"]

_FILTER_TOLERANCE = 1e-6
_MAX_ELEMENTS = 1 << 30  # 4 GiB of float32; tensors that share one storage could ask for far more


def import_edm_pickle(
    path: Path | str,
    out_folder: Path | str,
    sha256: str | None = None,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Convert an EDM ``network-snapshot-*.pkl`` into a checkpoint folder of ours.

    Args:
        path: The pickle. Its embedded source text is never executed; see
            :mod:`diffcal.diffusion.edm_snapshot`.
        out_folder: Gets ``model.safetensors`` and ``config.json``.
        sha256: Refuse the file unless it has this hash.
        class_names: Names in label order; numbers if None.

    Returns:
        What was found: preconditioner, network, size, classes, parameters, hash of the pickle.

    Raises:
        UnsafeCheckpointError: the file names or calls something that is not on the list.
        CheckpointError: damaged, another hash, unknown arguments, keys or shapes that do not fit,
            changed filters, NaN.
        ConfigError: ``class_names`` of another length than the network's labels.
        ArtifactError: the folder cannot be written, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"'{path}' is not a file")
    digest = sha256_file(path)
    if sha256 is not None and digest != sha256.strip().lower():
        raise CheckpointError(
            f"'{path}' has SHA-256 {digest}, but {sha256.strip().lower()} was asked for; "
            "the download is damaged or another file"
        )
    snapshot = read_snapshot(path)
    network = empty_network(_configuration(snapshot))
    _compare_classes(snapshot, network)
    shapes = {name: stored.shape for name, stored in snapshot.tensors.items()}
    compare_layout(shapes, network, f"'{path.name}'")
    elements = sum(math.prod(shape) for shape in shapes.values())
    if elements > _MAX_ELEMENTS:
        raise CheckpointError(f"'{path.name}' has {elements} numbers, more than {_MAX_ELEMENTS}")
    tensors = {name: _checked(name, stored.tensor()) for name, stored in snapshot.tensors.items()}
    _check_buffers(tensors, network)
    config = network.config
    origin = {"imported_from": path.name, "sha256": digest, "dataset": snapshot.dataset}
    write_checkpoint(Path(out_folder), config, tensors, class_names or (), origin)
    kwargs = config["kwargs"]
    return {
        "checkpoint": str(out_folder),
        "preconditioner": config["preconditioner"],
        "network": kwargs["model_type"],
        "resolution": kwargs["img_resolution"],
        "channels": kwargs["img_channels"],
        "classes": network.label_dim,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "tensors": len(tensors),
        "pickle_sha256": digest,
    }


def _configuration(snapshot: Snapshot) -> dict[str, Any]:
    name = snapshot.preconditioner
    if name not in PRECONDITIONERS:
        raise CheckpointError(
            f"the snapshot holds a '{name}'; known are {', '.join(PRECONDITIONERS)}"
        )
    order = list(inspect.signature(PRECONDITIONERS[name].__init__).parameters)[1:-1]
    if len(snapshot.arguments) > len(order):
        raise CheckpointError(
            f"the snapshot gives {len(snapshot.arguments)} positional arguments to {name}, "
            f"which takes {len(order)}"
        )
    positional = dict(zip(order, snapshot.arguments, strict=False))
    twice = sorted(set(positional) & set(snapshot.kwargs))
    if twice:
        raise CheckpointError(f"the snapshot gives the argument '{twice[0]}' twice")
    return {"preconditioner": name, "kwargs": positional | snapshot.kwargs}


def _compare_classes(snapshot: Snapshot, network: Preconditioner) -> None:
    wanted = {name: type(module).__name__ for name, module in network.named_modules()}
    for name in (*wanted, *snapshot.classes):
        ours, theirs = wanted.get(name), snapshot.classes.get(name)
        if ours != theirs:
            raise CheckpointError(
                f"module '{name}' is {f'a {theirs}' if theirs else 'missing'} in the snapshot, but "
                f"its constructor arguments make it {f'a {ours}' if ours else 'absent'}"
            )


def _checked(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise CheckpointError(f"'{name}' holds {tensor.dtype} numbers instead of real ones")
    tensor = tensor.to(torch.float32)
    if not bool(tensor.isfinite().all()):
        raise CheckpointError(f"'{name}' holds NaN or infinite values")
    return tensor


def _check_buffers(tensors: dict[str, Tensor], network: Preconditioner) -> None:
    """Filters must be what the arguments say, as the forward pass takes short cuts for some."""
    taps = network.config["kwargs"].get("resample_filter", [1, 1])
    blocks_filter = resampling_filter(taps)
    for name, tensor in tensors.items():
        if not name.endswith("resample_filter"):
            continue
        if not torch.allclose(tensor, blocks_filter, rtol=0, atol=_FILTER_TOLERANCE):
            raise CheckpointError(f"'{name}' is not the filter of resample_filter {taps}")
    if "u" in tensors:
        table = tensors["u"]
        if bool((table.diff() >= 0).any()) or float(table[-1]) != 0:
            raise CheckpointError("'u', the table of noise levels, does not fall to 0")
