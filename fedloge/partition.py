"""Who holds which image: the Dirichlet partition of the training set, and the clients' local test sets.

Everything here draws from numpy generators of its own, so model code and torch's generator cannot change a partition.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError, DataError

IntArray = npt.NDArray[np.int64]
LOCAL_TEST_RULES = ("proportional_global", "proportional_client")
_MAX_TRIES = 500


def dirichlet_partition(
    labels: npt.ArrayLike, num_clients: int, alpha: float, seed: int, min_size: int = 10
) -> list[IntArray]:
    """Deal the images to clients, each class by a share vector of its own.

    For each class: p ~ Dirichlet(alpha * 1_K), then each image of the class goes to a client drawn from p. While a
    client has fewer than `min_size` images (the authors enforce no minimum), the whole partition is drawn anew from the
    same generator. On CIFAR-10/100-LT, seed 3407 gives the client sizes of the authors' logs.

    Args:
        labels: [N] class indices.
        alpha: concentration, > 0; small means that a client sees few classes.
        min_size: smallest number of images a client may get.

    Returns:
        K arrays of ascending indices into `labels`, disjoint and complete.

    Raises:
        ConfigError: `alpha`, `num_clients` or `seed` out of range.
        DataError: too few images, or no partition with the minimum size found in 500 tries.
    """
    classes = _labels(labels)
    _check_partition(len(classes), num_clients, alpha, seed, min_size)
    members = [np.flatnonzero(classes == c) for c in np.unique(classes)]

    generator = np.random.RandomState(seed)
    # The authors' code first draws a client-by-class table that it does not need. Passing over as many numbers
    # is what makes their seed give their partition.
    generator.random_sample(num_clients * len(members))

    owner = np.empty(len(classes), dtype=np.int64)
    smallest_seen = 0
    for _ in range(_MAX_TRIES):
        for images in members:
            owner[images] = generator.choice(num_clients, size=len(images), p=_shares(generator, num_clients, alpha))
        smallest = int(np.bincount(owner, minlength=num_clients).min())
        if smallest >= min_size:
            return [np.flatnonzero(owner == k) for k in range(num_clients)]
        smallest_seen = max(smallest_seen, smallest)
    raise DataError(
        f"at alpha {alpha} some of the {num_clients} clients got fewer than {min_size} images in each of {_MAX_TRIES} "
        f"tries (at best {smallest_seen}); raise alpha, or lower the number of clients or the minimum size"
    )


def partition_digest(parts: Sequence[npt.ArrayLike]) -> str:
    """Name a partition by the SHA-256 (hex) of its clients' sizes and indices."""
    digest = hashlib.sha256()
    for part in parts:
        indices = np.asarray(part).astype("<i8")
        digest.update(len(indices).to_bytes(8, "little"))
        digest.update(indices.tobytes())
    return digest.hexdigest()


def class_counts(labels: npt.ArrayLike, parts: Sequence[npt.ArrayLike], num_classes: int) -> IntArray:
    """Count the images n_{k,c} of class c at client k: [K, C] int64. Raises DataError for a label out of range."""
    classes = _labels(labels)
    if classes.size and classes.max() >= num_classes:
        raise DataError(f"label {classes.max()} does not fit {num_classes} classes (0 to {num_classes - 1})")
    rows = [np.bincount(classes[np.asarray(part, dtype=np.int64)], minlength=num_classes) for part in parts]
    return np.array(rows, dtype=np.int64).reshape(len(parts), num_classes)


def local_tests(
    test_labels: npt.ArrayLike,
    counts: npt.ArrayLike,
    rule: str,
    seed: int,
    size_per_client: int = 200,
    budget: int | None = None,
) -> list[IntArray]:
    """Draw each client a test set with the class mix n_{k,c} of its training set.

    proportional_global   t_{k,c} = floor(n_{k,c} / sum n * budget), the authors' rule: tests grow with the clients,
                          and a class with few training images may get none
    proportional_client   t_{k,c} = round(n_{k,c} / n_k * size_per_client)

    t is cut to the test images that exist. Within a client no image occurs twice; clients may share images.

    Args:
        test_labels: [M] class indices of the test images.
        counts: [K, C] training images per client and class.
        budget: images of all local tests together under `proportional_global`; the number of test images if not given.

    Returns:
        K arrays of ascending indices into `test_labels`, some perhaps empty.

    Raises:
        ConfigError: an unknown rule, a seed or a size out of range.
        DataError: counts of a wrong shape, negative or all zero.
    """
    classes = _labels(test_labels)
    table = np.asarray(counts, dtype=np.int64)
    if table.ndim != 2 or (table < 0).any() or not table.any():
        raise DataError("the training counts must be a [clients, classes] table of images with at least one image")
    wanted = _test_sizes(table, rule, size_per_client, len(classes) if budget is None else budget)
    if seed < 0:
        raise ConfigError(f"seed {seed} is negative")

    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(classes == c) for c in range(table.shape[1])]
    tests = []
    for row in wanted:
        pairs = zip(row, members, strict=True)
        drawn = [generator.choice(images, min(int(t), len(images)), replace=False) for t, images in pairs]
        tests.append(np.sort(np.concatenate(drawn)))
    return tests


def _labels(labels: npt.ArrayLike) -> IntArray:
    found = np.asarray(labels)
    if found.ndim != 1 or (found.size and (found.dtype.kind not in "iu" or found.min() < 0)):
        raise DataError(f"labels must be one list of whole numbers from 0, got shape {found.shape} of {found.dtype}")
    return found.astype(np.int64)


def _check_partition(images: int, num_clients: int, alpha: float, seed: int, min_size: int) -> None:
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigError(f"alpha {alpha} is not a positive number; it is the concentration of the Dirichlet partition")
    if num_clients < 1:
        raise ConfigError(f"a partition needs at least 1 client, got {num_clients}")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed {seed} is outside [0, 2^32)")
    if num_clients * max(min_size, 1) > images:
        needed = f"{images} images are too few for {num_clients} clients with {max(min_size, 1)} or more each"
        raise DataError(f"{needed}; lower the number of clients or the minimum size")


def _shares(generator: np.random.RandomState, num_clients: int, alpha: float) -> npt.NDArray[np.float64]:
    """Draw p ~ Dirichlet(alpha * 1_K); where float64 fails, its limits: all to one client, or equal shares."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        shares: npt.NDArray[np.float64] = generator.dirichlet(np.full(num_clients, alpha))
    if not (np.isfinite(shares).all() and abs(shares.sum() - 1) < 1e-9):
        shares = np.full(num_clients, 1 / num_clients) if alpha > 1 else np.zeros(num_clients)
        shares[generator.randint(num_clients)] += 1 - shares.sum()
    return shares


def _test_sizes(table: IntArray, rule: str, size_per_client: int, budget: int) -> IntArray:
    """Compute t_{k,c} before the cut, in whole numbers so that no rounding error moves a floor."""
    if rule not in LOCAL_TEST_RULES:
        raise ConfigError(f"there is no local-test rule '{rule}'; choose from {', '.join(LOCAL_TEST_RULES)}")
    if size_per_client < 1 or budget < 1:
        raise ConfigError(f"local tests need at least 1 image, got size_per_client {size_per_client}, budget {budget}")
    if rule == "proportional_global":
        sizes: IntArray = table * budget // table.sum()
    else:
        totals = np.maximum(table.sum(axis=1, keepdims=True), 1)
        sizes = (2 * size_per_client * table + totals) // (2 * totals)
    return sizes
