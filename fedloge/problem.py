"""The problem that a configuration states: a long-tailed training set, its clients, and who is tested on what."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedloge.config import Config, DataConfig
from fedloge.federated import Client
from fedloge.model import Shape
from fedloge.partition import class_counts, dirichlet_partition, local_tests, partition_digest
from shared import batches, data, longtail
from shared.batches import Batches, Files, Resident
from shared.data import FileSet, ImageSet
from shared.errors import ConfigError, DataError
from shared.gpu import stream

FILE_IMAGE_SIZE = 224  # pixels, where the configuration of an image-file data set does not say


@dataclass(frozen=True)
class Problem:
    """All that training and evaluation need of the data; tensors are on the device.

    `local_tests` holds for each client indices into the test set; `class_counts` [C] counts the training images.
    """

    train: Batches
    test: Batches
    clients: tuple[Client, ...]
    local_tests: tuple[Tensor, ...]
    class_counts: tuple[int, ...]
    classes: tuple[str, ...]
    groups: longtail.ShotGroups
    shape: Shape
    digests: dict[str, str]

    def facts(self) -> dict[str, Any]:
        """What is worth knowing of the data, for the run's log."""
        sizes = [client.size for client in self.clients]
        held = (self.shape.counts > 0).float()
        return {
            "images": sum(sizes), "class_counts": list(self.class_counts), "groups": self.groups._asdict(),
            "client_sizes": sizes, "classes_a_client": round(float(held.sum(1).mean()), 2),
            "empty_pairs": round(1 - float(held.mean()), 4), "local_test_sizes": [len(t) for t in self.local_tests],
            "digests": self.digests,
        }  # fmt: skip


def load_problem(config: Config, device: torch.device) -> Problem:
    """Read the data, make the long tail, deal it to the clients, draw the local tests.

    Raises:
        DataError: the data is missing or damaged, or cannot be dealt as asked.
    """
    train_set, test_set = load_sets(config.data)
    num_classes = len(train_set.classes)
    train_labels, test_labels = to_numpy(train_set.labels), to_numpy(test_set.labels)
    settings, seed = (
        config.clients,
        config.seed if config.clients.partition_seed is None else config.clients.partition_seed,
    )
    parts = dirichlet_partition(train_labels, settings.count, settings.alpha, seed, settings.min_size)
    counts = class_counts(train_labels, parts, num_classes)
    test_seed = stream(seed, "local tests").initial_seed() % 2**32
    tests = local_tests(test_labels, counts, settings.local_test, test_seed, settings.local_test_size)
    if not any(map(len, tests)):
        raise DataError(
            f"no client gets a test image of {len(test_labels)}; use clients.local_test=proportional_client"
        )
    table = torch.from_numpy(counts).to(device)
    clients = tuple(Client(k, torch.from_numpy(part).to(device), table[k]) for k, part in enumerate(parts))
    total = [int(n) for n in counts.sum(axis=0)]
    train, test = make_source(train_set, config.data, device, True), make_source(test_set, config.data, device, False)
    channels, size = image_shape(train_set, config.data)
    return Problem(
        train, test, clients, tuple(torch.from_numpy(t).to(device) for t in tests), tuple(total), train_set.classes,
        longtail.shot_groups_by_share(total), Shape(channels, size, table),
        {"train": train_set.digest, "test": test_set.digest, "partition": partition_digest(parts)},
    )  # fmt: skip


def load_sets(config: DataConfig) -> tuple[ImageSet | FileSet, ImageSet | FileSet]:
    """The long-tailed training set and the balanced test set.

    Raises:
        DataError: as `shared.data.load`, or a class has no image.
    """
    if config.name == "list":
        assert config.train_list is not None
        assert config.test_list is not None
        assert config.image_root is not None
        root, classes = in_data_root(config.image_root), config.num_classes
        train_files = data.load_list(in_data_root(config.train_list), root, classes, split="train")
        test_files = data.load_list(in_data_root(config.test_list), root, classes, split="test")
        check_complete(train_files)
        return train_files, test_files
    train_set, test_set = (data.load(config.name, split, download=config.download) for split in ("train", "test"))
    check_complete(train_set)
    available = longtail.class_counts(train_set.labels, len(train_set.classes))
    n_max = config.n_max or min(available)
    profile = longtail.exponential_counts if config.profile == "exponential" else longtail.step_counts
    counts = profile(n_max, len(available), config.imbalance_factor)
    chosen = longtail.subsample(train_set.labels, counts, config.subset_seed)
    train_set = data.take(train_set, chosen)
    return shrink(train_set, config), shrink(test_set, config)


def check_complete(image_set: ImageSet | FileSet) -> None:
    """Every class must have an image: a class without one has no row to train and no place in the partition."""
    counts = longtail.class_counts(image_set.labels, len(image_set.classes))
    if empty := [image_set.classes[c] for c, n in enumerate(counts) if n == 0]:
        raise DataError(f"{image_set.name} ({image_set.split}): {len(empty)} classes have no image, {empty[0]!r} first")


def shrink(image_set: ImageSet, config: DataConfig) -> ImageSet:
    """Average the pixels down to the size that the configuration asks for."""
    if config.image_size is None or config.image_size == image_set.images.shape[-1]:
        return image_set
    images = batches.resize_mean(image_set.images, config.image_size)
    return ImageSet(images, image_set.labels, image_set.classes, image_set.name, image_set.split, image_set.digest)


def make_source(image_set: ImageSet | FileSet, config: DataConfig, device: torch.device, train: bool) -> Batches:
    """Put the images where batches are made: on the device, or behind threads that decode them."""
    channels, size = image_shape(image_set, config)
    if len(config.mean) != channels:
        raise ConfigError(f"data.mean: has {len(config.mean)} numbers, but {image_set.name} has {channels} channels")
    if isinstance(image_set, FileSet):
        return Files(image_set, size, config.workers, train, config.mean, config.std, device)
    augment = batches.augmentations(("crop", "flip") if train and config.augment == "crop_flip" else ())
    return Resident(image_set.images.to(device), image_set.labels.to(device), config.mean, config.std, augment)


def image_shape(image_set: ImageSet | FileSet, config: DataConfig) -> tuple[int, int]:
    """Channels and pixels a side of the images that the network sees."""
    if isinstance(image_set, FileSet):
        return 3, config.image_size or FILE_IMAGE_SIZE
    return image_set.images.shape[1], image_set.images.shape[2]


def in_data_root(path: str) -> Path:
    """A path of the configuration, taken from the data root unless it is absolute."""
    return data.data_root() / Path(path).expanduser()


def to_numpy(labels: Tensor) -> npt.NDArray[np.int64]:
    """Labels for numpy's generators."""
    return labels.cpu().numpy().astype(np.int64)
