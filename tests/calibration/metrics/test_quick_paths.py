"""Quick paths for large CPU inputs against the plain ones: first reading, histogram, integer sort."""

import pytest
import torch

from diffcal.calibration.metrics import binning, inputs, row_reading
from diffcal.calibration.metrics.inputs import Confidences, Predictions
from diffcal.calibration.metrics.profile import sort_with_order, sort_with_outcome


def plainly_read(monkeypatch, **given):
    def refuse(*_, **__):
        raise row_reading.Unreadable

    with monkeypatch.context() as patch:
        patch.setattr(inputs, "read_rows", refuse)
        return Predictions(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [2, 10, 63, 64, 300])
@pytest.mark.parametrize("whole", [False, True])
def test_first_reading(monkeypatch, dtype, k, whole):
    torch.manual_seed(k)
    z = torch.randn(400, k) * 4
    z = (z.round() if whole else z).to(dtype)  # whole numbers tie
    y = torch.randint(k, (400,))
    monkeypatch.setattr(row_reading, "BLOCK_ELEMENTS", 50 * k)
    monkeypatch.setattr(row_reading.torch, "get_num_threads", lambda: 3)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = ({"logits": z}, {"logits": z.t().contiguous().t()}, {"probs": z.to(kind).softmax(1)})
    for given in shapes:
        quick = Predictions(**given, labels=y)
        plain = plainly_read(monkeypatch, **given, labels=y)
        assert torch.equal(quick.predicted, plain.predicted)
        assert torch.equal(quick.outcome, plain.outcome)
        torch.testing.assert_close(quick.confidence, plain.confidence, rtol=1e-14, atol=0)
        assert quick.mean_log_score == pytest.approx(plain.mean_log_score, rel=1e-13)
        assert quick.mean_brier == pytest.approx(plain.mean_brier, rel=1e-13)
        torch.testing.assert_close(quick.log_score, plain.log_score, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(quick.brier, plain.brier, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(quick.class_probs(1), plain.class_probs(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [10, 100])
def test_a_shift_of_a_row_keeps_its_confidence_to_the_bit(k):
    z = torch.randn(50, k, generator=torch.Generator().manual_seed(k)).mul(8).round()
    y = torch.zeros(50, dtype=torch.int64)
    shifted = z + torch.arange(50)[:, None]
    one, two = (Predictions(logits=logits, labels=y).confidence for logits in (z, shifted))
    assert torch.equal(one, two)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", ["spread", "near 1", "nearer 1", "tied", "ones", "ends", "tiny"])
def test_histogram_gives_the_sums_of_single_examples(monkeypatch, shape, soft):
    u = torch.rand(3000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    c = {
        "spread": u,
        "near 1": 1 - u**6,
        "nearer 1": 1 - u**80,
        "tied": (u * 20).round() / 20,
        "ones": torch.ones_like(u),
        "ends": u.round(),
        "tiny": u * 1e-12,
    }[shape]
    right = u.flip(0) < 0.7
    for n_bins in (1, 2, 15, 333):
        for scheme in ("width", "mass"):
            sums = []
            for start in (1, 10**9):
                monkeypatch.setattr(binning, "HISTOGRAM_FROM", start)
                scores = Confidences(c, u.flip(0) if soft else right)
                if not soft:
                    scores._outcome = right  # as predictions keep hard outcomes
                sums.append(binning.bin_sums(scores, n_bins, scheme))
            quick, plain = sums
            assert torch.equal(quick.edges, plain.edges)
            assert torch.equal(quick.count, plain.count)
            torch.testing.assert_close(quick.confidence, plain.confidence, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(quick.outcome, plain.outcome, rtol=1e-12, atol=1e-12)


def test_sorting_confidences_and_outcomes_as_one_number():
    c = torch.tensor([0.5, 1.0, 0.0, -0.0, 0.25, 1 + 2e-16, 0.5], dtype=torch.float64)
    right = torch.tensor([True, False, True, False, True, True, False])
    values, hits = sort_with_outcome(c, right)
    assert torch.equal(values, sort_with_order(c)[0])
    assert hits.tolist() == [0, 1, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("k", [5, 100])
def test_soft_labels_have_the_ties_of_hard_ones(k):
    # rows that are rearrangements of each other tie or not by the order in which they are summed
    generator = torch.Generator().manual_seed(k)
    row = torch.randn(k, generator=generator, dtype=torch.float64).mul(2).round()
    z = torch.stack([row[torch.randperm(k, generator=generator)] for _ in range(200)])
    y = torch.randint(k, (200,), generator=generator)
    one_hot = torch.nn.functional.one_hot(y, k).double()
    hard, soft = Predictions(logits=z, labels=y), Predictions(logits=z, soft_labels=one_hot)
    assert torch.equal(hard.confidence, soft.confidence)
    assert torch.equal(hard.outcome, soft.outcome)
    assert torch.equal(hard.class_probs(1), soft.class_probs(1))
    assert hard.mean_brier == pytest.approx(soft.mean_brier, rel=1e-13)
    assert hard.mean_log_score == pytest.approx(soft.mean_log_score, rel=1e-13)
