"""The problem that a configuration states: the training images, and for each seed which of them train and validate.

The test set is not here: `load_test` is called once, by `eval.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightcnn.config import Config, DataConfig, TwoStageConfig
from shared import data
from shared.data import ImageSet
from shared.errors import DataError
from shared.gpu import stream


@dataclass(frozen=True, eq=False)
class Lane:
    """One of the runs that go side by side: a seed (and a fold of it), its training and validation images' indices."""

    seed: int
    fold: int | None
    train: Tensor
    validation: Tensor

    def draws(self, *names: str | int) -> torch.Generator:
        """The lane's random stream for a purpose, by seed and fold alone; on the CPU, so the same for every device."""
        fold = () if self.fold is None else ("fold", self.fold)
        return stream(self.seed, *fold, *names)

    def init_seed(self, *names: str | int) -> int:
        """A seed for initial weights."""
        return self.draws("init", *names).initial_seed()


@dataclass(frozen=True, eq=False)
class Problem:
    """All that training needs of the data; images uint8 [N, C, H, H] and labels [N] are on the device.

    `places` [N] says where in the data set's files each image stands.
    """

    images: Tensor
    labels: Tensor
    places: Tensor
    classes: tuple[str, ...]
    lanes: tuple[Lane, ...]
    digest: str

    @property
    def in_channels(self) -> int:
        """1 or 3."""
        return self.images.shape[1]

    @property
    def image_size(self) -> int:
        """Pixels a side."""
        return self.images.shape[2]

    def facts(self) -> dict[str, Any]:
        """What is worth knowing of the data, for the run's log."""
        lane = self.lanes[0]
        return {
            "train_images": len(lane.train), "val_images": len(lane.validation), "lanes": len(self.lanes),
            "image": [self.in_channels, self.image_size, self.image_size], "classes": list(self.classes),
            "digests": {"train": self.digest},
        }  # fmt: skip


def load_problem(config: Config, device: torch.device) -> Problem:
    """Read the training set and deal it to the seeds.

    Raises:
        DataError: the data is missing or damaged, or cannot be split as asked.
    """
    whole = data.load(config.data.name, "train", download=config.data.download)
    check_square(whole)
    train, validation = split(whole, config.data)
    places = torch.cat([train, validation]).sort().values
    used = data.take(whole, places)
    train, validation = torch.searchsorted(places, train), torch.searchsorted(places, validation)
    lanes = tuple(lane for seed in config.all_seeds for lane in lanes_of(seed, train, validation, config))
    digest = data.take(used, torch.cat([train, validation])).digest
    images, labels = used.images.to(device), used.labels.to(device)
    return Problem(images, labels, places, whole.classes, lanes, digest)


def load_test(config: Config) -> ImageSet:
    """The test set; only `eval.py` asks for it.

    Raises:
        DataError: it is missing or damaged.
    """
    test_set = data.load(config.data.name, "test", download=config.data.download)
    check_square(test_set)
    if config.data.test_images is None:
        return test_set
    each = of_each("test_images", config.data.test_images, test_set.labels, test_set.classes)
    return data.take(test_set, (ranks(test_set.labels, len(test_set.classes)) < each).nonzero()[:, 0])


def check_square(image_set: ImageSet) -> None:
    """DataError for images that the networks and the augmentation cannot take."""
    _, channels, height, width = image_set.images.shape
    if height != width:
        raise DataError(f"{image_set.name}: images of {height} x {width} pixels; the network takes square ones")
    if not len(image_set):
        raise DataError(f"{image_set.name} ({image_set.split}): has no image of {channels} channels")


def split(whole: ImageSet, config: DataConfig) -> tuple[Tensor, Tensor]:
    """Indices of the training and the validation images, disjoint, each in file order.

    Raises:
        DataError: there are too few images, or a class is missing on one side.
    """
    wanted = config.val_images + (config.train_images or 1)
    if wanted > len(whole):
        trained = f"data.train_images: {config.train_images}, and " if config.train_images else ""
        raise DataError(
            f"{trained}data.val_images: {config.val_images} are asked of {len(whole)} images; ask for fewer"
        )
    indices, classes = torch.arange(len(whole)), len(whole.classes)
    rank = ranks(whole.labels, classes)
    if config.val_from == "first":
        held = indices < config.val_images
    else:
        held = rank < of_each("val_images", config.val_images, whole.labels, whole.classes)
    validation, train = indices[held], indices[~held]
    if config.train_images is not None:
        labels = whole.labels[train]
        train = train[ranks(labels, classes) < of_each("train_images", config.train_images, labels, whole.classes)]
    for name, part in (("training", train), ("validation", validation)):
        counts = torch.bincount(whole.labels[part], minlength=classes)
        if bool((counts == 0).any()):
            lacking = whole.classes[int((counts == 0).nonzero()[0])]
            raise DataError(
                f"{whole.name}: no {name} image of class {lacking!r} with {len(part)} images; "
                "set data.val_from=each_class where the file is sorted by class, or take more images"
            )
    return train, validation


def of_each(key: str, count: int, labels: Tensor, classes: Sequence[str]) -> int:
    """How many images of each class make `count` in all; DataError where it does not divide or a class has fewer."""
    each, rest = divmod(count, len(classes))
    if rest:
        raise DataError(f"data.{key}: {count} is not the same number of each of {len(classes)} classes; ask for more")
    fewest, rarest = torch.bincount(labels, minlength=len(classes)).min(dim=0)
    if fewest < each:
        name = classes[int(rarest)]
        raise DataError(f"data.{key}: {count} are {each} of each class, but {name!r} has {fewest}; ask for fewer")
    return each


def ranks(labels: Tensor, num_classes: int) -> Tensor:
    """How many images of the same class come before each image, [N]."""
    rank = torch.empty_like(labels)
    for c in range(num_classes):
        members = labels == c
        rank[members] = torch.arange(int(members.sum()))
    return rank


def lanes_of(seed: int, train: Tensor, validation: Tensor, config: Config) -> list[Lane]:
    """One lane a seed; under `kfold: honest` one a fold, each a fresh model that never saw its validation images.

    The folds are dealt from training and validation images together, in the seed's own order. What does not divide
    stays in training, so that all folds have one length.
    """
    if not (isinstance(config.method, TwoStageConfig) and config.method.kfold == "honest"):
        return [Lane(seed, None, train, validation)]
    return [Lane(seed, k, *parts) for k, parts in enumerate(folds_of(seed, train, validation, config.method.folds))]


def folds_of(seed: int, train: Tensor, validation: Tensor, folds: int) -> list[tuple[Tensor, Tensor]]:
    """(training, validation) indices of each fold.

    Raises:
        DataError: there are fewer images than folds.
    """
    everything = torch.cat([train, validation]).sort().values
    size = len(everything) // folds
    if size < 1:
        raise DataError(f"method.folds: {folds} folds of {len(everything)} images; take fewer folds")
    order = torch.randperm(len(everything), generator=stream(seed, "folds"))
    parts = []
    for k in range(folds):
        held = torch.zeros(len(everything), dtype=torch.bool)
        held[order[k * size : (k + 1) * size]] = True
        parts.append((everything[~held], everything[held]))
    return parts
