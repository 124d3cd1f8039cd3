"""The losses of the compared methods against loops in plain Python: section 5 of the brief, oracles 18 and 19."""

import math

import pytest
import torch
from torch.nn import functional

from mdcs.baselines import (
    balanced_softmax_loss,
    balpoe_loss,
    deferred_weights,
    inverse_prior,
    ldam_loss,
    ldam_margins,
    ncl_hard_mask,
    ncl_loss,
    ride_loss,
    ride_temperatures,
    sade_loss,
)
from mdcs.method import diversity_loss
from shared.errors import DataError
from shared.longtail import exponential_counts
from tests.mdcs.loss_cases import COUNTS, LOG_COUNTS, MARGINS, TEMPERATURES, WEIGHTS, case, gaussian


def log_softmax(row):
    top = max(row)
    norm = top + math.log(sum(math.exp(value - top) for value in row))
    return [value - norm for value in row]


def divergence(p, q):
    """KL of the softmax of row p to that of row q."""
    return sum(math.exp(a) * (a - b) for a, b in zip(log_softmax(p), log_softmax(q), strict=True))


def shifted(logits, targets, shift):
    """Lists [E][V][C] of the logits, `shift(e, value, c, y)` in place of each value."""
    z, labels = logits.tolist(), targets.tolist()
    return [
        [[shift(e, value, c, y) for c, value in enumerate(row[e])] for row, y in zip(z, labels, strict=True)]
        for e in range(logits.shape[1])
    ]


def entropies(experts, targets, weights=None):
    """Sum over experts of the (weighted) mean cross-entropy of lists [E][V][C]."""
    labels, total = targets.tolist(), 0.0
    for rows in experts:
        w = [1.0 if weights is None else weights[y].item() for y in labels]
        losses = [-log_softmax(row)[y] for row, y in zip(rows, labels, strict=True)]
        total += sum(a * b for a, b in zip(w, losses, strict=True)) / sum(w)
    return total


# --- from class counts -----------------------------------------------------------------------------------------------


def test_margins_are_the_fourth_root_and_the_rarest_class_has_the_largest():
    expected = [0.5 * (2 / n) ** 0.25 for n in COUNTS]
    assert MARGINS.tolist() == pytest.approx(expected, abs=1e-12)
    assert ldam_margins(COUNTS, 0.3).max().item() == pytest.approx(0.3)
    assert ldam_margins([16, 1]).tolist() == pytest.approx([0.25, 0.5])


def test_deferred_weights_follow_the_effective_number_and_sum_to_the_classes():
    effective = [(1 - 0.9999) / (1 - 0.9999**n) for n in COUNTS]
    assert WEIGHTS.tolist() == pytest.approx([5 * w / sum(effective) for w in effective], abs=1e-12)
    assert WEIGHTS.sum().item() == pytest.approx(5)
    assert deferred_weights(COUNTS, beta=0.0).tolist() == [1.0] * 5
    assert deferred_weights([10**6, 10]).tolist() == pytest.approx([0.002, 1.998], abs=1e-3)


def test_ride_temperatures_have_a_maximum_of_one_at_the_largest_class():
    raw = [0.05 * 5 * n / sum(COUNTS) + 0.95 for n in COUNTS]
    assert TEMPERATURES.tolist() == pytest.approx([t / max(raw) for t in raw], abs=1e-12)
    assert TEMPERATURES[0] == 1
    assert torch.equal(ride_temperatures(COUNTS, gamma=0.0), torch.ones(5, dtype=torch.float64))
    assert ride_temperatures([7, 7, 7]).tolist() == pytest.approx([1.0] * 3)


