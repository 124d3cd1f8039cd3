"""Batches for a training loop: images resident on the device, or decoded from files by a few threads.

`Resident` and `Files` have one interface (`Batches`), so a loop need not know which it has. Augmentation works on whole
batches with an own draw for each image; every draw comes from the generator that the caller gives.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
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


class Batches(Protocol):
    """What a training loop needs of its data. Images come normalised, float32 [B, C, H, W], with labels int64 [B]."""

    labels: Tensor

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generator: Generator) -> tuple[Tensor, Tensor]: ...

    def prefetch(self, batches: Sequence[Tensor], generator: Generator) -> Iterator[tuple[Tensor, Tensor]]: ...

    def evaluate(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]: ...


def epoch_order(n: int, generator: Generator) -> Tensor:
    """A random order of n samples, int64 [n] on the generator's device."""
    return torch.randperm(n, generator=generator, device=generator.device)


def split_batches(order: Tensor, batch_size: int, min_last: int = 2) -> list[Tensor]:
    """Cut `order` [N] into batches; a trailing one of fewer than `min_last` samples joins the batch before it.

    Batch-norm cannot train on one sample. No sample is lost; an order shorter than `min_last` stays one short batch.
    """
    batches = list(torch.split(order, batch_size)) if len(order) else []
    if len(batches) > 1 and len(batches[-1]) < min_last:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def random_crop(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Shift each image [B, C, H, W] by an own offset, uniform over the (2 * padding + 1)^2 ones; zeros come in."""
    b, c, h, w = images.shape
    padded = F.pad(images, (padding,) * 4).flatten(2)
    draw = torch.randint(2 * padding + 1, (2, b, 1), generator=generator, device=generator.device).to(images.device)
    rows = draw[0] + torch.arange(h, device=images.device)
    columns = draw[1] + torch.arange(w, device=images.device)
    index = (rows[:, :, None] * (w + 2 * padding) + columns[:, None, :]).view(b, 1, h * w).expand(-1, c, -1)
    return padded.gather(2, index).view(b, c, h, w)


def random_flip(images: Tensor, generator: Generator) -> Tensor:
    """Mirror each image [B, C, H, W] left to right with probability 1/2, drawn for each."""
    draw = torch.rand(len(images), 1, 1, 1, generator=generator, device=generator.device).to(images.device)
    return torch.where(draw < 0.5, images.flip(-1), images)


def augmentations(names: Sequence[str], padding: int = 4) -> tuple[Augment, ...]:
    """The augmentations called "crop" (zero padding of `padding` pixels) and "flip", in the order given."""
    known: dict[str, Augment] = {
        "crop": lambda images, generator: random_crop(images, padding, generator),
        "flip": random_flip,
    }
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


class Resident:
    """A data set that lives on one device as uint8; batches are cut, augmented and normalised there."""

    def __init__(
        self, images: Tensor, labels: Tensor, mean: Floats, std: Floats, augment: Sequence[Augment] = ()
    ) -> None:
        """Args: images uint8 [N, C, H, W] and labels [N] on one device; mean, std [C] of pixels scaled to 0..1."""
        self.images, self.labels, self.augment = images, labels, tuple(augment)
        self._normalise = _normaliser(mean, std, images.device)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """The augmented images and the labels at `indices` [B]."""
        indices = indices.to(self.labels.device)
        images = self.images[indices]
        for augment in self.augment:
            images = augment(images, generator)
        return self._normalise(images), self.labels[indices]

    def prefetch(self, batches: Sequence[Tensor], generator: Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches one by one; many are gathered and augmented in one go, which costs fewer calls.

        Each image has its own draw, but not the one that `batch` would have given it.
        """
        per_group = max(1, GROUP_IMAGES // max((len(indices) for indices in batches), default=1))
        for first in range(0, len(batches), per_group):
            group = batches[first : first + per_group]
            images, labels = self.batch(torch.cat(list(group)), generator)
            sizes = [len(indices) for indices in group]
            yield from zip(torch.split(images, sizes), torch.split(labels, sizes), strict=True)

    def evaluate(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, without augmentation."""
        for images, labels in zip(*(torch.split(t, batch_size) for t in (self.images, self.labels)), strict=True):
            yield self._normalise(images), labels


class Files:
    """A data set whose images stay on disk; `workers` threads decode them (0: the caller's thread does).

    Training batches: random resized crop (area 8 to 100 %, ratio 3/4 to 4/3) and flip; otherwise and in `evaluate`: the
    shorter side to size * 256 / 224, then the centre. As torchvision's transforms on PIL images, bilinear.
    """

    def __init__(
        self, files: FileSet, size: int, workers: int, train: bool, mean: Floats, std: Floats, device: torch.device
    ) -> None:
        """Args: size in pixels of the square images given out; mean, std [3] of pixels scaled to 0..1."""
        self.paths, self.size, self.train = files.paths, size, train
        self.labels = files.labels.to(device)
        self.ahead = 3  # batches decoded before they are asked for
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="decode") if workers else None
        self._normalise = _normaliser(mean, std, self.labels.device)

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """The augmented images and the labels at `indices` [B]; takes one seed from the generator."""
        return next(self.prefetch([indices], generator))

    def prefetch(self, batches: Sequence[Tensor], generator: Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """`batch` of each, decoded a few batches ahead; the same images whatever the number of workers.

        All seeds are drawn now, not as the batches are read: reading ahead does not touch the generator.
        """
        seeds = [int(torch.randint(2**62, (), generator=generator, device=generator.device)) for _ in batches]
        return self._decoded((i, self._draws(len(i), seed)) for i, seed in zip(batches, seeds, strict=True))

    def evaluate(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, centre crop."""
        return self._decoded((i, [None] * len(i)) for i in torch.split(torch.arange(len(self)), batch_size))

    def _draws(self, n: int, seed: int) -> Sequence[Tensor | None]:
        """For each image 10 tries of (area, ratio, y, x) and the flip in the last row, uniform in 0..1."""
        return torch.rand(n, 11, 4, generator=Generator().manual_seed(seed)).unbind() if self.train else [None] * n

    def _decoded(self, jobs: Iterable[tuple[Tensor, Sequence[Tensor | None]]]) -> Iterator[tuple[Tensor, Tensor]]:
        waiting: deque[tuple[Tensor, list[Future[Tensor]]]] = deque()
        try:
            for indices, draws in jobs:
                waiting.append((indices, [self._submit(i, d) for i, d in zip(indices.tolist(), draws, strict=True)]))
                if len(waiting) > (self.ahead if self._pool else 0):
                    yield self._collect(*waiting.popleft())
            while waiting:
                yield self._collect(*waiting.popleft())
        finally:
            for _, futures in waiting:  # left early: what was not begun need not be decoded
                for future in futures:
                    future.cancel()

    def _submit(self, index: int, draws: Tensor | None) -> "Future[Tensor]":
        if self._pool:
            return self._pool.submit(_decode, self.paths[index], self.size, draws)
        future: Future[Tensor] = Future()
        future.set_result(_decode(self.paths[index], self.size, draws))
        return future

    def _collect(self, indices: Tensor, futures: "list[Future[Tensor]]") -> tuple[Tensor, Tensor]:
        device = self.labels.device
        images = torch.stack([future.result() for future in futures])
        images = (images.pin_memory() if device.type == "cuda" else images).to(device, non_blocking=True)
        images = images.permute(0, 3, 1, 2).contiguous()
        return self._normalise(images), self.labels[indices.to(device)]


def _normaliser(mean: Floats, std: Floats, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The function that turns pixels 0..255 [B, C, H, W] into float32 (pixel / 255 - mean) / std."""
    mu, sigma = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (mean, std))
    scale, shift = (1 / (255 * sigma)).float().to(device), (-mu / sigma).float().to(device)
    return lambda images: torch.addcmul(shift, images.float(), scale)


def _decode(path: Path, size: int, draws: Tensor | None) -> Tensor:
    """One image as uint8 [size, size, 3]."""
    from PIL import Image

    image = open_rgb(path)
    if draws is None:
        image = _centre(image, size)
    else:
        image = image.crop(_random_box(*image.size, draws[:10].tolist())).resize(
            (size, size), Image.Resampling.BILINEAR
        )
        if draws[10, 0] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(image))


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


def _centre(image: "Image.Image", size: int) -> "Image.Image":
    """Shorter side to size * 256 / 224, then the central square of `size`."""
    from PIL import Image

    short, (width, height) = round(size * 256 / 224), image.size
    if width < height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
