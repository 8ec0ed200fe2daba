"""What ``lds_digits.py`` keeps between runs: subset models, queries and losses of the two toys."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from _lds_digits_models import (
    DigitsMlp,
    DigitsUNet,
    State,
    denoiser_of,
    digits,
    generate,
    losses_of,
    subset_masks_of_recipe,
    train,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffcal.core.progress import progress_bar
from diffcal.core.runs import read_json, write_json

BASE_SEED = 42
TRAINING, QUERIES = 300, 100
QUARTERS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Toy:
    """One network, its subsets, and how its losses are measured."""

    name: str
    make: Callable[[], nn.Module]
    subsets: int
    seeds: tuple[int, ...]
    steps: int
    together: int
    """Networks trained at once: what is faster on a CPU (``train_together.py``)."""
    loss_timesteps: int
    loss_noises: int


TOYS = (
    Toy("mlp", DigitsMlp, 48, (0, 1), 1200, 16, 50, 2),
    Toy("conv", DigitsUNet, 32, (0,), 800, 1, 40, 1),
)


def prepare(toy: Toy, work: Path) -> None:
    """Train, generate and measure whatever ``work`` lacks."""
    folder = work / toy.name
    folder.mkdir(parents=True, exist_ok=True)
    with _seconds(folder, "base"):
        _train_base(toy, folder)
    with _seconds(folder, "queries"):
        _generate(toy, folder)
    jobs = [(subset, seed) for subset in range(toy.subsets) for seed in toy.seeds]
    groups = [jobs[start : start + toy.together] for start in range(0, len(jobs), toy.together)]
    images, masks = digits(0, TRAINING), subset_masks_of_recipe(toy.subsets)
    with progress_bar(len(jobs), f"{toy.name}: subset models", unit="model") as bar:
        for number, group in enumerate(groups):
            path = folder / "models" / f"group-{number:03d}.safetensors"
            if not path.exists():
                with _seconds(folder, f"models-{number:03d}"):
                    data = [images[masks[subset]] for subset, _ in group]
                    histories = train(toy.make, data, [seed for _, seed in group], toy.steps)
                    save_states(path, [history[-1] for history in histories])
            measured = folder / "losses" / path.name
            if not measured.exists():
                with _seconds(folder, f"losses-{number:03d}"):
                    queries = torch.cat([queries_of(folder)[name] for name in TRACKS])
                    found = losses_of(
                        toy.make, load_states(path), queries, toy.loss_timesteps, toy.loss_noises
                    )
                    save_states(measured, [{"losses": found}])
            bar.update(len(group))


TRACKS = ("validation", "generated")


def base_states(toy: Toy, folder: Path) -> list[State]:
    """Weights of the attributed model at each of ``QUARTERS``."""
    return load_states(folder / "base.safetensors")


def queries_of(folder: Path) -> dict[str, Tensor]:
    """Images of each set of queries."""
    return {
        "validation": digits(TRAINING, QUERIES),
        "generated": load_file(folder / "generated.safetensors")["images"],
    }


def sampling_path(folder: Path) -> tuple[Tensor, list[float]]:
    """What was predicted at every step of the generated queries, and its noise levels."""
    held = load_file(folder / "generated.safetensors")
    return held["path"], held["levels"].tolist()


def losses(toy: Toy, folder: Path) -> dict[str, Tensor]:
    """For each set of queries, ``[subsets, queries]``: mean over training seeds."""
    files = sorted((folder / "losses").glob("group-*.safetensors"))
    table = torch.cat([load_file(file)["0.losses"] for file in files])
    table = table.unflatten(0, (toy.subsets, len(toy.seeds))).mean(dim=1)
    return dict(zip(TRACKS, table.split(QUERIES, dim=1), strict=True))


def seconds(folder: Path) -> dict[str, float]:
    """Processor seconds of every stage so far, models and losses summed."""
    total: dict[str, float] = {}
    for file in sorted((folder / "seconds").glob("*.json")):
        kind = file.stem.partition("-")[0]
        total[kind] = round(total.get(kind, 0.0) + float(read_json(file)), 2)
    return total


def _train_base(toy: Toy, folder: Path) -> None:
    path = folder / "base.safetensors"
    if not path.exists():
        at = [round(toy.steps * share) for share in QUARTERS]
        (history,) = train(toy.make, [digits(0, TRAINING)], [BASE_SEED], toy.steps, at)
        save_states(path, history)


def _generate(toy: Toy, folder: Path) -> None:
    path = folder / "generated.safetensors"
    if not path.exists():
        denoiser = denoiser_of(toy.make, base_states(toy, folder)[-1])
        images, steps, levels = generate(denoiser, QUERIES)
        partial = path.with_suffix(".partial")
        tensors = {"images": images, "path": steps, "levels": torch.tensor(levels).double()}
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial)
        partial.rename(path)


def save_states(path: Path, states: list[State]) -> None:
    """Write tensors of several models, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(
        {
            f"{i}.{name}": t.contiguous()
            for i, state in enumerate(states)
            for name, t in state.items()
        },
        partial,
    )
    partial.rename(path)


def load_states(path: Path) -> list[State]:
    """What :func:`save_states` wrote."""
    states: dict[int, State] = {}
    for key, tensor in load_file(path).items():
        index, _, name = key.partition(".")
        states.setdefault(int(index), {})[name] = tensor
    return [states[index] for index in sorted(states)]


class _seconds:
    """Keeps the processor seconds of what it encloses, unless they were kept before."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / "seconds" / f"{name}.json"

    def __enter__(self) -> None:
        self.started = time.process_time()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, round(time.process_time() - self.started, 3))


def missing(toy: Toy, folder: Path) -> Iterator[str]:
    """What :func:`prepare` has still to do."""
    groups = -(-toy.subsets * len(toy.seeds) // toy.together)
    for kind in ("models", "losses"):
        found = len(list((folder / kind).glob("group-*.safetensors")))
        if found < groups:
            yield f"{toy.name}: {groups - found} of {groups} groups of {kind}"
