"""``diffcal das index``: features and kernel of all training images of a model."""

import logging
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffcal import __version__
from diffcal.attribution.feature_store import FeatureStore
from diffcal.attribution.featurise import Featuriser
from diffcal.attribution.kernel import Kernel, fit_kernel, load_kernel
from diffcal.config import config_from_dict, config_to_dict
from diffcal.core.devices import one_thread
from diffcal.core.runs import claim_folder, read_json, sha256_file, write_json
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ArtifactError
from diffcal.workflows.das_config import DasConfig
from diffcal.workflows.das_features import feature_spec, make_featuriser, write_features
from diffcal.workflows.das_images import ConditionedImages, open_training_images
from diffcal.workflows.generate import open_model

__all__ = ["FORMAT", "AttributionIndex", "build_index"]

FORMAT = "diffcal-attribution/1"

logger = logging.getLogger(__name__)


def build_index(
    config: DasConfig,
    out: Path,
    *,
    denoiser: Denoiser | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Featurise the training images into ``out`` and factorise their kernel; resume what is there.

    Writes ``features/`` (a :class:`~diffcal.attribution.feature_store.FeatureStore`, ids are row
    numbers of the source), ``kernel.safetensors`` and, last, ``manifest.json``. Killed at any moment
    and started again it ends in the same bytes, and several processes of an ``accelerate launch``
    write the same bytes on a CPU as one. Memory holds one shard and the kernel.

    Args:
        config: Model, images, gradients, projection.
        out: Folder of the index.
        denoiser: Use this one, already loaded, in place of ``config.model``.
        device: ``auto``, ``cpu``, ``cuda`` ...; with several processes each takes its own GPU.
        overwrite: Discard an index of other settings, model or images.

    Returns:
        Summary: images, dimensions, parameters, timesteps, processes, images that this process
        featurised in this call, its seconds, folder.

    Raises:
        ConfigError, DataError, CheckpointError: before any work.
        ArtifactError: ``out`` holds an index of another model, other images or settings (named), or a
            damaged shard.
        NumericalError: NaN or infinity; shards written before stay.
    """
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    where = str(state.device) if device == "auto" else device
    denoiser = denoiser or open_model(config.model, where)
    started = time.monotonic()
    images = open_training_images(config.data, denoiser)
    featuriser = make_featuriser(config, denoiser)
    if state.is_main_process:
        claim = {"format": FORMAT, "store": config_to_dict(config.store)}
        claim_folder(out, claim | feature_spec(featuriser, images), overwrite=overwrite)
    state.wait_for_everyone()
    store, made = write_features(
        featuriser, images, out / "features", config.store, state, role="train", title="das index"
    )
    if state.is_main_process:
        kernel = None
        if config.scores.method == "kernel":
            kernel = _fitted(out / "kernel.safetensors", store, where)
        _write_manifest(out, config, store, kernel, images)
    state.wait_for_everyone()
    return {
        "images": len(images),
        "dimensions": featuriser.dim,
        "parameters": featuriser.gradients.layout.size,
        "timesteps": list(featuriser.levels.timesteps),
        "processes": state.num_processes,
        "featurised_now": made,
        "seconds": round(time.monotonic() - started, 1),
        "folder": str(out),
    }


@dataclass(frozen=True)
class AttributionIndex:
    """A finished index: the model and the images that it was made of, its features and kernel."""

    folder: Path
    config: DasConfig
    """With the places where model and images were found."""
    store: FeatureStore
    denoiser: Denoiser
    featuriser: Featuriser
    training: ConditionedImages

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        model: str | None = None,
        data: str | None = None,
        denoiser: Denoiser | None = None,
        device: str = "auto",
    ) -> "AttributionIndex":
        """An index together with its model and images, checked to be those that it was made of.

        Args:
            model, data: Where they are now, if they moved.
            denoiser: The model, already loaded.

        Raises:
            ArtifactError: no finished index, or model, images or settings are not those of the index
                (what differs is named).
        """
        manifest = read_manifest_of_index(folder)
        values = manifest["config"]
        if model is not None:
            values["model"]["source"] = model
        if data is not None:
            values["data"]["name"] = data
        config = config_from_dict(DasConfig, values)
        denoiser = denoiser or open_model(config.model, device)
        store = FeatureStore.open(folder / "features")
        store.verify()
        featuriser = make_featuriser(config, denoiser)
        store.require_spec({**featuriser.spec, "images": store.spec["images"]})
        training = open_training_images(config.data, denoiser)
        store.require_spec(feature_spec(featuriser, training))
        store.require_ids(training.ids)
        return cls(folder, config, store, denoiser, featuriser, training)

    @property
    def fingerprint(self) -> str:
        """Hash of all features and of what they were made of."""
        return self.store.fingerprint

    def kernel(self, device: str = "cpu") -> Kernel:
        """The kernel, fitted now if the index was made for a method without one."""
        return _fitted(self.folder / "kernel.safetensors", self.store, device)


def read_manifest_of_index(folder: Path) -> dict[str, Any]:
    """Manifest of a finished index.

    Raises:
        ArtifactError: there is none, or it is of another kind.
    """
    path = folder / "manifest.json"
    if not path.exists():
        reason = (
            "was not finished: run diffcal das index again with the same settings"
            if (folder / "features").is_dir()
            else "is not an index: make one with diffcal das index"
        )
        raise ArtifactError(f"'{folder}' {reason}")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"'{path}' is not the manifest of an index ({FORMAT})")
    return manifest


def _fitted(path: Path, store: FeatureStore, device: str) -> Kernel:
    """The kernel at ``path``, fitted and written there if it is missing or of other features."""
    note = path.with_suffix(".json")
    if path.exists() and note.exists():
        found = read_json(note)
        if found["features"] == store.fingerprint and found["sha256"] == sha256_file(path):
            return load_kernel(path, device)
        logger.warning("'%s' is damaged or of other features: fitted again", path)
    logger.info("factorising the kernel of %d images", len(store))
    # Sums of a factorisation depend on how many threads share them; the stored bytes must not.
    with one_thread():
        kernel = fit_kernel(store, device=device)
    kernel.save(path)
    write_json(note, {"features": store.fingerprint, "sha256": sha256_file(path)})
    return kernel


def _write_manifest(
    out: Path,
    config: DasConfig,
    store: FeatureStore,
    kernel: Kernel | None,
    images: ConditionedImages,
) -> None:
    manifest = {
        "format": FORMAT,
        "config": config_to_dict(config),
        "spec": store.spec,
        "features": store.fingerprint,
        "images": len(store),
        "classes": list(images.source.class_names),
        "kernel": None
        if kernel is None
        else {"form": kernel.form, "rank": len(kernel.eigenvalues), "trace": kernel.trace},
        "versions": {
            "diffcal": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    write_json(out / "manifest.json", manifest)
