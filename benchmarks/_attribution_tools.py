"""One attribution problem, solved by diffcal, traker and dattri: features and scores, end to end.

Every tool gets the same network, images, timesteps, noise and damping, and every one takes the
gradient of the same number: the mean over timesteps of a functional of the network's output. Each
runner returns scores ``[queries, training rows]`` and the CPU seconds of its two halves.
"""

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffcal.attribution.featurise import FeatureConfig, Featuriser, GradientMethod
from diffcal.attribution.functionals import Outputs, resolve_functional
from diffcal.attribution.kernel import fit_kernel
from diffcal.attribution.noise import attribution_noise
from diffcal.attribution.presets import PRESETS
from diffcal.attribution.projection import ProjectionConfig
from diffcal.attribution.score_config import ScoreConfig
from diffcal.attribution.scores import kernel_scores
from diffcal.attribution.timesteps import NoiseLevels
from diffcal.config import config_from_dict
from diffcal.diffusion.diffusers_unet import UNet2DDenoiser


@dataclass(frozen=True)
class Problem:
    """What is attributed, and the settings that all tools share."""

    denoiser: UNet2DDenoiser
    train: Tensor
    queries: Tensor
    timesteps: int
    functional: str
    rho: float
    """Damping over the mean squared norm of a training feature."""
    half: UNet2DDenoiser | None = None
    """The same network in bfloat16 autocast, for the tools that are asked for it."""

    @property
    def network(self) -> nn.Module:
        """The network itself, for tools that know no denoisers."""
        return self.denoiser.module

    @property
    def num_params(self) -> int:
        """Its parameters."""
        return sum(p.numel() for p in self.network.parameters())

    def config(self, projection: ProjectionConfig, normalise: bool = False) -> FeatureConfig:
        """diffcal's settings for it."""
        return FeatureConfig(
            functional=self.functional,
            combine="mean",
            timesteps=self.timesteps,
            normalise=normalise,
            projection=projection,
        )


@dataclass(frozen=True)
class Solved:
    """Scores and what they cost."""

    scores: Tensor
    feature_seconds: float
    score_seconds: float


# The yardstick


def whole_features(problem: Problem, images: Tensor, normalise: bool = False) -> Tensor:
    """Unprojected features by ``torch.func``, float32 ``[n, parameters]``, few rows at a time."""
    config = problem.config(ProjectionConfig(kind="identity"), normalise)
    featuriser = Featuriser(problem.denoiser, config, method="vmap")
    pieces = zip(range(0, len(images), 4), images.split(4), strict=True)
    return torch.cat([featuriser(x, range(at, at + len(x))).vectors for at, x in pieces])


def exact_scores(problem: Problem, train: Tensor, queries: Tensor) -> Tensor:
    """``ΨΦᵀ (ΦΦᵀ + λI)⁻¹`` of whole features, in float64: equal to ``Ψ (ΦᵀΦ + λI)⁻¹ Φᵀ``."""
    phi, psi = train.double(), queries.double()
    gram = phi @ phi.mT
    damping = problem.rho * gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + damping * eye, (psi @ phi.mT).mT).mT


def all_output_rows(problem: Problem, images: Tensor) -> Tensor:
    """What the preset ``das`` compares, written out: unprojected, ``[n, timesteps x entries]``.

    The kernel of all outputs for the weights of the output convolution is, up to a constant, the inner
    product of the patches that enter it, with a one beside each patch for the bias.
    """
    featuriser = Featuriser(problem.denoiser, default_features(problem, 4096, seed=0))
    layer, levels = problem.network.conv_out, featuriser.levels
    assert isinstance(layer, nn.Conv2d)
    entering: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, inputs, __: entering.append(inputs[0]))
    with torch.no_grad():
        for x_t, t in noisy(problem, images, levels):
            problem.network(x_t, t.expand(len(x_t)))
    hook.remove()
    parts = []
    for x in entering:
        patches = nn.functional.unfold(x, layer.kernel_size, padding=layer.padding)
        whole = torch.cat([patches, torch.ones_like(patches[:, :1])], dim=1).flatten(1)
        parts.append(whole / whole.norm(dim=1, keepdim=True))
    return torch.cat(parts, dim=1)


def noisy(problem: Problem, images: Tensor, levels: NoiseLevels) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image under the shared noise of each timestep, scaled as the network takes it."""
    for t, sigma in zip(levels.timesteps, levels.sigmas.float(), strict=True):
        noise = attribution_noise("shared", 0, t, [0], tuple(images.shape[1:]))
        yield (images + sigma * noise) / (1 + sigma.square()).sqrt(), torch.tensor(t)


def default_scores(problem: Problem, train: Tensor, queries: Tensor) -> Tensor:
    """Scores of the preset ``das`` from whole rows, in float64."""
    phi, psi = train.double(), queries.double()
    gram = phi @ phi.mT
    settings = PRESETS["das"]["scores"]
    assert (settings["damping_rule"], settings["readout"]) == ("rest", "square")
    rest = gram.trace() - torch.linalg.eigvalsh(gram)[-1]
    damped = gram + settings["damping"] * rest / len(gram) * torch.eye(len(gram)).double()
    return torch.linalg.solve(damped, (psi @ phi.mT).mT).mT.square()


def default_features(problem: Problem, dim: int, seed: int) -> FeatureConfig:
    """Settings of the preset ``das`` with the problem's timesteps and this projection."""
    settings = PRESETS["das"]["features"]
    projection = {**settings["projection"], "dim": dim, "seed": seed}
    return config_from_dict(
        FeatureConfig, {**settings, "timesteps": problem.timesteps, "projection": projection}
    )


