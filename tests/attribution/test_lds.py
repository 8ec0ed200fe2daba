"""The linear datamodeling score, its spread, its controls, and an honest damping."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from diffcal.attribution.damping_selection import (
    OFFICIAL_DAMPINGS,
    choose_damping,
    path_predictions,
)
from diffcal.attribution.kernel import fit_kernel
from diffcal.attribution.lds import (
    average_losses,
    average_ranks,
    centre_batches,
    lds_difference,
    linear_datamodeling_score,
    predictions_of,
    resampled_spearman,
    spearman,
    stream_predictions,
)
from diffcal.attribution.lds_controls import lds_controls, shuffled_predictions
from diffcal.attribution.lds_folds import cross_fitted_lds, rest_of, subset_folds
from diffcal.attribution.scores import ScoreBlock, kernel_scores, score_path
from diffcal.attribution.subsets import subset_masks
from diffcal.errors import ConfigError, DataError, NumericalError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "das.json").read_text("utf-8"))
F = GOLDEN["F_lds"]


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def world(subsets=40, n=30, queries=6, noise=0.5):
    """True effects, losses of subset models, and masks."""
    masks = subset_masks(n, subsets, seed=1)
    effect = normal(queries, n, seed=2)
    return effect, -masks.double() @ effect.mT + noise * normal(subsets, queries, seed=3), masks


def test_golden():
    masks, scores, losses = (
        torch.tensor(F["masks"]).bool(),
        double(F["scores"]),
        double(F["losses"]),
    )
    for suffix, these, mean in (("", scores, "lds"), ("_squared", scores**2, "lds_of_squared")):
        predictions = predictions_of(these, masks)
        torch.testing.assert_close(
            predictions, double(F[f"predictions{suffix}"]), rtol=1e-9, atol=1e-12
        )
        found = linear_datamodeling_score(predictions, losses, n_resamples=20)
        expected = double(F[f"spearman_per_query{suffix}"])
        torch.testing.assert_close(found.per_query, expected, rtol=1e-9, atol=0)
        assert found.mean == pytest.approx(F[mean], rel=1e-9)
        assert (found.subsets, found.queries) == (8, 2)
    ties = F["ties_example"]
    assert average_ranks(double(ties["x"])).tolist() == ties["rank_x"]
    assert average_ranks(double(ties["y"])).tolist() == ties["rank_y"]
    assert float(spearman(double(ties["x"]), double(ties["y"]))) == pytest.approx(ties["spearman"])
    averaging = F["averaging_example"]
    torch.testing.assert_close(
        average_losses(double(averaging["losses"])[None])[0], double(averaging["mean"])
    )


@pytest.mark.parametrize("method", ["das_exact", "das_no_leverage", "loss_loo_exact"])
def test_golden_end_to_end(method):
    case = GOLDEN["J_end_to_end_linear"]
    masks, losses = torch.tensor(case["masks"]).bool(), double(case["subset_losses"])
    scores = double(case["methods"][method]["scores"])
    if method != "loss_loo_exact":
        train, eps, query = (double(case[k]) for k in ("psi_train", "eps_train", "psi_query"))
        kernel = fit_kernel(train)
        theta = kernel.inverse(kernel.rotate((train * eps[:, None]).sum(0)[None]), case["lambda"])
        residual = train @ (kernel.basis @ theta[0]) - eps
        ours = kernel_scores(
            kernel,
            query,
            train,
            case["lambda"],
            residual=residual,
            leverage=method == "das_exact",
            dtype=torch.float64,
        )
        torch.testing.assert_close(ours, scores, rtol=1e-7, atol=1e-10)
    found = linear_datamodeling_score(predictions_of(scores, masks), losses, n_resamples=2)
    expected = double(case["methods"][method]["spearman_per_query"])
    torch.testing.assert_close(found.per_query, expected, rtol=1e-8, atol=1e-10)
    assert found.mean == pytest.approx(case["methods"][method]["lds"])


@settings(deadline=None, max_examples=40)
@given(
    x=st.lists(st.integers(-3, 3), min_size=2, max_size=25),
    seed=st.integers(0, 999),
)
def test_ranks_and_correlation_equal_scipy(x, seed):
    a = double(x)
    b = torch.randint(-2, 3, (len(x),), generator=torch.Generator().manual_seed(seed)).double()
    assert average_ranks(a).tolist() == rankdata(a.numpy()).tolist()
    found = float(spearman(a, b))
    if len(a.unique()) == 1 or len(b.unique()) == 1:
        assert found == 0
    else:
        assert found == pytest.approx(spearmanr(a.numpy(), b.numpy()).statistic, abs=1e-12)
        # Any increasing change of either side leaves it alone.
        assert float(spearman(a.exp(), b**3)) == pytest.approx(found, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_resamples_equal_ranking_each_of_them(ties):
    x, y = normal(5, 12), normal(5, 12, seed=1)
    if ties:
        x, y = x.round(), y.round()
        y[4] = 1
    picks = torch.randint(12, (40, 12), generator=torch.Generator().manual_seed(2))
    counts = torch.stack([torch.bincount(row, minlength=12) for row in picks]).double()
    found = resampled_spearman(x, y, counts)
    direct = torch.stack([spearman(x[:, row], y[:, row]) for row in picks])
    torch.testing.assert_close(found, direct, rtol=1e-10, atol=1e-10)
    if ties:
        assert found[:, 4].abs().max() == 0


def test_true_effects_score_one_and_noise_scores_nothing():
    effect, losses, masks = world(noise=0)
    perfect = linear_datamodeling_score(predictions_of(effect, masks), losses, n_resamples=10)
    assert perfect.mean == pytest.approx(1)
    assert linear_datamodeling_score(
        predictions_of(-effect, masks), losses, n_resamples=2
    ).mean == pytest.approx(-1)
    nothing = linear_datamodeling_score(
        predictions_of(normal(6, 30, seed=9), masks), losses, n_resamples=300
    )
    assert nothing.over_both.low < 0 < nothing.over_both.high
    constant = linear_datamodeling_score(
        predictions_of(torch.ones(6, 30, dtype=torch.float64), masks), losses, n_resamples=2
    )
    assert constant.mean == 0


def test_spread_over_subsets_and_queries_is_that_of_repeated_experiments():
    queries, n = 12, 30
    effect = normal(queries, n, seed=2)
    values, spreads = [], []
    for trial in range(60):
        masks = subset_masks(n, 24, seed=trial)
        losses = -masks.double() @ effect.mT + 3 * normal(24, queries, seed=trial)
        found = linear_datamodeling_score(
            predictions_of(effect, masks), losses, n_resamples=60, seed=trial
        )
        values.append(found.mean)
        spreads.append(found.over_subsets.sd)
    observed = double(values).std()
    # 60 trials give the standard deviation to 9 %; the bootstrap of ranks with ties adds its own bias.
    assert 0.6 < float(double(spreads).mean() / observed) < 1.6
    assert found.over_both.sd > found.over_queries.sd * 0.8
    expected = found.per_query.std() / queries**0.5
    assert found.over_queries.sd == pytest.approx(float(expected), rel=0.35)


def test_streaming_equals_the_whole_and_averaging_scores_averages_predictions():
    effect, _, masks = world()
    whole = predictions_of(effect, masks)
    parts = [ScoreBlock(a, effect[:, a : a + 7]) for a in range(0, 30, 7)]
    torch.testing.assert_close(
        stream_predictions(iter(parts), masks), whole, rtol=1e-12, atol=1e-12
    )
    with pytest.raises(DataError, match="scores cover 28 of the masks' 30"):
        stream_predictions(parts[:-1], masks)
    with pytest.raises(DataError, match=r"rows 14\.\.21 do not continue at 7"):
        stream_predictions([parts[0], parts[2]], masks)
    effect[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="scores: 1 of"):
        predictions_of(effect, masks)


def test_controls_tell_query_specific_scores_from_common_ones():
    effect, losses, masks = world(noise=0.3)
    specific = lds_controls(predictions_of(effect, masks), losses, n_resamples=10)
    assert list(specific) == ["score", "shuffled", "query_average", "centred"]
    assert specific["score"].mean > 0.95
    assert abs(specific["shuffled"].mean) < 0.3
    assert specific["centred"].mean > 0.7
    # Effects that all queries share: another query's scores do as well.
    common = normal(1, 30, seed=5).expand(6, -1)
    same = -masks.double() @ common.mT + 0.3 * normal(40, 6, seed=6)
    likeness = {"pixel": predictions_of(normal(6, 30, seed=7), masks)}
    shared = lds_controls(predictions_of(common, masks), same, likeness=likeness, n_resamples=10)
    assert shared["shuffled"].mean == pytest.approx(shared["score"].mean)
    assert shared["query_average"].mean == pytest.approx(shared["score"].mean)
    assert abs(shared["centred"].mean) < 0.3
    assert abs(shared["likeness:pixel"].mean) < 0.4


@given(queries=st.integers(2, 30), seed=st.integers(0, 99))
def test_shuffling_leaves_no_query_at_home(queries, seed):
    columns = torch.arange(queries).double().expand(3, -1)
    shuffled = shuffled_predictions(columns, seed)
    assert bool((shuffled != columns).all())
    assert shuffled[0].sort().values.tolist() == list(range(queries))


def test_a_shift_between_batches_of_subsets_is_removed():
    effect, losses, masks = world(noise=0.1)
    batches = torch.arange(40) % 2
    shifted = losses + 100 * batches[:, None]
    predictions = predictions_of(effect, masks)
    spoilt = linear_datamodeling_score(predictions, shifted, n_resamples=2).mean
    repaired = linear_datamodeling_score(
        predictions, centre_batches(shifted, batches), n_resamples=2
    ).mean
    assert spoilt < 0.7
    assert repaired > 0.9


def test_damping_is_judged_on_subsets_that_did_not_choose_it():
    # Nothing can be predicted, so the best of many dampings looks good only where it was chosen.
    subsets, dampings = 12, [float(value) for value in range(1, 41)]
    gaps = []
    for trial in range(15):
        predictions = normal(40, subsets, 1, seed=trial)
        choice = choose_damping(
            predictions, normal(subsets, 1, seed=trial + 500), dampings, seed=trial
        )
        gaps.append((choice.optimistic, choice.held_out.mean))
    optimistic, honest = double(gaps).mean(0)
    assert optimistic > 0.5
    assert abs(honest) < 0.3


def test_held_out_spread_is_that_of_repeated_experiments():
    # One damping, so that folds differ by their subsets alone and the LDS is that of half the subsets.
    effect, queries = normal(12, 30, seed=2), 12
    values, spreads = [], []
    for trial in range(40):
        masks = subset_masks(30, 24, seed=trial)
        losses = -masks.double() @ effect.mT + 3 * normal(24, queries, seed=trial)
        predictions = predictions_of(effect, masks)[None]
        choice = choose_damping(predictions, losses, [1.0], seed=trial, n_resamples=60)
        values.append(choice.held_out.mean)
        spreads.append(choice.held_out.over_both.sd)
    observed = double(values).std()
    # Queries are the same in all trials: the spread, which redraws them too, must not be smaller.
    assert 0.8 < float(double(spreads).mean() / observed) < 2.5


def test_folds_are_judged_apart():
    folds = subset_folds(21, 3, seed=1)
    assert sorted(torch.cat(folds).tolist()) == list(range(21))
    assert all(len(rest_of(held, 21)) == 14 for held in folds)
    assert not set(rest_of(folds[0], 21).tolist()) & set(folds[0].tolist())
    losses = normal(21, 4, seed=1)
    # Right within every fold, at scales that would spoil a common ranking.
    tables = [losses * scale + shift for scale, shift in ((1, 0), (100, 9), (0.01, -50))]
    assert cross_fitted_lds(tables, losses, folds, n_resamples=5).mean == pytest.approx(1)
    tables[1] = -tables[1]
    found = cross_fitted_lds(tables, losses, folds, n_resamples=5)
    torch.testing.assert_close(found.per_query, double([1 / 3] * 4))
    with pytest.raises(DataError, match="2 tables of predictions for 3 folds"):
        cross_fitted_lds(tables[:2], losses, folds)
    with pytest.raises(DataError, match=r"\[21, 3\] and losses \[21, 4\]"):
        cross_fitted_lds([table[:, :3] for table in tables], losses, folds)


def test_the_spread_of_a_difference_is_paired():
    effect, losses, masks = world(subsets=60, noise=2.0)
    good, worse = (
        linear_datamodeling_score(predictions_of(scores, masks), losses, n_resamples=200)
        for scores in (effect, effect + 0.3 * normal(6, 30, seed=5))
    )
    gap, spread = lds_difference(good, worse)
    assert gap == pytest.approx(good.mean - worse.mean)
    assert spread.low < gap < spread.high
    apart = (good.over_both.sd**2 + worse.over_both.sd**2) ** 0.5
    assert spread.sd < 0.8 * apart
    zero, nothing = lds_difference(good, good)
    assert (zero, nothing.sd, nothing.low, nothing.high) == (0, 0, 0, 0)
    fewer = linear_datamodeling_score(predictions_of(effect, masks), losses, n_resamples=100)
    with pytest.raises(DataError, match="same subsets, queries and resamples"):
        lds_difference(good, fewer)


def test_a_clear_damping_is_found_and_path_predictions_stream():
    rows, queries = normal(30, 8), normal(6, 8, seed=1)
    masks = subset_masks(30, 40, seed=1)
    kernel = fit_kernel(rows)
    dampings = [0.01, 1.0, 100.0, 1e4]
    path = score_path(
        kernel, queries, rows, dampings, readout="signed", dtype=torch.float64, block_rows=7
    )
    predictions = path_predictions(path, masks)
    assert predictions.shape == (4, 40, 6)
    for index, damping in enumerate(dampings):
        alone = kernel_scores(kernel, queries, rows, damping, readout="signed", dtype=torch.float64)
        torch.testing.assert_close(
            predictions[index], predictions_of(alone, masks), rtol=1e-9, atol=1e-12
        )
    choice = choose_damping(predictions, predictions[1] * 3 + 1, dampings)
    assert choice.chosen == 1.0
    assert choice.per_fold == (1.0, 1.0)
    assert choice.held_out.mean == pytest.approx(1)
    assert choice.optimistic == pytest.approx(1)
    assert choice.curve[1] == choice.curve.max()
    flat = choose_damping(predictions[:1].expand(4, -1, -1), predictions[0], dampings)
    assert flat.chosen == 1e4  # equal curves: the larger damping


def test_the_official_grid():
    assert len(OFFICIAL_DAMPINGS) == 27
    assert OFFICIAL_DAMPINGS[0] == pytest.approx(0.01)
    assert OFFICIAL_DAMPINGS[-1] == pytest.approx(5e6)


def test_bad_input_is_one_clear_line():
    effect, losses, masks = world()
    predictions = predictions_of(effect, masks)
    with pytest.raises(DataError, match=r"\[40, 6\] and losses \[40, 5\]"):
        linear_datamodeling_score(predictions, losses[:, :5])
    with pytest.raises(DataError, match="at least two subsets"):
        linear_datamodeling_score(predictions[:1], losses[:1])
    with pytest.raises(ConfigError, match="0 < level < 1"):
        linear_datamodeling_score(predictions, losses, level=1.0)
    with pytest.raises(DataError, match="at least two queries"):
        lds_controls(predictions[:, :1], losses[:, :1])
    with pytest.raises(DataError, match="39 batch numbers for 40 subsets"):
        centre_batches(losses, torch.zeros(39))
    with pytest.raises(DataError, match="5 subsets are too few for 2 folds"):
        choose_damping(predictions[None, :5], losses[:5], [1.0])
    with pytest.raises(ConfigError, match="at least 2 folds"):
        choose_damping(predictions[None], losses, [1.0], folds=1)
    with pytest.raises(DataError, match=r"must be \[2 dampings"):
        choose_damping(predictions[None], losses, [1.0, 2.0])
    losses[3, 2] = float("nan")
    with pytest.raises(NumericalError, match="losses: 1 of 240"):
        linear_datamodeling_score(predictions, losses)


def test_a_score_shows_itself_in_a_few_lines():
    generator = torch.Generator().manual_seed(0)
    predictions, losses = torch.randn(2, 8, 3, generator=generator)
    shown = repr(linear_datamodeling_score(predictions, losses))
    assert "over_both" in shown
    assert len(shown) < 700  # not the 500 resampled means
