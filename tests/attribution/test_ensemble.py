"""Scores of several models: means of scores, means before the readout, and sampling paths."""

import pytest
import torch
from gradient_models import mean_features, unet

from diffcal.attribution.ensemble import ScoredModel, ensemble_scores
from diffcal.attribution.featurise import Featuriser
from diffcal.attribution.journey import path_features
from diffcal.attribution.kernel import fit_kernel
from diffcal.attribution.noise import attribution_noise
from diffcal.attribution.projection import ProjectionConfig
from diffcal.attribution.rows import ChosenRows, TensorRows
from diffcal.attribution.score_config import ScoreConfig
from diffcal.attribution.scores import collect, kernel_scores
from diffcal.errors import DataError


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def model(seed, dim=5):
    rows = normal(12, dim, seed=seed)
    return ScoredModel(normal(3, dim, seed=seed + 10), rows, fit_kernel(rows))


@pytest.mark.parametrize("readout", ["square", "signed", "abs"])
def test_means_of_scores_and_of_signed_scores(readout):
    # Kernels and sketches of other sizes go together: only scores are averaged.
    models = [model(1), model(2, dim=7)]
    signed = torch.stack(
        [
            kernel_scores(
                one.kernel,
                one.queries,
                one.rows,
                one.kernel.rest_damping(20.0),
                readout="signed",
                dtype=torch.float64,
            )
            for one in models
        ]
    )
    read = {"square": torch.square, "signed": lambda s: s, "abs": torch.abs}[readout]
    for average, expected in (("scores", read(signed).mean(0)), ("signed", read(signed.mean(0)))):
        config = ScoreConfig(readout=readout, average=average)
        found = collect(ensemble_scores(config, models)).double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        alone = collect(ensemble_scores(config, models[:1])).double()
        torch.testing.assert_close(alone, read(signed[0]), rtol=1e-4, atol=1e-6)


def test_models_of_other_images_are_refused():
    with pytest.raises(DataError, match="at least one model"):
        collect(ensemble_scores(ScoreConfig(), []))
    rows = normal(9, 5, seed=4)
    other = ScoredModel(normal(3, 5), rows, fit_kernel(rows))
    with pytest.raises(DataError, match="different queries or training rows"):
        collect(ensemble_scores(ScoreConfig(), [model(1), other]))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"leverage": True, "residual": "rms", "readout": "signed"},
        {"damping_rule": "rest", "damping": 4.0},
        {"damping_rule": "dimension", "damping": 0.2},
        {"damping_rule": "absolute", "damping": 3.0, "norm": "relative"},
        {"method": "dot"},
        {"method": "cosine"},
    ],
)
@pytest.mark.parametrize("dim", [5, 20])
def test_a_model_that_keeps_some_rows_scores_as_one_that_never_had_the_others(settings, dim):
    config, kept = ScoreConfig(**settings), [0, 2, 3, 7, 8, 11]
    rows, errors, queries = normal(12, dim), normal(12, 3, seed=2).square(), normal(3, dim, seed=1)
    whole = ScoredModel(queries, rows, fit_kernel(rows), errors)
    fresh = ScoredModel(queries, rows[kept], fit_kernel(rows[kept]), errors[kept])
    found = collect(ensemble_scores(config, [whole.keeping(kept)]))
    expected = collect(ensemble_scores(config, [fresh]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert whole.keeping(range(12)) is whole
    with pytest.raises(DataError, match="leaves none"):
        whole.keeping([])


def test_chosen_rows_come_block_by_block():
    rows = normal(10, 2)
    chosen = ChosenRows(TensorRows(rows), [9, 0, 1, 5])
    assert (len(chosen), chosen.dim) == (4, 2)
    blocks = list(chosen.blocks(3))
    assert [len(block) for block in blocks] == [2, 1, 1]  # none of the third block is chosen
    torch.testing.assert_close(torch.cat(blocks), rows[[0, 1, 5, 9]], rtol=0, atol=0)


@pytest.mark.parametrize("normalise", [False, True])
def test_features_of_a_path_are_the_mean_over_its_steps(normalise):
    denoiser = unet(num_class_embeds=None)
    sigmas = (3.0, 0.8, 0.2)
    config = mean_features(
        functional="loss",
        sigmas=sigmas,
        noise="slot",
        slot_batch=4,
        normalise=normalise,
        projection=ProjectionConfig(kind="sjlt", dim=64),
    )
    featuriser = Featuriser(denoiser, config, batch_rows=2)
    path = normal(3, 3, *denoiser.sample_shape).float().tanh()
    found = path_features(featuriser, path, [5, 6, 7])
    expected = torch.zeros_like(found)
    for step in range(3):
        noise = attribution_noise(
            "slot", 0, step, [5, 6, 7], denoiser.sample_shape, role="query", slot_batch=4
        )
        for query in range(3):
            one = featuriser.rows(
                path[step, query : query + 1], noise[[query]], torch.tensor([step])
            )
            length = float(one.norms[0]) if normalise else 1.0
            expected[query] += one.vectors[0] / length / 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    with pytest.raises(DataError, match="2 sampling steps for 3 noise levels"):
        path_features(featuriser, path[:2], [5, 6, 7])
