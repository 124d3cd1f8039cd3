"""What holds for the loss of every compared method: gradients, precision, extreme logits, refusals."""

import pytest
import torch
from torch.nn import functional

from mdcs.baselines import (
    balanced_softmax_loss,
    balpoe_loss,
    deferred_weights,
    ldam_loss,
    ncl_hard_mask,
    ncl_loss,
    ride_loss,
    ride_temperatures,
    sade_loss,
)
from mdcs.method import expert_cross_entropy
from shared.errors import ConfigError, DataError, UserError
from tests.mdcs.loss_cases import COUNTS, LOG_COUNTS, MARGINS, TEMPERATURES, WEIGHTS, case, gaussian
from tests.mdcs.watch import Watch

# Every loss with all that it takes beside logits [V, 3, 5] and targets [V].
LOSSES = {
    "balanced softmax": (balanced_softmax_loss, (LOG_COUNTS,)),
    "ldam": (ldam_loss, (MARGINS, None)),
    "ldam-drw": (ldam_loss, (MARGINS, WEIGHTS)),
    "ride": (ride_loss, (MARGINS, WEIGHTS, TEMPERATURES)),
    "sade": (sade_loss, (LOG_COUNTS, 2.0)),
    "balpoe": (balpoe_loss, (LOG_COUNTS, torch.tensor([0.0, 1.0, 2.0]))),
    "ncl": (ncl_loss, (LOG_COUNTS, 0.6)),
}


each_loss = pytest.mark.parametrize("name", LOSSES)


def evaluate(name, logits, targets):
    loss, arguments = LOSSES[name]
    return loss(logits, targets, *arguments)


# --- all of them -----------------------------------------------------------------------------------------------------


@each_loss
def test_the_gradient_of_each_loss_is_that_of_its_differences(name):
    logits, targets = case(views=3, seed=1)
    assert torch.autograd.gradcheck(lambda z: evaluate(name, z, targets), logits.requires_grad_())


@each_loss
def test_each_loss_sums_over_experts_and_averages_over_views(name):
    logits, targets = case()
    loss = evaluate(name, logits, targets)
    assert loss.shape == ()
    twice = evaluate(name, logits.repeat(2, 1, 1), targets.repeat(2))
    torch.testing.assert_close(twice, loss, atol=1e-9, rtol=0)
    if name in ("balanced softmax", "ldam", "ldam-drw", "ride"):
        doubled = evaluate(name, logits.repeat(1, 2, 1), targets)
        torch.testing.assert_close(doubled, 2 * loss, atol=1e-9, rtol=0)


@each_loss
def test_a_constant_added_to_an_experts_logits_changes_no_loss_but_those_of_ncl_and_ride(name):
    """NCL's classes that are not hard have logit 0 whatever the others have; RIDE divides by a temperature a class."""
    logits, targets = case()
    moved = logits + torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)[:, None]
    same = torch.isclose(evaluate(name, moved, targets), evaluate(name, logits, targets), atol=1e-9, rtol=0)
    assert bool(same) == (name not in ("ncl", "ride"))


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_loss_waits_for_the_device_or_takes_a_softmax_of_low_precision(name, dtype):
    """A tensor on the meta device has no values: whoever looks at one fails."""
    loss, arguments = LOSSES[name]
    logits = torch.empty(8, 3, 5, device="meta", dtype=dtype, requires_grad=True)
    targets = torch.empty(8, device="meta", dtype=torch.int64)
    there = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    with Watch() as watch:
        found = loss(logits, targets, *there)
        found.backward()
    assert set(watch.softmaxes) == {torch.float32}
    assert found.dtype == torch.float32
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "balpoe"])  # it checks taus on the CPU
def test_no_loss_looks_at_a_value_on_the_cpu_either(name):
    logits, targets = case()
    logits.requires_grad_()
    with Watch():
        evaluate(name, logits, targets).backward()
    assert logits.grad.abs().sum() > 0


@each_loss
def test_under_autocast_each_loss_is_that_of_the_logits_in_single_precision(name):
    features, weight = gaussian(16, 8).float(), gaussian(15, 8, seed=3, spread=0.3).float()
    targets = torch.arange(16) % 5
    exact = evaluate(name, functional.linear(features, weight).view(16, 3, 5), targets)
    with torch.autocast("cpu", torch.bfloat16):
        low = functional.linear(features, weight).view(16, 3, 5)
        found = evaluate(name, low, targets)
    assert low.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert torch.equal(found, evaluate(name, low.float(), targets))
    assert found.item() == pytest.approx(exact.item(), rel=2e-2)


@each_loss
@pytest.mark.parametrize("size", [30.0, 1e4, 1e30])
def test_extreme_logits_give_finite_losses_and_gradients(name, size):
    logits, targets = case(views=12)
    logits = (size * logits.float().sign()).requires_grad_()
    loss = evaluate(name, logits, targets)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@each_loss
@pytest.mark.parametrize("wrong", ["views", "dimensions", "classes"])
def test_shapes_that_do_not_fit_are_refused_in_one_line(name, wrong):
    logits, targets = case()
    changed = {"views": logits[1:], "dimensions": logits[:, 0], "classes": logits[..., 1:]}[wrong]
    words = {"views": "one target a row", "dimensions": "expected .views, experts, classes", "classes": "one value a"}
    with pytest.raises(DataError, match=words[wrong]) as caught:
        evaluate(name, changed, targets)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda z, y: sade_loss(z[:, :2], y, LOG_COUNTS, 2.0), ConfigError, "SADE has 3 experts, the logits have 2"),
        (lambda z, y: balpoe_loss(z, y, LOG_COUNTS, (0.0, 1.0, 3.0)), ConfigError, "mean of 1.33333; BalPoE's is 1"),
        (lambda z, y: balpoe_loss(z[:, :2], y, LOG_COUNTS), ConfigError, "3 lambdas for 2 experts"),
        (lambda z, y: ride_loss(z, y, MARGINS, WEIGHTS, torch.ones(1)), DataError, "temperatures of shape"),
        (lambda z, y: ldam_loss(z, y, MARGINS, WEIGHTS[1:]), DataError, "weights of shape"),
        (lambda z, y: ncl_loss(z, y, LOG_COUNTS, hard_share=0.0), ConfigError, "share of hard classes 0.0"),
        (lambda z, y: ncl_hard_mask(z[:, 0], y, 1.1), ConfigError, "share of hard classes 1.1"),
        (lambda z, y: ncl_hard_mask(z, y), DataError, "the hard classes need"),
        (lambda z, y: ncl_hard_mask(z[1:, 0], y), DataError, "the hard classes need"),
        (lambda z, y: deferred_weights(COUNTS, beta=1.0), ConfigError, "beta 1.0"),
        (lambda z, y: ride_temperatures(COUNTS, gamma=1.5), ConfigError, "gamma 1.5"),
    ],
)
def test_what_a_method_does_not_allow_is_refused_in_one_line(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call(*case())
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)


def test_the_balanced_loss_of_equal_counts_is_plain_cross_entropy():
    logits, targets = case()
    expected = expert_cross_entropy(logits, targets)
    torch.testing.assert_close(balanced_softmax_loss(logits, targets, torch.full((5,), 2.0)), expected)
