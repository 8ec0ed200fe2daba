import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffcal.diffusion.soft_class_embedding import SoftEmbedding, SoftLabelEmbedding


@pytest.fixture
def table():
    torch.manual_seed(0)
    return nn.Embedding(7, 5)


def test_integers_pass_bit_for_bit(table):
    labels = torch.tensor([3, 0, 6, 3])
    assert torch.equal(SoftEmbedding(table)(labels), table(labels))


def test_one_hot_rows_are_the_rows_of_the_table(table):
    assert torch.equal(SoftEmbedding(table)(torch.eye(7)), table.weight)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=7, max_size=7), st.floats(0, 1))
def test_weights_mix_linearly(first, share):
    torch.manual_seed(0)
    soft = SoftEmbedding(nn.Embedding(7, 5))
    a, b = torch.tensor([first]), torch.eye(7)[2:3]
    mixed = soft(share * a + (1 - share) * b)
    torch.testing.assert_close(mixed, share * soft(a) + (1 - share) * soft(b), atol=1e-5, rtol=0)


def test_parameter_is_shared_under_its_own_name(table):
    soft = SoftEmbedding(table)
    assert soft.weight is table.weight
    assert list(soft.state_dict()) == ["weight"]
    soft(torch.tensor([[0.25, 0.75, 0, 0, 0, 0, 0]])).sum().backward()
    torch.testing.assert_close(
        table.weight.grad[:, 0], torch.tensor([0.25, 0.75, 0, 0, 0, 0, 0]), atol=0, rtol=0
    )


def test_autocast_does_not_round_mixtures(table):
    weights = torch.full((1, 7), 1 / 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = SoftEmbedding(table)(weights)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed[0], table.weight.mean(0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_label_embedding_equals_the_original(training):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    torch.manual_seed(0)
    original = embeddings.LabelEmbedding(6, 5, 0.5).train(training)
    soft = SoftLabelEmbedding(original.embedding_table, 6, 0.5).train(training)
    labels = torch.arange(6).repeat(4)
    torch.manual_seed(1)
    expected = original(labels)
    torch.manual_seed(1)
    assert torch.equal(soft(labels), expected)
    # The same draw drops the same rows of one-hot weights.
    one_hot = torch.eye(7)[labels]
    torch.manual_seed(1)
    assert torch.equal(soft(one_hot), expected)
    dropped = (expected == original.embedding_table.weight[6]).all(dim=1)
    assert bool(dropped.any()) == training


def test_forced_drops_take_the_null_row():
    torch.manual_seed(0)
    soft = SoftLabelEmbedding(nn.Embedding(4, 5), 3, 0.1).eval()
    drop = torch.tensor([1, 0])
    for labels in (torch.tensor([0, 1]), torch.eye(4)[:2]):
        result = soft(labels, drop)
        assert torch.equal(result, soft.embedding_table.weight[[3, 1]])
