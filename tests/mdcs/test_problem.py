"""The problem that a configuration states: long tails of every imbalance, groups and thirds, digests, refusals."""

from functools import cache

import numpy as np
import pytest
import torch

from mdcs.config import Config
from mdcs.problem import load_problem, thirds
from mdcs.views import ResidentViews
from shared import data
from shared.config import parse
from shared.data import ImageSet
from shared.errors import ConfigError, DataError

CPU = torch.device("cpu")
SAMPLE = """
paper: mdcs
data: {name: sample, imbalance_factor: 20, n_max: 200, image_size: 14, mean: [0.286], std: [0.353], augment: grey}
model: {name: resnet_cifar, depth: 8, width: 4}
optimizer: {lr: 0.05}
schedule: cosine
epochs: 1
batch_size: 16
device: cpu
threads: 1
"""
LARGE = {"cifar10": (10, 5000), "cifar100": (100, 500), "fashion_mnist": (10, 6000)}  # classes, images of each
COLOUR = "data={name: %s, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2], augment: cifar, imbalance_factor: %s}"
GREY = "data={name: %s, mean: [0.5], std: [0.2], augment: grey, imbalance_factor: %s}"

TEN = tuple(range(10))
KNOWN = [  # data set, imbalance factor, images, first and last counts, many / medium / few
    ("cifar10", 1, 50_000, (5000,) * 10, (), (10, 0, 0)),
    ("cifar10", 10, 20_431, (5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500), (), (10, 0, 0)),
    ("cifar10", 50, 13_996, (5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100), (), (9, 1, 0)),
    ("cifar10", 100, 12_406, (5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50), (), (8, 2, 0)),
    ("cifar10", 200, 11_203, (5000, 2775, 1540, 854, 474, 263, 146, 81, 45, 25), (), (7, 3, 0)),
    ("cifar100", 10, 19_573, (500, 488, 477, 466, 455, 445, 434), (54, 53, 52, 51, 50), (69, 31, 0)),
    ("cifar100", 50, 12_608, (500, 480, 462, 444, 426, 410, 394), (12, 11, 11, 10, 10, 10), (41, 41, 18)),
    ("cifar100", 100, 10_847, (500, 477, 455, 434, 415, 396, 378), (7, 7, 6, 6, 6, 6, 5, 5, 5, 5), (35, 35, 30)),
    ("cifar100", 200, 9_502, (500, 473, 449, 425, 403, 382), (3, 3, 3, 3, 2, 2, 2, 2), (30, 31, 39)),
    ("fashion_mnist", 100, 14_886, (6000, 3596, 2156, 1292, 774, 464, 278, 166, 100, 60), (), (8, 2, 0)),
    ("fashion_mnist", 50, 16_796, (6000,), (120,), (10, 0, 0)),
    ("fashion_mnist", 10, 24_516, (6000,), (600,), (10, 0, 0)),
]


def sample(*overrides):
    return parse(SAMPLE, Config, overrides)


def load(*overrides):
    return load_problem(sample(*overrides), CPU)


