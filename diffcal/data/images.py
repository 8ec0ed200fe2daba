"""Images as arrays, as encoded bytes, and as contact sheets."""

import io
import math
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, UnidentifiedImageError

from diffcal.core.runs import write_atomic
from diffcal.errors import DataError

__all__ = ["decode_image", "encode_png", "image_grid"]

Pixels = UInt8[ndarray, "h w c"]


def decode_image(data: bytes, where: str) -> Pixels:
    """Pixels of an encoded image: one channel for grey ones, else RGB.

    Args:
        data: File content in any format that Pillow reads.
        where: What to call the image in errors, for instance ``"train.parquet, row 3"``.

    Raises:
        DataError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError) as error:
        raise DataError(f"{where}: the image cannot be decoded ({error})") from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def encode_png(pixels: Pixels) -> bytes:
    """PNG file of grey (c = 1) or RGB (c = 3) pixels; the same bytes for the same pixels.

    Raises:
        DataError: another number of channels.
    """
    buffer = io.BytesIO()
    _pillow(pixels).save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()


def image_grid(
    images: UInt8[ndarray, "b h w c"],
    *,
    columns: int,
    path: Path | None = None,
    scale: int | None = None,
    gap: int = 2,
) -> UInt8[ndarray, "grid_h grid_w c"]:
    """Contact sheet in reading order on white; also written to ``path`` as PNG if given.

    Args:
        images: At least one.
        columns: Images per row.
        path: Where to write it.
        scale: Each pixel becomes a square of this side; by default about 64 for the image's side.
        gap: White pixels between images.
    """
    count, height, width, channels = images.shape
    scale = scale or max(1, round(64 / max(height, width)))
    big = images.repeat(scale, axis=1).repeat(scale, axis=2)
    high, wide, rows = height * scale + gap, width * scale + gap, math.ceil(count / columns)
    sheet = np.full((rows * high + gap, columns * wide + gap, channels), 255, dtype=np.uint8)
    for index, image in enumerate(big):
        top, left = (index // columns) * high + gap, (index % columns) * wide + gap
        sheet[top : top + high - gap, left : left + wide - gap] = image
    if path is not None:
        data = encode_png(sheet)
        write_atomic(path, lambda file: file.write(data))
    return sheet


def _pillow(pixels: Pixels) -> Image.Image:
    channels = pixels.shape[2]
    if channels not in (1, 3):
        raise DataError(f"images have 1 (grey) or 3 (RGB) channels, got {channels}")
    return Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
