"""Soft labels and quality columns of generated images: annotators over cached features."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from diffcal.config import config_to_dict
from diffcal.core.devices import one_thread
from diffcal.core.processes import process_state
from diffcal.core.progress import progress_bar
from diffcal.core.runs import (
    claim_folder,
    fingerprint,
    read_json,
    sha256_bytes,
    sha256_file,
    write_atomic,
    write_json,
)
from diffcal.data.shards import read_manifest, verified_shard
from diffcal.data.sources import ImageSource, open_images
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ArtifactError, ConfigError, DataError
from diffcal.mixing.annotators import (
    Annotator,
    build_annotator,
    hold_out,
    load_annotator,
    save_annotator,
)
from diffcal.mixing.encoding import build_encoder
from diffcal.mixing.prototypes import FeatureBatches, class_statistics
from diffcal.mixing.quality import (
    real_residual_quantile,
)
from diffcal.models.encoders import FeatureEncoder
from diffcal.workflows.annotation_config import AnnotationConfig, RealConfig
from diffcal.workflows.annotation_tables import Labeller, quality_summary
from diffcal.workflows.feature_cache import FeatureCache, FeatureShards
from diffcal.workflows.versions import versions

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["FORMAT", "AnnotationConfig", "RealConfig", "annotate_run", "require_real_images"]

FORMAT = "diffcal-annotations/1"
GENERATED = "diffcal-generated/1"
ENDPOINTS_EXPECTED = 0.9
"""Share of single-class images that should be recognised; 0.97 with the bundled digits, 0.74 where
labels made a classifier worse (benchmarks/csm_controls_digits.md)."""

logger = logging.getLogger(__name__)


def annotate_run(
    config: AnnotationConfig,
    run: Path,
    *,
    denoiser: Denoiser | str | None = None,
    encoder: FeatureEncoder | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write ``run/annotations/NAME``, one shard for each generated shard; resume what is there.

    Images are not generated again and other annotations stay. Features are computed once per image
    and encoder (``run/features``). Of ``W`` processes of an ``accelerate launch``, process ``w`` makes
    shards ``s`` with ``s % W == w``; the first fits the annotator. ``manifest.json`` comes last.

    Columns: ``id``, ``annotator``, ``soft_label`` (float32, all classes), ``lambda_hat``
    (re-estimated weight of the first class; null unless two were mixed), ``residual`` (distance to the
    line or flat of the mixed prototypes, in units of the 99th percentile of real images),
    ``third_mass`` (probability of classes that were not mixed), ``group_spearman`` (requested against
    re-estimated weight of the first class), ``endpoint_ok`` (null unless a single class was asked
    for), ``nearest_cosine``, and ``feature`` if asked for.

    Args:
        config: What to fit and how.
        run: Run folder with finished ``generated``.
        denoiser: The run's denoiser (or its source), for encoders that look through it.
        encoder: Use this one, at hand, in place of ``config.encoder``.
        device: ``auto``, ``cpu``, ``cuda`` ...
        overwrite: Start again if the folder holds an annotation with other settings.

    Returns:
        Summary: images, processes, images that this process encoded, the fit's report, means of the
        quality columns, folder.

    Raises:
        ConfigError, DataError: before any work, such as classes that differ from the real images'.
        ArtifactError: other settings in the folder, or a damaged shard of images, features or labels.
    """
    state = process_state(device)
    place = str(state.device) if device == "auto" else device
    started = time.monotonic()
    generated = read_manifest(run / "generated", GENERATED, ("class_names",))
    source = _open(config.real, config.real.name)
    _check_classes(generated["class_names"], source)
    if isinstance(denoiser, str):
        denoiser = load_denoiser(denoiser, device=place)
    encoder = encoder or build_encoder(
        config.encoder, denoiser=denoiser, image_shape=source.image_shape, device=place
    )
    rows = _rows(source, config.real.first_row, config.real.rows)
    other, other_rows = _held_out_source(config.real, source)
    folder = run / "annotations" / config.folder
    if state.is_main_process:
        claim = _claim(config, generated, encoder.version, [source, other])
        claim_folder(folder, claim, overwrite=overwrite)
    cache = FeatureCache(
        run, encoder, config.feature_dtype, config.batch_size, main=state.is_main_process
    )
    state.wait_for_everyone()

    place_of = {"index": state.process_index, "count": state.num_processes}
    total = -(-(len(rows) + len(other_rows)) // state.num_processes)
    with progress_bar(total, "encode real", unit="image") as bar:
        real = cache.real(source, rows, bar=bar, **place_of)
        held = cache.real(other, other_rows, bar=bar, **place_of) if other is not None else real
    state.wait_for_everyone()
    if state.is_main_process:
        with one_thread():
            _fit(config, folder, real, held, len(rows), generated["class_names"])
    state.wait_for_everyone()
    labeller = Labeller(config, folder, real, place)

    entries = generated["shards"]
    own = entries[state.process_index :: state.num_processes]
    with progress_bar(sum(entry["rows"] for entry in own), "annotate", unit="image") as bar:
        for entry in own:
            if not _finished(folder, entry):
                table = labeller.table(run / "generated", entry, cache, source.image_shape)
                _write_shard(folder, entry, table)
            bar.update(entry["rows"])
    state.wait_for_everyone()
    if state.is_main_process:
        _write_manifest(folder, config, entries, cache, source)
    state.wait_for_everyone()
    manifest = read_json(folder / "manifest.json")
    if state.is_main_process:
        _warn_of_strangers(manifest["quality"]["endpoint_ok"])
    return {
        "annotation": config.folder,
        "images": sum(entry["rows"] for entry in entries),
        "processes": state.num_processes,
        "encoded_now": cache.encoded,
        "report": manifest["report"],
        "quality": manifest["quality"],
        "seconds": round(time.monotonic() - started, 1),
        "folder": str(folder),
    }


def _fit(
    config: AnnotationConfig,
    folder: Path,
    real: FeatureShards,
    held: FeatureShards,
    count: int,
    class_names: list[str],
) -> None:
    """Annotator, probe and references in ``folder``, unless an earlier call left them there."""
    classes = len(class_names)
    human = None if config.real.human is None else _human(Path(config.real.human), classes)
    targets = held if human is None else held.with_shares(human)
    train: FeatureBatches = real
    held_out: FeatureBatches = targets
    if config.real.held_out_name is None:
        share, seed = config.real.held_out, config.real.seed
        train = hold_out(real, count, share, seed)[0]
        held_out = hold_out(targets, count, share, seed)[1]
    annotator = build_annotator(config.annotator, **config.settings)
    wanted: list[tuple[str, Annotator]] = [("annotator", annotator)]
    if not annotator.all_classes:
        wanted.append(("probe", build_annotator("kclass_posterior", method="lda")))
    for name, part in wanted:
        if not (folder / name / "annotator.json").exists():
            part.fit(train, held_out, classes)
            save_annotator(folder / name, part, {"real_images": count})
    path = folder / "reference.safetensors"
    if not path.exists():
        # Of the images that the annotator was fitted on, so that its λ̂ and the stored one agree.
        statistics = class_statistics(train, classes, covariance=False).require_classes(1)
        share = statistics.counts.double() / statistics.counts.sum()
        residual = real_residual_quantile(train, statistics.means)
        data = save(
            {
                "prototypes": statistics.means,
                "centre": share @ statistics.means,
                "residual": torch.tensor(residual, dtype=torch.float64),
            }
        )
        write_atomic(path, lambda file: file.write(data))


def _open(real: RealConfig, name: str) -> ImageSource:
    return open_images(name, image_column=real.image_column, label_column=real.label_column)


def _held_out_source(real: RealConfig, source: ImageSource) -> tuple[ImageSource | None, range]:
    if real.held_out_name is None:
        return None, range(0)
    other = source if real.held_out_name == real.name else _open(real, real.held_out_name)
    if other.class_names != source.class_names:
        raise DataError(f"'{real.held_out_name}' and '{real.name}' have different classes")
    return other, _rows(other, real.held_out_first_row, real.held_out_rows)


def _rows(source: ImageSource, first: int, count: int | None) -> range:
    end = len(source) if count is None else first + count
    if not 0 <= first < end <= len(source):
        raise ConfigError(f"rows {first} to {end} asked for, but '{source.name}' has {len(source)}")
    return range(first, end)


def require_real_images(config: AnnotationConfig, class_names: Sequence[str]) -> None:
    """Refuse real images that are missing or of other classes, before images are generated for them.

    Raises:
        DataError: what is wrong with them.
    """
    source = _open(config.real, config.real.name)
    _check_classes(list(class_names), source)
    _rows(source, config.real.first_row, config.real.rows)
    if config.real.held_out_name is not None:
        _open(config.real, config.real.held_out_name)


def _check_classes(names: list[str], source: ImageSource) -> None:
    unnamed = list(map(str, range(len(names))))
    real = list(source.class_names)
    if len(real) != len(names) or (names != real and unnamed not in (names, real)):
        raise DataError(
            f"the images mix {len(names)} classes ({', '.join(names[:5])} ...), but '{source.name}' "
            f"has {len(real)} ({', '.join(real[:5])} ...); give real images of the same classes"
        )


def _human(path: Path, classes: int) -> Tensor:
    try:
        counts = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"human labels '{path}' cannot be read: {error}") from error
    if counts.ndim != 2 or counts.shape[1] != classes:
        raise DataError(f"human labels '{path}' are {counts.shape}, expected [n, {classes}]")
    values = torch.from_numpy(counts.astype(np.float64))
    total = values.sum(dim=1, keepdim=True)
    if not bool(((values >= 0).all(dim=1, keepdim=True) & (total > 0)).all()):
        raise DataError(f"human labels '{path}' have negative or empty rows")
    return values / total


