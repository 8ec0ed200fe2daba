"""Presets are settings that featuriser and scorer accept, and they score as their names say."""

import pytest
import torch

from diffcal.attribution.baselines import cosine_blocks, dot_blocks
from diffcal.attribution.damping_selection import OFFICIAL_DAMPINGS
from diffcal.attribution.featurise import FeatureConfig
from diffcal.attribution.kernel import fit_kernel
from diffcal.attribution.presets import PRESETS
from diffcal.attribution.residuals import residual_weights
from diffcal.attribution.score_config import ScoreConfig, score_features
from diffcal.attribution.scores import collect, kernel_scores
from diffcal.config import config_from_dict
from diffcal.errors import ConfigError, DataError

EXPECTED = {
    "das": ("all-outputs", "shared", True, "square"),
    "das-signs": ("random-signs", "shared", True, "square"),
    "das-mean": ("mean", "shared", True, "square"),
    "das-official": ("mean", "slot", True, "square"),
    "dtrak": ("mean-squared-l2-norm", "slot", False, "signed"),
    "trak": ("loss", "slot", False, "signed"),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GRADIENTS = [name for name, preset in PRESETS.items() if preset["inputs"] == "gradients"]
SCORED = [name for name, preset in PRESETS.items() if "scores" in preset]


def test_every_method_is_there():
    assert set(PRESETS) - set(GRADIENTS) == {
        *("pixel-dot", "pixel-cosine", "encoder-dot", "encoder-cosine"),
        *("empirical-influence", "datamodel"),
    }
    assert set(GRADIENTS) == {
        *(
            "das",
            "das-signs",
            "das-mean",
            "das-official",
            "dtrak",
            "trak",
            "journey-trak",
            "tracincp",
            "gas",
        ),
        *("relative-influence", "renormalised-influence", "ekfac"),
        *("gradient-dot", "gradient-cosine"),
    }


@pytest.mark.parametrize("name", GRADIENTS)
def test_every_preset_is_accepted_by_featuriser_and_scorer(name):
    preset = PRESETS[name]
    features = config_from_dict(FeatureConfig, preset["features"])
    scores = config_from_dict(ScoreConfig, preset["scores"])
    assert set(preset) == {"inputs", "features", "scores", "checkpoints", "queries"}
    assert preset["checkpoints"][-1] == 1.0
    if name in EXPECTED:
        found = features.functional, features.noise, features.normalise, scores.readout
        assert found == EXPECTED[name]
    if name not in ("das", "das-signs", "das-mean") and scores.method == "kernel":
        assert scores.damping_grid == OFFICIAL_DAMPINGS
        assert scores.damping in scores.damping_grid


def test_the_default_configurations_are_the_das_preset():
    assert config_from_dict(FeatureConfig, PRESETS["das"]["features"]) == FeatureConfig()
    assert config_from_dict(ScoreConfig, PRESETS["das"]["scores"]) == ScoreConfig()


@pytest.mark.parametrize("name", SCORED)
def test_scores_of_a_preset_are_what_its_settings_say(name):
    rows, queries, errors = normal(12, 5), normal(3, 5, seed=1), normal(12, 4, seed=2).square()
    config = config_from_dict(ScoreConfig, PRESETS[name]["scores"])
    kernel = fit_kernel(rows)
    found = collect(
        score_features(config, queries, rows, kernel=kernel, errors=errors, dtype=torch.float64)
    )
    if config.method != "kernel":
        blocks = dot_blocks if config.method == "dot" else cosine_blocks
        expected = collect(blocks(queries, rows))
    else:
        values = torch.linalg.eigvalsh(rows.T @ rows)
        rest = values[:-1].sum() / (len(rows) - 1)
        units = {"relative": values.sum() / len(rows), "rest": rest, "absolute": 1.0}
        unit = float(units[config.damping_rule])
        damping = config.damping * unit
        expected = kernel_scores(
            kernel,
            queries,
            rows,
            damping,
            residual=residual_weights(errors, config.residual),
            norm=config.norm,
            readout=config.readout,
            dtype=torch.float64,
        )
        grid = config.absolute_grid(kernel)
        assert grid == pytest.approx([value * unit for value in config.damping_grid])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_bad_settings_are_one_clear_line():
    for value in (0.0, -1.0, float("inf")):
        with pytest.raises(ConfigError, match="damping must be positive and finite"):
            ScoreConfig(damping=value)
    with pytest.raises(ConfigError, match="damping_grid must be positive and finite, got -2"):
        ScoreConfig(damping_grid=(1.0, -2.0))
    with pytest.raises(ConfigError, match="'leverage' belongs to method 'kernel', not 'dot'"):
        ScoreConfig(method="dot", leverage=True)
    rows = normal(4, 3)
    with pytest.raises(DataError, match="needs a kernel"):
        collect(score_features(ScoreConfig(), rows, rows))
    with pytest.raises(DataError, match="residual 'rms' needs the training error table"):
        collect(score_features(ScoreConfig(residual="rms"), rows, rows, kernel=fit_kernel(rows)))
