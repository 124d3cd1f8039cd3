"""The whole loss of the method and its diversity part: section 6 of the brief, oracles 10 to 19.

The slow reference is plain Python on floats: loops over experts, images and classes, nothing shared with the code.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mdcs.method import (
    adjusted_logits,
    confident_mask,
    consistency_loss,
    diversity_loss,
    expert_cross_entropy,
    mdcs_loss,
    ramp,
)
from shared.errors import ConfigError, DataError
from shared.longtail import exponential_counts
from tests.mdcs.expert_cases import COUNTS, LAMBDAS, case, doubles, gaussian, gradient, slow_parts, softmax


def slow_loss(logits, targets, counts, lambdas, alpha, weight, temperature, confident="adjusted"):
    entropies, _, divergences = slow_parts(logits, targets, counts, lambdas, temperature, confident)
    return sum(entropies) + alpha * weight * sum(divergences)


# --- the whole loss --------------------------------------------------------------------------------------------------


def worked_example():
    """Oracle 13: every expert has the same raw logits."""
    rows = doubles([2, 1, 0], [0, 1, 2], [0.5, 0.2, -0.1], [1, 0, 0])
    return rows[:, None].expand(-1, 3, -1), torch.tensor([0, 2])


@pytest.mark.parametrize(("epoch", "total"), [(1, 8.686548), (20, 8.808745), (400, 8.808745)])
def test_the_worked_example_has_the_printed_totals(epoch, total):
    logits, targets = worked_example()
    loss = mdcs_loss(logits, targets, COUNTS, LAMBDAS, 0.6, ramp(epoch, 20), 1.0)
    assert loss.item() == pytest.approx(total, abs=5e-7)


def test_the_worked_example_has_the_printed_parts():
    logits, targets = worked_example()
    log_counts = doubles(*COUNTS).log()
    adjusted = adjusted_logits(logits, log_counts, doubles(*LAMBDAS))
    assert confident_mask(adjusted[:2], targets).T.tolist() == [[False, True], [True, False], [True, False]]
    for e, (entropy, divergence) in enumerate([(1.005094, 0.201514), (2.165233, 0.012500), (5.509790, 0.000366)]):
        one = slice(e, e + 1)
        found = diversity_loss(logits[:, one], targets.repeat(2), log_counts, doubles(LAMBDAS[e]))
        assert found.item() == pytest.approx(entropy, abs=5e-7)
        found = consistency_loss(adjusted[:2, one], adjusted[2:, one], targets, 1.0)
        assert found.item() == pytest.approx(divergence, abs=5e-7)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    images=st.integers(1, 7),
    classes=st.integers(2, 6),
    lambdas=st.lists(st.floats(-1, 3), min_size=1, max_size=4),
    temperature=st.floats(0.5, 4),
    weight=st.floats(0, 1),
    confident=st.sampled_from(["adjusted", "raw", "all"]),
)
def test_the_loss_is_the_loops_over_experts_images_and_classes(
    seed, images, classes, lambdas, temperature, weight, confident
):
    logits, targets, counts = case(images, len(lambdas), classes, seed)
    found = mdcs_loss(logits, targets, counts, lambdas, 0.6, weight, temperature, confident)
    expected = slow_loss(logits, targets, counts, lambdas, 0.6, weight, temperature, confident)
    assert found.item() == pytest.approx(expected, abs=1e-9, rel=1e-9)


def test_tensors_and_sequences_of_counts_and_lambdas_give_the_same_loss():
    logits, targets, counts = case()
    listed = mdcs_loss(logits, targets, counts, list(LAMBDAS), 0.6, 1.0, 1.0)
    for dtype in (torch.int64, torch.float32, torch.float64):
        tensors = mdcs_loss(logits, targets, torch.tensor(counts, dtype=dtype), torch.tensor(LAMBDAS), 0.6, 1.0, 1.0)
        assert torch.equal(listed, tensors)


@pytest.mark.parametrize("confident", ["adjusted", "raw", "all"])
def test_an_expert_twice_doubles_the_loss(confident):
    logits, targets, counts = case(experts=1)
    once = mdcs_loss(logits, targets, counts, [2.5], 0.6, 1.0, 2.0, confident)
    twice = mdcs_loss(logits.repeat(1, 2, 1), targets, counts, [2.5, 2.5], 0.6, 1.0, 2.0, confident)
    assert twice.item() == pytest.approx(2 * once.item(), abs=1e-12)


def test_the_order_of_the_images_does_not_matter_but_the_pairing_of_the_views_does():
    logits, targets, counts = case()
    arguments = (counts, LAMBDAS, 0.6, 1.0, 1.0)
    order = torch.tensor([3, 1, 4, 0, 2])
    both = torch.cat([order, 5 + order])
    loss = mdcs_loss(logits, targets, *arguments)
    assert mdcs_loss(logits[both], targets[order], *arguments).item() == pytest.approx(loss.item(), abs=1e-12)
    unpaired = torch.cat([logits[:5], logits[5:].flip(0)])
    assert mdcs_loss(unpaired, targets, *arguments).item() != pytest.approx(loss.item(), abs=1e-3)


# --- the diversity loss ----------------------------------------------------------------------------------------------


def test_lambda_zero_and_no_distillation_is_the_sum_of_plain_cross_entropies():
    logits, targets, counts = case()
    expected = sum(torch.nn.functional.cross_entropy(logits[:, e], targets.repeat(2)) for e in range(3))
    found = mdcs_loss(logits, targets, counts, (0.0, 0.0, 0.0), 0.0, 1.0, 1.0)
    assert found.item() == pytest.approx(expected.item(), abs=1e-9)


def test_lambda_one_is_balanced_softmax():
    logits, targets, counts = case(experts=1)
    rows = [[n * math.exp(value) for n, value in zip(counts, row[0], strict=True)] for row in logits.tolist()]
    labels = targets.repeat(2).tolist()
    expected = -sum(math.log(row[y] / sum(row)) for row, y in zip(rows, labels, strict=True)) / len(rows)
    found = diversity_loss(logits, targets.repeat(2), torch.tensor(counts).double().log(), doubles(1))
    assert found.item() == pytest.approx(expected, abs=1e-9)


def test_counts_their_multiples_and_priors_give_equal_losses_and_gradients():
    logits, targets, counts = case()
    logits.requires_grad_()
    n = torch.tensor(counts, dtype=torch.float64)
    losses = [mdcs_loss(logits, targets, scaled, LAMBDAS, 0.6, 1.0, 1.0) for scaled in (n, 7 * n, n / n.sum())]
    gradients = [gradient(loss, logits)[0] for loss in losses]
    for loss, slope in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], atol=1e-9, rtol=0)
        torch.testing.assert_close(slope, gradients[0], atol=1e-9, rtol=0)


def test_the_gradient_of_the_cross_entropy_is_softmax_minus_one_hot_over_the_views():
    logits, targets, counts = case()
    logits.requires_grad_()
    log_counts, lambdas, labels = torch.tensor(counts).double().log(), doubles(*LAMBDAS), targets.repeat(2)
    (slope,) = gradient(diversity_loss(logits, labels, log_counts, lambdas), logits)
    for e, exponent in enumerate(LAMBDAS):
        for i, label in enumerate(labels.tolist()):
            q = softmax((logits[i, e] + exponent * log_counts).tolist())
            expected = [(q[c] - (c == label)) / len(labels) for c in range(len(q))]
            assert slope[i, e].tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("n_max", "classes", "imbalance", "expected"),
    [
        (500, 100, 100, (5.524458, 4.605170, 4.007500, 4.531886)),
        (500, 100, 50, (5.298969, 4.605170, 4.130082, 4.616624)),
        (5000, 10, 100, (3.343514, 2.302585, 1.643728, 2.163382)),
        (5000, 10, 50, (3.098206, 2.302585, 1.770560, 2.264409)),
    ],
)
def test_zero_logits_on_the_long_tailed_labels_have_the_tabled_loss(n_max, classes, imbalance, expected):
    counts = torch.tensor(exponential_counts(n_max, classes, imbalance))
    labels = torch.arange(classes).repeat_interleave(counts)
    zeros = torch.zeros(1, dtype=torch.float64).expand(len(labels), 1, classes)
    for exponent, value in zip((-0.5, 0.0, 1.0, 2.5), expected, strict=True):
        found = diversity_loss(zeros, labels, counts.double().log(), doubles(exponent))
        assert found.item() == pytest.approx(value, abs=5.1e-7)
    prior = (counts / counts.sum()).double()
    assert expected[2] == pytest.approx(-(prior * prior.log()).sum().item(), abs=1e-5)  # the entropy of the prior


def test_class_weights_make_torchs_weighted_mean_of_each_expert():
    logits, targets, _ = case(images=3)
    labels, weights = targets.repeat(2), doubles(0.5, 3.0, 1.0, 0.1)
    expected = 0.0
    for e in range(3):
        losses = [-math.log(softmax(logits[i, e].tolist())[y]) for i, y in enumerate(labels.tolist())]
        w = weights[labels].tolist()
        expected += sum(a * b for a, b in zip(w, losses, strict=True)) / sum(w)
    assert expert_cross_entropy(logits, labels, weights).item() == pytest.approx(expected, abs=1e-9)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": gaussian(9, 3, 4)}, DataError, "9 rows of logits for 5 images: views of different sizes"),
        ({"logits": gaussian(5, 3, 4)}, DataError, "views of different sizes"),
        ({"logits": gaussian(10, 4)}, DataError, r"expected \[views, experts, classes\]"),
        ({"lambdas": (1.0, 2.0)}, ConfigError, "2 lambdas for 3 experts"),
        ({"lambdas": torch.ones(1)}, ConfigError, "1 lambdas for 3 experts"),
        ({"class_counts": (4, 3, 2)}, DataError, "log counts of shape .* for logits of 4 classes"),
        ({"class_counts": (4, 3, 0, 2)}, DataError, "class 2 has 0 training images"),
        ({"class_counts": torch.tensor([4, -3, 1, 2])}, DataError, "class 1 has -3 training images"),
        ({"class_counts": (4.0, math.nan, 1.0, 2.0)}, DataError, "class 1 has nan training images"),
        ({"temperature": 0.0}, ConfigError, "temperature 0.0"),
        ({"temperature": math.nan}, ConfigError, "temperature nan"),
        ({"confident": "some"}, ConfigError, "confident 'some' is unknown; choose from adjusted, raw, all"),
    ],
)
def test_what_does_not_fit_the_loss_is_refused_in_one_line(change, error, words):
    logits, targets, counts = case()
    arguments = {"logits": logits, "targets": targets, "class_counts": counts, "lambdas": LAMBDAS, "alpha": 0.6}
    with pytest.raises(error, match=words) as caught:
        mdcs_loss(**(arguments | {"ramp": 1.0, "temperature": 1.0} | change))
    assert "\n" not in str(caught.value)