def test_the_inverse_prior_hands_the_values_out_in_reverse_rank():
    assert inverse_prior(torch.tensor([0.1, 0.6, 0.3])).tolist() == pytest.approx([0.6, 0.1, 0.3])
    assert inverse_prior(torch.tensor([4, 3, 2, 1])).tolist() == [1, 2, 3, 4]
    # of the two twos the later one is the larger
    assert inverse_prior(torch.tensor([2, 9, 2, 1])).tolist() == [2, 1, 2, 9]
    assert inverse_prior(torch.tensor([5, 5, 1, 2])).tolist() == [2, 1, 5, 5]
    prior = torch.rand(40, generator=torch.Generator().manual_seed(0)).softmax(0)
    assert torch.equal(inverse_prior(inverse_prior(prior)), prior)
    assert torch.equal(inverse_prior(prior).log(), inverse_prior(prior.log()))


@pytest.mark.parametrize("make", [ldam_margins, deferred_weights, ride_temperatures])
def test_vectors_of_counts_are_the_same_from_a_list_and_a_tensor(make):
    assert torch.equal(make(list(COUNTS)), make(torch.tensor(COUNTS)))
    assert make(COUNTS).dtype == torch.float64
    with pytest.raises(DataError, match="class 1 has 0 training images"):
        make([3, 0, 1])


# --- balanced softmax and LDAM ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 3])
def test_balanced_softmax_is_the_loop(experts):
    logits, targets = case(experts=experts)
    rows = shifted(logits, targets, lambda e, value, c, y: value + math.log(COUNTS[c]))
    found = balanced_softmax_loss(logits, targets, LOG_COUNTS)
    assert found.item() == pytest.approx(entropies(rows, targets), abs=1e-9)


def with_margin(scale=30.0):
    return lambda e, value, c, y: value - scale * MARGINS[c].item() * (c == y)


@pytest.mark.parametrize("scale", [30.0, 7.0])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_ldam_is_the_loop(scale, weights):
    logits, targets = case()
    expected = entropies(shifted(logits, targets, with_margin(scale)), targets, weights)
    assert ldam_loss(logits, targets, MARGINS, weights, scale).item() == pytest.approx(expected, abs=1e-9)


def test_ldam_without_margins_is_cross_entropy_and_weighted_as_torch_weights():
    logits, targets = case()
    for weights in (None, WEIGHTS):
        expected = sum(functional.cross_entropy(logits[:, e], targets, weights) for e in range(3))
        found = ldam_loss(logits, targets, torch.zeros(5), weights)
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_equal_weights_change_nothing_and_a_margin_makes_ldam_harder():
    logits, targets = case()
    plain = ldam_loss(logits, targets, MARGINS, None)
    torch.testing.assert_close(ldam_loss(logits, targets, MARGINS, torch.full((5,), 3.0)), plain, atol=1e-9, rtol=0)
    assert plain > ldam_loss(logits, targets, 0.5 * MARGINS, None)


# --- RIDE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperatures", [torch.ones(5, dtype=torch.float64), TEMPERATURES, 2 * TEMPERATURES])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_ride_is_the_loop(temperatures, weights):
    logits, targets = case()
    t = temperatures.tolist()
    reward = 0.0
    for row in logits.tolist():
        mean = [sum(row[e][c] for e in range(3)) / 3 / t[c] for c in range(5)]
        reward += sum(divergence(mean, [row[e][c] / t[c] for c in range(5)]) for e in range(3)) / len(logits)
    individual = entropies(shifted(logits, targets, with_margin()), targets, weights)
    expected = individual - 0.45 * (sum(t) / 5) ** 2 * reward
    assert reward > 0.1
    found = ride_loss(logits, targets, MARGINS, weights, temperatures)
    assert found.item() == pytest.approx(expected, abs=1e-9)


def test_ride_without_diversity_is_the_sum_of_the_experts_ldam_losses_and_not_that_of_their_mean():
    logits, targets = case()
    found = ride_loss(logits, targets, MARGINS, WEIGHTS, TEMPERATURES, diversity_weight=0.0)
    each = [ldam_loss(logits[:, e : e + 1], targets, MARGINS, WEIGHTS) for e in range(3)]
    torch.testing.assert_close(found, torch.stack(each).sum(), atol=1e-9, rtol=0)
    of_mean = ldam_loss(logits.mean(dim=1, keepdim=True), targets, MARGINS, WEIGHTS)
    assert abs(found - 3 * of_mean) > 0.1


