"""The augmentation: oracles T13 to T15."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator
from torch.nn import functional

from lightcnn.augment import Ranges, augment, draw, rotate, rotation_matrices, sample, zoom_and_shift
from shared.data import load, read_mnist
from shared.errors import DataError

OFF = Ranges(rotation=0, zoom=0, shift=0)
IDENTITY = torch.tensor([[0.0, 1, 1, 0, 0, 0, 0]])
each_warp = pytest.mark.parametrize("warp", ["sequential", "combined"])
each_side = pytest.mark.parametrize("side", [28, 32, 9])


def pictures(n, side=28, channels=1):
    return torch.rand(n, channels, side, side, generator=Generator().manual_seed(n))


@each_warp
@each_side
def test_ranges_of_zero_change_nothing(warp, side):
    images = pictures(4, side)
    draws = draw(4, OFF, Generator().manual_seed(0))
    # 3e-6 is measured: a pixel's place in float32 is off by 1e-7 of the side. Keras' 1e-6 would want float64.
    torch.testing.assert_close(augment(images, draws, OFF, warp), images, atol=1e-5, rtol=0)


@each_warp
def test_ranges_of_zero_change_nothing_to_keras_own_tolerance_in_float64(warp):
    images, draws = pictures(4).double(), draw(4, OFF, Generator().manual_seed(0)).double()
    torch.testing.assert_close(augment(images, draws, OFF, warp), images, atol=1e-6, rtol=0)


@each_side
@each_warp
def test_a_quarter_turn_is_a_rotation_by_90_degrees(side, warp):
    images = pictures(3, side)
    draws = IDENTITY.repeat(3, 1)
    draws[:, 0] = math.pi / 2
    turned = augment(images, draws, OFF, warp)
    torch.testing.assert_close(turned, torch.rot90(images, 1, (2, 3)), atol=1e-5, rtol=0)


@each_warp
def test_a_shift_moves_the_content_to_the_right_and_down_and_mirrors_at_the_border(warp):
    images = pictures(2)
    draws = IDENTITY.repeat(2, 1)
    draws[:, 3], draws[:, 4] = 2 / 28, 1 / 28
    moved = augment(images, draws, OFF, warp)
    torch.testing.assert_close(moved[:, :, 1:, 2:], images[:, :, :-1, :-2], atol=1e-4, rtol=0)
    torch.testing.assert_close(moved[:, :, 1:, :2], images[:, :, :-1, :2].flip(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(moved[:, :, 0], moved[:, :, 1], atol=1e-4, rtol=0)  # row -1 is row 0 mirrored


def test_a_zoom_factor_above_one_shrinks_the_content():
    images = torch.zeros(1, 1, 28, 28)
    images[:, :, 4:24, 4:24] = 1
    draws = IDENTITY.clone()
    draws[:, 1] = 1.2
    shrunk = augment(images, draws, replace(OFF, zoom=0.2))
    assert shrunk[0, 0, 14].sum() < 18 < images[0, 0, 14].sum()
    torch.testing.assert_close(shrunk[0, 0, :, 14], images[0, 0, :, 14], atol=1e-5, rtol=0)  # y is drawn on its own


@each_side
def test_zoom_and_shift_by_matrices_are_two_bilinear_passes_with_reflection(side):
    images = pictures(40, side, 3)
    zoom = 0.8 + 0.4 * torch.rand(40, 2)
    shift = 0.4 * torch.rand(40, 2) - 0.2
    zero = torch.zeros(40, 2, 1)
    once = sample(images, torch.cat([torch.diag_embed(zoom), zero], 2))
    twice = sample(once, torch.cat([torch.eye(2).expand(40, 2, 2), -2 * shift[:, :, None]], 2))
    torch.testing.assert_close(zoom_and_shift(images, zoom, shift), twice, atol=1e-5, rtol=0)


def test_the_combined_warp_is_one_reading_at_the_product_of_the_three_maps():
    images, draws = pictures(6), draw(6, Ranges(), Generator().manual_seed(1))
    rotation = rotation_matrices(draws[:, :1])
    zoomed = torch.diag_embed(draws[:, 1:3])
    matrix = functional.pad(rotation @ zoomed, (0, 1))
    matrix[:, :, 2:] = rotation @ zoomed @ (-2 * draws[:, 3:5, None])
    torch.testing.assert_close(augment(images, draws, Ranges(), "combined"), sample(images, matrix), atol=1e-5, rtol=0)


def test_the_sequential_warp_is_rotation_then_zoom_then_shift():
    images, draws = pictures(6), draw(6, Ranges(), Generator().manual_seed(1))
    wanted = zoom_and_shift(rotate(images, draws[:, :1]), draws[:, 1:3], draws[:, 3:5])
    assert torch.equal(augment(images, draws, Ranges()), wanted)


def test_whole_pixels_shift_without_blur_and_reflect_at_the_border():
    images = pictures(64)
    ranges = replace(OFF, shift=2 / 28)
    draws = draw(64, ranges, Generator().manual_seed(1))
    moved = augment(images, draws, ranges, "whole_pixels")
    padded = functional.pad(images, (2, 2, 2, 2), mode="replicate")  # half-sample symmetric: the border comes twice
    padded[..., 0, :], padded[..., -1, :] = padded[..., 3, :].clone(), padded[..., -4, :].clone()
    padded[..., 0], padded[..., -1] = padded[..., 3].clone(), padded[..., -4].clone()
    seen = set()
    for image, found, row in zip(padded, moved, draws, strict=True):
        dx, dy = (round(float(28 * d)) for d in row[3:5])
        seen.add((dx, dy))
        torch.testing.assert_close(found, image[:, 2 - dy : 30 - dy, 2 - dx : 30 - dx], atol=1e-5, rtol=0)
    assert {dx for dx, _ in seen} == {dy for _, dy in seen} == {-2, -1, 0, 1, 2}


def test_draws_fill_their_ranges():
    ranges = Ranges(brightness=0.2, flip=True)
    d = draw(20000, ranges, Generator().manual_seed(0))
    limits = [0.2 * math.pi, 0.2, 0.2, 0.2, 0.2, 0.2]
    for column, limit in enumerate(limits):
        values = d[:, column] - (1 if column in (1, 2) else 0)
        assert 0.98 * limit < values.max() <= limit + 1e-6
        assert -limit - 1e-6 <= values.min() < -0.98 * limit
        assert abs(values.mean()) < 0.05 * limit
    assert 0.48 < d[:, 6].mean() < 0.52
    assert abs(torch.corrcoef(d.T) - torch.eye(7)).max() < 0.04  # each drawn on its own


@each_warp
def test_brightness_and_flip(warp):
    images, ranges = pictures(2), replace(OFF, brightness=0.3, flip=True)
    draws = IDENTITY.repeat(2, 1)
    draws[0, 5], draws[1, 6] = 0.3, 1
    found = augment(images, draws, ranges, warp)
    torch.testing.assert_close(found[0], (images[0] + 0.3).clamp(0, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], images[1].flip(-1), atol=1e-5, rtol=0)


@each_warp
def test_each_image_has_its_own_draw_and_the_seed_repeats_it(warp):
    images = pictures(1).repeat(320, 1, 1, 1)
    found = augment(images, draw(320, Ranges(), Generator().manual_seed(0)), Ranges(), warp)
    assert len({image.numpy().tobytes() for image in found}) == 320
    assert torch.equal(found, augment(images, draw(320, Ranges(), Generator().manual_seed(0)), Ranges(), warp))
    assert not torch.equal(found, augment(images, draw(320, Ranges(), Generator().manual_seed(1)), Ranges(), warp))
    assert augment(images[:0], draw(0, Ranges(), Generator()), Ranges(), warp).shape == (0, 1, 28, 28)


CHANGES = {
    "clean": (OFF, "sequential"),
    "rotation": (replace(OFF, rotation=0.1), "sequential"),
    "zoom": (replace(OFF, zoom=0.2), "sequential"),
    "translation": (replace(OFF, shift=0.2), "sequential"),
    "sequential": (Ranges(), "sequential"),
    "combined": (Ranges(), "combined"),
}
KERAS = {  # the first 3,000 test images of MNIST: mean, deviation, Laplacian (Keras 3.3.3; "combined" torch)
    "clean": (0.1214, 0.2971, 0.1974),
    "rotation": (0.1221, 0.2791, 0.1524),
    "zoom": (0.1252, 0.2832, 0.1536),
    "translation": (0.1214, 0.2777, 0.1420),
    "sequential": (0.1255, 0.2577, 0.1012),
    "combined": (0.1286, 0.2842, 0.1488),
}
EMBEDDED = {  # every second test image of the embedded part of Fashion-MNIST: from this code, which gives Keras' digits
    "clean": (0.2860, 0.3522, 0.2383),
    "rotation": (0.2967, 0.3392, 0.1740),
    "zoom": (0.2905, 0.3391, 0.1634),
    "translation": (0.2852, 0.3375, 0.1541),
    "sequential": (0.2999, 0.3238, 0.0961),
    "combined": (0.2999, 0.3401, 0.1656),
}


def statistics(images: torch.Tensor, name: str) -> list[float]:
    """Mean, deviation and mean absolute Laplacian of the images after one of `CHANGES`."""
    ranges, warp = CHANGES[name]
    z = augment(images, draw(len(images), ranges, Generator().manual_seed(0)), ranges, warp)[:, 0]
    laplacian = 4 * z[:, 1:-1, 1:-1] - z[:, :-2, 1:-1] - z[:, 2:, 1:-1] - z[:, 1:-1, :-2] - z[:, 1:-1, 2:]
    return [float(v) for v in (z.mean(), z.std(), laplacian.abs().mean())]


@pytest.mark.parametrize("name", CHANGES)
def test_statistics_of_augmented_digits_are_keras(name):
    try:
        digits = load("mnist", "test").images[:3000].float() / 255
    except DataError as error:
        pytest.skip(f"needs MNIST: {error}")
    assert statistics(digits, name) == pytest.approx(KERAS[name], abs=0.002)


@pytest.mark.parametrize("name", CHANGES)
def test_statistics_of_augmented_embedded_images_stay_what_they_were(name):
    pictures = load("sample", "test").images[::2].float() / 255
    assert statistics(pictures, name) == pytest.approx(EMBEDDED[name], abs=0.002)


def test_a_truncated_or_mislabelled_idx_file_is_refused_in_one_line(tmp_path: Path):
    (tmp_path / "i").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 28, 0, 0, 0, 28]) + bytes(700))
    (tmp_path / "l").write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 1, 3]))
    with pytest.raises(DataError, match="700 bytes of data, but the header tells of 784"):
        read_mnist([tmp_path / "i", tmp_path / "l"])
    with pytest.raises(DataError, match="another kind of file"):
        read_mnist([tmp_path / "l", tmp_path / "l"])
