"""Pictures for the tests of what changes pictures, and their way to PIL and back."""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def photos(n, c=3, h=32, w=32, seed=0):
    """Smooth shapes, some noise, own brightness: uint8 [n, c, h, w]."""
    g = seeded(seed)
    shapes = functional.interpolate(torch.rand(n, c, 5, 5, generator=g), (h, w), mode="bicubic")
    light = torch.randint(-60, 60, (n, 1, 1, 1), generator=g)
    return (220 * shapes + 12 * torch.randn(n, c, h, w, generator=g) + light).clamp(0, 255).byte()


def to_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy())


def from_pil(image):
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