# diffcal


def run_default(
    problem: Problem, dim: int, seed: int, *, half: bool = False, batch_rows: int = 160
) -> Solved:
    """The preset ``das`` as it comes: rows of all outputs, its own damping, squared."""
    denoiser = problem.half if half else problem.denoiser
    assert denoiser is not None
    settings = config_from_dict(ScoreConfig, PRESETS["das"]["scores"])
    begin = time.process_time()
    featuriser = Featuriser(
        denoiser, default_features(problem, dim, seed), batch_rows=batch_rows, unknown="refuse"
    )
    rows = featuriser(problem.train, range(len(problem.train))).vectors
    asked = featuriser(problem.queries, range(len(problem.queries)), role="query").vectors
    middle = time.process_time()
    kernel = fit_kernel(rows)
    damping = settings.absolute_damping(kernel)
    scores = kernel_scores(kernel, asked, rows, damping, readout=settings.readout)
    return Solved(scores, middle - begin, time.process_time() - middle)


def run_diffcal(
    problem: Problem,
    projection: ProjectionConfig,
    *,
    method: GradientMethod = "fused",
    normalise: bool = False,
    readout: str = "signed",
    half: bool = False,
    batch_rows: int = 160,
) -> Solved:
    """The Python interface: a featuriser, a kernel, scores.

    ``batch_rows``: (image, timestep) pairs at once, by default as many as the peers take.
    """
    denoiser = problem.half if half else problem.denoiser
    assert denoiser is not None
    begin = time.process_time()
    featuriser = Featuriser(
        denoiser,
        problem.config(projection, normalise),
        method=method,
        batch_rows=batch_rows,
        unknown="refuse",
    )
    rows = featuriser(problem.train, range(len(problem.train))).vectors
    asked = featuriser(problem.queries, range(len(problem.queries)), role="query").vectors
    middle = time.process_time()
    kernel = fit_kernel(rows)
    damping = kernel.damping(problem.rho)
    scores = kernel_scores(kernel, asked, rows, damping, readout=readout)
    return Solved(scores, middle - begin, time.process_time() - middle)


# What the peers are given


def mean_output(problem: Problem) -> Callable[[Any, Tensor], Tensor]:
    """From parameters (and buffers) and one image to the number whose gradient is taken.

    All timesteps go through the network at once and share one backward pass, the cheapest way that
    the peers' interfaces allow: one projection for each image instead of one for each timestep.
    """
    levels = Featuriser(problem.denoiser, problem.config(ProjectionConfig(dim=64))).levels
    sigma = levels.sigmas.float().view(-1, 1, 1, 1)
    shape = tuple(problem.train.shape[1:])
    noise = torch.cat([attribution_noise("shared", 0, t, [0], shape) for t in levels.timesteps])
    scale, offset = 1 / (1 + sigma.square()).sqrt(), sigma * noise
    times, weight = torch.tensor(levels.timesteps), levels.weights.float()
    functional, network = resolve_functional(problem.functional), problem.network

    def value(parameters: Any, image: Tensor) -> Tensor:
        x_t = scale * (image + offset)
        output = torch.func.functional_call(network, parameters, (x_t, times)).sample
        return functional(Outputs(output, noise, weight)).mean()

    return value


def batched_attention() -> AbstractContextManager[None]:
    """Torch's fused attention has no batching rule and would be looped over: spare the peers that."""
    return sdpa_kernel(SDPBackend.MATH)


# traker


