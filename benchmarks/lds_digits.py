"""Linear datamodeling score of every attribution method on two small digit networks; see PROTOCOL.md.

    python benchmarks/lds_digits.py --work FOLDER [--toys mlp conv] [--stage models|features|judge|write]
        [--every-set]

Trains an MLP (53,824 parameters, 96 subset models) and a convolutional network (40,577 parameters, 32
subset models) of 300 digits, and judges about fifty ways to score training images against what
happens to the subset models' losses. ``--work`` keeps models, losses and features: stopped at any
moment and started again, the command goes on from there. Writes ``lds_digits.json`` (every record),
``lds_digits.md`` (tables) beside this file and ``docs/lds-digits.png``.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _lds_digits_features import featurise
from _lds_digits_judge import T, judge
from _lds_digits_stages import TOYS, TRACKS, Toy, missing, prepare, seconds
from _lds_methods import Record, figure, gap_table, markdown, percent

from diffcal.core.runs import read_json, write_json, write_text

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "lds-digits.png"
TITLES = {"mlp": "MLP", "conv": "Convolutional"}
PRESETS = tuple(
    f"{name}, T={t}" for name in ("das", "das-mean", "das-official", "dtrak", "trak") for t in T
)
NOISE = tuple(f"mean, {noise}, T={t}" for noise in ("shared", "slot", "independent") for t in T)
FUNCTIONALS = (
    "mean, shared, T=2", "loss, shared, T=2", "mean-squared-l2-norm, shared, T=2",
    "mean, shared, T=10", "loss, shared, T=10", "mean-squared-l2-norm, shared, T=10",
    "l1-norm, shared, T=10", "l2-norm, shared, T=10",
    "mean, slot, T=10", "loss, slot, T=10", "mean-squared-l2-norm, slot, T=10",
    "mean, slot, T=100", "loss, slot, T=100", "mean-squared-l2-norm, slot, T=100",
)  # fmt: skip
VARIANTS = (
    "mean, shared, T=10", "leverage", "residual rms", "not normalised", "SJLT 256", "SJLT 1024",
    "SJLT 4096", "middle block only", "up block only", "last layer only",
)  # fmt: skip
BASELINES = (
    "das, T=10", "das-mean, T=10", "pixel dot", "pixel cosine", "pixel Gaussian, width 1",
    "pixel Gaussian, width 2", "pixel Gaussian, width 4", "denoiser dot", "denoiser cosine",
    "classifier dot",
    "classifier cosine", "gradient dot", "gradient cosine", "TracInCP", "GAS", "trak, T=10",
    "relative influence", "renormalised influence", "Journey-TRAK", "empirical influence",
    "datamodel",
)  # fmt: skip
DRAWN = (
    *(f"das, T={t}" for t in T), *(f"das-mean, T={t}" for t in (2, 10)),
    *(f"das-official, T={t}" for t in T),
    *(f"dtrak, T={t}" for t in (10, 100)), *(f"trak, T={t}" for t in (10, 100)), *BASELINES[2:-6],
    "relative influence", "renormalised influence", "Journey-TRAK", "empirical influence", "datamodel",
)  # fmt: skip


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    chosen = [toy for toy in TOYS if toy.name in arguments.toys]
    for toy in chosen:
        if arguments.stage in (None, "models"):
            prepare(toy, arguments.work)
        if arguments.stage in (None, "features"):
            featurise(toy, arguments.work, arguments.every_set)
        if arguments.stage in (None, "judge"):
            _judge(toy, arguments.work)
    if arguments.stage in (None, "judge", "write"):
        results = {
            toy.name: read_json(arguments.work / toy.name / "results.json")
            for toy in TOYS
            if (arguments.work / toy.name / "results.json").exists()
        }
        write_json(arguments.out, {**environment("cpu", ("scikit-learn",)), "toys": results})
        write_text(arguments.out.with_suffix(".md"), tables(results))
        if arguments.out.parent == HERE:
            draw(results, PICTURE)


def _judge(toy: Toy, work: Path) -> None:
    for line in missing(toy, work / toy.name):
        raise SystemExit(f"{line} are missing: run --stage models first")
    started = time.process_time()
    found, more = judge(toy, work)
    spent = seconds(work / toy.name) | {"judging": round(time.process_time() - started, 1)}
    settings = {
        "subsets": toy.subsets,
        "training_seeds": list(toy.seeds),
        "steps": toy.steps,
        "loss_timesteps": toy.loss_timesteps,
        "loss_noises": toy.loss_noises,
    }
    write_json(
        work / toy.name / "results.json",
        {"settings": settings, **more, "cpu_seconds": spent, "records": found.records},
    )


def tables(results: dict[str, Any]) -> str:
    """The result file as Markdown."""
    parts = [
        "# LDS on digits",
        "Made by `python benchmarks/lds_digits.py`; protocol and reading in `PROTOCOL.md`. Percent; in "
        "brackets 95 % intervals over subsets and queries. Unless a table says otherwise, dampings were "
        "chosen on other subsets than those that judge (two folds). Absolute dampings belong to "
        "published presets, relative ones to all others.",
    ]
    for name, toy in results.items():
        settings, records = toy["settings"], toy["records"]
        parts += [
            f"## {TITLES[name]} network",
            f"{settings['subsets']} half subsets, {len(settings['training_seeds'])} training seed(s) "
            f"each, {settings['steps']} steps; losses over {settings['loss_timesteps']} timesteps and "
            f"{settings['loss_noises']} draw(s).",
            "### Presets at equal numbers of timesteps",
            markdown(_of(records, PRESETS), TRACKS),
            "Best damping of the grid on the very subsets that judge (optimistic, as published tables):",
            markdown(_of(records, PRESETS), TRACKS, by="optimistic"),
            "Each preset's own damping, all subsets at once:",
            markdown(_of(records, PRESETS), TRACKS, by="default"),
            *_absent(toy["not_judged"]),
            "### Comparisons of the protocol, paired",
            gap_table(toy["gaps"]),
            "### Noise (exact features)",
            markdown(_of(records, NOISE), TRACKS),
            "### Functionals (exact features)",
            markdown(_of(records, FUNCTIONALS), TRACKS),
            "### Variants of `mean`, shared noise, T = 10",
            markdown(_of(records, VARIANTS), TRACKS, ("signed", "square")),
            "### Baselines",
            markdown(_of(records, BASELINES), TRACKS, ("signed", "square")),
            "### Controls",
            _control_table(records),
            _kernel_line(toy["leverage"]),
            _cost_line(toy["cpu_seconds"]),
        ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _absent(names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"Not judged, as their features were not made: {'; '.join(names)}."]


def _of(records: list[Record], names: tuple[str, ...]) -> list[Record]:
    return [record for name in names for record in records if record["method"] == name]


def _control_table(records: list[Record]) -> str:
    names = ("score", "shuffled", "query_average", "centred", "likeness:pixel cosine")
    lines = [
        "| method | queries | readout | score | queries shuffled | averaged over queries | losses less "
        "their mean over queries | pixel cosine |",
        "|" + "---|" * 8,
    ]
    for record in records:
        if "controls" in record:
            cells = [percent(record["controls"][name]) for name in names]
            head = [record["method"], record["track"], record["readout"]]
            lines.append(f"| {' | '.join(head + cells)} |")
    return "\n".join(lines)


def _kernel_line(facts: dict[str, float]) -> str:
    return (
        f"Leverage of `mean`, shared, T = 10 at rho {facts['rho']}: mean {facts['mean']}, largest "
        f"{facts['max']}; effective dimension {facts['effective_dimension']} of 300; the largest "
        f"eigenvalue holds {percent(facts['share_of_largest_eigenvalue'])} % of the trace."
    )


def _cost_line(spent: dict[str, float]) -> str:
    listed = ", ".join(f"{name} {value:.0f}" for name, value in spent.items())
    return f"Processor seconds on a machine shared with others: {listed}."


def draw(results: dict[str, Any], path: Path) -> None:
    panels = [(TITLES[name], _of(toy["records"], DRAWN)) for name, toy in results.items()]
    figure(panels, path, TRACKS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--toys", nargs="+", choices=["mlp", "conv"], default=["mlp", "conv"])
    parser.add_argument("--stage", choices=["models", "features", "judge", "write"])
    parser.add_argument(
        "--every-set", action="store_true", help="all sets of 100 timesteps as well"
    )
    parser.add_argument("--out", type=Path, default=HERE / "lds_digits.json")
    main(parser.parse_args())
