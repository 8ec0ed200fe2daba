"""What every denoiser keeps, whatever model family is behind it."""

import torch

from diffcal.diffusion.denoisers import Denoiser


def check_denoiser(denoiser, *, tolerance=1e-4):
    """Assert the contract of :class:`diffcal.diffusion.denoisers.Denoiser` for ``denoiser``."""
    assert isinstance(denoiser, Denoiser)
    classes = denoiser.num_classes
    assert len(denoiser.class_names) == classes
    assert (denoiser.condition_kind == "none") == (classes == 0)
    assert 0 <= denoiser.sigma_min < denoiser.sigma_max
    assert denoiser.sigma_data > 0
    assert list(denoiser.module.parameters())
    for name in denoiser.feature_modules:
        denoiser.module.get_submodule(name)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *denoiser.sample_shape, generator=generator)
    low = max(denoiser.sigma_min, 0.02)
    sigma = torch.tensor([low, 1.0, min(denoiser.sigma_max, 50.0)])
    weights = torch.zeros(3, classes)
    if classes:
        weights[:, 0], weights[:, -1] = 0.75, 0.25
    condition = denoiser.condition(weights if classes else None)
    with torch.no_grad():
        together = denoiser(x, sigma, condition)
    assert together.shape == x.shape
    assert together.dtype == torch.float32
    assert bool(together.isfinite().all())

    def part(rows):
        return None if condition is None else condition[rows]

    with torch.no_grad():
        # An image is its own business: neither its place nor its neighbours matter.
        for row in range(3):
            one = slice(row, row + 1)
            alone = denoiser(x[one], sigma[one], part(one))
            torch.testing.assert_close(alone, together[one], atol=tolerance, rtol=tolerance)
        # Nearly no noise: what comes in is nearly what goes out.
        scale = float(x.abs().max())
        tiny = torch.full((3,), 1e-5)
        near = denoiser(x, tiny, condition)
        assert float((near - x).abs().max()) < 0.02 * scale
        if classes > 1:
            pure = [denoiser.condition(torch.eye(classes)[[k]].repeat(3, 1)) for k in (0, -1)]
            outputs = [denoiser(x, sigma, c) for c in pure]
            assert not torch.equal(*outputs), "the condition changes nothing"

    # Attribution needs gradients with respect to parameters, solvers may need them for x.
    moving = x.clone().requires_grad_()
    output = denoiser(moving, sigma, condition)
    wanted = [p for p in denoiser.module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(output.square().sum(), [moving, *wanted], allow_unused=True)
    assert gradients[0] is not None
    assert float(gradients[0].norm()) > 0
    assert any(g is not None and float(g.norm()) > 0 for g in gradients[1:])

    images = denoiser.decode(together)
    assert images.dtype == torch.uint8
    assert images.ndim == 4
    assert len(images) == 3
    assert denoiser.encode(images).shape == x.shape

    before = denoiser.fingerprint
    assert before == denoiser.fingerprint
    assert denoiser.to("cpu") is denoiser or isinstance(denoiser.to("cpu"), Denoiser)
