import gzip
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import DataError
from shared.longtail import (
    class_counts,
    exponential_counts,
    read_list,
    shot_groups,
    shot_groups_by_share,
    step_counts,
    subsample,
)

DATA = Path(os.environ.get("DATA_SOURCE", Path(__file__).resolve().parents[2].parent / "shared" / "data"))
CIFAR10_100 = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
CIFAR10_50 = [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]


def sizes(groups):
    return tuple(len(group) for group in groups)


def test_exponential_counts_are_the_published_lists():
    assert exponential_counts(5000, 10, 100) == CIFAR10_100
    assert exponential_counts(5000, 10, 50) == CIFAR10_50
    assert exponential_counts(500, 100, 100)[34:36] == [102, 98]
    assert exponential_counts(500, 100, 100)[69:71] == [20, 19]


@pytest.mark.parametrize(
    ("n_max", "classes", "factor", "total"),
    [
        (5000, 10, 10, 20_431),
        (5000, 10, 50, 13_996),
        (5000, 10, 100, 12_406),
        (5000, 10, 200, 11_203),
        (500, 100, 10, 19_573),
        (500, 100, 50, 12_608),
        (500, 100, 100, 10_847),
        (500, 100, 200, 9_502),
        (6000, 10, 100, 14_886),
        (6000, 10, 50, 16_796),
        (6000, 10, 10, 24_516),
    ],
)
def test_exponential_totals_are_the_published_ones(n_max, classes, factor, total):
    assert sum(exponential_counts(n_max, classes, factor)) == total


def test_an_exact_power_is_not_floored_below_itself():
    assert exponential_counts(1000, 4, 1000) == [1000, 100, 10, 1]
    assert exponential_counts(3**8, 9, 3**8) == [3**k for k in range(8, -1, -1)]


@given(st.integers(1, 5000), st.integers(2, 12), st.integers(1, 300))
def test_exponential_counts_are_the_floor_in_exact_arithmetic(n_max, classes, factor):
    if factor > n_max:
        with pytest.raises(DataError, match="leave none"):
            exponential_counts(n_max, classes, factor)
        return
    for c, n in enumerate(exponential_counts(n_max, classes, factor)):
        bound = Fraction(n_max ** (classes - 1), factor**c)  # n <= n_max * factor ** (-c / (C - 1)) < n + 1
        assert n ** (classes - 1) <= bound < (n + 1) ** (classes - 1)


def test_step_counts_give_the_second_half_the_smaller_number():
    assert step_counts(5000, 10, 100) == [5000] * 5 + [50] * 5
    assert step_counts(70, 3, 7) == [70, 70, 10]


@pytest.mark.parametrize("profile", [exponential_counts, step_counts])
@pytest.mark.parametrize("factor", [0.5, float("nan"), float("inf"), 501])
def test_an_imbalance_factor_that_makes_no_sense_is_refused(profile, factor):
    with pytest.raises(DataError, match="imbalance factor"):
        profile(500, 10, factor)


def test_class_counts_keep_empty_classes_and_refuse_unknown_ones():
    assert class_counts(torch.tensor([2, 0, 2]), 4) == [1, 0, 2, 0]
    with pytest.raises(DataError, match="label 4"):
        class_counts([4], 4)


def test_subsample_takes_the_counts_class_by_class_without_repeats():
    labels = torch.tensor([2, 0, 1] * 30)
    counts = [20, 7, 1]
    indices = subsample(labels, counts, seed=3)
    assert labels[indices].tolist() == [0] * 20 + [1] * 7 + [2]
    assert len(set(indices.tolist())) == 28
    assert indices.dtype == torch.int64


def test_subsample_depends_on_its_seed_alone():
    labels = torch.arange(10).repeat(50)
    first = subsample(labels, [20] * 10, seed=0)
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(first, subsample(labels, [20] * 10, seed=0))
    assert not torch.equal(first, subsample(labels, [20] * 10, seed=1))


def test_subsample_draws_all_classes_from_one_stream():
    # Two classes of equal size: separate generators with the same seed would shuffle them alike.
    indices = subsample([0] * 50 + [1] * 50, [50, 50], seed=0)
    assert indices[:50].tolist() != (indices[50:] - 50).tolist()


@pytest.mark.parametrize("counts", [[3, 1], [2, 0], [1, 1, 1], [-1, 1]])
def test_subsample_refuses_what_a_class_does_not_have(counts):
    with pytest.raises(DataError, match="images asked for"):
        subsample([0, 0, 1], counts, seed=0)