def run_traker(
    problem: Problem, dim: int, mean_square: float, batch: int, seed: int, block: int | None = None
) -> Solved:
    """``TRAKer`` with a model output of our own, float32, on the CPU, where it takes its block-wise
    normal projection (100 columns at a time, drawn again for every batch).

    Args:
        mean_square: Of the whole features' norms, for the damping.
        block: Give it its own projector with blocks of so many columns: where one block holds all, the
            matrix is drawn once and kept (by a subclass, as its own forgets to draw what it has freed
            between features and scores).
    """
    import trak
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, ProjectionType

    value = mean_output(problem)

    class Keeping(BasicProjector):
        def free_memory(self) -> None: ...

    class MeanOutput(AbstractModelOutput):
        def __init__(self) -> None: ...

        def get_output(self, model, weights, buffers, image):
            return value((weights, buffers), image)

        def get_out_to_loss_grad(self, model, weights, buffers, batch):
            return torch.ones(len(batch[0]), 1)

    # Its features are divided by sqrt(parameters) and its matrix by nothing.
    damping = problem.rho * mean_square * dim / problem.num_params
    weights = problem.network.state_dict()
    with tempfile.TemporaryDirectory() as folder, batched_attention():
        begin = time.process_time()
        projector = None
        if block is not None:
            projector = Keeping(
                grad_dim=problem.num_params,
                proj_dim=dim,
                seed=seed,
                proj_type=ProjectionType.normal,
                device=torch.device("cpu"),
                block_size=block,
            )
        tool = trak.TRAKer(
            model=problem.network,
            task=MeanOutput(),
            train_set_size=len(problem.train),
            save_dir=folder,
            device="cpu",
            projector=projector,
            projector_seed=seed,
            proj_dim=dim,
            use_half_precision=False,
            lambda_reg=damping,
            logging_level=logging.ERROR,
        )
        tool.load_checkpoint(weights, model_id=0)
        for images in problem.train.split(batch):
            tool.featurize(batch=[images], num_samples=len(images))
        middle = time.process_time()
        tool.finalize_features()
        finalised = time.process_time()
        tool.start_scoring_checkpoint("queries", weights, 0, num_targets=len(problem.queries))
        for images in problem.queries.split(batch):
            tool.score(batch=[images], num_samples=len(images))
        asked = time.process_time()
        scores = torch.tensor(tool.finalize_scores(exp_name="queries")).mT
        end = time.process_time()
    return Solved(scores, middle - begin + asked - finalised, finalised - middle + end - asked)


# dattri


def run_dattri(
    problem: Problem, dim: int, mean_square: float, kind: str, batch: int, seed: int
) -> Solved:
    """``TRAKAttributor`` with a projection that dattri offers on the CPU.

    Its probability function, which only scales scores, is a constant that costs nothing.
    """
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    value = mean_output(problem)

    def output(parameters, data):
        return value(parameters, data[0])

    # Its features are divided by sqrt(parameters); a mask keeps dim of the parameters, unscaled.
    damping = problem.rho * mean_square / problem.num_params
    if kind == "random_mask":
        damping *= dim / problem.num_params
    loaders = [
        DataLoader(TensorDataset(images), batch_size=batch, shuffle=False)
        for images in (problem.train, problem.queries)
    ]
    with batched_attention():
        begin = time.process_time()
        task = AttributionTask(output, problem.network, problem.network.state_dict())
        tool = TRAKAttributor(
            task,
            correct_probability_func=lambda parameters, data: torch.zeros(()),
            projector_kwargs={
                "proj_dim": dim,
                "proj_max_batch_size": 32,
                "proj_seed": seed,
                "proj_type": kind,
                "device": "cpu",
            },
            device="cpu",
            regularization=damping,
        )
        tool.cache(loaders[0])
        # Features and solve are one call; what the solve takes is measured by itself.
        scores = tool.attribute(loaders[1]).mT.detach()
        total = time.process_time() - begin
    solve = _solve_seconds(len(problem.train), dim)
    return Solved(scores, total - solve, solve)


def _solve_seconds(rows: int, dim: int) -> float:
    features = torch.randn(rows, dim) / math.sqrt(dim)
    begin = time.process_time()
    torch.linalg.solve(features.mT @ features + torch.eye(dim), features.mT)
    return time.process_time() - begin


def drawing_seconds(parameters: int, dim: int) -> float:
    """CPU seconds to draw ``parameters`` x ``dim`` normal numbers as the peers do, from 100 columns."""
    block = torch.empty(parameters, min(100, dim))
    generator = torch.Generator().manual_seed(0)
    block.normal_(generator=generator)  # the pages of a fresh array cost more than the drawing
    begin = time.process_time()
    block.normal_(generator=generator)
    return (time.process_time() - begin) * dim / block.shape[1]


def correlations(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Pearson and rank correlation of each query's scores with the exact ones: mean and lowest."""
    from diffcal.attribution.lds import average_ranks

    def each(a: Tensor, b: Tensor) -> Tensor:
        a, b = (t - t.mean(dim=1, keepdim=True) for t in (a.double(), b.double()))
        return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))

    pearson = each(found, wanted)
    ranks = each(average_ranks(found), average_ranks(wanted))
    return {
        "pearson_mean": float(pearson.mean()),
        "pearson_lowest": float(pearson.min()),
        "spearman_mean": float(ranks.mean()),
        "spearman_lowest": float(ranks.min()),
    }


def installed(names: Sequence[str]) -> dict[str, str | None]:
    """Why each of these packages cannot be imported, or None."""
    from importlib import import_module

    missing: dict[str, str | None] = {}
    for name in names:
        try:
            import_module(name)
            missing[name] = None
        except ImportError as error:
            missing[name] = str(error)
    return missing
