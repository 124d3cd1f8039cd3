"""The consistency loss with its mask and schedule, and the precision of both losses."""

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
    kl_divergence,
    mdcs_loss,
    ramp,
    spaced_lambdas,
)
from shared.errors import UserError
from tests.mdcs.expert_cases import COUNTS, LAMBDAS, case, doubles, gaussian, gradient, slow_parts, softmax
from tests.mdcs.watch import Watch

# --- the consistency loss --------------------------------------------------------------------------------------------


def views(images=4, experts=2, classes=3, seed=0):
    """Adjusted logits of both views [B, E, C], targets by which images 0 and 1 are confident in every expert."""
    weak, strong = gaussian(images, experts, classes, seed=seed), gaussian(images, experts, classes, seed=seed + 1)
    targets = torch.tensor([1] * images)
    weak[:2, :, 1] = 5.0
    weak[2:, :, 1] = -9.0
    return weak, strong, targets


def test_an_expert_without_confident_images_adds_exactly_nothing_and_no_gradient():
    weak, strong, targets = views()
    weak[:, 0, 1] = -9.0  # expert 0 is always wrong
    weak.requires_grad_()
    strong.requires_grad_()
    alone = consistency_loss(weak[:, :1], strong[:, :1], targets, 1.0)
    assert alone.item() == 0
    assert torch.equal(gradient(alone, strong)[0], torch.zeros_like(strong))
    both = consistency_loss(weak, strong, targets, 1.0)
    assert torch.equal(both, consistency_loss(weak[:, 1:], strong[:, 1:], targets, 1.0))
    (slope,) = gradient(both, strong)
    assert torch.equal(slope[:, 0], torch.zeros_like(slope[:, 0]))
    assert slope[:2, 1].abs().min() > 0


def test_one_confident_image_is_divided_by_one_and_not_by_the_batch():
    weak, strong, targets = views(experts=1)
    weak[1, 0, 1] = -9.0  # image 0 alone is left
    p, q = softmax(weak[0, 0].tolist()), softmax(strong[0, 0].tolist())
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert consistency_loss(weak, strong, targets, 1.0).item() == pytest.approx(expected, abs=1e-9)


def test_the_mask_is_of_each_expert_and_of_the_weak_view_alone():
    weak, strong, targets = views()
    assert confident_mask(weak, targets).tolist() == [[True, True], [True, True], [False, False], [False, False]]
    weak[0, 1, 1] = -9.0
    mask = confident_mask(weak, targets)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[True, False], [True, True], [False, False], [False, False]]
    for column in range(3):  # whatever the strong view predicts, images 0 and 1 teach expert 0, and image 1 expert 1
        flipped = strong.clone()
        flipped[:, :, column] = 20.0
        given = consistency_loss(weak, flipped, targets, 1.0, mask)
        assert torch.equal(consistency_loss(weak, flipped, targets, 1.0), given)
        assert given.item() > 0


def test_the_mask_is_of_adjusted_logits_unless_raw_ones_are_asked_for():
    """Raw logits favour class 0; with lambda 1 and counts of 1 and 100, the adjusted ones favour class 1."""
    logits = doubles([[1.0, 0.0]], [[0.0, 1.5]])
    for target, adjusted_teaches in ((0, False), (1, True)):
        losses = {
            name: mdcs_loss(logits, torch.tensor([target]), (1, 100), (1.0,), 1.0, 1.0, 1.0, name)
            - mdcs_loss(logits, torch.tensor([target]), (1, 100), (1.0,), 0.0, 1.0, 1.0, name)
            for name in ("adjusted", "raw", "all")
        }
        assert (losses["adjusted"].item() != 0) == adjusted_teaches
        assert (losses["raw"].item() != 0) != adjusted_teaches
        assert losses["all"].item() != 0


