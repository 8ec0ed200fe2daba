"""Accumulators: batches, merging and processes change nothing; exact where promised."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcal.calibration.metrics.streaming import (
    APPROXIMATE_MEASURES,
    STREAMING_MEASURES,
    CalibrationAccumulator,
)
from diffcal.calibration.metrics.summary import evaluate
from diffcal.errors import ConfigError, DataError


def batch(n=4000, k=5, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, k, generator=generator, dtype=torch.float64) * scale
    y = torch.multinomial((z / 1.5).softmax(1), 1, generator=generator)[:, 0]
    return z, y


def filled(z, sizes, **labels):
    accumulator = CalibrationAccumulator(z.shape[1])
    for rows in torch.arange(len(z)).split(sizes):
        accumulator.update(logits=z[rows], **{key: v[rows] for key, v in labels.items()})
    return accumulator


@pytest.mark.parametrize("scale", [0.5, 2.0, 12.0])
@pytest.mark.parametrize("soft", [False, True])
def test_streaming_equals_the_whole(scale, soft):
    z, y = batch(scale=scale)
    labels = {"soft_labels": (z / 1.4).softmax(1)} if soft else {"labels": y}
    values = filled(z, 700, **labels).compute()
    whole = evaluate(logits=z, **labels, measures=list(STREAMING_MEASURES)).values_only
    assert values.pop("n") == len(z)
    assert set(values) == set(STREAMING_MEASURES)
    for name, value in values.items():
        # a cell is at most 1.3e-4 wide; equal-mass bins may take or leave whole cells
        tolerance = 1e-3 if name in APPROXIMATE_MEASURES else 1e-12
        assert value == pytest.approx(whole[name], abs=tolerance), name


@given(st.integers(1, 59), st.lists(st.integers(1, 30), min_size=1, max_size=4))
@settings(deadline=None, max_examples=20)
def test_merging_equals_one_stream(cut, sizes):
    z, y = batch(n=60)
    one = filled(z, 60, labels=y)
    first, second = filled(z[:cut], sizes[0], labels=y[:cut]), CalibrationAccumulator(5)
    second.update(logits=z[cut:], labels=y[cut:])
    first.merge(second)
    assert len(first) == 60
    for name, tensor in one.state.items():
        torch.testing.assert_close(first.state[name], tensor, rtol=1e-12, atol=1e-12)


def test_state_does_not_grow():
    accumulator = CalibrationAccumulator(5)
    size = sum(tensor.numel() for tensor in accumulator.state.values())
    for seed in range(3):
        accumulator.update(logits=batch(seed=seed)[0], labels=batch(seed=seed)[1])
    assert sum(tensor.numel() for tensor in accumulator.state.values()) == size
    assert len(accumulator) == 12_000
    accumulator.all_reduce()  # one process: nothing happens
    assert len(accumulator) == 12_000


def test_misuse_is_refused():
    accumulator = CalibrationAccumulator(5)
    with pytest.raises(DataError, match="empty set"):
        accumulator.compute()
    with pytest.raises(DataError, match="5 classes, the batch 3"):
        accumulator.update(logits=torch.zeros(2, 3), labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="cannot merge"):
        accumulator.merge(CalibrationAccumulator(4))
    with pytest.raises(ConfigError, match="classes >= 2"):
        CalibrationAccumulator(1)
