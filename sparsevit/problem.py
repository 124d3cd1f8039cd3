"""The images of a configuration: training, held-out and test set where batches are made of them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from shared import batches, data
from shared.batches import Batches, Files, Floats, Resident
from shared.data import AnySet, FileSet, ImageSet
from shared.errors import ConfigError, DataError
from shared.gpu import stream
from sparsevit.config import DataConfig
from sparsevit.imagenet100 import CLASSES

FILE_IMAGE_SIZE = 224  # pixels, where the configuration of image files does not say
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm"}
BASE_MIN_AREA = 0.08  # what `shared.batches.Files` crops to at least


@dataclass(frozen=True)
class Problem:
    """All that training and evaluation need of the data; tensors are on the device."""

    train: Batches
    val: Batches | None
    test: Batches
    classes: tuple[str, ...]
    channels: int
    image: int
    digests: dict[str, str]

    def facts(self) -> dict[str, Any]:
        """What is worth knowing of the data, for the run's log."""
        return {
            "images": len(self.train), "val_images": len(self.val) if self.val else 0, "test_images": len(self.test),
            "classes": len(self.classes), "image": self.image, "channels": self.channels, "digests": self.digests,
        }  # fmt: skip


class Resized(Resident):
    """A resident data set whose batches are resized on the device, as the last step (bilinear, antialiased)."""

    def __init__(
        self, images: Tensor, labels: Tensor, mean: Floats, std: Floats, augment: tuple[batches.Augment, ...], size: int
    ) -> None:
        """Args: as `Resident`; `size` in pixels a side of the images given out."""
        super().__init__(images, labels, mean, std, augment)
        self.size = size

    def _normalised(self, images: Tensor) -> Tensor:
        images = super()._normalised(images)  # resizing and normalising commute
        if images.shape[-1] == self.size:
            return images
        return functional.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)


class Crops(Files):
    """Image files whose training crops have at least `min_area` of the image, where `Files` has 8 %."""

    def __init__(self, files: FileSet, config: DataConfig, train: bool, device: torch.device) -> None:
        size = config.image_size or FILE_IMAGE_SIZE
        super().__init__(files, size, config.workers, train, config.mean, config.std, device)
        self.min_area, self.flip = config.min_area, config.flip

    def _draws(self, n: int, seed: int | None) -> list[Tensor | None]:
        draws = super()._draws(n, seed)
        if seed is None or not self.train:
            return list(draws)
        changed = torch.stack([draw for draw in draws if draw is not None])
        area = self.min_area + (1 - self.min_area) * changed[:, :10, 0]
        changed[:, :10, 0] = (area - BASE_MIN_AREA) / (1 - BASE_MIN_AREA)
        if not self.flip:
            changed[:, 10, 0] = 1.0
        return list(changed.unbind())


def load_problem(config: DataConfig, device: torch.device) -> Problem:
    """Read the data, hold images out, put them where batches are made.

    Raises:
        DataError: the data is missing or damaged, or has too few images for what is asked.
        ConfigError: the means are not of the images' channels.
    """
    train_set, val_set, test_set = load_sets(config)
    channels = train_set.images.shape[1] if isinstance(train_set, ImageSet) else 3
    if channels != len(config.mean):
        raise ConfigError(f"data.mean: has {len(config.mean)} numbers, but {config.name} has {channels} channels")
    native = train_set.images.shape[-1] if isinstance(train_set, ImageSet) else FILE_IMAGE_SIZE
    return Problem(
        make_source(train_set, config, device, True),
        make_source(val_set, config, device, False) if config.val_images else None,
        make_source(test_set, config, device, False),
        train_set.classes, channels, config.image_size or native,
        {"train": train_set.digest, "val": val_set.digest, "test": test_set.digest},
    )  # fmt: skip


