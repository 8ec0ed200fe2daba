"""Where the parts of a diffusers model lie, and loading them without ever opening a pickle."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffcal.core.runs import read_json
from diffcal.diffusion.discrete_noise import check_scheduler_name
from diffcal.errors import ArtifactError, CheckpointError, UnsafeCheckpointError

__all__ = ["ModelFolder", "is_hub_name", "open_model_folder"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_PARTS = (
    "unet",
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)


@dataclass(frozen=True)
class ModelFolder:
    """A local folder with the parts of one model, each in a subfolder or in the folder itself."""

    path: Path
    index: Mapping[str, Any]
    """Content of ``model_index.json``; for a folder with one network, its class name alone."""
    variant: str | None = None
    """Which weight files to take where there are several, for example ``fp16``."""

    @property
    def class_name(self) -> str:
        """Class of the pipeline, or of the network where there is no pipeline."""
        return str(self.index.get("_class_name"))

    def part(self, name: str, marker: str = "config.json") -> Path:
        """Folder of the part called ``name``.

        Raises:
            CheckpointError: neither ``name/marker`` nor ``marker`` is there.
        """
        for folder in (self.path / name, self.path):
            if (folder / marker).is_file():
                return folder
        raise CheckpointError(
            f"'{self.path}' holds no {name}: expected {name}/{marker} or {marker} in it"
        )

    def weights_part(self, name: str) -> Path:
        """Folder of the part called ``name``, which must hold safetensors.

        Raises:
            UnsafeCheckpointError: its weights are pickles.
            CheckpointError: it has no weights.
        """
        folder = self.part(name)
        if any(folder.glob("*.safetensors")):
            return folder
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise UnsafeCheckpointError(
                f"'{folder}' has its weights only as a pickle ({pickles[0]}), which can run code when "
                "it is loaded; where you trust it, convert it once: <ModelClass>.from_pretrained("
                "folder, use_safetensors=False).save_pretrained(folder)"
            )
        raise CheckpointError(f"'{folder}' has a config, but no weights (*.safetensors)")

    def network(self, name: str, class_name: str, *, aliases: tuple[str, ...] = ()) -> nn.Module:
        """Network of the part called ``name``, in float32 and evaluation mode on the CPU.

        Args:
            name: The part, for example ``unet``.
            class_name: diffusers class that the part must be of.
            aliases: Former names of the class that configs may carry.

        Raises:
            CheckpointError: another class, damaged files, or weights that do not fit the config.
            UnsafeCheckpointError: its weights are pickles.
        """
        import diffusers
        from safetensors import SafetensorError

        folder = self.weights_part(name)
        found = _json(folder / "config.json").get("_class_name")
        if found not in (class_name, *aliases):
            raise CheckpointError(f"{name} of '{self.path}' is a {found}; supported: {class_name}")
        try:
            network, report = getattr(diffusers, class_name).from_pretrained(
                folder,
                torch_dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                variant=self.variant,
                output_loading_info=True,
            )
        except (
            ArithmeticError,
            AttributeError,
            ImportError,
            LookupError,
            NotImplementedError,
            OSError,
            RuntimeError,
            SafetensorError,
            TypeError,
            ValueError,
        ) as error:
            line = " ".join(str(error).split())[:300]
            raise CheckpointError(f"{name} of '{self.path}' cannot be loaded: {line}") from error
        # diffusers would go on with random numbers in the place of missing weights.
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            keys = sorted(map(str, report.get(kind) or ()))
            if keys:
                raise CheckpointError(
                    f"weights of {name} in '{self.path}' do not fit its config: {len(keys)} "
                    f"{kind.replace('_', ' ')}, first '{keys[0]}'"
                )
        return network.eval()

    def scheduler(self) -> Any:
        """Scheduler that the network was trained with.

        Raises:
            CheckpointError: there is none, or it is not of the discrete variance preserving kind.
        """
        import diffusers

        folder = self.part("scheduler", "scheduler_config.json")
        config = _json(folder / "scheduler_config.json")
        name = str(config.get("_class_name"))
        check_scheduler_name(name)
        try:
            return getattr(diffusers, name).from_config(config)
        except (ArithmeticError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"scheduler of '{self.path}' cannot be built: {' '.join(str(error).split())[:300]}"
            ) from error


def open_model_folder(
    source: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
) -> ModelFolder:
    """Folder of ``source``: a local one, or a hub name, whose files are downloaded first.

    Of a hub repository only configs, vocabularies and safetensors are fetched.

    Raises:
        CheckpointError: there is no such folder or repository, or it holds no diffusers model.
    """
    path = Path(source)
    if not path.is_dir():
        if not is_hub_name(str(source)):
            raise CheckpointError(
                f"'{source}' is neither a folder nor a hub name (owner/name); a diffusers model is "
                "the folder that save_pretrained wrote"
            )
        path = _download(str(source), revision, variant, cache_dir, local_files_only)
    elif revision is not None:
        raise CheckpointError(f"revision '{revision}' is for hub names; '{source}' is a folder")
    for name in ("model_index.json", "config.json"):
        if (path / name).is_file():
            return ModelFolder(path, _json(path / name), variant)
    raise CheckpointError(
        f"'{source}' holds no diffusers model: neither model_index.json nor config.json is in it"
    )


def is_hub_name(source: str) -> bool:
    """Whether ``source`` has the form ``owner/name``."""
    return _HUB_NAME.fullmatch(source) is not None


def _download(
    name: str,
    revision: str | None,
    variant: str | None,
    cache_dir: Path | None,
    local_files_only: bool,
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    middle = f".{variant}" if variant else ""
    weights = [
        pattern
        for stem in ("diffusion_pytorch_model", "model")
        for pattern in (
            f"{stem}{middle}.safetensors",
            f"{stem}{middle}-*-of-*.safetensors",
            f"{stem}.safetensors.index*.json",
        )
    ]
    configs = ["config.json", "scheduler_config.json"]
    vocabulary = ["*.json", "*.txt"]
    patterns = ["model_index.json", *configs, *weights]
    patterns += [f"{part}/{file}" for part in _PARTS for file in (*configs, *weights, *vocabulary)]
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_patterns=patterns,
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        line = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"'{name}' is not a folder here, and as a hub name it cannot be fetched: {line}"
        ) from error
    return Path(folder)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        content = read_json(path)
    except ArtifactError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' must hold a JSON object")
    return content
