"""Measures of the analysis, against slow computations and by hand."""

import math

import pytest
import torch

from mdcs.measures import (
    bias_variance,
    calibration_error,
    class_std,
    disagreement,
    mean_over_pairs,
    pairwise_kl,
    reliability,
)


def drawn(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- calibration ------------------------------------------------------------------------------------------------------


def slow_calibration_error(confidence, right, bins):
    """The definition of Guo et al. 2017, bin by bin."""
    total = 0.0
    for m in range(bins):
        inside = [i for i, c in enumerate(confidence) if m / bins < c <= (m + 1) / bins]
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            sure = sum(confidence[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(accuracy - sure)
    return total


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_is_that_of_the_definition(bins):
    confidence, right = drawn(300).clamp(min=0.01), drawn(300, seed=1) < 0.6
    wanted = slow_calibration_error(confidence.tolist(), right.tolist(), bins)
    assert calibration_error(confidence, right, bins) == pytest.approx(wanted, abs=1e-12)


def test_calibration_error_by_hand():
    """Bins (0, 1/2] and (1/2, 1]: 2/4 * |1/2 - 0.3| + 2/4 * |1 - 0.8|."""
    confidence, right = torch.tensor([0.2, 0.4, 0.7, 0.9]).double(), torch.tensor([True, False, True, True])
    assert calibration_error(confidence, right, 2) == pytest.approx(0.2)
    table = reliability(confidence, right, 2)
    assert [n for n, _, _ in table] == [2, 2]
    assert table[0][1:] == pytest.approx((0.3, 0.5))
    assert table[1][1:] == pytest.approx((0.8, 1.0))


def test_there_are_fifteen_bins_unless_said_otherwise():
    assert len(reliability(drawn(9), drawn(9) < 0.5)) == 15


def test_a_confidence_of_exactly_one_is_in_the_last_bin():
    table = reliability(torch.ones(3), torch.tensor([True, True, False]))
    assert table[-1] == (3, 1.0, pytest.approx(2 / 3))
    assert table[:-1] == [(0, 0.0, 0.0)] * 14
    assert calibration_error(torch.ones(3), torch.tensor([True, True, False])) == pytest.approx(1 / 3)


def test_a_confidence_that_rounding_lifted_above_one_is_in_the_last_bin_too():
    above = torch.tensor([1.0]).nextafter(torch.tensor([2.0]))
    assert [n for n, _, _ in reliability(above, torch.tensor([True]))] == [0] * 14 + [1]


def test_a_confidence_on_a_border_is_in_the_lower_bin_and_zero_in_the_first():
    table = reliability(torch.tensor([0.0, 0.25, 0.5, 0.5000001, 0.75]), torch.ones(5, dtype=torch.bool), 4)
    assert [n for n, _, _ in table] == [2, 1, 2, 0]


def test_calibration_error_is_zero_where_confidence_is_accuracy_and_large_where_it_is_the_opposite():
    right = torch.tensor([True, False] * 50)
    assert calibration_error(torch.full((100,), 0.5), right) == pytest.approx(0)
    assert calibration_error(torch.ones(100), torch.zeros(100, dtype=torch.bool)) == 1


def test_single_precision_confidence_of_many_images_is_summed_in_double():
    confidence = torch.full((3_000_000,), 0.1, dtype=torch.float32)
    ((_, sure, _),) = [row for row in reliability(confidence, torch.ones(3_000_000, dtype=torch.bool)) if row[0]]
    assert sure == pytest.approx(float(torch.tensor(0.1)), abs=1e-9)


# --- how far experts differ -------------------------------------------------------------------------------------------


def test_class_std_is_the_mean_population_deviation_over_experts():
    per_class = torch.tensor([[1.0, 0.5, 0.2], [0.0, 0.5, 0.8]], dtype=torch.float64)
    assert class_std(per_class) == pytest.approx((0.5 + 0 + 0.3) / 3)


def test_class_std_leaves_out_classes_without_a_test_image():
    per_class = torch.tensor([[1.0, math.nan], [0.0, math.nan]], dtype=torch.float64)
    assert class_std(per_class) == pytest.approx(0.5)


def test_class_std_of_equal_experts_is_zero():
    assert class_std(drawn(1, 7).repeat(4, 1)) == pytest.approx(0)


def test_pairwise_kl_is_the_sum_over_images_of_the_definition():
    logits = 6 * drawn(5, 3, 4) - 3
    p = logits.softmax(dim=-1)
    table = pairwise_kl(logits)
    for i in range(3):
        for j in range(3):
            wanted = sum(
                p[n, i, c] * (p[n, i, c] / p[n, j, c]).log() for n in range(len(logits)) for c in range(logits.shape[2])
            )
            assert float(table[i, j]) == pytest.approx(float(wanted), abs=1e-4)


def test_pairwise_kl_has_the_row_as_the_first_argument():
    """p = (3/4, 1/4), q = (1/2, 1/2): KL(p || q) = log 2 - H(p) = 0.1308, KL(q || p) = 0.1438."""
    logits = torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]])
    assert float(pairwise_kl(logits)[0, 1]) == pytest.approx(0.130812, abs=1e-5)
    assert float(pairwise_kl(logits)[1, 0]) == pytest.approx(0.143841, abs=1e-5)


