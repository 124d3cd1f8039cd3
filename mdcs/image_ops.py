"""Image operations on batches, each image with an argument of its own; what they do is what PIL does.

Images are uint8 [B, C, H, W], C 1 or 3, on any device. Arguments are [B], on the CPU: copying them over does not make
the host wait for the device. All functions give new images of the same shape and leave the ones given alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from shared.errors import ConfigError, DataError

Fill = int | Sequence[int]  # grey level 0..255 of the pixels that come in, one for all channels or one for each

MODES = ("nearest", "bilinear", "bicubic")

_LUMA = (19595, 38470, 7471)  # 65536 * (0.299, 0.587, 0.114), PIL's "L"
_CHUNK = 128 * 1024  # pixels sampled at once on a CPU: about what its cache holds
_FIXED = 1 << 16  # PIL's nearest sampling calculates coordinates in 1/65536 pixel


def check_images(images: Tensor) -> None:
    """Raise DataError unless `images` are uint8 [B, 1 or 3, H, W]."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        found = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        raise DataError(
            f"augmentation takes images as uint8 [B, 1 or 3, H, W], got {found}; augment before normalising"
        )


# ---------------------------------------------------------------------------------------------------------- geometry


def rotate(images: Tensor, degrees: Tensor, fill: Fill = 0, mode: str = "nearest") -> Tensor:
    """Turn counter-clockwise about the centre; the corners that leave the frame are lost (`PIL.Image.rotate`)."""
    h, w = images.shape[-2:]
    angle = torch.deg2rad(degrees.double())
    cos, sin = angle.cos(), angle.sin()
    cx, cy = w / 2, h / 2
    shift_x, shift_y = cx - cos * cx + sin * cy, cy - sin * cx - cos * cy
    return affine(images, torch.stack((cos, -sin, shift_x, sin, cos, shift_y), dim=1), fill, mode)


def shear_x(images: Tensor, factor: Tensor, fill: Fill = 0, mode: str = "nearest") -> Tensor:
    """Row y takes its pixels from `factor` * y further right; the top row stays."""
    return affine(images, _near_identity(1, factor), fill, mode)


def shear_y(images: Tensor, factor: Tensor, fill: Fill = 0, mode: str = "nearest") -> Tensor:
    """Column x takes its pixels from `factor` * x further down; the left column stays."""
    return affine(images, _near_identity(3, factor), fill, mode)


def translate_x(images: Tensor, pixels: Tensor, fill: Fill = 0, mode: str = "nearest") -> Tensor:
    """Move the content right by `pixels`."""
    return affine(images, _near_identity(2, -pixels), fill, mode)


def translate_y(images: Tensor, pixels: Tensor, fill: Fill = 0, mode: str = "nearest") -> Tensor:
    """Move the content down by `pixels`."""
    return affine(images, _near_identity(5, -pixels), fill, mode)


