"""The torchmetrics modules: same values as the accumulator, batches and copies behave."""

import pytest
import torch

from diffcal.calibration.metrics.streaming import STREAMING_MEASURES
from diffcal.calibration.metrics.summary import measure
from diffcal.errors import ConfigError, DataError

torchmetrics = pytest.importorskip("torchmetrics")
wrappers = pytest.importorskip("diffcal.calibration.metrics.torchmetrics_wrappers")


def batch(n=500, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, k, generator=generator) * 2
    return z, torch.randint(k, (n,), generator=generator)


def test_summary_over_batches():
    z, y = batch()
    metric = wrappers.CalibrationSummaryMetric(4)
    for rows in torch.arange(500).split(130):
        metric.update(z[rows], y[rows])
    values = metric.compute()
    assert set(values) == {"n", *STREAMING_MEASURES}
    for name in ("accuracy", "ece", "cw_ece", "nll", "brier"):
        expected = measure(name, logits=z, labels=y)
        assert float(values[name]) == pytest.approx(expected, abs=1e-12), name
    assert values["ece"].dtype == torch.float64
    metric.reset()
    with pytest.raises(DataError, match="empty set"), pytest.warns(UserWarning, match="before"):
        metric.compute()


def test_one_measure_of_probabilities_and_soft_labels_in_a_collection():
    z, _ = batch()
    p, q = z.softmax(1), (z / 2).softmax(1)
    collection = torchmetrics.MetricCollection(
        {
            "ece": wrappers.CalibrationMetric(4, "ece", input="probs"),
            "nll": wrappers.CalibrationMetric(4, "nll", input="probs"),
        }
    )
    collection.update(p[:200], q[:200])
    collection.update(p[200:], q[200:])
    for name, value in collection.compute().items():
        assert float(value) == pytest.approx(measure(name, probs=p, soft_labels=q), abs=1e-12)


def test_declared_input_is_checked():
    z, y = batch()
    with pytest.raises(DataError, match="logits go to logits="):
        wrappers.CalibrationMetric(4, input="probs").update(z, y)
    with pytest.raises(ConfigError, match="does not stream"):
        wrappers.CalibrationMetric(4, "sweep_ece")
