import math

import pytest
import torch

from shared.longtail import ShotGroups
from shared.metrics import (
    accuracy,
    group_accuracy,
    mean_and_std,
    paired_difference,
    per_class_accuracy,
    t_quantile,
)


def test_accuracy_is_the_share_of_equal_labels():
    assert accuracy(torch.tensor([1, 2, 3, 0]), torch.tensor([1, 2, 0, 0])) == 0.75
    assert math.isnan(accuracy(torch.tensor([]), torch.tensor([])))


def test_per_class_accuracy_is_nan_only_where_there_is_no_test_image():
    found = per_class_accuracy(torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 1]), 4)
    assert found[:2].tolist() == [0.5, 0.5]
    assert found[2:].isnan().all()  # class 2 was predicted but never asked for


def test_on_a_balanced_test_set_the_groups_weighted_by_size_give_the_accuracy():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(10).repeat(30)
    predictions = torch.where(torch.rand(300, generator=generator) < 0.6, labels, (labels + 1) % 10)
    groups = ShotGroups((0, 1, 2), (3, 4, 5), (6, 7, 8, 9))
    per_class = per_class_accuracy(predictions, labels, 10)
    found = group_accuracy(per_class, groups)
    weighted = sum(found[name] * len(classes) for name, classes in groups._asdict().items()) / 10
    assert weighted == pytest.approx(accuracy(predictions, labels), abs=1e-12)
    assert float(per_class.mean()) == pytest.approx(accuracy(predictions, labels), abs=1e-12)


def test_group_accuracy_leaves_out_classes_without_test_image_and_gives_none_for_empty_groups():
    per_class = torch.tensor([1.0, math.nan, 0.5, math.nan], dtype=torch.float64)
    assert group_accuracy(per_class, ShotGroups((0, 1, 2), (), (3,))) == {"many": 0.75, "medium": None, "few": None}


def test_mean_and_std_use_the_sample_deviation():
    assert mean_and_std([1.0, 2.0, 3.0, 4.0]) == (2.5, pytest.approx(math.sqrt(5 / 3)))
    mean, std = mean_and_std([7.0])
    assert mean == 7
    assert math.isnan(std)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 10, 30, 101])
@pytest.mark.parametrize("probability", [0.5, 0.8, 0.975, 0.995])
def test_t_quantile_cuts_the_density_at_its_probability(freedom, probability):
    # Simpson's rule in x = sqrt(nu) tan(theta), where the density is a bounded power of the cosine.
    theta = math.atan(t_quantile(probability, freedom) / math.sqrt(freedom))
    log_scale = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(math.pi) / 2
    n = 2000
    weights = [1] + [4, 2] * (n // 2 - 1) + [4, 1]
    heights = [math.exp(log_scale) * math.cos(theta * i / n) ** (freedom - 1) for i in range(n + 1)]
    area = theta / n / 3 * math.fsum(w * y for w, y in zip(weights, heights, strict=True))
    assert 0.5 + area == pytest.approx(probability, abs=1e-10)


def test_t_quantile_has_the_tabulated_values():
    assert t_quantile(0.975, 1) == pytest.approx(12.706, abs=5e-4)
    assert t_quantile(0.975, 2) == pytest.approx(4.303, abs=5e-4)
    assert t_quantile(0.975, 9) == pytest.approx(2.262, abs=5e-4)


def test_paired_difference_by_hand():
    found = paired_difference([3.0, 5.0, 7.0], [1.0, 2.0, 3.0])
    half = t_quantile(0.975, 2) / math.sqrt(3)
    assert found == pytest.approx((3.0, 1.0, 3, 3 - half, 3 + half))


def test_the_interval_covers_the_true_difference_in_95_of_100_cases():
    noise = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).tolist()
    covered = sum(d.low <= 0 <= d.high for d in (paired_difference(row, [0.0] * 3) for row in noise))
    assert 0.935 < covered / 4000 < 0.965


def test_fewer_than_two_pairs_give_an_infinite_interval():
    one = paired_difference([2.0], [1.0])
    assert (one.mean, one.n, one.low, one.high) == (1.0, 1, -math.inf, math.inf)
    none = paired_difference([], [])
    assert (none.n, none.low, none.high) == (0, -math.inf, math.inf)


def test_unpaired_values_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1.0, 2.0], [1.0])