def affine(images: Tensor, matrix: Tensor, fill: Fill = 0, mode: str = "nearest") -> Tensor:
    """Sample images [B, C, H, W] at (a x + b y + c, d x + e y + f), as PIL's `transform(size, AFFINE, ...)`.

    (x, y) is the centre of an output pixel, 0.5 for the first. Sources outside the frame give `fill`.

    Args:
        matrix: (a, b, c, d, e, f) of each image [B, 6], pixels.
        fill: a value for all channels, or one for each; a colour becomes its luma on grey images.
        mode: "nearest" (PIL's pixels exactly), "bilinear" or "bicubic".

    Raises ConfigError for another mode, or a fill that fits neither the channels nor 0..255.
    """
    check_images(images)
    if mode not in MODES:
        raise ConfigError(f"interpolation: there is no {mode!r}; known are {', '.join(MODES)}")
    colour = _fill_colour(fill, images)
    sample = _nearest if mode == "nearest" else _smooth
    size = max(1, _CHUNK // images.shape[-2:].numel() if images.device.type == "cpu" else len(images))
    pieces = zip(torch.split(images, size), torch.split(matrix.double(), size), strict=True)
    return torch.cat([sample(piece, part, colour, mode) for piece, part in pieces])


def _near_identity(position: int, value: Tensor) -> Tensor:
    """The matrix [B, 6] that leaves the image as it is, `value` [B] written to one position."""
    matrix = torch.tensor([1, 0, 0, 0, 1, 0], dtype=torch.float64).repeat(len(value), 1)
    matrix[:, position] = value.double()
    return matrix


def _fill_colour(fill: Fill, images: Tensor) -> Tensor:
    """`fill` as uint8 [C, 1, 1] on the images' device."""
    channels = images.shape[1]
    levels = [fill] if isinstance(fill, int) else list(fill)
    if channels == 1 and len(levels) == 3:
        levels = [(sum(k * level for k, level in zip(_LUMA, levels, strict=True)) + _FIXED // 2) // _FIXED]
    if len(levels) not in (1, channels) or not all(0 <= level <= 255 for level in levels):
        raise ConfigError(f"fill: {levels} is neither one grey level of 0..255 nor one for each of {channels} channels")
    colour = torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1).expand(channels, 1, 1)
    return colour.to(images.device, non_blocking=True)


def _nearest(images: Tensor, matrix: Tensor, colour: Tensor, _mode: str) -> Tensor:
    b, c, h, w = images.shape
    a = (matrix * _FIXED + 0.5).floor()
    centre = matrix + 0.5 * (matrix.roll(1, 1) + matrix.roll(2, 1))  # meant in columns 2 and 5: c + (a + b) / 2
    a[:, 2::3] = (centre[:, 2::3] * _FIXED + 0.5).floor()
    fixed = a.int().to(images.device, non_blocking=True).view(b, 6, 1, 1)
    column = torch.arange(w, dtype=torch.int32, device=images.device)
    row = torch.arange(h, dtype=torch.int32, device=images.device).view(h, 1)
    x = (fixed[:, 0] * column + (fixed[:, 1] * row + fixed[:, 2])) >> 16  # [B, H, W]
    y = (fixed[:, 3] * column + (fixed[:, 4] * row + fixed[:, 5])) >> 16
    # In a frame of fill around the image, one pixel wide, all that lies outside is on that frame.
    framed = colour.expand(b, c, h + 2, w + 2).clone(memory_format=torch.contiguous_format)
    framed[:, :, 1:-1, 1:-1] = images
    index = y.clamp_(-1, h).mul_(w + 2).add_(x.clamp_(-1, w)).add_(w + 3)
    return framed.flatten(2).gather(2, index.long().view(b, 1, h * w).expand(b, c, h * w)).view(b, c, h, w)


def _smooth(images: Tensor, matrix: Tensor, colour: Tensor, mode: str) -> Tensor:
    b, c, h, w = images.shape
    m = matrix.float().to(images.device, non_blocking=True).view(b, 6, 1, 1)
    column = torch.arange(w, device=images.device) + 0.5
    row = (torch.arange(h, device=images.device) + 0.5).view(h, 1)
    x = m[:, 0] * column + (m[:, 1] * row + m[:, 2]) - 0.5  # [B, H, W], the first pixel's centre at 0
    y = m[:, 3] * column + (m[:, 4] * row + m[:, 5]) - 0.5
    inside = ((x >= -0.5) & (x < w - 0.5) & (y >= -0.5) & (y < h - 0.5)).byte().view(b, 1, h, w)
    left, top = x.floor(), y.floor()
    across, down = (_weights((t - first).view(b, 1, h * w), mode) for t, first in ((x, left), (y, top)))
    # The border is repeated twice to each side; `index` is the first of the 4 x 4 neighbours.
    source, wide = functional.pad(images.float(), (2, 2, 2, 2), mode="replicate").flatten(2), w + 4
    index = top.clamp_(-1, h - 1).add_(1).mul_(wide).add_(left.clamp_(-1, w - 1)).add_(1).long()
    index = index.view(b, 1, h * w).expand(b, c, h * w)
    total = torch.zeros(b, c, h * w, device=images.device)
    for j, vertical in down.items():
        line = torch.zeros_like(total)
        for i, horizontal in across.items():
            line.addcmul_(source[:, :, j * wide + i :].gather(2, index), horizontal)
        total.addcmul_(line, vertical)
    # PIL truncates; the weights of float32 do not quite sum to one, so that 100 may come out as 99.99999.
    sampled = total.add_(1e-3).clamp_(0, 255).byte().view(b, c, h, w)
    return sampled.mul_(inside).add_(colour * (1 - inside))


def _weights(t: Tensor, mode: str) -> dict[int, Tensor]:
    """The weights of the neighbours 0..3 of a point that lies `t` of 0..1 beyond neighbour 1."""
    if mode == "bilinear":
        return {1: 1 - t, 2: t}
    # PIL's cubic, a = -1 (torch's has a = -0.75).
    return {0: t * (t * (2 - t) - 1), 1: t * t * (t - 2) + 1, 2: t * (t * (1 - t) + 1), 3: t * t * (t - 1)}


# ------------------------------------------------------------------------------------------------------------- colour


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend black (factor 0) and the image (1); beyond 1 it gets brighter (`PIL.ImageEnhance.Brightness`)."""
    return (images * _per_image(factor, images)).clamp_(0, 255).byte()


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Blend the grey version (factor 0) and the image (1): saturation. Grey images stay (`PIL.ImageEnhance.Color`)."""
    return images.clone() if images.shape[1] == 1 else _blend(_luma(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend the image's mean grey level (factor 0) and the image (1) (`PIL.ImageEnhance.Contrast`)."""
    mean = _luma(images).mean(dim=(1, 2, 3), keepdim=True)
    return _blend((mean + 0.5).floor_(), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend a 3x3 smoothed version (factor 0) and the image (1); the border stays (`PIL.ImageEnhance.Sharpness`)."""
    pixels, out = images.float(), images.clone()
    inner = pixels[..., 1:-1, 1:-1]
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = box.add_(inner, alpha=4).div_(13).add_(0.5).floor_()  # the centre weighs 5 of 13
    out[..., 1:-1, 1:-1] = _blend(smooth, inner, factor)
    return out


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest `bits` (0..8) bits of each value."""
    mask = 256 - 2 ** (8 - bits.long())
    return images & _per_image(mask, images, torch.int16).byte()


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the values that are `threshold` (0..256) or more."""
    limit = _per_image(threshold.ceil(), images, torch.int16)
    return images ^ (images >= limit).byte().mul_(255)


def solarize_add(images: Tensor, addend: Tensor) -> Tensor:
    """Add `addend` (0..255) to the values below 128; 255 is the most that comes out."""
    addend = _per_image(addend, images, torch.uint8)
    room = images.bitwise_not()  # up to 255
    return images + torch.minimum((images < 128).byte().mul_(addend), room)


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel linearly to 0..255; a channel of one value stays (`PIL.ImageOps.autocontrast`)."""
    low, high = (f(images.flatten(2), dim=2)[..., None, None].float() for f in (torch.amin, torch.amax))
    flat = high == low
    scale = torch.where(flat, 1.0, 255 / (high - low))
    offset = torch.where(flat, 0.0, low)
    return (images - offset).mul_(scale).add_(1e-4).clamp_(0, 255).byte()  # a little more: truncation, as in `_smooth`


def equalize(images: Tensor) -> Tensor:
    """Make each channel's histogram as even as a table of values can (`PIL.ImageOps.equalize`)."""
    rows = images.reshape(-1, images.shape[-2] * images.shape[-1])
    counts = (_histogram if images.device.type == "cpu" else _histogram_by_sort)(rows).int()
    largest = counts.gather(1, rows.amax(dim=1, keepdim=True).long())  # how often the brightest value occurs
    step = (rows.shape[1] - largest) // 255
    below = counts.cumsum(1, dtype=torch.int32) - counts
    table = ((below + step // 2) / step.clamp(min=1)).clamp_(max=255).byte()
    same = torch.arange(256, device=images.device).byte()  # for a channel of one value, or nearly
    return torch.where(step == 0, same, table).gather(1, rows.long()).view(images.shape)


def invert(images: Tensor) -> Tensor:
    """255 minus each value."""
    return images.bitwise_not()


def _per_image(values: Tensor, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`values` [B] as [B, 1, 1, 1] on the images' device."""
    return values.to(dtype).view(-1, 1, 1, 1).to(images.device, non_blocking=True)


def _blend(base: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """base + factor * (images - base), truncated to uint8; base float, of a shape that broadcasts to the images'."""
    return (images - base).mul_(_per_image(factor, images)).add_(base).clamp_(0, 255).byte()


def _luma(images: Tensor) -> Tensor:
    """The grey version, whole numbers in float32 [B, 1, H, W]; all sums stay below 2^24, hence exact."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = (images[:, i : i + 1].float() * k for i, k in enumerate(_LUMA))
    return red.add_(green).add_(blue).add_(_FIXED // 2).div_(_FIXED).floor_()


def _histogram(rows: Tensor) -> Tensor:
    """How often each value occurs in each row of uint8 [N, P]: [N, 256]."""
    offsets = torch.arange(0, 256 * len(rows), 256, dtype=torch.int32, device=rows.device).view(-1, 1)
    return torch.bincount((rows + offsets).view(-1), minlength=256 * len(rows)).view(-1, 256)


def _histogram_by_sort(rows: Tensor) -> Tensor:
    """As `_histogram`, for a GPU: bincount there makes the host wait, and sums by scattering are not deterministic."""
    edges = torch.arange(257, dtype=torch.int16, device=rows.device).expand(len(rows), -1).contiguous()
    return torch.searchsorted(rows.short().sort(dim=1).values, edges).diff(dim=1)