@pytest.mark.skipif(not (DATA / "cifar-100").is_dir(), reason="CIFAR-100 labels are not here")
def test_seed_zero_gives_the_published_cifar100_subset():
    fine = np.frombuffer((DATA / "cifar-100/labels.bin").read_bytes(), np.uint8)[1::2][:50_000]
    expected = {int(line) for line in (DATA / "cifar-100/exact_train_records.txt").read_text().split()}
    found = subsample(torch.tensor(fine), exponential_counts(500, 100, 10), seed=0).tolist()
    assert len(found) == 19_573
    assert set(found) == expected


def test_shot_groups_put_the_thresholds_into_medium():
    groups = shot_groups([101, 100, 20, 19])
    assert groups.many == (0,)
    assert groups.medium == (1, 2)
    assert groups.few == (3,)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (exponential_counts(500, 100, 100), (35, 35, 30)),
        (exponential_counts(500, 100, 50), (41, 41, 18)),
        (exponential_counts(500, 100, 10), (69, 31, 0)),
        (exponential_counts(500, 100, 200), (30, 31, 39)),
        (exponential_counts(5000, 10, 100), (8, 2, 0)),
    ],
)
def test_shot_groups_have_the_published_sizes(counts, expected):
    assert sizes(shot_groups(counts)) == expected


@pytest.mark.skipif(not (DATA / "lists").is_dir(), reason="the list files are not here")
def test_shot_groups_of_places_lt_have_the_published_sizes():
    _, labels = read_list(DATA / "lists/Places_LT_train.txt.gz", num_classes=365)
    assert len(labels) == 62_500
    assert sizes(shot_groups(class_counts(labels, 365))) == (131, 163, 71)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        (exponential_counts(5000, 10, 50), (4, 3, 3)),
        (exponential_counts(5000, 10, 100), (3, 3, 4)),
        (exponential_counts(500, 100, 50), (34, 34, 32)),
        (exponential_counts(500, 100, 100), (30, 31, 39)),
    ],
)
def test_share_groups_have_the_known_sizes(counts, expected):
    assert sizes(shot_groups_by_share(counts)) == expected


@pytest.mark.parametrize(("counts", "expected"), [([75, 20, 5], (1, 1, 1)), ([19] * 20, (15, 4, 1)), ([7], (1, 0, 0))])
def test_a_share_that_is_just_reached_ends_its_group(counts, expected):
    assert sizes(shot_groups_by_share(counts)) == expected


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60))
def test_groups_are_disjoint_and_complete(counts):
    for groups in (shot_groups(counts), shot_groups_by_share(counts)):
        assert sorted(c for group in groups for c in group) == list(range(len(counts)))
    many, medium, few = shot_groups_by_share(counts)
    assert min(counts[c] for c in many) >= max((counts[c] for c in medium + few), default=0)


def test_share_groups_do_not_need_sorted_classes():
    assert shot_groups_by_share([5, 75, 20]) == ((1,), (2,), (0,))


def test_read_list_splits_at_the_last_space_and_skips_blank_lines(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("a/b.jpg 3\n\n  \nwith two spaces/c d.jpg 0\r\ne.jpg   1")
    assert read_list(path) == (["a/b.jpg", "with two spaces/c d.jpg", "e.jpg"], [3, 0, 1])


def test_read_list_reads_gzip(tmp_path):
    path = tmp_path / "train.txt.gz"
    path.write_bytes(gzip.compress(b"a.jpg 1\n"))
    assert read_list(path) == (["a.jpg"], [1])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("c.jpg", "expected 'path label'"),
        ("c.jpg one", "expected 'path label'"),
        ("c.jpg -1", "expected 'path label'"),
        ("c.jpg 1.0", "expected 'path label'"),
        ("c.jpg ²", "expected 'path label'"),
        ("7", "expected 'path label'"),
        ("c.jpg 10", "label 10 is outside 0..9"),
        ("/etc/passwd 1", "leaves the image folder"),
        ("a/../../b.jpg 1", "leaves the image folder"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, problem):
    path = tmp_path / "train.txt"
    path.write_text(f"a.jpg 0\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_list(path, num_classes=10)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe 1\n"])
def test_a_list_without_usable_lines_is_refused(tmp_path, content):
    path = tmp_path / "train.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.txt"):
        read_list(path)


def test_a_missing_or_damaged_list_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such list file"):
        read_list(tmp_path / "none.txt")
    whole = gzip.compress(os.urandom(500) + b" 1\n")
    for i, damaged in enumerate((whole[:-20], b"no gzip", whole[:30] + b"\xff" * 30 + whole[60:])):
        path = tmp_path / f"{i}.txt.gz"
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="not a readable list file"):
            read_list(path)
