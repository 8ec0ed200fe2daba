"""Judging the CIFAR-2 experiment: every method against the subset models' losses; tables and figure."""

import json
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _lds_cifar2_features import (
    GRIDS,
    KINDS,
    finished_rows,
    has_features,
    read_features,
    read_rows,
)
from _lds_methods import Judge, figure, markdown, percent
from accelerate import PartialState
from torch import Tensor

from diffcal.attribution import (
    PRESETS,
    ScoreConfig,
    cosine_blocks,
    dot_blocks,
    fit_kernel,
    gas_blocks,
    gaussian_blocks,
    predictions_of,
    tracin_blocks,
)
from diffcal.attribution.scores import collect
from diffcal.config import config_to_dict
from diffcal.core.runs import write_json, write_text
from diffcal.data.sources import open_images
from diffcal.diffusion.denoisers import images_to_model
from diffcal.workflows.das_lds_config import LdsConfig
from diffcal.workflows.das_losses import loss_tables
from diffcal.workflows.das_subset_models import masks_of

HERE = Path(__file__).parent
RHOS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
READOUTS = ("signed", "square", "signed_square")
CHECKPOINTS = ("loss-slot-1", "loss-slot-2", "loss-slot-3", "loss-slot")

MEAN, SIGNS, OUTPUTS = "das, mean averaged", "das, signs stacked", "das, all outputs"
RULES = {
    f"{MEAN}, damping by rest": ("rest", 4.0),
    f"{MEAN}, damping by dimension": ("dimension", 0.06),
}
"""Rows whose own damping is that of another rule."""

DAS = {
    OUTPUTS: ("outputs-stacked", "rest", 20.0),
    MEAN: ("mean-shared", "relative", 0.1),
    SIGNS: ("signs-stacked", "relative", 0.3),
    "das, signs averaged": ("signs-shared", "relative", 0.1),
    "das, mean stacked": ("mean-stacked", "relative", 0.3),
}
"""Kinds of features scored as ``das`` does: their name, and the damping of their own."""

KERNELS = {
    **{name: (name, features) for name, (features, _, _) in DAS.items()},
    **{name: (name, "mean-shared") for name in RULES},
    "das-official": ("das-official", "mean-slot"),
    "dtrak": ("dtrak", "square-slot"),
    "dtrak, shared noise": ("dtrak", "square-shared"),
    "trak": ("trak", "loss-slot"),
    "trak, shared noise": ("trak", "loss-shared"),
    "trak, shared noise, normalised": ("trak", "loss-shared-normalised"),
}
"""Name: preset that its score comes from, features."""


def judge(config: LdsConfig, again: LdsConfig, out: Path, results: str) -> None:
    """Write ``<results>.json``, ``<results>.md`` and the figure."""
    count = config.data.rows
    assert count is not None
    parts = open_images(config.data.name).batches(1024, range(count))
    training = torch.cat([_flat(images) for _, images, _ in parts])
    masks, losses = subset_losses(config, out)
    sets = query_sets(out)
    pixels = {kind: _pixels(path) for kind, path in sets.items()}
    width = float(torch.pdist(training).median()) / 4
    likeness = {
        kind: {
            "pixel cosine": predictions_of(collect(cosine_blocks(rows, training)), masks),
            "pixel Gaussian": predictions_of(
                collect(gaussian_blocks(rows, training, width)), masks
            ),
        }
        for kind, rows in pixels.items()
    }
    found = Judge(masks, losses, likeness=likeness)
    _kernels(config, found, out)
    _plain_scores(config, found, out, pixels, training, width)
    found.retrained()
    first = _first_images(config, out, masks, losses)
    result = {
        "environment": environment(),
        "settings": _settings(config),
        "learning_curve": json.loads((out / "models" / "base" / "curve.json").read_text()),
        "subset_models": _signal(config, again, out, sets, losses),
        "dampings": list(RHOS),
        "records": found.records,
        "differences": _differences(found),
        "own_differences": _own_differences(found),
        "first_images": first,
    }
    write_json(HERE / f"{results}.json", result)
    write_text(HERE / f"{results}.md", _tables(result))
    shown = [
        r
        for r in found.records
        if r["readout"] != "signed_square" and not r["method"].startswith(tuple(RULES))
    ]
    figure([("CIFAR-2", shown)], HERE.parent / "docs" / f"{results.replace('_', '-')}.png", KINDS)


def query_sets(out: Path) -> dict[str, Path]:
    """Where both kinds of queries are."""
    return {kind: out / "queries" / f"{kind}.parquet" for kind in KINDS}


