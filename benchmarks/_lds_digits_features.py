"""Features of the two toys: exact gradients, their sketches, and embeddings for likeness."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from _lds_digits_models import denoiser_of, digits, labels_of
from _lds_digits_stages import (
    QUARTERS,
    TRACKS,
    TRAINING,
    Toy,
    base_states,
    queries_of,
    sampling_path,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from diffcal.attribution import (
    PRESETS,
    EncodedRows,
    ProjectionConfig,
    make_projector,
    path_features,
    project_rows,
)
from diffcal.attribution.featurise import FeatureConfig, Featuriser
from diffcal.core.progress import progress_bar
from diffcal.core.rng import item_generator
from diffcal.diffusion.denoisers import images_to_model
from diffcal.mixing.denoiser_features import DenoiserFeatures
from diffcal.models.encoders import ClassifierEncoder
from diffcal.models.tiny import SmallCnn

GRIDS: dict[int, int | tuple[int, ...]] = {1: (500,), 2: 2, 10: 10, 100: 100}
"""Timesteps of each T: one alone is the middle one, more are evenly spaced from 0 on."""
SIZE = 4096
SJLT = {f"sjlt-{k}": ProjectionConfig(kind="sjlt", dim=k, seed=0) for k in (256, 1024, SIZE)}
EXACT = ProjectionConfig(kind="identity")

Rows = dict[str, Tensor]
"""Features of ``training`` and of each set of queries."""


@dataclass(frozen=True)
class FeatureSet:
    """What is featurised once, and the sketches that are kept of it."""

    config: FeatureConfig
    sketches: dict[str, ProjectionConfig] = field(default_factory=dict)
    checkpoint: int = len(QUARTERS) - 1
    journey: bool = False


def feature_sets(toy: Toy, every: bool = False) -> dict[str, FeatureSet]:
    """All features of a toy by name.

    Args:
        every: Also the sets of 100 timesteps that no question of the protocol needs.
    """

    def config(t: int, **options: object) -> FeatureConfig:
        chosen = {"functional": "mean", "combine": "mean", **options}
        return FeatureConfig(timesteps=GRIDS[t], projection=EXACT, **chosen)  # type: ignore[arg-type]

    sets: dict[str, FeatureSet] = {}
    for t in GRIDS:
        for noise in ("shared", "slot", "independent"):
            sketches = dict(SJLT) if t == 10 else {f"sjlt-{SIZE}": SJLT[f"sjlt-{SIZE}"]}
            kept = sketches if noise == "shared" else {}
            sets[f"mean, {noise}, T={t}"] = FeatureSet(config(t, noise=noise), kept)
        for name, functional in (("dtrak", "mean-squared-l2-norm"), ("trak", "loss")):
            published = {
                k: PRESETS[name]["features"][k] for k in ("noise", "slot_batch", "normalise")
            }
            sets[f"{name}, T={t}"] = FeatureSet(
                config(t, functional=functional, **published),
                journey=(name, t) == ("trak", 10),
            )
    for t in GRIDS:
        # Whole rows have no length of their own: the sketch of the preset.
        outputs = FeatureConfig(timesteps=GRIDS[t], projection=SJLT[f"sjlt-{SIZE}"])
        sets[f"outputs, T={t}"] = FeatureSet(outputs)
    for functional in ("loss", "mean-squared-l2-norm"):
        for noise, t in (("shared", 2), ("shared", 10), ("slot", 10), ("slot", 100)):
            sets[f"{functional}, {noise}, T={t}"] = FeatureSet(
                config(t, functional=functional, noise=noise)
            )
    for functional in ("l1-norm", "l2-norm"):
        sets[f"{functional}, shared, T=10"] = FeatureSet(config(10, functional=functional))
    sets["mean, not normalised, T=10"] = FeatureSet(config(10, normalise=False))
    last = "out" if toy.name == "mlp" else "conv_out"
    sets["last layer"] = FeatureSet(config(10, params=last))
    if toy.name == "conv":
        sets["middle block"] = FeatureSet(config(10, params="mid_block"))
        sets["up block"] = FeatureSet(config(10, params="up_block"))
    for index in range(len(QUARTERS) - 1):
        sets[f"trak, checkpoint {index}"] = FeatureSet(sets["trak, T=10"].config, checkpoint=index)
    # Many timesteps last: they cost most, and what the protocol's questions need comes before the rest.
    asked = ("mean, slot, T=100", "dtrak, T=100", "mean, shared, T=100")
    late = [name for name in sets if name.endswith("T=100") and not name.startswith("outputs")]
    order = [name for name in sets if name not in late]
    rest = sorted(set(late) - set(asked)) if every else ()
    return {name: sets[name] for name in (*order, *asked, *rest)}


def featurise(toy: Toy, work: Path, every: bool = False) -> None:
    """Write every set that ``work`` lacks; see :func:`feature_sets`."""
    folder = work / toy.name
    images = {"training": digits(0, TRAINING), **queries_of(folder)}
    sets = feature_sets(toy, every)
    states = base_states(toy, folder)
    with progress_bar(len(sets), f"{toy.name}: features", unit="set") as bar:
        for name, asked in sets.items():
            path = folder / "features" / f"{name}.safetensors"
            if not path.exists():
                denoiser = denoiser_of(toy.make, states[asked.checkpoint])
                featuriser = Featuriser(denoiser, asked.config, batch_rows=200)
                rows, errors = {}, torch.zeros(0)
                for role, these in images.items():
                    kind = "train" if role == "training" else "query"
                    found = featuriser(these, range(len(these)), role=kind)
                    rows[role] = found.vectors
                    if role == "training":
                        errors = found.errors
                if asked.journey:
                    steps, levels = sampling_path(folder)
                    along = FeatureConfig(
                        functional="loss",
                        combine="mean",
                        sigmas=tuple(levels),
                        noise="slot",
                        slot_batch=52,
                        normalise=False,
                        projection=EXACT,
                    )
                    walker = Featuriser(denoiser, along, batch_rows=200)
                    rows["journey"] = path_features(walker, steps, range(len(steps[0])))
                write_rows(path, rows, errors, asked.sketches)
            bar.update(1)


def write_rows(
    path: Path, rows: Rows, errors: Tensor, sketches: dict[str, ProjectionConfig]
) -> None:
    """Sketches of the rows, and the rows themselves as coordinates in the span of all of them."""
    sizes = [len(part) for part in rows.values()]
    whole = torch.cat(list(rows.values()))
    tables = {"exact": in_own_span(whole)}
    for name, config in sketches.items():
        tables[name] = project_rows(make_projector(config, [(whole.shape[1],)]), whole)
    tensors = {"errors": errors}
    for kind, table in tables.items():
        for role, part in zip(rows, table.split(sizes), strict=True):
            tensors[f"{kind}|{role}"] = part.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.rename(path)


def in_own_span(rows: Tensor) -> Tensor:
    """Rows of as many entries as there are rows, with the same inner products (float64).

    Kernels, leverages, norms and cosines are functions of inner products: these short rows give the
    scores of the long ones.
    """
    double = rows.double()
    values, vectors = torch.linalg.eigh(double @ double.mT)
    return vectors * values.clamp(min=0).sqrt()


def has_features(work: Path, toy: Toy, name: str) -> bool:
    """Whether a set has been written; what was not is listed as not judged."""
    return (work / toy.name / "features" / f"{name}.safetensors").exists()


def read_rows(work: Path, toy: Toy, name: str, kind: str = "exact") -> Rows:
    """Features of one set, exact or as one of its sketches."""
    found = load_file(work / toy.name / "features" / f"{name}.safetensors")
    return {k.partition("|")[2]: v for k, v in found.items() if k.startswith(f"{kind}|")}


def read_errors(work: Path, toy: Toy, name: str) -> Tensor:
    """Errors of the training images at each timestep."""
    return load_file(work / toy.name / "features" / f"{name}.safetensors")["errors"]


def embeddings(toy: Toy, work: Path) -> dict[str, Rows]:
    """Pixels, the denoiser's features, and those of a classifier trained on the training images."""
    folder = work / toy.name
    images = {"training": digits(0, TRAINING), **queries_of(folder)}
    pixels = {
        role: ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
        for role, x in images.items()
    }
    denoiser = denoiser_of(toy.make, base_states(toy, folder)[-1])
    pool = "mean" if toy.name == "mlp" else "mean_std"
    encoders = {
        "denoiser": DenoiserFeatures(denoiser, depth=1, pool=pool),
        "classifier": ClassifierEncoder(_classifier(), images_to_model),
    }
    found: dict[str, Rows] = {"pixel": {role: x.flatten(1) for role, x in images.items()}}
    for name, encoder in encoders.items():
        found[name] = {
            role: torch.cat(list(EncodedRows(encoder, part).blocks()))
            for role, part in pixels.items()
        }
    assert all(set(rows) == {"training", *TRACKS} for rows in found.values())
    return found


def _classifier() -> torch.nn.Module:
    torch.manual_seed(0)
    network = SmallCnn((16, 32), num_classes=10, in_channels=1, image_size=8)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    images, labels = digits(0, TRAINING), labels_of(0, TRAINING)
    for epoch in range(30):
        order = torch.randperm(TRAINING, generator=item_generator(0, "classifier", epoch))
        for rows in order.split(50):
            F.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return network.eval()
