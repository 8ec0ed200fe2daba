"""The same numbers as netcal, torchmetrics and scikit-learn where conventions agree.

Where they do not: netcal bins are [lower, upper) and torchmetrics puts exact ones into a bin of
their own, which only shows for confidences on an edge (``compat`` reproduces both); torchmetrics
computes in float32; scikit-learn clips probabilities in its log loss.
"""

import numpy as np
import pytest
import torch

from diffcal.calibration.metrics import binned, kernel, ood, proper, selective
from diffcal.calibration.metrics.inputs import Predictions
from diffcal.calibration.metrics.reliability import reliability_curve


@pytest.fixture(scope="module")
def p():
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3000, 7, generator=generator, dtype=torch.float64) * 2
    y = torch.multinomial((z / 1.7).softmax(1), 1, generator=generator)[:, 0]
    return Predictions(logits=z, labels=y)


@pytest.mark.filterwarnings("ignore")
def test_netcal(p):
    metrics = pytest.importorskip("netcal.metrics")
    probs, labels = p.probs().numpy(), p.labels.numpy()
    for bins in (10, 15, 50):
        ece = metrics.ECE(bins).measure(probs, labels)
        assert binned.expected_calibration_error(p, bins) == pytest.approx(ece, abs=1e-12)
        mce = metrics.MCE(bins).measure(probs, labels)
        assert binned.maximum_calibration_error(p, bins) == pytest.approx(mce, abs=1e-12)
        average = metrics.ACE(bins).measure(probs, labels)
        assert binned.average_calibration_error(p, bins) == pytest.approx(average, abs=1e-12)
    small = p.select(torch.arange(300))
    peer = metrics.MMCE().measure(probs[:300], labels[:300])
    assert kernel.maximum_mean_calibration_error(small) == pytest.approx(peer, abs=1e-10)


def test_torchmetrics(p):
    classification = pytest.importorskip("torchmetrics.functional.classification")
    for norm, ours in (
        ("l1", binned.expected_calibration_error),
        ("l2", binned.root_mean_square_calibration_error),
        ("max", binned.maximum_calibration_error),
    ):
        peer = classification.multiclass_calibration_error(p.probs(), p.labels, 7, 15, norm)
        assert ours(p) == pytest.approx(float(peer), abs=2e-6), norm
    accuracy = classification.multiclass_accuracy(p.scores, p.labels, 7, average="micro")
    assert p.mean_outcome == pytest.approx(float(accuracy), abs=1e-6)


def test_scikit_learn(p):
    metrics = pytest.importorskip("sklearn.metrics")
    calibration = pytest.importorskip("sklearn.calibration")
    probs, labels = p.probs().numpy(), p.labels.numpy()
    nll = metrics.log_loss(labels, probs)
    assert proper.negative_log_likelihood(p) == pytest.approx(nll, abs=1e-12)
    one_hot = np.eye(7)[labels]
    assert proper.brier_score(p) == pytest.approx(((probs - one_hot) ** 2).sum(1).mean(), abs=1e-14)
    auroc = metrics.roc_auc_score(p.outcome.numpy(), p.confidence.numpy())
    assert selective.auroc_of_confidence(p) == pytest.approx(auroc, abs=1e-12)
    curve = reliability_curve(p, 15)
    filled = curve.count > 0
    frequency, confidence = calibration.calibration_curve(
        p.outcome.numpy(), p.confidence.numpy(), n_bins=15
    )
    np.testing.assert_allclose(curve.accuracy[filled].numpy(), frequency, atol=1e-12)
    np.testing.assert_allclose(curve.confidence[filled].numpy(), confidence, atol=1e-12)
    inside, outside = p.confidence[:900], p.confidence[900:].square()
    score = np.concatenate([inside.numpy(), outside.numpy()])
    label = np.concatenate([np.ones(900), np.zeros(2100)])
    assert ood.ood_auroc(inside, outside) == pytest.approx(metrics.roc_auc_score(label, score))
    peer = metrics.average_precision_score(label, score)
    assert ood.average_precision(inside, outside) == pytest.approx(peer, abs=1e-12)
    peer = metrics.average_precision_score(1 - label, -score)
    assert ood.average_precision(-outside, -inside) == pytest.approx(peer, abs=1e-12)
