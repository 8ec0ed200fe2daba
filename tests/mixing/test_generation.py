"""Generated images: shared noise, pure ends, symmetry, and independence of the batch."""

import numpy as np
import pytest
import torch
from tiny_edm import tiny_edm

from diffcal.diffusion.samplers import SamplerConfig, sample
from diffcal.errors import ConfigError, NumericalError
from diffcal.mixing.conditions import ConditionConfig
from diffcal.mixing.generation import GenerationConfig, fixed_rows, generate_images
from diffcal.mixing.plan import MixPlan, PlanConfig

SAMPLER = SamplerConfig(steps=4)


def images_of(denoiser, items, members=4, mode="label", sampler=SAMPLER, only=(), seed=0):
    plan = MixPlan(PlanConfig(groups=40, members=members, only=only), denoiser.class_names, seed)
    config = GenerationConfig(condition=ConditionConfig(mode=mode), sampler=sampler)
    parts = [batch.images for batch in generate_images(denoiser, plan, items, config)]
    return np.concatenate(parts)


@pytest.mark.parametrize("mode", ["label", "score", "schedule"])
def test_pure_members_are_plain_conditional_samples(mode):
    denoiser = tiny_edm()
    images = images_of(denoiser, range(4), mode=mode)
    plan = MixPlan(PlanConfig(groups=40, members=4), denoiser.class_names)
    noise = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(plan[0].seed))
    for member, name in ((0, 1), (3, 0)):  # lambda 0 is the second class of the pair (0, 1)
        condition = denoiser.condition(torch.eye(3)[[name]])
        plain = denoiser.decode(sample(denoiser, noise, condition, SAMPLER).float())[0].numpy()
        assert np.abs(images[member].astype(int) - plain.astype(int)).max() <= 1
    assert (images[0] != images[3]).any()


def test_images_depend_on_their_shard_alone():
    denoiser = tiny_edm()
    rows = fixed_rows(denoiser.sample_shape)
    whole = images_of(denoiser, range(rows + 30), members=26)
    tail = images_of(denoiser, range(rows, rows + 30), members=26)
    np.testing.assert_array_equal(tail, whole[rows:])
    # Cut elsewhere, calls have other heights, and a pixel may round to the next value.
    part = images_of(denoiser, range(30), members=26)
    assert np.abs(part.astype(int) - whole[:30].astype(int)).max() <= 1


def test_churn_noise_is_shared_by_the_members_of_a_group():
    denoiser = tiny_edm(classes=2)
    with torch.no_grad():  # without conditions all members must be one image
        for name, parameter in denoiser.module.named_parameters():
            if "map_label" in name:
                parameter.zero_()
    churned = SamplerConfig(steps=4, s_churn=10.0)
    images = images_of(denoiser, range(8), members=4, sampler=churned)
    np.testing.assert_array_equal(images[:4], images[[0, 0, 0, 0]])
    assert (images[0] != images[4]).any()
    assert (images[0] != images_of(denoiser, range(4), members=4)[0]).any()


def test_seeds_decide_the_noise():
    denoiser = tiny_edm()
    assert (images_of(denoiser, range(4)) != images_of(denoiser, range(4), seed=1)).any()


def test_nan_names_the_groups():
    denoiser = tiny_edm()
    with torch.no_grad():
        next(denoiser.module.parameters()).fill_(float("nan"))
    with pytest.raises(NumericalError, match=r"groups 0 to 1: .*sigma"):
        images_of(denoiser, range(8))


def test_unconditional_models_cannot_be_mixed():
    denoiser = tiny_edm(classes=0)
    plan = MixPlan(PlanConfig(), ("a", "b"))
    with pytest.raises(ConfigError, match="unconditional"):
        next(generate_images(denoiser, plan, range(8), GenerationConfig()))


def test_rows_of_a_call_follow_the_image_size():
    assert [fixed_rows((3, s, s)) for s in (8, 16, 32, 64, 512)] == [256, 64, 16, 8, 8]


def bisection(denoiser, items, members=7, mode="label", found=None):
    config = PlanConfig(groups=40, members=members, weights="bisect")
    plan = MixPlan(config, denoiser.class_names, found=found)
    generation = GenerationConfig(condition=ConditionConfig(mode=mode), sampler=SAMPLER)
    return list(generate_images(denoiser, plan, items, generation))


@pytest.mark.parametrize("mode", ["label", "score"])
def test_a_bisected_group_has_the_images_of_its_weights(mode):
    """Drawing the weights that were found gives the ladder, up to rounding in calls of other height."""
    denoiser = tiny_edm()
    batches = bisection(denoiser, range(14), mode=mode)
    assert [batch.items for batch in batches] == [range(7), range(7, 14)]
    found = {index: batch.weights for index, batch in enumerate(batches)}
    for weights in found.values():
        assert weights[[0, -1]].tolist() == [[0, 1], [1, 0]]
        assert bool((weights[:, 0].diff() > 0).all())
    (again,) = bisection(denoiser, range(14), mode=mode, found=found)
    images = np.concatenate([batch.images for batch in batches])
    assert np.abs(again.images.astype(int) - images.astype(int)).max() <= 1


def test_a_bisected_group_does_not_depend_on_its_neighbours():
    denoiser = tiny_edm()
    alone = bisection(denoiser, range(7, 14))[0]
    beside = bisection(denoiser, range(28))[1]
    torch.testing.assert_close(alone.weights, beside.weights, rtol=0, atol=0)
    assert np.abs(alone.images.astype(int) - beside.images.astype(int)).max() <= 1


def test_parts_of_a_bisected_group_are_refused():
    with pytest.raises(ConfigError, match="items 3 to 9 are not whole groups of 7"):
        bisection(tiny_edm(), range(3, 10))
