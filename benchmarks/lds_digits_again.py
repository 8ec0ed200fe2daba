"""The convolutional network of ``lds_digits.py`` against new subset models; see PROTOCOL.md.

    python benchmarks/lds_digits_again.py --work FOLDER [--stage models|judge]

``--work`` is a folder in which ``lds_digits.py`` has made the attributed model, the generated queries
and the features. New halves are drawn, and four models are trained on each (128 in all, an hour of one
core), so that the losses to predict hold less of what a seed does. Stopped at any moment and started
again, the command goes on from there. Writes ``lds_digits_again.json`` and ``lds_digits_again.md``
beside this file.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _lds_digits_features import embeddings, has_features, read_errors, read_rows
from _lds_digits_judge import T, sketch_scale
from _lds_digits_models import digits, losses_of, subset_masks_of_recipe, train
from _lds_digits_stages import TOYS, TRACKS, TRAINING, load_states, queries_of, save_states
from _lds_methods import Judge, Record, gap_table, markdown, percent
from safetensors.torch import load_file
from torch import Tensor

from diffcal.attribution import PRESETS, ScoreConfig, cosine_blocks, stream_predictions
from diffcal.config import config_from_dict
from diffcal.core.progress import progress_bar
from diffcal.core.runs import write_json, write_text

HERE = Path(__file__).parent
TOY = next(toy for toy in TOYS if toy.name == "conv")
SUBSETS, SEEDS, DRAW = 32, (1, 2, 3, 4), 8
LOSS_TIMESTEPS, LOSS_NOISES = 50, 2
FEATURES = {  # of each method: the set of features, and which of its sketches
    "das": ("outputs, T={}", "exact"),
    "das-mean": ("mean, shared, T={}", "sjlt-4096"),
    "das-official": ("mean, slot, T={}", "exact"),
    "dtrak": ("dtrak, T={}", "exact"),
}
OWN = {"das": "square", "das-mean": "square", "das-official": "square", "dtrak": "signed"}
"""How each method is read out as published, or as it comes."""


def prepare(work: Path) -> None:
    """Train and measure whatever is missing, one subset (all its seeds) after the other."""
    home, folder = work / TOY.name, work / "conv-again"
    images, masks = digits(0, TRAINING), subset_masks_of_recipe(SUBSETS, draw=DRAW)
    queries = torch.cat([queries_of(home)[name] for name in TRACKS])
    with progress_bar(SUBSETS * len(SEEDS), "subset models", unit="model") as bar:
        for subset in range(SUBSETS):
            path = folder / "models" / f"subset-{subset:03d}.safetensors"
            measured = folder / "losses" / path.name
            if not path.exists():
                states = []
                for seed in SEEDS:
                    (history,) = train(TOY.make, [images[masks[subset]]], [seed], TOY.steps)
                    states.append(history[-1])
                    bar.update(1)
                save_states(path, states)
            else:
                bar.update(len(SEEDS))
            if not measured.exists():
                found = losses_of(TOY.make, load_states(path), queries, LOSS_TIMESTEPS, LOSS_NOISES)
                save_states(measured, [{"losses": found}])


def read_losses(work: Path) -> Tensor:
    """``[subsets, seeds, queries]`` of both tracks side by side.

    Raises:
        SystemExit: some are missing.
    """
    files = sorted((work / "conv-again" / "losses").glob("subset-*.safetensors"))
    if len(files) < SUBSETS:
        raise SystemExit(f"losses of {SUBSETS - len(files)} subsets are missing: --stage models")
    return torch.stack([load_file(file)["0.losses"] for file in files])


def due_to_subsets(losses: Tensor) -> dict[str, float]:
    """Share of the variance between models that is due to subsets: one model each, mean over seeds."""
    within = losses.var(dim=1).mean(dim=0)
    means = losses.mean(dim=1).var(dim=0)
    between = (means - within / losses.shape[1]).mean()
    return {
        "one_model": round(float(between / (between + within.mean())), 4),
        "mean_over_seeds": round(float(between / means.mean()), 4),
    }


def judged(work: Path) -> dict[str, Any]:
    """Records of all methods, and the comparisons of the protocol."""
    losses = read_losses(work)
    halves = dict(zip(TRACKS, losses.split(losses.shape[2] // 2, dim=2), strict=True))
    masks = subset_masks_of_recipe(SUBSETS, draw=DRAW)
    pixels = embeddings(TOY, work)["pixel"]
    alike = {
        track: {
            "pixel cosine": stream_predictions(
                cosine_blocks(pixels[track], pixels["training"]), masks
            )
        }
        for track in TRACKS
    }
    judge = Judge(
        masks, {track: part.mean(dim=1) for track, part in halves.items()}, likeness=alike
    )
    names: list[str] = []
    for method, (pattern, kind) in FEATURES.items():
        for t in T:
            features = pattern.format(t)
            if not has_features(work, TOY, features):
                raise SystemExit(f"features '{features}' are missing: run lds_digits.py first")
            rows = read_rows(work, TOY, features, kind)
            scale = sketch_scale(method) if kind == "exact" else 1.0
            judge.kernel(
                f"{method}, T={t}",
                rows["training"] * scale,
                {track: rows[track] * scale for track in TRACKS},
                settings=config_from_dict(ScoreConfig, PRESETS[method]["scores"]),
                errors=read_errors(work, TOY, features),
                controls=("signed", "square") if t == 10 else (),
            )
            names.append(f"{method}, T={t}")
    judge.rows("pixel cosine", lambda track: cosine_blocks(pixels[track], pixels["training"]))
    pairs = [
        *(("das", t, other, t) for t in T for other in ("das-official", "dtrak", "das-mean")),
        ("das", 2, "das-official", 100),
    ]
    gaps = [
        judge.gap((f"{a}, T={t}", OWN[a]), (f"{b}, T={u}", OWN[b]), track)
        for track in TRACKS
        for a, t, b, u in pairs
    ]
    gaps += [
        judge.gap(("das, T=10", "square"), ("pixel cosine", "signed"), track) for track in TRACKS
    ]
    return {
        "settings": {
            "subsets": SUBSETS,
            "training_seeds": list(SEEDS),
            "steps": TOY.steps,
            "loss_timesteps": LOSS_TIMESTEPS,
            "loss_noises": LOSS_NOISES,
        },
        "due_to_subsets": {track: due_to_subsets(part) for track, part in halves.items()},
        "methods": [*names, "pixel cosine"],
        "gaps": gaps,
        "records": judge.records,
    }


def tables(found: dict[str, Any]) -> str:
    """The result file as Markdown."""
    settings = found["settings"]
    shares = "; ".join(
        f"{track} {percent(part['one_model'])} % with one model of each, "
        f"{percent(part['mean_over_seeds'])} % with the mean over seeds"
        for track, part in found["due_to_subsets"].items()
    )
    order: list[Record] = [
        record
        for name in found["methods"]
        for record in found["records"]
        if record["method"] == name
    ]
    parts = [
        "# LDS on digits, convolutional network, new subset models",
        "Made by `python benchmarks/lds_digits_again.py`; protocol and reading in `PROTOCOL.md`. "
        "Percent; in brackets 95 % intervals over subsets and queries.",
        f"{settings['subsets']} new half subsets, {len(settings['training_seeds'])} training seeds "
        f"each, {settings['steps']} steps; losses over {settings['loss_timesteps']} timesteps and "
        f"{settings['loss_noises']} draws, averaged over seeds. Variance between models due to their "
        f"subsets: {shares}.",
        "### Dampings chosen on other subsets",
        markdown(order, TRACKS),
        "### Each preset's own damping, all subsets at once",
        markdown(order, TRACKS, by="default"),
        "### Best damping of the grid on the very subsets that judge (optimistic)",
        markdown(order, TRACKS, by="optimistic"),
        "### Comparisons of the protocol, paired",
        gap_table(found["gaps"]),
    ]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if not (arguments.work / TOY.name / "generated.safetensors").exists():
        raise SystemExit(
            f"{arguments.work} holds no attributed model: run lds_digits.py --toys conv first"
        )
    if arguments.stage in (None, "models"):
        prepare(arguments.work)
    if arguments.stage in (None, "judge"):
        started = time.process_time()
        found = judged(arguments.work)
        spent = round(time.process_time() - started, 1)
        write_json(
            arguments.out,
            {**environment("cpu", ("scikit-learn",)), "judging_cpu_seconds": spent, **found},
        )
        write_text(arguments.out.with_suffix(".md"), tables(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--stage", choices=["models", "judge"])
    parser.add_argument("--out", type=Path, default=HERE / "lds_digits_again.json")
    main(parser.parse_args())
