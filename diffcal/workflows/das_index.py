"""``diffcal das index``: features and kernel of all training images of a model."""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffcal.attribution.feature_store import FeatureStore
from diffcal.attribution.functionals import NamedFunctional
from diffcal.attribution.kernel import Kernel, fit_kernel, load_kernel
from diffcal.config import config_from_dict, config_to_dict
from diffcal.core.devices import module_device, one_thread
from diffcal.core.processes import process_state
from diffcal.core.runs import claim_folder, fingerprint, read_json, sha256_file, write_json
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ArtifactError, ConfigError
from diffcal.workflows.das_checkpoints import models_of
from diffcal.workflows.das_config import DasConfig
from diffcal.workflows.das_curvature import fitted_curvature, kept_curvature
from diffcal.workflows.das_features import (
    GradientRows,
    ImageRows,
    feature_spec,
    make_rows,
    with_functional,
    write_features,
)
from diffcal.workflows.das_images import ConditionedImages, open_training_images
from diffcal.workflows.generate import open_model
from diffcal.workflows.versions import versions

__all__ = [
    "FORMAT",
    "AttributionIndex",
    "build_index",
    "fitted_kernel",
    "index_fingerprint",
    "open_index",
    "read_manifest_of_index",
]

FORMAT = "diffcal-attribution/1"

logger = logging.getLogger(__name__)


