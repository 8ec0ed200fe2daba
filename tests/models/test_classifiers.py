"""Classifier architectures: known parameter counts, features, sizes, names."""

import pytest
import torch

from diffcal.errors import ConfigError
from diffcal.models.registry import CLASSIFIERS, build_classifier
from diffcal.models.resnet import ThinResNet, _PaddedSubsampling
from diffcal.models.wide_resnet import WideResNet

# Counts of published implementations with these stems (10 classes unless said).
KNOWN = [
    ("resnet20", 10, 32, 269_722),
    ("resnet32", 10, 32, 464_154),
    ("resnet56", 10, 32, 853_018),
    ("resnet110", 10, 32, 1_727_962),
    ("resnet18", 10, 32, 11_173_962),
    ("resnet34", 10, 32, 21_282_122),
    ("resnet50", 10, 32, 23_520_842),
    ("resnet101", 10, 32, 42_512_970),
    ("resnet18", 1000, 224, 11_689_512),
    ("resnet50", 1000, 224, 25_557_032),
    ("wrn-16-4", 10, 32, 2_748_890),
    ("wrn-28-10", 10, 32, 36_479_194),
    ("wrn-28-10", 100, 32, 36_536_884),
    ("densenet121", 10, 32, 6_956_298),
]


@pytest.mark.parametrize(("name", "classes", "size", "count"), KNOWN)
def test_parameter_counts(name, classes, size, count):
    with torch.device("meta"):
        model = build_classifier(name, classes, 3, size)
    assert sum(p.numel() for p in model.parameters()) == count


EVERY = [(name, 1, 8) for name in sorted(CLASSIFIERS)]
LARGER = [
    (name, 3, size)
    for name in ("cnn-medium", "resnet20", "resnet50", "wrn-16-4", "densenet121")
    for size in (32, 64, 96)
]


@pytest.mark.parametrize(("name", "channels", "size"), EVERY + LARGER)
def test_shapes_on_every_size(name, channels, size):
    with torch.device("meta"):
        model = build_classifier(name, 7, channels, size)
        x = torch.empty(2, channels, size, size)
    features = model.forward_features(x)
    assert features.shape == (2, model.fc.in_features)
    assert model(x).shape == (2, 7)
    assert model.fc.out_features == 7


@pytest.mark.parametrize("name", ["cnn-tiny", "resnet8", "resnet18", "wrn-16-4"])
def test_logits_are_fc_of_features_in_both_memory_formats(name):
    torch.manual_seed(0)
    model = build_classifier(name, 5, 3, 16).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x), model.fc(model.forward_features(x)), rtol=0, atol=0)
    expected = model(x).detach()
    model.to(memory_format=torch.channels_last)
    last = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-4)


def test_depths():
    with torch.device("meta"):
        thin = ThinResNet(3, num_classes=10)
        wide = build_classifier("wrn-26-10", 10)
    convolutions = [m for m in thin.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) + 1 == 20
    convolutions = [
        m for m in wide.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert len(convolutions) + 1 == 26


def test_parameter_free_shortcut_keeps_values():
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    out = _PaddedSubsampling(2, 2)(x)
    assert out.shape == (1, 4, 2, 2)
    torch.testing.assert_close(out[:, 1:3], x[:, :, ::2, ::2], rtol=0, atol=0)
    assert (out[:, [0, 3]] == 0).all()
    last = _PaddedSubsampling(2, 2)(x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_wrn_26_10_by_hand():
    # three stages of four blocks: 3x3 convolutions, 1x1 shortcuts, BatchNorm pairs, stem, head
    count = 3 * 16 * 9 + 2 * 16 + 640 * 10 + 10
    for before, width in ((16, 160), (160, 320), (320, 640)):
        count += 9 * before * width + 7 * 9 * width * width + before * width + 9 * 2 * width
    with torch.device("meta"):
        model = build_classifier("wrn-26-10", 10)
    assert sum(p.numel() for p in model.parameters()) == count


def test_same_seed_same_weights():
    torch.manual_seed(3)
    one = build_classifier("cnn-tiny", 10, 1, 8)
    torch.manual_seed(3)
    two = build_classifier("cnn-tiny", 10, 1, 8)
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("resnet-50", 10, 3, 32), "did you mean 'resnet50'"),
        (("WRN-28-10", 10, 3, 32), "did you mean 'wrn-28-10'"),
        (("qqq", 10, 3, 32), "known: cnn-tiny"),
        (("resnet20", 1, 3, 32), "at least 2 classes"),
    ],
)
def test_bad_names_and_sizes(args, words):
    with pytest.raises(ConfigError, match=words):
        build_classifier(*args)
    with pytest.raises(ConfigError, match="6 n"):
        WideResNet(27, 10, num_classes=10)
