"""Feature rows in fewer bits: float16 and int8 with a scale per row, bfloat16, float32."""

from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from diffcal.errors import ConfigError

__all__ = ["FeatureDtype", "decode_rows", "encode_rows", "storage_dtype"]

FeatureDtype = Literal["float32", "float16", "bfloat16", "int8"]

_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
_HALF_EXPONENT = (
    14  # the largest entry of a float16 row lies in [2^13, 2^14), a factor 4 below overflow
)


def storage_dtype(name: str) -> torch.dtype:
    """Torch number format of a store's ``dtype``."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise ConfigError(f"unknown feature dtype '{name}': use {', '.join(_DTYPES)}") from None


def encode_rows(
    features: Float[Tensor, "n k"], dtype: str
) -> tuple[Shaped[Tensor, "n k"], Float[Tensor, " n"] | None]:
    """Rows as stored, and the float32 factor of each row that undoes it (None where there is none).

    ``int8`` rounds to 1/127 of the row's largest entry. ``float16`` divides each row by a power of
    two, so that neither very small nor very large gradients leave the format: the relative error of
    an entry stays below 2^-11 down to 2^-27 of the row's largest one.
    """
    target = storage_dtype(dtype)
    rows = features.detach().to("cpu", torch.float32)
    if dtype in ("float32", "bfloat16"):
        return rows.to(target).contiguous(), None
    largest = (
        rows.abs().amax(dim=1) if rows.shape[1] else torch.zeros(len(rows), dtype=torch.float32)
    )
    if dtype == "int8":
        scale = largest / 127
        unit = torch.where(scale > 0, scale, 1.0)
        return (rows / unit[:, None]).round().to(target), scale
    exponent = torch.frexp(largest).exponent - _HALF_EXPONENT
    # Within float32's own range also where the row is made of denormal numbers.
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(min=-126))
    return (rows / scale[:, None]).to(target), scale


def decode_rows(
    stored: Shaped[Tensor, "n k"], scale: Float[Tensor, " n"] | None
) -> Float[Tensor, "n k"]:
    """float32 rows from what :func:`encode_rows` gave."""
    rows = stored.to(torch.float32)
    return rows if scale is None else rows * scale[:, None]
