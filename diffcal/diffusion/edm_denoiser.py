"""Preconditioned EDM-family networks as denoisers."""

import hashlib
import json
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diffcal.core.devices import resolve_device, resolve_dtype
from diffcal.core.digests import hash_tensors
from diffcal.core.tensors import append_dims
from diffcal.diffusion.class_weights import check_distributions
from diffcal.diffusion.denoisers import ConditionKind, images_to_model, model_to_images
from diffcal.diffusion.preconditioning import Preconditioner
from diffcal.errors import ConfigError, DataError

__all__ = ["EDMDenoiser"]


class EDMDenoiser:
    """``D(x; sigma, condition)`` of one of our networks, on pixels in [-1, 1].

    The interface is that of :class:`diffcal.diffusion.denoisers.Denoiser`. The condition of a
    class-conditional network is the vector of class weights itself.

    Args:
        network: Made by ``build_network``; put into evaluation mode, its parameters stay trainable.
        class_names: One name for each class; numbers if None.
        dtype: ``float32``, or ``bfloat16``/``float16`` for autocast around the network. Input and
            output are float32 whatever it is. Networks published for float16 (``use_fp16``) run on
            a GPU in their own half-precision form when ``float16`` is asked for.
    """

    def __init__(
        self,
        network: Preconditioner,
        class_names: Sequence[str] | None = None,
        dtype: str = "float32",
    ) -> None:
        classes = network.label_dim
        if class_names is not None and len(class_names) != classes:
            raise ConfigError(
                f"class_names has {len(class_names)} names for {classes} classes of the network"
            )
        self.network = network.eval()
        self.module: nn.Module = network
        self.dtype = resolve_dtype(dtype)
        side = network.img_resolution
        self.sample_shape = (network.img_channels, side, side)
        self.sigma_data = float(network.sigma_data)
        self.sigma_min, self.sigma_max = float(network.sigma_min), float(network.sigma_max)
        self.condition_kind: ConditionKind = "class" if classes else "none"
        self.num_classes = classes
        self.class_names = tuple(class_names or (str(index) for index in range(classes)))
        self.feature_modules = _feature_modules(network)
        self._fingerprint: str | None = None

    def __call__(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Denoised ``x`` in float32, differentiable with respect to ``x`` and the parameters.

        Raises:
            ConfigError: a condition is missing, or given to an unconditional network.
        """
        return self._run(self.network, x, sigma, condition)

    def predict(
        self,
        x: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        condition: Tensor | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Raw output ``F`` of the preconditioned network, float32; arguments as for a call."""
        return self._run(self.network.predict, x, sigma, condition)

    def target(
        self,
        clean: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
    ) -> Float[Tensor, "b c h w"]:
        """What :meth:`predict` is trained to give for ``clean + sigma * noise``.

        ``((1 - c_skip) clean - c_skip sigma noise) / c_out``, Karras et al. 2022, equation 8.
        """
        # 1 - c_skip cancels at small noise levels; MPS has no float64.
        wide = torch.float32 if sigma.device.type == "mps" else torch.float64
        level = append_dims(sigma.to(wide), clean)
        c_skip, c_out, _, _ = self.network.coefficients(level)
        wanted = ((1 - c_skip) * clean - c_skip * level * noise) / c_out
        return wanted.float()

    def _run(
        self, function: Callable[..., Tensor], x: Tensor, sigma: Tensor, condition: Tensor | None
    ) -> Tensor:
        if (condition is None) != (self.condition_kind == "none"):
            raise ConfigError(
                "the network is unconditional, but a condition was given"
                if condition is not None
                else "the network needs a class condition: denoiser.condition(weights)"
            )
        half = self.dtype != torch.float32
        native = self.dtype == torch.float16 and self.network.use_fp16 and x.is_cuda
        with torch.autocast(
            x.device.type, dtype=self.dtype if half else None, enabled=half and not native
        ):
            output = function(x.float(), sigma.float(), condition, force_fp32=not native)
        return output.float()

    def condition(self, weights: Float[Tensor, "b k"] | None) -> Float[Tensor, "b k"] | None:
        """Rows of class weights, checked and moved to the network; None if unconditional.

        Raises:
            ConfigError: no weights, or another number of classes.
            DataError: a row has negative or non-finite entries or does not sum to 1.
        """
        if self.condition_kind == "none":
            return None
        if weights is None:
            raise ConfigError(
                f"the network is conditioned on {self.num_classes} classes: give weights, one row "
                "for each sample"
            )
        if weights.shape[1] != self.num_classes:
            raise ConfigError(
                f"weights have {weights.shape[1]} columns, but the network has "
                f"{self.num_classes} classes"
            )
        check_distributions(weights)
        return weights.to(self.device, torch.float32)

    def unconditional(self, batch_size: int) -> Float[Tensor, "b k"]:
        """Zero vectors: what training with dropped labels taught the network as "any class".

        Raises:
            ConfigError: the network is unconditional, or never saw dropped labels.
        """
        if self.condition_kind == "none":
            raise ConfigError("the network has no classes, so guidance has nothing to guide by")
        if not self.network.model.label_dropout:
            raise ConfigError(
                "the network was trained without dropped labels (label_dropout 0), so it has no "
                "unconditional branch; sample without guidance or train with label_dropout above 0"
            )
        return torch.zeros(batch_size, self.num_classes, device=self.device)

    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
        """Pixels 0..255 as float32 in [-1, 1].

        Raises:
            DataError: images of another size or number of channels.
        """
        channels, height, width = self.sample_shape
        if tuple(images.shape[1:]) != (height, width, channels):
            raise DataError(
                f"images are {'x'.join(map(str, images.shape[1:]))} (height x width x channels), "
                f"the network takes {height}x{width}x{channels}"
            )
        return images_to_model(images)

    def decode(self, x: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b h w c"]:
        """Images of clean samples."""
        return model_to_images(x)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.module.parameters()).device

    @property
    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights; computed once, when first asked for."""
        if self._fingerprint is None:
            digest = hashlib.sha256()
            config = json.dumps(self.network.config, sort_keys=True, separators=(",", ":"))
            digest.update(f"{type(self).__name__}|{config}|".encode())
            hash_tensors(digest, sorted(self.module.state_dict().items()))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def to(self, device: torch.device | str) -> "EDMDenoiser":
        """The same denoiser, its parameters moved to ``device`` in place."""
        self.module.to(resolve_device(str(device)))
        return self


def _feature_modules(network: Preconditioner) -> tuple[str, ...]:
    """Middle of the decoder first, then the bottleneck, the other decoder levels, the encoder's end.

    The order is what linear probes found on several U-Nets: Baranchuk et al. 2022
    (arXiv:2112.03126) and Xiang et al. 2023 (arXiv:2303.09769).
    """
    encoder, decoder = (list(getattr(network.model, part)) for part in ("enc", "dec"))
    last_of_level: dict[str, str] = {}
    for name in decoder:
        if "_block" in name:
            last_of_level[name.partition("_")[0]] = name
    levels = list(last_of_level.values())  # coarse to fine
    middle = (len(levels) - 1) // 2
    others = sorted(
        (i for i in range(len(levels)) if i != middle), key=lambda index: abs(index - middle)
    )
    bottleneck = next(name for name in decoder if name.endswith("_in1"))
    deepest = [name for name in encoder if "_block" in name][-1]
    return (
        f"model.dec.{levels[middle]}",
        f"model.dec.{bottleneck}",
        *(f"model.dec.{levels[index]}" for index in others),
        f"model.enc.{deepest}",
    )
