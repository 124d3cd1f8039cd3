"""Training to the bit: seeds, interruptions, orders, masks, precision."""

import copy
import math

import pytest
import torch

from shared.gpu import NotFiniteError, stream
from sparsevit.config import OursRecipe
from sparsevit.fit import CHUNK
from sparsevit.measure import accuracies
from sparsevit.method import global_magnitude_masks, prunable
from sparsevit.schedule import rates
from tests.sparsevit.small_fits import AUTHORS, SGD, make, run, same, source, state_of

ADAMW = OursRecipe(name="ours", optimizer="adamw", lr=0.01, weight_decay=0.1)


# --- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [SGD, ADAMW, AUTHORS], ids=["sgd", "adamw", "authors"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_same_seed_gives_the_same_bits_and_another_seed_others(lab, recipe, dropout):
    one = run(make(lab, "paper", recipe=recipe, dropout=dropout))
    torch.manual_seed(123)  # nothing may depend on the global generator
    assert same(one, run(make(lab, "paper", recipe=recipe, dropout=dropout)))
    assert not same(one, run(make(lab, "paper", recipe=recipe, dropout=dropout, seed=1)))


@pytest.mark.parametrize("recipe", [SGD, ADAMW, AUTHORS], ids=["sgd", "adamw", "authors"])
@pytest.mark.parametrize("stop", [1, 5, 7, 20, 23, 39])
def test_a_training_that_stopped_anywhere_goes_on_to_the_same_bits(lab, recipe, stop):
    """Batches of 2 make 20 steps an epoch, more than share a stream of augmentation."""
    assert CHUNK < 20
    setup = {"recipe": recipe, "dropout": 0.2, "batch_size": 2, "epochs": 2}
    whole = make(lab, "paper", **setup)
    wanted = run(whole)
    first = make(lab, "paper", **setup)
    run(first, stop)
    saved = copy.deepcopy(first.snapshot())
    second = make(lab, "none", **setup)
    second.term, second.maps = first.term, first.maps
    torch.manual_seed(5)
    second.restore(saved)
    assert same(run(second), wanted)
    assert second.order_digest == whole.order_digest
    assert torch.equal(second.sums, whole.sums)


def test_every_step_drops_out_something_else(lab):
    still = OursRecipe(name="ours", lr=1e-12, weight_decay=0.0)
    fit = make(lab, recipe=still, batch_size=40, epochs=3, dropout=0.5, shuffle=False)
    fit.source = source(flip=False)
    losses = [float(fit.sums[0]) for _ in fit.steps()]
    steps = [losses[0], losses[1] - losses[0], losses[2] - losses[1]]
    assert max(steps) - min(steps) > 1e-3


def test_every_epoch_has_a_new_order_and_all_arms_of_a_seed_the_same(lab):
    one, other = make(lab, "none"), make(lab, "paper")
    orders = [one.order(epoch) for epoch in range(3)]
    assert all(torch.equal(order.sort().values, torch.arange(40)) for order in orders)
    assert not torch.equal(orders[0], orders[1])
    assert all(torch.equal(other.order(epoch), order) for epoch, order in enumerate(orders))
    fixed = make(lab, "none", shuffle=False)
    assert torch.equal(fixed.order(1), torch.arange(40))
    run(one), run(other), run(fixed)
    assert one.order_digest == other.order_digest != fixed.order_digest
    third = make(lab, seed=1)
    run(third)
    assert third.order_digest != one.order_digest
    larger = make(lab, batch_size=10)
    run(larger)
    assert larger.order_digest != one.order_digest, "the same order cut into other batches"


def test_a_step_sees_the_images_that_the_order_says(lab):
    fit = make(lab)
    seen = []
    source_prefetch = fit.source.prefetch

    def spy(batches, generator):
        seen.extend(batch.tolist() for batch in batches)
        return source_prefetch(batches, generator)

    fit.source.prefetch = spy
    run(fit)
    assert seen == [fit.images_of_step(step) for step in range(15)]
    assert [i for batch in seen[:5] for i in batch] == fit.order(0).tolist()


