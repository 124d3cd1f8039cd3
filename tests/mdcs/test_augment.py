"""The parts of the views against torchvision and PIL on the same draws, and how evenly they draw."""

import math

import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import AutoAugment, AutoAugmentPolicy, InterpolationMode
from torchvision.transforms import functional as tv
from torchvision.transforms.autoaugment import _apply_op

from mdcs import augment
from mdcs.augment import (
    CIFAR10_POLICY,
    RAND_AUGMENT_OPS,
    auto_augment,
    auto_augment_space,
    color_jitter,
    cutout,
    rand_augment,
    rand_augment_arguments,
    random_affine,
    random_rotation,
)
from shared.errors import ConfigError
from tests.mdcs.pictures import from_pil, photos, seeded, to_pil

SIGNED = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness"}


def recorded(monkeypatch, call, n, size=32):
    """What `_apply` was asked to do for n images, in order: (index of the operation [n], argument [n]) a round."""
    rounds = []

    def record(images, codes, arguments, operations):
        rounds.append((codes, arguments))
        assert int(codes.max()) < len(operations)
        return images

    monkeypatch.setattr(augment, "_apply", record)
    call(torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(n, 3, size, size), seeded())
    return rounds


def near(share, expected, n, sigmas=5):
    return abs(float(share) - expected) <= sigmas * math.sqrt(max(expected * (1 - expected), 1e-9) / n)


# -------------------------------------------------------------------------------------------------------- AutoAugment


def test_the_policy_is_torchvisions_line_by_line():
    theirs = AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    assert len(CIFAR10_POLICY) == 25
    for ours, line in zip(CIFAR10_POLICY, theirs, strict=True):
        assert ours == line


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 40), (224, 224)])
def test_the_levels_are_torchvisions(height, width):
    theirs = AutoAugment(AutoAugmentPolicy.CIFAR10)._augmentation_space(10, (height, width))
    ours = auto_augment_space(height, width)
    assert ours.keys() == theirs.keys()
    for name, (magnitudes, signed) in theirs.items():
        assert ours[name][1] == signed, name
        assert torch.allclose(ours[name][0], magnitudes.expand(10).float(), atol=1e-5), name


@pytest.mark.parametrize(("c", "size"), [(3, 32), (1, 28)])
def test_auto_augment_gives_what_torchvision_gives_on_the_same_draws(c, size):
    images = photos(400, c, size, size)
    found = auto_augment(images, seeded(7), 128)
    g = seeded(7)
    pairs = torch.randint(25, (400,), generator=g).tolist()
    chances, signs = torch.rand(400, 2, generator=g), torch.randint(2, (400, 2), generator=g)
    theirs = AutoAugment(AutoAugmentPolicy.CIFAR10, fill=[128] * c)
    theirs.get_params = lambda _: (pairs[row], chances[row], signs[row])
    expected = []
    for row in range(400):
        expected.append(from_pil(theirs(to_pil(images[row]))))
    gap = (found.int() - torch.stack(expected).int()).abs().float().mean((1, 2, 3))
    assert float(gap.mean()) < 0.01
    assert float(gap.max()) < 0.5


def test_auto_augment_draws_sub_policies_bernoullis_and_signs_evenly(monkeypatch):
    n = 40_000
    names = list(augment._operations(128))
    space = auto_augment_space(32, 32)
    for slot, (codes, arguments) in enumerate(recorded(monkeypatch, auto_augment, n)):
        shares = codes.bincount(minlength=len(names)) / n
        for code, name in enumerate(names[:-1]):
            lines = [pair[slot] for pair in CIFAR10_POLICY if pair[slot][0] == name]
            assert near(shares[code], sum(p for _, p, _ in lines) / 25, n), name
            found = arguments[codes == code]
            if name in SIGNED and len(found):
                centre = 1.0 if name in ("Brightness", "Color", "Contrast", "Sharpness") else 0.0
                moved = found[found != centre]
                assert near((moved > centre).float().mean(), 0.5, len(moved)), name
                levels = {level for _, _, level in lines}
                sizes = {round(float(space[name][0][level]), 4) for level in levels}
                sizes = {math.trunc(v) for v in sizes} if name.startswith("Translate") else sizes
                assert {round(v, 4) for v in (found - centre).abs().tolist()} == sizes, name


def test_the_two_operations_of_a_sub_policy_belong_together(monkeypatch):
    (first, _), (second, _) = recorded(monkeypatch, auto_augment, 20_000)
    names = list(augment._operations(128))
    seen = {(names[a], names[b]) for a, b in set(zip(first.tolist(), second.tolist(), strict=True))}
    halves = [[(name, "Identity") if p > 0 else ("Identity",) for name, p, _ in pair] for pair in CIFAR10_POLICY]
    assert seen == {(a, b) for first_half, second_half in halves for a in first_half for b in second_half}


