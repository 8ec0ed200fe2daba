"""What every annotator is: fitted on features of real images, then asked for soft labels."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffcal.config import check_choices
from diffcal.errors import ArtifactError, ConfigError, DataError
from diffcal.mixing.prototypes import FeatureBatches

__all__ = ["Annotator", "pairs_of", "support_mask", "target_matrix"]


@dataclasses.dataclass(kw_only=True)
class Annotator(ABC):
    """Soft labels from features; the fields of a subclass are its settings.

    ``state`` holds the fitted tensors and ``report`` what the fit found out (JSON numbers).
    """

    name: ClassVar[str]
    all_classes: ClassVar[bool]
    """True: labels range over all classes, whatever was mixed. False: over the mixed ones."""

    def __post_init__(self) -> None:
        check_choices(self)
        self.state: dict[str, Tensor] = {}
        self.report: dict[str, float] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The fields as a dict, ready for JSON."""
        return dataclasses.asdict(self)

    @property
    def num_classes(self) -> int:
        """Number of classes it was fitted for."""
        return int(self._fitted("num_classes"))

    def fit(self, train: FeatureBatches, held_out: FeatureBatches, num_classes: int) -> "Annotator":
        """Itself, fitted.

        Args:
            train: Batches of real features and int64 labels; passed over several times.
            held_out: Batches that neither ``train`` nor the training of the encoder has seen, to set
                slopes and temperatures; labels int64 ``[b]``, or people's label shares
                ``[b, k]`` (float).
            num_classes: Number of classes k.

        Raises:
            DataError: a class without images, features that are not finite or of changing length.
        """
        self.state = {"num_classes": torch.tensor(num_classes)}
        self.report = {}
        self._fit(train, held_out, num_classes)
        return self

    def annotate(
        self,
        features: Float[Tensor, "b d"],
        classes: Int64[Tensor, "b m"],
        weights: Float[Tensor, "b m"],
    ) -> Float[Tensor, "b k"]:
        """Soft labels, float32, each row summing to 1.

        Args:
            features: From the encoder that the fit used.
            classes: Which classes each image was made from, -1 where a row has fewer than m.
            weights: Their weights, 0 at the padding.

        Raises:
            DataError: features of another length, classes out of range, not a pair where one is needed.
        """
        if len(classes) == 0:
            return torch.zeros(0, self.num_classes)
        for extreme in (int(classes.min()), int(classes.max())):
            if not -1 <= extreme < self.num_classes:
                raise DataError(f"class {extreme} of {self.num_classes} was mixed")
        labels = self._annotate(features, classes, weights)
        total = labels.sum(dim=1, keepdim=True)
        if not bool((total > 0).all()):  # also NaN
            row = int((~(total > 0)).nonzero()[0, 0])
            raise DataError(f"image {row} gets no label: its features or weights are not usable")
        return (labels / total).float()

    @abstractmethod
    def _fit(self, train: FeatureBatches, held_out: FeatureBatches, num_classes: int) -> None: ...

    @abstractmethod
    def _annotate(self, features: Tensor, classes: Tensor, weights: Tensor) -> Tensor: ...

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a fitted ``state``.

        Raises:
            ArtifactError: it is not one of an annotator.
        """
        if "num_classes" not in state:
            raise ArtifactError("the file holds no fitted annotator (it lacks num_classes)")
        self.state = dict(state)

    def _fitted(self, key: str) -> Tensor:
        try:
            return self.state[key]
        except KeyError:
            raise ConfigError(f"annotator '{self.name}' was not fitted (no {key})") from None

    def _checked(self, features: Tensor, dim: int) -> Tensor:
        if features.shape[1] != dim:
            raise DataError(
                f"annotator '{self.name}' was fitted on features of length {dim}, got "
                f"{features.shape[1]}: use the encoder that it was fitted with"
            )
        return features.double()


def pairs_of(classes: Int64[Tensor, "b m"]) -> Int64[Tensor, "b 2"]:
    """The two classes of each row.

    Raises:
        DataError: a row has another number of classes.
    """
    counts = (classes >= 0).sum(dim=1)
    if bool((counts != 2).any()):
        row = int((counts != 2).nonzero()[0])
        raise DataError(
            f"image {row} mixes {int(counts[row])} classes, but this annotator projects on the line "
            "through two; use kclass_projection or kclass_posterior"
        )
    return classes[classes >= 0].reshape(-1, 2)


def support_mask(classes: Int64[Tensor, "b m"], num_classes: int) -> Tensor:
    """Bool ``[b, k]``: which classes each row was made from."""
    mask = torch.zeros(len(classes), num_classes + 1, dtype=torch.bool)
    mask.scatter_(1, torch.where(classes >= 0, classes, num_classes), True)
    return mask[:, :num_classes]


def target_matrix(targets: Tensor, num_classes: int) -> Tensor:
    """Float64 ``[b, k]`` of hard (int64 ``[b]``) or soft (float ``[b, k]``) targets."""
    if targets.ndim == 2:
        return targets.double()
    return torch.nn.functional.one_hot(targets, num_classes).double()
