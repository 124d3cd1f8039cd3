"""The partition and the local tests, against the authors' logs and against arithmetic."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloge.partition import class_counts, dirichlet_partition, local_tests, partition_digest
from shared.errors import ConfigError, DataError

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

# classes, imbalance factor, alpha, clients -> smallest and largest client, classes per client, share of empty pairs (%)
LOGGED = [
    ((10, 50, 0.5, 40), (66, 995, 8.1, 19)),
    ((10, 100, 0.5, 40), (90, 1106, 7.8, 22)),
    ((10, 50, 1.0, 40), (146, 720, 9.3, 7)),
    ((10, 100, 1.0, 40), (96, 730, 8.5, 15)),
    ((100, 50, 0.5, 20), (437, 1030, 63, 37)),
    ((100, 100, 0.5, 20), (320, 766, 58, 42)),
]


def profile(classes, factor):
    return [int(50_000 // classes * factor ** (-c / (classes - 1))) for c in range(classes)]


def long_tail(classes, factor):
    return np.repeat(np.arange(classes), profile(classes, factor))


@pytest.mark.parametrize(("setting", "logged"), LOGGED)
def test_seed_3407_gives_the_client_sizes_of_the_authors_logs(setting, logged):
    classes, factor, alpha, clients = setting
    labels = long_tail(classes, factor)
    counts = class_counts(labels, dirichlet_partition(labels, clients, alpha, seed=3407), classes)
    sizes = counts.sum(axis=1)
    assert (sizes.min(), sizes.max()) == logged[:2]
    assert (counts > 0).sum(axis=1).mean() == pytest.approx(logged[2], abs=0.05 if classes == 10 else 0.5)
    assert 100 * (counts == 0).mean() == pytest.approx(logged[3], abs=0.51)
    assert counts.sum(axis=0).tolist() == profile(classes, factor)


def real_labels(name):
    path = DATA / name / "labels.bin"
    if not path.exists():
        pytest.skip(f"the real labels of {name} are not beside the checkout")
    raw = np.fromfile(path, dtype=np.uint8)
    return raw[:50_000] if name == "cifar-10" else raw.reshape(-1, 2)[:50_000, 1]


@pytest.mark.parametrize(("setting", "logged"), LOGGED)
def test_partitions_of_the_real_labels_lie_around_the_logged_ones(setting, logged):
    classes, factor, alpha, clients = setting
    official = real_labels(f"cifar-{classes}")
    keep = [np.flatnonzero(official == c)[:n] for c, n in enumerate(profile(classes, factor))]
    labels = official[np.sort(np.concatenate(keep))]
    assert len(labels) == {(10, 50): 13_996, (10, 100): 12_406, (100, 50): 12_608, (100, 100): 10_847}[classes, factor]

    tables = [class_counts(labels, dirichlet_partition(labels, clients, alpha, seed), classes) for seed in range(12)]
    smallest = [table.sum(axis=1).min() for table in tables]
    largest = [table.sum(axis=1).max() for table in tables]
    present = [(table > 0).sum(axis=1).mean() for table in tables]
    empty = [100 * (table == 0).mean() for table in tables]
    assert min(smallest) / 1.5 < logged[0] < 1.5 * max(smallest)
    assert min(largest) / 1.2 < logged[1] < 1.2 * max(largest)
    assert np.mean(present) == pytest.approx(logged[2], rel=0.05)
    assert np.mean(empty) == pytest.approx(logged[3], abs=3.5)
    pinned = class_counts(labels, dirichlet_partition(labels, clients, alpha, seed=3407), classes).sum(axis=1)
    assert (pinned.min(), pinned.max()) == logged[:2]  # the order of the images does not matter for the sizes


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=60, max_size=200),
    clients=st.integers(1, 5),
    alpha=st.floats(0.3, 100),
    seed=st.integers(0, 2**32 - 1),
    min_size=st.integers(0, 4),
)
def test_partition_is_disjoint_complete_sorted_and_keeps_the_minimum(labels, clients, alpha, seed, min_size):
    parts = dirichlet_partition(labels, clients, alpha, seed, min_size)
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    for part in parts:
        assert part.dtype == np.int64
        assert len(part) >= min_size
        assert (np.diff(part) > 0).all()


def test_partition_is_redrawn_until_every_client_has_the_minimum():
    labels = long_tail(10, 100)[::4]
    without, with_minimum = (
        [len(part) for part in dirichlet_partition(labels, 20, 0.5, seed=0, min_size=size)] for size in (0, 60)
    )
    assert min(without) < 60 <= min(with_minimum)


def test_partition_depends_on_the_seed_alone():
    labels = long_tail(10, 50)
    torch.manual_seed(0)
    np.random.seed(0)
    digest = partition_digest(dirichlet_partition(labels, 40, 0.5, seed=1))
    following = torch.rand(3), np.random.random_sample(3)
    torch.manual_seed(0)
    np.random.seed(0)
    assert torch.equal(following[0], torch.rand(3))  # the global generators were not advanced
    assert np.array_equal(following[1], np.random.random_sample(3))
    assert digest == partition_digest(dirichlet_partition(labels, 40, 0.5, seed=1))
    assert digest != partition_digest(dirichlet_partition(labels, 40, 0.5, seed=2))


def test_partition_is_pinned():
    """numpy freezes the stream of RandomState, so this digest holds on every machine and version."""
    parts = dirichlet_partition(long_tail(10, 50), 40, 0.5, seed=3407)
    assert partition_digest(parts) == "fa08a35a2051c40664304b4b5d2eadc9ff61d2bf6df2236d23dea096b0fb6cb1"


def test_digest_sees_sizes_order_and_indices():
    digests = {partition_digest(parts) for parts in ([[0, 1], [2]], [[0], [1, 2]], [[2], [0, 1]], [[0, 1], [3]], [])}
    assert len(digests) == 5
    assert partition_digest([[0, 1], [2]]) == partition_digest([np.array([0, 1], dtype=np.int32), np.array([2])])


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_that_is_not_a_positive_number_is_refused(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        dirichlet_partition([0] * 100, 2, alpha, seed=0)


@pytest.mark.parametrize(
    ("clients", "seed", "message"), [(0, 0, "at least 1 client"), (2, -1, "seed -1"), (2, 2**32, "seed 4294967296")]
)
def test_clients_and_seeds_out_of_range_are_refused(clients, seed, message):
    with pytest.raises(ConfigError, match=message):
        dirichlet_partition([0] * 100, clients, 0.5, seed=seed)


@pytest.mark.parametrize(("images", "clients", "min_size"), [(99, 10, 10), (3, 4, 0), (0, 1, 0)])
def test_too_few_images_are_refused(images, clients, min_size):
    with pytest.raises(DataError, match=f"{images} images are too few for {clients} clients"):
        dirichlet_partition([0] * images, clients, 0.5, seed=0, min_size=min_size)


def test_hopeless_minimum_is_refused_with_what_to_change():
    with pytest.raises(DataError, match="raise alpha, or lower the number of clients or the minimum size"):
        dirichlet_partition([0] * 100, 10, 0.01, seed=0)


@pytest.mark.parametrize(
    ("alpha", "largest"),
    [(1e-300, (100, 100)), (1e-4, (90, 100)), (1e9, (25, 45)), (1e300, (25, 45)), (1e308, (25, 45))],
)
def test_extreme_concentrations_reach_their_limits(alpha, largest):
    sizes = [len(part) for part in dirichlet_partition([0] * 100, 4, alpha, seed=0, min_size=0)]
    assert sum(sizes) == 100
    assert largest[0] <= max(sizes) <= largest[1]


@pytest.mark.parametrize("labels", [[[0, 1]], [0.5, 1.0], [-1, 0], ["a"]])
def test_labels_that_are_no_class_indices_are_refused(labels):
    with pytest.raises(DataError, match="whole numbers from 0"):
        dirichlet_partition(labels, 1, 0.5, seed=0, min_size=0)


def test_class_counts_count_and_refuse_a_label_out_of_range():
    counts = class_counts([0, 2, 2, 1], [[0, 1], [2, 3], []], num_classes=4)
    assert counts.tolist() == [[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert counts.dtype == np.int64
    with pytest.raises(DataError, match="label 2 does not fit 2 classes"):
        class_counts([0, 2], [[0]], num_classes=2)


# --- local tests -----------------------------------------------------------------------------------------------------


def histogram(labels, tests, classes):
    return np.stack([np.bincount(labels[test], minlength=classes) for test in tests])


@pytest.mark.parametrize("budget", [None, 10_000, 500])
@pytest.mark.parametrize(("classes", "factor", "clients"), [(10, 100, 40), (100, 50, 20)])
def test_global_rule_draws_the_floor_of_the_share_of_the_budget(classes, factor, clients, budget):
    labels = long_tail(classes, factor)
    counts = class_counts(labels, dirichlet_partition(labels, clients, 0.5, seed=3407), classes)
    test_labels = np.tile(np.arange(classes), 10_000 // classes)
    tests = local_tests(test_labels, counts, "proportional_global", seed=0, budget=budget)
    wanted = np.minimum(counts * (budget or 10_000) // counts.sum(), 10_000 // classes)
    assert np.array_equal(histogram(test_labels, tests, classes), wanted)
    assert (wanted[counts == 0] == 0).all()
    assert all((np.diff(test) > 0).all() for test in tests)  # sorted, and no image twice within a client
    if budget != 500:
        trained_but_untested = ((counts > 0) & (wanted == 0)).mean()
        assert 0.08 <= trained_but_untested <= 0.16  # the authors' logs: 8 to 15 % over their settings


@settings(max_examples=60, deadline=None)
@given(
    table=st.lists(st.lists(st.integers(0, 50), min_size=3, max_size=3), min_size=1, max_size=5),
    rule=st.sampled_from(["proportional_global", "proportional_client"]),
    seed=st.integers(0, 10**6),
)
def test_local_tests_never_repeat_an_image_nor_hold_an_absent_class(table, rule, seed):
    counts = np.array(table)
    if not counts.any():
        counts[0, 0] = 1
    test_labels = np.array([0, 1, 2, 2, 1, 0, 0, 1, 2, 2] * 3)
    tests = local_tests(test_labels, counts, rule, seed, size_per_client=20)
    found = histogram(test_labels, tests, 3)
    assert all(len(set(test.tolist())) == len(test) for test in tests)
    assert (found[counts == 0] == 0).all()
    assert (found <= np.bincount(test_labels)).all()


def test_client_rule_has_the_clients_mix_whatever_its_size():
    counts = np.array([[90, 10, 0], [9000, 1000, 0], [1, 1, 1], [0, 0, 0]])
    test_labels = np.repeat(np.arange(3), 1000)
    found = histogram(test_labels, local_tests(test_labels, counts, "proportional_client", 0, size_per_client=200), 3)
    assert found.tolist() == [[180, 20, 0], [180, 20, 0], [67, 67, 67], [0, 0, 0]]


def test_local_tests_are_cut_to_the_images_that_exist():
    (test,) = local_tests(np.array([0, 0, 1]), np.array([[10, 0]]), "proportional_client", seed=0, size_per_client=200)
    assert test.tolist() == [0, 1]


def test_local_tests_depend_on_the_seed_alone():
    test_labels, counts = np.repeat(np.arange(3), 100), np.array([[5, 3, 2], [1, 1, 8]])
    torch.manual_seed(0)
    first = partition_digest(local_tests(test_labels, counts, "proportional_client", 1, 50))
    torch.manual_seed(5)
    assert first == partition_digest(local_tests(test_labels, counts, "proportional_client", 1, 50))
    assert first != partition_digest(local_tests(test_labels, counts, "proportional_client", 2, 50))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rule": "proportional"}, ConfigError, "choose from proportional_global, proportional_client"),
        ({"seed": -1}, ConfigError, "seed -1"),
        ({"size_per_client": 0}, ConfigError, "at least 1 image"),
        ({"budget": 0}, ConfigError, "at least 1 image"),
        ({"counts": [[0, 0]]}, DataError, "at least one image"),
        ({"counts": [[3, -1]]}, DataError, "at least one image"),
        ({"counts": [3, 1]}, DataError, "at least one image"),
    ],
)
def test_wrong_requests_for_local_tests_are_refused(change, error, message):
    request = {"test_labels": [0, 1], "counts": [[1, 1]], "rule": "proportional_global", "seed": 0}
    with pytest.raises(error, match=message):
        local_tests(**(request | change))
