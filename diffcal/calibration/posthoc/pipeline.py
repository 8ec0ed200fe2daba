"""Several calibrators in a row, each fitted on what the one before makes of validation data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.inputs import Predictions
from diffcal.calibration.posthoc.calibrator import Calibrator, FitData
from diffcal.errors import CheckpointError, ConfigError

__all__ = ["Pipeline"]


@dataclass(kw_only=True, eq=False)
class Pipeline(Calibrator):
    """Stages applied one after another, as in ``Pipeline.of(FeatureClipping(), TemperatureScaling())``.

    All stages but the last must give logits, so that the next one starts from them. Features go to
    every stage that needs them.
    """

    stages: Sequence[Calibrator] = field(default_factory=list)

    @classmethod
    def of(cls, *stages: Calibrator) -> "Pipeline":
        """A pipeline of some stages."""
        return cls(stages=list(stages))

    def _check_settings(self) -> None:
        if not self.stages:
            raise ConfigError("a pipeline needs at least one stage")
        for stage in self.stages[:-1]:
            if not stage.gives_logits:
                raise ConfigError(
                    f"{type(stage).__name__} gives probabilities: it can only be the last stage"
                )
        self.needs_features = any(stage.needs_features for stage in self.stages)  # type: ignore[misc]
        self.gives_logits = self.stages[-1].gives_logits  # type: ignore[misc]

    @property
    def preserves_argmax(self) -> bool:
        """Whether every stage does."""
        return all(stage.preserves_argmax for stage in self.stages)

    def _fit(self, data: FitData) -> None:
        p = data.predictions
        for stage in self.stages:
            stage.fit_data(data)
            if stage is not self.stages[-1]:
                z = stage.calibrated_logits(data.logits, features=data.features)
                made = Predictions(logits=z, labels=p.labels, soft_labels=p.soft_labels)
                data = FitData(made, data.features)

    def _through(self, z: Tensor, features: Tensor | None) -> Tensor:
        for stage in self.stages[:-1]:
            z = stage.calibrated_logits(z, features=features)
        return z

    def last_layer(
        self,
        features: Float[Tensor, "n d"],
        weight: Float[Tensor, "k d"],
        bias: Float[Tensor, " k"],
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """The layer as the stages make it one after the other."""
        self._require_fitted()
        for stage in self.stages:
            made = stage.last_layer(features, weight, bias)
            if made is None:
                return None
            features, weight, bias = made
        return features, weight, bias

    def _logits(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        return self.stages[-1].calibrated_logits(self._through(z, features), features=features)

    def _probs(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        return self.stages[-1].predict_proba(self._through(z, features), features=features)

    def state_dict(self) -> dict[str, Tensor]:
        """States of all stages, under ``0.``, ``1.``, ..."""
        state = super().state_dict()
        for i, stage in enumerate(self.stages):
            state |= {f"{i}.{name}": value for name, value in stage.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> "Pipeline":
        """The pipeline itself with the values of :meth:`state_dict`."""
        own = {name: value for name, value in state.items() if "." not in name}
        known = {str(i) for i in range(len(self.stages))}
        unknown = {name.split(".")[0] for name in state if "." in name} - known
        if unknown:
            raise CheckpointError(f"state names stage {sorted(unknown)[0]}; there are {len(known)}")
        for i, stage in enumerate(self.stages):
            prefix = f"{i}."
            stage.load_state_dict(
                {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            )
        return super().load_state_dict(own)
