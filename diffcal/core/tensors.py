"""Small tensor helpers that several subpackages want."""

from torch import Tensor

from diffcal.errors import NumericalError

__all__ = ["append_dims", "require_finite"]


def append_dims(vector: Tensor, like: Tensor) -> Tensor:
    """``vector`` [b] (or a scalar) with trailing axes of size 1 until it broadcasts over ``like``."""
    return vector.reshape(vector.shape + (1,) * (like.ndim - vector.ndim))


def require_finite(tensor: Tensor, what: str) -> Tensor:
    """``tensor`` itself, or :class:`NumericalError` naming ``what`` and how many values are bad."""
    finite = tensor.isfinite()
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise NumericalError(f"{what}: {bad} of {tensor.numel()} values are NaN or infinite")
    return tensor
