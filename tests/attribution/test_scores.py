"""Scores: golden cases, invariance to blocks, leave-one-out by closed form, top-k and averages."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcal.attribution.kernel import fit_kernel
from diffcal.attribution.readouts import READOUTS, read_out
from diffcal.attribution.residuals import residual_weights
from diffcal.attribution.scores import (
    ScoreBlock,
    average_blocks,
    collect,
    kernel_scores,
    score_blocks,
    score_path,
)
from diffcal.attribution.topk import TopScores, top_scores
from diffcal.errors import ConfigError, DataError, NumericalError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "das.json").read_text("utf-8"))
LAMBDAS = sorted(GOLDEN["D_scores"]["by_lambda"], key=float)
CLOSE = {"rtol": 1e-7, "atol": 1e-10}


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blocks_of(scores, *sizes):
    start = 0
    for size in sizes:
        yield ScoreBlock(start, scores[:, start : start + size])
        start += size


@pytest.mark.parametrize("form", ["primal", "dual"])
@pytest.mark.parametrize("damping", LAMBDAS)
def test_golden_scores(form, damping):
    case = GOLDEN["D_scores"]
    train, query = double(case["train"]), double(case["query"])
    residual, expected = double(case["residual_weight"]), case["by_lambda"][damping]
    kernel = fit_kernel(train, form=form)

    def score(**settings):
        return kernel_scores(
            kernel, query, train, float(damping), dtype=torch.float64, block_rows=4, **settings
        )

    torch.testing.assert_close(score(readout="signed"), double(expected["trak"]), **CLOSE)
    for key, changes in {
        "das_signed": {"residual": residual, "readout": "signed"},
        "das": {"residual": residual},
        "das_leverage": {"residual": residual, "leverage": True},
        "relative_if": {"norm": "relative", "readout": "signed"},
        "renorm_if": {"norm": "renormalised", "readout": "signed"},
    }.items():
        torch.testing.assert_close(score(**changes), double(expected[key]), **CLOSE)
    h = kernel.leverages(kernel.rotate(train), [float(damping)])[0]
    torch.testing.assert_close(h, double(expected["leverage"]), **CLOSE)
    if form == "primal":
        torch.testing.assert_close(train.mT @ train, double(case["gram"]), rtol=1e-7, atol=1e-9)
        inverse = (kernel.basis / (kernel.eigenvalues + float(damping))) @ kernel.basis.mT
        scale = expected["kinv_meanabs_scale"]
        assert float(inverse.abs().mean()) == pytest.approx(scale, rel=1e-7)
        torch.testing.assert_close(
            score(readout="signed") / scale, double(expected["trak_rescaled"]), **CLOSE
        )


def test_golden_leave_one_out_of_a_scalar_linear_model():
    case = GOLDEN["A_loo_scalar"]
    keys = {name.split("[")[0]: name for name in case}
    train, query = double(case[keys["psi_train"]]), double(case[keys["psi_query"]])
    residual = double(case[keys["residual"]])
    kernel = fit_kernel(train)
    settings = {"residual": residual, "dtype": torch.float64}

    def score(**more):
        return kernel_scores(kernel, query, train, case["lambda"], **settings, **more)

    signed = score(leverage=True, readout="signed")
    # theta* - theta without i moves the prediction of the query by -s r / (1 - h).
    torch.testing.assert_close(-signed, double(case[keys["delta_eps_exact"]]), **CLOSE)
    torch.testing.assert_close(score(leverage=True), double(case[keys["das_exact"]]), **CLOSE)
    torch.testing.assert_close(score(), double(case[keys["das_no_leverage"]]), **CLOSE)


def test_golden_practical_reductions():
    case = GOLDEN["B_loo_vector"]["practical"]
    damping = GOLDEN["B_loo_vector"]["lambda"]
    mse = double(case["error_mse[N][T]"])
    torch.testing.assert_close(
        residual_weights(mse, "rms"), double(case["error_rms_mean"]), **CLOSE
    )
    torch.testing.assert_close(
        residual_weights(mse, "released"), double(case["error_l2normalised_mean"]), **CLOSE
    )
    for features, residual in (("normalised", "released"), ("raw", "rms")):
        train = double(case[f"phi_train_{features}"])
        query = double(case[f"phi_query_{features}"])
        kernel = fit_kernel(train)
        checked = 0
        for readout, name in (("square", "squared"), ("signed", "signed")):
            for leverage, word in ((False, "noleverage"), (True, "leverage")):
                key = f"das_{name}_{word}_{features}"
                if key in case:
                    found = kernel_scores(
                        kernel,
                        query,
                        train,
                        damping,
                        residual=residual_weights(mse, residual),
                        leverage=leverage,
                        readout=readout,
                        dtype=torch.float64,
                    )
                    torch.testing.assert_close(found, double(case[key]), **CLOSE)
                    checked += 1
        assert checked == 2


def test_golden_residual_weights():
    case = GOLDEN["E_residual_weight"]
    mse = double(case["mse"])
    kinds = {"released": "released", "rms": "rms_mean", "rms_total": "rms_total"}
    for kind, key in {**kinds, "sqrt_last": "sqrt_last"}.items():
        torch.testing.assert_close(residual_weights(mse, kind), double(case[key]), **CLOSE)
    assert residual_weights(mse, "none") is None
    released, rms = residual_weights(mse, "released"), residual_weights(mse, "rms")
    # Errors of examples 0 and 3 differ by 4: the released weight does not see it.
    torch.testing.assert_close(released[0], released[3], rtol=1e-5, atol=0)
    torch.testing.assert_close(rms[0], 4 * rms[3], rtol=1e-9, atol=0)


def test_leave_one_out_of_ridge_regression_by_refitting():
    x, y, q = normal(15, 4), normal(15, seed=1), normal(3, 4, seed=2)
    damping = 0.7

    def fit(rows):
        gram = x[rows].mT @ x[rows] + damping * torch.eye(4, dtype=x.dtype)
        return torch.linalg.solve(gram, x[rows].mT @ y[rows])

    full = fit(torch.arange(15))
    change = torch.stack(
        [q @ (full - fit(torch.tensor([j for j in range(15) if j != i]))) for i in range(15)], 1
    )
    found = kernel_scores(
        fit_kernel(x),
        q,
        x,
        damping,
        residual=x @ full - y,
        leverage=True,
        dtype=torch.float64,
    )
    torch.testing.assert_close(found, change.square(), rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=15)
@given(block_rows=st.integers(1, 20), readout=st.sampled_from(sorted(READOUTS)))
def test_blocks_and_batches_of_queries_change_nothing(block_rows, readout):
    rows, queries, residual = normal(17, 6), normal(5, 6, seed=1), normal(17, seed=2).abs()
    kernel = fit_kernel(rows)
    settings = {"residual": residual, "leverage": True, "readout": readout, "norm": "relative"}
    whole = kernel_scores(kernel, queries, rows, 0.4, dtype=torch.float64, **settings)
    for size in (block_rows, 1024):
        one_by_one = torch.cat(
            [
                kernel_scores(
                    kernel, q[None], rows, 0.4, dtype=torch.float64, block_rows=size, **settings
                )
                for q in queries
            ]
        )
        torch.testing.assert_close(one_by_one, whole, rtol=1e-10, atol=1e-13)
    single = kernel_scores(kernel, queries.float(), rows.float(), 0.4, **settings)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), whole, rtol=1e-4, atol=1e-4)
    if readout in ("square", "abs"):
        assert bool((whole >= 0).all())


def test_a_path_holds_what_each_damping_gives_alone():
    rows, queries = normal(17, 6), normal(5, 6, seed=1)
    kernel = fit_kernel(rows)
    dampings = [0.01, 0.5, 20.0]
    path = list(
        score_path(
            kernel, queries, rows, dampings, leverage=True, norm="renormalised", block_rows=8
        )
    )
    assert [start for start, _ in path] == [0, 8, 16]
    together = torch.cat([values for _, values in path], dim=2)
    assert together.shape == (3, 5, 17)
    for index, damping in enumerate(dampings):
        alone = kernel_scores(kernel, queries, rows, damping, leverage=True, norm="renormalised")
        torch.testing.assert_close(together[index], alone, rtol=1e-5, atol=1e-8)


def test_readouts():
    score = double([-2.0, 0.0, 3.0])
    assert read_out(score, "signed").tolist() == [-2, 0, 3]
    assert read_out(score, "square").tolist() == [4, 0, 9]
    assert read_out(score, "signed_square").tolist() == [-4, 0, 9]
    assert read_out(score, "abs").tolist() == [2, 0, 3]


@settings(deadline=None, max_examples=40)
@given(
    k=st.integers(1, 12),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    seed=st.integers(0, 999),
    largest=st.booleans(),
)
def test_streamed_top_k_equals_a_full_stable_sort(k, sizes, seed, largest):
    generator = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    scores = torch.randint(-3, 4, (4, n), generator=generator).double()  # many ties
    top = top_scores(blocks_of(scores, *sizes), k, largest=largest)
    order = scores.argsort(dim=1, descending=largest, stable=True)[:, :k]
    assert torch.equal(top.index, order)
    assert torch.equal(top.values, scores.gather(1, order))
    backwards = TopScores(k, largest=largest)
    for block in reversed(list(blocks_of(scores, *sizes))):
        backwards.update(block)
    assert torch.equal(backwards.index, order)


def test_models_are_averaged_block_by_block():
    scores = [normal(2, 9, seed=i) for i in range(3)]
    averaged = collect(average_blocks([blocks_of(s, 4, 5) for s in scores]))
    torch.testing.assert_close(averaged, torch.stack(scores).mean(0), rtol=1e-12, atol=0)
    with pytest.raises(DataError, match="different queries or training rows"):
        collect(average_blocks([blocks_of(scores[0], 4, 5), blocks_of(scores[1], 5, 4)]))
    with pytest.raises(DataError, match="different queries or training rows"):
        collect(average_blocks([blocks_of(scores[0], 4, 5), blocks_of(scores[1], 4)]))
    with pytest.raises(DataError, match="at least one model"):
        collect(average_blocks([]))


def test_features_that_carry_a_graph_give_the_same_scores_without_one():
    generator = torch.Generator().manual_seed(4)
    rows, queries = torch.randn(9, 5, generator=generator), torch.randn(2, 5, generator=generator)
    expected = kernel_scores(fit_kernel(rows), queries, rows, 0.3)
    rows.requires_grad_()
    queries.requires_grad_()
    found = kernel_scores(fit_kernel(rows), queries, rows, 0.3)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_bad_input_is_one_clear_line():
    rows = normal(6, 3)
    kernel = fit_kernel(rows)
    with pytest.raises(DataError, match="5 residuals for 6 training rows"):
        kernel_scores(kernel, rows, rows, 0.1, residual=torch.ones(5))
    with pytest.raises(ConfigError, match="unknown readout 'cube'"):
        kernel_scores(kernel, rows, rows, 0.1, readout="cube")
    with pytest.raises(ConfigError, match="at least one damping"):
        next(score_path(kernel, rows, rows, []))
    bad = rows.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="query features: 1 of 18 values"):
        kernel_scores(kernel, bad, rows, 0.1)
    lonely = torch.cat([rows, rows[:1] * 0])
    lonely[:, 2] = 0
    lonely[6, 2] = 1e6
    with pytest.raises(NumericalError, match=r"training row 6 has leverage 1\.0"):
        kernel_scores(fit_kernel(lonely), rows, lonely, 1e-6, leverage=True, block_rows=4)
    with pytest.raises(ConfigError, match="top k must be at least 1"):
        TopScores(0)
    with pytest.raises(DataError, match="there are no scores"):
        collect([])
    with pytest.raises(DataError, match="row 5 after row 2"):
        collect([ScoreBlock(0, torch.zeros(1, 2)), ScoreBlock(5, torch.zeros(1, 2))])
    with pytest.raises(ConfigError, match="unknown residual 'std'"):
        residual_weights(torch.ones(2, 2), "std")
    with pytest.raises(DataError, match="non-negative value"):
        residual_weights(-torch.ones(2, 2), "rms")
    with pytest.raises(NumericalError, match="error table"):
        residual_weights(torch.full((2, 2), float("nan")), "rms")


def test_a_zero_feature_scores_zero_under_every_norm():
    rows = normal(6, 3)
    rows[2] = 0
    kernel = fit_kernel(rows)
    for norm in ("none", "relative", "renormalised"):
        scores = collect(score_blocks(kernel, rows, rows, 0.1, norm=norm, leverage=True))
        assert scores.isfinite().all()
        assert scores[:, 2].abs().max() == 0
