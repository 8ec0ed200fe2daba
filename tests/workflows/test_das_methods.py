"""Every method through the commands: several models, checkpoints, sampling paths, embeddings."""

import pyarrow.parquet as pq
import pytest
import torch

from diffcal.attribution.feature_store import FeatureStore
from diffcal.attribution.featurise import Featuriser
from diffcal.attribution.presets import PRESETS
from diffcal.cli import main
from diffcal.config import build_config
from diffcal.core.runs import read_json
from diffcal.data.images import decode_image
from diffcal.data.sources import open_images
from diffcal.diffusion.checkpoints import load_denoiser, save_denoiser
from diffcal.diffusion.denoisers import images_to_model
from diffcal.diffusion.samplers import SamplerConfig, sample, sampling_sigmas
from diffcal.errors import ArtifactError, CheckpointError, ConfigError, DataError
from diffcal.workflows import das
from diffcal.workflows.csm import csm_config, run_generation
from diffcal.workflows.das_redraw import ClassImages, MixImages, denoised_levels
from diffcal.workflows.das_score import score_queries
from diffcal.workflows.train_diffusion import TrainDiffusionConfig, train_diffusion

ROWS = 24
SMALL = [
    "model.source=bundled:digits",
    f"data.rows={ROWS}",
    "store.shard_rows=10",
]
GRADIENTS = [
    "features.timesteps=[400]",
    "features.params=dec.8x8_block1",
    "features.projection.kind=sjlt",
    "features.projection.dim=64",
    "features.projection.unit_variance=false",
]


def matrix(folder, queries):
    """Scores [queries, ROWS] of a scoring that lists every training image."""
    found = torch.full((queries, ROWS), float("nan"), dtype=torch.float64)
    order = pq.read_table(folder / "queries.parquet")["query"].to_pylist()
    for row in pq.read_table(folder / "scores.parquet").to_pylist():
        found[order.index(row["query"]), row["training"]] = row["score"]
    assert not found.isnan().any()
    return found


def make(folder, method, *more, queries=3, name="digits", scores=()):
    settings = SMALL + (GRADIENTS if PRESETS[method]["inputs"] == "gradients" else [])
    if method == "das":  # the output layer cannot be left out
        settings = [one for one in settings if "params" not in one]
    config = das.das_config(method, [*settings, *more])
    summary = das.index(config, folder, device="cpu")
    overrides = [f"top={ROWS}", f"queries.rows={queries}", *scores]
    run = das.score_config(folder, name, overrides)
    score_queries(folder, run, folder / "scores", device="cpu")
    return summary, matrix(folder / "scores", queries)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed in (1, 2):
        network = load_denoiser("bundled:digits").network
        with torch.no_grad():
            for at, parameter in enumerate(network.parameters()):
                generator = torch.Generator().manual_seed(100 * seed + at)
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        save_denoiser(folder / str(seed), network, [str(k) for k in range(10)], {})
    return [str(folder / "1"), str(folder / "2")]


def features(index, part):
    phi = FeatureStore.open(index / part / "features").rows().double()
    (queries,) = (index / part / "queries").iterdir()
    return phi, FeatureStore.open(queries).rows().double()


def signed(phi, psi, rule="rest", value=20.0):
    gram = phi.T @ phi
    values = torch.linalg.eigvalsh(gram)
    mean = values[:-1].sum() / (len(phi) - 1) if rule == "rest" else values.sum() / len(phi)
    damping = value * mean
    return psi @ torch.linalg.solve(gram + damping * torch.eye(len(gram)).double(), phi.T)


