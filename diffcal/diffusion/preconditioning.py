"""Preconditioned networks ``D(x; sigma, y) = c_skip x + c_out F(c_in x; c_noise, y)``.

Source: Karras et al. 2022 (arXiv:2206.00364), equation 7 and table 1. The order of operations in
the noise labels is kept as in the published models, whose outputs depend on it: a phase of 1000
moves visibly with the last bit of a float32 number.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcal.diffusion.edm_dhariwal_unet import DhariwalUNet
from diffcal.diffusion.edm_song_unet import SongUNet
from diffcal.errors import ConfigError

__all__ = [
    "EDMPrecond",
    "MODEL_TYPES",
    "PRECONDITIONERS",
    "Preconditioner",
    "VEPrecond",
    "VPPrecond",
    "iDDPMPrecond",
]

MODEL_TYPES: dict[str, type[nn.Module]] = {"SongUNet": SongUNet, "DhariwalUNet": DhariwalUNet}


class Preconditioner(nn.Module):
    """What the four preconditioners share: types, labels, and the sum of skip and network.

    Args:
        img_resolution: Height and width of the images.
        img_channels: Channels of the images.
        label_dim: Length of class vectors; 0: unconditional.
        use_fp16: Run the image path in float16 on a GPU (no effect on a CPU).
        model_type: ``SongUNet`` or ``DhariwalUNet``.
        model_kwargs: Further arguments of the raw network.
    """

    sigma_min: float
    """Smallest noise level that the network is meant for."""
    sigma_max: float
    sigma_data: float = 0.5
    """Standard deviation of the data that the network is meant for."""
    config: dict[str, Any]
    """``{"preconditioner": ..., "kwargs": ...}``, set by ``build_network``."""
    outputs_per_channel = 1

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        use_fp16: bool,
        model_type: str,
        **model_kwargs: Any,
    ) -> None:
        super().__init__()
        if model_type not in MODEL_TYPES:
            raise ConfigError(f"unknown model_type '{model_type}': use {', '.join(MODEL_TYPES)}")
        self.img_resolution, self.img_channels = img_resolution, img_channels
        self.label_dim, self.use_fp16 = label_dim, use_fp16
        self.model = MODEL_TYPES[model_type](
            img_resolution=img_resolution,
            in_channels=img_channels,
            out_channels=img_channels * self.outputs_per_channel,
            label_dim=label_dim,
            **model_kwargs,
        )

    def coefficients(self, sigma: Tensor) -> tuple[Tensor | float, Tensor, Tensor | float, Tensor]:
        """(c_skip, c_out, c_in, c_noise) at noise levels ``sigma``, each of its shape."""
        raise NotImplementedError

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        """The nearest noise level that the network knows; all of them unless stated otherwise."""
        return torch.as_tensor(sigma)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, "..."] | float,
        class_labels: Float[Tensor, "..."] | None = None,
        force_fp32: bool = False,
        augment_labels: Float[Tensor, "m n"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Denoised ``x`` in float32 (float64 if the network was converted to it).

        Args:
            x: Noisy images, data in [-1, 1] plus noise.
            sigma: One noise level for all, or one for each image.
            class_labels: Weights over classes, one row for each image or one for all; missing:
                zeros. Ignored by an unconditional network.
            force_fp32: Ignore ``use_fp16``.
            augment_labels: What augmentation did to each image; missing: nothing.
        """
        x, c_skip, c_out, raw = self._apply_model(
            x, sigma, class_labels, force_fp32, augment_labels
        )
        return c_skip * x + c_out * raw

    def predict(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, "..."] | float,
        class_labels: Float[Tensor, "..."] | None = None,
        force_fp32: bool = False,
    ) -> Float[Tensor, "b c h w"]:
        """Raw output ``F`` of the network inside, without skip and scale; arguments as ``forward``."""
        return self._apply_model(x, sigma, class_labels, force_fp32, None)[3]

    def _apply_model(
        self,
        x: Tensor,
        sigma: Tensor | float,
        class_labels: Tensor | None,
        force_fp32: bool,
        augment_labels: Tensor | None,
    ) -> tuple[Tensor, Tensor | float, Tensor | float, Tensor]:
        """(x, c_skip, c_out, F), all in the state's number format."""
        # The parameters say whether this is the float64 copy of the network; images never do.
        exact = self.model.map_layer0.weight.dtype == torch.float64  # type: ignore[union-attr]
        state = torch.float64 if exact else torch.float32
        x = x.to(state)
        sigma = torch.as_tensor(sigma, dtype=state, device=x.device).reshape(-1, 1, 1, 1)
        labels = None
        if self.label_dim:
            if class_labels is None:
                labels = torch.zeros(1, self.label_dim, dtype=state, device=x.device)
            else:
                labels = class_labels.to(state).reshape(-1, self.label_dim)
        if augment_labels is not None:
            augment_labels = augment_labels.to(state)
        half = self.use_fp16 and not force_fp32 and x.device.type == "cuda"
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        raw = self.model(
            (c_in * x).to(torch.float16 if half else state),
            c_noise.flatten(),
            labels,
            augment_labels,
        )
        return x, c_skip, c_out, raw[:, : self.img_channels].to(state)