def subset_losses(config: LdsConfig, out: Path) -> tuple[Tensor, dict[str, Tensor]]:
    """Masks ``[s, n]`` and, for each kind of queries, losses ``[s, q]`` of the subset models."""
    count = config.data.rows
    assert count is not None
    parts = open_images(config.data.name).batches(1024, range(count))
    labels = torch.cat([torch.as_tensor(part) for _, _, part in parts]).long()
    sets, state = query_sets(out), PartialState(cpu=True)
    table = loss_tables(config, out / "losses", out / "models", sets, state, "cpu")
    return masks_of(config, labels), table


def _flat(images: Any) -> Tensor:
    return images_to_model(torch.as_tensor(images)).flatten(1)


def _pixels(path: Path) -> Tensor:
    return torch.cat([_flat(images) for _, images, _ in open_images(str(path)).batches(1024)])


def _settings(config: LdsConfig) -> dict[str, Any]:
    values = config_to_dict(config)
    kept = ("network", "optimizer", "seed", "subsets", "queries", "losses")
    return {name: values[name] for name in kept} | {"training_images": config.data.rows}


def _kernels(config: LdsConfig, found: Judge, out: Path) -> None:
    for name, (preset, features) in KERNELS.items():
        for grid, groups in GRIDS.items():
            if has_features(config, out, features, groups):
                _kernel(found, out, f"{name}, T={grid}", preset, features, grid)
    grid = _finest(config, out, "loss-slot")
    for name in ("relative-influence", "renormalised-influence"):
        _kernel(found, out, f"{name}, T={grid}", name, "loss-slot", grid)
    rows = {"generated": read_rows(out, "journey", "generated")}
    _kernel(found, out, f"journey-trak, T={grid}", "journey-trak", "loss-slot", grid, rows)


def _finest(config: LdsConfig, out: Path, features: str) -> str:
    """The largest grid, up to 10 timesteps, whose features are there."""
    grids = [g for g in ("2", "10") if has_features(config, out, features, GRIDS[g])]
    return grids[-1]


def _kernel(
    found: Judge,
    out: Path,
    name: str,
    preset: str,
    features: str,
    grid: str,
    queries: dict[str, Tensor] | None = None,
    count: int | None = None,
) -> None:
    training = read_features(out, features, "training", grid, count)
    if queries is None:
        queries = {k: read_features(out, features, k, grid)["vectors"] for k in KINDS}
    found.kernel(
        name,
        training["vectors"],
        queries,
        settings=own_scores(preset, training["vectors"]),
        errors=training["errors"],
        readouts=READOUTS,
        controls=("signed", "square"),
        features=features,
        timesteps=grid,
    )


def own_scores(preset: str, training: Tensor) -> ScoreConfig:
    """The preset's score with one grid of relative dampings, and its own damping in those units."""
    values = dict(PRESETS["das" if preset in (*RULES, *DAS) else preset]["scores"])
    if preset in (*RULES, *DAS):
        rule, value = RULES[preset] if preset in RULES else DAS[preset][1:]
        kernel = fit_kernel(training)
        chosen = ScoreConfig(damping_rule=rule, damping=value)  # type: ignore[arg-type]
        values["damping"] = chosen.absolute_damping(kernel) / kernel.damping(1.0)
    elif values["damping_rule"] == "absolute":
        # The published sketches are unscaled, which multiplies the kernel by their width.
        scale = PRESETS[preset]["features"]["projection"]["dim"]
        values["damping"] /= scale * float(training.square().sum(dim=1).mean())
    return ScoreConfig(**values | {"damping_rule": "relative", "damping_grid": RHOS})


def _first_images(
    config: LdsConfig, out: Path, masks: Tensor, losses: dict[str, Tensor]
) -> dict[str, Any] | None:
    """``das-official`` at T = 100 and its rivals on as many training images as have been featurised.

    Kernels and scores know these images only, for all methods alike.
    """
    count = finished_rows(config, out, "mean-slot", "100")
    if not 0 < count < len(masks[0]):
        return None
    found = Judge(masks[:, :count], losses)
    for name, grids in (
        (MEAN, ("1 (t=500)", "2", "10")),
        ("das-official", ("2", "10", "20", "100")),
    ):
        for grid in grids:
            preset, features = KERNELS[name]
            _kernel(found, out, f"{name}, T={grid}", preset, features, grid, count=count)
    return {
        "training_images": count,
        "records": found.records,
        "differences": [
            found.gap((ours, readout), ("das-official, T=100", readout), kind)
            for ours in (f"{MEAN}, T=2", f"{MEAN}, T=10")
            for readout in ("square", "signed")
            for kind in KINDS
        ],
    }