def test_scores_of_several_models_are_averaged_as_asked(models, tmp_path):
    index = tmp_path / "index"
    summary, found = make(index, "das", f"models={models}")
    assert summary["models"] == 2
    parts = [signed(*features(index, f"models/{at:02d}")) for at in range(2)]
    assert not torch.allclose(parts[0], parts[1], rtol=0.1)
    squares = torch.stack([part.square() for part in parts]).mean(dim=0)
    torch.testing.assert_close(found, squares, rtol=2e-3, atol=1e-6 * float(squares.max()))
    run = das.score_config(
        index, "digits", [f"top={ROWS}", "queries.rows=3", "scores.average=signed"]
    )
    score_queries(index, run, tmp_path / "signed", device="cpu")
    mean = torch.stack(parts).mean(dim=0).square()
    torch.testing.assert_close(
        matrix(tmp_path / "signed", 3), mean, rtol=2e-3, atol=1e-6 * float(mean.max())
    )
    with pytest.raises(ConfigError, match="an index of 2 models"):
        das.score(index, "digits", rows=2, denoiser=load_denoiser(models[0]), device="cpu")
    with pytest.raises(ArtifactError, match="models: 2 there"):
        das.index(das.das_config("das-mean", SMALL + GRADIENTS), index, device="cpu")
    with pytest.raises(ConfigError, match="names one model twice"):
        das.das_config("das", [*SMALL, f"models={models[:1] * 2}"])


def test_tracincp_and_gas_follow_the_checkpoints_that_a_training_kept(tmp_path):
    run = tmp_path / "run"
    training = build_config(
        TrainDiffusionConfig,
        overrides=[
            "rows=30",
            "optimizer.steps=4",
            "optimizer.batch_size=4",
            "optimizer.warmup_steps=1",
            "optimizer.ema_value=1.0",
            "network.model_channels=8",
            "network.channel_mult=[1]",
            "network.num_blocks=1",
            "sample_every=9",
            "sample_steps=2",
            "keep=[0.25,0.5,0.75,1.0]",
        ],
    )
    train_diffusion(training, run, device="cpu")
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert kept == ["step-0000001", "step-0000002", "step-0000003"]
    prints = {load_denoiser(run / "checkpoints" / name).fingerprint for name in kept}
    assert len(prints | {load_denoiser(run / "checkpoint").fingerprint}) == 4
    where = [f"model.source={run}", "features.params=all"]
    for method in ("tracincp", "gas"):
        index = tmp_path / method
        summary, found = make(index, method, *where)
        assert summary["models"] == 4
        expected = torch.zeros_like(found)
        for at in range(4):
            phi, psi = features(index, f"models/{at:02d}")
            if method == "gas":
                phi, psi = (rows / rows.norm(dim=1, keepdim=True) for rows in (phi, psi))
            expected += psi @ phi.T / 4
        torch.testing.assert_close(
            found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max())
        )
        assert not (index / "models/00/kernel.safetensors").exists()
    (run / "checkpoints/step-0000002/config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 2 \(50 % of 4\)"):
        das.index(das.das_config("gas", SMALL + where), tmp_path / "x", device="cpu")
    command = ["das", "index", "--preset", "tracincp", "--model", "bundled:digits"]
    assert main([*command, "--out", str(tmp_path / "y"), "--device", "cpu"]) == 2
    with pytest.raises(ConfigError, match=r"keep: shares of the training lie in \(0, 1\], got 2"):
        build_config(TrainDiffusionConfig, overrides=["keep=[2.0]"])


@pytest.mark.parametrize("method", ["pixel-dot", "pixel-cosine", "encoder-dot", "encoder-cosine"])
def test_images_are_compared_without_gradients(method, tmp_path):
    _, found = make(tmp_path / "index", method, "encoder.options={sigmas=[0.2]}")
    assert not (tmp_path / "index/kernel.safetensors").exists()
    phi, psi = features(tmp_path / "index", "")
    if method.startswith("pixel"):
        pixels = images_to_model(torch.as_tensor(open_images("digits").images[:ROWS]))
        torch.testing.assert_close(phi, pixels.flatten(1).double(), rtol=1e-3, atol=1e-3)
    else:
        assert phi.shape[1] != 64
    if method.endswith("cosine"):
        phi, psi = (rows / rows.norm(dim=1, keepdim=True) for rows in (phi, psi))
        # Of itself; features are kept in half precision.
        assert found.diagonal().tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    torch.testing.assert_close(found, psi @ phi.T, rtol=1e-3, atol=1e-3 * float(found.max()))