def _claim(
    config: AnnotationConfig,
    generated: dict[str, Any],
    encoder_version: str,
    sources: list[ImageSource | None],
) -> dict[str, Any]:
    values = config_to_dict(config)
    # Where things lie and how large batches are does not decide the labels.
    for section, key in (("encoder", "source"), ("real", "name"), ("real", "held_out_name")):
        del values[section][key]
    del values["batch_size"]
    human = values["real"]["human"]
    if human is not None:
        path = Path(human)
        if not path.is_file():
            raise DataError(f"human labels '{path}' are missing")
        values["real"]["human"] = sha256_file(path)
    return values | {
        "encoder_version": encoder_version,
        "generated": fingerprint(generated["shards"]),
        "real_images": [source and source.fingerprint for source in sources],
    }


def _finished(folder: Path, generated: dict[str, Any]) -> bool:
    note = (folder / generated["file"]).with_suffix(".json")
    if not note.exists():
        return False
    verified_shard(folder, read_json(note))
    return True


def _warn_of_strangers(recognised: float | None) -> None:
    """Say so if many images of a single class are not taken for it: then mixed labels mislead too."""
    if recognised is not None and recognised < ENDPOINTS_EXPECTED:
        logger.warning(
            "only %.0f %% of the images of a single class are recognised as that class: the model "
            "does not draw its classes clearly, or the annotator cannot read them. If it is the "
            "annotator, classifiers trained on its labels get worse: give it more real images or a "
            "better encoder. filter.require_endpoints drops these groups",
            100 * recognised,
        )


