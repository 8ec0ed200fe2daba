"""The measures of the calibration benchmark of architectures under their published names.

102 per network: five binned families at nine numbers of bins, and KSCE, KDECE, MMCE, NLL and Brier,
each before (``pre_``) and after (``post_``) temperature scaling, and two out-of-distribution AUROCs.

Source: Tao et al. 2024 (arXiv:2308.11838).
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffcal.calibration.metrics.binned import (
    expected_calibration_error,
    maximum_calibration_error,
)
from diffcal.calibration.metrics.classwise import classwise_calibration_error
from diffcal.calibration.metrics.inputs import Predictions
from diffcal.calibration.metrics.kernel import (
    kernel_density_calibration_error,
    ks_calibration_error,
    maximum_mean_calibration_error,
)
from diffcal.calibration.metrics.proper import brier_score, negative_log_likelihood
from diffcal.calibration.metrics.registry import correct_confidence, incorrect_confidence
from diffcal.calibration.metrics.temperature import fit_temperature
from diffcal.errors import ConfigError, DataError

__all__ = [
    "BENCHMARK_BINS",
    "BENCHMARK_MEASURES",
    "benchmark_row",
    "benchmark_value",
    "benchmark_values",
]

BENCHMARK_BINS = (5, 10, 15, 20, 25, 50, 100, 200, 500)

_BINNED: dict[str, Callable[[Predictions, int], float]] = {
    "ECE": expected_calibration_error,
    "ECE_em": lambda p, bins: expected_calibration_error(p, bins, "mass"),
    "cwCE": classwise_calibration_error,
    "cwCE_em": lambda p, bins: classwise_calibration_error(p, bins, "mass"),
    "MCE": maximum_calibration_error,
}
_SINGLE: dict[str, Callable[[Predictions], float]] = {
    "KSCE": ks_calibration_error,
    "KDECE": partial(kernel_density_calibration_error, quirk=True),
    "MMCE": maximum_mean_calibration_error,
    "NLL": negative_log_likelihood,
    "Brier": lambda p: brier_score(p, "mean_over_classes"),
}
_STATE_NAMES = (*(f"{family}_{bins}" for bins in BENCHMARK_BINS for family in _BINNED), *_SINGLE)
OOD_NAMES = ("auc_cifar10c", "auc_svhn")

BENCHMARK_MEASURES = (
    *(f"{state}_{name}" for state in ("pre", "post") for name in _STATE_NAMES),
    *OOD_NAMES,
)
"""All 102 names."""


def benchmark_value(name: str, predictions: Predictions) -> float:
    """One of the benchmark's measures without its ``pre_`` or ``post_``, such as ``cwCE_em_50``.

    Any number of bins is taken.

    Raises:
        ConfigError: not a name of the benchmark.
    """
    if name in _SINGLE:
        return _SINGLE[name](predictions)
    found = re.fullmatch(r"(ECE|ECE_em|cwCE|cwCE_em|MCE)_([1-9]\d*)", name)
    if found is None:
        raise ConfigError(
            f"'{name}' is not a benchmark measure: use {', '.join(_SINGLE)} or "
            f"{', '.join(f'{family}_15' for family in _BINNED)} (any number of bins)"
        )
    return _BINNED[found[1]](predictions, int(found[2]))


def benchmark_values(predictions: Predictions) -> dict[str, float]:
    """The 50 measures of one state (before or after scaling), by name without prefix."""
    return {name: benchmark_value(name, predictions) for name in _STATE_NAMES}


def benchmark_row(
    logits: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    *,
    val_fraction: float = 0.2,
    seed: int = 42,
    protocol: Literal["official", "same_rows"] = "official",
    val_rows: Tensor | np.ndarray | None = None,
) -> dict[str, float]:
    """The 100 calibration columns of one network with ``acc`` and mean confidences.

    The temperature is fitted by NLL on a validation part carved out of the given rows.

    Args:
        protocol: ``official``: values before scaling from all rows, after scaling from the rows that
            are not validation, so that the two are not paired. ``same_rows``: both from the latter.
        val_rows: Indices of the validation rows; None shuffles as the benchmark did (NumPy's legacy
            generator with ``seed``) and takes the first ``val_fraction``.

    Raises:
        ConfigError: unknown protocol, or a fraction that leaves a part empty.
    """
    if protocol not in ("official", "same_rows"):
        raise ConfigError(f"protocol must be 'official' or 'same_rows', got '{protocol}'")
    whole = Predictions(logits=logits, labels=labels)
    n = len(whole)
    if val_rows is None:
        order = np.random.RandomState(seed).permutation(n)
        val = torch.from_numpy(order[: int(n * val_fraction)])
    else:
        val = torch.as_tensor(val_rows).to(torch.int64).cpu()
    if not 0 < len(val) < n:
        raise ConfigError(f"validation takes {len(val)} of {n} rows; both parts need some")
    rest = torch.ones(n, dtype=torch.bool)
    rest[val] = False
    device = whole.scores.device
    test = whole.select(rest.nonzero()[:, 0].to(device))
    temperature = fit_temperature(whole.select(val.to(device))).temperature
    before = whole if protocol == "official" else test
    row = {
        "acc": before.mean_outcome,
        "correct_confidence": correct_confidence(before),
        "incorrect_confidence": incorrect_confidence(before),
        "temperature": temperature,
    }
    row |= {f"pre_{name}": value for name, value in benchmark_values(before).items()}
    after = benchmark_values(test.scaled(temperature))
    return row | {f"post_{name}": value for name, value in after.items()}


def require_temperature(name: str, temperature: float | None) -> float:
    """``temperature``, or an error that says why ``name`` needs one."""
    if temperature is None:
        raise DataError(
            f"'{name}' is measured after temperature scaling: pass temperature= (fitted on "
            "validation data, see fit_temperature)"
        )
    return temperature