def test_a_given_mask_replaces_the_confident_images():
    weak, strong, targets = views()
    own = consistency_loss(weak, strong, targets, 2.0)
    assert torch.equal(consistency_loss(weak, strong, targets, 2.0, confident_mask(weak, targets)), own)
    everything = torch.ones(4, 2, dtype=torch.bool)
    teacher, student = (torch.log_softmax(a / 2, dim=-1) for a in (weak, strong))
    expected = 4 * kl_divergence(teacher, student).mean(dim=0).sum()
    torch.testing.assert_close(consistency_loss(weak, strong, targets, 2.0, everything), expected, atol=1e-9, rtol=0)
    assert consistency_loss(weak, strong, targets, 2.0, ~everything).item() == 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_the_gradient_of_the_consistency_reaches_the_strong_views_only_and_is_student_minus_teacher(temperature):
    logits, targets, counts = case(seed=4)
    logits.requires_grad_()
    with_it, without = (mdcs_loss(logits, targets, counts, LAMBDAS, a, 0.25, temperature) for a in (0.6, 0.0))
    slope = gradient(with_it - without, logits)[0]
    torch.testing.assert_close(slope[:5], torch.zeros_like(slope[:5]), atol=1e-15, rtol=0)
    _, masks, _ = slow_parts(logits.detach(), targets, counts, LAMBDAS, temperature)
    assert any(0 < sum(mask) < 5 for mask in masks)
    adjusted = logits.detach() + doubles(*LAMBDAS)[:, None] * torch.tensor(counts).double().log()
    for e in range(3):
        for i in range(5):
            p_t, p_s = (softmax((adjusted[row, e] / temperature).tolist()) for row in (i, 5 + i))
            factor = 0.6 * 0.25 * temperature * masks[e][i] / max(1, sum(masks[e]))
            expected = [factor * (s - t) for s, t in zip(p_s, p_t, strict=True)]
            assert slope[5 + i, e].tolist() == pytest.approx(expected, abs=1e-9)


def test_the_teacher_gets_no_gradient_at_all():
    weak, strong, targets = views()
    weak.requires_grad_()
    strong.requires_grad_()
    towards_weak, towards_strong = gradient(consistency_loss(weak, strong, targets, 2.0), weak, strong)
    assert towards_weak is None
    assert towards_strong.abs().max() > 1e-3


def test_equal_views_have_no_consistency_loss_and_no_gradient():
    weak, _, targets = views()
    strong = weak.clone().requires_grad_()
    loss = consistency_loss(weak, strong, targets, 2.0)
    assert loss.item() == 0
    torch.testing.assert_close(gradient(loss, strong)[0], torch.zeros_like(weak), atol=1e-15, rtol=0)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.01, 30))
def test_the_divergence_is_never_negative(seed, spread):
    p, q = (torch.log_softmax(gaussian(3, 5, seed=seed + k, spread=spread), dim=-1) for k in (0, 1))
    assert (kl_divergence(p, q) >= -1e-12).all()


def test_teacher_and_student_are_not_interchangeable():
    weak, strong = doubles([[3.0, 0.0, 0.0]]), doubles([[1.0, 0.8, -4.0]])
    target = torch.tensor([0])  # both views are right, so the mask is the same either way
    forward, backward = (consistency_loss(a, b, target, 1.0).item() for a, b in ((weak, strong), (strong, weak)))
    p, q = softmax(weak[0, 0].tolist()), softmax(strong[0, 0].tolist())
    assert forward == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), abs=1e-9)
    assert abs(forward - backward) > 0.1


# --- the schedule and the exponents ----------------------------------------------------------------------------------


def test_the_ramp_rises_to_one():
    assert [ramp(epoch, 20) for epoch in (1, 10, 20, 400)] == [0.05, 0.5, 1.0, 1.0]
    assert ramp(1, 0) == 1


def test_the_exponents_are_the_papers_for_three_and_have_a_mean_of_one():
    assert spaced_lambdas(3) == LAMBDAS
    assert spaced_lambdas(1) == (1.0,)
    assert spaced_lambdas(2) == (-0.5, 2.5)
    for experts in range(2, 9):
        lambdas = spaced_lambdas(experts)
        assert lambdas == pytest.approx(torch.linspace(-0.5, 2.5, experts, dtype=torch.float64).tolist(), abs=1e-12)
        assert sum(lambdas) / experts == pytest.approx(1, abs=1e-12)


# --- precision and devices -------------------------------------------------------------------------------------------


