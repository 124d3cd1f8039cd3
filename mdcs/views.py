"""Two views of every training image: a weak one for the teacher, a strong one for the student.

Both are made from the same pixels, on the device and in whole batches, with an own draw for each image. The draws
of a batch depend on the seed, the epoch and the batch's place alone, so an epoch can be entered at any batch.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor

from mdcs.augment import VIEWS
from mdcs.config import Views
from shared.batches import Augment, Files, Floats, Resident, random_resized_crop
from shared.data import FileSet, open_rgb
from shared.gpu import stream

GROUP_IMAGES = 2048  # augmented at once where the images are in memory: fewer calls, each on more images

Names = tuple[str | int, ...]  # of a random stream, beside the seed


def chosen(views: Views, weak: Augment, strong: Augment) -> dict[str, Augment]:
    """The views that a method sees. Each draws for itself: a strong view is the same beside a weak one and alone."""
    return {view: augment for view, augment in (("weak", weak), ("strong", strong)) if views in (view, "both")}


def crop_draws(n: int, generators: Sequence[Generator]) -> Tensor:
    """What `random_resized_crop` needs for n images and one part a generator: uniform [n, parts, 11, 4]."""
    return torch.stack([torch.rand(n, 11, 4, generator=own) for own in generators], dim=1)


class ResidentViews(Resident):
    """Training images in memory on the device."""

    def __init__(self, images: Tensor, labels: Tensor, mean: Floats, std: Floats, augment: str) -> None:
        """Args: as `Resident`; `augment` names the pair of views."""
        super().__init__(images, labels, mean, std)
        self.weak, self.strong = VIEWS[augment]

    def epoch(
        self, batches: Sequence[Tensor], views: Views, seed: int, names: Names, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """From batch `first` on: images [V, C, H, W] (weak rows, then strong ones of "both") and labels [B]."""
        per_group = max(1, GROUP_IMAGES // max((1, *map(len, batches))))
        for start in range(first - first % per_group, len(batches), per_group):
            group = list(batches[start : start + per_group])
            indices, sizes = torch.cat(group).to(self.labels.device, non_blocking=True), [len(part) for part in group]
            images = self.images[indices]
            made = [
                torch.split(self._normalised(augment(images, stream(seed, *names, view, start))), sizes)
                for view, augment in chosen(views, self.weak, self.strong).items()
            ]
            labels = torch.split(self.labels[indices], sizes)
            for k in range(max(0, first - start), len(group)):
                yield torch.cat([parts[k] for parts in made]) if len(made) > 1 else made[0][k], labels[k]


class FileViews(Files):
    """Training images on disk: threads decode each once and cut two random parts, the device does the rest."""

    def __init__(
        self, files: FileSet, size: int, workers: int, mean: Floats, std: Floats, device: torch.device, augment: str
    ) -> None:
        """Args: as `Files`; `augment` names the pair of views."""
        super().__init__(files, size, workers, True, mean, std, device)
        self.weak, self.strong = VIEWS[augment]

    def epoch(
        self, batches: Sequence[Tensor], views: Views, seed: int, names: Names, first: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `ResidentViews.epoch`."""
        run = self._pool.map if self._pool else map
        augments = chosen(views, self.weak, self.strong)
        streams = [[stream(seed, *names, view, k) for view in augments] for k in range(first, len(batches))]
        jobs = (
            (indices, run(self._decode_parts, indices.tolist(), crop_draws(len(indices), own)))
            for indices, own in zip(batches[first:], streams, strict=True)
        )
        for (pixels, labels), own in zip(self._collected(jobs), streams, strict=True):
            made = zip(augments.values(), pixels.unbind(1), own, strict=True)
            yield self._normalised(torch.cat([augment(images, draws) for augment, images, draws in made])), labels

    def _decode_parts(self, index: int, draws: Tensor) -> Tensor:
        """uint8 [parts, 3, size, size]."""
        image = open_rgb(self.paths[index])
        return torch.stack([random_resized_crop(image, self.size, part) for part in draws])
