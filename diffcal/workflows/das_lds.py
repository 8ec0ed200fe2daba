"""``diffcal das lds``: do the scores predict what happens when models are trained on less data?

    diffcal das lds --preset digits --out runs/lds-digits
    accelerate launch --num_processes 8 -m diffcal das lds --preset digits --out runs/lds-digits

The preset ``digits`` trains one model of 300 digits and one of each of 32 random halves, and asks them
about 100 held-out and 100 generated digits. Every stage resumes; models are spread over processes.

Source: Park et al. 2023 (arXiv:2303.14186), section 2; D-TRAK (arXiv:2311.00500), section 3.2.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcal.attribution.baselines import cosine_blocks, dot_blocks
from diffcal.attribution.damping_selection import choose_damping, path_predictions
from diffcal.attribution.ensemble import ScoredModel, ensemble_scores
from diffcal.attribution.lds import stream_predictions
from diffcal.attribution.lds_controls import lds_controls
from diffcal.attribution.residuals import residual_weights
from diffcal.attribution.rows import TensorRows
from diffcal.attribution.score_config import ScoreConfig
from diffcal.attribution.scores import score_path
from diffcal.config import config_to_dict
from diffcal.core.devices import one_thread
from diffcal.core.processes import process_state
from diffcal.core.runs import claim_folder, fingerprint, write_json, write_text
from diffcal.data.sources import open_images
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.denoisers import Denoiser, images_to_model
from diffcal.workflows.das_config import StoreConfig
from diffcal.workflows.das_features import write_features
from diffcal.workflows.das_images import open_queries
from diffcal.workflows.das_index import AttributionIndex, build_index, open_index
from diffcal.workflows.das_lds_config import SUBSET_LOSSES, LdsConfig
from diffcal.workflows.das_lds_subsets import plain_lds, subset_record
from diffcal.workflows.das_losses import generated_images, loss_tables, write_queries
from diffcal.workflows.das_path import PathRows
from diffcal.workflows.das_subset_models import BASE, train_models, training_rows

__all__ = ["run_lds"]

FEWEST_PER_FOLD = 3


def run_lds(
    config: LdsConfig, out: Path, *, device: str = "auto", overwrite: bool = False
) -> dict[str, Any]:
    """Train, measure and judge; writes ``out/lds.json`` and ``out/lds.md``.

    Stages: ``models/`` (one folder for each), ``queries/`` (Parquet), ``losses/`` (one table for each
    model), ``indexes/`` (one for each kind of features). Each resumes where it was.

    For each method, readout and set of queries: the LDS with its intervals, the controls of
    :func:`~diffcal.attribution.lds_controls.lds_controls`, and for kernels the damping chosen on other
    subsets than those it is judged on (``held_out``), beside the optimistic figure.

    Returns:
        Summary: models, subsets, queries, LDS by method, files.

    Raises:
        ConfigError, DataError: before any training.
        ArtifactError: ``out`` belongs to another experiment.
    """
    state = process_state(device)
    where = str(state.device) if device == "auto" else device
    started = time.monotonic()
    source = open_images(
        config.data.name,
        image_column=config.data.image_column,
        label_column=config.data.label_column,
    )
    if state.is_main_process:
        claim: dict[str, Any] = config_to_dict(config) | {"data_fingerprint": source.fingerprint}
        # What is judged may grow without another training.
        for name in ("methods", "readouts", "features", "encoder", "folds", "resamples"):
            del claim[name]
        del claim["data"]["name"]
        if config.subsets.together == 1:
            del claim["subsets"]["together"]  # runs that were begun before it existed go on
        claim_folder(out, claim, overwrite=overwrite)
    state.wait_for_everyone()
    masks = train_models(config, out / "models", state, device)
    if state.is_main_process:
        write_queries(config, out / "queries", out / "models", where)
    state.wait_for_everyone()
    kinds = [name for name in ("validation", "generated") if getattr(config.queries, name)]
    sets = {name: out / "queries" / f"{name}.parquet" for name in kinds}
    losses = loss_tables(config, out / "losses", out / "models", sets, state, where)
    records: list[dict[str, Any]] = []
    for method in config.methods:
        if method in SUBSET_LOSSES:
            if state.is_main_process:
                training = _pixels(config)
                records += [
                    subset_record(
                        method, kind, losses[kind], masks, _alike(path, training, masks), config
                    )
                    for kind, path in sets.items()
                ]
            continue
        features = _featurise(config, out, method, sets, state, device)
        if state.is_main_process:
            with one_thread():
                records += _judge(config, method, features, sets, losses, masks)
    if state.is_main_process:
        write_json(out / "lds.json", {"config": config_to_dict(config), "results": records})
        write_text(out / "lds.md", _markdown(config, records))
    state.wait_for_everyone()
    return {
        "models": config.subsets.count * len(config.subsets.training_seeds) + 1,
        "queries": {name: int(table.shape[1]) for name, table in losses.items()},
        "lds": {
            f"{row['method']} {row['readout']} {row['queries']}": round(row["lds"]["mean"], 4)
            for row in records
        },
        "table": str(out / "lds.md"),
        "seconds": round(time.monotonic() - started, 1),
    }


@dataclass(frozen=True)
class _Features:
    """Rows of one method, for each model or checkpoint that it compares."""

    models: list[AttributionIndex]
    """The fully trained model last."""
    queries: dict[str, list[Tensor]]
    """Of each set of queries that the method can judge."""


def _featurise(
    config: LdsConfig, out: Path, method: str, sets: dict[str, Path], state: Any, device: str
) -> _Features | None:
    settings = config.index_config(method)
    if settings.inputs == "pixels":
        return None
    where = str(state.device) if device == "auto" else device
    run = out / "models" / BASE
    # Methods that differ in their scores alone share their features.
    parts: list[Any] = [config_to_dict(settings.features)]
    denoiser: Denoiser | None = None
    if settings.inputs == "encoder":
        parts = ["encoder", config_to_dict(settings.encoder)]
    if len(settings.checkpoints) > 1:
        parts += [list(settings.checkpoints)]
        settings = replace(settings, model=replace(settings.model, source=str(run)))
    else:
        denoiser = load_denoiser(run / "checkpoint", device=where)
    name = fingerprint(parts if len(parts) > 1 else parts[0])[:12]
    folder = out / "indexes" / name
    build_index(settings, folder, denoiser=denoiser, device=device)
    models = open_index(folder, denoiser=denoiser, device=where)
    rows: dict[str, list[Tensor]] = {}
    for kind, path in sets.items():
        if settings.queries_from == "sampling-path" and kind != "generated":
            continue  # nobody drew the others
        for one in models:
            queries = open_queries(str(path), one.denoiser)
            maker, place = one.rows, kind
            if settings.queries_from == "sampling-path":
                drawn = generated_images(config, one.denoiser)
                maker, place = PathRows(settings, one.denoiser, drawn), f"{kind}-path"
            store, _ = write_features(
                maker,
                queries,
                one.folder / "queries" / place,
                StoreConfig(dtype="float32"),
                state,
                role="query",
                title=f"{method}, {kind}",
            )
            rows.setdefault(kind, []).append(store.rows())
    return _Features(models, rows)


def _judge(
    config: LdsConfig,
    method: str,
    features: _Features | None,
    sets: dict[str, Path],
    losses: dict[str, Tensor],
    masks: Tensor,
) -> list[dict[str, Any]]:
    """Results of one method for every set of queries and every readout."""
    training = _pixels(config)
    records = []
    for kind, path in sets.items():
        alike = _alike(path, training, masks)
        if features is None:
            pixels = _all_pixels(open_images(str(path)), None)
            blocks = dot_blocks if method.endswith("-dot") else cosine_blocks
            guess = stream_predictions(blocks(pixels, TensorRows(training)), masks)
            records.append(
                _record(config, method, "signed", kind, guess, losses[kind], None, alike)
            )
            continue
        if kind not in features.queries:
            continue
        scores = config.index_config(method).scores
        if scores.method != "kernel":
            models = [
                ScoredModel(rows, one.store)
                for rows, one in zip(features.queries[kind], features.models, strict=True)
            ]
            guess = stream_predictions(ensemble_scores(scores, models), masks)
            records.append(
                _record(config, method, "signed", kind, guess, losses[kind], None, alike)
            )
            continue
        for readout in config.readouts:
            path_guesses, dampings, default = _over_dampings(
                scores, readout, features.models[-1], features.queries[kind][-1], masks
            )
            choice = _choose(config, path_guesses[:-1], losses[kind], dampings)
            records.append(
                _record(
                    config, method, readout, kind, path_guesses[-1], losses[kind], choice, alike
                )
                | {"damping": default}
            )
    return records


def _over_dampings(
    scores: ScoreConfig, readout: str, index: AttributionIndex, queries: Tensor, masks: Tensor
) -> tuple[Tensor, list[float], float]:
    """Predictions at every damping of the grid and, last, at the method's own; the dampings."""
    store, kernel = index.store, index.kernel()
    grid, default = scores.absolute_grid(kernel), scores.absolute_damping(kernel)
    residual = None
    if scores.residual != "none":
        residual = residual_weights(store.column("error"), scores.residual)

    def path() -> Iterator[tuple[int, Tensor]]:
        yield from score_path(
            kernel,
            queries,
            store,
            [*grid, default],
            residual=residual,
            leverage=scores.leverage,
            norm=scores.norm,
            readout=readout,
            dtype=torch.float64,
        )

    return path_predictions(path(), masks), grid, default