@pytest.mark.parametrize("method", ["relative-influence", "renormalised-influence"])
def test_influence_is_divided_by_the_length_of_what_it_moves(method, tmp_path):
    _, found = make(
        tmp_path / "index", method, "scores.damping_rule=relative", "scores.damping=0.1"
    )
    phi, psi = features(tmp_path / "index", "")
    length = phi.norm(dim=1)
    if method == "relative-influence":
        gram = phi.T @ phi
        damping = 0.1 * gram.diagonal().sum() / ROWS
        length = torch.linalg.solve(gram + damping * torch.eye(64).double(), phi.T).norm(dim=0)
    expected = signed(phi, psi, "relative", 0.1) / length
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["gradient-dot", "gradient-cosine"])
def test_gradients_without_a_kernel(method, tmp_path):
    _, found = make(tmp_path / "index", method)
    phi, psi = features(tmp_path / "index", "")
    if method == "gradient-cosine":
        phi, psi = (rows / rows.norm(dim=1, keepdim=True) for rows in (phi, psi))
    torch.testing.assert_close(found, psi @ phi.T, rtol=2e-3, atol=2e-3 * float(found.abs().max()))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    run = tmp_path_factory.mktemp("mixed") / "run"
    overrides = [
        "generate.model.source=bundled:digits",
        "generate.plan.groups=3",
        "generate.plan.members=3",
        "generate.groups_per_shard=2",
        "generate.generation.sampler.solver=euler",
        "generate.generation.sampler.steps=3",
    ]
    run_generation(csm_config(None, overrides), run, device="cpu")
    return run


