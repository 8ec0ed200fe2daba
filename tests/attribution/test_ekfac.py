"""EK-FAC: factors and eigenvalues written out, influence by explicit matrices, files and refusals."""

import pytest
import torch
import torch.nn.functional as F
from curvatures import diagonal
from gradient_models import dit, edm, unet
from test_featurising import clean_samples
from torch import nn

from diffcal.attribution.ekfac import (
    CurvatureConfig,
    CurvedProjection,
    Ekfac,
    KroneckerBlock,
    load_ekfac,
    matrix_shape,
)
from diffcal.attribution.ekfac_fit import fit_ekfac
from diffcal.attribution.featurise import FeatureConfig, Featuriser
from diffcal.attribution.outputs import DenoiserObjective
from diffcal.attribution.parameters import Layout, select_parameters
from diffcal.attribution.projection import IdentityProjection, ProjectionConfig
from diffcal.attribution.timesteps import noise_levels
from diffcal.core.rng import item_normal, item_signs
from diffcal.diffusion.module_denoiser import ModuleDenoiser, schedule_noise
from diffcal.errors import ArtifactError, ConfigError, DataError, NumericalError

TIMESTEPS = (100, 600)
ASKED = CurvatureConfig(kind="ekfac", images=3)
WHOLE = ProjectionConfig(kind="identity")


def condition_of(denoiser, count):
    if denoiser.condition_kind == "none":
        return None
    return denoiser.condition(torch.eye(denoiser.num_classes)[:count])


def features_of(denoiser, curvature=None, **options):
    settings = {"functional": "loss", "combine": "mean", "normalise": False, "projection": WHOLE}
    asked = {"curvature": ASKED} if curvature is not None else {}
    config = FeatureConfig(timesteps=TIMESTEPS, **(settings | asked | options))
    return Featuriser(denoiser, config, curvature=curvature)


def fitted(denoiser, count=3, at_once=2, config=ASKED, **options):
    clean = clean_samples(denoiser, count)
    condition = condition_of(denoiser, count)
    parts = [range(start, min(start + at_once, count)) for start in range(0, count, at_once)]
    samples = [
        (clean[list(part)], part, None if condition is None else condition[list(part)])
        for part in parts
    ]
    levels = noise_levels(denoiser, TIMESTEPS)
    return fit_ekfac(denoiser, samples, levels, config, **options), clean, condition


def signed_rows(denoiser, clean, condition, config=ASKED):
    """(Objective, inputs) of every (sample, timestep), drawn one by one."""
    objective = DenoiserObjective(denoiser, "all-outputs")
    levels = noise_levels(denoiser, TIMESTEPS)
    for index in range(len(clean)):
        for at, t in enumerate(TIMESTEPS):
            shape = tuple(clean.shape[1:])
            yield (
                objective,
                objective.inputs(
                    clean[index : index + 1],
                    item_normal(config.seed, f"attribution-curvature-noise|{t}", index, shape)[
                        None
                    ],
                    levels.sigmas[at : at + 1].double(),
                    levels.weights[at : at + 1].double(),
                    None if condition is None else condition[index : index + 1],
                    item_signs(config.seed, f"attribution-curvature-signs|{t}", index, shape)[None],
                ),
            )


def gradients_one_by_one(denoiser, clean, condition, names="all"):
    parameters = select_parameters(denoiser.module, names)
    rows = []
    for objective, inputs in signed_rows(denoiser, clean, condition):
        values, _ = objective(*inputs)
        found = torch.autograd.grad(values.sum(), list(parameters.values()), allow_unused=True)
        rows.append(
            {
                n: torch.zeros_like(p) if g is None else g
                for (n, p), g in zip(parameters.items(), found, strict=True)
            }
        )
    return rows


@pytest.mark.parametrize("make", [unet, edm, dit])
def test_eigenvalues_are_second_moments_of_rotated_gradients(make):
    denoiser = make()
    curvature, clean, condition = fitted(denoiser)
    rows = gradients_one_by_one(denoiser, clean, condition)
    factor = 2 / clean[0].numel()
    assert set(curvature.blocks) == set(rows[0])
    rotated = 0
    for name, block in curvature.blocks.items():
        gradients = torch.stack([row[name] for row in rows])
        matrices = gradients.reshape(len(rows), *matrix_shape(tuple(gradients.shape[1:])))
        for basis, side in ((block.left, 1), (block.right, 2)):
            if basis is not None:
                rotated += 1
                torch.testing.assert_close(
                    basis.T @ basis, torch.eye(len(basis)), atol=1e-5, rtol=0
                )
                assert len(basis) == matrices.shape[side]
        wanted = factor * block.rotated(matrices).square().mean(dim=0)
        scale = max(float(wanted.max()), 1e-12)
        torch.testing.assert_close(block.eigenvalues, wanted, atol=2e-4 * scale, rtol=2e-3)
    assert rotated > 10


