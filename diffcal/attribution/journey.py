"""Journey-TRAK's queries: the points that a sampler passed, noised again."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from diffcal.errors import DataError

__all__ = ["journey_features", "renoised_path"]


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
