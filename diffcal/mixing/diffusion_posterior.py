"""Class posterior from the diffusion model: the class under which an image is denoised best."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from diffcal.core.devices import module_device
from diffcal.core.rng import item_normal
from diffcal.core.runs import fingerprint
from diffcal.core.tensors import append_dims, require_finite
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ConfigError, DataError
from diffcal.mixing.annotator_base import Annotator, target_matrix
from diffcal.mixing.prototypes import FeatureBatches
from diffcal.mixing.temperature import fit_temperature, mean_log_loss, smoothed_targets

__all__ = ["DenoisingErrors", "DiffusionPosterior", "select_levels"]

STREAM = "denoising-error-noise"


class DenoisingErrors:
    """Squared denoising errors of each image under each class, at a few noise levels.

    The features are ``[b, s * k]``: for level s, the errors of the k classes, averaged over pixels and
    draws and multiplied by ``(sigma² + sigma_data²) / (sigma · sigma_data)²``, in which all levels
    count alike. All classes and all images meet the same noise; draws come in pairs of opposite
    sign, whose odd parts cancel.

    Args:
        denoiser: A class- or prompt-conditional denoiser.
        sigmas: Noise levels. Those about ``sigma_data`` tell classes apart best.
        draws: Noise draws at each level; an even number is used in opposite pairs.
        seed: Of the noise.
        rows: Largest number of rows in one network call.

    Raises:
        ConfigError: unconditional denoiser, noise levels that are not positive, counts below 1.

    Source: Li et al. 2023, Diffusion Classifier (arXiv:2303.16203), section 3.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        sigmas: Sequence[float] = (0.3, 0.6, 1.2, 2.4),
        draws: int = 2,
        seed: int = 0,
        rows: int = 512,
    ) -> None:
        if denoiser.condition_kind == "none":
            raise ConfigError("a diffusion posterior needs a class-conditional denoiser")
        if not sigmas or min(sigmas) <= 0:
            raise ConfigError(f"sigmas must be positive noise levels, got {list(sigmas)}")
        if draws < 1 or rows < 1:
            raise ConfigError("draws and rows must be at least 1")
        self.denoiser, self.sigmas, self.draws = denoiser, tuple(sigmas), draws
        self.seed, self.rows = seed, rows
        self.name = "denoising_errors"
        self.dim = len(self.sigmas) * denoiser.num_classes

    @property
    def version(self) -> str:
        """SHA-256 of network and settings."""
        return fingerprint(
            [self.denoiser.fingerprint, list(self.sigmas), self.draws, self.seed, "errors/1"]
        )

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b d"]:
        """Float32 errors on the CPU, level by level, within a level class by class.

        Raises:
            DataError: images of another size than the denoiser's.
            NumericalError: NaN or infinity from the network.
        """
        device = module_device(self.denoiser.module)
        x = self.denoiser.encode(images.to(device))
        errors = [
            self._class_errors(x, level, sigma, device) for level, sigma in enumerate(self.sigmas)
        ]
        return require_finite(torch.cat(errors, dim=1).float().cpu(), "denoising errors")

    def _class_errors(self, x: Tensor, level: int, sigma: float, device: torch.device) -> Tensor:
        classes = self.denoiser.num_classes
        per_call = max(self.rows // classes, 1)
        weights = torch.eye(classes)
        scale = (sigma**2 + self.denoiser.sigma_data**2) / (sigma * self.denoiser.sigma_data) ** 2
        parts = []
        for piece in x.split(per_call):
            clean = piece.repeat_interleave(classes, dim=0)
            condition = self.denoiser.condition(weights.repeat(len(piece), 1))
            sigmas = torch.full((len(clean),), sigma, device=device)
            total = torch.zeros(len(clean), device=device)
            for draw in range(self.draws):
                noise = self._noise(level, draw).to(device)
                noisy = clean + append_dims(sigmas, clean) * noise
                error = self.denoiser(noisy, sigmas, condition) - clean
                total += error.square().mean(dim=(1, 2, 3))
            parts.append((total * (scale / self.draws)).reshape(len(piece), classes))
        return torch.cat(parts)

    def _noise(self, level: int, draw: int) -> Tensor:
        paired = self.draws % 2 == 0
        index = level * self.draws + (draw // 2 if paired else draw)
        noise = item_normal(self.seed, STREAM, index, self.denoiser.sample_shape)
        return -noise if paired and draw % 2 else noise


@dataclass(kw_only=True)
class DiffusionPosterior(Annotator):
    """``softmax((-Σ_s a_s e_sk + b_k) / T)`` over all classes from :class:`DenoisingErrors` features.

    The level weights ``a_s ≥ 0`` and class biases are fitted on real images by penalised maximum
    likelihood, the temperature on held-out ones. With one level the weight is all there is to fit.
    """

    name: ClassVar[str] = "diffusion_posterior"
    all_classes: ClassVar[bool] = True

    relative: bool = True
    """Divide an image's errors at a level by their mean over classes: busy images have larger errors,
    and larger differences, without being clearer."""
    penalty: float = 1e-4
    """L2 penalty of weights (in units of the errors' spread) and biases."""
    iterations: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty < 0 or self.iterations < 1:
            raise ConfigError("penalty must not be negative and iterations at least 1")

    def logits(self, features: Tensor) -> Tensor:
        """Calibrated float64 logits ``[b, k]``."""
        scores = self._scores(features, self.num_classes) / self._fitted("spread")
        logits = torch.einsum("bsk,s->bk", scores, self._fitted("weights")) + self._fitted("biases")
        return logits / self._fitted("temperature")

    def _annotate(self, features: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        levels = len(self._fitted("weights"))
        return self.logits(self._checked(features, levels * self.num_classes)).softmax(dim=1)

    def _scores(self, features: Tensor, num_classes: int) -> Tensor:
        """``[b, s, k]``: how much less the error is under a class than on average."""
        if features.shape[1] % num_classes:
            raise DataError(
                f"features of length {features.shape[1]} are not denoising errors of "
                f"{num_classes} classes: use the encoder 'denoising_errors'"
            )
        errors = features.double().unflatten(1, (-1, num_classes))
        mean = errors.mean(dim=2, keepdim=True)
        scores = mean - errors
        return scores / mean.clamp(min=1e-12) if self.relative else scores

    def _fit(self, train: FeatureBatches, held_out: FeatureBatches, num_classes: int) -> None:
        scores, labels = _gathered(self, train, num_classes)
        spread = scores.square().mean(dim=(0, 2)).sqrt().clamp(min=1e-12)[:, None]
        weights, biases = _fit_levels(scores / spread, labels, self.penalty, self.iterations)
        self.state |= {"weights": weights, "biases": biases, "spread": spread}
        self.state["temperature"] = torch.tensor(1.0, dtype=torch.float64)
        held, targets = _gathered(self, held_out, num_classes)
        logits = torch.einsum("bsk,s->bk", held / spread, weights) + biases
        temperature = fit_temperature(logits, smoothed_targets(targets))
        self.state["temperature"] = torch.tensor(temperature, dtype=torch.float64)
        hits = logits.argmax(dim=1) == targets.argmax(dim=1)
        self.report = {
            "temperature": temperature,
            "held_out_log_loss": mean_log_loss(logits / temperature, targets),
            "held_out_accuracy": float(hits.double().mean()),
        }


def select_levels(
    features: Float[Tensor, "n d"], targets: Tensor, num_classes: int, count: int
) -> tuple[int, ...]:
    """Indices of the ``count`` noise levels that together predict best, chosen one after another.

    Args:
        features: Of :class:`DenoisingErrors` with all candidate levels, on images unseen in its
            training.
        targets: int64 ``[n]`` labels or float ``[n, k]`` shares.
        num_classes: Number of classes k.
        count: How many levels to keep.

    Raises:
        ConfigError: more levels asked for than there are.
    """
    annotator = DiffusionPosterior()
    scores = annotator._scores(features, num_classes)
    matrix = target_matrix(targets, num_classes)
    levels = scores.shape[1]
    if not 1 <= count <= levels:
        raise ConfigError(f"count must be between 1 and the {levels} levels, got {count}")
    scores = scores / scores.square().mean(dim=(0, 2)).sqrt().clamp(min=1e-12)[:, None]
    chosen: list[int] = []
    for _ in range(count):
        losses = {}
        for level in set(range(levels)) - set(chosen):
            part = scores[:, [*chosen, level]]
            weights, biases = _fit_levels(part, matrix, annotator.penalty, annotator.iterations)
            losses[level] = mean_log_loss(torch.einsum("bsk,s->bk", part, weights) + biases, matrix)
        chosen.append(min(losses, key=lambda level: losses[level]))
    return tuple(chosen)


def _gathered(
    annotator: DiffusionPosterior, batches: FeatureBatches, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Scores are s·k numbers an image, so all of them fit into memory."""
    scores, targets = [], []
    for features, labels in batches:
        scores.append(annotator._scores(features, num_classes))
        targets.append(target_matrix(labels, num_classes))
    if not scores:
        raise DataError("no real images were given to fit or calibrate the diffusion posterior")
    stacked = torch.cat(scores)
    if not bool(stacked.isfinite().all()):
        raise DataError("denoising errors hold NaN or infinite values")
    return stacked, torch.cat(targets)


def _fit_levels(
    scores: Tensor, targets: Tensor, penalty: float, iterations: int
) -> tuple[Tensor, Tensor]:
    """Non-negative level weights and class biases of least penalised log loss (a convex problem)."""
    levels, classes = scores.shape[1:]
    raw = torch.ones(levels, dtype=torch.float64, requires_grad=True)
    biases = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [raw, biases], max_iter=iterations, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        weights = F.softplus(raw)
        logits = torch.einsum("bsk,s->bk", scores, weights) + biases
        loss = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
        loss = loss + penalty / 2 * (weights.square().sum() + biases.square().sum())
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return F.softplus(raw).detach(), biases.detach()
