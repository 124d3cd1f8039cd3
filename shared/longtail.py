"""Long-tailed class counts, the subsets that realise them, and the many / medium / few groups of classes."""

import gzip
import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
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
    return _counts(n_max, np.linspace(0, 1, num_classes), imbalance_factor)


def step_counts(n_max: int, num_classes: int, imbalance_factor: float) -> list[int]:
    """Images a class when the first half of the classes has `n_max` and the second half `n_max / imbalance_factor`.

    An odd class in the middle belongs to the first half. Raises DataError where a class would get no image.
    """
    return _counts(n_max, np.arange(num_classes) >= num_classes - num_classes // 2, imbalance_factor)


def _counts(n_max: int, exponents: ArrayLike, imbalance_factor: float) -> list[int]:
    """floor(n_max / IF ** exponent); 1e-9 saves an exact power from being floored below itself by rounding errors."""
    powers = np.asarray(exponents, float)
    if not len(powers) or not 1 <= imbalance_factor < math.inf:
        raise DataError(f"imbalance factor {imbalance_factor}, {len(powers)} classes: both must be at least 1")
    counts: list[int] = np.floor(n_max * float(imbalance_factor) ** -powers * (1 + 1e-9)).astype(int).tolist()
    if min(counts) < 1:
        asked = f"{n_max} images in the largest class and imbalance factor {imbalance_factor}"
        raise DataError(f"{asked} leave none for the smallest; use a factor of at most {n_max}")
    return counts


def class_counts(labels: Sequence[int] | Tensor, num_classes: int) -> list[int]:
    """Images of each class 0..num_classes-1 among `labels` (integers [N])."""
    counts: list[int] = torch.bincount(torch.as_tensor(labels, dtype=torch.int64), minlength=num_classes).tolist()
    if len(counts) > num_classes:
        raise DataError(f"label {len(counts) - 1} found, but the {num_classes} classes end at {num_classes - 1}")
    return counts


def subsample(labels: Sequence[int] | Tensor, counts: Sequence[int], seed: int) -> Tensor:
    """Choose `counts[c]` images of each class c; returns their indices, int64 [sum(counts)], grouped by class.

    One RandomState(seed) shuffles the ascending indices of class after class, the first counts[c] are kept: the draw of
    the community's IMBALANCECIFAR code (seed 0 gives its subsets). Raises DataError where a class has too few images.
    """
    array, rng, chosen = torch.as_tensor(labels).cpu().numpy(), np.random.RandomState(seed), []
    for c, count in enumerate(counts):
        indices = np.flatnonzero(array == c)
        if not 0 < count <= len(indices):
            raise DataError(f"class {c}: {count} images asked for; it has {len(indices)}, ask for 1 to that many")
        rng.shuffle(indices)
        chosen.append(indices[:count])
    return torch.from_numpy(np.concatenate(chosen).astype(np.int64))


def shot_groups(counts: Sequence[int], many: int = 100, few: int = 20) -> ShotGroups:
    """Classes with more than `many` training images, the rest, and those with fewer than `few` (Liu et al. 2019)."""
    groups = [(n <= many) + (n < few) for n in counts]
    return ShotGroups(*(tuple(c for c, group in enumerate(groups) if group == i) for i in range(3)))


def shot_groups_by_share(counts: Sequence[int], many: float = 0.75, medium: float = 0.95) -> ShotGroups:
    """Split the classes by the share of the images that they and all larger classes hold together.

    From the largest class down (equal counts: lower index first), many-shot ends with the class at which the cumulative
    share reaches `many`, medium-shot with the one at which it reaches `medium`.
    """
    order = np.argsort(-np.asarray(counts), kind="stable")
    ends = np.searchsorted(np.asarray(counts)[order].cumsum(), [many * sum(counts), medium * sum(counts)]) + 1
    return ShotGroups(*(tuple(sorted(group.tolist())) for group in np.split(order, ends)))


def read_list(path: Path | str, num_classes: int | None = None) -> tuple[list[str], list[int]]:
    """Read a list file of "path label" lines (plain or .gz; blank lines are skipped): relative paths, labels.

    A line is split at its last space. Raises DataError, with the line number, for a line without a label, a label
    outside 0..num_classes-1 (only >= 0 where that is None) and a path that leaves the image folder.
    """
    paths, labels = [], []
    for number, line in enumerate(read_file(Path(path), "list file").decode("utf-8", "replace").splitlines(), start=1):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*([^\ufffd]*[^\ufffd\s]) +(\d+)\s*", line, re.ASCII)  # U+FFFD: not UTF-8
        if not match:
            raise DataError(f"{path}:{number}: expected 'path label' in UTF-8, found {line!r}")
        name, label = match[1], int(match[2])
        if num_classes is not None and label >= num_classes:
            raise DataError(f"{path}:{number}: label {label} is outside 0..{num_classes - 1}")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"{path}:{number}: {name} leaves the image folder; paths must be relative to it")
        paths.append(name)
        labels.append(label)
    if not paths:
        raise DataError(f"{path}: no 'path label' line in it")
    return paths, labels


def read_file(path: Path, kind: str) -> bytes:
    """The content of a file, unpacked where its name ends in .gz; `kind` is what a DataError calls it."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such {kind}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a readable {kind} ({error}); copy it again") from error
