"""Featuriser, store, kernel and scores together on a real small network."""

import pytest
import torch
from diffusers import DDPMScheduler
from gradient_models import liven, mean_features, unet

from diffcal.attribution.feature_shards import shard_ranges
from diffcal.attribution.feature_store import FeatureStore
from diffcal.attribution.featurise import Featuriser
from diffcal.attribution.kernel import fit_kernel
from diffcal.attribution.projection import ProjectionConfig
from diffcal.attribution.score_config import ScoreConfig, score_features
from diffcal.attribution.topk import top_scores
from diffcal.diffusion.diffusers_denoisers import UNet2DDenoiser
from diffcal.errors import ArtifactError

CONFIG = mean_features(timesteps=2, projection=ProjectionConfig(kind="sjlt", dim=256))


def small():
    return unet(num_class_embeds=None)


def clean_samples(denoiser, count=10):
    generator = torch.Generator().manual_seed(0)
    return torch.rand((count, *denoiser.sample_shape), generator=generator) * 2 - 1


def index(folder, featuriser, clean):
    store = FeatureStore.create(folder, spec=featuriser.spec, dim=featuriser.dim)
    for part in shard_ranges(len(clean), 4):
        rows = list(range(part.start, part.stop))
        features = featuriser(clean[rows], rows)
        store.write(part.index, rows, features.vectors, {"error": features.errors})
    return FeatureStore.open(folder)


def test_every_training_image_is_its_own_first_contributor(tmp_path):
    denoiser = small()
    featuriser = Featuriser(denoiser, CONFIG)
    clean = clean_samples(denoiser)
    store = index(tmp_path / "store", featuriser, clean)
    store.require_spec(featuriser.spec)
    assert store.column("error").shape == (10, 2)
    kernel = fit_kernel(store)
    queries = featuriser(clean[:3], [0, 1, 2], role="query").vectors
    for config in (
        ScoreConfig(),
        ScoreConfig(residual="rms", leverage=True),
        ScoreConfig(method="cosine"),
    ):
        blocks = score_features(config, queries, store, kernel=kernel, errors=store.column("error"))
        assert top_scores(blocks, 3).index[:, 0].tolist() == [0, 1, 2]


def test_features_of_another_model_are_refused_by_name(tmp_path):
    first, second = Featuriser(small(), CONFIG), Featuriser(small(), CONFIG)
    assert first.spec == second.spec
    store = FeatureStore.create(tmp_path, spec=first.spec, dim=first.dim)
    other = small()
    liven(other.module, seed=3)
    with pytest.raises(ArtifactError, match=r"\(model: '\w+' there, '\w+' here\)"):
        store.require_spec(Featuriser(UNet2DDenoiser(other.module, DDPMScheduler()), CONFIG).spec)
    noisier = Featuriser(
        small(), mean_features(timesteps=2, noise="slot", projection=CONFIG.projection)
    )
    with pytest.raises(ArtifactError, match=r"spec\.noise: 'shared' there, 'slot' here"):
        FeatureStore.create(tmp_path, spec=noisier.spec, dim=noisier.dim)