@cache
def large_set(name, split):
    """The labels of a data set in a mixed order, and images of 2 x 2 pixels that hold their own number."""
    classes, of_each = LARGE[name]
    n = classes * (of_each if split == "train" else 20)
    labels = torch.arange(n) % classes
    labels = labels[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    images = torch.zeros(n, 1 if name == "fashion_mnist" else 3, 2, 2, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1], images[:, 0, 1, 0] = (
        torch.arange(n) // 65536, torch.arange(n) // 256 % 256, torch.arange(n) % 256,
    )  # fmt: skip
    return ImageSet(images, labels, tuple(map(str, range(classes))), name, split, f"{name}-{split}")


def numbers(images):
    """The numbers that images of a large set hold."""
    parts = images[:, 0].long()
    return parts[:, 0, 0] * 65536 + parts[:, 0, 1] * 256 + parts[:, 1, 0]


@pytest.fixture
def large(monkeypatch):
    """Data sets of the full number of images, without their files."""
    monkeypatch.setattr(data, "load", lambda name, split, root=None, download=False: large_set(name, split))

    def problem(name, factor, *overrides):
        section = (GREY if name == "fashion_mnist" else COLOUR) % (name, factor)
        return load(section, *overrides)

    return problem


# --- long tails -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "factor", "total", "first", "last", "sizes"), KNOWN)
def test_counts_totals_and_group_sizes_are_the_papers(large, name, factor, total, first, last, sizes):
    problem = large(name, factor)
    counts = problem.class_counts
    assert counts[: len(first)] == first
    assert counts[len(counts) - len(last) :] == last
    assert sum(counts) == len(problem.train) == total
    assert torch.bincount(problem.train.labels).tolist() == list(counts)
    assert tuple(map(len, problem.groups)) == sizes
    assert sorted(c for group in problem.groups for c in group) == list(range(len(counts)))


def test_counts_are_truncated_and_not_rounded(large):
    counts = large("cifar100", 100).class_counts
    exact = [500 * 0.01 ** (c / 99) for c in range(100)]
    assert sum(map(round, exact)) == 10_899
    assert sum(counts) == 10_847
    assert (counts[34], counts[35], counts[69], counts[70]) == (102, 98, 20, 19)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_subset_is_the_published_draw_of_the_legacy_generator(large, name):
    problem = large(name, 100)
    random, wanted = np.random.RandomState(0), []
    for c, count in enumerate(problem.class_counts):
        indices = np.flatnonzero(large_set(name, "train").labels.numpy() == c)
        random.shuffle(indices)
        wanted += indices[:count].tolist()
    assert numbers(problem.train.images).tolist() == wanted


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_subset_holds_no_image_twice_and_every_image_with_its_own_label(large, name):
    problem = large(name, 50)
    chosen = numbers(problem.train.images)
    assert len(chosen.unique()) == len(chosen)
    assert torch.equal(large_set(name, "train").labels[chosen], problem.train.labels)


def test_the_test_set_is_the_whole_one(large):
    problem = large("cifar10", 100)
    assert torch.equal(problem.test.images, large_set("cifar10", "test").images)
    assert torch.equal(problem.test.labels, large_set("cifar10", "test").labels)


def test_without_a_number_of_images_the_largest_class_is_taken_whole(large):
    assert large("cifar10", 10, "data.n_max=null").class_counts[0] == 5000
    assert large("cifar10", 10, "data.n_max=700").class_counts[0] == 700


@pytest.mark.parametrize("factor", [1, 10, 50, 100, 200])
def test_the_embedded_sample_has_the_asked_long_tail_and_a_balanced_test_set(factor):
    problem = load(f"data.imbalance_factor={factor}", "data.n_max=400")
    counts = problem.class_counts
    assert counts == tuple(int(400 * (1 / factor) ** (c / 9) + 1e-6) for c in range(10))
    assert torch.bincount(problem.train.labels).tolist() == list(counts)
    assert torch.bincount(problem.test.labels).tolist() == [500] * 10


@pytest.mark.parametrize(
    ("name", "augment", "factor", "total", "of_file"),
    [
        ("cifar10", "cifar", 100, 12_406, "cifar-10-batches-bin/data_batch_1.bin"),
        ("cifar100", "cifar", 100, 10_847, "cifar-100-binary/train.bin"),
    ],
)
def test_the_real_images_make_the_published_long_tail(name, augment, factor, total, of_file):
    path = data.data_root() / of_file
    if not path.is_file() or path.stat().st_size < 30_000_000:
        pytest.skip(f"no whole {name} under DATA_ROOT")
    problem = load(COLOUR % (name, factor))
    assert sum(problem.class_counts) == len(problem.train) == total
    assert len(problem.test) == 10_000


# --- groups, thirds ---------------------------------------------------------------------------------------------------


def test_thirds_of_ten_classes_are_three_four_and_three():
    problem = load()
    assert problem.thirds == {"head": (0, 1, 2), "middle": (3, 4, 5, 6), "tail": (7, 8, 9)}


def test_thirds_of_a_hundred_classes_are_almost_equal_and_hold_each_class_once():
    parts = thirds(list(range(100, 0, -1)))
    assert [len(part) for part in parts.values()] == [33, 34, 33]
    assert [c for part in parts.values() for c in part] == list(range(100))


def test_thirds_are_by_count_and_not_by_the_order_of_the_classes():
    assert thirds([5, 90, 7, 80, 6, 70]) == {"head": (1, 3), "middle": (2, 5), "tail": (0, 4)}


def test_of_equal_counts_the_lower_class_is_nearer_to_the_head():
    assert thirds([4] * 10) == {"head": (0, 1, 2), "middle": (3, 4, 5, 6), "tail": (7, 8, 9)}


def test_groups_are_by_the_training_sets_own_counts():
    problem = load("data.n_max=200", "data.imbalance_factor=20")
    for c, count in enumerate(problem.class_counts):
        assert (c in problem.groups.many) == (count > 100)
        assert (c in problem.groups.few) == (count < 20)
    assert load("data.n_max=200", "data.imbalance_factor=1").groups == (TEN, (), ())


# --- seeds and digests ------------------------------------------------------------------------------------------------


def test_a_fixed_subset_seed_gives_every_run_the_same_images():
    problems = [load(f"seed={seed}", "data.subset_seed=3") for seed in (0, 1)]
    assert problems[0].digests == problems[1].digests
    assert torch.equal(problems[0].train.images, problems[1].train.images)


def test_without_a_subset_seed_the_runs_seed_draws_the_subset():
    by_run = [load(f"seed={seed}", "data.subset_seed=null") for seed in (0, 1, 2)]
    fixed = [load(f"data.subset_seed={seed}", "seed=9") for seed in (0, 1, 2)]
    assert [p.digests for p in by_run] == [p.digests for p in fixed]
    assert len({p.digests["train"] for p in by_run}) == 3


def test_another_subset_has_other_images_the_same_counts_and_the_same_test_set():
    first, other = load(), load("data.subset_seed=1")
    assert first.digests["train"] != other.digests["train"]
    assert not torch.equal(first.train.images, other.train.images)
    assert first.digests["test"] == other.digests["test"]
    assert first.class_counts == other.class_counts


def test_digests_differ_with_the_number_of_images():
    assert load().digests["train"] != load("data.n_max=199").digests["train"]


def test_a_problem_depends_on_no_global_generator_and_leaves_them_alone():
    first = load().digests
    torch.manual_seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    assert load().digests == first
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


# --- images -----------------------------------------------------------------------------------------------------------


def test_images_are_averaged_down_to_the_asked_size():
    small, full = load(), load("data.image_size=null")
    assert full.train.images.shape[1:] == (1, 28, 28)
    for part in ("train", "test"):
        large = getattr(full, part).images.double()
        blocks = large.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(-1, -2))
        assert (getattr(small, part).images.double() - blocks).abs().max() <= 0.5
        assert torch.equal(getattr(small, part).labels, getattr(full, part).labels)


