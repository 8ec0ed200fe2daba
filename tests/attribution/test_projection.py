"""Sketches: linear, blind to block boundaries, norm-preserving, and equal to the golden cases."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcal.attribution.counter_hash import hash_bits, hash_keys
from diffcal.attribution.projection import ProjectionConfig, project_rows
from diffcal.attribution.projection_factorised import FactorisedProjection, LayerSketch
from diffcal.attribution.projection_mask import random_coordinates
from diffcal.attribution.projection_sjlt import SJLT, bucket_sums
from diffcal.attribution.projectors import make_projector
from diffcal.errors import ConfigError, DataError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "das.json").read_text("utf-8"))
SHAPES = [(40, 30), (40,), (6, 5, 3, 3), (), (7, 90)]
TOTAL = sum(math.prod(shape) for shape in SHAPES)
CONFIGS = {
    "identity": ProjectionConfig(kind="identity"),
    "gaussian": ProjectionConfig(kind="gaussian", dim=48),
    "rademacher": ProjectionConfig(kind="rademacher", dim=50),
    "sjlt": ProjectionConfig(kind="sjlt", dim=48),
    "sjlt_3": ProjectionConfig(kind="sjlt", dim=48, nonzeros=3),
    "mask": ProjectionConfig(kind="mask", dim=48),
    "factorised": ProjectionConfig(kind="factorised", factor_dim=8),
    "mask_sjlt": ProjectionConfig(kind="mask_sjlt", dim=48, mask_dim=400),
    "factorised_sjlt": ProjectionConfig(kind="factorised_sjlt", dim=48, factor_dim=8),
}
KINDS = pytest.mark.parametrize("kind", CONFIGS)


def golden(*keys):
    value = GOLDEN["H_projection"]
    for key in keys:
        value = value[key]
    return torch.tensor(value, dtype=torch.float64)


def gradients(rows=3, seed=0, dtype=torch.float64):
    return torch.randn(rows, TOTAL, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@KINDS
@settings(deadline=None, max_examples=12)
@given(cuts=st.lists(st.integers(0, TOTAL), max_size=6), order=st.randoms())
def test_block_boundaries_and_order_do_not_matter(kind, cuts, order):
    projector = make_projector(CONFIGS[kind], SHAPES)
    x = gradients()
    whole = projector.project(x)
    edges = sorted({0, *cuts, TOTAL})
    spans = list(itertools.pairwise(edges))
    order.shuffle(spans)
    total = torch.zeros_like(whole)
    for low, high in spans:
        total += projector.project(x[:, low:high], low)
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(project_rows(projector, x, 700), whole, rtol=1e-12, atol=1e-12)


@KINDS
def test_the_map_is_linear_seeded_and_the_same_for_every_row(kind):
    projector, again = (make_projector(CONFIGS[kind], SHAPES) for _ in range(2))
    x, y = gradients(seed=1), gradients(seed=2)
    px = projector.project(x)
    assert px.shape == (3, projector.dim)
    torch.testing.assert_close(
        projector.project(2 * x - 3 * y), 2 * px - 3 * projector.project(y), rtol=1e-11, atol=1e-11
    )
    assert torch.equal(again.project(x), px)
    torch.testing.assert_close(projector.project(x[1:2]), px[1:2], rtol=1e-13, atol=1e-13)


@KINDS
def test_float32_sums_agree_with_float64(kind):
    projector = make_projector(CONFIGS[kind], SHAPES)
    x = gradients()
    single = projector.project(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), projector.project(x), rtol=1e-4, atol=1e-4)
    half = projector.project(x.bfloat16())
    assert half.dtype == torch.float32


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in ("identity",)])
def test_other_seeds_give_other_sketches_that_keep_squared_norms_in_mean(kind):
    config = CONFIGS[kind]
    x = gradients(rows=1)
    # Heavy-tailed but not sparse, as gradients are.
    x = x * x.abs()
    ratios = []
    for seed in range(200):
        changed = ProjectionConfig(
            kind=config.kind,
            dim=config.dim,
            seed=seed,
            nonzeros=config.nonzeros,
            factor_dim=config.factor_dim,
            mask_dim=config.mask_dim,
        )
        ratios.append(make_projector(changed, SHAPES).project(x).square().sum() / x.square().sum())
    ratio = torch.stack(ratios)
    assert ratio.unique().numel() == 200
    error = ratio.std() / math.sqrt(200)
    assert abs(ratio.mean() - 1) < 4.5 * error
    if kind in ("gaussian", "rademacher", "sjlt", "sjlt_3"):
        # Relative variance 2/dim (a little less for signs): standard deviation 0.20.
        assert 0.14 < ratio.std() < 0.26


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "sjlt", "sjlt_3"])
def test_distances_stay_within_the_johnson_lindenstrauss_bound(kind):
    base = CONFIGS[kind]
    dim = 1536
    config = ProjectionConfig(kind=base.kind, dim=dim, nonzeros=base.nonzeros)
    projector = make_projector(config, [(20_000,)])
    x = torch.randn(24, 20_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ratio = torch.pdist(projector.project(x)).square() / torch.pdist(x).square()
    # 276 pairs, standard deviation sqrt(2/dim) = 3.6 %: five of them.
    assert (ratio - 1).abs().max() < 5 * math.sqrt(2 / dim)


def test_unit_variance_scales_by_the_root_of_dim():
    for kind in ("gaussian", "rademacher"):
        plain = make_projector(ProjectionConfig(kind=kind, dim=16), SHAPES)
        unit = make_projector(ProjectionConfig(kind=kind, dim=16, unit_variance=True), SHAPES)
        x = gradients()
        torch.testing.assert_close(unit.project(x), plain.project(x) * 4, rtol=1e-12, atol=1e-12)


def test_golden_sjlt():
    index = golden("sjlt", "index").long()
    slots = torch.where(golden("sjlt", "sign") > 0, index, index + 4)
    out = bucket_sums(golden("sjlt", "v"), slots, 4)
    torch.testing.assert_close(out, golden("sjlt", "out"), rtol=1e-7, atol=1e-12)


def test_golden_factorised_linear_and_convolution():
    for layer, grad, left, right in (
        ("linear", "grad[B][dout][din]", "Po", "Pi"),
        ("conv", "weight_grad", "Po", "Pc"),
    ):
        gradient = golden(layer, grad).flatten(2)
        rows, columns = gradient.shape[1:]
        sketch = LayerSketch(0, rows, columns, golden(layer, left), golden(layer, right), 0)
        expected = next(v for k, v in GOLDEN["H_projection"][layer].items() if "projected" in k)
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(sketch.apply(gradient), expected, rtol=1e-7, atol=1e-9)
        projector = FactorisedProjection([(rows, columns)])
        projector.layers, projector.dim = (sketch,), math.prod(sketch.shape)
        flat = gradient.flatten(1)
        pieces = projector.project(flat[:, :5], 0) + projector.project(flat[:, 5:], 5)
        torch.testing.assert_close(pieces, expected.flatten(1), rtol=1e-7, atol=1e-9)


def test_factors_are_orthonormal_and_small_sides_are_kept():
    projector = FactorisedProjection([(100, 6), (9,)], factor_dim=8)
    layer, vector = projector.layers
    assert layer.right is None
    assert layer.shape == (8, 6)
    gram = layer.left @ layer.left.T
    torch.testing.assert_close(gram, torch.eye(8) * 100 / 8, rtol=1e-5, atol=1e-5)
    assert vector.left is vector.right is None
    assert projector.dim == 48 + 9
    bias = torch.arange(9.0)[None]
    torch.testing.assert_close(projector.project(bias, 600)[:, 48:], bias, rtol=0, atol=0)


def test_sjlt_uses_one_bucket_in_every_group_and_balanced_signs():
    sketch = SJLT(30_000, 60, seed=5, nonzeros=3)
    for group in range(3):
        slots = sketch.buckets(0, 30_000, group)
        bucket = slots % 60
        assert bucket.min() == 20 * group
        assert bucket.max() == 20 * group + 19
        counts = torch.bincount(slots - 20 * group, minlength=80)
        counts = torch.cat([counts[:20], counts[60:80]]).double()
        assert counts.sum() == 30_000
        # 40 cells of 750: chi-square with 39 degrees of freedom, five sigma is 83.
        assert ((counts - 750).square() / 750).sum() < 83
        assert torch.equal(sketch.buckets(12_345, 20_000, group), slots[12_345:20_000])
    assert not torch.equal(sketch.buckets(0, 99, 0), sketch.buckets(0, 99, 1) - 20)


def test_hash_bits_are_balanced_also_beyond_32_bits_of_counter():
    keys = hash_keys(0, "test")
    for start in (0, 2**32 - 50_000, 2**40):
        bits = hash_bits(torch.arange(start, start + 100_000), keys)
        assert bits.min() >= 0
        assert bits.max() < 2**32
        assert bits.unique().numel() > 99_990
        ones = torch.stack([(bits >> place & 1).double().mean() for place in range(32)])
        assert (ones - 0.5).abs().max() < 5 * 0.5 / math.sqrt(100_000)
    # The format of every stored index: these numbers must never change.
    assert hash_bits(torch.tensor([0, 1, 2**33]), hash_keys(7, "fixed")).tolist() == FIXED_BITS


FIXED_BITS = [890096330, 340139003, 3274900840]


@settings(deadline=None, max_examples=30)
@given(total=st.integers(1, 5000), share=st.floats(0.001, 1), seed=st.integers(0, 99))
def test_random_coordinates_are_distinct_ascending_and_in_range(total, share, seed):
    count = max(1, int(total * share))
    chosen = random_coordinates(total, count, seed)
    assert len(chosen) == count
    assert bool((chosen[1:] > chosen[:-1]).all())
    assert chosen[0] >= 0
    assert chosen[-1] < total


def test_rademacher_columns_are_the_bits_of_the_hash():
    projector = make_projector(ProjectionConfig(kind="rademacher", dim=70, seed=2), [(300,)])
    matrix = projector.project(torch.eye(300)) * math.sqrt(70)
    keys = hash_keys(2, "projection-rademacher")
    for coordinate in (0, 5, 255, 256, 299):
        words = hash_bits(torch.arange(coordinate * 3, coordinate * 3 + 3), keys)
        bits = torch.cat([(word >> torch.arange(32)) & 1 for word in words])[:70]
        torch.testing.assert_close(matrix[coordinate], bits * 2.0 - 1, rtol=1e-6, atol=0)


def test_random_coordinates_hit_every_position_equally():
    for count, total in ((5, 50), (20, 50)):  # both ways of drawing
        hits = torch.zeros(total)
        for seed in range(600):
            hits[random_coordinates(total, count, seed)] += 1
        share = count / total
        spread = math.sqrt(600 * share * (1 - share))
        assert (hits - 600 * share).abs().max() < 5 * spread


def test_bad_input_is_one_clear_line():
    for kind in ("gaussian", "sjlt", "mask", "mask_sjlt", "factorised_sjlt"):
        config = ProjectionConfig(kind=kind, dim=65_536)
        with pytest.raises(ConfigError, match=f"dim 65536 is larger than the {TOTAL} parameters"):
            make_projector(config, SHAPES)
    with pytest.raises(ConfigError, match="first stage of 'factorised_sjlt'"):
        make_projector(ProjectionConfig(kind="factorised_sjlt", dim=2000, factor_dim=2), SHAPES)
    with pytest.raises(ConfigError, match=r"multiple of projection\.nonzeros 5"):
        ProjectionConfig(kind="sjlt", dim=48, nonzeros=5)
    with pytest.raises(ConfigError, match=r"projection\.dim must be at least 1, got 0"):
        ProjectionConfig(dim=0)
    with pytest.raises(ConfigError, match="unit_variance is for dense matrices"):
        ProjectionConfig(kind="sjlt", unit_variance=True)
    with pytest.raises(ConfigError, match="mask_dim 10 must not be below"):
        ProjectionConfig(kind="mask_sjlt", dim=20, mask_dim=10)
    projector = make_projector(CONFIGS["sjlt"], SHAPES)
    with pytest.raises(DataError, match=r"coordinates 5\.\.\d+ lie outside"):
        projector.project(gradients(), 5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@KINDS
def test_devices_agree(kind):
    projector = make_projector(CONFIGS[kind], SHAPES)
    x = gradients()
    there = projector.project(x.cuda()).cpu()
    torch.testing.assert_close(there, projector.project(x), rtol=1e-12, atol=1e-12)
