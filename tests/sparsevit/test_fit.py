"""Training: schedules, decay, and the terms of the loss."""

import copy

import pytest
import torch
from torch.nn import functional

from shared.errors import ConfigError
from sparsevit.algorithm import build_term, mapped_blocks
from sparsevit.baselines import neuron_group_lasso
from sparsevit.config import METHODS, AuthorsRecipe, OursRecipe
from sparsevit.method import activation_penalty, attention_entropy, attention_penalty, prunable
from sparsevit.schedule import build_optimizer, rates
from tests.sparsevit.small_fits import AUTHORS, SGD, configure, make, run, same, source, state_of

# --- rates ------------------------------------------------------------------------------------------------------------


def test_the_authors_rates_are_the_published_values():
    recipe, total = AuthorsRecipe(name="authors"), 62_500
    assert rates(recipe, 0, total) == pytest.approx((4e-5, 0.95))
    assert rates(recipe, 500, total) == pytest.approx((1e-3, 0.85), rel=1e-6)
    assert rates(recipe, 499, total) == pytest.approx((1e-3, 0.85), rel=1e-12)
    assert rates(recipe, total - 1, total) == pytest.approx((4e-9, 0.95), rel=1e-9)


@pytest.mark.parametrize("total", [7, 100, 1250])
@pytest.mark.parametrize("recipe", [AUTHORS, AuthorsRecipe(name="authors", warmup_steps=5), SGD])
def test_the_rates_are_those_of_torchs_one_cycle(recipe, total):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 1.0, momentum=0.9)
    share = recipe.warmup if isinstance(recipe, OursRecipe) else recipe.warmup_steps / total
    cycles = isinstance(recipe, AuthorsRecipe)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total, pct_start=share, cycle_momentum=cycles, div_factor=25, final_div_factor=1e4
    )
    for step in range(total):
        group = optimizer.param_groups[0]
        assert rates(recipe, step, total) == pytest.approx((group["lr"], group["momentum"]), rel=1e-9, abs=1e-15)
        optimizer.step()
        theirs.step() if step < total - 1 else None


def test_a_warm_up_longer_than_the_training_is_refused(lab):
    with pytest.raises(ConfigError, match=r"recipe\.warmup_steps: 500 steps of warm-up in a training of 15"):
        make(lab, recipe=AuthorsRecipe(name="authors"))


def test_in_the_authors_recipe_everything_decays_and_in_ours_only_matrices(lab):
    network = lab.network()
    (everything,) = build_optimizer(network, AUTHORS).param_groups
    assert len(everything["params"]) == len(list(network.parameters()))
    assert everything["weight_decay"] == 1e-4
    decayed, free = build_optimizer(network, SGD).param_groups
    names = {id(p): n for n, p in network.named_parameters()}
    free_names = {names[id(p)] for p in free["params"]}
    assert free["weight_decay"] == 0
    assert {"cls", "pos", "norm.weight", "head.bias", "blocks.0.norm1.weight"} <= free_names
    assert {names[id(p)] for p in decayed["params"]} == {n for n in names.values() if n.endswith("weight")} - free_names
    (all_of_it,) = build_optimizer(network, SGD.model_copy(update={"decay_all": True})).param_groups
    assert len(all_of_it["params"]) == len(names)


# --- terms of the loss ------------------------------------------------------------------------------------------------


def value_of(lab, method, *overrides, maps=(0, 1)):
    network, images = lab.network(dtype=torch.float64), lab.images(dtype=torch.float64)
    config = configure(method, *overrides)
    _, seen = network.observe(images, mapped_blocks(config, 2))
    _, full = network.observe(images, maps)
    return float(build_term(config)(network, seen)), network, full


@torch.no_grad()
def test_each_term_is_its_formula_times_its_coefficient(lab):
    coefficient = "coefficients={paper: 0.5, flip: 0.5, paper_strong: 7.0, attn_l1: 2.0, attn_sparse: 3.0, l1: 0.25, "
    coefficient += "ffn_log: 0.5, ffn_l1: 2.0, group: 0.125}"

    def value(method, *more):
        return value_of(lab, method, coefficient, *more)

    found, network, seen = value("paper")
    last = float(attention_penalty(seen[1]["attention"]))
    assert found == pytest.approx(0.5 * last, abs=1e-7)
    both = (float(attention_penalty(seen[0]["attention"])) + last) / 2
    assert value("paper", "coefficients.scope=all")[0] == pytest.approx(0.5 * both, rel=1e-9)
    assert both != pytest.approx(last, rel=1e-3)
    for chosen in ("authors", "blocks"):
        total = sum(float(p.abs().sum()) for p in prunable(network, chosen).values())
        assert value("l1", f"prune.set={chosen}")[0] == pytest.approx(0.25 * total, rel=1e-6)
    assert value("flip")[0] == pytest.approx(-0.5 * last, rel=1e-9)
    assert value("paper_strong")[0] == pytest.approx(7 * last, rel=1e-9)
    assert value("attn_l1")[0] == pytest.approx(2 / 5, rel=1e-9)
    assert value("attn_sparse")[0] == pytest.approx(3 * float(attention_entropy(seen[1]["attention"])), rel=1e-9)
    hidden = [s["hidden"] for s in seen]
    assert value("ffn_log")[0] == pytest.approx(0.5 * sum(float(activation_penalty(h)) for h in hidden) / 2, rel=1e-9)
    assert value("ffn_l1")[0] == pytest.approx(2 * sum(float(h.abs().mean()) for h in hidden) / 2, rel=1e-9)
    weights = sum(float(p.abs().sum()) for p in prunable(network, "matrices").values())
    assert value("l1")[0] == pytest.approx(0.25 * weights, rel=1e-9)
    groups = sum(float(neuron_group_lasso(b.fc1.weight, b.fc2.weight)) for b in network.layers)
    assert value("group")[0] == pytest.approx(0.125 * groups, rel=1e-9)