def stored(run):
    files = sorted((run / "generated").glob("shard-*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return rows, torch.stack([torch.as_tensor(decode_image(r["image"]["bytes"], "")) for r in rows])


def test_generated_images_are_drawn_again_to_the_byte(mixed):
    denoiser = load_denoiser("bundled:digits")
    _, images = stored(mixed)
    assert len(images) == 9
    for positions in (range(9), range(1, 9, 3)):
        redraw = MixImages(mixed, positions, ("",) * len(positions))
        assert redraw.denoiser == denoiser.fingerprint
        assert torch.equal(redraw.draw(denoiser), images[list(positions)])
    some = list(redraw.batches(denoiser, [2]))
    assert [batch.positions for batch in some] == [(2,)]
    assert torch.equal(some[0].images[0], images[7])


def test_bisected_images_are_drawn_again_from_the_ratios_that_were_found(tmp_path):
    overrides = [
        "generate.plan.groups=3",
        "generate.plan.members=8",
        "generate.plan.weights=bisect",
        "generate.groups_per_shard=2",
        "generate.generation.sampler.steps=3",
    ]
    run_generation(csm_config(None, overrides), tmp_path, device="cpu")
    rows, images = stored(tmp_path)
    ladders = [[row["weights"][0] for row in rows[start : start + 8]] for start in (0, 8, 16)]
    assert len(set(map(tuple, ladders))) > 1
    redraw = MixImages(tmp_path, range(1, 24, 2), ("",) * 12)
    drawn = redraw.draw(load_denoiser("bundled:digits"))
    assert int((drawn.int() - images[1::2].int()).abs().max()) <= 1


def test_journey_trak_takes_its_queries_along_the_way(mixed, tmp_path):
    index = tmp_path / "index"
    summary, _ = make(index, "journey-trak", name=str(mixed), queries=4)
    assert summary["images"] == ROWS
    _, psi = features(index, "")
    # By hand: the predicted clean image of each Euler step, noised again to the level of the step.
    denoiser = load_denoiser("bundled:digits")
    sampler = SamplerConfig(solver="euler", steps=3)
    sigmas = sampling_sigmas(denoiser, sampler).tolist()[:-1]
    assert denoised_levels(denoiser, sampler) == pytest.approx(sigmas)
    rows, _ = stored(mixed)
    seeds = [row["seed"] for row in rows[:4]]
    noise = torch.stack(
        [
            torch.randn(denoiser.sample_shape, generator=torch.Generator().manual_seed(s))
            for s in seeds
        ]
    )
    weights = torch.zeros(4, 10)
    for at, row in enumerate(rows[:4]):
        weights[at, row["classes"]] = torch.tensor(row["weights"])
    condition, predicted = denoiser.condition(weights), []
    sample(
        denoiser,
        noise,
        condition,
        sampler,
        on_step=lambda i, sigma, x, denoised: predicted.append(denoised.float().clone()),
    )
    config = das.das_config("journey-trak", SMALL + GRADIENTS)
    expected = torch.zeros_like(psi)
    for step, sigma in enumerate(sigmas):
        settings = [*SMALL, *GRADIENTS, f"features.sigmas=[{sigma}]"]
        one = Featuriser(denoiser, das.das_config("journey-trak", settings).features)
        draws = torch.stack([_slot(step, query, denoiser.sample_shape) for query in range(4)])
        batch = one.rows(predicted[step], draws, torch.zeros(4, dtype=torch.long), condition)
        expected += batch.vectors.double() / len(sigmas)
    assert not config.features.normalise
    torch.testing.assert_close(psi, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def _slot(step, query, shape):
    """Noise of the published rule: place ``query`` of a batch drawn with seed ``step``."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn((52, *shape), generator=generator)[query]


def test_a_path_needs_queries_whose_path_is_known(mixed, models, tmp_path):
    index = tmp_path / "index"
    config = das.das_config("journey-trak", SMALL + GRADIENTS)
    das.index(config, index, device="cpu")
    with pytest.raises(DataError, match="cannot be drawn again: their noise is not known"):
        das.score(index, "digits", rows=2, device="cpu")
    other = das.das_config("journey-trak", [*SMALL, *GRADIENTS, f"model.source={models[0]}"])
    das.index(other, tmp_path / "other", device="cpu")
    with pytest.raises(ArtifactError, match=r"drawn by another model than the index's \(model: "):
        das.score(tmp_path / "other", mixed, rows=2, device="cpu")
    with pytest.raises(ConfigError, match="samplers without churn"):
        denoised_levels(load_denoiser("bundled:digits"), SamplerConfig(s_churn=10.0))
    # The same queries without their path, by any method's index.
    run = das.score_config(index, str(mixed), ["queries.rows=2", "queries.features=images"])
    score_queries(index, run, tmp_path / "images", device="cpu")
    assert read_json(tmp_path / "images/scores.json")["method"] == "journey-trak"


def test_levels_of_a_path_are_where_the_clean_image_was_predicted():
    denoiser = load_denoiser("bundled:digits")
    for solver in ("heun", "euler", "unipc_2"):
        sampler = SamplerConfig(solver=solver, steps=4)
        seen = []

        class Watch:
            def __getattr__(self, name):
                return getattr(denoiser, name)

            def __call__(self, x, sigma, condition=None):
                found = denoiser(x, sigma, condition)
                seen.append((float(sigma[0]), found))  # noqa: B023
                return found

        kept = []
        noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        sample(
            Watch(),
            noise,
            denoiser.condition(torch.eye(10)[:1]),
            sampler,
            on_step=lambda i, s, x, d: kept.append(d.clone()),  # noqa: B023
        )
        for level, denoised in zip(denoised_levels(denoiser, sampler), kept, strict=True):
            assert any(
                abs(level - sigma) < 1e-6 * level and torch.equal(found.double(), denoised.double())
                for sigma, found in seen
            ), solver


def test_images_of_classes_do_not_depend_on_which_are_wanted():
    denoiser = load_denoiser("bundled:digits")
    sampler = SamplerConfig(preset="fast", steps=3)
    images = ClassImages(5, denoiser.class_names, sampler, batch=2)
    whole = images.draw(denoiser)
    assert whole.shape == (5, 8, 8, 1)
    (part,) = images.batches(denoiser, [3], path=True)
    assert part.positions == (3,)
    assert torch.equal(part.images[0], whole[3])
    assert part.denoised.shape == (3, 1, 1, 8, 8)
    torch.testing.assert_close(
        denoiser.decode(part.denoised[-1]).float(), part.images.float(), atol=40, rtol=0
    )
    assert images.captions == ("0", "1", "2", "3", "4")
    assert ClassImages(5, (), sampler).labels.tolist() == [0] * 5
