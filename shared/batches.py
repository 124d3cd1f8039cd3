"""Batches for a training loop: images resident on the device, or decoded from files by a few threads.

Augmentation works on whole batches with an own draw for each image, from the generator that the caller gives.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from shared.data import FileSet, open_rgb
from shared.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image

GROUP_IMAGES = 2048  # gathered and augmented at once by Resident.prefetch

Floats = Sequence[float]
Augment = Callable[[Tensor, Generator], Tensor]  # images [B, C, H, W] -> the same shape and dtype


class Batches(ABC):
    """What a training loop needs of its data. Images come normalised, float32 [B, C, H, W], with labels int64 [B]."""

    def __init__(self, labels: Tensor, mean: Floats, std: Floats) -> None:
        self.labels = labels
        mu, sigma = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
        self._scale, self._shift = (v.float().to(labels.device) for v in (1 / (255 * sigma), -mu / sigma))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """The augmented images and the labels at `indices` [B]."""
        return next(self.prefetch([indices], generator))

    def evaluate(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, without augmentation."""
        return self.prefetch(torch.split(torch.arange(len(self)), batch_size), None)

    @abstractmethod
    def prefetch(self, batches: Sequence[Tensor], generator: Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and labels at each of `batches`, prepared ahead; without a generator there is no augmentation."""

    def _normalised(self, images: Tensor) -> Tensor:
        return torch.addcmul(self._shift, images.float(), self._scale)  # (pixel / 255 - mean) / std


def epoch_order(n: int, generator: Generator) -> Tensor:
    """A random order of n samples, int64 [n] on the generator's device."""
    return torch.randperm(n, generator=generator, device=generator.device)


def split_batches(order: Tensor, batch_size: int, min_last: int = 2) -> list[Tensor]:
    """Cut `order` [N] into batches; a last one too small for batch norm, under `min_last`, joins the one before it."""
    batches = list(torch.split(order, batch_size)) if len(order) else []
    if len(batches) > 1 and len(batches[-1]) < min_last:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Shift each image [B, C, H, W] by an own offset, uniform over the (2 * padding + 1)^2 ones; zeros come in."""
    b, _, h, w = images.shape
    windows = F.pad(images, (padding,) * 4).unfold(2, h, 1).unfold(3, w, 1)  # a view [B, C, offsets, offsets, H, W]
    draw = torch.randint(2 * padding + 1, (2, b), generator=generator, device=generator.device)
    draw = draw.to(images.device, non_blocking=True)
    return windows[torch.arange(b, device=images.device), :, draw[0], draw[1]]


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image [B, C, H, W] left to right with probability 1/2, drawn for each."""
    draw = torch.rand(len(images), 1, 1, 1, generator=generator, device=generator.device)
    return torch.where(draw.to(images.device, non_blocking=True) < 0.5, images.flip(-1), images)


def augmentations(names: Sequence[str], padding: int = 4) -> tuple[Augment, ...]:
    """The augmentations called "crop" (zero padding of `padding` pixels) and "flip", in the order given."""
    known: dict[str, Augment] = {"crop": lambda x, generator: random_crop(x, padding, generator), "flip": random_flip}
    if strangers := [name for name in names if name not in known]:
        raise ConfigError(f"augment: there is no {strangers[0]!r}; known are {', '.join(known)}")
    return tuple(known[name] for name in names)


def resize_mean(images: Tensor, size: int) -> Tensor:
    """Shrink uint8 images [N, C, H, W] to [N, C, size, size], each pixel the rounded mean of its block.

    Raises DataError where H and W are not the same multiple of `size`.
    """
    h, w = images.shape[-2:]
    if h != w or size < 1 or h % size:
        raise DataError(f"images of {h} x {w} pixels cannot be averaged to {size} x {size}; take a divisor of the side")
    # In slices: as floats all at once the images would take four times their memory.
    return torch.cat([F.avg_pool2d(part.float(), h // size).round().byte() for part in torch.split(images, 4096)])


class Resident(Batches):
    """A data set that lives on one device as uint8; batches are cut, augmented and normalised there."""

    def __init__(
        self, images: Tensor, labels: Tensor, mean: Floats, std: Floats, augment: Sequence[Augment] = ()
    ) -> None:
        """Args: images uint8 [N, C, H, W] and labels [N] on one device; mean, std [C] of pixels scaled to 0..1."""
        super().__init__(labels, mean, std)
        self.images, self.augment = images, tuple(augment)

    def prefetch(self, batches: Sequence[Tensor], generator: Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Many batches are gathered and augmented in one go: fewer calls, but other draws than those of `batch`."""
        per_group = max(1, GROUP_IMAGES // max((1, *map(len, batches))))
        for first in range(0, len(batches), per_group):
            group = list(batches[first : first + per_group])
            indices, sizes = torch.cat(group).to(self.labels.device), [len(part) for part in group]
            images = self.images[indices]
            if generator is not None:
                for augment in self.augment:
                    images = augment(images, generator)
            images, labels = self._normalised(images), self.labels[indices]
            yield from zip(torch.split(images, sizes), torch.split(labels, sizes), strict=True)


class Files(Batches):
    """A data set whose images stay on disk; `workers` threads decode them (0: the caller's thread does).

    Training batches: random resized crop (area 8 to 100 %, ratio 3/4 to 4/3) and flip; otherwise and in `evaluate`: the
    shorter side to size * 256 / 224, then the centre. As torchvision's transforms on PIL images, bilinear.
    """

    ahead = 3  # batches that are decoded before they are asked for

    def __init__(
        self, files: FileSet, size: int, workers: int, train: bool, mean: Floats, std: Floats, device: torch.device
    ) -> None:
        """Args: size in pixels of the square images given out; mean, std [3] of pixels scaled to 0..1."""
        super().__init__(files.labels.to(device), mean, std)
        self.paths, self.size, self.train = files.paths, size, train
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers else None

    def prefetch(self, batches: Sequence[Tensor], generator: Generator | None) -> Iterator[tuple[Tensor, Tensor]]:
        """All seeds, one a batch, are drawn at once: reading ahead does not touch the generator."""
        seeds = [None] * len(batches)
        if generator:
            seeds = torch.randint(2**62, (len(batches),), generator=generator, device=generator.device).tolist()
        run: Callable[..., Iterator[Tensor]] = self._pool.map if self._pool else map
        jobs = ((i, run(self._decode, i.tolist(), self._draws(len(i), s))) for i, s in zip(batches, seeds, strict=True))
        return ((self._normalised(images), labels) for images, labels in self._collected(jobs))

    def _draws(self, n: int, seed: int | None) -> Sequence[Tensor | None]:
        """For each image 10 tries of (area, ratio, y, x) and the flip in the last row, uniform in 0..1."""
        if seed is None or not self.train:
            return [None] * n
        return torch.rand(n, 11, 4, generator=Generator().manual_seed(seed)).unbind()

    def _decode(self, index: int, draws: Tensor | None) -> Tensor:
        from torchvision.transforms.v2 import functional  # type: ignore[import-untyped]  # here: it costs seconds

        image = open_rgb(self.paths[index])
        if draws is not None:
            return random_resized_crop(image, self.size, draws)
        image = functional.center_crop(functional.resize(image, [round(self.size * 256 / 224)]), [self.size, self.size])
        return cast(Tensor, functional.pil_to_tensor(image).contiguous())

    def _collected(self, jobs: Iterator[tuple[Tensor, Iterator[Tensor]]]) -> Iterator[tuple[Tensor, Tensor]]:
        device, waiting = self.labels.device, deque(islice(jobs, self.ahead))
        while waiting:
            waiting.extend(islice(jobs, 1))
            indices, decoded = waiting.popleft()
            images = torch.stack(list(decoded))
            images = (images.pin_memory() if device.type == "cuda" else images).to(device, non_blocking=True)
            yield images, self.labels[indices.to(device, non_blocking=True)]


def random_resized_crop(image: "Image.Image", size: int, draws: Tensor) -> Tensor:
    """A random part of an image, scaled to uint8 [3, size, size] and perhaps mirrored.

    `draws` [11, 4], uniform in 0..1: ten tries of (area, ratio, y, x), and the flip in the last row.
    """
    from torchvision.transforms.v2 import functional

    left, top, right, bottom = _random_box(*image.size, draws[:10].tolist())
    image = functional.resized_crop(image, top, left, bottom - top, right - left, [size, size])
    image = functional.hflip(image) if draws[10, 0] < 0.5 else image
    return cast(Tensor, functional.pil_to_tensor(image).contiguous())


def _random_box(width: int, height: int, tries: list[list[float]]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the first try that fits into the image, else of the largest centred box allowed."""
    low, high = 3 / 4, 4 / 3
    for u_area, u_ratio, u_y, u_x in tries:
        area = width * height * (0.08 + 0.92 * u_area)
        ratio = low * (high / low) ** u_ratio
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(u_x * (width - w + 1)), int(u_y * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * high)), min(height, round(width / low))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