def load_sets(config: DataConfig) -> tuple[ImageSet, ImageSet, ImageSet] | tuple[FileSet, FileSet, FileSet]:
    """Training, held-out and test images."""
    if config.name == "imagenet100":
        root = data.data_root() / Path(config.folder).expanduser()
        return split_sets(imagenet100(root / "train", "train"), imagenet100(root / "val", "test"), config)
    train_set, test_set = (data.load(config.name, split, download=config.download) for split in ("train", "test"))
    return split_sets(train_set, test_set, config)


def split_sets(train_set: AnySet, test_set: AnySet, config: DataConfig) -> tuple[AnySet, AnySet, AnySet]:
    """Take as many images as the configuration asks for, and hold some of the training images out."""
    train_set, test_set = balanced(train_set, config.train_images), balanced(test_set, config.test_images)
    kept, held_out = split_validation(train_set.labels, config.val_images, config.split_seed, len(train_set.classes))
    return data.take(train_set, kept), data.take(train_set, held_out), test_set


def imagenet100(folder: Path, split: str) -> FileSet:
    """The authors' 100 classes of an ImageNet-1k folder FOLDER/<wnid>/*; labels in sorted order.

    Raises:
        DataError: the folder, a class or a class's images are missing.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; unpack ImageNet-1k there, one folder a class, or set data.folder")
    if missing := [name for name in CLASSES if not (folder / name).is_dir()]:
        raise DataError(f"{folder}: {len(missing)} of the 100 classes are missing, {missing[0]} first; copy them again")
    paths, labels = list[Path](), list[int]()
    for label, name in enumerate(CLASSES):
        found = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise DataError(f"{folder / name}: no image in it (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
        paths += found
        labels += [label] * len(found)
    lines = "\n".join(f"{p.relative_to(folder).as_posix()} {c}" for p, c in zip(paths, labels, strict=True))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return FileSet(tuple(paths), torch.tensor(labels), CLASSES, "imagenet100", split, digest)


def balanced(image_set: AnySet, count: int | None) -> AnySet:
    """The first images of each class, the same number of each, in the set's order; DataError if there are fewer."""
    if count is None:
        return image_set
    each, rest = divmod(count, len(image_set.classes))
    what = f"{image_set.name} ({image_set.split})"
    if rest or not each:
        raise DataError(f"{what}: {count} images are not the same number of {len(image_set.classes)} classes")
    chosen = []
    for label in range(len(image_set.classes)):
        rows = (image_set.labels == label).nonzero().flatten()[:each]
        if len(rows) < each:
            raise DataError(f"{what}: class {image_set.classes[label]!r} has {len(rows)} images, {each} are asked for")
        chosen.append(rows)
    return data.take(image_set, torch.cat(chosen).sort().values)


def split_validation(labels: Tensor, count: int, seed: int, num_classes: int) -> tuple[Tensor, Tensor]:
    """Indices that stay and indices held out, both ascending: `count` in all, the same number of each class.

    Raises:
        DataError: the number is not a multiple of the classes, or a class would lose all its images.
    """
    each, rest = divmod(count, num_classes)
    if rest:
        raise DataError(f"data.val_images: {count} is not a multiple of the {num_classes} classes")
    held = torch.zeros(len(labels), dtype=torch.bool)
    generator = stream(seed, "validation")
    for label in range(num_classes if each else 0):
        rows = (labels == label).nonzero().flatten()
        if len(rows) <= each:
            raise DataError(f"data.val_images: class {label} has {len(rows)} images, none would be left to train on")
        held[rows[torch.randperm(len(rows), generator=generator)[:each]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def make_source(image_set: ImageSet | FileSet, config: DataConfig, device: torch.device, train: bool) -> Batches:
    """Put the images where batches are made: on the device, or behind threads that decode them."""
    if isinstance(image_set, FileSet):
        return Crops(image_set, config, train, device)
    augment = batches.augmentations(("flip",) if train and config.flip else ())
    size = config.image_size or image_set.images.shape[-1]
    images, labels = image_set.images.to(device), image_set.labels.to(device)
    return Resized(images, labels, config.mean, config.std, augment, size)
