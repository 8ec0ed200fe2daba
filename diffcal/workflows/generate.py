"""Plan in, shards of mixed images out: the part of CSM that costs time."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffcal.config import check_choices, config_to_dict
from diffcal.core.processes import process_state
from diffcal.core.progress import progress_bar
from diffcal.core.runs import claim_folder, read_json, sha256_file, write_atomic, write_json
from diffcal.data.images import encode_png
from diffcal.data.shards import verified_shard
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.denoisers import Denoiser
from diffcal.diffusion.samplers import evaluations
from diffcal.errors import ArtifactError, ConfigError
from diffcal.mixing.generation import GenerationConfig, generate_images
from diffcal.mixing.plan import MixPlan, PlanConfig
from diffcal.workflows.versions import versions

__all__ = ["FORMAT", "GenerateConfig", "ModelConfig", "generate", "open_model", "shard_items"]

FORMAT = "diffcal-generated/1"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which diffusion model, and in which number format its network computes."""

    source: str = "bundled:digits"
    """Checkpoint folder of ours, diffusers folder, hub name ``owner/name``, or ``bundled:NAME``."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    """For diffusers models: keywords of ``load_diffusers_denoiser``, for instance the prompts of a
    text-to-image model."""

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Everything that decides the generated images."""

    model: ModelConfig = field(default_factory=ModelConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    groups_per_shard: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.groups_per_shard < 1:
            raise ConfigError(f"groups_per_shard must be at least 1, got {self.groups_per_shard}")

    @property
    def shards(self) -> int:
        """Number of shards: group ``g`` is in shard ``g // groups_per_shard``."""
        return -(-self.plan.groups // self.groups_per_shard)


def open_model(model: ModelConfig, device: str = "auto") -> Denoiser:
    """The denoiser of a configuration, on its device."""
    return load_denoiser(model.source, device=device, dtype=model.dtype, **model.options)


def generate(
    config: GenerateConfig,
    run: Path,
    *,
    denoiser: Denoiser | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the images of the plan as ``run/generated/shard-*.parquet``; resume what is there.

    A shard is renamed into place when it is complete, so that a run killed at any moment goes on with
    the first missing one. Of the ``W`` processes of an ``accelerate launch``, process ``w`` makes the
    shards ``s`` with ``s % W == w``; on a CPU the bytes are those of a single process. Memory holds
    one shard. ``manifest.json`` is written last and lists shards with rows and SHA-256.

    Columns: ``id`` (group * members + member), ``group``, ``member``, ``classes``, ``weights``,
    ``seed`` (of the group's noise), ``image`` (PNG bytes), ``height``, ``width``.

    Args:
        config: What to draw.
        run: Run folder.
        denoiser: Use this one, already loaded from ``config.model``.
        device: ``auto``, ``cpu``, ``cuda`` ...; with several processes each takes its own GPU.
        overwrite: Remove ``run/generated`` first if it was made with other settings.

    Returns:
        Summary: images, shards, processes, network evaluations per image (those of spare images
        included), images that this process made in this call, its seconds, folder.

    Raises:
        ConfigError: settings that the model cannot serve.
        ArtifactError: the folder holds images of other settings, or a damaged shard.
        NumericalError: NaN or infinity from the network; shards written before stay.
    """
    state = process_state(device)
    if denoiser is None:
        denoiser = open_model(config.model, str(state.device) if device == "auto" else device)
    plan = MixPlan(config.plan, denoiser.class_names, config.seed)
    folder = run / "generated"
    started = time.monotonic()
    if state.is_main_process:
        claim_folder(folder, _claim(config, denoiser), overwrite=overwrite)
    state.wait_for_everyone()

    own = range(state.process_index, config.shards, state.num_processes)
    done = {shard for shard in own if _finished(folder, shard)}
    rows = {shard: shard_items(config, shard) for shard in own}
    with progress_bar(
        sum(map(len, rows.values())),
        "generate",
        unit="image",
        initial=sum(len(rows[shard]) for shard in done),
    ) as bar:
        for shard in own:
            if shard not in done:
                _write_shard(folder, shard, rows[shard], denoiser, plan, config, bar)
    state.wait_for_everyone()
    images = config.plan.groups * config.plan.members
    if state.is_main_process:
        _write_manifest(folder, config, denoiser)
    state.wait_for_everyone()
    return {
        "images": images,
        "shards": config.shards,
        "processes": state.num_processes,
        "evaluations_per_image": evaluations(config.generation.sampler)
        * config.plan.drawn_per_image,
        "generated_now": sum(len(rows[shard]) for shard in own if shard not in done),
        "seconds": round(time.monotonic() - started, 1),
        "folder": str(folder),
    }


def _claim(config: GenerateConfig, denoiser: Denoiser) -> dict[str, Any]:
    values = config_to_dict(config)
    # Where the checkpoint lies and how large batches are does not decide the images.
    del values["model"]["source"], values["generation"]["batch_size"]
    return values | {"denoiser": denoiser.fingerprint}


def shard_items(config: GenerateConfig, shard: int) -> range:
    """Items of a shard: whole groups, ``groups_per_shard`` of them, fewer in the last."""
    first = shard * config.groups_per_shard
    last = min(first + config.groups_per_shard, config.plan.groups)
    return range(first * config.plan.members, last * config.plan.members)


def _name(shard: int) -> str:
    return f"shard-{shard:05d}.parquet"


def _finished(folder: Path, shard: int) -> bool:
    """True if the shard is there and intact; its hash stands in the note beside it.

    Raises:
        ArtifactError: it is damaged.
    """
    note = folder / f"shard-{shard:05d}.json"
    if not (folder / _name(shard)).exists() or not note.exists():
        return False
    verified_shard(folder, read_json(note))
    return True


def _write_shard(
    folder: Path,
    shard: int,
    items: range,
    denoiser: Denoiser,
    plan: MixPlan,
    config: GenerateConfig,
    bar: Any,
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    encoded: list[bytes] = []
    weights: list[list[float]] = []
    height = width = 0
    for batch in generate_images(denoiser, plan, items, config.generation):
        height, width = batch.images.shape[1:3]
        encoded += [encode_png(image) for image in batch.images]
        weights += batch.weights.tolist()
        bar.update(len(batch.items))
    members = plan.config.members
    groups = {item // members: plan[item // members] for item in items}
    picked = [(groups[item // members], item % members) for item in items]
    table = pa.table(
        {
            "id": pa.array(items, pa.int64()),
            "group": pa.array([group.index for group, _ in picked], pa.int64()),
            "member": pa.array([member for _, member in picked], pa.int32()),
            "classes": pa.array([group.classes for group, _ in picked], pa.list_(pa.int32())),
            "weights": pa.array(weights, pa.list_(pa.float32())),
            "seed": pa.array([group.seed for group, _ in picked], pa.int64()),
            "image": pa.array(
                [
                    {"bytes": data, "path": f"{item:08d}.png"}
                    for item, data in zip(items, encoded, strict=True)
                ],
                pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            ),
            "height": pa.array([height] * len(items), pa.int32()),
            "width": pa.array([width] * len(items), pa.int32()),
        }
    )
    path = folder / _name(shard)
    write_atomic(path, lambda file: pq.write_table(table, file, compression="zstd"))
    # The note comes after the shard: without it the shard is made again.
    entry = {"file": path.name, "rows": len(items), "sha256": sha256_file(path)}
    write_json(path.with_suffix(".json"), entry)


def _write_manifest(folder: Path, config: GenerateConfig, denoiser: Denoiser) -> None:
    entries: list[Mapping[str, Any]] = []
    for shard in range(config.shards):
        note = folder / f"shard-{shard:05d}.json"
        if not note.exists():
            raise ArtifactError(f"shard {shard} is missing in '{folder}'; run the command again")
        entries.append(read_json(note))
    manifest = {
        "format": FORMAT,
        "class_names": list(denoiser.class_names),
        "channels": _channels(folder / _name(0)),
        "groups": config.plan.groups,
        "members": config.plan.members,
        "config": config_to_dict(config),
        "denoiser": denoiser.fingerprint,
        "versions": versions(),
        "shards": entries,
    }
    write_json(folder / "manifest.json", manifest)


def _channels(path: Path) -> int:
    import pyarrow.parquet as pq

    from diffcal.data.images import decode_image

    first = next(pq.ParquetFile(path).iter_batches(batch_size=1, columns=["image"]))
    return decode_image(first.column(0)[0].as_py()["bytes"], f"'{path}'").shape[2]
