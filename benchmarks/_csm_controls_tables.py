"""Tables of ``csm_controls.py``: means over seeds, and mixing less its controls, paired by seed."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

MEASURES = {
    "accuracy": "accuracy", "ece": "ECE", "ece_mass": "adaptive ECE", "cw_ece": "classwise ECE",
    "smece": "smECE", "nll": "NLL", "brier": "Brier",
}  # fmt: skip
PERCENT = {"accuracy", "ece", "ece_mass", "cw_ece", "smece", "ood_patches", "ood_digits"}
CONTROLS = ("CE", "label smoothing, matched", "pure generated, CE", "encoder distillation")


def markdown(results: dict[str, Any]) -> str:
    """Means over seeds with standard deviations, before and after a temperature; paired differences."""
    runs = results["runs"]
    seeds = len(next(iter(runs.values())))
    rows = results["rows"]
    extra = [
        name
        for name in ("human_kl", "human_l2", "ood_patches", "ood_digits")
        if name in next(iter(next(iter(runs.values())).values()))["before"]
    ]
    titles = MEASURES | {
        "human_kl": "KL to people", "human_l2": "squared distance to people",
        "ood_patches": "AUROC, photograph patches", "ood_digits": "AUROC, digits",
        "confidence": "confidence",
    }  # fmt: skip
    lines = [
        f"# Semantic mixing against its controls: {results['set_up']}",
        "",
        f"Written by `benchmarks/csm_controls.py`. {results['recipe']['model']}, training rows "
        f"{rows['train'][1]}, {results['recipe']['epochs']} epochs, {results['per_real']} mixed "
        f"image(s) per real one where mixed images are used ({results['mixed_images']['all_class']} "
        f"in the set); temperature fitted on rows {rows['validation'][1]}, judged on rows "
        f"{rows['test'][1]}; without a validation error the temperature stays 1. Mean ± standard "
        f"deviation over {seeds} seeds; calibration errors, accuracy and AUROC in percent. Smoothing "
        f"{results['smoothing']:.3f} has the mixed training's mean top target.",
        "",
    ]
    for stage, title in (("before", "Before calibration"), ("after", "After one temperature")):
        columns = [*MEASURES, *extra, "confidence"]
        head = ["method", *(titles[name] for name in columns), "T", "training accuracy"]
        lines += [f"## {title}", "", *_head(head)]
        for method, by_seed in runs.items():
            cells = [
                _cell([run[stage][name] for run in by_seed.values()], name) for name in columns
            ]
            cells.append(_cell([run["temperature"] for run in by_seed.values()], "temperature"))
            cells.append(_cell([run["train_accuracy"] for run in by_seed.values()], "accuracy"))
            lines.append(f"| {' | '.join([method, *cells])} |")
        lines.append("")
    lines += [
        "## Mixing less its controls, paired by seed",
        "",
        "Mean difference ± standard error over seeds; bold where all seeds have one sign.",
        "",
        *_head(
            [
                "difference",
                "accuracy",
                "adaptive ECE before",
                "NLL before",
                "NLL after",
                "Brier after",
            ]
        ),
    ]
    mixed = [name for name in runs if name.startswith("CSM")]
    pairs = [*itertools.product(mixed, (*CONTROLS, "CSM as released"))]
    pairs += [(name, name.removesuffix(", bisected")) for name in mixed]
    for mixing, control in pairs:
        if mixing == control or control not in runs:
            continue
        cells = [
            _difference(runs[control], runs[mixing], *what)
            for what in (
                ("before", "accuracy"), ("before", "ece_mass"), ("before", "nll"),
                ("after", "nll"), ("after", "brier"),
            )
        ]  # fmt: skip
        lines.append(f"| {mixing} − {control} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _head(names: Sequence[str]) -> Iterator[str]:
    yield f"| {' | '.join(names)} |"
    yield f"| {' | '.join(['---', *('---:' for _ in names[1:])])} |"


def _cell(values: list[float], name: str) -> str:
    scale, digits = (100, 2) if name in PERCENT else (1, 3)
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{scale * statistics.fmean(values):.{digits}f} ± {scale * spread:.{digits}f}"


def _difference(control: dict[str, Any], mixing: dict[str, Any], stage: str, name: str) -> str:
    changes = [mixing[seed][stage][name] - control[seed][stage][name] for seed in control]
    scale, digits = (100, 2) if name in PERCENT else (1, 4)
    error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else 0.0
    text = f"{scale * statistics.fmean(changes):+.{digits}f} ± {scale * error:.{digits}f}"
    one_sign = all(c > 0 for c in changes) or all(c < 0 for c in changes)
    return f"**{text}**" if one_sign else text
