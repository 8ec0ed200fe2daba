"""Where an image lies between class prototypes: on the line through two, or on the simplex of all."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from diffcal.errors import DataError

__all__ = [
    "affine_weights",
    "isotropic_posterior",
    "pair_labels",
    "pair_projection",
    "simplex_weights",
    "simplex_weights_of_classes",
]

RELATIVE_JITTER = 1e-13
"""Added to the Gram matrix relative to its trace, so that equal prototypes do not break the solve."""
OPTIMALITY = 1e-11
"""A weight may enter while its gradient is below minus this, relative to the squared norms."""


def pair_projection(
    features: Float[Tensor, "b d"], first: Float[Tensor, "b d"], second: Float[Tensor, "b d"]
) -> Float[Tensor, " b"]:
    """Re-estimated ratio ``<v - μ2, δ> / ‖δ‖²`` with ``δ = μ1 - μ2``, float64, unbounded.
    It is 1 at the first prototype and 0 at the second.

    Source: Luo et al. 2025 (arXiv:2504.13548), calibrated reannotation.

    Raises:
        DataError: two prototypes coincide.
    """
    first, second = first.double(), second.double()
    delta = first - second
    norm = delta.square().sum(dim=1)
    if bool((norm == 0).any()):
        raise DataError("two classes have the same prototype, so nothing lies between them")
    return ((features.double() - second) * delta).sum(dim=1) / norm


def pair_labels(
    first_share: Float[Tensor, " b"], pairs: Int64[Tensor, "b 2"], num_classes: int
) -> Float[Tensor, "b k"]:
    """Soft labels with ``first_share`` on the first class of each pair and the rest on the second."""
    labels = torch.zeros(len(pairs), num_classes, dtype=first_share.dtype)
    labels.scatter_(1, pairs, torch.stack([first_share, 1 - first_share], dim=1))
    return labels


def isotropic_posterior(
    features: Float[Tensor, "b d"], prototypes: Float[Tensor, "k d"], variance: float
) -> Float[Tensor, "b k"]:
    """Class posterior if class k is Normal(μ_k, τ²I) and all are equally likely."""
    squared = torch.cdist(features.double(), prototypes.double()).square()
    return torch.softmax(-squared / (2 * variance), dim=1)


def affine_weights(
    features: Float[Tensor, "b d"], prototypes: Float[Tensor, "k d"]
) -> Float[Tensor, "b k"]:
    """Least-squares weights of the prototypes that sum to 1 (they may be negative), float64.

    For two prototypes the first weight is the λ̂ of :func:`pair_projection`.
    """
    gram, linear, _ = _quadratic(features, prototypes)
    classes = len(gram)
    system = torch.zeros(classes + 1, classes + 1, dtype=torch.float64)
    system[:classes, :classes] = gram
    system[:classes, classes] = system[classes, :classes] = 1
    right = torch.cat([linear, torch.ones(len(linear), 1, dtype=torch.float64)], dim=1)
    return torch.linalg.solve(system, right.T).T[:, :classes].contiguous()


def simplex_weights(
    features: Float[Tensor, "b d"], prototypes: Float[Tensor, "k d"]
) -> Float[Tensor, "b k"]:
    """Non-negative weights summing to 1 whose mix of prototypes is nearest to each feature, float64.

    Exact, by the active-set method of Lawson and Hanson with the sum as a constraint, all rows at
    once. Each solve is as large as the largest set of classes in use, not as the number of classes.
    """
    return simplex_weights_of_classes(
        features, prototypes, torch.ones(len(features), len(prototypes), dtype=torch.bool)
    )


def simplex_weights_of_classes(
    features: Float[Tensor, "b d"],
    prototypes: Float[Tensor, "k d"],
    allowed: Bool[Tensor, "b k"],
) -> Float[Tensor, "b k"]:
    """:func:`simplex_weights` where row i may only use the classes of ``allowed[i]``.

    Raises:
        DataError: a row allows no class.
    """
    if not bool(allowed.any(dim=1).all()):
        raise DataError("every image needs at least one class that it may be labelled with")
    gram, linear, scale = _quadratic(features, prototypes)
    rows, classes = linear.shape
    # Start at the nearest prototype: the best of the corners.
    corner = (gram.diagonal() / 2 - linear).masked_fill(~allowed, float("inf")).argmin(dim=1)
    weights = torch.zeros(rows, classes, dtype=torch.float64)
    weights[torch.arange(rows), corner] = 1
    used = weights > 0
    open_rows = torch.arange(rows)
    # Every round lowers the residual of each open row, so no set of classes can come twice.
    for _ in range(10 * classes + 10):
        gradient = weights[open_rows] @ gram - linear[open_rows]
        level = (gradient * weights[open_rows]).sum(dim=1, keepdim=True)
        blocked = used[open_rows] | ~allowed[open_rows]
        slack, entering = (gradient - level).masked_fill(blocked, float("inf")).min(dim=1)
        improving = slack < -OPTIMALITY * scale
        open_rows, entering = open_rows[improving], entering[improving]
        if len(open_rows) == 0:
            return weights
        used[open_rows, entering] = True
        _descend(gram, linear, weights, used, open_rows)
    return weights


def _descend(
    gram: Tensor, linear: Tensor, weights: Tensor, used: Tensor, open_rows: Tensor
) -> None:
    """Move each open row to the least squares of its classes, dropping those that would go below 0."""
    pending = open_rows
    while len(pending):
        wanted = _restricted_minimum(gram, linear[pending], used[pending])
        current = weights[pending]
        falling = used[pending] & (wanted < 0)
        ratio = torch.where(falling, current / (current - wanted), float("inf"))
        step, leaving = ratio.min(dim=1)
        blocked = falling.any(dim=1)
        moved = current + step.clamp(max=1)[:, None] * (wanted - current)
        weights[pending] = torch.where(blocked[:, None], moved, wanted).clamp(min=0)
        stuck = pending[blocked]
        weights[stuck, leaving[blocked]] = 0
        used[stuck, leaving[blocked]] = False
        pending = stuck


def _restricted_minimum(gram: Tensor, linear: Tensor, used: Tensor) -> Tensor:
    """Affine least squares over the used classes of each row, by one batched solve of padded systems."""
    rows, classes = linear.shape
    size = int(used.sum(dim=1).max())
    order = used.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]
    real = used.gather(1, order)
    system = torch.zeros(rows, size + 1, size + 1, dtype=torch.float64)
    both = real[:, :, None] & real[:, None, :]
    system[:, :size, :size] = torch.where(
        both, gram[order[:, :, None], order[:, None, :]], torch.eye(size, dtype=torch.float64)
    )
    system[:, :size, size] = system[:, size, :size] = real.double()
    right = torch.cat(
        [torch.where(real, linear.gather(1, order), 0.0), torch.ones(rows, 1, dtype=torch.float64)],
        dim=1,
    )
    solution = torch.linalg.solve(system, right)[:, :size]
    return torch.zeros(rows, classes, dtype=torch.float64).scatter_(
        1, order, torch.where(real, solution, 0.0)
    )


def _quadratic(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor, float]:
    """Gram matrix, linear term and scale of ``½‖v - Σ w_k μ_k‖²``, centred for accuracy."""
    prototypes = prototypes.double()
    centre = prototypes.mean(dim=0)  # moving all points changes nothing, as the weights sum to 1
    centred = prototypes - centre
    gram = centred @ centred.T
    scale = float(gram.diagonal().mean())
    gram = gram + RELATIVE_JITTER * max(scale, 1e-300) * torch.eye(len(gram), dtype=torch.float64)
    return gram, (features.double() - centre) @ centred.T, scale
