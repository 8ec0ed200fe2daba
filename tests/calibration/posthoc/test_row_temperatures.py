"""SMART and DAC: temperatures of a row from its logit gap and from its distance to known data."""

import pytest
import torch

from diffcal.calibration.metrics.binned import expected_calibration_error
from diffcal.calibration.metrics.inputs import Predictions
from diffcal.calibration.posthoc.calibrator import FitData, criterion_value
from diffcal.calibration.posthoc.density_aware import DensityAwareCalibration, neighbour_distances
from diffcal.calibration.posthoc.gap_temperature import GapTemperatureScaling, soft_binned_error
from diffcal.calibration.posthoc.temperature import TemperatureScaling
from diffcal.errors import ConfigError, DataError


def gap_dependent(n, seed=0):
    """Logits whose right temperature grows with the gap of the top two."""
    generator = torch.Generator().manual_seed(seed)
    z = 4 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
    top = z.topk(2, dim=1).values
    t = 1 + 0.5 * (top[:, 0] - top[:, 1])
    y = torch.multinomial((z / t[:, None]).softmax(1), 1, generator=generator)[:, 0]
    return z, y


@pytest.mark.parametrize("criterion", ["soft_ece", "nll", "mse"])
def test_smart_learns_a_temperature_that_depends_on_the_gap(criterion):
    z, y = gap_dependent(4000)
    test_z, test_y = gap_dependent(4000, seed=1)
    made = GapTemperatureScaling(criterion=criterion, steps=200).fit(z, y)
    single = TemperatureScaling().fit(z, y)
    small, large = made.temperatures(torch.tensor([0.5, 8.0]).double()).tolist()
    assert large > 1.5 * small
    ece = [
        expected_calibration_error(Predictions(probs=m.predict_proba(test_z), labels=test_y), 15)
        for m in (made, single)
    ]
    assert ece[0] < 0.7 * ece[1]
    if criterion == "nll":
        data = FitData(Predictions(logits=test_z, labels=test_y))
        scores = [
            criterion_value(data, m.calibrated_logits(test_z).log_softmax(1), "nll")
            for m in (made, single)
        ]
        assert scores[0] < scores[1]


def test_soft_bins():
    # one bin: all shares are 1, the error is the gap of the means
    c = torch.tensor([0.9, 0.6, 0.7], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    value = soft_binned_error(c, y, 1)
    torch.testing.assert_close(value, (y.mean() - c.mean()).abs(), rtol=1e-12, atol=0)
    # far from edges bins are hard
    centres = torch.tensor([0.25, 0.75, 0.75], dtype=torch.float64)
    hard = (0.25 + abs(1.0 - 1.5)) / 3
    assert float(soft_binned_error(centres, torch.tensor([0.0, 1.0, 0.0]).double(), 2)) == (
        pytest.approx(hard, abs=1e-8)
    )
    assert torch.autograd.gradcheck(lambda x: soft_binned_error(x, y, 4), c)
    with pytest.raises(ConfigError, match="hidden"):
        GapTemperatureScaling(hidden=0)


def distance_dependent(n, seed=0):
    """Two layers; the right temperature grows with the distance from the origin in the second."""
    generator = torch.Generator().manual_seed(seed)
    z = 4 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    radius = torch.where(torch.rand(n, generator=generator) < 0.3, 12.0, 0.3).double()
    place = torch.nn.functional.normalize(
        torch.randn(n, 6, generator=generator, dtype=torch.float64), dim=1
    )
    h = torch.cat([noise, radius[:, None] * place], dim=1)
    t = torch.where(radius > 1, 4.0, 1.2)
    y = torch.multinomial((z / t[:, None]).softmax(1), 1, generator=generator)[:, 0]
    return z, y, h


def test_dac_finds_the_layer_that_matters():
    z, y, h = distance_dependent(1500)
    test_z, test_y, test_h = distance_dependent(1500, seed=1)
    made = DensityAwareCalibration(layers=(3, 6), criterion="nll").fit(z, y, features=h)
    weights = made.weights
    assert bool((weights >= 0).all())
    assert weights[2] > 4 * weights[1]
    single = TemperatureScaling().fit(z, y)
    data = FitData(Predictions(logits=test_z, labels=test_y))
    scores = [
        criterion_value(data, logits.log_softmax(1), "nll")
        for logits in (
            made.calibrated_logits(test_z, features=test_h),
            single.calibrated_logits(test_z),
        )
    ]
    assert scores[0] < scores[1] - 0.02
    # the temperature is the published sum
    s = torch.stack(
        [
            neighbour_distances(test_h[:5, :3], h[:, :3], 10),
            neighbour_distances(test_h[:5, 3:], h[:, 3:], 10),
        ],
        dim=1,
    )
    t = weights[0] + (s / made.units_) @ weights[1:]
    torch.testing.assert_close(
        made.calibrated_logits(test_z[:5], features=test_h[:5]), test_z[:5] / t[:, None]
    )


def test_dac_reference_and_bad_input():
    z, y, h = distance_dependent(60)
    brute = (h[:, None] - h).norm(dim=2).sort(dim=1).values
    torch.testing.assert_close(neighbour_distances(None, h, 3), brute[:, 3], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(neighbour_distances(h, h, 4), brute[:, 3], rtol=1e-9, atol=1e-6)
    train = distance_dependent(80, seed=4)[2]
    made = DensityAwareCalibration(neighbours=3).with_reference(train).fit(z, y, features=h)
    assert torch.equal(made.reference_, train)
    with pytest.raises(DataError, match="layers hold 5 columns, features 9"):
        DensityAwareCalibration(layers=(2, 3)).fit(z, y, features=h)
    with pytest.raises(DataError, match="at least 61 examples"):
        DensityAwareCalibration(neighbours=60).fit(z, y, features=h)
    with pytest.raises(DataError, match="reference features have 2 columns"):
        DensityAwareCalibration().with_reference(train[:, :2]).fit(z, y, features=h)
    with pytest.raises(ConfigError, match="numbers of columns"):
        DensityAwareCalibration(layers=(0, 3))