# -------------------------------------------------------------------------------------------------------- RandAugment


def test_rand_augments_table_of_arguments():
    assert len(RAND_AUGMENT_OPS) == len(set(RAND_AUGMENT_OPS)) == 15
    table = rand_augment_arguments(torch.tensor([10.0, 9.0], dtype=torch.float64), 100, 200)
    assert table.keys() == set(RAND_AUGMENT_OPS)
    expected = {
        **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), (0, 0)),
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), (1.9, 1.72)),
        **dict.fromkeys(("ShearX", "ShearY"), (0.3, 0.27)),
        "Rotate": (30, 27),
        "Posterize": (4, 3),
        "Solarize": (256, 230),
        "SolarizeAdd": (110, 99),
        "TranslateX": (90, 81),
        "TranslateY": (45, 40.5),
    }
    for name, values in expected.items():
        assert table[name].tolist() == pytest.approx(list(values)), name


def test_rand_augment_draws_operations_levels_signs_and_sampling_evenly(monkeypatch):
    n, geometric = 30_000, [3, 11, 12, 13, 14]
    for codes, arguments in recorded(monkeypatch, rand_augment, n):
        idle = codes == 30
        assert near(idle.float().mean(), 0.5, n)
        kinds = (codes % 15)[~idle]
        assert all(near(share, 1 / 15, len(kinds)) for share in kinds.bincount(minlength=15) / len(kinds))
        assert set(codes[(codes >= 15) & ~idle].tolist()) == {15 + k for k in geometric}  # bicubic
        moved = torch.isin(codes % 15, torch.tensor(geometric)) & ~idle
        assert near((codes[moved] >= 15).float().mean(), 0.5, int(moved.sum()))
        assert near((arguments[moved] > 0).float().mean(), 0.5, int(moved.sum()))
        angle = arguments[(codes % 15 == 3) & ~idle].abs()
        assert near((angle == 30).float().mean(), 0.5, len(angle))  # level 10, clipped
        below = (30 - angle[angle < 30]) / 3  # levels under 10: a half normal distribution, std 0.5
        assert float(below.square().mean().sqrt()) == pytest.approx(0.5, abs=0.05)
        factors = arguments[codes == RAND_AUGMENT_OPS.index("Color")]
        assert float(factors.min()) > 1.4
        assert float(factors.max()) == pytest.approx(1.9)


def rand_augment_on_pil(image, name, value, sampling, fill):
    """The operations that torchvision lacks or defines otherwise; the others by torchvision."""
    c = len(image.getbands())
    if name == "Solarize":
        return ImageOps.solarize(image, value)
    if name == "SolarizeAdd":
        return image.point([min(255, i + int(value)) if i < 128 else i for i in range(256)] * c)
    if name.startswith("Translate"):
        matrix = (1, 0, -value, 0, 1, 0) if name.endswith("X") else (1, 0, 0, 0, 1, -value)
        return image.transform(image.size, Image.AFFINE, matrix, getattr(Image, sampling.upper()), fillcolor=fill)
    centre = 1 if name in ("Color", "Contrast", "Brightness", "Sharpness") else 0
    return _apply_op(image, name, value - centre, InterpolationMode(sampling), list(fill))


def test_rand_augment_gives_what_pil_gives_on_the_same_draws(monkeypatch):
    n, fill = 300, (124, 116, 104)
    images = photos(n, 3, 40, 40)
    found = rand_augment(images, seeded(0))
    rounds = recorded(monkeypatch, rand_augment, n, 40)
    for row in range(n):
        image = to_pil(images[row])
        for codes, arguments in rounds:
            code = int(codes[row])
            if code < 30:
                sampling = "bicubic" if code >= 15 else "bilinear"
                image = rand_augment_on_pil(image, RAND_AUGMENT_OPS[code % 15], float(arguments[row]), sampling, fill)
        assert float((found[row].int() - from_pil(image).int()).abs().float().mean()) < 0.5, row


# -------------------------------------------------------------------------------------------------------- the others


def test_color_jitter_gives_what_torchvision_gives_on_the_same_draws():
    images = photos(60)
    found = color_jitter(images, seeded(3), 0.4, 0.5, 0.6)
    g = seeded(3)
    factors = 1 + torch.tensor([0.4, 0.5, 0.6]) * (2 * torch.rand(60, 3, generator=g) - 1)
    order = torch.rand(60, 3, generator=g).argsort(dim=1)
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for row in range(60):
        image = to_pil(images[row])
        for code in order[row].tolist():
            image = adjust[code](image, float(factors[row, code]))
        assert float((found[row].int() - from_pil(image).int()).abs().float().mean()) < 0.05