def _plain_scores(
    config: LdsConfig,
    found: Judge,
    out: Path,
    pixels: dict[str, Tensor],
    training: Tensor,
    width: float,
) -> None:
    encoded = read_rows(out, "encoder", "training")
    finest = {noise: _finest(config, out, f"loss-{noise}") for noise in ("slot", "shared")}
    traced = [
        read_features(out, name, "training", "2")["vectors"]
        for name in CHECKPOINTS
        if has_features(config, out, name, GRIDS["2"])
    ]
    for kind in KINDS:
        scores = {
            "pixel dot": dot_blocks(pixels[kind], training),
            "pixel cosine": cosine_blocks(pixels[kind], training),
            "pixel Gaussian": gaussian_blocks(pixels[kind], training, width),
        }
        inside = read_rows(out, "encoder", kind)
        scores["denoiser features, cosine"] = cosine_blocks(inside, encoded)
        for noise, grid in finest.items():
            rows, asked = (
                read_features(out, f"loss-{noise}", role, grid)["vectors"]
                for role in ("training", kind)
            )
            scores[f"gradient dot, {noise} noise, T={grid}"] = dot_blocks(asked, rows)
            scores[f"gradient cosine, {noise} noise, T={grid}"] = cosine_blocks(asked, rows)
        if len(traced) == len(CHECKPOINTS):
            asked = [read_features(out, name, kind, "2")["vectors"] for name in CHECKPOINTS]
            pairs = list(zip(asked, traced, strict=True))
            scores["TracInCP, T=2"] = tracin_blocks(pairs)
            scores["GAS, T=2"] = gas_blocks(pairs)
        for name, blocks in scores.items():
            found.scores(name, kind, collect(blocks), readouts=READOUTS, controls=("signed",))


def _signal(
    config: LdsConfig, again: LdsConfig, out: Path, sets: dict[str, Path], losses: dict[str, Tensor]
) -> dict[str, Any]:
    """How far subset models differ, and how much of that another training seed would repeat."""
    facts: dict[str, Any] = {"models": len(next(iter(losses.values())))}
    for kind, table in losses.items():
        facts[kind] = {
            "mean_loss": round(float(table.mean()), 5),
            "relative_sd": round(float((table.std(dim=0) / table.mean(dim=0)).mean()), 5),
            "shared_by_queries": round(float(table.mean(dim=1).var() / table.var(dim=0).mean()), 4),
        }
    count = again.subsets.count
    seed = again.subsets.training_seeds[0]
    if not (out / "losses" / f"subset-{count - 1:05d}-seed-{seed}.safetensors").exists():
        return facts
    other = loss_tables(again, out / "losses", out / "models", sets, PartialState(cpu=True), "cpu")
    facts["trained_twice"] = count
    for kind, table in losses.items():
        # A shift common to all subsets changes no rank, so differences are centred over subsets.
        gap = other[kind] - table[:count]
        noise = float(gap.var(dim=0).mean()) / 2
        total = float(table.var(dim=0).mean())
        facts[kind] |= {
            "variance_of_subsets": round(1 - noise / total, 4),
            "highest_lds_expected": round(max(1 - noise / total, 0.0) ** 0.5, 4),
        }
    return facts


def _differences(found: Judge) -> list[dict[str, Any]]:
    pairs = []
    for ours in (OUTPUTS, SIGNS, MEAN):
        for grid in ("1 (t=500)", "1 (t=0)", "2", "10", "100"):
            for other in ("das-official", "dtrak"):
                mine, theirs = f"{ours}, T={grid}", f"{other}, T={grid}"
                own = "square" if other == "das-official" else "signed"
                pairs.append(((mine, "square"), (theirs, own)))
                pairs.append(((mine, "signed"), (theirs, "signed")))
                if own != "square":
                    pairs.append(((mine, "square"), (theirs, "square")))
        for grid in ("20", "100"):
            for count in ("2", "10"):
                mine = (f"{ours}, T={count}", "square")
                pairs.append((mine, (f"das-official, T={grid}", "square")))
        for other, readout in (
            ("trak, shared noise, T=10", "signed"),
            ("trak, shared noise, T=10", "square"),
            ("pixel cosine", "signed"),
            ("pixel Gaussian", "signed"),
            (f"{ours}, T=10", "signed"),
        ):
            pairs.append(((f"{ours}, T=10", "square"), (other, readout)))
    for ours, others in (
        (OUTPUTS, (SIGNS, MEAN)),
        (SIGNS, (MEAN, "das, signs averaged", "das, mean stacked")),
    ):
        for other in others:
            for grid in GRIDS:
                for readout in ("square", "signed"):
                    pairs.append(((f"{ours}, T={grid}", readout), (f"{other}, T={grid}", readout)))
    return _gaps(found, pairs)


