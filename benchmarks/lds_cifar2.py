"""Linear datamodeling score on CIFAR-2 (automobile, horse) with a 32x32 U-Net; see PROTOCOL.md.

    python benchmarks/lds_cifar2.py train --train TRAIN.parquet --test TEST.parquet --out runs/lds-cifar2
    python benchmarks/lds_cifar2.py features --out runs/lds-cifar2     # needs the base model only
    python benchmarks/lds_cifar2.py judge --out runs/lds-cifar2        # needs both

``--set-up trained`` has fewer images, a smaller network and ten times the epochs, ``confirm`` the same
with other images and half the steps, ``fresh`` half as many images, again others, at the epochs of
``trained``. The files are CIFAR-10 as Parquet (columns ``image`` and
``label``). Every stage resumes. ``lds_cifar2_confirm`` keeps the attributed model, its generated
queries and the losses of all subset models of that run: copy it to the output folder, and ``base``,
``features`` and ``judge`` judge a new method within minutes.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from _lds_cifar2_features import write_features
from _lds_cifar2_judge import judge
from accelerate import Accelerator, PartialState

from diffcal.core.runs import write_json
from diffcal.data.sources import open_images
from diffcal.diffusion.checkpoints import load_denoiser, save_denoiser
from diffcal.diffusion.denoisers import images_to_model
from diffcal.diffusion.edm_networks import build_network
from diffcal.diffusion.training import DiffusionTrainer, OptimizerConfig, batch_indices
from diffcal.workflows.das_config import TrainingImages
from diffcal.workflows.das_images import open_queries
from diffcal.workflows.das_lds_config import LdsConfig, LdsQueries, LossConfig, SubsetConfig
from diffcal.workflows.das_losses import loss_tables, query_losses, write_queries
from diffcal.workflows.das_subset_models import LoneAccelerator, train_models
from diffcal.workflows.train_diffusion import NetworkConfig

CLASSES = ("automobile", "horse")
VALIDATION, GENERATED, CURVE = 100, 50, 50
SUBSETS = 32
QUARTERS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class SetUp:
    """How many images, which network, how it is trained."""

    training: int
    network: NetworkConfig
    optimizer: OptimizerConfig
    results: str
    """Stem of the result files."""
    skip: int = 0
    """Images of each class passed over, of the training file and half as many of the test file."""
    retrained: int = 3
    """How many subsets are trained twice."""


NETWORK = NetworkConfig(
    model_channels=8,
    channel_mult=(1, 2, 4, 8),
    num_blocks=1,
    attn_resolutions=(8,),
    label_dropout=0.0,
)
OPTIMIZER = OptimizerConfig(
    steps=400,
    batch_size=16,
    learning_rate=3e-3,
    warmup_steps=20,
    tail=0.6,
    sigma_mean=0.4,
    sigma_std=1.6,
    ema_value=500.0,
    precision="bf16",
    channels_last=False,
)
SET_UPS = {
    "short": SetUp(500, NETWORK, OPTIMIZER, "lds_cifar2"),
    "trained": SetUp(
        200,
        replace(NETWORK, channel_mult=(1, 2, 4)),
        # At this size single precision is faster on a CPU than autocast.
        replace(OPTIMIZER, steps=1600, precision="no", channels_last=True),
        "lds_cifar2_trained",
    ),
    # Photographs that no choice was ever made on; half the steps, where the loss was nearly flat.
    "confirm": SetUp(
        200,
        replace(NETWORK, channel_mult=(1, 2, 4)),
        replace(OPTIMIZER, steps=800, precision="no", channels_last=True),
        "lds_cifar2_confirm",
        skip=100,
    ),
    # Others again, and so few that models of halves see each image 256 times, as in "trained".
    "fresh": SetUp(
        100,
        replace(NETWORK, channel_mult=(1, 2, 4)),
        replace(OPTIMIZER, steps=800, precision="no", channels_last=True),
        "lds_cifar2_fresh",
        skip=200,
        retrained=6,
    ),
}


def experiment(out: Path, set_up: SetUp, *, subsets: int = SUBSETS, seed: int = 0) -> LdsConfig:
    """Settings of the subset models, or of those trained once more with another seed."""
    return LdsConfig(
        data=TrainingImages(name=str(out / "cifar2.parquet"), rows=set_up.training),
        network=set_up.network,
        optimizer=set_up.optimizer,
        conditional=False,
        subsets=SubsetConfig(count=subsets, training_seeds=(seed,)),
        queries=LdsQueries(first_row=set_up.training, validation=VALIDATION, generated=GENERATED),
        losses=LossConfig(timesteps=20),
    )


def prepare(train: Path, test: Path, out: Path, set_up: SetUp) -> None:
    """Write training images, then held-out ones, of the two classes in turn, bytes as they were."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = out / "cifar2.parquet"
    if path.exists():
        return
    cells, labels = [], []
    for file, count, skip in (
        (train, set_up.training, set_up.skip),
        (test, VALIDATION, set_up.skip // 2),
    ):
        names = open_images(str(file)).class_names
        table = pq.read_table(file, columns=["image", "label"])
        numbers = table["label"].to_numpy()
        chosen = slice(skip, skip + count // 2)
        found = [np.flatnonzero(numbers == names.index(name))[chosen] for name in CLASSES]
        rows = np.stack(found, axis=1).ravel()
        cells += table["image"].take(pa.array(rows)).to_pylist()
        labels += [CLASSES[place % 2] for place in range(count)]
    out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": cells, "label": labels}), path)


def train_base(config: LdsConfig, folder: Path) -> None:
    """The attributed model, as ``train_models`` would train it, with a checkpoint at each quarter.

    Writes ``curve.json``: the mean loss on training and held-out images at the start and at each
    quarter.
    """
    if (folder / "finished.json").exists():
        return
    source = open_images(config.data.name)
    optimizer = config.optimizer
    images = torch.cat(
        [torch.as_tensor(x) for _, x, _ in source.batches(1024, range(config.data.rows or 0))]
    )
    torch.manual_seed(config.seed)
    kwargs = {
        "img_resolution": 32,
        "img_channels": 3,
        "label_dim": 0,
        "model_type": "SongUNet",
        "model_channels": config.network.model_channels,
        "channel_mult": list(config.network.channel_mult),
        "num_blocks": config.network.num_blocks,
        "attn_resolutions": list(config.network.attn_resolutions),
    }
    specification = {"preconditioner": "EDMPrecond", "kwargs": kwargs}
    network = build_network(specification)
    accelerator: Accelerator = LoneAccelerator(cpu=True, mixed_precision=optimizer.precision)
    trainer = DiffusionTrainer(network, optimizer, accelerator, config.seed, network.sigma_data)
    curve = [_look(config, trainer, specification, folder / "step-0")]
    stops = [round(share * optimizer.steps) for share in QUARTERS]
    started = time.process_time()
    while trainer.step < optimizer.steps:
        rows = batch_indices(config.seed, len(images), optimizer.batch_size, trainer.step)
        trainer.train_step(images_to_model(images[rows]), None)
        if trainer.step in stops[:-1]:
            name = f"quarter-{1 + stops.index(trainer.step)}"
            curve.append(_look(config, trainer, specification, folder / name))
    curve.append(_look(config, trainer, specification, folder / "checkpoint"))
    write_json(folder / "curve.json", curve)
    write_json(folder / "finished.json", {"cpu_seconds": round(time.process_time() - started)})


def _look(config: LdsConfig, trainer: DiffusionTrainer, specification: dict, folder: Path) -> dict:
    network = build_network(specification)
    trainer.ema.copy_to(network)
    save_denoiser(folder, network, class_names=(), training_info={"steps": trainer.step})
    denoiser = load_denoiser(folder, device="cpu")
    losses = {}
    for name, first in (("training", 0), ("validation", config.data.rows or 0)):
        images = open_queries(config.data.name, denoiser, first_row=first, rows=CURVE)
        losses[name] = round(float(query_losses(denoiser, images, config.losses).mean()), 5)
    return {"step": trainer.step, **losses}


def train(out: Path, set_up: SetUp, *, base_only: bool) -> None:
    """All models, and what each loses on each query."""
    config = experiment(out, set_up)
    train_base(config, out / "models" / "base")
    write_queries(config, out / "queries", out / "models", "cpu")
    if base_only:
        return
    state = PartialState(cpu=True)
    kinds = {kind: out / "queries" / f"{kind}.parquet" for kind in ("validation", "generated")}
    again = experiment(out, set_up, subsets=set_up.retrained, seed=1)
    for stage in (config, again):
        train_models(stage, out / "models", state, "cpu")
        loss_tables(stage, out / "losses", out / "models", kinds, state, "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description="LDS on CIFAR-2; see PROTOCOL.md")
    parser.add_argument("stage", choices=("base", "train", "features", "judge"))
    parser.add_argument("--train", type=Path, help="CIFAR-10 training images, Parquet")
    parser.add_argument("--test", type=Path, help="CIFAR-10 test images, Parquet")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--set-up", choices=tuple(SET_UPS), default="short")
    parser.add_argument("--only", nargs="*", help="features: the sets to compute")
    arguments = parser.parse_args()
    set_up = SET_UPS[arguments.set_up]
    torch.set_num_threads(1)
    if arguments.stage in ("base", "train"):
        if arguments.train:
            prepare(arguments.train, arguments.test, arguments.out, set_up)
        train(arguments.out, set_up, base_only=arguments.stage == "base")
    elif arguments.stage == "features":
        config = experiment(arguments.out, set_up)
        print(json.dumps(write_features(config, arguments.out, arguments.only)))
    else:
        config = experiment(arguments.out, set_up)
        again = experiment(arguments.out, set_up, subsets=set_up.retrained, seed=1)
        judge(config, again, arguments.out, set_up.results)


if __name__ == "__main__":
    main()