def test_rides_reward_rises_with_diversity_and_equal_experts_get_none():
    logits, targets = case()
    equal = logits[:, :1].expand(-1, 3, -1)
    without = ldam_loss(equal, targets, MARGINS, None)
    torch.testing.assert_close(ride_loss(equal, targets, MARGINS, None, TEMPERATURES), without, atol=1e-9, rtol=0)
    assert ride_loss(logits, targets, MARGINS, None, TEMPERATURES) < ldam_loss(logits, targets, MARGINS, None)


def test_the_gradient_of_rides_reward_is_expert_minus_mean():
    """d/dz_e of sum_e KL(p_mean || p_e) is (p_e - p_mean) / t with p_mean stopped, and also without."""
    logits, targets = case()
    logits.requires_grad_()
    with_it, without = (ride_loss(logits, targets, MARGINS, None, TEMPERATURES, weight) for weight in (0.45, 0.0))
    (slope,) = torch.autograd.grad(with_it - without, logits)
    z, t = logits.detach(), TEMPERATURES
    expected = (z / t).softmax(-1) - (z.mean(dim=1, keepdim=True) / t).softmax(-1)
    expected = -0.45 * t.mean() ** 2 * expected / t / len(z)
    torch.testing.assert_close(slope, expected, atol=1e-12, rtol=0)


# --- SADE and BalPoE -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_sade_is_the_loop(tau):
    logits, targets = case()
    counts = (40, 90, 2, 15, 6)  # not sorted
    reverse = (6, 2, 90, 15, 40)
    prior, inverse = ([n / sum(counts) for n in ns] for ns in (counts, reverse))

    def shift(e, value, c, y):
        return value + (0.0, math.log(prior[c]), math.log(prior[c]) - tau * math.log(inverse[c]))[e]

    expected = entropies(shifted(logits, targets, shift), targets)
    log_prior = torch.tensor(prior, dtype=torch.float64).log()
    assert sade_loss(logits, targets, log_prior, tau).item() == pytest.approx(expected, abs=1e-9)
    log_counts = torch.tensor(counts, dtype=torch.float64).log()
    assert sade_loss(logits, targets, log_counts, tau).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_sade_on_an_exact_exponential_profile_is_the_diversity_loss_of_0_1_and_1_plus_tau(tau):
    logits, targets = case(views=20, classes=10)
    log_counts = (5000 * 0.01 ** (torch.arange(10, dtype=torch.float64) / 9)).log()
    lambdas = torch.tensor([0.0, 1.0, 1.0 + tau])
    for log_prior in (log_counts, log_counts - log_counts.logsumexp(0), log_counts.flip(0)):
        expected = diversity_loss(logits, targets, log_prior, lambdas)
        torch.testing.assert_close(sade_loss(logits, targets, log_prior, tau), expected, atol=1e-6, rtol=0)


def test_truncated_counts_move_sades_third_expert_by_the_stated_amount_only():
    log_counts = torch.tensor(exponential_counts(500, 100, 100), dtype=torch.float64).log()
    sade, power = log_counts - 2 * inverse_prior(log_counts), 3 * log_counts
    difference = (sade - sade.mean()) - (power - power.mean())
    assert (power.max() - power.min()).item() == pytest.approx(13.8, abs=0.05)
    assert 0.1 < difference.abs().max() < 0.25  # the brief: 0.21


