"""LightCNN's stage 1 as it is usually written, for `lightcnn_step.py` to be compared with.

Two ordinary networks, torch's optimiser as it comes, a loader with two workers, PIL transforms image by image. It is
the plain way, not a slow one: images are PIL's from the start, workers persist, a warp is one call of PIL, and the
border is reflected once for each warp that reads beyond it.
"""

import math
import random
from collections.abc import Callable, Iterable
from typing import cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as pil  # type: ignore[import-untyped]

from lightcnn.augment import Ranges, Warp
from lightcnn.fused import Stack, unfuse, unstack
from lightcnn.model import MergedCNN, Submodel
from lightcnn.optim import LEARNING_RATE

Item = tuple[Tensor, Tensor, int]  # clean view, augmented view, label
Matrix = tuple[float, float, float, float, float, float]  # of an affine map of (x, y), the centre at (0, 0)
WORKERS = 2


class PlainBranches(nn.Module):
    """Stage 1's two submodels, one after the other."""

    def __init__(self, weights: Stack, channels: int, size: int) -> None:
        """Args: weights: of both branches, as our training has them."""
        super().__init__()
        self.branches = nn.ModuleList(Submodel(channels, size) for _ in range(2))
        for number, branch in enumerate(self.branches):
            branch.load_state_dict(unstack(weights, number))

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The sum of both branches' losses: inputs [2, B, C, H, H], labels [B]."""
        a, b = (branch(view) for branch, view in zip(self.branches, inputs, strict=True))
        return functional.cross_entropy(a, labels) + functional.cross_entropy(b, labels)


class PlainMerged(nn.Module):
    """The merged model, its branches one after the other."""

    def __init__(self, weights: Stack, channels: int, size: int) -> None:
        """Args: weights: of one merged model, as our training has them."""
        super().__init__()
        self.net = MergedCNN(channels, size)
        self.net.load_state_dict(unfuse(unstack(weights, 0)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits [B, K] of inputs [1, B, C, H, H]."""
        return cast(Tensor, self.net(inputs[0]))

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of inputs [1, B, C, H, H] with labels [B]."""
        return functional.cross_entropy(self(inputs), labels)


class PlainTraining:
    """Nadam on everything, step by step."""

    def __init__(self, net: PlainBranches | PlainMerged, device: torch.device) -> None:
        self.net = net.to(device).train()
        self.optimizer = torch.optim.NAdam(net.parameters(), LEARNING_RATE, eps=1e-7, momentum_decay=1.0)

    def run_pass(self, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
        """A pass over batches (inputs, labels); returns the sum of its losses."""
        total = 0.0
        for inputs, labels in batches:
            loss = self.net.loss(inputs, labels)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.item()
        return total


class Pairs(Dataset[Item]):
    """The usual data set: PIL images, warped one by one when asked for."""

    def __init__(self, images: Tensor, labels: Tensor, ranges: Ranges, warp: Warp) -> None:
        """Args: images: uint8 [N, C, H, H]. warp: three interpolations, as the paper has, or one for all three maps."""
        self.images = [pil.to_pil_image(image) for image in images.cpu()]
        self.labels, self.ranges, self.warp = labels.tolist(), ranges, warp

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Item:
        image, ranges = self.images[index], self.ranges
        angle = random.uniform(-2 * math.pi * ranges.rotation, 2 * math.pi * ranges.rotation)
        zoom = [random.uniform(1 - ranges.zoom, 1 + ranges.zoom) for _ in range(2)]
        shift = [image.width * random.uniform(-ranges.shift, ranges.shift) for _ in range(2)]
        warped = change(image, angle, (zoom[0], zoom[1]), (shift[0], shift[1]), self.warp)
        return pil.to_tensor(image), pil.to_tensor(warped), self.labels[index]


def change(
    image: Image.Image, angle: float, zoom: tuple[float, float], shift: tuple[float, float], warp: Warp
) -> Image.Image:
    """Rotate, zoom and move an image; shift is in pixels."""
    cos, sin, (zx, zy), (dx, dy) = math.cos(angle), math.sin(angle), zoom, shift
    side = image.width
    if warp == "combined":
        rows = (cos * zx, -sin * zy), (sin * zx, cos * zy)
        moved = [-(a * dx + b * dy) for a, b in rows]
        return warped(image, (*rows[0], moved[0], *rows[1], moved[1]), side)
    image = warped(image, (cos, -sin, 0, sin, cos, 0), side // 4)
    image = warped(image, (zx, 0, 0, 0, zy, 0), side // 8)
    return warped(image, (1, 0, -dx, 0, 1, -dy), side // 4)


def warped(image: Image.Image, matrix: Matrix, border: int) -> Image.Image:
    """Read an image at an affine map of the output's coordinates, bilinearly, with so many reflected pixels around."""
    a, b, c, d, e, f = matrix
    centre = image.width / 2  # PIL's maps take pixel k's centre to be k + 1/2
    around = centre + border
    data = (a, b, c + around - (a + b) * centre, d, e, f + around - (d + e) * centre)
    padded = pil.pad(image, [border], padding_mode="symmetric")
    return padded.transform(image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)


def loader(
    images: Tensor, labels: Tensor, batch_size: int, ranges: Ranges, warp: Warp
) -> Callable[[], Iterable[tuple[Tensor, Tensor]]]:
    """The usual loader: gives for each call the batches of an epoch."""
    pairs = Pairs(images, labels, ranges, warp)
    batches = DataLoader(pairs, batch_size, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    return lambda: (
        (torch.stack([clean, augmented]).to(images.device), targets.to(images.device))
        for clean, augmented, targets in batches
    )