def test_bases_diagonalise_the_moments_of_inputs_and_output_gradients():
    denoiser = unet()
    curvature, clean, condition = fitted(denoiser)
    modules = dict(denoiser.module.named_modules())
    inputs, gradients, sums = {}, {}, {}
    watched = {
        n: m
        for n, m in modules.items()
        if isinstance(m, nn.Linear | nn.Conv2d) and m.weight is not None
    }

    def hear(name):
        def forward(module, args, output):
            inputs[name] = args[0].detach()
            output.register_hook(lambda g: gradients.__setitem__(name, g.detach()))

        return forward

    hooks = [module.register_forward_hook(hear(name)) for name, module in watched.items()]
    for objective, row in signed_rows(denoiser, clean, condition):
        objective(*row)[0].sum().backward()
        for name, module in watched.items():
            x, g = inputs[name], gradients[name]
            if isinstance(module, nn.Conv2d):
                x = F.unfold(x, module.kernel_size, padding=module.padding, stride=module.stride)
                x, g = x.mT.flatten(0, 1), g.flatten(2).mT.flatten(0, 1)
            else:
                x, g = x.flatten(0, -2), g.flatten(0, -2)
            for side, values in (("right", x), ("left", g)):
                sums[name, side] = sums.get((name, side), 0) + values.T @ values
    for hook in hooks:
        hook.remove()
    for name in watched:
        block = curvature.blocks[f"{name}.weight"]
        for side in ("left", "right"):
            basis, moment = getattr(block, side), sums[name, side]
            inner = basis.T @ moment @ basis
            off = inner - inner.diag().diag()
            assert float(off.abs().max()) < 1e-3 * float(inner.abs().max()), (name, side)


def explicit_inverse(block, damping):
    left = torch.eye(block.eigenvalues.shape[0]) if block.left is None else block.left
    right = torch.eye(block.eigenvalues.shape[1]) if block.right is None else block.right
    basis = torch.kron(left.double(), right.double())
    values = block.eigenvalues.double().flatten()
    return basis @ torch.diag(1 / (values + damping * values.mean())) @ basis.T


def test_products_of_features_are_influence():
    denoiser = unet()
    names = "conv_in,time_embedding.linear_1"
    curvature, clean, condition = fitted(denoiser, params=names)
    made = features_of(denoiser, curvature, params=names)(clean, range(3), condition).vectors
    plain = features_of(denoiser, params=names)(clean, range(3), condition).vectors.double()
    layout = Layout.of(
        {n: tuple(p.shape) for n, p in select_parameters(denoiser.module, names).items()}
    )
    wanted = torch.zeros(3, 3, dtype=torch.float64)
    for name, part in layout.split(plain).items():
        inverse = explicit_inverse(curvature.blocks[name], ASKED.damping)
        wanted += part.flatten(1) @ inverse @ part.flatten(1).T
    found = made.double() @ made.double().T
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("method", ["fused", "vmap", "loop"])
def test_every_way_to_gradients_gives_the_same_features(method):
    denoiser = edm()
    curvature, clean, condition = fitted(denoiser)
    config = features_of(denoiser, curvature).config
    found = Featuriser(denoiser, config, curvature=curvature, method=method)
    wanted = features_of(denoiser, curvature)(clean, range(3), condition).vectors
    torch.testing.assert_close(
        found(clean, range(3), condition).vectors,
        wanted,
        rtol=2e-3,
        atol=2e-4 * float(wanted.abs().max()),
    )