def test_test_images_are_normalised_and_not_augmented():
    problem = load()
    images, labels = next(problem.test.evaluate(50))
    assert torch.allclose(images, (problem.test.images[:50].float() / 255 - 0.286) / 0.353, atol=1e-5)
    assert torch.equal(labels, problem.test.labels[:50])


def test_training_images_come_in_the_views_of_the_configuration():
    problem = load("data.augment=none")
    assert isinstance(problem.train, ResidentViews)
    ((images, _),) = problem.train.epoch([torch.arange(4)], "both", 0, ("views", 0))
    assert torch.equal(images[:4], images[4:])
    ((images, _),) = load().train.epoch([torch.arange(4)], "both", 0, ("views", 0))
    assert not torch.equal(images[:4], images[4:])


def test_facts_for_the_log_are_those_of_the_problem():
    problem = load()
    found = problem.facts()
    assert found["class_counts"] == list(problem.class_counts)
    assert found["images"] == len(problem.train) == sum(found["class_counts"])
    assert found["test_images"] == 5000
    assert found["groups"]["many"] == list(problem.groups.many)
    assert found["thirds"]["tail"] == [7, 8, 9]
    assert found["class_order"] is None
    assert set(found["digests"]) == {"train", "test"}


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["data.mean=[0.1, 0.2, 0.3]", "data.std=[0.1, 0.2, 0.3]"], ConfigError, "has 3 numbers.* sample has 1 chann"),
        (["data.imbalance_factor=0.5"], ConfigError, "is below 1"),
        (["data.imbalance_factor=500"], DataError, "leave none for the smallest"),
        (["data.image_size=13"], DataError, "divisor"),
        (["data.n_max=4000"], DataError, "4000 images asked for"),
        (["data.name=list", "data.augment=photo"], ConfigError, "train_list, test_list, image_root, num_classes"),
    ],
)
def test_a_problem_that_cannot_be_is_refused_with_what_is_wrong(overrides, error, words):
    with pytest.raises(error, match=words):
        load(*overrides)


def test_a_missing_data_set_is_told_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere"):
        load(COLOUR % ("cifar10", 100))