def test_adjusted_logits_are_of_single_precision_or_double_where_they_came_so():
    log_counts, lambdas = torch.tensor(COUNTS).log(), torch.tensor(LAMBDAS)
    for given_dtype, dtype in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        logits = gaussian(4, 3, 3).to(given_dtype)
        found = adjusted_logits(logits, log_counts.double(), lambdas)
        assert found.dtype == dtype
        expected = logits.double() + doubles(*LAMBDAS)[:, None] * log_counts.double()
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_parts_take_logits_of_low_precision_to_single_before_any_softmax(dtype):
    weak, strong, targets = views()
    low = weak.to(dtype), strong.to(dtype)
    with Watch() as watch:
        consistency = consistency_loss(*low, targets, 2.0)
        entropy = expert_cross_entropy(low[0], targets)
    assert watch.softmaxes == [torch.float32] * 3
    assert torch.equal(consistency, consistency_loss(low[0].float(), low[1].float(), targets, 2.0))
    assert torch.equal(entropy, expert_cross_entropy(low[0].float(), targets))


@pytest.mark.parametrize("confident", ["adjusted", "raw", "all"])
def test_under_autocast_every_softmax_is_of_single_precision(confident):
    _, targets, counts = case(images=16)
    features, weight = gaussian(32, 8, seed=2).float(), gaussian(12, 8, seed=3, spread=0.3).float()
    arguments = (targets, counts, LAMBDAS, 0.6, 1.0, 2.0, confident)

    def logits():
        return torch.nn.functional.linear(features, weight).view(32, 3, 4)

    exact = mdcs_loss(logits(), *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        low = logits()
        assert low.dtype == torch.bfloat16
        watch = Watch()
        watch.waits = frozenset()  # the counts are on the CPU, where they are looked at
        with watch:
            found = mdcs_loss(low, *arguments)
    assert watch.softmaxes == [torch.float32] * 3  # the cross-entropy, the teacher, the student
    assert found.dtype == torch.float32
    assert torch.equal(found, mdcs_loss(low.float(), *arguments))
    assert found.item() == pytest.approx(exact.item(), abs=2e-2)


@pytest.mark.parametrize("confident", ["adjusted", "raw", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_never_waits_for_the_device(confident, dtype):
    """A tensor on the meta device has no values: whoever looks at one fails."""
    logits = torch.empty(8, 3, 5, device="meta", dtype=dtype, requires_grad=True)
    targets = torch.empty(4, device="meta", dtype=torch.int64)
    counts = torch.empty(5, device="meta", dtype=torch.int64)
    lambdas = torch.empty(3, device="meta")
    with Watch():
        loss = mdcs_loss(logits, targets, counts, lambdas, 0.6, 0.5, 2.0, confident)
        loss.backward()
    assert loss.device.type == "meta"
    assert logits.grad.shape == logits.shape


def test_the_parts_never_look_at_a_value():
    logits, targets, counts = case()
    logits.requires_grad_()
    log_counts, lambdas = torch.tensor(counts).log(), torch.tensor(LAMBDAS)
    with Watch():
        adjusted = adjusted_logits(logits, log_counts, lambdas)
        diversity = diversity_loss(logits, targets.repeat(2), log_counts, lambdas)
        (diversity + consistency_loss(adjusted[:5], adjusted[5:], targets, 1.0)).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("size", [30.0, 1e4, 1e30])
@pytest.mark.parametrize("confident", ["adjusted", "raw", "all"])
def test_extreme_logits_give_finite_losses_and_gradients(size, confident):
    logits, targets, counts = case(images=8)
    logits = (size * logits.float().sign()).requires_grad_()
    loss = mdcs_loss(logits, targets, counts, LAMBDAS, 0.6, 1.0, 1.0, confident)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w, y: consistency_loss(w, w[1:], y, 1.0), "views of different sizes"),
        (lambda w, y: consistency_loss(w, w, y[1:], 1.0), "one target a row"),
        (lambda w, y: consistency_loss(w, w, y, 1.0, torch.ones(4, dtype=torch.bool)), r"mask .* expected \(4, 2\)"),
        (lambda w, y: diversity_loss(w, y[1:], torch.ones(3), torch.ones(2)), "one target a row"),
        (lambda w, y: expert_cross_entropy(w, y, torch.ones(2)), "weights of shape"),
        (lambda w, y: confident_mask(w, y[:, None]), "one target a row"),
        (lambda w, y: ramp(0, 20), "epochs count from 1"),
        (lambda w, y: ramp(1, -1), "a ramp has 0 or more"),
        (lambda w, y: spaced_lambdas(0), "at least 1"),
    ],
)
def test_what_does_not_fit_a_part_is_refused_in_one_line(call, words):
    weak, _, targets = views()
    with pytest.raises(UserError, match=words) as caught:
        call(weak, targets)
    assert "\n" not in str(caught.value)
