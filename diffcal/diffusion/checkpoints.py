"""Denoiser checkpoints: ``model.safetensors`` and ``config.json`` in a folder, and loading by name."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffcal.core.devices import resolve_device, resolve_dtype
from diffcal.core.runs import read_json, sha256_file, write_atomic, write_json
from diffcal.diffusion.denoisers import Denoiser
from diffcal.diffusion.edm_denoiser import EDMDenoiser
from diffcal.diffusion.edm_networks import build_network
from diffcal.diffusion.preconditioning import Preconditioner
from diffcal.errors import ArtifactError, CheckpointError, ConfigError

__all__ = [
    "FORMAT",
    "bundled_checkpoint",
    "compare_layout",
    "empty_network",
    "load_denoiser",
    "save_denoiser",
    "write_checkpoint",
]

FORMAT = "diffcal-denoiser/1"
BUNDLED = "bundled:"
_REQUIRED = ("preconditioner", "kwargs", "class_names")
_KEYS = ("format", *_REQUIRED, "channels", "sha256", "training")
_DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def save_denoiser(
    folder: Path | str,
    network: Preconditioner,
    class_names: Sequence[str],
    training_info: Mapping[str, Any],
    dtype: str = "float32",
) -> None:
    """Write a network from ``build_network`` as a checkpoint folder, file by file atomically.

    Parameters are stored as ``dtype``; buffers (filters, frequencies, noise tables) stay float32,
    since their last bits show in the images.

    Args:
        class_names: One name for each class, or empty for numbers.
        training_info: JSON values that tell where the weights come from.
        dtype: ``float32``, ``float16`` or ``bfloat16``.

    Raises:
        ConfigError: the network has no configuration, or the names do not fit it.
        CheckpointError: weights are not finite, or not in the range of ``dtype``.
        ArtifactError: the folder cannot be written.
    """
    config = getattr(network, "config", None)
    if config is None:
        raise ConfigError(
            "only networks made by build_network can be saved: they know their config"
        )
    number_format = resolve_dtype(dtype)
    parameters = {name for name, _ in network.named_parameters()}
    tensors: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        kept = number_format if name in parameters else torch.float32
        tensors[name] = tensor.detach().to("cpu", kept).contiguous()
        if not bool(tensors[name].isfinite().all()):
            raise CheckpointError(
                f"'{name}' has values that are not finite as {kept}".replace("torch.", "")
                + ("; save as float32 or bfloat16" if kept == torch.float16 else "")
            )
    write_checkpoint(Path(folder), config, tensors, class_names, training_info)


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    class_names: Sequence[str],
    training_info: Mapping[str, Any],
) -> None:
    """Write configuration and named contiguous CPU tensors as a checkpoint folder.

    The weights go first and ``config.json`` carries their hash, so that a reader notices when a
    process was killed between the two.

    Raises:
        ConfigError: names do not fit the configuration.
        ArtifactError: the folder cannot be written, or holds something else.
    """
    kwargs = config["kwargs"]
    _check_names(class_names, kwargs.get("label_dim", 0))
    path = folder / "config.json"
    if path.exists():
        found = read_json(path)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ArtifactError(
                f"'{folder}' holds a config.json of something else; choose another output folder"
            )
    digest = hashlib.sha256()
    write_atomic(folder / "model.safetensors", lambda file: _write_tensors(file, tensors, digest))
    write_json(
        path,
        {
            "format": FORMAT,
            "preconditioner": config["preconditioner"],
            "kwargs": kwargs,
            "class_names": list(class_names),
            "channels": kwargs["img_channels"],
            "sha256": digest.hexdigest(),
            "training": dict(training_info),
        },
    )


def load_denoiser(
    source: Path | str, device: str = "cpu", dtype: str = "float32", **options: Any
) -> Denoiser:
    """Denoiser of a checkpoint folder of ours, a diffusers folder, or a diffusers hub name.

    Args:
        source: Folder, hub name ``owner/name``, or ``bundled:NAME`` for weights that come with
            diffcal (see :func:`bundled_checkpoint`).
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        dtype: ``float32``, or ``bfloat16``/``float16`` for autocast around the network.
        options: For diffusers models only: see
            :func:`diffcal.diffusion.diffusers_denoisers.load_diffusers_denoiser`.

    Raises:
        CheckpointError: no checkpoint there, it is damaged, or its ``config.json`` has a key that
            diffcal does not know.
        ConfigError: unknown device, number format or option.
    """
    if str(source).startswith(BUNDLED):
        source = bundled_checkpoint(str(source).removeprefix(BUNDLED))
    folder = Path(source)
    if folder.is_file():
        raise CheckpointError(
            f"'{source}' is a file; give the checkpoint folder, or for an EDM pickle first run: "
            f"diffcal checkpoints import {source} --out FOLDER"
        )
    config = _own_config(folder)
    if config is not None:
        if options:
            raise ConfigError(
                f"'{source}' is a checkpoint of diffcal's own kind, which takes no option "
                f"'{next(iter(options))}'"
            )
        return _load_own(folder, config, device, dtype)

    from diffcal.diffusion.diffusers_denoisers import is_diffusers_source, load_diffusers_denoiser

    if not is_diffusers_source(source):
        state = "holds neither a diffcal nor a diffusers model" if folder.is_dir() else "is missing"
        raise CheckpointError(
            f"checkpoint '{source}' {state}; expected a folder with config.json and "
            "model.safetensors, a diffusers folder, or a hub name owner/name"
        )
    return load_diffusers_denoiser(source, device=device, dtype=dtype, **options)


def bundled_checkpoint(name: str) -> Path:
    """Folder of small weights that come with diffcal: in an installed wheel, or in the repository.

    Raises:
        CheckpointError: there are none of this name.
    """
    package = Path(__file__).parents[1]
    places = (package / "bundled", package.parent / "checkpoints")
    for place in places:
        if (place / name / "config.json").is_file():
            return place / name
    known = sorted({p.parent.name for place in places for p in place.glob("*/config.json")})
    raise CheckpointError(f"diffcal comes with no checkpoint '{name}'; it has {', '.join(known)}")


def empty_network(config: Mapping[str, Any]) -> Preconditioner:
    """Network without memory (on the ``meta`` device), to compare or to fill.

    Raises:
        CheckpointError: the configuration does not describe a network.
    """
    try:
        with torch.device("meta"):
            return build_network(config)
    except ConfigError as error:
        raise CheckpointError(f"the checkpoint's configuration is not usable: {error}") from error


def compare_layout(found: Mapping[str, Sequence[int]], network: Preconditioner, what: str) -> None:
    """Refuse names or shapes that differ from the network's state.

    Raises:
        CheckpointError: names the first tensor that is missing, surplus or of another shape.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for names, word in (
        ([name for name in wanted if name not in found], "lacks"),
        ([name for name in found if name not in wanted], "has surplus"),
    ):
        if names:
            raise CheckpointError(
                f"{what} {word} {len(names)} of the network's {len(wanted)} tensors, first "
                f"'{names[0]}'"
                if word == "lacks"
                else f"{what} {word} tensors ({len(names)}), first '{names[0]}'"
            )
    for name, shape in wanted.items():
        if tuple(found[name]) != shape:
            raise CheckpointError(
                f"{what}: '{name}' has shape {list(found[name])}, the network needs {list(shape)}"
            )