def test_pairwise_kl_is_never_negative_and_zero_for_equal_experts():
    table = pairwise_kl(30 * drawn(200, 4, 6))
    assert (table > -1e-3).all()
    assert table.diagonal().abs().max() < 1e-3
    assert pairwise_kl(drawn(200, 1, 6).repeat(1, 3, 1)).abs().max() < 1e-3


def test_pairwise_kl_does_not_see_a_shift_of_all_logits():
    logits = 4 * drawn(8, 2, 5)
    assert torch.allclose(pairwise_kl(logits + 7), pairwise_kl(logits), atol=1e-4)


def test_pairwise_kl_is_finite_for_logits_far_apart():
    assert pairwise_kl(torch.tensor([[[500.0, -500.0], [-500.0, 500.0]]])).isfinite().all()


def test_mean_over_pairs_leaves_the_diagonal_out():
    assert mean_over_pairs(torch.tensor([[9.0, 1.0, 2.0], [3.0, 9.0, 4.0], [5.0, 6.0, 9.0]])) == pytest.approx(3.5)


def test_a_single_expert_has_no_pairs():
    assert mean_over_pairs(torch.tensor([[0.0]])) is None


def test_disagreement_is_the_share_of_images_with_different_predictions():
    predictions = torch.tensor([[0, 0, 1], [1, 1, 1], [2, 0, 2], [2, 2, 0]])
    wanted = torch.tensor([[0, 1, 2], [1, 0, 3], [2, 3, 0]]).double() / 4
    assert torch.equal(disagreement(predictions), wanted)
    assert mean_over_pairs(disagreement(predictions)) == pytest.approx(0.5)


# --- bias and variance ------------------------------------------------------------------------------------------------


def test_bias_and_variance_by_hand():
    """Majority 0, 1, 2, 1; labels 0, 1, 0, 2: bias 2/4. The models differ from it on 1, 0 and 2 of four images."""
    predictions = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 1], [1, 0, 2, 1]])
    found = bias_variance(predictions, torch.tensor([0, 1, 0, 2]))
    assert found.bias == 0.5
    assert found.variances == (0.25, 0.0, 0.5)
    assert found.variance == pytest.approx(0.25)


def test_of_tied_votes_the_lowest_class_is_the_main_prediction():
    predictions = torch.tensor([[3, 2, 4], [1, 2, 0], [3, 0, 2], [1, 0, 3]])  # ties 1-3, 0-2, and four single votes
    assert bias_variance(predictions, torch.tensor([1, 0, 0])).bias == 0
    assert bias_variance(predictions.flip(0), torch.tensor([1, 0, 0])).bias == 0
    assert bias_variance(predictions, torch.tensor([1, 0, 0])).variance == pytest.approx((2 + 2 + 3) / 12)


def test_the_main_prediction_is_the_majority_of_a_slow_count_for_many_models_and_classes():
    predictions = (10 * drawn(20, 400)).long()
    main = [min(range(10), key=lambda c: (-votes.count(c), c)) for votes in predictions.T.tolist()]
    found = bias_variance(predictions, torch.tensor(main))
    assert found.bias == 0
    assert found.variance == pytest.approx(float((predictions != torch.tensor(main)).double().mean()))


def test_identical_models_have_no_variance_and_their_own_error_as_bias():
    one, labels = (5 * drawn(60)).long(), (5 * drawn(60, seed=1)).long()
    found = bias_variance(one.repeat(4, 1), labels)
    assert (found.variance, found.variances) == (0, (0,) * 4)
    assert found.bias == pytest.approx(float((one != labels).double().mean()))


def test_a_single_model_has_no_variance():
    assert bias_variance(torch.tensor([[0, 1]]), torch.tensor([1, 1])).variance == 0