class Linear(nn.Module):
    """One linear layer: its Gauss-Newton matrix is known."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, x, t):
        return self.layer(x.flatten(1)).reshape(x.shape)


def test_one_linear_layer_has_its_own_gauss_newton_matrix():
    torch.manual_seed(0)
    denoiser = ModuleDenoiser(Linear(), schedule_noise(), sample_shape=(1, 2, 2), sigma_data=1.0)
    clean = torch.randn(1000, 1, 2, 2) * torch.tensor([0.3, 1.0, 2.0, 3.0]).reshape(1, 1, 2, 2)
    levels = noise_levels(denoiser, (50, 200, 400))
    seen = []
    hook = denoiser.module.register_forward_hook(lambda _, x, __: seen.append(x[0].flatten(1)))
    curvature = fit_ekfac(denoiser, [(clean, range(1000), None)], levels, ASKED)
    hook.remove()
    x = seen[0].double()
    wanted = 2 / 4 * torch.kron(torch.eye(4).double(), x.T @ x / len(x))
    found = torch.linalg.inv(explicit_inverse(curvature.blocks["layer.weight"], 1e-9))
    error = (found - wanted).norm() / wanted.norm()
    assert error < 0.1  # of 3 000 random signs


def test_batches_do_not_matter():
    denoiser = edm()
    one, _, _ = fitted(denoiser, at_once=3)
    other, _, _ = fitted(denoiser, at_once=1)
    for name, block in one.blocks.items():
        matrices = [diagonal(c.blocks[name]) for c in (one, other)]
        scale = max(float(matrices[0].abs().max()), 1e-12)
        torch.testing.assert_close(*matrices, atol=1e-3 * scale, rtol=1e-2)
        assert block.eigenvalues.min() >= 0


def test_long_sides_keep_their_entries():
    denoiser = unet()
    curvature, _, _ = fitted(denoiser, config=CurvatureConfig(kind="ekfac", max_side=20))
    sides = [
        basis.shape[0]
        for block in curvature.blocks.values()
        for basis in (block.left, block.right)
        if basis is not None
    ]
    assert sides
    assert max(sides) <= 20
    long = [b for b in curvature.blocks.values() if b.eigenvalues.shape[1] > 20]
    assert long
    assert all(block.right is None for block in long)


def test_a_file_of_it_holds_the_same(tmp_path):
    curvature, _, _ = fitted(edm())
    path = tmp_path / "curvature.safetensors"
    curvature.save(path, {"of": "a"})
    again = load_ekfac(path, {"of": "a"})
    assert set(again.blocks) == set(curvature.blocks)
    for name, block in curvature.blocks.items():
        for part in ("left", "right", "eigenvalues"):
            one, other = getattr(block, part), getattr(again.blocks[name], part)
            assert (one is None and other is None) or torch.equal(one, other)
    with pytest.raises(ArtifactError, match="of another model"):
        load_ekfac(path, {"of": "b"})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_ekfac(path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_ekfac(tmp_path / "missing")


def test_what_does_not_go_together_is_refused():
    for options, message in (
        ({"functional": "mean"}, "goes with functional 'loss'"),
        ({"normalise": True}, "normalised"),
        ({"projection": ProjectionConfig(kind="factorised_sjlt")}, "choose sjlt"),
    ):
        with pytest.raises(ConfigError, match=message):
            FeatureConfig(
                **({"functional": "loss", "normalise": False, "curvature": ASKED} | options)
            )
    for options, message in (
        ({"damping": 0.0}, "damping must be positive"),
        ({"images": 0}, "images must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            CurvatureConfig(**({"kind": "ekfac"} | options))
    denoiser = edm()
    curvature, clean, condition = fitted(denoiser)
    config = features_of(denoiser, curvature).config
    with pytest.raises(ConfigError, match="need a curvature"):
        Featuriser(denoiser, config)(clean, range(3), condition)
    with pytest.raises(ConfigError, match="kind is none"):
        Featuriser(
            denoiser,
            FeatureConfig(functional="loss", combine="mean", normalise=False),
            curvature=curvature,
        )
    with pytest.raises(ConfigError, match="no block for"):
        Featuriser(denoiser, config, curvature=Ekfac({}))
    with pytest.raises(DataError, match="needs training samples"):
        fit_ekfac(denoiser, [], noise_levels(denoiser, TIMESTEPS))
    layout = Layout.of({"a": (2, 3)})
    block = KroneckerBlock(None, None, torch.ones(2, 3))
    projector = CurvedProjection(IdentityProjection(6), Ekfac({"a": block}), layout, 0.1)
    with pytest.raises(ConfigError, match="whole parameter"):
        projector.project(torch.ones(1, 3), 3)


def test_numbers_that_are_none_are_refused():
    denoiser = edm()
    with torch.no_grad():
        next(iter(denoiser.module.parameters())).fill_(float("nan"))
    with pytest.raises(NumericalError):
        fitted(denoiser)
