"""Long-tailed class counts, the subsets that realise them, and the many / medium / few groups of classes."""

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.errors import DataError


class ShotGroups(NamedTuple):
    """Class indices by how many training images a class has, each group in ascending order; a group may be empty."""

    many: tuple[int, ...]
    medium: tuple[int, ...]
    few: tuple[int, ...]


def exponential_counts(n_max: int, num_classes: int, imbalance_factor: float) -> list[int]:
    """Images a class when the counts fall exponentially from `n_max` (class 0) to `n_max / imbalance_factor`.

    n_c = floor(n_max * (1 / IF) ** (c / (C - 1))), c = 0..C-1: truncated, not rounded (Cao et al. 2019, LDAM).
    Raises DataError where a class would get no image.
    """
    _check_profile(n_max, num_classes, imbalance_factor)
    steps = max(num_classes - 1, 1)
    return [_floor(n_max * imbalance_factor ** (-c / steps)) for c in range(num_classes)]


def step_counts(n_max: int, num_classes: int, imbalance_factor: float) -> list[int]:
    """Images a class when the first half of the classes has `n_max` and the second half `n_max / imbalance_factor`.

    With an odd number of classes the middle one belongs to the first half. Raises DataError where a class would get
    no image.
    """
    _check_profile(n_max, num_classes, imbalance_factor)
    minority = num_classes // 2
    return [n_max] * (num_classes - minority) + [_floor(n_max / imbalance_factor)] * minority


def class_counts(labels: Sequence[int] | Tensor, num_classes: int) -> list[int]:
    """Images of each class 0..num_classes-1 among `labels` (integers [N])."""
    counts: list[int] = torch.bincount(torch.as_tensor(labels, dtype=torch.int64), minlength=num_classes).tolist()
    if len(counts) > num_classes:
        raise DataError(
            f"label {len(counts) - 1} found, but there are only {num_classes} classes (0..{num_classes - 1})"
        )
    return counts


def subsample(labels: Sequence[int] | Tensor, counts: Sequence[int], seed: int) -> Tensor:
    """Choose `counts[c]` images of each class c; returns their indices, int64 [sum(counts)], grouped by class.

    One legacy generator RandomState(seed) serves all classes in order: the ascending indices of class c are shuffled in
    place and the first counts[c] kept. This is the draw of the community's IMBALANCECIFAR code, so seed 0 gives the
    published subsets; any other generator gives other images. Raises DataError where a class has too few images.
    """
    array = torch.as_tensor(labels).cpu().numpy()
    rng = np.random.RandomState(seed)
    chosen = []
    for c, count in enumerate(counts):
        indices = np.flatnonzero(array == c)
        if not 0 < count <= len(indices):
            raise DataError(
                f"class {c}: {count} images asked for, {len(indices)} are there; ask for 1 to {len(indices)}"
            )
        rng.shuffle(indices)
        chosen.append(indices[:count])
    return torch.from_numpy(np.concatenate(chosen).astype(np.int64))


def shot_groups(counts: Sequence[int], many: int = 100, few: int = 20) -> ShotGroups:
    """Split the classes by their number of training images.

    Many-shot: more than `many` images; few-shot: fewer than `few`; medium-shot: the rest (Liu et al. 2019).
    """
    return ShotGroups(
        many=tuple(c for c, n in enumerate(counts) if n > many),
        medium=tuple(c for c, n in enumerate(counts) if few <= n <= many),
        few=tuple(c for c, n in enumerate(counts) if n < few),
    )


def shot_groups_by_share(counts: Sequence[int], many: float = 0.75, medium: float = 0.95) -> ShotGroups:
    """Split the classes by the share of the images that they and all larger classes hold together.

    Going down from the largest class (equal counts: lower index first), many-shot ends with the class at which the
    cumulative share first reaches `many`, medium-shot with the one at which it first reaches `medium`.
    """
    order = sorted(range(len(counts)), key=lambda c: -counts[c])
    groups: tuple[list[int], list[int], list[int]] = ([], [], [])
    total, before = sum(counts), 0
    for c in order:
        # A class belongs to the first group whose limit the classes before it have not reached.
        groups[sum(before >= share * total for share in (many, medium))].append(c)
        before += counts[c]
    return ShotGroups(*(tuple(sorted(group)) for group in groups))


def read_list(path: Path | str, num_classes: int | None = None) -> tuple[list[str], list[int]]:
    """Read a list file of "path label" lines (plain or .gz; blank lines are skipped): relative paths, labels.

    A line is split at its last space, so a path may hold spaces. Raises DataError, with the line number, for a line
    without a label, a label outside 0..num_classes-1 (only >= 0 is asked where num_classes is None) and a path that
    leaves the image folder.
    """
    path = Path(path)
    paths, labels = [], []
    for number, line in enumerate(_read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        name = name.strip()
        if not name or not (label.isascii() and label.isdigit()):
            raise DataError(f"{path}:{number}: expected 'path label', found {line!r}")
        if num_classes is not None and int(label) >= num_classes:
            raise DataError(f"{path}:{number}: label {label} is outside 0..{num_classes - 1}")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{path}:{number}: {name} leaves the image folder; paths must be relative to it")
        paths.append(name)
        labels.append(int(label))
    if not paths:
        raise DataError(f"{path}: no 'path label' line in it")
    return paths, labels


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such list file") from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: not a readable list file ({error}); copy it again") from error


def _check_profile(n_max: int, num_classes: int, imbalance_factor: float) -> None:
    if num_classes < 1 or not 1 <= imbalance_factor < math.inf:
        raise DataError(f"imbalance factor {imbalance_factor}, {num_classes} classes: both must be at least 1")
    if _floor(n_max / imbalance_factor) < 1:
        raise DataError(
            f"{n_max} images in the largest class and imbalance factor {imbalance_factor} leave none for the smallest; "
            f"use a factor of at most {n_max}"
        )


def _floor(value: float) -> int:
    """Floor that takes 99.99999999999999, an exact power after rounding errors, for 100."""
    nearest = round(value)
    return nearest if abs(value - nearest) <= 1e-9 * max(nearest, 1) else math.floor(value)
