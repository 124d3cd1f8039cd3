"""The problem that a configuration states: a long-tailed training set in two views, and a balanced test set."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mdcs import lists
from mdcs.config import Config, DataConfig
from mdcs.views import FileViews, ResidentViews
from shared import batches, data, longtail
from shared.batches import Batches, Files, Resident
from shared.data import FileSet, ImageSet
from shared.errors import ConfigError, DataError

FILE_IMAGE_SIZE = 224  # pixels, where the configuration of an image-file data set does not say


@dataclass(frozen=True)
class Problem:
    """All that training and evaluation need of the data; tensors are on the device.

    `class_order` holds the original class numbers where the classes were numbered anew, else None.
    """

    train: ResidentViews | FileViews
    test: Batches
    class_counts: tuple[int, ...]
    classes: tuple[str, ...]
    groups: longtail.ShotGroups
    thirds: dict[str, tuple[int, ...]]
    channels: int
    class_order: tuple[int, ...] | None
    digests: dict[str, str]

    def facts(self) -> dict[str, Any]:
        """What is worth knowing of the data, for the run's log."""
        return {
            "images": sum(self.class_counts), "class_counts": list(self.class_counts),
            "groups": {name: list(group) for name, group in self.groups._asdict().items()},
            "thirds": {name: list(group) for name, group in self.thirds.items()}, "test_images": len(self.test),
            "class_order": self.class_order, "digests": self.digests,
        }  # fmt: skip


def load_problem(config: Config, device: torch.device) -> Problem:
    """Read the data, make the long tail, put the images where batches are made.

    Raises:
        DataError: the data is missing or damaged, or a class has no image.
        ConfigError: the configuration does not fit the images.
    """
    settings, order = config.data, None
    if settings.listed:
        train_set, test_set, order = listed_sets(settings)
        channels = check_channels(settings, train_set, 3)
        size = settings.image_size or FILE_IMAGE_SIZE
        common = (size, settings.workers)
        train: ResidentViews | FileViews = FileViews(
            train_set, *common, settings.mean, settings.std, device, settings.augment
        )
        test: Batches = Files(test_set, *common, False, settings.mean, settings.std, device)
        labels, classes, digests = train_set.labels, train_set.classes, (train_set.digest, test_set.digest)
    else:
        images, test_images = resident_sets(settings, config.seed)
        channels = check_channels(settings, images, images.images.shape[1])
        train = ResidentViews(
            images.images.to(device), images.labels.to(device), settings.mean, settings.std, settings.augment
        )
        test = Resident(test_images.images.to(device), test_images.labels.to(device), settings.mean, settings.std)
        labels, classes, digests = images.labels, images.classes, (images.digest, test_images.digest)
    counts = longtail.class_counts(labels, len(classes))
    if 0 in counts:
        raise DataError(f"{settings.name}: class {counts.index(0)} has no training image; its prior would be zero")
    return Problem(
        train, test, tuple(counts), classes, longtail.shot_groups(counts), thirds(counts), channels,
        None if order is None else tuple(order), dict(zip(("train", "test"), digests, strict=True)),
    )  # fmt: skip


def resident_sets(config: DataConfig, run_seed: int) -> tuple[ImageSet, ImageSet]:
    """The long-tailed training set and the whole test set, in memory."""
    train_set, test_set = (data.load(config.name, split, download=config.download) for split in ("train", "test"))
    available = longtail.class_counts(train_set.labels, len(train_set.classes))
    n_max = config.n_max or min(available)
    counts = longtail.exponential_counts(n_max, len(available), config.imbalance_factor)
    seed = run_seed if config.subset_seed is None else config.subset_seed
    train_set = data.take(train_set, longtail.subsample(train_set.labels, counts, seed))
    return shrink(train_set, config), shrink(test_set, config)


def listed_sets(config: DataConfig) -> tuple[FileSet, FileSet, list[int] | None]:
    """Training and test files by their lists, and the order of the classes where they were numbered anew."""
    assert config.train_list is not None
    assert config.test_list is not None
    assert config.image_root is not None
    root, classes = in_data_root(config.image_root), config.num_classes
    train = data.load_list(in_data_root(config.train_list), root, classes, "train")
    test = data.load_list(in_data_root(config.test_list), root, classes, "test")
    lists.check_known(config.name, train, test)
    if not config.relabel:
        return train, test, None
    order = lists.by_count(longtail.class_counts(train.labels, len(train.classes)))
    return lists.relabel(train, order), lists.relabel(test, order), order


def thirds(counts: list[int]) -> dict[str, tuple[int, ...]]:
    """Classes by descending training count in three parts: 3, 4 and 3 of ten; none is empty from three classes on."""
    order = lists.by_count(counts)
    first, second = round(len(order) / 3), round(2 * len(order) / 3)
    parts = {"head": order[:first], "middle": order[first:second], "tail": order[second:]}
    return {name: tuple(sorted(part)) for name, part in parts.items()}


def shrink(image_set: ImageSet, config: DataConfig) -> ImageSet:
    """Average the pixels down to the size that the configuration asks for."""
    if config.image_size is None or config.image_size == image_set.images.shape[-1]:
        return image_set
    images = batches.resize_mean(image_set.images, config.image_size)
    return ImageSet(images, image_set.labels, image_set.classes, image_set.name, image_set.split, image_set.digest)


def check_channels(config: DataConfig, image_set: ImageSet | FileSet, channels: int) -> int:
    """The images' channels, of which the configuration must have means and deviations."""
    if len(config.mean) != channels:
        raise ConfigError(f"data.mean: has {len(config.mean)} numbers, but {image_set.name} has {channels} channels")
    return channels


def in_data_root(path: str) -> Path:
    """A path of the configuration, taken from the data root unless it is absolute."""
    return data.data_root() / Path(path).expanduser()
