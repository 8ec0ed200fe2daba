"""Quick paths for large CPU inputs against the plain ones: first reading, histogram, integer sort."""

import math

import numpy as np
import pytest
import torch

from diffcal.calibration.metrics import binning, exponentials, inputs, row_reading
from diffcal.calibration.metrics.inputs import Confidences, Predictions
from diffcal.calibration.metrics.profile import sort_with_order, sort_with_outcome
from diffcal.core import workers
from diffcal.errors import DataError


def plainly_read(monkeypatch, **given):
    def refuse(*_, **__):
        raise row_reading.Unreadable

    with monkeypatch.context() as patch:
        patch.setattr(inputs, "read_rows", refuse)
        return Predictions(**given)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [2, 10, 63, 64, 300])
@pytest.mark.parametrize("whole", [False, True])
def test_first_reading(monkeypatch, set_threads, dtype, k, whole):
    torch.manual_seed(k)
    z = torch.randn(400, k) * 4
    z = (z.round() if whole else z).to(dtype)  # whole numbers tie
    y = torch.randint(k, (400,))
    monkeypatch.setattr(row_reading, "BLOCK_ELEMENTS", 25 * k)
    monkeypatch.setattr(row_reading, "FEW_ELEMENTS", 25 * k)
    monkeypatch.setattr(row_reading, "MANY_ELEMENTS", 120 * k)
    monkeypatch.setattr(row_reading, "WORKER_ELEMENTS", 1)
    set_threads(3)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = ({"logits": z}, {"logits": z.t().contiguous().t()}, {"probs": z.to(kind).softmax(1)})
    for given in shapes:
        quick = Predictions(**given, labels=y)
        plain = plainly_read(monkeypatch, **given, labels=y)
        assert torch.equal(quick.predicted, plain.predicted)
        assert torch.equal(quick.outcome, plain.outcome)
        single = "logits" in given and dtype != torch.float64 and k >= 64
        far, near = (1e-5, 1e-6) if single else (1e-12, 1e-13)
        torch.testing.assert_close(quick.confidence, plain.confidence, rtol=near, atol=0)
        assert quick.mean_log_score == pytest.approx(plain.mean_log_score, rel=near)
        assert quick.mean_brier == pytest.approx(plain.mean_brier, rel=near)
        torch.testing.assert_close(quick.log_score, plain.log_score, rtol=far, atol=1e-15)
        torch.testing.assert_close(quick.brier, plain.brier, rtol=far, atol=1e-15)
        torch.testing.assert_close(quick.class_probs(1), plain.class_probs(1), rtol=far, atol=0)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 700 entries and chunks of 2,800, each of which pays for a thread."""
    for name, elements in (("BLOCK", 700), ("FEW", 700), ("MANY", 2800), ("WORKER", 1)):
        monkeypatch.setattr(row_reading, f"{name}_ELEMENTS", elements)


@pytest.fixture
def pools(monkeypatch):
    """Numbers of threads beside the calling one, of every pool that was opened."""
    opened, pool = [], workers.ThreadPoolExecutor

    def recorded(count):
        opened.append(count)
        return pool(count)

    monkeypatch.setattr(workers, "ThreadPoolExecutor", recorded)
    return opened


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [7, 70])
@pytest.mark.parametrize("kind", ["logits", "probs"])
@pytest.mark.parametrize("with_scores", [False, True])
def test_threads_change_no_bit(set_threads, pools, dtype, k, kind, with_scores):
    generator = torch.Generator().manual_seed(k)
    z = torch.randn(507, k, generator=generator) * 4
    z[200:300] *= 30  # rows whose exponentials leave the range of float32
    kept = torch.float32 if kind == "probs" and dtype == torch.bfloat16 else dtype
    given = {kind: z.to(kept) if kind == "logits" else z.softmax(1).to(kept)}
    y = torch.randint(k, (507,), generator=generator)
    seen = []
    for threads in (1, 2, 3):
        set_threads(threads)
        made = Predictions(**given, labels=y, with_scores=with_scores)
        means = torch.tensor([made.mean_log_score, made.mean_brier], dtype=torch.float64)
        rows = (made.confidence, made.outcome, made.predicted, made.log_score, made.brier)
        seen.append((means, *rows))
        assert set(pools) == ({threads - 1} if threads > 1 else set())  # one thread opens none
        pools.clear()
    for one, two, three in zip(*seen, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_few_entries_open_no_pool(set_threads, pools):
    set_threads(2)
    z, y = torch.randn(50_000, 10), torch.zeros(50_000, dtype=torch.int64)
    Predictions(logits=z, labels=y)
    assert pools == []
    Predictions(logits=z.repeat(3, 1), labels=y.repeat(3))
    assert pools == [1]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("k", [7, 70])
@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_errors_of_late_rows_are_clear_with_threads(set_threads, pools, k, kind):
    set_threads(3)
    z = torch.randn(507, k)
    y = torch.zeros(507, dtype=torch.int64)
    values = z if kind == "logits" else z.softmax(1)
    values[499, 5] = math.nan
    with pytest.raises(DataError, match=f"{kind} hold NaN .* the first is row 499"):
        Predictions(**{kind: values}, labels=y)
    assert pools == [2]


@pytest.mark.parametrize("by_numpy", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_numbers_have_equal_exponentials_wherever_they_lie(monkeypatch, by_numpy, dtype):
    monkeypatch.setattr(exponentials, "BY_NUMPY", by_numpy)
    z = np.linspace(-80, 5, 300, dtype=dtype)
    whole = np.empty_like(z)
    exponentials.exponentials(z, whole)
    np.testing.assert_allclose(whole, np.exp(z.astype(np.float64)), rtol=50 * np.finfo(dtype).eps)
    for start, end in ((0, 1), (0, 7), (1, 12), (3, 34), (5, 300)):
        part = z[start:end].copy()
        exponentials.exponentials(part, part)
        np.testing.assert_array_equal(part, whole[start:end])


@pytest.mark.parametrize("by_numpy", [True, False])
@pytest.mark.parametrize("k", [64, 200, 5000])
def test_single_precision_is_as_good_as_its_logits(monkeypatch, by_numpy, k):
    monkeypatch.setattr(exponentials, "BY_NUMPY", by_numpy)
    monkeypatch.setattr(row_reading, "BLOCK_ELEMENTS", 10 * k)
    generator = torch.Generator().manual_seed(k)
    z = torch.randn(120, k, generator=generator)
    # from flat to certain rows, far from 0 on either side, and beyond what exp takes in float32
    z *= torch.tensor([0.01, 1.0, 4.0, 20.0, 300.0, 1e5]).repeat(20)[:, None]
    for offset in (0.0, 50.0, -50.0, 1e4):
        logits = z + offset
        y = torch.where(torch.arange(120) % 2 == 0, logits.argmax(1), torch.arange(120) % k)
        made = Predictions(logits=logits, labels=y)
        exact = logits.double()
        gaps = exact - exact.amax(1, keepdim=True)
        others = gaps.exp().scatter_(1, exact.argmax(1, keepdim=True), 0).sum(1)
        far = 2.0**-24 * (16 + 2 * logits.abs().clamp(max=100).amax(1))

        def within(value, wanted, far=far):
            return bool(((value - wanted).abs() <= far * wanted.abs() + 1e-36).all())

        assert within(made.confidence, 1 / (1 + others))
        miss = others / (1 + others)
        right = made.outcome == 1
        assert within(1 - made.confidence, miss, far + 2e-16 / miss.clamp(min=1e-300))
        log_score = others.log1p() - gaps.gather(1, y[:, None])[:, 0]
        assert within(made.log_score, log_score)
        assert within(made.brier[~right], exact_brier(gaps, y)[~right], far[~right])
        assert bool((made.log_score[right] > 0).any())  # not rounded away beside 1


def exact_brier(gaps, y):
    p = gaps.softmax(1)
    return (p - torch.nn.functional.one_hot(y, p.shape[1])).square().sum(1)


@pytest.mark.parametrize("k", [10, 300])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38])
def test_one_logit_is_seen_wherever_it_lies(monkeypatch, k, value):
    monkeypatch.setattr(row_reading, "BLOCK_ELEMENTS", 10 * k)
    for row, column in ((0, 0), (67, k // 2), (149, k - 1)):
        z = torch.randn(150, k)
        z[row, column] = value
        y = torch.zeros(150, dtype=torch.int64)
        if math.isfinite(value):
            made, plain = Predictions(logits=z, labels=y), Predictions(logits=z.double(), labels=y)
            torch.testing.assert_close(made.confidence, plain.confidence, rtol=1e-6, atol=0)
            torch.testing.assert_close(made.log_score, plain.log_score, rtol=1e-6, atol=1e-300)
            continue
        for with_scores in (True, False):
            with pytest.raises(DataError, match=f"the first is row {row}"):
                Predictions(logits=z, labels=y, with_scores=with_scores)


@pytest.mark.parametrize("k", [10, 100, 5000])
@pytest.mark.parametrize("kind", ["logits", "probs"])
def test_equal_rows_have_equal_confidences_to_the_bit(k, kind):
    row = torch.randn(1, k, generator=torch.Generator().manual_seed(k)) * 3
    rows = (row if kind == "logits" else row.softmax(1)).expand(203, k).contiguous()
    logits, probs = (rows, None) if kind == "logits" else (None, rows)
    made = Predictions(logits=logits, probs=probs, labels=torch.zeros(203, dtype=torch.int64))
    assert len(made.confidence.unique()) == 1


@pytest.mark.parametrize(
    ("k", "dtype"), [(10, torch.float32), (10, torch.float64), (100, torch.float64)]
)
def test_a_shift_of_a_row_keeps_its_confidence_to_the_bit(k, dtype):
    z = torch.randn(50, k, generator=torch.Generator().manual_seed(k)).mul(8).round().to(dtype)
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
