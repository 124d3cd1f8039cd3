"""The large data sets: which list files they are, whether yours are right, and Places-LT's order of classes.

Nothing of them is shipped: their images are under their own terms. The README says what to put where.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from shared import longtail
from shared.data import FileSet
from shared.errors import DataError


@dataclass(frozen=True)
class KnownList:
    """What a data set's lists hold."""

    classes: int
    train: int
    test: int
    largest: int
    smallest: int


KNOWN = {
    "imagenet_lt": KnownList(1000, 115_846, 50_000, 1280, 5),
    "places_lt": KnownList(365, 62_500, 36_500, 4980, 5),
    "inaturalist18": KnownList(8142, 437_513, 24_426, 1000, 2),
}


def check_known(name: str, train: FileSet, test: FileSet) -> None:
    """Compare two lists with what the data set of that name must hold; an unknown name is not checked.

    Raises:
        DataError: naming the first number that differs.
    """
    if name not in KNOWN:
        return
    wanted, counts = KNOWN[name], longtail.class_counts(train.labels, len(train.classes))
    found = KnownList(len(train.classes), len(train), len(test), max(counts), min(counts))
    words = {
        "classes": "classes (data.num_classes)", "train": "training images (data.train_list)",
        "test": "test images (data.test_list)", "largest": "images in the largest class (data.train_list)",
        "smallest": "images in the smallest class (data.train_list)",
    }  # fmt: skip
    for key, text in words.items():
        if getattr(found, key) != getattr(wanted, key):
            raise DataError(
                f"{name}: {getattr(found, key):,} {text}, but this data set has {getattr(wanted, key):,}; take the "
                f"official lists, or data.name=list for lists of your own"
            )


def by_count(counts: Sequence[int]) -> list[int]:
    """Old class numbers in descending order of their training images; equal counts keep their order."""
    return sorted(range(len(counts)), key=lambda c: -counts[c])


def relabel(files: FileSet, order: Sequence[int]) -> FileSet:
    """Number the classes anew: class `order[i]` becomes class i. No loss changes by it."""
    new = torch.empty(len(order), dtype=torch.int64)
    new[torch.tensor(order)] = torch.arange(len(order))
    return replace(files, labels=new[files.labels], classes=tuple(files.classes[c] for c in order))
