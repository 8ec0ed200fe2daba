"""What metrics accept, and that bad input gives an error and never a number."""

import math

import numpy as np
import pytest
import torch

from diffcal.calibration.metrics.classwise import group_calibration_errors
from diffcal.calibration.metrics.inputs import Confidences, Predictions
from diffcal.calibration.metrics.ood import ood_scores
from diffcal.calibration.metrics.proper import negative_log_likelihood
from diffcal.calibration.metrics.summary import calibration_summary, evaluate, measure
from diffcal.errors import ConfigError, DataError

LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5], [0.3, 0.2, 0.1]])
LABELS = torch.tensor([0, 2, 1])


def changed(value, row=1, column=2):
    z = LOGITS.clone()
    z[row, column] = value
    return z


BAD = {
    "nan logits": ({"logits": changed(math.nan), "labels": LABELS}, "NaN or infinite.*row 1"),
    "inf logits": ({"logits": changed(math.inf), "labels": LABELS}, "NaN or infinite.*row 1"),
    "-inf logits": ({"logits": changed(-math.inf), "labels": LABELS}, "NaN or infinite.*row 1"),
    "nan probs": ({"probs": changed(math.nan).abs(), "labels": LABELS}, "NaN or infinite"),
    "label too large": ({"logits": LOGITS, "labels": torch.tensor([0, 1, 3])}, "labels run from 0"),
    "label negative": ({"logits": LOGITS, "labels": torch.tensor([0, 1, -1])}, "from -1 to 1"),
    "float labels": ({"logits": LOGITS, "labels": LABELS.float()}, "labels must be integers"),
    "label count": ({"logits": LOGITS, "labels": LABELS[:2]}, r"shape \[3\]"),
    "logits as probs": ({"probs": LOGITS, "labels": LABELS}, "logits go to logits="),
    "positive logits as probs": ({"probs": LOGITS + 5, "labels": LABELS}, "sum to 1"),
    "one class": ({"logits": LOGITS[:, :1], "labels": LABELS * 0}, "1 class"),
    "empty": ({"logits": LOGITS[:0], "labels": LABELS[:0]}, "no examples"),
    "integer logits": ({"logits": LOGITS.long(), "labels": LABELS}, "floating"),
    "both scores": ({"logits": LOGITS, "probs": LOGITS, "labels": LABELS}, "exactly one of logits"),
    "no labels": ({"logits": LOGITS}, "exactly one of labels"),
    "soft labels sum": ({"logits": LOGITS, "soft_labels": LOGITS.abs()}, "soft_labels must sum"),
    "soft labels sign": ({"logits": LOGITS, "soft_labels": LOGITS}, "must not be negative"),
    "soft labels shape": ({"logits": LOGITS, "soft_labels": LOGITS[:2]}, "shape"),
    "soft labels nan": ({"logits": LOGITS, "soft_labels": LOGITS * math.nan}, "NaN"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    inputs, message = BAD[name]
    with pytest.raises(DataError, match=message):
        Predictions(**inputs)
    with pytest.raises(DataError, match=message):
        calibration_summary(**inputs)


def test_the_first_bad_row_is_named_beyond_the_first_block():
    z = torch.zeros(70_000, 10)
    z[68_123, 4] = math.nan
    with pytest.raises(DataError, match="row 68123"):
        Predictions(logits=z, labels=torch.zeros(70_000, dtype=torch.int64))


def test_finite_logits_whose_sum_overflows_are_fine():
    z = torch.full((2, 3), 1e308, dtype=torch.float64)
    z[:, 0] = -1e308
    p = Predictions(logits=z, labels=torch.tensor([1, 2]))
    torch.testing.assert_close(p.confidence, torch.full((2,), 0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("confidence", "outcome", "message"),
    [
        ([0.2, 1.2], [0, 1], "confidence must lie"),
        ([0.2, math.nan], [0, 1], "confidence must lie"),
        ([0.2, 0.3], [0, 2], "outcome must lie"),
        ([], [], "no examples"),
        ([0.2], [0, 1], "one length"),
    ],
)
def test_bad_confidences_are_refused(confidence, outcome, message):
    with pytest.raises(DataError, match=message):
        Confidences(torch.tensor(confidence), torch.tensor(outcome))


def test_probabilities_within_a_thousandth_pass_and_renormalize_divides():
    p = torch.tensor([[0.6003, 0.4], [0.3, 0.7]], dtype=torch.float64)
    y = torch.tensor([0, 1])
    assert float(Predictions(probs=p, labels=y).confidence[0]) == 0.6003
    scaled = Predictions(probs=p * 7, labels=y, renormalize=True)
    torch.testing.assert_close(scaled.confidence[0], p[0, 0] / p[0].sum())
    with pytest.raises(DataError, match="sums to 7"):
        Predictions(probs=p * 7, labels=y)


def test_numpy_arrays_and_inputs_left_alone():
    z, y = LOGITS.double().numpy().copy(), LABELS.numpy()
    before = z.copy()
    summary = calibration_summary(logits=z, labels=y)
    np.testing.assert_array_equal(z, before)
    from_tensors = calibration_summary(logits=LOGITS.double(), labels=LABELS)
    assert summary == pytest.approx(from_tensors, abs=0, nan_ok=True)
    p = Predictions(logits=z, labels=y)
    p.class_probs(0), p.probs()
    evaluate(p, measures="all")
    np.testing.assert_array_equal(z, before)


def test_probability_zero_at_the_label_is_infinite_unless_floored():
    inputs = {"probs": torch.tensor([[1.0, 0.0]]), "labels": torch.tensor([1])}
    assert math.isinf(negative_log_likelihood(Predictions(**inputs)))
    floored = negative_log_likelihood(Predictions(**inputs, eps=1e-4))
    assert floored == pytest.approx(-math.log(1e-4))


def test_float32_confidences_on_an_edge_stay_in_the_lower_bin():
    # 0.6 in float32 exceeds the float64 edge; logits in float32 decide in float64
    z = torch.log(torch.tensor([[0.6, 0.4]], dtype=torch.float64))
    a = Predictions(logits=z, labels=torch.tensor([0]))
    assert abs(float(a.confidence[0]) - 0.6) < 1e-15


def test_lowest_index_wins_ties():
    p = Predictions(logits=torch.zeros(1, 4), labels=torch.tensor([0]))
    assert int(p.predicted[0]) == 0
    assert float(p.outcome[0]) == 1


def test_unknown_names_and_options():
    inputs = {"logits": LOGITS, "labels": LABELS}
    with pytest.raises(ConfigError, match="did you mean"):
        measure("smec", **inputs)
    with pytest.raises(ConfigError, match="no option 'bins'"):
        measure("ece", **inputs, bins=3)
    with pytest.raises(ConfigError, match="n_bins must be a whole number of at least 1"):
        measure("ece", **inputs, n_bins=0)
    with pytest.raises(DataError, match="temperature="):
        measure("post_ECE_15", **inputs)
    with pytest.raises(DataError, match="ood_logits="):
        measure("auc_svhn", **inputs)
    with pytest.raises(DataError, match="need soft_labels"):
        measure("kl", **inputs)
    with pytest.raises(DataError, match="all classes"):
        measure("cw_ece", Confidences(torch.tensor([0.4]), torch.tensor([1])))
    with pytest.raises(DataError, match="not both"):
        measure("ece", Predictions(**inputs), labels=LABELS)
    with pytest.raises(ConfigError, match="width and mass"):
        measure("noise_floor", **inputs, scheme="rank")


def test_benchmark_names_by_measure():
    inputs = {"logits": LOGITS, "labels": LABELS}
    assert (
        measure("pre_ECE_15", **inputs) == measure("ECE_15", **inputs) == measure("ece", **inputs)
    )
    assert measure("post_NLL", **inputs, temperature=2.0) == pytest.approx(
        measure("nll", logits=LOGITS / 2, labels=LABELS), abs=1e-7
    )
    assert measure("auc_svhn", **inputs, ood_logits=torch.zeros(4, 3)) == 1.0


def test_undefined_values_say_so():
    report = evaluate(logits=LOGITS[:1], labels=LABELS[:1])
    assert math.isnan(report["auroc"].value)
    assert report["auroc"].note == "undefined for these data"
    assert report.to_dict()["auroc"]["value"] is None


@pytest.mark.parametrize("k", [3, 256, 1003])
def test_first_largest_entry_of_wide_rows_with_many_ties(k):
    z = (torch.randn(200, k, generator=torch.Generator().manual_seed(k)) * 2).round()
    z[0] = 0
    p = Predictions(logits=z, labels=torch.zeros(200, dtype=torch.int64))
    np.testing.assert_array_equal(p.predicted.numpy(), z.numpy().argmax(axis=1))
    expected = z.double().softmax(1).max(dim=1).values
    torch.testing.assert_close(p.confidence, expected, rtol=1e-6, atol=0)


def test_a_confidence_that_rounding_put_above_one_counts_as_one():
    above = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    scores = Confidences(torch.stack([above, above - 0.5]), torch.tensor([1, 0]))
    assert float(scores.confidence.max()) == 1
    with pytest.raises(DataError, match=r"from 0 to 1\.00001"):
        Confidences(torch.tensor([0, 1.00001]), torch.tensor([1, 0]))


def test_arrays_that_torch_cannot_hold_give_the_values_of_those_it_can():
    z, y = LOGITS.double().numpy(), LABELS.numpy()
    expected = calibration_summary(logits=z, labels=y)
    given = calibration_summary(logits=z.astype(">f8")[::-1], labels=y.astype(np.uint16)[::-1])
    assert given == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_groups_are_one_integer_for_each_example():
    predictions = Predictions(logits=LOGITS, labels=LABELS)
    found = group_calibration_errors(predictions, np.array([7, 7, 9], dtype=np.uint16))
    assert {index: row["count"] for index, row in found.items()} == {7: 2, 9: 1}
    for groups in (np.array([0.5, 0.7, 1.0]), np.array([0, 1]), np.zeros((3, 1), dtype=int)):
        with pytest.raises(DataError, match=r"groups must be integers \[3\]"):
            group_calibration_errors(predictions, groups)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_scores_of_outsiders_need_a_positive_temperature(temperature):
    with pytest.raises(ConfigError, match="temperature must be positive"):
        ood_scores(logits=LOGITS, score="energy", temperature=temperature)


def test_probabilities_and_soft_labels_that_were_cast_to_bfloat16_are_taken():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(400, 30, generator=generator).mul(3)
    q = torch.randn(400, 30, generator=generator).mul(3).softmax(dim=1)
    half = q.bfloat16()
    assert (half.double().sum(dim=1) - 1).abs().max() > 1e-3  # or this tests nothing
    exact = negative_log_likelihood(Predictions(logits=z, soft_labels=q))
    found = negative_log_likelihood(Predictions(logits=z, soft_labels=half))
    assert found == pytest.approx(exact, rel=3e-3)
    probs = Predictions(probs=half, labels=torch.zeros(400, dtype=torch.int64))
    assert probs.mean_outcome == float((half.argmax(dim=1) == 0).double().mean())
    wrong = half.clone()
    wrong[7] *= 1.02
    with pytest.raises(DataError, match=r"soft_labels must sum to 1 within 0\.0049.*: row 7 sums"):
        Predictions(logits=z, soft_labels=wrong)