def _own_config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = read_json(path)
    except ArtifactError as error:
        raise CheckpointError(f"checkpoint '{folder}': {error}") from error
    if not isinstance(config, dict) or "format" not in config:
        return None
    if config["format"] != FORMAT:
        raise CheckpointError(
            f"'{path}' has format {str(config['format'])[:60]!r}; this version reads '{FORMAT}'"
        )
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise CheckpointError(f"'{path}' lacks '{missing[0]}'")
    unknown = [key for key in config if key not in _KEYS]
    if unknown:
        raise CheckpointError(
            f"'{path}' has the unknown key '{unknown[0]}': correct or remove it (known keys: "
            f"{', '.join(_KEYS)}; whatever else is worth keeping belongs into 'training')"
        )
    names = config["class_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"'{path}': class_names must be a list of names")
    if not isinstance(config["kwargs"], dict):
        raise CheckpointError(f"'{path}': kwargs must be a table of arguments")
    return config


def _load_own(folder: Path, config: dict[str, Any], device: str, dtype: str) -> EDMDenoiser:
    target = resolve_device(device)
    resolve_dtype(dtype)
    network = empty_network({key: config[key] for key in ("preconditioner", "kwargs")})
    path = folder / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"checkpoint '{folder}' lacks model.safetensors")
    tensors = _read_tensors(path, network)
    if "sha256" in config and sha256_file(path) != config["sha256"]:
        raise CheckpointError(
            f"'{path}' does not have the hash that config.json promises: it was changed, or its "
            "writing was interrupted; write or fetch the checkpoint again"
        )
    network.load_state_dict(tensors, assign=True)
    try:
        _check_names(config["class_names"], network.label_dim)
    except ConfigError as error:
        raise CheckpointError(f"checkpoint '{folder}': {error}") from error
    return EDMDenoiser(network.to(target), config["class_names"] or None, dtype)


def _read_tensors(path: Path, network: Preconditioner) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
            compare_layout(shapes, network, f"'{path}'")
            # Copies, because the file is mapped and may be replaced while the network lives.
            tensors = {name: file.get_tensor(name).to(torch.float32, copy=True) for name in names}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is truncated or damaged: {error}") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"'{path}': '{name}' holds NaN or infinite values")
    return tensors


def _check_names(class_names: Sequence[str], classes: int) -> None:
    if class_names and len(class_names) != classes:
        raise ConfigError(f"{len(class_names)} class names for a network with {classes} classes")


def _write_tensors(file: IO[bytes], tensors: Mapping[str, Tensor], digest: Any) -> None:
    """Stream a safetensors file, tensor by tensor, so that no second copy of the weights exists."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    # The format wants wider types first, so that every tensor is aligned.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    pieces: Iterable[Any] = (
        tensor.reshape(-1).view(torch.uint8).numpy().data for _, tensor in ordered
    )
    for piece in (len(text).to_bytes(8, "little"), text, *pieces):
        digest.update(piece)
        file.write(piece)
