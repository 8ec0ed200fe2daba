"""The kernel against explicit inverses, in both forms, with rows added and removed."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcal.attribution.damping_selection import DIMENSION_DAMPINGS
from diffcal.attribution.feature_store import FeatureStore
from diffcal.attribution.gram import GramAccumulator, dual_gram
from diffcal.attribution.kernel import fit_kernel, load_kernel
from diffcal.attribution.kernel_updates import update_kernel
from diffcal.attribution.score_config import ScoreConfig
from diffcal.attribution.scores import kernel_scores, leverage_scores
from diffcal.errors import ArtifactError, ConfigError, DataError, NumericalError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "das.json").read_text("utf-8"))
EXACT = {"dtype": torch.float64, "readout": "signed"}
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inverse(rows, damping):
    return torch.linalg.inv(rows.mT @ rows + damping * torch.eye(rows.shape[1], dtype=rows.dtype))


def exact_scores(queries, rows, train, damping):
    return queries @ inverse(train, damping) @ rows.mT


@pytest.mark.parametrize("form", ["primal", "dual", "auto"])
@pytest.mark.parametrize(("n", "k"), [(30, 7), (7, 30), (12, 12), (1, 5)])
def test_both_forms_equal_the_explicit_inverse(form, n, k):
    rows, queries = normal(n, k), normal(4, k, seed=1)
    kernel = fit_kernel(rows, form=form, block_rows=5)
    assert kernel.form == (form if form != "auto" else ("dual" if n < k else "primal"))
    assert kernel.count == n
    for damping in (1e-3, 1.0, 50.0):
        expected = exact_scores(queries, rows, rows, damping)
        found = kernel_scores(kernel, queries, rows, damping, block_rows=3, **EXACT)
        torch.testing.assert_close(found, expected, **TIGHT)
        h = (rows @ inverse(rows, damping) * rows).sum(1)
        torch.testing.assert_close(leverage_scores(kernel, rows, [damping])[0], h, **TIGHT)
        assert kernel.effective_dimension(damping) == pytest.approx(float(h.sum()), rel=1e-9)


def test_relative_damping_is_in_units_of_the_mean_squared_norm():
    rows = normal(20, 6)
    mean = float(rows.square().sum(1).mean())
    for form in ("primal", "dual"):
        assert fit_kernel(rows, form=form).damping(0.1) == pytest.approx(0.1 * mean)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 12),
    k=st.integers(1, 12),
    c=st.floats(1e-3, 1e3),
    damping=st.floats(1e-2, 1e2),
    seed=st.integers(0, 99),
)
def test_laws_of_the_kernel(n, k, c, damping, seed):
    rows, queries = normal(n, k, seed=seed), normal(3, k, seed=seed + 100)
    kernel = fit_kernel(rows)
    base = kernel_scores(kernel, queries, rows, damping, **EXACT)
    # Features times c and damping times c² leave the score alone.
    scaled = kernel_scores(fit_kernel(rows * c), queries * c, rows * c, damping * c * c, **EXACT)
    torch.testing.assert_close(scaled, base, rtol=1e-7, atol=1e-9)
    # A large damping turns s·λ into the plain product.
    huge = 1e9
    limit = kernel_scores(kernel, queries, rows, huge, **EXACT) * huge
    torch.testing.assert_close(limit, queries @ rows.mT, rtol=1e-5, atol=1e-5)
    # Permuting training rows permutes columns.
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    permuted = kernel_scores(fit_kernel(rows[order]), queries, rows[order], damping, **EXACT)
    torch.testing.assert_close(permuted, base[:, order], rtol=1e-8, atol=1e-10)
    h = leverage_scores(kernel, rows, [damping, damping * 2])
    assert bool((h >= 0).all())
    assert bool((h < 1).all())
    assert bool((h[1] <= h[0] + 1e-12).all())
    assert float(h[0].sum()) <= min(n, k) + 1e-9


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_dimension_damping_leaves_that_share_of_the_rank(form, shape):
    rows = normal(*shape)
    for scale in (1.0, 1e6):
        kernel = fit_kernel(scale * rows, form=form)
        for share in (0.01, 0.06, 0.5, 0.99):
            damping = kernel.dimension_damping(share)
            assert kernel.effective_dimension(damping) == pytest.approx(5 * share, rel=1e-9)
            assert damping == pytest.approx(
                scale**2 * fit_kernel(rows, form=form).dimension_damping(share), rel=1e-6
            )
    config = ScoreConfig(damping=0.06, damping_rule="dimension")
    assert config.absolute_damping(kernel) == kernel.dimension_damping(0.06)
    assert config.damping_grid == DIMENSION_DAMPINGS
    assert max(config.absolute_grid(kernel)) == kernel.dimension_damping(min(DIMENSION_DAMPINGS))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        kernel.dimension_damping(1.0)
    with pytest.raises(ConfigError, match="below 1, a share"):
        ScoreConfig(damping=3.0, damping_rule="dimension")


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_rest_damping_does_not_see_what_all_examples_share(form):
    rows = normal(9, 5)
    common = torch.linalg.svd(rows).Vh[0]
    along = rows @ common
    spread = (
        rows + (99 * along)[:, None] * common
    )  # the largest direction alone, a hundred times longer
    before, after = (fit_kernel(x, form=form) for x in (rows, spread))
    values = torch.linalg.eigvalsh(rows @ rows.mT)
    assert before.rest_damping(2.0) == pytest.approx(2 * float(values[:-1].sum()) / 8)
    assert after.rest_damping(2.0) == pytest.approx(before.rest_damping(2.0), rel=1e-6)
    assert after.damping(2.0) > 100 * before.damping(2.0)
    config = ScoreConfig(damping=3.0, damping_rule="rest", damping_grid=(1.0, 2.0))
    assert config.absolute_damping(after) == after.rest_damping(3.0)
    assert config.absolute_grid(after) == [after.rest_damping(1.0), after.rest_damping(2.0)]
    with pytest.raises(ConfigError, match="damping must be positive"):
        fit_kernel(torch.ones(1, 3)).rest_damping(1.0)


def test_leverage_goes_to_one_without_damping_when_there_are_more_dimensions_than_rows():
    rows = normal(5, 20)
    h = leverage_scores(fit_kernel(rows), rows, [1e-9])
    torch.testing.assert_close(h, torch.ones_like(h), rtol=1e-8, atol=0)


def test_rank_deficient_features_are_handled_in_both_forms():
    rows = normal(10, 3) @ normal(3, 8, seed=1)
    rows[4] = 0
    queries = normal(2, 8, seed=2)
    expected = exact_scores(queries, rows, rows, 0.01)
    for form in ("primal", "dual"):
        kernel = fit_kernel(rows, form=form)
        found = kernel_scores(kernel, queries, rows, 0.01, **EXACT)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert len(kernel.eigenvalues) == 3


def test_float64_keeps_what_float32_loses():
    # A common direction holds almost everything, as with shared noise; scores depend on the rest.
    rows = 300 + normal(40, 16)
    queries = 300 + normal(3, 16, seed=1)
    expected = exact_scores(queries, rows, rows, 1.0)
    single = fit_kernel(rows.float(), dtype=torch.float32)
    double = fit_kernel(rows.float())
    assert double.basis.dtype == torch.float64
    error = [
        float((kernel_scores(k, queries, rows, 1.0, **EXACT) - expected).abs().max())
        for k in (single, double)
    ]
    assert error[1] < 1e-4 < error[0]


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_a_float32_kernel_keeps_the_small_directions(form):
    # The common direction has 99 % of the trace; queries see only the rest.
    n, k = 300, 320
    common = normal(1, k, seed=5)
    common /= common.norm()
    rows = normal(n, k) / k**0.5
    rows = rows - (rows @ common.mT) @ common + 10 * common
    queries = normal(3, k, seed=1)
    queries = queries - (queries @ common.mT) @ common
    exact = fit_kernel(rows, form=form)
    single = fit_kernel(rows, form=form, dtype=torch.float32)
    assert len(single.eigenvalues) > 0.8 * n
    damping = exact.damping(1e-2)
    expected = kernel_scores(exact, queries, rows, damping, **EXACT)
    found = kernel_scores(single, queries, rows, damping, **EXACT)
    # The dual form divides by roots of eigenvalues, of which float32 loses the smallest.
    bound = 0.02 if form == "primal" else 0.1
    assert (found - expected).norm() < bound * expected.norm()


def test_a_damping_that_rounding_blurs_is_announced(caplog):
    rows = normal(20, 6)
    single = fit_kernel(rows, dtype=torch.float32)
    kernel_scores(single, rows, rows, single.resolution * 1.1)
    assert not caplog.records
    kernel_scores(single, rows, rows, single.resolution * 0.9)
    assert "what the float32 kernel resolves" in caplog.text


def test_gram_accumulates_merges_and_forgets():
    rows = normal(20, 6)
    left, right = GramAccumulator(6).add(rows[:9]), GramAccumulator(6).add(rows[9:])
    both = left.merge(right)
    torch.testing.assert_close(both.matrix, rows.mT @ rows, **TIGHT)
    both.add(normal(3, 6, seed=8)).remove(normal(3, 6, seed=8))
    torch.testing.assert_close(both.matrix, rows.mT @ rows, **TIGHT)
    kernel = fit_kernel(both)
    assert kernel.count == 20
    found = kernel_scores(kernel, rows[:2], rows, 0.3, **EXACT)
    torch.testing.assert_close(found, exact_scores(rows[:2], rows, rows, 0.3), **TIGHT)
    torch.testing.assert_close(dual_gram(rows, block_rows=7), rows @ rows.mT, **TIGHT)


def test_an_accumulated_kernel_goes_on_after_a_break(tmp_path):
    rows = normal(20, 6)
    path = tmp_path / "gram.safetensors"
    GramAccumulator(6).add(rows[:12]).save(path)
    resumed = GramAccumulator.load(path).add(rows[12:])
    straight = GramAccumulator(6).add(rows[:12]).add(rows[12:])
    assert torch.equal(resumed.matrix, straight.matrix)
    assert resumed.count == 20
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ArtifactError, match=r"accumulated kernel .* cannot be read"):
        GramAccumulator.load(path)
    fit_kernel(rows).save(path)
    with pytest.raises(ArtifactError, match="is not an accumulated kernel"):
        GramAccumulator.load(path)
    with pytest.raises(DataError, match="rows have 5 entries, expected 6"):
        resumed.add(rows[:, :5])


def test_golden_woodbury_shards():
    case = GOLDEN["D_scores"]
    train = torch.tensor(case["train"], dtype=torch.float64)
    sizes, damping = case["woodbury_shards"]["shard_sizes"], case["woodbury_shards"]["lambda"]
    parts = list(train.split(sizes))
    eye = torch.eye(4, dtype=torch.float64)
    expected = torch.tensor(case["woodbury_shards"]["kinv_after_all_shards"], dtype=torch.float64)
    for form in ("primal", "dual"):
        kernel = fit_kernel(parts[0], form=form)
        for part in parts[1:]:
            kernel = update_kernel(kernel, added=part)
        assert kernel.count == 6
        found = kernel_scores(kernel, eye, train, damping, **EXACT) @ torch.linalg.pinv(train.mT)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(
        fit_kernel(train).inverse(fit_kernel(train).rotate(eye), damping)
        @ fit_kernel(train).basis.mT,
        expected,
        rtol=1e-7,
        atol=1e-9,
    )


@pytest.mark.parametrize(("n", "k"), [(30, 8), (6, 40)])
def test_updates_equal_refits_at_every_damping(n, k):
    rows, fresh, queries = normal(n, k), normal(5, k, seed=1), normal(3, k, seed=2)
    gone, kept = rows[[1, 4]], rows[[i for i in range(n) if i not in (1, 4)]]
    after = torch.cat([kept, fresh])
    kernel = fit_kernel(rows)
    together = update_kernel(kernel, added=fresh, removed=gone)
    stacked = update_kernel(update_kernel(kernel, removed=gone), added=fresh)
    refit = fit_kernel(after)
    dampings = [0.01, 1.0, 30.0]
    for updated in (together, stacked):
        assert updated.count == refit.count
        assert updated.damping(0.1) == pytest.approx(refit.damping(0.1))
        for norm in ("none", "relative"):
            for damping in dampings:
                torch.testing.assert_close(
                    kernel_scores(updated, queries, after, damping, norm=norm, **EXACT),
                    kernel_scores(refit, queries, after, damping, norm=norm, **EXACT),
                    rtol=1e-8,
                    atol=1e-10,
                )
        torch.testing.assert_close(
            leverage_scores(updated, after, dampings),
            leverage_scores(refit, after, dampings),
            rtol=1e-8,
            atol=1e-10,
        )
        assert updated.effective_dimension(0.5) == pytest.approx(refit.effective_dimension(0.5))
        assert updated.rest_damping(4.0) == pytest.approx(refit.rest_damping(4.0))
        assert updated.dimension_damping(0.3) == pytest.approx(refit.dimension_damping(0.3))


def test_adding_then_removing_restores_the_kernel():
    rows, fresh, queries = normal(9, 14), normal(4, 14, seed=1), normal(3, 14, seed=2)
    kernel = fit_kernel(rows)
    restored = update_kernel(update_kernel(kernel, added=fresh), removed=fresh)
    for damping in (0.01, 1.0):
        torch.testing.assert_close(
            kernel_scores(restored, queries, rows, damping, **EXACT),
            kernel_scores(kernel, queries, rows, damping, **EXACT),
            rtol=1e-8,
            atol=1e-10,
        )


def test_a_kernel_survives_the_disk(tmp_path):
    rows = normal(9, 14)
    kernel = fit_kernel(rows)
    kernel.save(tmp_path / "kernel.safetensors")
    again = load_kernel(tmp_path / "kernel.safetensors")
    assert torch.equal(again.basis, kernel.basis)
    assert torch.equal(again.eigenvalues, kernel.eigenvalues)
    assert (again.count, again.trace, again.form) == (kernel.count, kernel.trace, kernel.form)
    data = (tmp_path / "kernel.safetensors").read_bytes()
    (tmp_path / "kernel.safetensors").write_bytes(data[:-9])
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_kernel(tmp_path / "kernel.safetensors")
    with pytest.raises(DataError, match="an updated kernel is not saved"):
        update_kernel(kernel, removed=rows[:1]).save(tmp_path / "x")


def test_a_store_and_a_tensor_give_the_same_kernel(tmp_path):
    rows, queries = normal(23, 9).float(), normal(2, 9, seed=1).float()
    store = FeatureStore.create(tmp_path, spec={}, dim=9, dtype="float32")
    for index, part in enumerate(rows.split(7)):
        store.write(index, list(range(index * 7, index * 7 + len(part))), part)
    store = FeatureStore.open(tmp_path)
    for form in ("primal", "dual"):
        one = kernel_scores(fit_kernel(store, form=form), queries, store, 0.2)
        two = kernel_scores(fit_kernel(rows, form=form), queries, rows, 0.2)
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)


def test_bad_input_is_one_clear_line():
    rows = normal(5, 12)
    kernel = fit_kernel(rows)
    bad = rows.clone()
    bad[2, 3] = float("nan")
    for form in ("primal", "dual"):
        with pytest.raises(NumericalError, match="features: 1 of 60 values are NaN"):
            fit_kernel(bad, form=form)
        with pytest.raises(NumericalError, match="all training features are zero"):
            fit_kernel(torch.zeros(3, 4), form=form)
    with pytest.raises(DataError, match="at least one row"):
        fit_kernel(torch.zeros(0, 4))
    with pytest.raises(ConfigError, match="only be factorised in primal form"):
        fit_kernel(GramAccumulator(3), form="dual")
    with pytest.raises(DataError, match="features have 4 entries, the kernel was fitted on 12"):
        kernel.rotate(torch.zeros(1, 4))
    for damping in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="damping must be positive"):
            kernel_scores(kernel, rows, rows, damping)
        with pytest.raises(ConfigError, match="damping must be positive"):
            kernel.damping(damping)
    with pytest.raises(DataError, match="2 rows are not among those"):
        kernel_scores(kernel, rows, torch.cat([rows, normal(2, 12, seed=5)]), 0.1)
    with pytest.raises(DataError, match="not all part of the kernel"):
        kernel_scores(update_kernel(kernel, removed=rows[:1] * 3), rows, rows[1:], 0.1)
    with pytest.raises(DataError, match="give rows to add or to remove"):
        update_kernel(kernel)
    with pytest.raises(DataError, match="removing 5 of 5 rows leaves none"):
        update_kernel(kernel, removed=rows)
