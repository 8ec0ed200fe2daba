"""Modes of mixing on denoisers in closed form, and interpolation against goldens."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcal.diffusion.closed_forms import GaussianDenoiser, MixtureDenoiser
from diffcal.diffusion.edm_denoiser import EDMDenoiser
from diffcal.diffusion.edm_networks import build_network
from diffcal.diffusion.samplers import SamplerConfig, sample, sampling_sigmas
from diffcal.errors import ConfigError, DataError
from diffcal.mixing.conditions import (
    ConditionConfig,
    MixedScores,
    ScheduledClasses,
    mixed_denoiser,
)
from diffcal.mixing.interpolation import interpolate_conditions, slerp
from diffcal.mixing.weights import check_weights, lambda_grid, pair_weights

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/csm.json").read_text("utf-8"))["cases"]
DOUBLE = torch.float64
FAST = SamplerConfig(solver="unipc_3", steps=10)


def gaussian():
    generator = torch.Generator().manual_seed(0)
    return GaussianDenoiser(torch.randn(4, 1, 2, 2, generator=generator, dtype=DOUBLE), 0.5)


def mixture():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(8, 1, 2, 2, generator=generator, dtype=DOUBLE)
    return MixtureDenoiser(means, torch.arange(8) % 4, 0.3)


def noise(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 2, 2, generator=generator, dtype=DOUBLE)


WEIGHTS = torch.tensor(
    [[1.0, 0, 0, 0], [0.25, 0, 0.75, 0], [0, 0, 0, 1], [0.2, 0.5, 0.1, 0.2], [0, 0.5, 0.5, 0]]
)


def drawn(model, weights, config, sampler=FAST, seed=1):
    function, condition = mixed_denoiser(model, weights, config)
    return sample(function, noise(len(weights), seed), condition, sampler)


def eps_denoiser(rows):
    """Denoiser whose noise prediction is a constant row for each class; the last is unconditional."""
    model = GaussianDenoiser(torch.zeros(len(rows) - 1, 1, 1, 2, dtype=DOUBLE))
    table = torch.tensor(rows, dtype=DOUBLE).reshape(len(rows), 1, 1, 2)

    class Constant(GaussianDenoiser):
        def __call__(self, x, sigma, condition=None):
            eps = torch.einsum("bk,kchw->bchw", condition, table)
            return x - sigma.reshape(-1, 1, 1, 1) * eps

        def condition(self, weights):
            return torch.cat([weights, torch.zeros(len(weights), 1)], dim=1).double()

        def unconditional(self, batch_size):
            row = torch.zeros(batch_size, len(rows), dtype=DOUBLE)
            row[:, -1] = 1
            return row

    model.__class__ = Constant
    return model


@pytest.mark.parametrize("mode", ["label", "score"])
def test_guidance_of_mixed_scores_of_the_golden_file(mode):
    case = GOLDEN["score_mixing_with_guidance"]
    model = eps_denoiser([case["eps_c1"], case["eps_c2"], case["eps_uncond"]])
    weights = torch.tensor([[case["lambda_c1"], 1 - case["lambda_c1"]]])
    function, condition = mixed_denoiser(model, weights, mode)
    seen = []

    def record(i, sigma, x, denoised):
        seen.append((sigma, x.clone(), denoised.clone()))

    start = torch.zeros(1, 1, 1, 2, dtype=DOUBLE)
    config = SamplerConfig(solver="euler", steps=2, guidance_scale=case["guidance_w"])
    sample(function, start, condition, config, on_step=record)
    sigma, _, denoised = seen[0]
    eps = (start * sigma - denoised) / sigma
    expected = torch.tensor(case["expected"], dtype=DOUBLE).reshape(1, 1, 1, 2)
    torch.testing.assert_close(eps, expected, rtol=1e-12, atol=0)


def test_label_and_score_mixing_agree_on_gaussians():
    score = drawn(gaussian(), WEIGHTS, "score")
    torch.testing.assert_close(score, drawn(gaussian(), WEIGHTS, "label"), rtol=0, atol=1e-6)
    guidance = SamplerConfig(solver="unipc_3", steps=10, guidance_scale=2.0)
    torch.testing.assert_close(
        drawn(gaussian(), WEIGHTS, "score", guidance),
        drawn(gaussian(), WEIGHTS, "label", guidance),
        rtol=0,
        atol=1e-6,  # the weights are float32
    )


def test_label_and_score_mixing_differ_on_mixtures():
    difference = drawn(mixture(), WEIGHTS, "score") - drawn(mixture(), WEIGHTS, "label")
    rows = difference.flatten(1).abs().amax(dim=1)
    assert float(rows[[0, 2]].max()) < 1e-12  # pure rows
    assert float(rows[[1, 3]].max()) > 0.01


MODES = [
    ConditionConfig(mode="label"),
    ConditionConfig(mode="embedding"),
    ConditionConfig(mode="embedding", interpolation="renorm"),
    ConditionConfig(mode="embedding", interpolation="slerp"),
    ConditionConfig(mode="score"),
    ConditionConfig(mode="score", rows_per_call=3),
    ConditionConfig(mode="schedule"),
    ConditionConfig(mode="schedule", schedule_range=(1.0, 1.0)),
]


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("config", MODES, ids=str)
def test_pure_members_are_the_plain_samples_of_their_class(config, scale):
    model, weights = mixture(), pair_weights(lambda_grid(8), 1, 3, 4)
    sampler = SamplerConfig(
        solver="dpmpp_2m", steps=8, guidance_scale=scale, guidance_interval=(0.05, 10.0)
    )
    result = drawn(model, weights, config, sampler)
    for row, label in ((0, 3), (7, 1)):
        condition = model.condition(torch.eye(4)[[label]])
        plain = sample(model, noise(8)[[row]], condition, sampler)
        torch.testing.assert_close(result[[row]], plain, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("config", MODES, ids=str)
def test_rows_do_not_depend_on_their_company(config):
    model, weights = mixture(), pair_weights(lambda_grid(5), 0, 2, 4)
    together = drawn(model, weights, config)
    for row in range(5):
        function, condition = mixed_denoiser(model, weights[[row]], config)
        alone = sample(function, noise(5)[[row]], condition, FAST)
        torch.testing.assert_close(together[[row]], alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("config", [c for c in MODES if c.mode != "schedule"], ids=str)
def test_swapped_pairs_give_the_same_samples(config):
    model, grid = mixture(), lambda_grid(5)
    forward = drawn(model, pair_weights(grid, 0, 2, 4), config)
    swapped = drawn(model, pair_weights(1 - grid, 2, 0, 4), config)
    torch.testing.assert_close(forward, swapped, rtol=1e-6, atol=1e-6)


def test_score_mixing_skips_absent_classes_and_batches_the_rest():
    sizes = []

    class Recording(MixtureDenoiser):
        def __call__(self, x, sigma, condition=None):
            sizes.append(len(x))
            return super().__call__(x, sigma, condition)

    model = mixture()
    model.__class__ = Recording
    sigma = torch.ones(5, dtype=DOUBLE)
    plain = MixedScores(model, WEIGHTS)(noise(5), sigma)
    guided = MixedScores(model, WEIGHTS).with_guidance(2.0)(noise(5), sigma)
    assert sizes == [10, 15]  # 1 + 2 + 1 + 4 + 2 positive weights; one more row each if guided
    sizes.clear()
    for mix, expected in (
        (MixedScores(model, WEIGHTS, rows_per_call=4), plain),
        (MixedScores(model, WEIGHTS, rows_per_call=4).with_guidance(2.0), guided),
    ):
        torch.testing.assert_close(mix(noise(5), sigma), expected, rtol=1e-12, atol=1e-12)
    assert sizes == [4] * 7


def test_schedule_gives_each_class_its_share_of_the_noise_levels():
    turns = []

    class Recording(GaussianDenoiser):
        def __call__(self, x, sigma, condition=None):
            turns.append((float(sigma[0]), condition.argmax(dim=1).tolist()))
            return super().__call__(x, sigma, condition)

    model = gaussian()
    model.__class__ = Recording
    weights = torch.tensor([[0.25, 0, 0.75, 0], [0, 0, 0, 1], [0.5, 0.25, 0.25, 0]])
    mix = ScheduledClasses(model, weights, (0.1, 10.0))
    for exponent in (2.0, 0.51, 0.49, 0.01, -0.01, -0.49, -0.51, -2.0):  # sigma = 10^exponent
        mix(noise(3), torch.full((3,), 10.0**exponent, dtype=DOUBLE))
    found = [classes for _, classes in turns]
    assert [row[0] for row in found] == [0, 0, 2, 2, 2, 2, 2, 2]
    assert [row[1] for row in found] == [3] * 8
    assert [row[2] for row in found] == [0, 0, 0, 0, 1, 1, 2, 2]
    turns.clear()
    sharp = ScheduledClasses(model, weights, (1.0, 1.0))
    for sigma in (1.0, 0.999):
        sharp(noise(3), torch.full((3,), sigma, dtype=DOUBLE))
    assert [classes for _, classes in turns] == [[0, 3, 0], [2, 3, 2]]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0.01, 1), min_size=3, max_size=3), st.floats(-3, 3))
def test_schedule_is_always_in_some_class_of_positive_weight(raw, exponent):
    weights = torch.tensor([[0.0, *raw]])
    weights = weights / weights.sum()
    mix = ScheduledClasses(gaussian(), weights, (0.2, 20.0))
    turn = int(mix._turn(torch.tensor([10.0**exponent]))[0])
    assert 0 <= turn < 3


def test_slerp_of_the_golden_file():
    case = GOLDEN["slerp"]
    t = torch.tensor(case["t"], dtype=DOUBLE)
    a, b = (torch.tensor(case[key], dtype=DOUBLE).expand(4, 2) for key in ("a", "b"))
    expected = torch.tensor(case["expected"], dtype=DOUBLE)
    torch.testing.assert_close(slerp(a, b, t), expected, rtol=1e-12, atol=1e-15)
    table = torch.stack([a[0], b[0]])
    mixed = interpolate_conditions(table, torch.stack([1 - t, t], dim=1), "slerp")
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-15)


def test_slerp_between_parallel_vectors_is_linear():
    a = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[2.0, 4.0], [1.0, 1.0], [-1.0, 0.0]])
    expected = torch.tensor([[1.5, 3.0], [0.5, 0.5], [0.0, 0.0]])
    torch.testing.assert_close(slerp(a, b, torch.full((3,), 0.5)), expected, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.sampled_from(["linear", "renorm"]), st.integers(2, 4))
def test_interpolation_of_token_sequences(seed, interpolation, classes):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(classes, 3, 5, generator=generator, dtype=DOUBLE)
    weights = torch.rand(6, classes, generator=generator, dtype=DOUBLE)
    weights = weights / weights.sum(dim=1, keepdim=True)
    mixed = interpolate_conditions(table, weights, interpolation)
    assert mixed.shape == (6, 3, 5)
    pure = interpolate_conditions(table, torch.eye(classes, dtype=DOUBLE), interpolation)
    torch.testing.assert_close(pure, table, rtol=1e-9, atol=1e-12)
    if interpolation == "renorm":
        wanted = weights @ table.norm(dim=-1)
        torch.testing.assert_close(mixed.norm(dim=-1), wanted, rtol=1e-9, atol=1e-12)


def test_grid_and_pairs_of_the_golden_file():
    case = GOLDEN["lambda_grid"]
    grid = lambda_grid(case["inputs"]["n"])
    expected = torch.tensor(case["expected_lambda"])
    torch.testing.assert_close(grid, expected, rtol=0, atol=case["atol"])
    weights = pair_weights(grid, *case["inputs"]["pair"], case["inputs"]["num_classes"])
    expected = torch.tensor(case["expected_label_vectors"])
    torch.testing.assert_close(weights, expected, rtol=0, atol=case["atol"])
    check_weights(weights, 4)


def edm_network():
    torch.manual_seed(0)
    config = {
        "preconditioner": "EDMPrecond",
        "kwargs": {
            "img_resolution": 8,
            "img_channels": 1,
            "label_dim": 3,
            "model_type": "SongUNet",
            "model_channels": 8,
            "channel_mult": [1],
            "num_blocks": 1,
            "attn_resolutions": [],
            "label_dropout": 0.1,
            "resample_filter": [1.0, 1.0],
        },
    }
    network = build_network(config)
    with torch.no_grad():
        for parameter in network.parameters():  # no layer is left at zero
            parameter.add_(0.05 * torch.randn_like(parameter))
    return EDMDenoiser(network)


@pytest.mark.parametrize("config", MODES, ids=str)
def test_every_mode_draws_from_a_real_network(config):
    model = edm_network()
    start = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(2)).expand(4, 1, 8, 8)
    weights = pair_weights(lambda_grid(4), 0, 2, 3)
    sampler = SamplerConfig(solver="dpmpp_2m", steps=4, guidance_scale=1.5)
    function, condition = mixed_denoiser(model, weights, config)
    result = sample(function, start, condition, sampler)
    assert result.shape == (4, 1, 8, 8)
    plain = sample(model, start[:1], model.condition(torch.eye(3)[[2]]), sampler)
    torch.testing.assert_close(result[:1], plain, rtol=0, atol=1e-4)
    assert float((result[0] - result[3]).abs().max()) > 1e-4


def test_rounding_of_the_network_reaches_the_grid_through_a_mix():
    model = edm_network()
    model.module.round_sigma = lambda sigma: (torch.as_tensor(sigma) * 100).ceil() / 100
    function, _ = mixed_denoiser(model, torch.eye(3), "score")
    levels = sampling_sigmas(function, SamplerConfig(steps=5))[:-1] * 100
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-9)


def test_bad_input_is_refused():
    model = gaussian()
    with pytest.raises(DataError, match="row 1 of the weights"):
        mixed_denoiser(model, torch.tensor([[1.0, 0, 0, 0], [0.5, 0, 0, 0.4]]))
    with pytest.raises(DataError, match="row 0 of the weights"):
        mixed_denoiser(model, torch.tensor([[1.5, -0.5, 0, 0]]))
    with pytest.raises(DataError, match="3 columns for 4 classes"):
        mixed_denoiser(model, torch.eye(3))
    with pytest.raises(DataError, match="two classes"):
        mixed_denoiser(model, WEIGHTS, ConditionConfig(mode="embedding", interpolation="slerp"))
    with pytest.raises(DataError, match="bound to its 5 rows"):
        mixed_denoiser(model, WEIGHTS, "score")[0](noise(2), torch.ones(2).double(), None)
    with pytest.raises(ConfigError, match="schedule_range"):
        ConditionConfig(schedule_range=(2.0, 1.0))
    with pytest.raises(ConfigError, match="rows_per_call"):
        ConditionConfig(rows_per_call=0)
    with pytest.raises(ConfigError, match="within"):
        pair_weights(torch.tensor([1.2]), 0, 1, 3)
    with pytest.raises(ConfigError, match="no pair"):
        pair_weights(lambda_grid(3), 1, 1, 3)
    with pytest.raises(ConfigError, match="at least 2"):
        lambda_grid(1)
    model.condition_kind = "none"
    with pytest.raises(ConfigError, match="unconditional"):
        mixed_denoiser(model, WEIGHTS)
