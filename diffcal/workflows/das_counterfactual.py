"""``diffcal das counterfactual``: retrain without the images that a query owes itself to, and compare.

    diffcal das counterfactual --preset digits --out runs/counterfactual
    diffcal das counterfactual --scores runs/das/scores --out runs/counterfactual

The preset ``digits`` trains a small model, lets it draw ten digits, attributes them by two methods and,
for each digit and method, trains the model again from the same seed without the ten images on top. With
``--scores`` it is the user's own model, queries and scores. Every model then draws the queries from the
noise that they started from. If the removed images mattered, a query changes more than without as many
random ones.

Source: D-TRAK (arXiv:2311.00500), section 4.3, which DAS (arXiv:2410.18639) follows: 60 images, 1,000
removed, pixel distance and CLIP cosine against random removal. Added here: other training seeds (what
chance changes), the effect on the queries that nothing was removed for, and paired intervals.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from diffcal.attribution.counterfactual import random_removals
from diffcal.config import config_to_dict
from diffcal.core.processes import process_state
from diffcal.core.runs import claim_folder, read_json, write_json
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.errors import ArtifactError
from diffcal.workflows.das_counterfactual_config import CounterfactualConfig
from diffcal.workflows.das_counterfactual_effects import Kind, measure, write_results
from diffcal.workflows.das_counterfactual_models import (
    TrainedModel,
    drawn_images,
    save_images,
    train_and_draw,
)
from diffcal.workflows.das_counterfactual_page import write_page
from diffcal.workflows.das_counterfactual_queries import Asked, GivenScores, ranked_removals
from diffcal.workflows.das_index import build_index
from diffcal.workflows.das_losses import write_images
from diffcal.workflows.das_queries import QueryConfig
from diffcal.workflows.das_redraw import ClassImages
from diffcal.workflows.das_score import ScoreRunConfig, score_queries

__all__ = ["run_counterfactual"]

BASE = "base"
ORIGINAL = "original"


def run_counterfactual(
    config: CounterfactualConfig, out: Path, *, device: str = "auto", overwrite: bool = False
) -> dict[str, Any]:
    """Train, draw and compare; the results are ``counterfactual.json``, ``.md`` and ``gallery.html``.

    Stages: ``models/`` (one folder for each) and ``images/`` (the queries as each model draws them);
    ``indexes/`` and ``scores/`` of the methods that are computed here; ``removals.json``;
    ``effects.parquet`` (one row for each query and model). Each resumes where it was: killed at any
    moment and started again it ends in the same results. The processes of an ``accelerate launch``
    share the models.

    Args:
        config: See :class:`~.das_counterfactual_config.CounterfactualConfig`.
        out: Folder of the experiment.
        overwrite: Discard another experiment there.

    Returns:
        Summary: models, queries, mean effect of each kind of removal, paired differences, files.

    Raises:
        ConfigError, DataError: before any training.
        ArtifactError: ``out`` belongs to another experiment, or scores, queries and model do not belong
            together.
        NumericalError: a training diverged, or a model draws NaN; the others stay.
    """
    state = process_state(device)
    where = str(state.device) if device == "auto" else device
    started = time.monotonic()
    given = GivenScores.open(config)
    asked = Asked.open(config, given, where)
    if state.is_main_process:
        claim_folder(out, _claim(config, asked, given), overwrite=overwrite)
    state.wait_for_everyone()

    seed = config.training.seed
    base = TrainedModel(BASE, (), seed, config.kept_checkpoints)
    others = [TrainedModel(f"seed-{other}", (), other) for other in config.other_seeds]
    drawn = random_removals(len(asked.rows), config.remove, config.random_draws, config.seed)
    random = [
        TrainedModel(f"random-{draw:03d}", tuple(gone), seed) for draw, gone in enumerate(drawn)
    ]

    def make(models: list[TrainedModel], title: str) -> None:
        train_and_draw(
            models,
            out,
            config.training,
            asked.source,
            asked.rows,
            asked.queries,
            state,
            device,
            together=config.together,
            title=title,
        )

    make([base, *others, *random], "models of everything and of random removals")
    if state.is_main_process:
        _write_original(out, asked, where)
    state.wait_for_everyone()
    scores = _scores(config, out, given, device)
    if state.is_main_process:
        removals = {
            name: ranked_removals(folder, asked.rows, asked.queries, config.remove)
            for name, folder in scores.items()
        }
        write_json(
            out / "removals.json", {name: list(map(list, r)) for name, r in removals.items()}
        )
    state.wait_for_everyone()
    removals = read_json(out / "removals.json")
    by_method = {
        name: [
            TrainedModel(f"{name}-{query:05d}", tuple(gone), seed)
            for query, gone in enumerate(per_query)
        ]
        for name, per_query in removals.items()
    }
    make([model for models in by_method.values() for model in models], "models without top images")

    summary: dict[str, Any] = {
        "models": 1 + len(others) + len(random) + sum(map(len, by_method.values())),
        "queries": len(asked.queries),
        "removed": config.remove,
    }
    if state.is_main_process:
        kinds = [
            *(
                Kind(name, tuple(m.name for m in models), own=True)
                for name, models in by_method.items()
            ),
            Kind("random", tuple(model.name for model in random)),
            Kind("other seed", tuple(model.name for model in others)),
        ]
        if asked.original is not None:
            kinds.append(Kind("retrained", (BASE,)))
        summary |= _judge(config, out, asked, kinds, removals, where)
    state.wait_for_everyone()
    return summary | {"seconds": round(time.monotonic() - started, 1)}


def _claim(config: CounterfactualConfig, asked: Asked, given: GivenScores | None) -> dict[str, Any]:
    claim: dict[str, Any] = config_to_dict(config)
    # How images are compared may change, and methods be added, without another training; how many
    # models are trained at once changes rounding alone.
    for name in ("methods", "encoder", "centre", "resamples", "scores", "together"):
        del claim[name]
    del claim["training"]["data"]
    claim["training"]["keep"] = list(config.kept_checkpoints)
    return claim | {
        "data_fingerprint": asked.source.fingerprint,
        "queries_fingerprint": asked.queries.fingerprint,
        "scores": None if given is None else given.claim,
    }


def _write_original(out: Path, asked: Asked, device: str) -> None:
    """The queries as the attributed model draws them, and as labelled images for ``das score``."""
    path = out / "images" / f"{ORIGINAL}.safetensors"
    if not path.exists():
        original = asked.original or load_denoiser(
            out / "models" / BASE / "checkpoint", device=device
        )
        save_images(path, asked.queries, original)
    table = out / "queries.parquet"
    if asked.original is None and not table.exists():
        assert isinstance(asked.queries, ClassImages)
        write_images(table, _images(out, ORIGINAL).numpy(), asked.queries.labels.numpy())


def _images(out: Path, name: str) -> Any:
    try:
        return drawn_images(out, name)
    except (OSError, SafetensorError) as error:
        path = out / "images" / f"{name}.safetensors"
        raise ArtifactError(f"'{path}' cannot be read ({error}): delete it, run again") from error


def _scores(
    config: CounterfactualConfig, out: Path, given: GivenScores | None, device: str
) -> dict[str, Path]:
    """Folders of scores that say what to remove, by name."""
    found: dict[str, Path] = {}
    if given is not None:
        found |= dict(zip(given.names(), given.folders, strict=True))
    for method in config.methods:
        run = out / "models" / BASE
        index_config = config.index_config(method, str(run / "checkpoint"))
        queries = QueryConfig(name=str(out / "queries.parquet"))
        if len(index_config.checkpoints) > 1:
            index_config = replace(index_config, model=replace(index_config.model, source=str(run)))
        if given is not None:
            manifest = given.manifests[0]
            index_config = config.index_config(method, manifest["model"]["source"])
            queries = QueryConfig(**manifest["config"]["queries"])
        name = method if method not in found else f"{method}-here"
        index, scores = out / "indexes" / method, out / "scores" / method
        build_index(index_config, index, device=device)
        score_queries(
            index, ScoreRunConfig(queries=queries, top=config.remove), scores, device=device
        )
        found[name] = scores
    return found


def _judge(
    config: CounterfactualConfig,
    out: Path,
    asked: Asked,
    kinds: list[Kind],
    removals: dict[str, list[list[int]]],
    device: str,
) -> dict[str, Any]:
    denoiser = asked.original or load_denoiser(out / "models" / BASE / "checkpoint", device=device)
    names = [ORIGINAL, *(name for kind in kinds for name in kind.models)]
    images = {name: _images(out, name) for name in dict.fromkeys(names)}
    effects = measure(
        config,
        images[ORIGINAL],
        images,
        kinds,
        denoiser,
        asked.source,
        asked.rows,
        device,
    )
    results = write_results(config, out, asked.queries, kinds, effects, asked.rows, removals)
    write_page(config, out, asked, kinds, effects, images, removals, results)
    return {
        "pixel_l2": {row["kind"]: round(row["pixel_l2"]["mean"], 4) for row in results["kinds"]},
        "cosine": {row["kind"]: round(row["cosine"]["mean"], 4) for row in results["kinds"]},
        "more_than_random": {
            row["kind"]: {key: round(row["pixel_l2"][key], 4) for key in ("mean", "low", "high")}
            for row in results["against_random"]
        },
        "table": str(out / "counterfactual.md"),
        "gallery": str(out / "gallery.html"),
    }