def _own_differences(found: Judge) -> list[dict[str, Any]]:
    pairs = []
    for ours in (OUTPUTS, SIGNS, MEAN, *RULES):
        for grid in ("1 (t=500)", "2", "10", "100"):
            mine = (f"{ours}, T={grid}", "square")
            pairs.append((mine, (f"das-official, T={grid}", "square")))
            pairs.append((mine, (f"dtrak, T={grid}", "signed")))
        pairs.append(((f"{ours}, T=2", "square"), ("das-official, T=100", "square")))
        pairs.append(((f"{ours}, T=10", "square"), ("pixel cosine", "signed")))
    return _gaps(found, pairs, own=True)


Row = tuple[str, str]
"""Method and readout."""


def _gaps(found: Judge, pairs: list[tuple[Row, Row]], own: bool = False) -> list[dict[str, Any]]:
    """Of those pairs whose rows are there."""
    present = {(r["method"], r["readout"], r["track"]) for r in found.records}
    return [
        found.gap(first, second, kind, own=own)
        for first, second in pairs
        for kind in KINDS
        if {(*first, kind), (*second, kind)} <= present
    ]


def _tables(result: dict[str, Any]) -> str:
    every = result["records"]
    # Other rules change a method's own damping and nothing where a damping is chosen.
    records = [r for r in every if not r["method"].startswith(tuple(RULES))]
    lines = [
        "# Linear datamodeling score on CIFAR-2",
        "",
        "Written by `lds_cifar2.py`; protocol and reading in `PROTOCOL.md`. Percent, with 95 % "
        "intervals over subsets and queries.",
        "",
        "## Judged on held-out subsets",
        "",
        "The damping is chosen on one half of the subsets and judged on the other, both ways.",
        "",
        markdown(records, KINDS, READOUTS),
        "## Differences of `das`, paired",
        "",
        "| first | second | queries | difference |",
        "|---|---|---|---|",
    ]
    lines += [_gap_row(gap) for gap in result["differences"]]
    part = result["first_images"]
    if part is not None:
        lines += [
            "",
            f"## `das-official` at T=100, on the first {part['training_images']} training images",
            "",
            "Kernels and scores of all rows know these images only; judged on held-out subsets.",
            "",
            markdown(part["records"], KINDS, READOUTS),
            "| first | second | queries | difference |",
            "|---|---|---|---|",
            *(_gap_row(gap) for gap in part["differences"]),
        ]
    lines += ["", "## Best damping of the grid, all subsets (optimistic)", ""]
    lines.append(markdown(records, KINDS, READOUTS, by="optimistic"))
    lines += ["## The method's own damping, all subsets", ""]
    lines.append(markdown(every, KINDS, READOUTS, by="default"))
    lines += [
        "## Differences of `das` at the methods' own dampings, all subsets, paired",
        "",
        "| first | second | queries | difference |",
        "|---|---|---|---|",
        *(_gap_row(gap) for gap in result["own_differences"]),
        "",
    ]
    lines += [
        "## Controls",
        "",
        "At the damping chosen on all subsets. Shuffled: each query judged by another one's scores. "
        "Average: by the mean scores. Centred: against losses minus their mean over queries.",
        "",
        "| method | readout | queries | score | shuffled | average | centred |",
        "|---|---|---|---|---|---|---|",
    ]
    for record in records:
        controls = record.get("controls")
        if controls:
            names = ("score", "shuffled", "query_average", "centred")
            cells = " | ".join(percent(controls[name]) for name in names)
            lines.append(
                f"| {record['method']} | {record['readout']} | {record['track']} | {cells} |"
            )
    return "\n".join(lines) + "\n"


def _gap_row(gap: dict[str, Any]) -> str:
    first, second = (f"{name} ({readout})" for name, readout in (gap["first"], gap["second"]))
    interval = f"[{percent(gap['low'])}, {percent(gap['high'])}]"
    return f"| {first} | {second} | {gap['track']} | {percent(gap['difference'])} {interval} |"
