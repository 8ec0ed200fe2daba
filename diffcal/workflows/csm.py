"""Calibration-aware semantic mixing, from a denoiser to a soft-labelled data set.

Four stages, each an artefact of its own that the next one reads:

1. generate: draw groups of images between classes, one noise for each group (csm.md, 1.1 and 1.2);
2. annotate: measure how much of each class an image shows, in features of an encoder (1.3, 5.3);
3. publish: filter, and write Parquet with soft labels, a card and pictures;
4. train a classifier on real and mixed images: ``diffcal train-classifier``.

Source: Luo, Tao, Dong, Xu 2025, "Calibration-aware semantic mixing" (arXiv:2504.13548), as released;
the default annotator deviates (calibrated posterior over all classes, see
:mod:`diffcal.mixing.posterior`), and ``projection_sigmoid`` reproduces the release.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffcal.core.processes import process_state
from diffcal.core.runs import read_json
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ArtifactError
from diffcal.mixing.quality import FilterConfig
from diffcal.models.encoders import FeatureEncoder
from diffcal.workflows.annotate import AnnotationConfig, annotate_run, require_real_images
from diffcal.workflows.generate import GenerateConfig, ModelConfig, generate, open_model
from diffcal.workflows.preset_files import preset_config
from diffcal.workflows.publish import publish_dataset

__all__ = [
    "CsmConfig",
    "csm_config",
    "run_annotation",
    "run_csm",
    "run_generation",
    "run_publication",
]


@dataclass(frozen=True, kw_only=True)
class CsmConfig:
    """Settings of the stages; each stage checks its own folder against its own part."""

    generate: GenerateConfig = field(default_factory=GenerateConfig)
    annotation: AnnotationConfig = field(default_factory=AnnotationConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)


def csm_config(
    preset: str | None = None, overrides: Sequence[str] = (), *, file: Path | None = None
) -> CsmConfig:
    """Settings from a preset (``digits``, ``cifar10``), then a TOML file, then overrides.

    Args:
        overrides: As ``generate.plan.groups=45``.

    Raises:
        ConfigError: unknown preset or setting.
    """
    return preset_config(CsmConfig, "csm", preset, overrides, file=file)


def run_csm(
    config: CsmConfig,
    run: Path | str,
    *,
    denoiser: Denoiser | None = None,
    encoder: FeatureEncoder | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Generate, annotate and publish; resumes whatever ``run`` holds.

    Args:
        denoiser: Use this one, already loaded, in place of ``config.generate.model``: any object with
            the members of :class:`~diffcal.diffusion.denoisers.Denoiser`.
        encoder: Use this one in place of ``config.annotation.encoder``.

    Returns:
        The summaries of the stages by name.

    Raises:
        DiffcalError: see the stages; what was written before stays.
    """
    run = Path(run)
    denoiser = denoiser or _open(config.generate.model, device)
    require_real_images(config.annotation, denoiser.class_names)
    generated = generate(
        config.generate, run, denoiser=denoiser, device=device, overwrite=overwrite
    )
    annotated = annotate_run(
        config.annotation,
        run,
        denoiser=denoiser,
        encoder=encoder,
        device=device,
        overwrite=overwrite,
    )
    published = run_publication(config, run, overwrite=overwrite)
    return {"generate": generated, "annotate": annotated, "publish": published}


def run_generation(
    config: CsmConfig,
    run: Path | str,
    *,
    denoiser: Denoiser | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Only generate. See :func:`diffcal.workflows.generate.generate`."""
    return generate(
        config.generate, Path(run), denoiser=denoiser, device=device, overwrite=overwrite
    )


def run_annotation(
    config: CsmConfig,
    run: Path | str,
    *,
    denoiser: Denoiser | None = None,
    encoder: FeatureEncoder | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Annotate a generated run (again); the images stay, and so do other annotations.

    Encoders that look through a denoiser take the run's own, given as ``denoiser`` or opened where the
    run found it, unless ``annotation.encoder.source`` names another. An ``encoder`` at hand goes
    before ``config.annotation.encoder``.

    Raises:
        ArtifactError: there are no images, or the model there has other weights by now.
    """
    run = Path(run)
    asked = config.annotation.encoder
    looks = asked.kind in ("denoiser", "denoising_errors") and asked.source is None
    if encoder is None and looks:
        manifest = read_json(run / "generated" / "manifest.json")
        model = ModelConfig(**manifest["config"]["model"])
        denoiser = denoiser or _open(model, device)
        if denoiser.fingerprint != manifest["denoiser"]:
            raise ArtifactError(
                f"the model at '{model.source}' is not the one that drew the images of '{run}'; put "
                "it back, or name another encoder with annotation.encoder.source"
            )
    return annotate_run(
        config.annotation,
        run,
        denoiser=denoiser,
        encoder=encoder,
        device=device,
        overwrite=overwrite,
    )


def run_publication(
    config: CsmConfig, run: Path | str, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write ``run/dataset`` from the run's images and the configured annotation.

    Of several processes only the first works; the others wait.
    """
    run, state = Path(run), process_state()
    summary: dict[str, Any] = {}
    if state.is_main_process:
        summary = publish_dataset(run, config.annotation.folder, config.filter, overwrite=overwrite)
    state.wait_for_everyone()
    return summary


def _open(model: ModelConfig, device: str) -> Denoiser:
    state = process_state(device)
    return open_model(model, str(state.device) if device == "auto" else device)
