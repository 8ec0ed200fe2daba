"""The curvature that an index divides its gradients by: made once, kept beside the features."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffcal.attribution.ekfac import Ekfac, load_ekfac
from diffcal.attribution.ekfac_fit import Samples, fit_ekfac
from diffcal.attribution.featurise import Featuriser
from diffcal.core.progress import progress_bar
from diffcal.core.runs import fingerprint, read_json, sha256_file, write_json
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ArtifactError
from diffcal.workflows.das_config import DasConfig
from diffcal.workflows.das_features import GradientRows, ImageRows, feature_spec
from diffcal.workflows.das_images import ConditionedImages

__all__ = ["CURVATURE", "fitted_curvature", "kept_curvature"]

CURVATURE = "curvature.safetensors"


def fitted_curvature(
    folder: Path,
    config: DasConfig,
    rows: ImageRows,
    images: ConditionedImages,
    state: Any,
    device: str,
) -> Ekfac | None:
    """The curvature of an index in ``folder``, fitted by the main process if it is not there.

    None where the features ask for none.

    Raises:
        ArtifactError: the one that features were made with is gone, and what was fitted in its place is
            another: directions without curvature have a basis that depends on rounding, so that another
            processor may not make it again.
    """
    if not _asked(config):
        return None
    assert isinstance(rows, GradientRows)
    facts = _facts(rows, images)
    if state.is_main_process and not _is_whole(folder, facts):
        found = _fit(config, rows.featuriser, images)
        path, note = folder / CURVATURE, _note(folder)
        found.save(path, facts)
        made = {**facts, "sha256": sha256_file(path)}
        used = any((folder / "features").glob("features-*.json"))
        if used and (not note.exists() or read_json(note) != made):
            path.unlink()
            raise ArtifactError(
                f"the curvature that features in '{folder}' were made with is gone, and fitted again "
                "it is not the same: delete that folder and make the index anew"
            )
        write_json(note, made)
    state.wait_for_everyone()
    return load_ekfac(folder / CURVATURE, facts, device)


def kept_curvature(
    folder: Path, config: DasConfig, rows: ImageRows, images: ConditionedImages, device: str
) -> Ekfac | None:
    """The curvature of a finished index.

    Raises:
        ArtifactError: it is missing, damaged or of something else.
    """
    if not _asked(config):
        return None
    facts = _facts(rows, images)
    if not _is_whole(folder, facts):
        raise ArtifactError(
            f"'{folder / CURVATURE}' is missing or damaged, and queries need it: run diffcal das index "
            "again with the same settings"
        )
    return load_ekfac(folder / CURVATURE, facts, device)


def _asked(config: DasConfig) -> bool:
    return config.inputs == "gradients" and config.features.curvature.kind != "none"


def _facts(rows: ImageRows, images: ConditionedImages) -> dict[str, Any]:
    return {"of": fingerprint(feature_spec(rows, images))}


def _note(folder: Path) -> Path:
    return (folder / CURVATURE).with_suffix(".json")


def _is_whole(folder: Path, facts: dict[str, Any]) -> bool:
    if not (folder / CURVATURE).exists() or not _note(folder).exists():
        return False
    found = read_json(_note(folder))
    return found == {**facts, "sha256": sha256_file(folder / CURVATURE)}


class _Samples:
    """Training images spread evenly over all of them, in batches; may be gone through again."""

    def __init__(
        self, denoiser: Denoiser, images: ConditionedImages, count: int, at_once: int
    ) -> None:
        self.denoiser, self.images, self.at_once = denoiser, images, at_once
        total = len(images)
        self.positions = (
            [i * total // count for i in range(count)] if count < total else range(total)
        )

    def __iter__(self) -> Iterator[Samples]:
        for start in range(0, len(self.positions), self.at_once):
            chosen = self.positions[start : start + self.at_once]
            clean = self.denoiser.encode(self.images.images(chosen))
            yield clean, chosen, self.images.condition(self.denoiser, chosen)


def _fit(config: DasConfig, featuriser: Featuriser, images: ConditionedImages) -> Ekfac:
    asked, levels = config.features.curvature, featuriser.levels
    at_once = max(1, featuriser.batch_rows // len(levels.timesteps))
    samples = _Samples(featuriser.denoiser, images, asked.images, at_once)
    with progress_bar(2 * len(samples.positions), "curvature", unit="image") as bar:
        return fit_ekfac(
            featuriser.denoiser,
            samples,
            levels,
            asked,
            params=config.features.params,
            prediction=config.features.prediction,
            unknown=config.unknown,
            on_samples=bar.update,
        )