def _write_shard(folder: Path, generated: dict[str, Any], table: "pa.Table") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    path = folder / generated["file"]
    write_atomic(path, lambda file: file.write(data))
    # The note comes after the shard: without it the shard is made again.
    entry = {"file": path.name, "rows": len(table), "sha256": sha256_bytes(data)}
    write_json(path.with_suffix(".json"), entry)


def _write_manifest(
    folder: Path,
    config: AnnotationConfig,
    generated: list[dict[str, Any]],
    cache: FeatureCache,
    source: ImageSource,
) -> None:
    entries = []
    for shard in generated:
        note = (folder / shard["file"]).with_suffix(".json")
        if not note.exists():
            raise ArtifactError(f"'{folder / shard['file']}' is missing; run the command again")
        entries.append(read_json(note))
    settings = config_to_dict(config)
    manifest = {
        "format": FORMAT,
        "annotator": config.annotator,
        "settings": load_annotator(folder / "annotator").settings,
        "encoder": {**settings["encoder"], **cache.description, "features": cache.folder.name},
        "config": settings,
        "report": load_annotator(folder / "annotator").report,
        "quality": quality_summary(folder, entries),
        "real": source.fingerprint,
        "versions": versions(),
        "shards": entries,
    }
    write_json(folder / "manifest.json", manifest)