def _choose(
    config: LdsConfig, predictions: Tensor, losses: Tensor, dampings: list[float]
) -> dict[str, Any] | None:
    if len(losses) < FEWEST_PER_FOLD * config.folds:
        return None
    choice = choose_damping(
        predictions, losses, dampings, folds=config.folds, n_resamples=config.resamples
    )
    return {
        "dampings": list(choice.dampings),
        "curve": [round(value, 5) for value in choice.curve.tolist()],
        "chosen": choice.chosen,
        "optimistic": choice.optimistic,
        "held_out": plain_lds(choice.held_out),
    }


def _record(
    config: LdsConfig,
    method: str,
    readout: str,
    kind: str,
    predictions: Tensor,
    losses: Tensor,
    choice: dict[str, Any] | None,
    alike: Tensor,
) -> dict[str, Any]:
    found = lds_controls(
        predictions, losses, likeness={"pixels": alike}, n_resamples=config.resamples
    )
    return {
        "method": method,
        "readout": readout,
        "queries": kind,
        "lds": plain_lds(found.pop("score")),
        "controls": {name: plain_lds(value) for name, value in found.items()},
        "damping_choice": choice,
    }


def _alike(path: Path, training: Tensor, masks: Tensor) -> Tensor:
    """Predictions from the likeness of pixels."""
    pixels = _all_pixels(open_images(str(path)), None)
    return stream_predictions(cosine_blocks(pixels, TensorRows(training)), masks)


