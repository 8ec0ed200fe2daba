"""Files of logits with labels: safetensors, NPZ and Parquet."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from diffcal.core.runs import write_atomic
from diffcal.core.tensors import as_tensor
from diffcal.errors import DataError

__all__ = ["LogitsFile", "load_logits", "save_logits"]

SUFFIXES = (".npz", ".parquet", ".safetensors")
HEAD = ("head_weight", "head_bias")
KEYS = ("logits", "probs", "labels", "soft_labels", "class_names", "features", *HEAD)


@dataclass(frozen=True)
class LogitsFile:
    """Content of a file: logits or probabilities, hard or soft labels (both kinds may be there)."""

    path: Path
    logits: Float[Tensor, "n k"] | None
    probs: Float[Tensor, "n k"] | None
    labels: Int[Tensor, " n"] | None
    soft_labels: Float[Tensor, "n k"] | None
    class_names: tuple[str, ...] | None = None
    features: Float[Tensor, "n d"] | None = None
    """Inputs of the last linear layer, for post-hoc methods that need them."""
    head: tuple[Float[Tensor, "k d"], Float[Tensor, " k"]] | None = None
    """Weight and bias of that layer."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a metric: the scores and the labels, soft ones if there are any."""
        scores = {"logits": self.logits, "probs": self.probs}
        labels = {"soft_labels": self.soft_labels}
        if self.soft_labels is None:
            labels = {"labels": self.labels}
        return {key: value for key, value in {**scores, **labels}.items() if value is not None}