@pytest.mark.parametrize("recipe", [SGD, ADAMW, AUTHORS], ids=["sgd", "adamw", "authors"])
def test_masked_weights_stay_exactly_zero_through_momentum_decay_and_penalty(lab, recipe):
    network = lab.network()
    masks = global_magnitude_masks(dict(prunable(network, "authors")), 0.6)
    fit = make(lab, "l1", recipe=recipe, masks=masks)
    with torch.no_grad():
        for name, parameter in fit.network.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    before = state_of(fit)
    for done in fit.steps():
        state = fit.network.state_dict()
        assert all(not state[name][~mask].any() for name, mask in masks.items())
        if done == 5:
            break
    assert any(not torch.equal(before[n], state[n]) for n in masks)
    for parameter, mask in fit.masks:
        for value in fit.optimizer.state[parameter].values():
            if value is not None and value.shape == mask.shape:
                assert not value[~mask].any()


def test_without_the_guard_momentum_would_revive_masked_weights(lab):
    network = lab.network()
    masks = global_magnitude_masks(dict(prunable(network, "authors")), 0.6)
    fit = make(lab)
    with torch.no_grad():
        for name, parameter in fit.network.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    state = run(fit, 2)
    assert any(bool(state[name][~mask].any()) for name, mask in masks.items()), "the test above must be able to fail"


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_step(lab):
    fit = make(lab)
    run(fit, 7)
    with torch.no_grad():
        fit.network.head.bias[0] = math.nan
    before = state_of(fit)
    with pytest.raises(NotFiniteError, match="step 7"):
        run(fit)
    assert all(torch.equal(before[n].nan_to_num(9), t.nan_to_num(9)) for n, t in fit.network.state_dict().items())


def test_clipping_bounds_the_step(lab):
    tight = SGD.model_copy(update={"clip": 1e-6, "weight_decay": 0.0})
    start, end = state_of(make(lab)), run(make(lab, recipe=tight, epochs=1))
    assert max(float((end[n] - start[n]).abs().max()) for n in start) < 1e-5


def test_every_step_takes_its_own_rate_and_momentum(lab):
    fit = make(lab, recipe=AUTHORS)
    taken = [{(group["lr"], group["momentum"]) for group in fit.optimizer.param_groups} for _ in fit.steps()]
    assert taken == [{tuple(rates(AUTHORS, step, fit.total))} for step in range(fit.total)]
    assert len({momentum for ((_, momentum),) in taken}) > 3


def test_every_epoch_and_chunk_is_augmented_by_a_stream_of_its_own(lab):
    fit, seeds = make(lab, batch_size=2, epochs=2), []
    original = fit.source.prefetch
    fit.source.prefetch = lambda batches, draws: seeds.append(draws.initial_seed()) or original(batches, draws)
    run(fit)
    assert seeds == [stream(0, "test", "augment", epoch, start).initial_seed() for epoch in (0, 1) for start in (0, 16)]


def test_bfloat16_training_keeps_weights_and_penalty_in_float32(lab):
    fit, kinds, terms = make(lab, "paper", precision="bfloat16", epochs=1), [], []
    fit.network.head.register_forward_hook(lambda module, inputs, output: kinds.append(output.dtype))
    term = fit.term
    fit.term = lambda network, seen: terms.append(term(network, seen)) or terms[-1]
    run(fit)
    assert {*kinds} == {torch.bfloat16}, "the products are in bfloat16"
    assert {value.dtype for value in terms} == {torch.float32}
    kinds.clear()
    accuracies([fit.network], fit.source, 20, "bfloat16")
    assert {*kinds} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in fit.network.parameters())
    means = fit.epoch_means()
    assert 0 < means["term"] < 0.01 * math.log(2) / 5
    assert fit.sums.tolist() == [0, 0]