class EDMPrecond(Preconditioner):
    """Unit variance in and out (Karras et al. 2022, table 1, column "Ours")."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
        sigma_data: float = 0.5,
        model_type: str = "DhariwalUNet",
        **model_kwargs: Any,
    ) -> None:
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs
        )
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        return c_skip, c_out, 1 / total.sqrt(), sigma.log() / 4


class VPPrecond(Preconditioner):
    """Variance preserving (Song et al. 2021; Karras et al. 2022, table 1, column "VP")."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        beta_d: float = 19.9,
        beta_min: float = 0.1,
        M: int = 1000,
        epsilon_t: float = 1e-5,
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ) -> None:
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs
        )
        self.beta_d, self.beta_min, self.M, self.epsilon_t = beta_d, beta_min, M, epsilon_t
        self.sigma_min = float(self.sigma(torch.tensor(epsilon_t, device="cpu")))
        self.sigma_max = float(self.sigma(torch.tensor(1.0, device="cpu")))

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at time ``t`` in [0, 1]."""
        return ((self.beta_d * t**2 / 2 + self.beta_min * t).exp() - 1).sqrt()

    def sigma_inv(self, sigma: Tensor) -> Tensor:
        """Time at which the noise level is ``sigma``."""
        # log(1 + s^2) rather than log1p: the published networks were trained with its rounding.
        inner = self.beta_min**2 + 2 * self.beta_d * (1 + sigma**2).log()
        return (inner.sqrt() - self.beta_min) / self.beta_d

    def coefficients(self, sigma: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        return 1.0, -sigma, 1 / (sigma**2 + 1).sqrt(), (self.M - 1) * self.sigma_inv(sigma)


class VEPrecond(Preconditioner):
    """Variance exploding (Song et al. 2021; Karras et al. 2022, table 1, column "VE")."""

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.02,
        sigma_max: float = 100.0,
        model_type: str = "SongUNet",
        **model_kwargs: Any,
    ) -> None:
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs
        )
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def coefficients(self, sigma: Tensor) -> tuple[float, Tensor, float, Tensor]:
        return 1.0, sigma, 1.0, (0.5 * sigma).log()


class iDDPMPrecond(Preconditioner):
    """Improved DDPM with its table of noise levels (Karras et al. 2022, table 1, column "iDDPM")."""

    u: Tensor
    outputs_per_channel = 2  # the second half predicts variances, which denoising does not use

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        C_1: float = 0.001,
        C_2: float = 0.008,
        M: int = 1000,
        model_type: str = "DhariwalUNet",
        **model_kwargs: Any,
    ) -> None:
        super().__init__(
            img_resolution, img_channels, label_dim, use_fp16, model_type, **model_kwargs
        )
        self.C_1, self.C_2, self.M = C_1, C_2, M
        # In float32 as published: the table is part of what the networks were trained with, and
        # exact values differ from it by up to a thousandth at the small end.
        alpha_bar = self.alpha_bar(torch.arange(M + 1, dtype=torch.float32, device="cpu"))
        ratios = (alpha_bar[:-1] / alpha_bar[1:]).clip(min=C_1)
        u = torch.zeros(M + 1, device="cpu")
        for j in range(M, 0, -1):
            u[j - 1] = ((u[j] ** 2 + 1) / ratios[j - 1] - 1).sqrt()
        self.register_buffer("u", u)

    def alpha_bar(self, j: Tensor) -> Tensor:
        """Share of signal variance at step ``j``, from 0 (pure noise) to M."""
        return (0.5 * math.pi * j / self.M / (self.C_2 + 1)).sin() ** 2

    @property
    def sigma_min(self) -> float:  # type: ignore[override]
        """Smallest positive entry of the table."""
        return float(self.u[self.M - 1])

    @property
    def sigma_max(self) -> float:  # type: ignore[override]
        """Largest entry of the table."""
        return float(self.u[0])

    def sigma_index(self, sigma: Tensor) -> Tensor:
        """Index in the table of the noise level nearest to ``sigma``, int64 of its shape."""
        flat = sigma.to(torch.float64).reshape(-1, 1)
        return (flat - self.u.to(torch.float64)).abs().argmin(dim=1).reshape(sigma.shape)

    def round_sigma(self, sigma: Tensor | float) -> Tensor:
        values = torch.as_tensor(sigma, device=self.u.device)
        return self.u[self.sigma_index(values)].to(values.dtype)

    def coefficients(self, sigma: Tensor) -> tuple[float, Tensor, Tensor, Tensor]:
        c_noise = self.M - 1 - self.sigma_index(sigma).to(sigma.dtype)
        return 1.0, -sigma, 1 / (sigma**2 + 1).sqrt(), c_noise


PRECONDITIONERS: dict[str, type[Preconditioner]] = {
    "EDMPrecond": EDMPrecond,
    "VPPrecond": VPPrecond,
    "VEPrecond": VEPrecond,
    "iDDPMPrecond": iDDPMPrecond,
}
