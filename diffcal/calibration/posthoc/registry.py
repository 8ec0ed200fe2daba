"""Every calibrator by name."""

import difflib
from collections.abc import Mapping
from typing import Any

from diffcal.calibration.posthoc.affine import DirichletScaling, MatrixScaling, VectorScaling
from diffcal.calibration.posthoc.beta import BetaCalibration
from diffcal.calibration.posthoc.binning_maps import BayesianBinning, HistogramBinning
from diffcal.calibration.posthoc.calibrator import Calibrator
from diffcal.calibration.posthoc.class_temperature import ClassTemperatureScaling
from diffcal.calibration.posthoc.consistency import ConsistencyCalibration
from diffcal.calibration.posthoc.density_aware import DensityAwareCalibration
from diffcal.calibration.posthoc.ensemble_temperature import EnsembleTemperatureScaling
from diffcal.calibration.posthoc.feature_clipping import FeatureClipping, LogitClipping
from diffcal.calibration.posthoc.feature_consistency import FeatureConsistency
from diffcal.calibration.posthoc.gap_temperature import GapTemperatureScaling
from diffcal.calibration.posthoc.group import GroupCalibration
from diffcal.calibration.posthoc.identity import Identity
from diffcal.calibration.posthoc.isotonic import IsotonicCalibration
from diffcal.calibration.posthoc.near_isotonic import NearIsotonicEnsemble
from diffcal.calibration.posthoc.parameterized_temperature import ParameterizedTemperatureScaling
from diffcal.calibration.posthoc.pipeline import Pipeline
from diffcal.calibration.posthoc.proximity import DensityRatioCalibration, ProximityBinning
from diffcal.calibration.posthoc.scaling_binning import ScalingBinning
from diffcal.calibration.posthoc.spline import SplineCalibration
from diffcal.calibration.posthoc.temperature import TemperatureScaling
from diffcal.config import config_from_dict
from diffcal.errors import ConfigError

__all__ = ["CALIBRATORS", "build_calibrator", "calibrator_name"]

CALIBRATORS: dict[str, type[Calibrator]] = {
    "identity": Identity,
    "temperature": TemperatureScaling,
    "vector": VectorScaling,
    "matrix": MatrixScaling,
    "dirichlet": DirichletScaling,
    "ets": EnsembleTemperatureScaling,
    "pts": ParameterizedTemperatureScaling,
    "cts": ClassTemperatureScaling,
    "smart": GapTemperatureScaling,
    "dac": DensityAwareCalibration,
    "consistency": ConsistencyCalibration,
    "feature_consistency": FeatureConsistency,
    "feature_clipping": FeatureClipping,
    "logit_clipping": LogitClipping,
    "group": GroupCalibration,
    "procal": DensityRatioCalibration,
    "procal_bins": ProximityBinning,
    "histogram": HistogramBinning,
    "isotonic": IsotonicCalibration,
    "bbq": BayesianBinning,
    "spline": SplineCalibration,
    "beta": BetaCalibration,
    "enir": NearIsotonicEnsemble,
    "scaling_binning": ScalingBinning,
}


def build_calibrator(
    method: str, settings: Mapping[str, Mapping[str, Any]] | None = None
) -> Calibrator:
    """An unfitted calibrator by name; ``a+b`` is a pipeline of the two.

    Args:
        method: A key of ``CALIBRATORS``, or several joined by ``+``.
        settings: Settings by name, as ``{"temperature": {"search": "grid", "criterion": "ece"}}``;
            those of other methods are not read.

    Raises:
        ConfigError: unknown method (near ones are named) or setting.
    """
    stages = []
    for name in method.split("+"):
        if name not in CALIBRATORS:
            close = difflib.get_close_matches(name, CALIBRATORS, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(close)}?" if close else f"use {', '.join(CALIBRATORS)}"
            )
            raise ConfigError(f"unknown calibration method '{name}'; {hint}")
        stages.append(config_from_dict(CALIBRATORS[name], (settings or {}).get(name, {}), name))
    return stages[0] if len(stages) == 1 else Pipeline.of(*stages)


def calibrator_name(calibrator: Calibrator) -> str:
    """The name under which :func:`build_calibrator` makes such a calibrator."""
    if isinstance(calibrator, Pipeline):
        return "+".join(calibrator_name(stage) for stage in calibrator.stages)
    for name, cls in CALIBRATORS.items():
        if type(calibrator) is cls:
            return name
    raise ConfigError(f"{type(calibrator).__name__} has no name in CALIBRATORS")
