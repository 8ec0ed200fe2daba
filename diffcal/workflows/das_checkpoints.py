"""Several models of one index: trainings with other seeds, or checkpoints of one training."""

from dataclasses import replace
from pathlib import Path

from diffcal.attribution.presets import PRESETS
from diffcal.core.runs import read_json
from diffcal.errors import CheckpointError, ConfigError
from diffcal.workflows.das_config import DasConfig
from diffcal.workflows.generate import ModelConfig

__all__ = ["kept_checkpoints", "models_of", "require_stages"]


def models_of(config: DasConfig) -> list[ModelConfig]:
    """The models whose scores are averaged, the fully trained one last; usually a single one.

    Raises:
        ConfigError: the method compares checkpoints of a training, and there is only one model.
        CheckpointError: the training kept no such checkpoints.
    """
    if config.models:
        return [replace(config.model, source=source) for source in config.models]
    if len(config.checkpoints) == 1:
        return [config.model]
    run = Path(config.model.source)
    if not (run / "checkpoints").is_dir():
        shares = ", ".join(f"{share:g}" for share in config.checkpoints)
        raise ConfigError(
            f"'{config.method}' needs the model at several stages of its training: give a run of "
            f"diffcal train-diffusion that kept them (--set keep=[{shares}]), or name each "
            "(--model A --model B)"
        )
    found = kept_checkpoints(run, config.checkpoints)
    return [replace(config.model, source=str(folder)) for folder in found]


def kept_checkpoints(run: Path, shares: tuple[float, ...]) -> list[Path]:
    """Checkpoints that a training kept at these shares of its steps; the last is its finished one.

    Raises:
        CheckpointError: one is missing.
    """
    config = run / "config.json"
    if not config.is_file():
        raise CheckpointError(f"'{run}' is not a run of diffcal train-diffusion")
    steps = read_json(config)["optimizer"]["steps"]
    folders = []
    for share in shares:
        step = _step(share, steps)
        finished = step == steps
        folder = run / "checkpoint" if finished else run / "checkpoints" / f"step-{step:07d}"
        if not (folder / "config.json").is_file():
            kept = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
            raise CheckpointError(
                f"'{run}' kept no checkpoint of step {step} ({100 * share:g} % of {steps}); it has "
                f"{', '.join(kept) or 'none'}: train again with --set keep=[{share:g}], or in das lds "
                "with the method named from the start"
            )
        folders.append(folder)
    return folders


def require_stages(method: str, steps: int) -> None:
    """Refuse a training of so few steps that it has no stages for ``method`` to compare.

    Raises:
        ConfigError: the method compares checkpoints, and all of them would be the finished model.
    """
    shares = PRESETS[method].get("checkpoints", [1.0])
    if len(shares) > 1 and all(_step(share, steps) == steps for share in shares):
        raise ConfigError(
            f"'{method}' compares the model at several stages of its training, but that has "
            f"{steps} step: raise optimizer.steps to {len(shares)} or more"
        )


def _step(share: float, steps: int) -> int:
    """The step after which a training of ``steps`` keeps the checkpoint of this share."""
    return max(1, round(share * steps))