def build_index(
    config: DasConfig,
    out: Path,
    *,
    denoiser: Denoiser | None = None,
    functional: NamedFunctional | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Featurise the training images into ``out`` and factorise their kernel; resume what is there.

    Writes ``features/`` (a :class:`~diffcal.attribution.feature_store.FeatureStore`, ids are row
    numbers of the source), ``kernel.safetensors`` and, last, ``manifest.json``. Killed at any moment
    and started again it ends in the same bytes, and several processes of an ``accelerate launch``
    write the same bytes on a CPU as one. Memory holds one shard and the kernel.

    An index of several models (``config.models``, or the checkpoints that ``tracincp`` and ``gas``
    compare) holds one such folder for each in ``models/``.

    Args:
        config: Model, images, gradients, projection.
        out: Folder of the index.
        denoiser: Use this one, already loaded, in place of ``config.model``.
        functional: Your own functional or loss in place of ``config.features.functional``; its name
            becomes part of what the index is made of.
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
    state = process_state(device)
    if config.inputs == "subset-losses":
        from diffcal.workflows.das_subset_losses import with_subset_run

        config = with_subset_run(config)
    config = with_functional(config, functional)
    models = models_of(config)
    if denoiser is not None and len(models) > 1:
        raise ConfigError(f"one denoiser was given for an index of {len(models)} models")
    if len(models) == 1:
        config = replace(config, model=models[0], models=())
        return _build(config, out, state, denoiser, functional, device=device, overwrite=overwrite)
    if state.is_main_process:
        claim_folder(out, {"format": FORMAT, "models": len(models)}, overwrite=overwrite)
    state.wait_for_everyone()
    parts = [f"models/{at:02d}" for at in range(len(models))]
    found = []
    for model, part in zip(models, parts, strict=True):
        one = replace(config, model=model, models=())
        found.append(
            _build(one, out / part, state, None, functional, device=device, overwrite=overwrite)
        )
    if state.is_main_process:
        _write_group_manifest(out, config, parts)
    state.wait_for_everyone()
    return {
        **found[-1],
        "models": len(models),
        "featurised_now": sum(one["featurised_now"] for one in found),
        "seconds": round(sum(one["seconds"] for one in found), 1),
        "folder": str(out),
    }


def _build(
    config: DasConfig,
    out: Path,
    state: Any,
    denoiser: Denoiser | None,
    functional: NamedFunctional | None,
    *,
    device: str,
    overwrite: bool,
) -> dict[str, Any]:
    """Index of one model."""
    where = str(state.device) if device == "auto" else device
    denoiser = denoiser or open_model(config.model, where)
    started = time.monotonic()
    images = open_training_images(config.data, denoiser)
    rows = make_rows(config, denoiser, images, where, functional)
    if state.is_main_process:
        claim = {"format": FORMAT, "store": config_to_dict(config.store)}
        claim_folder(out, claim | feature_spec(rows, images), overwrite=overwrite)
    state.wait_for_everyone()
    curvature = fitted_curvature(out, config, rows, images, state, where)
    if curvature is not None:
        rows = make_rows(config, denoiser, images, where, functional, curvature)
    store, made = write_features(
        rows, images, out / "features", config.store, state, role="train", title="das index"
    )
    if state.is_main_process:
        kernel = None
        if config.scores.method == "kernel":
            kernel = fitted_kernel(out / "kernel.safetensors", store, where)
        _write_manifest(out, config, store, kernel, images)
    state.wait_for_everyone()
    summary: dict[str, Any] = {"images": len(images), "dimensions": rows.dim}
    if isinstance(rows, GradientRows):
        summary |= {
            "parameters": rows.featuriser.gradients.layout.size,
            "timesteps": list(rows.featuriser.levels.timesteps),
        }
    return summary | {
        "processes": state.num_processes,
        "featurised_now": made,
        "seconds": round(time.monotonic() - started, 1),
        "folder": str(out),
    }


@dataclass(frozen=True)
class AttributionIndex:
    """A finished index of one model: that model, the images, their features and kernel."""

    folder: Path
    config: DasConfig
    """With the places where model and images were found."""
    store: FeatureStore
    denoiser: Denoiser
    rows: ImageRows
    """What made the features, for the queries'."""
    training: ConditionedImages
    functional: NamedFunctional | None = None
    """The user's own, if it has one."""

    @classmethod
    def open(
        cls,
        folder: Path | str,
        *,
        model: str | None = None,
        data: str | None = None,
        denoiser: Denoiser | None = None,
        functional: NamedFunctional | None = None,
        device: str = "auto",
    ) -> "AttributionIndex":
        """An index together with its model and images, checked to be those that it was made of.

        Args:
            model, data: Where they are now, if they moved.
            denoiser: The model, already loaded.
            functional: Your own functional, if the index was made with one.

        Raises:
            ConfigError: the index needs a functional that was not given.
            ArtifactError: no finished index, or model, images or settings are not those of the index
                (what differs is named).
        """
        folder = Path(folder)
        manifest = read_manifest_of_index(folder)
        if "models" in manifest:
            raise ArtifactError(
                f"'{folder}' is an index of {len(manifest['models'])} models; open_index opens it"
            )
        values = manifest["config"]
        values["features"].setdefault("combine", "mean")  # before there was a choice
        if model is not None:
            values["model"]["source"] = model
        if data is not None:
            values["data"]["name"] = data
        config = with_functional(config_from_dict(DasConfig, values), functional)
        denoiser = denoiser or open_model(config.model, device)
        store = FeatureStore.open(folder / "features")
        store.verify()
        # The model first: images of other classes would be refused before it is compared.
        if "model" in store.spec:
            store.require_spec({**store.spec, "model": denoiser.fingerprint})
        training = open_training_images(config.data, denoiser)
        rows = make_rows(config, denoiser, training, device, functional)
        store.require_spec(feature_spec(rows, training))
        store.require_ids(training.ids)
        curvature = kept_curvature(
            folder, config, rows, training, str(module_device(denoiser.module))
        )
        if curvature is not None:
            rows = make_rows(config, denoiser, training, device, functional, curvature)
        return cls(folder, config, store, denoiser, rows, training, functional)

    @property
    def fingerprint(self) -> str:
        """Hash of all features and of what they were made of."""
        return self.store.fingerprint

    def kernel(self, device: str = "cpu") -> Kernel:
        """The kernel, fitted now if the index was made for a method without one."""
        return fitted_kernel(self.folder / "kernel.safetensors", self.store, device)


def open_index(
    folder: Path,
    *,
    model: str | None = None,
    data: str | None = None,
    denoiser: Denoiser | None = None,
    functional: NamedFunctional | None = None,
    device: str = "auto",
) -> list[AttributionIndex]:
    """The index of every model of a finished index, the fully trained model last.

    Args: as of :meth:`AttributionIndex.open`; ``model`` and ``denoiser`` for an index of one model.

    Raises:
        ConfigError: one model was given for an index of several.
        ArtifactError: see :meth:`AttributionIndex.open`.
    """
    manifest = read_manifest_of_index(folder)
    parts = manifest.get("models")
    if parts is None:
        opened = AttributionIndex.open(
            folder,
            model=model,
            data=data,
            denoiser=denoiser,
            functional=functional,
            device=device,
        )
        return [opened]
    if model is not None or denoiser is not None:
        raise ConfigError(
            f"'{folder}' is an index of {len(parts)} models; they must lie where it found them"
        )
    return [
        AttributionIndex.open(folder / part, data=data, functional=functional, device=device)
        for part in parts
    ]


def index_fingerprint(models: list[AttributionIndex]) -> str:
    """Hash of all features of all models."""
    if len(models) == 1:
        return models[0].fingerprint
    return fingerprint([one.fingerprint for one in models])


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


def fitted_kernel(path: Path, store: FeatureStore, device: str) -> Kernel:
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


def _write_group_manifest(out: Path, config: DasConfig, parts: list[str]) -> None:
    manifests = [read_manifest_of_index(out / part) for part in parts]
    manifest = {
        "format": FORMAT,
        "config": config_to_dict(config),
        "models": parts,
        "features": [one["features"] for one in manifests],
        **{name: manifests[-1][name] for name in ("images", "classes", "versions")},
    }
    write_json(out / "manifest.json", manifest)


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
        "versions": versions(),
    }
    write_json(out / "manifest.json", manifest)