def test_balpoe_is_the_loop_and_the_diversity_loss_of_its_taus():
    logits, targets = case()
    taus = (0.5, 0.0, 2.5)
    rows = shifted(logits, targets, lambda e, value, c, y: value + taus[e] * math.log(COUNTS[c]))
    expected = entropies(rows, targets)
    assert balpoe_loss(logits, targets, LOG_COUNTS, taus).item() == pytest.approx(expected, abs=1e-9)
    usual = diversity_loss(logits, targets, LOG_COUNTS, torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(balpoe_loss(logits, targets, LOG_COUNTS), usual, atol=1e-9, rtol=0)
    thirds = (1 / 3, 1.0, 5 / 3)
    assert balpoe_loss(logits, targets, LOG_COUNTS, torch.tensor(thirds)).isfinite()  # a mean of 1 but for rounding


# --- NCL -------------------------------------------------------------------------------------------------------------


def slow_hard(row, label, number):
    others = sorted((c for c in range(len(row)) if c != label), key=lambda c: -row[c])
    return {label, *others[: number - 1]}


@pytest.mark.parametrize(
    ("classes", "share", "number"),
    [(10, 0.3, 3), (100, 0.3, 30), (1000, 0.3, 300), (8142, 0.3, 2442), (100, 0.29, 29), (5, 0.1, 1), (5, 1.0, 5)],
)
def test_the_hard_classes_are_the_true_one_and_the_highest_others(classes, share, number):
    logits, targets = gaussian(4, classes, seed=9), torch.tensor([0, 1, 2, 3])
    logits[0, 0], logits[1, 1] = -50, 50  # the true class counts in, whether it is last or first
    mask = ncl_hard_mask(logits, targets, share)
    assert mask.dtype == torch.bool
    for row, found, label in zip(logits.tolist(), mask, targets.tolist(), strict=True):
        assert set(found.nonzero().flatten().tolist()) == slow_hard(row, label, number)


@pytest.mark.parametrize("networks", [1, 2, 3, 4])
def test_ncl_is_the_loop(networks):
    logits, targets = case(experts=networks)
    hard = [slow_hard(row[0], y, 3) for row, y in zip(logits.tolist(), targets.tolist(), strict=True)]
    whole = shifted(logits, targets, lambda e, value, c, y: value + math.log(COUNTS[c]))
    zeroed = [
        [[v if c in h else 0.0 for c, v in enumerate(row)] for row, h in zip(rows, hard, strict=True)] for rows in whole
    ]
    expected = entropies(whole, targets) + entropies(zeroed, targets)
    for rows in (whole, zeroed):
        pairs = [(i, j) for i in range(networks) for j in range(networks) if i != j]
        total = sum(divergence(rows[j][v], rows[i][v]) for i, j in pairs for v in range(len(targets)))
        expected += 0.6 * total / len(targets) / max(1, networks - 1)
    assert ncl_loss(logits, targets, LOG_COUNTS, 0.6).item() == pytest.approx(expected, abs=1e-9)


def test_ncl_of_one_network_or_of_equal_ones_has_no_mutual_term():
    logits, targets = case(experts=1)
    alone = ncl_loss(logits, targets, LOG_COUNTS, weight=0.6)
    assert torch.equal(alone, ncl_loss(logits, targets, LOG_COUNTS, weight=0.0))
    both = ncl_loss(logits.expand(-1, 2, -1), targets, LOG_COUNTS, weight=0.6)
    torch.testing.assert_close(both, 2 * alone, atol=1e-9, rtol=0)


def test_ncl_with_all_classes_hard_is_twice_the_balanced_loss_and_mutual_term():
    logits, targets = case()
    full = ncl_loss(logits, targets, LOG_COUNTS, hard_share=1.0, weight=0.0)
    torch.testing.assert_close(full, 2 * balanced_softmax_loss(logits, targets, LOG_COUNTS), atol=1e-9, rtol=0)


def test_ncls_mutual_term_has_gradient_through_both_sides():
    """Against differences: a stopped side would leave half of it."""
    logits, targets = case(views=2, experts=2)
    assert torch.autograd.gradcheck(
        lambda z: ncl_loss(z, targets, LOG_COUNTS, 0.6, 5.0) - ncl_loss(z, targets, LOG_COUNTS, 0.6, 0.0),
        logits.requires_grad_(),
    )
