"""Feature Clipping: hooks on models, the accuracy floor, identities."""

import math

import pytest
import torch
from torch import nn

from diffcal.calibration.posthoc.feature_clipping import FeatureClipping
from diffcal.calibration.posthoc.last_layer import attach_clipping, captured_features, linear_head
from diffcal.errors import ConfigError, DataError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 7), nn.ReLU())
        self.head = nn.ModuleDict({"fc": nn.Linear(7, 3)})

    def forward(self, x):
        return self.head["fc"](self.body(x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double()


def drawn(net, n=200):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64) * 3
    with torch.no_grad(), captured_features(net, "head.fc") as seen:
        z = torch.cat([net(part) for part in x.split(64)])
    y = torch.multinomial((z / 2).softmax(1), 1, generator=generator)[:, 0]
    return x, z, torch.cat(seen), y


def test_hook_and_calibrator_agree(net):
    x, z, h, y = drawn(net)
    weight, bias = linear_head(net, "head.fc")
    torch.testing.assert_close(h @ weight.T + bias, z)
    made = FeatureClipping(min_accuracy_ratio=0.5).of_model(net, "head.fc").fit(z, y, features=h)
    assert 0 < made.threshold < float(h.max())
    with torch.no_grad():
        with made.attach(net, "head.fc"):
            inside = net(x)
        after = net(x)
    torch.testing.assert_close(inside, made.calibrated_logits(z, features=h))
    assert torch.equal(after, net(x))
    torch.testing.assert_close(after, z)
    assert not net.head["fc"]._forward_pre_hooks


def test_limits(net):
    x, z, h, y = drawn(net)
    made = FeatureClipping().of_model(net, "head.fc").fit(z, y, features=h)
    made.threshold_ = h.max()
    assert torch.equal(made.calibrated_logits(z, features=h), z)  # bit for bit
    with torch.no_grad(), attach_clipping(net, "head.fc", 1e-12):
        torch.testing.assert_close(net(x), net.head["fc"].bias.expand_as(z), rtol=0, atol=1e-9)


def test_accuracy_floor(net):
    _, z, h, y = drawn(net)
    for ratio in (0.5, 0.99, 1.0):
        made = FeatureClipping(criterion="ece", min_accuracy_ratio=ratio)
        made.of_model(net, "head.fc").fit(z, y, features=h)
        accuracy = (made.predict_proba(z, features=h).argmax(1) == y).double().mean()
        assert float(accuracy) >= ratio * float((z.argmax(1) == y).double().mean())


def test_calibrated_data_stay(net):
    _, z, h, _ = drawn(net)
    made = FeatureClipping().of_model(net, "head.fc").fit(z, soft_labels=z.softmax(1), features=h)
    # nothing fits labels of the model's own law better than the model
    assert made.threshold >= float(h.max()) or math.isinf(made.threshold)
    torch.testing.assert_close(made.predict_proba(z, features=h), z.softmax(1))


def test_errors(net):
    _, z, h, y = drawn(net, 20)
    with pytest.raises(ConfigError, match=r"'head\.fc'"):
        FeatureClipping().of_model(net, "fc")
    with pytest.raises(DataError, match="another model"):
        FeatureClipping().of_model(net, "head.fc").fit(z + 5, y, features=h)
    with pytest.raises(DataError, match="head must be"):
        FeatureClipping().of_model(net, "head.fc").fit(z, y, features=h[:, :3])
    with pytest.raises(ConfigError, match="positive"):
        attach_clipping(net, "head.fc", 0.0)
