"""The contract of post-hoc calibrators: fit on validation logits and labels, then apply.

Settings are the fields of a dataclass, checked on construction. Fitted values are float64 tensors
named in ``STATE``, so that saving needs no code of its own in any method.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.binned import expected_calibration_error
from diffcal.calibration.metrics.inputs import Predictions
from diffcal.config import check_choices
from diffcal.core.tensors import as_tensor
from diffcal.errors import CheckpointError, ConfigError, DataError

__all__ = ["Calibrator", "Criterion", "FitData", "NotFittedError", "criterion_value"]

Criterion = Literal["nll", "brier", "ece"]
"""What a search minimises on validation data: cross-entropy, Brier score, or the 15-bin ECE."""

Array = TypeVar("Array", Tensor, np.ndarray)

Same = TypeVar(
    "Same", bound="Calibrator"
)  # typing.Self, which beartype takes in whole classes only


class NotFittedError(ConfigError):
    """A calibrator was applied before it was fitted or loaded."""


@dataclass(frozen=True)
class FitData:
    """Validation data of a fit, checked: logits with labels and, where given, features."""

    predictions: Predictions
    features: Float[Tensor, "n d"] | None = None

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.predictions.classes

    @property
    def logits(self) -> Float[Tensor, "n k"]:
        """All logits in float64."""
        return self.predictions.scores.double()

    @property
    def log_probs(self) -> Float[Tensor, "n k"]:
        """Their log-softmax, float64."""
        return self.logits.log_softmax(dim=1)

    @property
    def targets(self) -> Float[Tensor, "n k"]:
        """Labels as float64 distributions."""
        return self.predictions.targets()

    def require_features(self) -> Float[Tensor, "n d"]:
        """The features, or :class:`DataError` where there are none."""
        if self.features is None:
            raise DataError("this method needs features= (the inputs of the last linear layer)")
        return self.features

    def select(self, rows: Tensor) -> "FitData":
        """Some of the examples."""
        features = None if self.features is None else self.features[rows]
        return FitData(self.predictions.select(rows), features)


def criterion_value(
    data: FitData, log_probs: Float[Tensor, "n k"], criterion: Criterion, n_bins: int = 15
) -> float:
    """Value of a criterion for given log-probabilities (minus infinity allowed) of the examples.

    The ECE takes (lower, upper] bins of equal width and clips confidences to [0, 1] first, so that a
    confidence of 1 + 1e-16 is counted.
    """
    p = data.predictions
    if criterion == "nll":  # from the logarithms: underflowing probabilities have a finite score
        if p.labels is not None:
            return -float(log_probs.gather(1, p.labels[:, None]).mean())
        q = p.targets()
        return -float(torch.where(q > 0, q * log_probs, 0).sum(dim=1).mean())
    made = Predictions(probs=log_probs.exp(), labels=p.labels, soft_labels=p.soft_labels)
    if criterion == "brier":
        return made.mean_brier
    return expected_calibration_error(made, n_bins)


@dataclass(kw_only=True, eq=False)
class Calibrator(ABC):
    """A map from logits to probabilities, fitted on validation data.

    Tensors give tensors of the same number format and device, which carry no gradient; arrays, and all
    that numpy makes into one, give arrays. ``fit`` works in float64, leaves torch's random state alone
    and may be called again.
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    """Names of the fitted tensors."""
    needs_features: ClassVar[bool] = False
    gives_logits: ClassVar[bool] = False
    """Whether the output is a softmax of calibrated logits (else log-probabilities stand for them)."""
    single_precision: ClassVar[bool] = False
    """Whether float32 input is computed in float32."""
    block_elements: ClassVar[int] = 1 << 18
    """Entries of a block of rows, so that temporaries stay in the cache."""

    def __post_init__(self) -> None:
        self._classes = 0
        self._features = 0
        check_choices(self)
        self._check_settings()

    def fit(
        self: Same,
        logits: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | None = None,
        *,
        soft_labels: Tensor | np.ndarray | None = None,
        features: Tensor | np.ndarray | None = None,
    ) -> Same:
        """The calibrator itself, fitted on validation data (never on the data it will be judged on).

        Args:
            logits: ``[n, k]``, floating, finite.
            labels: ``[n]`` integers; or give ``soft_labels``.
            soft_labels: ``[n, k]`` distributions. Cross-entropy and Brier score then take the label
                as it is; a binned outcome is the label's probability of the predicted class.
            features: ``[n, d]`` inputs of the last linear layer, for methods that need them.

        Raises:
            DataError: NaN, no rows, one class, labels out of range, features missing.
        """
        predictions = Predictions(logits=_floating(logits), labels=labels, soft_labels=soft_labels)
        checked = _checked_features(features, predictions.scores, self.needs_features)
        return self.fit_data(FitData(predictions, checked))

    def fit_data(self: Same, data: FitData) -> Same:
        """:meth:`fit` on data that were checked before."""
        if self.needs_features:
            data.require_features()
        self._fit(data)
        self._classes = data.classes
        self._features = 0 if data.features is None else data.features.shape[1]
        return self

    def predict_proba(self, logits: Array, *, features: Tensor | np.ndarray | None = None) -> Array:
        """Calibrated probabilities ``[n, k]``: non-negative rows that sum to 1.

        Raises:
            NotFittedError: before :meth:`fit`.
            DataError: NaN or infinite logits, other shapes than fitted, no rows.
        """
        return self._map(logits, features, self._write_probs)

    def calibrated_logits(
        self, logits: Array, *, features: Tensor | np.ndarray | None = None
    ) -> Array:
        """Logits ``[n, k]`` whose softmax is :meth:`predict_proba`.

        Log-probabilities for methods that have no logits of their own; these are minus infinity
        where a probability is exactly 0.
        """
        return self._map(logits, features, lambda z, h, out: out.copy_(self._logits(z, h)))

    def last_layer(
        self,
        features: Float[Tensor, "n d"],
        weight: Float[Tensor, "k d"],
        bias: Float[Tensor, " k"],
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Features, weight and bias of a last linear layer that gives the calibrated logits.

        So a file of calibrated logits can carry a layer that belongs to them, for methods that read
        features.

        Args:
            features: Inputs of the layer that gives the logits before calibration.
            weight: Of that layer.
            bias: Of that layer.

        Returns:
            None where there is no such layer, as for a temperature of each example.
        """
        self._require_fitted()
        return None

    @property
    def is_fitted(self) -> bool:
        """Whether :meth:`fit` or :meth:`load_state_dict` was called."""
        return self._classes > 0

    @property
    @abstractmethod
    def preserves_argmax(self) -> bool:
        """Whether the predicted class can never change."""

    def state_dict(self) -> dict[str, Tensor]:
        """Fitted values, all that :meth:`load_state_dict` needs."""
        self._require_fitted()
        sizes = torch.tensor([self._classes, self._features])
        return {"sizes": sizes, **{name: getattr(self, name) for name in self.STATE}}

    def load_state_dict(self: Same, state: Mapping[str, Tensor]) -> Same:
        """The calibrator itself with the values of :meth:`state_dict`.

        Raises:
            CheckpointError: names are missing or unknown, or values are not finite.
        """
        expected = {"sizes", *self.STATE}
        if set(state) != expected:
            raise CheckpointError(
                f"state of {type(self).__name__} must hold {', '.join(sorted(expected))}; "
                f"got {', '.join(sorted(state)) or 'nothing'}"
            )
        for name in self.STATE:
            value = state[name].detach().cpu()
            if bool(value.isnan().any()):
                raise CheckpointError(f"'{name}' of {type(self).__name__} holds NaN")
            setattr(self, name, value.clone())
        self._classes, self._features = (int(v) for v in state["sizes"])
        return self

    def __sklearn_clone__(self: Same) -> Same:
        """An unfitted copy with the same settings and last layer, for ``sklearn.base.clone``."""
        made = copy.deepcopy(self)
        made._classes = made._features = 0
        return made

    # what a method provides

    @abstractmethod
    def _fit(self, data: FitData) -> None:
        """Set the tensors of ``STATE``."""

    def _logits(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        """Calibrated logits of a block; by default logarithms of :meth:`_probs`."""
        return self._probs(z, features).log()

    def _probs(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        """Probabilities of a block; by default the softmax of :meth:`_logits`."""
        return self._logits(z, features).softmax(dim=1)

    def _write_probs(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None, out: Tensor
    ) -> None:
        """Write :meth:`_probs` of a block into ``out``, which has the number format of the input."""
        out.copy_(self._probs(z, features))

    def _check_settings(self) -> None:
        """Raise :class:`ConfigError` for settings out of range."""
        if getattr(self, "n_bins", 1) < 1:
            raise ConfigError(f"n_bins must be at least 1, got {getattr(self, 'n_bins', 1)}")

    # shared machinery

    def _map(self, logits: Any, features: Any, write: Any) -> Any:
        self._require_fitted()
        z = _checked_logits(logits, self._classes)
        h = _checked_features(features, z, self.needs_features)
        if h is not None and self.needs_features and h.shape[1] != self._features:
            raise DataError(f"features have {h.shape[1]} columns, fitted on {self._features}")
        single = self.single_precision and z.dtype == torch.float32
        dtype = torch.float32 if single else torch.float64
        out = torch.empty_like(z)
        for rows in self._row_blocks(*z.shape):
            part = None if h is None else h[rows]
            write(z[rows].to(dtype), part, out[rows])
            if dtype != out.dtype and self.preserves_argmax:
                _keep_argmax(out[rows], z[rows].argmax(dim=1))
        return out if isinstance(logits, Tensor) else out.numpy()

    def _row_blocks(self, n: int, k: int) -> Iterator[slice]:
        size = max(1, self.block_elements // k)
        for start in range(0, n, size):
            yield slice(start, min(start + size, n))

    def _require_fitted(self) -> None:
        if not self.is_fitted:
            raise NotFittedError(f"{type(self).__name__} is not fitted: call fit or load it first")


def _keep_argmax(out: Tensor, top: Tensor) -> None:
    """Raise the value at ``top`` by one unit in the last place where rounding made it tie."""
    wrong = (out.argmax(dim=1) != top).nonzero()[:, 0]
    if len(wrong):
        at = top[wrong]
        largest = out[wrong].amax(dim=1)
        out[wrong, at] = torch.nextafter(largest, torch.full_like(largest, torch.inf))


def _floating(values: Any) -> Tensor:
    tensor = as_tensor(values, "logits")
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise DataError(
            f"logits must be floating of shape [n, k], got {tensor.dtype} {list(tensor.shape)}"
        )
    return tensor


def _checked_logits(values: Any, classes: int) -> Tensor:
    z = _floating(values)
    if z.shape[1] != classes:
        raise DataError(f"logits have {z.shape[1]} classes, fitted on {classes}")
    if len(z) == 0:
        raise DataError("no examples to calibrate")
    if not all(bool(end.isfinite()) for end in z.aminmax()):  # NaN spreads to both ends
        bad = (~z.isfinite()).any(dim=1).nonzero()[:, 0]
        raise DataError(
            f"logits hold NaN or infinite values in {len(bad)} rows, the first is {int(bad[0])}"
        )
    return z


def _checked_features(values: Any, logits: Tensor, needed: bool) -> Float[Tensor, "n d"] | None:
    if values is None:
        if needed:
            raise DataError("this method needs features= (the inputs of the last linear layer)")
        return None
    h = as_tensor(values, "features").to(device=logits.device, dtype=torch.float64)
    if h.ndim != 2 or len(h) != len(logits) or h.shape[1] == 0:
        raise DataError(f"features must have shape [{len(logits)}, d], got {list(h.shape)}")
    if not bool(h.isfinite().all()):
        raise DataError("features hold NaN or infinite values")
    return h
