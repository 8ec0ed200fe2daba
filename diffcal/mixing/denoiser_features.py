"""Image features from the denoiser itself: what its layers hold while it looks at a noised image."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from diffcal.core.devices import module_device
from diffcal.core.rng import item_normal
from diffcal.core.runs import fingerprint
from diffcal.core.tensors import append_dims, require_finite
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ConfigError

__all__ = ["DenoiserFeatures", "uniform_condition"]

Pooling = Literal["mean", "mean_std", "grid2"]
STREAM = "feature-noise"


class DenoiserFeatures:
    """Pooled outputs of chosen layers at chosen noise levels, concatenated.

    Every image meets the same noise, drawn from the seed, so features depend on the image alone.

    Args:
        denoiser: Any denoiser; its ``feature_modules`` name the layers.
        sigmas: Noise levels, in units where the data have standard deviation ``sigma_data``. Low ones
            show detail, middling ones the kind of object.
        modules: Layer names; the denoiser's first ``depth`` feature modules if None.
        depth: See ``modules``.
        draws: Noise draws averaged at each level.
        pool: ``mean`` over space; ``mean_std`` adds the standard deviation over space; ``grid2`` the
            means of the four quarters.
        seed: Of the noise.

    Raises:
        ConfigError: unknown layer, noise level that is not positive, or pooling.

    Source: Baranchuk et al. 2022 (arXiv:2112.03126); Xiang et al. 2023 (arXiv:2303.09769).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        sigmas: Sequence[float] = (0.1, 0.4),
        modules: Sequence[str] | None = None,
        depth: int = 3,
        draws: int = 1,
        pool: Pooling = "mean_std",
        seed: int = 0,
    ) -> None:
        if not sigmas or min(sigmas) <= 0:
            raise ConfigError(f"sigmas must be positive noise levels, got {list(sigmas)}")
        if pool not in ("mean", "mean_std", "grid2"):
            raise ConfigError(f"pool must be mean, mean_std or grid2, got '{pool}'")
        if draws < 1 or depth < 1:
            raise ConfigError("draws and depth must be at least 1")
        names = tuple(modules or denoiser.feature_modules[:depth])
        if not names:
            raise ConfigError("the denoiser names no layers to read features from; give modules")
        for name in names:
            try:
                denoiser.module.get_submodule(name)
            except AttributeError:
                known = ", ".join(denoiser.feature_modules)
                raise ConfigError(f"the network has no layer '{name}'; try: {known}") from None
        self.denoiser, self.sigmas, self.modules = denoiser, tuple(sigmas), names
        self.draws, self.seed = draws, seed
        self.pool: Pooling = pool
        self.name = "denoiser"
        self._dim: int | None = None

    @property
    def version(self) -> str:
        """SHA-256 of network and settings."""
        return fingerprint(
            [
                self.denoiser.fingerprint,
                list(self.sigmas),
                list(self.modules),
                self.draws,
                self.pool,
                self.seed,
            ]
        )

    @property
    def dim(self) -> int:
        """Length of a feature vector; found by running the network once."""
        if self._dim is None:
            _, height, width = self._image_shape()
            blank = torch.zeros(1, height, width, self._image_shape()[0], dtype=torch.uint8)
            self._dim = self.encode(blank).shape[1]
        return self._dim

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b d"]:
        """Float32 features on the CPU.

        Raises:
            DataError: images of another size than the denoiser's.
            NumericalError: NaN or infinity from the network.
        """
        device = module_device(self.denoiser.module)
        x = self.denoiser.encode(images.to(device))
        condition = uniform_condition(self.denoiser, len(x))
        levels = []
        for level, sigma in enumerate(self.sigmas):
            total: Tensor | None = None
            for draw in range(self.draws):
                index = level * self.draws + draw
                noise = item_normal(self.seed, STREAM, index, self.denoiser.sample_shape).to(device)
                sigmas = torch.full((len(x),), sigma, device=device)
                noisy = x + append_dims(sigmas, x) * noise
                pooled = self._pooled_outputs(noisy, sigmas, condition)
                total = pooled if total is None else total + pooled
            assert total is not None
            levels.append(total / self.draws)
        return require_finite(torch.cat(levels, dim=1).float().cpu(), "denoiser features")

    def _pooled_outputs(self, noisy: Tensor, sigmas: Tensor, condition: Tensor | None) -> Tensor:
        caught: dict[str, Tensor] = {}

        def hook(name: str):
            def keep(module: Any, inputs: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple | list) else output
                caught[name] = _pool(first.float(), len(noisy), self.pool)

            return keep

        module = self.denoiser.module
        handles = [
            module.get_submodule(name).register_forward_hook(hook(name)) for name in self.modules
        ]
        try:
            self.denoiser(noisy, sigmas, condition)
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in self.modules if name not in caught]
        if missing:
            raise ConfigError(f"layer '{missing[0]}' did not run, so it gives no features")
        return torch.cat([caught[name] for name in self.modules], dim=1)

    def _image_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the images; latent models decode to find out."""
        shape = self.denoiser.sample_shape
        blank = torch.zeros(1, *shape, device=module_device(self.denoiser.module))
        _, height, width, channels = self.denoiser.decode(blank).shape
        return channels, height, width


def uniform_condition(denoiser: Denoiser, batch_size: int) -> Tensor | None:
    """Equal weights over all classes or prompts; None for an unconditional network."""
    if denoiser.condition_kind == "none":
        return None
    classes = denoiser.num_classes
    return denoiser.condition(torch.full((batch_size, classes), 1 / classes))


def _pool(output: Tensor, batch: int, pool: Pooling) -> Tensor:
    """Features ``[b, d]`` of maps ``[b, c, h, w]`` or tokens ``[b, s, c]``."""
    if output.shape[0] != batch:  # guidance inside the module may double the batch
        output = output[-batch:]
    if output.ndim == 3:
        maps = output.transpose(1, 2)
        side = round(maps.shape[2] ** 0.5)
        output = maps.unflatten(2, (side, side)) if side**2 == maps.shape[2] else maps.unsqueeze(-1)
    if output.ndim == 2:
        return output
    if pool == "grid2":
        return F.adaptive_avg_pool2d(output, 2).flatten(1)
    mean = output.mean(dim=(2, 3))
    if pool == "mean":
        return mean
    return torch.cat([mean, output.std(dim=(2, 3), correction=0)], dim=1)