def _pixels(config: LdsConfig) -> Tensor:
    source = open_images(
        config.data.name,
        image_column=config.data.image_column,
        label_column=config.data.label_column,
    )
    return _all_pixels(source, training_rows(config, source))


def _all_pixels(source: Any, rows: range | None) -> Tensor:
    parts = [torch.as_tensor(images) for _, images, _ in source.batches(1024, rows)]
    return images_to_model(torch.cat(parts)).flatten(1)


def _markdown(config: LdsConfig, records: list[dict[str, Any]]) -> str:
    subsets = config.subsets
    lines = [
        "# Linear datamodeling score",
        "",
        f"{subsets.count} subsets of {100 * subsets.fraction:.0f} %, "
        f"{len(subsets.training_seeds)} training seed(s) each. Percent; in brackets the 95 % interval "
        "over subsets and queries. *Default*: the method's own damping. *Held out*: a damping chosen on "
        "other subsets than those it is judged on. *Optimistic*: chosen on the same ones. *Shuffled*: "
        "each query judged by another one's scores. *Average*: by the mean scores. *Pixels*: likeness. "
        "What is fitted on losses (*datamodel*, *empirical-influence*) is judged on other subsets.",
        "",
        "| queries | method | readout | default | held out | optimistic | shuffled | average | pixels |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(records, key=lambda row: row["queries"], reverse=True):
        lds, controls = row["lds"], row["controls"]
        choice = row["damping_choice"]
        interval = f"{_percent(lds['mean'])} [{_percent(lds['low'])}, {_percent(lds['high'])}]"
        cells = [
            row["queries"],
            row["method"],
            row["readout"],
            interval,
            _percent(choice["held_out"]["mean"] if choice else None),
            _percent(choice["optimistic"] if choice else None),
            _percent(controls["shuffled"]["mean"]),
            _percent(controls["query_average"]["mean"]),
            _percent(controls["likeness:pixels"]["mean"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
