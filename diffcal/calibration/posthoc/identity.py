"""The plain softmax, as a row of comparison tables and a start of pipelines."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.posthoc.calibrator import Calibrator, FitData

__all__ = ["Identity"]


@dataclass(kw_only=True, eq=False)
class Identity(Calibrator):
    """``softmax(z)``, whatever the validation data say."""

    gives_logits: ClassVar = True
    single_precision: ClassVar = True

    @property
    def preserves_argmax(self) -> bool:
        """True."""
        return True

    def _fit(self, data: FitData) -> None:
        pass

    def last_layer(
        self,
        features: Float[Tensor, "n d"],
        weight: Float[Tensor, "k d"],
        bias: Float[Tensor, " k"],
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The layer as it is."""
        self._require_fitted()
        return features, weight, bias

    def _logits(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        return z
