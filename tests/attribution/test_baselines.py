"""Products, cosines, checkpoints and the sampler's path: golden numbers and limits."""

import json
from pathlib import Path

import pytest
import torch

from diffcal.attribution.baselines import (
    cosine_blocks,
    dot_blocks,
    gas_blocks,
    gaussian_blocks,
    tracin_blocks,
)
from diffcal.attribution.feature_store import FeatureStore
from diffcal.attribution.journey import journey_features, renoised_path
from diffcal.attribution.likeness import EncodedRows
from diffcal.attribution.scores import collect
from diffcal.errors import ConfigError, DataError, NumericalError
from diffcal.models.encoders import PixelEncoder

CASE = json.loads((Path(__file__).parents[1] / "golden" / "das.json").read_text("utf-8"))[
    "D_scores"
]
TRAIN, QUERY, TRAIN2, QUERY2 = (
    torch.tensor(CASE[key], dtype=torch.float64)
    for key in ("train", "query", "train_ckpt2", "query_ckpt2")
)


@pytest.mark.parametrize("block_rows", [1, 4, 1024])
@pytest.mark.parametrize(
    ("key", "blocks"),
    [
        ("grad_dot", lambda size: dot_blocks(QUERY, TRAIN, block_rows=size)),
        ("grad_cos", lambda size: cosine_blocks(QUERY, TRAIN, block_rows=size)),
        (
            "tracincp_mean_of_2_ckpts",
            lambda size: tracin_blocks([(QUERY, TRAIN), (QUERY2, TRAIN2)], block_rows=size),
        ),
        (
            "gas_mean_of_2_ckpts",
            lambda size: gas_blocks([(QUERY, TRAIN), (QUERY2, TRAIN2)], block_rows=size),
        ),
    ],
)
def test_golden(key, blocks, block_rows):
    expected = torch.tensor(CASE[key], dtype=torch.float64)
    torch.testing.assert_close(collect(blocks(block_rows)), expected, rtol=1e-7, atol=1e-10)


def test_images_and_a_store_are_compared_like_flat_rows(tmp_path):
    images = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cosine = collect(cosine_blocks(images[:2], images))
    flat = torch.nn.functional.cosine_similarity(
        images[:2].flatten(1)[:, None], images.flatten(1)[None], dim=2
    )
    torch.testing.assert_close(cosine, flat, rtol=1e-5, atol=1e-6)
    store = FeatureStore.create(tmp_path, spec={}, dim=48, dtype="float32")
    store.write(0, [0, 1, 2], images[:3].flatten(1))
    store.write(1, [3, 4], images[3:].flatten(1))
    torch.testing.assert_close(
        collect(cosine_blocks(images[:2], FeatureStore.open(tmp_path))),
        cosine,
        rtol=1e-6,
        atol=1e-6,
    )


def test_encoded_images_are_compared_block_by_block():
    images = torch.randint(
        256, (5, 4, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    rows = EncodedRows(PixelEncoder((4, 4, 3)), images)
    assert (len(rows), rows.dim) == (5, 48)
    queries = PixelEncoder((4, 4, 3)).encode(images[:2])
    found = collect(cosine_blocks(queries, rows, block_rows=2))
    expected = collect(cosine_blocks(queries, torch.cat(list(rows.blocks(5)))))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[[0, 1], [0, 1]], torch.ones(2), rtol=1e-5, atol=0)
    with pytest.raises(DataError, match="no images"):
        EncodedRows(PixelEncoder((4, 4, 3)), images[:0])


def test_gaussian_likeness_is_one_at_home_and_falls_with_distance():
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    scores = collect(gaussian_blocks(rows, rows, bandwidth=5.0))
    expected = torch.tensor([[1.0, 2.718281828**-0.5]] * 2)
    expected[1] = expected[1].flip(0)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)


def test_a_zero_row_has_cosine_zero():
    rows = torch.cat([TRAIN[:2], torch.zeros_like(TRAIN[:1])])
    scores = collect(cosine_blocks(QUERY, rows))
    assert scores[:, 2].tolist() == [0, 0, 0]


def test_the_path_is_noised_again_at_each_steps_level():
    x = torch.ones(2, 1, 1, 1, 2)
    noise = torch.full_like(x, 2.0)
    path = renoised_path(x, torch.tensor([1.0, 0.36]), noise)
    torch.testing.assert_close(path[0], x[0])
    torch.testing.assert_close(path[1], torch.full_like(x[1], 0.6 + 0.8 * 2), rtol=1e-6, atol=0)
    mean = journey_features([QUERY, QUERY2, QUERY])
    torch.testing.assert_close(mean, (2 * QUERY + QUERY2) / 3, rtol=1e-12, atol=1e-12)
    with pytest.raises(DataError, match="at least one step"):
        journey_features([])
    with pytest.raises(DataError, match="between 0 and 1"):
        renoised_path(x, torch.tensor([1.0, 1.1]), noise)


def test_bad_input_is_one_clear_line():
    with pytest.raises(DataError, match="queries have 3 entries, training rows 4"):
        collect(dot_blocks(QUERY[:, :3], TRAIN))
    bad = TRAIN.clone()
    bad[1, 1] = float("inf")
    with pytest.raises(NumericalError, match="training features: 1 of 24"):
        collect(cosine_blocks(QUERY, bad))
    with pytest.raises(ConfigError, match="bandwidth must be positive"):
        collect(gaussian_blocks(QUERY, TRAIN, 0.0))
