"""Calibrators on disk: one safetensors file with the settings in its header."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save

from diffcal.calibration.posthoc.calibrator import Calibrator
from diffcal.calibration.posthoc.pipeline import Pipeline
from diffcal.calibration.posthoc.registry import build_calibrator, calibrator_name
from diffcal.config import config_to_dict
from diffcal.core.runs import read_json, write_atomic, write_json
from diffcal.errors import ArtifactError, CheckpointError, ConfigError

__all__ = ["calibrator_settings", "load_calibrator", "save_calibrator"]

FORMAT = "diffcal-calibrator/1"


def calibrator_settings(calibrator: Calibrator) -> list[dict[str, Any]]:
    """Settings of every stage (one for a single calibrator), ready for JSON."""
    stages = calibrator.stages if isinstance(calibrator, Pipeline) else [calibrator]
    return [config_to_dict(stage) for stage in stages]


def save_calibrator(calibrator: Calibrator, path: Path | str) -> None:
    """Write a fitted calibrator to ``.safetensors`` (any size) or ``.json`` (small, readable).

    Raises:
        ConfigError: unknown suffix.
        NotFittedError: nothing was fitted yet.
    """
    path = Path(path)
    head = {
        "format": FORMAT,
        "method": calibrator_name(calibrator),
        "settings": calibrator_settings(calibrator),
    }
    state = {name: value.detach().cpu() for name, value in calibrator.state_dict().items()}
    if path.suffix == ".json":
        values = {
            name: {"dtype": str(value.dtype).removeprefix("torch."), "values": _numbers(value)}
            for name, value in state.items()
        }
        write_json(path, {**head, "state": values})
    elif path.suffix == ".safetensors":
        tensors = {name: value.contiguous() for name, value in state.items()}
        # one key: several would be written in random order, and files would differ
        data = save(tensors, metadata={"calibrator": json.dumps(head)})
        write_atomic(path, lambda file: file.write(data))
    else:
        raise ConfigError(f"'{path}' must end in .safetensors or .json")


def load_calibrator(path: Path | str) -> Calibrator:
    """A fitted calibrator of :func:`save_calibrator`; it gives the same output bit for bit.

    Raises:
        CheckpointError: the file is missing, damaged or holds something else.
    """
    path = Path(path)
    try:
        head, state = (_read_json if path.suffix == ".json" else _read_safetensors)(path)
        if head["format"] != FORMAT:
            raise CheckpointError(f"format {head['format']!r}, expected {FORMAT!r}")
        names = head["method"].split("+")
        stages = [
            build_calibrator(name, {name: settings})
            for name, settings in zip(names, head["settings"], strict=True)
        ]
        made = stages[0] if len(stages) == 1 else Pipeline.of(*stages)
        return made.load_state_dict(state)
    except (CheckpointError, ConfigError, ArtifactError) as error:
        raise CheckpointError(f"'{path}' is not a saved calibrator: {error}") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"'{path}' is not a saved calibrator: {error!r}") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            head = json.loads((file.metadata() or {})["calibrator"])
            return head, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (KeyError, ValueError):
        raise
    except Exception as error:  # safetensors has errors of its own
        raise CheckpointError(str(error).splitlines()[0] if str(error) else repr(error)) from error


def _read_json(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch

    content = read_json(path)
    state = {
        name: torch.tensor(_restored(entry["values"]), dtype=getattr(torch, entry["dtype"]))
        for name, entry in content["state"].items()
    }
    return content, state


def _numbers(value: Any) -> Any:
    """Nested lists with infinity as text, which JSON has no number for."""

    def plain(item: Any) -> Any:
        if isinstance(item, list):
            return [plain(part) for part in item]
        return str(item) if item in (float("inf"), float("-inf")) else item

    return plain(value.tolist())


def _restored(item: Any) -> Any:
    if isinstance(item, list):
        return [_restored(part) for part in item]
    return float(item) if isinstance(item, str) else item
