"""The paper's augmentation (notebook): rotation, zoom, brightness, translation, an own draw for each image.

Brightness is off, as in the paper, and comes last where it is on. Bilinear, with half-sample symmetric reflection
(d c b a | a b c d | d c b a). It works on whole batches on the device.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional

Warp = Literal["sequential", "combined"]  # the paper's, and the sharper one
AnyWarp = Warp | Literal["whole_pixels"]


@dataclass(frozen=True)
class Ranges:
    """How far each image may be changed; the paper's values.

    rotation in turns (0.1 is +-36 degrees), zoom and shift as shares of the side, brightness on the 0..1 range. A flip
    left to right has probability 1/2 where it is on; the paper has none.
    """

    rotation: float = 0.1
    zoom: float = 0.2
    shift: float = 0.2
    brightness: float = 0.0
    flip: bool = False


def draw(n: int, ranges: Ranges, generator: Generator) -> Tensor:
    """The parameters of n images, float32 [n, 7] on the generator's device.

    Columns: angle (radians), zoom x and y, dx and dy (shares of the side, content moves by +d), brightness, flip.
    """
    uniform = torch.rand(n, 7, generator=generator, device=generator.device)
    spread = 2 * uniform - 1  # uniform in [-1, 1)
    angle = 2 * math.pi * ranges.rotation * spread[:, :1]
    flip = (uniform[:, 6:] < 0.5).float() * float(ranges.flip)
    zoom, shift, brightness = (
        r * s
        for r, s in zip(
            (ranges.zoom, ranges.shift, ranges.brightness), torch.split(spread[:, 1:6], [2, 2, 1], dim=1), strict=True
        )
    )
    return torch.cat([angle, 1 + zoom, shift, brightness, flip], dim=1)


def augment(images: Tensor, draws: Tensor, ranges: Ranges, warp: AnyWarp = "sequential") -> Tensor:
    """Change each image [B, C, H, H] in [0, 1] by its own row of `draws` [B, 7], which `draw` gave for `ranges`.

    Args:
        warp: "sequential" interpolates for the rotation, the zoom and the translation in turn, as the notebook does;
            "combined" interpolates once, by the product R Z T of the three maps on output coordinates, and is sharper;
            "whole_pixels" shifts by the nearest whole pixels, without rotation and zoom, and blurs nothing.
    """
    if not len(images):
        return images
    angle, zoom, shift, brightness, flip = torch.split(draws, [1, 2, 2, 1, 1], dim=1)
    if ranges.flip:
        images = torch.where(flip.view(-1, 1, 1, 1) > 0, images.flip(-1), images)
    if warp == "whole_pixels":
        side = images.shape[-1]
        images = zoom_and_shift(images, torch.ones_like(zoom), (side * shift).round() / side)
    elif warp == "combined":
        # The output pixel p reads the input at R z (p - 2 d), in coordinates from -1 to 1: a side is 2 long.
        linear = rotation_matrices(angle) * zoom[:, None, :]
        images = sample(images, torch.cat([linear, linear @ (-2 * shift).unsqueeze(2)], dim=2))
    else:
        images = zoom_and_shift(rotate(images, angle), zoom, shift)
    return (images + brightness.view(-1, 1, 1, 1)).clamp(0, 1) if ranges.brightness else images


def rotation_matrices(angle: Tensor) -> Tensor:
    """[B, 1] radians -> [B, 2, 2], on coordinates (x, y) with y downwards."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)], dim=1)


def rotate(images: Tensor, angle: Tensor) -> Tensor:
    """Rotate each image [B, C, H, H] about its centre by its angle [B, 1]."""
    return sample(images, functional.pad(rotation_matrices(angle), (0, 1)))


def sample(images: Tensor, matrices: Tensor) -> Tensor:
    """Read each image at its affine map [B, 2, 3] of the output coordinates."""
    grid = functional.affine_grid(matrices, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def zoom_and_shift(images: Tensor, zoom: Tensor, shift: Tensor) -> Tensor:
    """Zoom each image [B, C, H, H] by (x, y) factors [B, 2], then move it by (x, y) shares [B, 2]: two interpolations.

    Both maps act on rows and columns apart, and an interpolation is linear: each is a matrix product from either side,
    and the two matrices of one axis are multiplied first: the numbers of two bilinear passes, at a tenth of the time.
    """
    side = images.shape[-1]
    pixels = torch.arange(side, device=images.device, dtype=images.dtype)
    centre = (side - 1) / 2
    across, down = (
        interpolation(pixels - side * shift[:, axis, None])
        @ interpolation(centre + zoom[:, axis, None] * (pixels - centre))
        for axis in (0, 1)
    )
    return down[:, None] @ images @ across[:, None].transpose(2, 3)


def interpolation(positions: Tensor) -> Tensor:
    """Matrices [B, H, H] that read a line of H pixels at the positions [B, H], linearly and with reflection."""
    side = positions.shape[1]
    # Reflection about the outer edges -0.5 and H - 0.5, then the outermost pixels' centres.
    folded = (positions + 0.5).remainder(2 * side)
    inside = (torch.minimum(folded, 2 * side - folded) - 0.5).clamp(0, side - 1)
    pixels = torch.arange(side, device=positions.device, dtype=positions.dtype)
    return (1 - (inside[:, :, None] - pixels).abs()).clamp(min=0)
