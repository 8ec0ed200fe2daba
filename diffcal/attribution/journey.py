"""Journey-TRAK's queries: the points that a sampler passed, noised again."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.attribution.featurise import Featuriser, average_over_timesteps
from diffcal.attribution.noise import attribution_noise
from diffcal.errors import ConfigError, DataError

__all__ = ["journey_features", "path_features", "renoised_path"]


def renoised_path(
    denoised: Float[Tensor, "steps q c h w"],
    alphas_cumprod: Float[Tensor, " steps"],
    noise: Float[Tensor, "steps q c h w"],
) -> Float[Tensor, "steps q c h w"]:
    """``x_t = sqrt(ā) x̂0 + sqrt(1 - ā) ε``: each step's predicted clean image back at its own level.

    Args:
        denoised: Predicted clean images of every sampling step, first step first.
        alphas_cumprod: ``ā`` of each step.
        noise: Fresh standard normal draws.

    Source: Georgiev et al. 2023 (arXiv:2312.06205), with the mean over all steps as D-TRAK uses it;
    meant for single steps, so that its use for final images is an adaptation.

    Raises:
        DataError: ``ā`` outside [0, 1].
    """
    if bool(((alphas_cumprod < 0) | (alphas_cumprod > 1)).any()):
        raise DataError("alphas_cumprod must lie between 0 and 1")
    level = alphas_cumprod.to(denoised).view(-1, 1, 1, 1, 1)
    return level.sqrt() * denoised + (1 - level).sqrt() * noise


def journey_features(steps: Sequence[Float[Tensor, "q k"]]) -> Float[Tensor, "q k"]:
    """Mean over the steps of the loss-gradient features of :func:`renoised_path`.

    Score them against ordinary TRAK features of the training set.

    Raises:
        DataError: no steps.
    """
    if not steps:
        raise DataError("a sampling path needs at least one step")
    total = steps[0].clone()
    for features in steps[1:]:
        total += features
    return total / len(steps)


def path_features(
    featuriser: Featuriser,
    denoised: Float[Tensor, "steps q c h w"],
    indices: Sequence[int],
    condition: Tensor | None = None,
) -> Float[Tensor, "q k"]:
    """Features of a sampling path: :func:`journey_features` of each step noised again to its own level.

    Args:
        featuriser: Made for the noise levels of the steps (``sigmas``), in their order; its functional,
            projection and normalisation are those of the training features.
        denoised: Predicted clean samples of every step.
        indices: Place of each query among all, for the noise.
        condition: Rows of the denoiser's conditions.

    Raises:
        DataError: another number of steps than noise levels.
        ConfigError: features whose timesteps cannot be told from those of the training features.
    """
    config, size = featuriser.config, featuriser.batch_rows
    if config.combine == "stack" or featuriser.objective.needs_signs:
        raise ConfigError(
            "a sampling path has noise levels of its own, and stacked timesteps or random signs only "
            "compare equal ones: choose combine = 'mean' and a functional such as 'loss'"
        )
    levels = featuriser.levels.timesteps
    if len(denoised) != len(levels):
        raise DataError(f"{len(denoised)} sampling steps for {len(levels)} noise levels")
    steps = []
    for at, clean in enumerate(denoised):
        noise = attribution_noise(
            config.noise,
            config.noise_seed,
            levels[at],
            indices,
            tuple(clean.shape[1:]),
            role="query",
            slot_batch=config.slot_batch,
        )
        parts = []
        for start in range(0, len(clean), size):
            rows = slice(start, start + size)
            found = featuriser.rows(
                clean[rows],
                noise[rows],
                torch.full((len(clean[rows]),), at),
                None if condition is None else condition[rows],
            )
            norms = found.norms[:, None] if config.normalise else None
            parts.append(average_over_timesteps(found.vectors[:, None], norms))
        steps.append(torch.cat(parts))
    return journey_features(steps)
