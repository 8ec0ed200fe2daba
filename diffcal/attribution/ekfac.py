"""Curvature of the loss by an eigenvalue-corrected Kronecker factorisation (EK-FAC).

For a parameter seen as a matrix ``[o, i]``, the Gauss-Newton matrix of the mean squared error is taken
to be diagonal in the basis ``Q_S ⊗ Q_A``: Q_S and Q_A are the eigenvectors of the second moments of the
output gradients and of the inputs over all positions, and the eigenvalues are the second moments of the
rotated per-sample gradients themselves. Influence is then a plain inner product of gradients that are
rotated and divided by ``sqrt(eigenvalue + damping)``, so that it fits sketches, stores and scores that
know nothing of it.

Source: George et al. 2018 (arXiv:1806.03884) for the correction, Mlodozeniec et al. 2024
(arXiv:2410.13850) for the Gauss-Newton matrix of diffusion models.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from diffcal.attribution.parameters import Layout
from diffcal.attribution.projection import Projector
from diffcal.config import check_choices
from diffcal.core.runs import write_atomic
from diffcal.errors import ArtifactError, ConfigError

__all__ = ["CurvatureConfig", "CurvedProjection", "Ekfac", "KroneckerBlock", "load_ekfac"]

FORMAT = "diffcal-ekfac/1"


@dataclass(frozen=True, kw_only=True)
class CurvatureConfig:
    """What gradients are divided by before they are projected."""

    kind: Literal["none", "ekfac"] = "none"
    images: int = 1000
    """Training images that the curvature is estimated from, spread evenly; all if there are fewer."""
    damping: float = 0.1
    """Added to the eigenvalues, in units of each parameter's mean eigenvalue."""
    max_side: int = 2304
    """Longer sides of a weight matrix keep their own basis: a rotation takes the square of a side in
    memory, and twice while it is fitted."""
    seed: int = 0
    """Of the noise and of the random signs that stand for the targets which the model would draw."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("images", "max_side"):
            if getattr(self, name) < 1:
                raise ConfigError(f"curvature.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.damping < float("inf"):
            raise ConfigError(f"curvature.damping must be positive and finite, got {self.damping}")


@dataclass(frozen=True)
class KroneckerBlock:
    """Curvature of one parameter as a matrix; a basis that is None is that of the entries."""

    left: Float[Tensor, "o o"] | None
    """Columns are eigenvectors on the side of the output."""
    right: Float[Tensor, "i i"] | None
    eigenvalues: Float[Tensor, "o i"]

    def rotated(self, gradient: Float[Tensor, "b o i"]) -> Float[Tensor, "b o i"]:
        """``Q_Sᵀ G Q_A`` of every row."""
        found = gradient
        if self.left is not None:
            found = self.left.mT.to(found) @ found
        return found if self.right is None else found @ self.right.to(found)


@dataclass(frozen=True)
class Ekfac:
    """Curvature of every parameter, in the order of the gradient's layout."""

    blocks: Mapping[str, KroneckerBlock]

    def save(self, path: Path | str, facts: Mapping[str, Any] | None = None) -> None:
        """Write it as safetensors, with ``facts`` (plain values) that say what it is of."""
        tensors = {}
        for name, block in self.blocks.items():
            for part in ("left", "right", "eigenvalues"):
                tensor = getattr(block, part)
                if tensor is not None:
                    tensors[f"{name}|{part}"] = tensor.cpu().contiguous()
        metadata = {FORMAT: json.dumps(dict(facts or {}), sort_keys=True)}
        data = save(tensors, metadata)
        write_atomic(Path(path), lambda file: file.write(data))


def load_ekfac(
    path: Path | str, facts: Mapping[str, Any] | None = None, device: torch.device | str = "cpu"
) -> Ekfac:
    """The curvature that :meth:`Ekfac.save` wrote.

    Args:
        facts: Refuse a file of others.

    Raises:
        ArtifactError: not such a file, damaged, or of something else.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                name, _, part = key.rpartition("|")
                parts.setdefault(name, {})[part] = file.get_tensor(key).to(device)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"curvature '{path}' cannot be read: {error}") from error
    if FORMAT not in metadata or any("eigenvalues" not in part for part in parts.values()):
        raise ArtifactError(f"'{path}' is not a saved curvature")
    if facts is not None and json.loads(metadata[FORMAT]) != dict(facts):
        raise ArtifactError(f"'{path}' is the curvature of another model, other images or settings")
    return Ekfac(
        {
            name: KroneckerBlock(part.get("left"), part.get("right"), part["eigenvalues"])
            for name, part in parts.items()
        }
    )


class CurvedProjection(Projector):
    """Rotate and scale each parameter's gradient by the curvature, then project it.

    Inner products of what comes out are ``g (H + λ)⁻¹ g'`` up to the error of the second step.

    Args:
        second: Projects the scaled gradient, whose coordinates are those of ``layout``.
        damping: See :class:`CurvatureConfig`.

    Raises:
        ConfigError: the curvature is of other parameters.
    """

    def __init__(self, second: Projector, curvature: Ekfac, layout: Layout, damping: float) -> None:
        self.second = second
        self.num_params, self.dim = second.num_params, second.dim
        self._blocks: dict[int, tuple[KroneckerBlock, Tensor]] = {}
        for name, shape, offset in layout:
            block = curvature.blocks.get(name)
            if block is None or tuple(block.eigenvalues.shape) != matrix_shape(shape):
                raise ConfigError(f"the curvature has no block for '{name}' of shape {shape}")
            values = block.eigenvalues.double()
            damped = values + damping * values.mean()
            # A parameter without influence has no curvature, and its gradients are zero.
            scale = torch.where(damped > 0, damped.rsqrt(), 0)
            self._blocks[offset] = (block, scale)

    def _add(self, out: Tensor, block: Tensor, offset: int) -> None:
        found = self._blocks.get(offset)
        if found is None or block.shape[1] != found[1].numel():
            raise ConfigError("a curvature takes the gradient of a whole parameter at once")
        curvature, scale = found
        if scale.device != out.device or scale.dtype != out.dtype:
            curvature, scale = _moved(curvature, out), scale.to(out)
            self._blocks[offset] = (curvature, scale)
        rotated = curvature.rotated(block.unflatten(1, tuple(scale.shape))) * scale
        self.second.accumulate(out, rotated.flatten(1), offset)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """A parameter as a matrix: its first axis by all others; a vector is a single row."""
    if len(shape) < 2:
        return 1, prod(shape)
    return shape[0], prod(shape[1:])


def _moved(block: KroneckerBlock, like: Tensor) -> KroneckerBlock:
    left, right = (None if basis is None else basis.to(like) for basis in (block.left, block.right))
    return KroneckerBlock(left, right, block.eigenvalues)