def load_logits(path: Path | str) -> LogitsFile:
    """Logits (or probabilities) and labels of a file.

    NPZ and safetensors hold arrays ``logits`` or ``probs`` ``[n, k]`` and ``labels`` ``[n]`` or
    ``soft_labels`` ``[n, k]``; Parquet holds columns of these names, lists where ``[n, k]``. NPZ may
    hold ``class_names`` as strings. ``features`` ``[n, d]`` (the inputs of the last linear layer) may
    be there, and in NPZ and safetensors ``head_weight`` ``[k, d]`` and ``head_bias`` ``[k]``. Pickled
    content is never loaded.

    Raises:
        DataError: unknown suffix, unreadable or damaged file, missing or ill-shaped arrays.
    """
    path = Path(path)
    readers = {".npz": _read_npz, ".parquet": _read_parquet, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise DataError(f"'{path}' must end in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"'{path}' does not exist")
    try:
        arrays = readers[path.suffix](path)
    except DataError:
        raise
    except Exception as error:  # every library has its own errors for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"'{path}' cannot be read as {path.suffix[1:]}: {reason}") from error
    return _checked(path, arrays)


def save_logits(
    path: Path | str,
    *,
    logits: Float[Tensor, "n k"] | None = None,
    probs: Float[Tensor, "n k"] | None = None,
    labels: Int[Tensor, " n"] | None = None,
    soft_labels: Float[Tensor, "n k"] | None = None,
    features: Float[Tensor, "n d"] | None = None,
    head: tuple[Float[Tensor, "k d"], Float[Tensor, " k"]] | None = None,
) -> None:
    """Write logits or probabilities (float32) and labels (int64, float32 if soft) in the format of
    the suffix, with features and the last linear layer's weight and bias (float32) if given.

    Raises:
        DataError: unknown suffix, no labels, not exactly one of logits and probabilities, or a head
            for Parquet, which has no place for it.
    """
    path = Path(path)
    if head is not None and path.suffix == ".parquet":
        raise DataError(
            f"'{path}': Parquet holds rows only; write the head to .npz or .safetensors"
        )
    if labels is None and soft_labels is None:
        raise DataError("give labels or soft_labels")
    floats = {"logits": logits, "probs": probs, "soft_labels": soft_labels, "features": features}
    floats |= dict(zip(HEAD, head or (None, None), strict=True))
    arrays = {
        name: value.detach().float().contiguous().cpu()
        for name, value in floats.items()
        if value is not None
    }
    if labels is not None:
        arrays["labels"] = labels.detach().long().contiguous().cpu()
    _checked(path, dict(arrays))
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        data = save(arrays, metadata={"format": "diffcal-logits/1"})
        write_atomic(path, lambda file: file.write(data))
    elif path.suffix == ".npz":
        numbers: dict[str, Any] = {name: value.numpy() for name, value in arrays.items()}
        write_atomic(path, lambda file: np.savez_compressed(file, **numbers))
    elif path.suffix == ".parquet":
        write_atomic(path, lambda file: _write_parquet(file, arrays))
    else:
        raise DataError(f"'{path}' must end in {', '.join(SUFFIXES)}")


def _read_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"'{path}' is not an NPZ archive")
        return {key: file[key] for key in file.files if key in KEYS}


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {key: value for key, value in load_file(path).items() if key in KEYS}


def _read_parquet(path: Path) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [name for name in pq.read_schema(path).names if name in KEYS]
    table = pq.read_table(path, columns=names)
    arrays = {}
    for name in names:
        column = table.column(name).combine_chunks()
        if column.null_count:
            raise DataError(f"'{path}': column '{name}' has {column.null_count} missing values")
        kind = column.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            lengths = np.unique(column.value_lengths().to_numpy())
            if len(lengths) > 1:
                raise DataError(f"'{path}': rows of '{name}' have different lengths")
        if pa.types.is_nested(kind):
            values = column.flatten().to_numpy(zero_copy_only=False)
            arrays[name] = values.reshape(len(column), -1) if len(column) else values
        else:
            arrays[name] = column.to_numpy(zero_copy_only=False)
    return arrays


def _write_parquet(file: Any, arrays: dict[str, Tensor]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {}
    for name, tensor in arrays.items():
        flat = pa.array(tensor.flatten().numpy())
        wide = tensor.ndim == 2
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, tensor.shape[1]) if wide else flat
    pq.write_table(pa.table(columns), file, compression="zstd")


def _checked(path: Path, arrays: dict[str, Any]) -> LogitsFile:
    names = arrays.pop("class_names", None)
    tensors = {}
    for name, value in arrays.items():
        array = value if isinstance(value, Tensor) else np.asarray(value)
        if not isinstance(array, Tensor) and array.dtype.kind not in "fiu":
            raise DataError(f"'{path}': '{name}' holds {array.dtype}, expected numbers")
        tensors[name] = as_tensor(array, f"'{path}': '{name}'")
    found = ", ".join(tensors) or "nothing usable"
    if ("logits" in tensors) == ("probs" in tensors):
        raise DataError(f"'{path}' must hold exactly one of 'logits' and 'probs'; it has {found}")
    if "labels" not in tensors and "soft_labels" not in tensors:
        raise DataError(f"'{path}' must hold 'labels' or 'soft_labels'; it has {found}")
    scores = tensors.get("logits", tensors.get("probs"))
    assert scores is not None
    if scores.ndim != 2 or not scores.is_floating_point():
        raise DataError(
            f"'{path}': scores must be floating [n, k], got {scores.dtype} {list(scores.shape)}"
        )
    labels, soft = tensors.get("labels"), tensors.get("soft_labels")
    if labels is not None:
        if labels.is_floating_point() or labels.shape != scores.shape[:1]:
            raise DataError(
                f"'{path}': labels must be integers [{len(scores)}], "
                f"got {labels.dtype} {list(labels.shape)}"
            )
        labels = labels.long()
    if soft is not None and (soft.shape != scores.shape or not soft.is_floating_point()):
        raise DataError(
            f"'{path}': soft_labels must be floating {list(scores.shape)}, "
            f"got {soft.dtype} {list(soft.shape)}"
        )
    features = tensors.get("features")
    if features is not None and (
        features.ndim != 2 or len(features) != len(scores) or not features.is_floating_point()
    ):
        raise DataError(
            f"'{path}': features must be floating [{len(scores)}, d], "
            f"got {features.dtype} {list(features.shape)}"
        )
    class_names = None if names is None else tuple(map(str, np.asarray(names).reshape(-1).tolist()))
    if class_names is not None and len(class_names) != scores.shape[1]:
        raise DataError(
            f"'{path}': there are {len(class_names)} class_names for {scores.shape[1]} classes"
        )
    return LogitsFile(
        path,
        tensors.get("logits"),
        tensors.get("probs"),
        labels,
        soft,
        class_names,
        features,
        _checked_head(path, tensors, scores.shape[1], features),
    )


def _checked_head(
    path: Path, tensors: dict[str, Tensor], classes: int, features: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    found = [tensors[name] for name in HEAD if name in tensors]
    if not found:
        return None
    if len(found) == 1:
        raise DataError(f"'{path}' must hold both {' and '.join(HEAD)}, or neither")
    weight, bias = found
    columns = weight.shape[-1] if features is None else features.shape[1]
    if weight.shape != (classes, columns) or bias.shape != (classes,):
        raise DataError(
            f"'{path}': head_weight must be [{classes}, {columns}] and head_bias [{classes}], "
            f"got {list(weight.shape)} and {list(bias.shape)}"
        )
    return weight, bias