@torch.no_grad()
def test_scope_all_is_scope_last_where_there_is_one_block(lab):
    network, images = lab.network(depth=1, dtype=torch.float64), lab.images(dtype=torch.float64)
    found = []
    for scope in ("last", "all"):
        config = configure("paper", f"coefficients.scope={scope}")
        found.append(float(build_term(config)(network, network.observe(images, mapped_blocks(config, 1))[1])))
    assert found[0] == found[1]


def test_only_the_last_blocks_map_is_computed_and_none_for_arms_that_need_none():
    wanted = {"paper", "flip", "attn_l1", "paper_strong", "attn_sparse"}
    for method in METHODS:
        assert mapped_blocks(configure(method), 12) == ((11,) if method in wanted else ())
    assert mapped_blocks(configure("paper", "coefficients.scope=all"), 3) == (0, 1, 2)
    assert mapped_blocks(configure("paper", "coefficients.paper=0.0"), 3) == ()


def test_the_loss_is_cross_entropy_and_the_term(lab):
    """What one real step booked and did: lambda R of the batch it saw, and SGD down the gradient of the sum."""
    fit = make(lab, "paper", overrides=("coefficients.paper=5.0",), recipe=SGD.model_copy(update={"clip": None}))
    fit.source = source(flip=False)
    before, batch = copy.deepcopy(fit.network), torch.tensor(fit.images_of_step(0))
    run(fit, 1)
    images, labels = fit.source.batch(batch, torch.Generator())
    logits, seen = before.observe(images, (1,))
    cross_entropy = functional.cross_entropy(logits, labels)
    penalty = 5 * attention_penalty(seen[1]["attention"])
    assert fit.sums.tolist() == pytest.approx([8 * cross_entropy.item(), 8 * penalty.item()], rel=1e-5)
    (cross_entropy + penalty).backward()
    old, new = (network.blocks[1].attn.q.weight for network in (before, fit.network))
    wanted = old.detach() - rates(SGD, 0, fit.total).lr * (old.grad + SGD.weight_decay * old.detach())
    assert torch.allclose(new.detach(), wanted, rtol=0, atol=2e-7)
    assert not torch.allclose(new.detach(), old.detach(), rtol=0, atol=1e-5)


def test_the_epochs_means_are_over_images_though_the_last_batch_is_small(lab):
    still = OursRecipe(name="ours", lr=1e-12, weight_decay=0.0)
    fit = make(lab, "paper", recipe=still, batch_size=16, overrides=("coefficients.paper=5.0",))
    fit.source = source(flip=False)
    run(fit, 3)  # batches of 16, 16 and 8
    images, labels = next(fit.source.evaluate(40))
    with torch.no_grad():
        logits, seen = lab.network().observe(images, (1,))
    means = fit.epoch_means()
    assert means["cross_entropy"] == pytest.approx(float(functional.cross_entropy(logits, labels)), rel=1e-5)
    assert means["term"] == pytest.approx(5 * float(attention_penalty(seen[1]["attention"])), rel=1e-4)


@pytest.mark.parametrize("method", ["paper", "flip", "l1", "group", "ffn_log"])
def test_a_coefficient_of_zero_gives_the_bits_of_no_penalty(lab, method):
    zero = make(lab, method, overrides=(f"coefficients.{method}=0.0",))
    assert same(run(zero, 3), run(make(lab, "none"), 3))
    assert not same(run(make(lab, method, overrides=(f"coefficients.{method}=1.0",)), 3), run(make(lab, "none"), 3))


def test_the_control_that_must_do_nothing_does_nothing(lab):
    control, none = run(make(lab, "attn_l1")), run(make(lab, "none"))
    assert max(float((control[n] - none[n]).abs().max()) for n in none) < 1e-5


def test_the_strong_penalty_raises_the_entropy_of_the_last_map_and_the_sparse_arm_lowers_it(lab):
    def entropy(method, *overrides):
        fit = make(lab, method, overrides=overrides, epochs=6)
        run(fit)
        _, seen = fit.network.eval().observe(lab.images(), (1,))
        return attention_entropy(seen[1]["attention"]).item()

    none = entropy("none")
    assert entropy("paper_strong", "coefficients.paper_strong=100.0") > none + 0.01
    assert entropy("attn_sparse", "coefficients.attn_sparse=2.0") < none - 0.01


def test_the_null_arm_is_a_tiny_perturbation_of_the_start_and_nothing_else(lab):
    start = lab.network().state_dict()
    null = state_of(make(lab, "null"))
    for name, tensor in start.items():
        relative = ((null[name] - tensor).abs() / tensor.abs().clamp(min=1e-9)).max()
        assert 0 < float(relative) < 1e-5
    assert same(state_of(make(lab, "none")), start)