def test_color_jitter_draws_all_orders_and_factors_evenly(monkeypatch):
    n = 20_000
    rounds = recorded(monkeypatch, color_jitter, n)
    order = torch.stack([codes for codes, _ in rounds], dim=1)
    assert order.sort(dim=1).values.unique(dim=0).tolist() == [[0, 1, 2]]
    shares = (order * torch.tensor([9, 3, 1])).sum(1).unique(return_counts=True)[1] / n
    assert len(shares) == 6
    assert all(near(share, 1 / 6, n) for share in shares)
    for _, factors in rounds:
        assert 0.6 <= float(factors.min()) < 0.61
        assert 1.39 < float(factors.max()) <= 1.4
        assert float(factors.mean()) == pytest.approx(1, abs=0.01)


def test_color_jitter_of_nothing_changes_nothing_and_a_negative_spread_is_refused():
    images = photos(8)
    assert torch.equal(color_jitter(images, seeded(), 0, 0, 0), images)
    with pytest.raises(ConfigError, match="0 or more"):
        color_jitter(images, seeded(), contrast=-0.1)


def test_rotation_is_uniform_within_its_range_and_as_pils(monkeypatch):
    angles = []
    monkeypatch.setattr(augment.ops, "rotate", lambda images, degrees: angles.append(degrees) or images)
    random_rotation(photos(1).expand(20_000, 3, 32, 32), seeded(1))
    shares = torch.histc(angles[0].float(), 10, -15, 15) / 20_000
    assert float(angles[0].abs().max()) <= 15
    assert all(near(share, 0.1, 20_000) for share in shares)
    monkeypatch.undo()
    images = photos(30)
    turned, drawn = random_rotation(images, seeded(1)), []
    monkeypatch.setattr(augment.ops, "rotate", lambda images, degrees: drawn.append(degrees) or images)
    random_rotation(images, seeded(1))
    for image, found, angle in zip(images, turned, drawn[0].tolist(), strict=True):
        assert torch.equal(found, from_pil(to_pil(image).rotate(angle)))


def test_the_random_affine_takes_two_different_operations_of_all_magnitudes(monkeypatch):
    n, most = 20_000, [0.3, 0.3, 75 / 331 * 32, 75 / 331 * 32, 30]
    (first, a), (second, b) = recorded(monkeypatch, random_affine, n)
    assert not bool((first == second).any())
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == 20
    for codes, arguments in ((first, a), (second, b)):
        for code, limit in enumerate(most):
            found = arguments[codes == code] / limit
            assert near(len(found) / n, 0.2, n)
            assert 0.99 < float(found.max()) <= 1
            assert -1 <= float(found.min()) < -0.99
            assert float(found.mean()) == pytest.approx(0, abs=0.05)


def test_cutout_is_a_clipped_square_with_its_centre_uniform_over_all_pixels():
    n = 20_000
    cut = cutout(torch.full((n, 1, 32, 32), 255, dtype=torch.uint8), seeded(), 16)[:, 0] == 0
    areas = cut.sum((1, 2))
    assert int(areas.min()) == 64
    assert int(areas.max()) == 256
    for sides in (cut.any(1), cut.any(2)):
        lengths = sides.sum(1)
        assert set(lengths.tolist()) == set(range(8, 17))
        assert int((sides.byte().diff(dim=1) == 1).sum(1).max()) == 1
        assert not bool((sides[:, 0] & sides[:, -1]).any())
        # The centre is at `first + 8`; a square that begins before the image shows its last pixel instead.
        centre = torch.where(sides[:, 0], lengths - 8, sides.byte().argmax(1) + 8)
        shares = centre.bincount(minlength=32) / n
        assert len(shares) == 32
        assert all(near(share, 1 / 32, n) for share in shares)
    assert near((areas == 256).float().mean(), (17 / 32) ** 2, n)


def test_cutout_zeroes_all_channels_alike_and_nothing_else():
    images = photos(50).clamp(min=1)
    cut = cutout(images, seeded(), 9)
    gone = cut == 0
    assert torch.equal(gone[:, 0], gone[:, 1])
    assert torch.equal(gone[:, 0], gone[:, 2])
    assert torch.equal(cut[~gone], images[~gone])
    assert int(gone[:, 0].sum((1, 2)).max()) == 81
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
    normalised = (cut / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    for channel in range(3):
        values = normalised[:, channel][gone[:, channel]]
        assert torch.allclose(values, -mean[channel] / std[channel])


def test_cutout_of_size_0_cuts_nothing_and_a_negative_one_is_refused():
    assert torch.equal(cutout(photos(9), seeded(), 0), photos(9))
    with pytest.raises(ConfigError, match="cutout"):
        cutout(photos(9), seeded(), -1)
