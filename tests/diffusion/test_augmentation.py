import torch

from diffcal.diffusion.augmentation import AUGMENT_LABELS, AugmentConfig, augment


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_probability_zero_changes_nothing():
    x = torch.randn(4, 3, 8, 8, generator=_generator())
    out, labels = augment(x, AugmentConfig(probability=0.0), _generator())
    torch.testing.assert_close(out, x, rtol=0, atol=0)
    assert labels.shape == (4, AUGMENT_LABELS)
    assert not labels.any()


def _only(**kinds):
    base = dict.fromkeys(("xflip", "yflip", "scale", "rotate", "anisotropy", "translate"), False)
    return AugmentConfig(probability=1.0, **(base | kinds))


def test_flips_mirror_and_say_so():
    x = torch.randn(64, 1, 8, 8, generator=_generator(1))
    for kind, axis, index in (("xflip", -1, 0), ("yflip", -2, 1)):
        out, labels = augment(x, _only(**{kind: True}), _generator(2))
        flipped = labels[:, index] == 1
        assert 10 < int(flipped.sum()) < 54
        expected = torch.where(flipped[:, None, None, None], x.flip(axis), x)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_translation_moves_a_constant_image_nowhere_and_a_peak_by_its_label():
    constant = torch.full((5, 1, 16, 16), 0.3)
    out, _ = augment(constant, AugmentConfig(probability=1.0), _generator(3))
    torch.testing.assert_close(out, constant, rtol=0, atol=1e-5)
    ramp = torch.linspace(-1, 1, 32).expand(6, 1, 32, 32).contiguous()
    config = AugmentConfig(
        probability=1.0,
        xflip=False,
        scale=False,
        rotate=False,
        anisotropy=False,
        translate_std=0.05,
    )
    out, labels = augment(ramp, config, _generator(4))
    # Shifting right by s widths lowers the ramp by 2 s (its slope per width, 32/31) at the centre.
    moved = (ramp - out)[:, 0, 16, 14:18].mean(dim=1)
    torch.testing.assert_close(moved, 2 * labels[:, 7] * 32 / 31, rtol=0.02, atol=1e-3)


def test_rotation_by_its_label():
    x = torch.zeros(8, 1, 33, 33)
    x[:, :, 16, 26] = 1.0  # a point to the right of the centre
    out, labels = augment(x, _only(rotate=True), _generator(5))
    where = out.flatten(1).argmax(dim=1)
    row, column = (where // 33 - 16).float(), (where % 33 - 16).float()
    angle = torch.atan2(labels[:, 4], labels[:, 3] + 1)
    torch.testing.assert_close(column, 10 * angle.cos(), rtol=0, atol=1.0)
    torch.testing.assert_close(row, 10 * angle.sin(), rtol=0, atol=1.0)


def test_draws_do_not_depend_on_what_is_switched_on():
    x = torch.randn(16, 1, 8, 8, generator=_generator())
    _, all_labels = augment(x, AugmentConfig(probability=0.5, yflip=True), _generator(7))
    config = AugmentConfig(probability=0.5, yflip=True, rotate=False)
    _, labels = augment(x, config, _generator(7))
    keep = [0, 1, 2, 5, 6, 7, 8]
    torch.testing.assert_close(labels[:, keep], all_labels[:, keep], rtol=0, atol=0)
