"""The oracles of the penalty and of the pruning of single weights."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from shared.errors import ConfigError
from sparsevit import baselines, method
from sparsevit.baselines import (
    attention_l1,
    local_magnitude_masks,
    neuron_group_lasso,
    random_masks,
    wanda_masks,
)  # fmt: skip
from sparsevit.method import (
    activation_penalty,
    attention_entropy,
    attention_penalty,
    global_magnitude_masks,
    prunable,
    zeros_to_prune,
)  # fmt: skip
from sparsevit.model import arch_size, on_meta
from tests.sparsevit.draws import draw

RATIOS = [r / 10 for r in range(10)]


def zeros(masks):
    values = masks.values() if isinstance(masks, dict) else masks
    return sum(int((~mask).sum()) for mask in values)


def weights(seed=0):
    return {"a": draw(7, 9, seed=seed), "b": draw(30, seed=seed + 1), "c": draw(4, 3, 2, seed=seed + 2)}


# --- the penalty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 17, 577])
def test_the_penalty_of_uniform_and_one_hot_rows_is_its_closed_form(n):
    one_hot = torch.eye(n)[torch.randint(n, (1, 2, n), generator=torch.Generator().manual_seed(0))]
    assert float(attention_penalty(one_hot)) == pytest.approx(math.log(2) / n, rel=1e-6)
    assert float(attention_penalty(torch.full((1, 2, n, n), 1 / n))) == pytest.approx(math.log1p(1 / n**2), rel=1e-6)
    assert float(attention_penalty(torch.zeros(1, 2, n, n))) == 0


def test_uniform_attention_is_the_smallest_and_one_hot_the_largest_of_a_thousand_maps():
    for seed in range(1000):
        n = 2 + seed % 20
        value = float(attention_penalty(method_map(seed, n)))
        assert math.log1p(1 / n**2) - 1e-9 <= value <= math.log(2) / n + 1e-9


def method_map(seed, n):
    return torch.softmax((1 + seed % 7) * draw(1, 1, n, n, seed=seed, dtype=torch.float64), -1)


def test_the_gradient_of_the_penalty_is_its_formula(lab):
    a = lab.random_map(2, 3, 5, 5, dtype=torch.float64).requires_grad_()
    attention_penalty(a).backward()
    wanted = 2 * a.detach() / ((1 + a.detach() ** 2) * a.numel())
    assert torch.allclose(a.grad, wanted, rtol=1e-12)


def test_the_gradient_of_the_penalty_passes_finite_differences(lab):
    logits = draw(1, 2, 4, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: attention_penalty(torch.softmax(z, -1)), (logits,))


@pytest.mark.parametrize(("sign", "raises"), [(1, True), (-1, False)])
def test_descending_the_penalty_raises_the_entropy_and_ascending_lowers_it(sign, raises):
    logits = draw(4, 2, 17, 17, dtype=torch.float64).requires_grad_()
    before = attention_entropy(torch.softmax(logits.detach(), -1))
    (sign * attention_penalty(torch.softmax(logits, -1))).backward()
    after = attention_entropy(torch.softmax(logits.detach() - 100 * logits.grad, -1))
    assert (float(after) > float(before)) == raises
    assert abs(float(after - before)) > 1e-6


def test_entropy_is_that_of_uniform_and_one_hot_rows():
    assert float(attention_entropy(torch.full((1, 1, 8, 8), 1 / 8))) == pytest.approx(math.log(8), rel=1e-6)
    assert float(attention_entropy(torch.eye(8)[None, None])) == 0


def test_the_entropy_of_a_softmax_that_ran_into_zero_has_a_finite_gradient():
    logits = (300 * torch.eye(8))[None, None].requires_grad_()
    attention = torch.softmax(logits, -1)
    assert (attention == 0).any()
    attention_entropy(attention).backward()
    assert logits.grad.isfinite().all()


def test_mean_l1_of_attention_is_a_constant_without_gradient():
    logits = draw(2, 3, 17, 17, dtype=torch.float64).requires_grad_()
    value = attention_l1(torch.softmax(logits, -1))
    value.backward()
    assert value.item() == pytest.approx(1 / 17, rel=1e-12)
    assert float(logits.grad.abs().max()) < 1e-8


def test_the_penalty_is_taken_in_float32_and_with_log1p():
    small = torch.full((1, 1, 577, 577), 1 / 577)
    half = small.bfloat16()
    assert attention_penalty(half).dtype == torch.float32
    assert float(attention_penalty(half)) == pytest.approx(float(half[0, 0, 0, 0].double()) ** 2, rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        value = attention_penalty(torch.softmax(draw(1, 1, 9, 9), -1) @ torch.eye(9))
    assert value.dtype == torch.float32
    assert attention_penalty(small.double()).dtype == torch.float64
    naive = float(torch.log(1 + small * small).mean())
    assert float(attention_penalty(small)) == pytest.approx(math.log1p(577**-2), rel=1e-6)
    assert naive < 0.995 * math.log1p(577**-2), "the test must see what log1p is for"


def test_the_activation_penalty_is_zero_at_zero_and_pulls_every_activation_towards_it():
    hidden = draw(3, 5, 7).requires_grad_()
    activation_penalty(hidden).backward()
    assert torch.equal(hidden.grad.sign(), hidden.detach().sign())
    assert float(activation_penalty(torch.zeros(2, 3, 4))) == 0
    assert float(activation_penalty(torch.full((2, 3, 4), 2.0))) == pytest.approx(math.log(5), rel=1e-6)
    assert activation_penalty(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_group_penalty_is_its_formula_and_a_zero_neuron_has_a_zero_gradient():
    fc1, fc2 = draw(6, 4), draw(4, 6, seed=1)
    with torch.no_grad():
        fc1[2], fc2[:, 2] = 0, 0
    fc1.requires_grad_(), fc2.requires_grad_()
    value = neuron_group_lasso(fc1, fc2)
    value.backward()
    squares = (fc1.square().sum(1) + fc2.square().sum(0)).detach().tolist()
    wanted = sum(map(math.sqrt, squares))
    assert float(value.detach()) == pytest.approx(wanted, rel=1e-6)
    assert not fc1.grad[2].any()
    assert not fc2.grad[:, 2].any()
    assert bool(torch.isfinite(fc1.grad).all())
    length = (fc1[0].square().sum() + fc2[:, 0].square().sum()).sqrt().detach().item()
    assert torch.allclose(fc1.grad[0], fc1.detach()[0] / length)


def test_the_sum_of_absolute_weights_is_a_sum():
    assert float(baselines.weight_l1([torch.tensor([1.0, -2.0]), torch.tensor([[3.0]])])) == 6


# --- which tensors ----------------------------------------------------------------------------------------------------


def test_the_authors_set_leaves_biases_tokens_and_the_last_norm_out():
    network = on_meta(arch_size("vit_b16", 384, 3, 10))
    names = list(prunable(network, "authors"))
    assert len(names) == 98
    outside = set(dict(network.named_parameters())) - set(names)
    assert {"cls", "pos", "norm.weight", "norm.bias", "head.bias", "patch.bias"} <= outside
    assert all(name.endswith("bias") or name in ("cls", "pos", "norm.weight") for name in outside)
    assert zeros_to_prune(0.1, sum(p.numel() for p in prunable(network, "authors").values())) == 8_555_059


def test_the_default_set_is_the_authors_without_norms_and_the_third_has_the_six_matrices_of_a_block():
    network = on_meta(arch_size("vit_b16", 224, 3, 10))
    authors, matrices, blocks = (set(prunable(network, s)) for s in ("authors", "matrices", "blocks"))
    assert authors - matrices == {f"blocks.{i}.norm{k}.weight" for i in range(12) for k in (1, 2)}
    assert matrices - blocks == {"patch.weight", "head.weight"}
    assert len(blocks) == 72
    with pytest.raises(ConfigError, match="prune set"):
        prunable(network, "all")


# --- unstructured pruning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [*RATIOS, 1.0])
@pytest.mark.parametrize("rule", ["global", "random"])
def test_exactly_the_rounded_share_of_all_weights_goes(ratio, rule):
    tensors = weights()
    masks = global_magnitude_masks(tensors, ratio) if rule == "global" else random_masks(tensors, ratio, seed=1)
    count = sum(t.numel() for t in tensors.values())
    assert zeros(masks) == round(ratio * count)
    assert all(
        masks[name].shape == tensor.shape and masks[name].dtype == torch.bool for name, tensor in tensors.items()
    )


def test_equal_weights_do_not_go_all_at_once():
    tensors = {"a": torch.ones(6, 10), "b": -torch.ones(40)}
    assert zeros(global_magnitude_masks(tensors, 0.37)) == 37
    assert zeros(global_magnitude_masks(tensors, 1.0)) == 100


def test_half_a_weight_is_rounded_to_even_as_python_does():
    assert [zeros(global_magnitude_masks([torch.arange(1.0, 6)], r)) for r in (0.1, 0.3, 0.5)] == [0, 2, 2]


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), float("inf"), 1, 0, True, "0.5", None])
def test_a_ratio_that_is_none_is_refused_in_one_line(ratio):
    for prune in (global_magnitude_masks, local_magnitude_masks, lambda t, r: random_masks(t, r, 0)):
        with pytest.raises(ConfigError, match="ratio: ") as found:
            prune(weights(), ratio)
        assert "\n" not in str(found.value)


def test_the_smallest_magnitudes_of_all_tensors_go_first():
    tensors = weights()
    masks = global_magnitude_masks(tensors, 0.4)
    kept = torch.cat([tensors[n][masks[n]].abs() for n in tensors])
    gone = torch.cat([tensors[n][~masks[n]].abs() for n in tensors])
    assert float(gone.max()) < float(kept.min())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_zeros_are_those_of_torchs_own_global_pruning(seed, ratio):
    layers = [nn.Linear(9, 7), nn.Linear(5, 6), nn.LayerNorm(30)]
    tensors = []
    for i, layer in enumerate(layers):
        layer.weight.data = draw(*layer.weight.shape, seed=10 * seed + i)
        tensors.append(layer.weight.detach().clone())
    torch_prune.global_unstructured([(m, "weight") for m in layers], torch_prune.L1Unstructured, amount=ratio)
    for mask, layer in zip(global_magnitude_masks(tensors, ratio), layers, strict=True):
        assert torch.equal(mask, layer.weight_mask.bool())


@pytest.mark.parametrize("rule", ["global", "local", "random", "wanda", "ties"])
def test_what_is_pruned_at_a_ratio_is_pruned_at_a_higher_one(rule):
    tensors = {"a": draw(7, 9), "b": draw(5, 9, seed=1)}
    if rule == "ties":
        tensors = {name: tensor.round() for name, tensor in tensors.items()}
    norms = {name: draw(9, seed=3).abs() for name in tensors}
    make = {
        "global": global_magnitude_masks, "ties": global_magnitude_masks, "local": local_magnitude_masks,
        "random": lambda t, r: random_masks(t, r, 5), "wanda": lambda t, r: wanda_masks(t, norms, r),
    }[rule]  # fmt: skip
    before = make(tensors, 0.0)
    assert zeros(before) == 0
    for ratio in RATIOS[1:]:
        after = make(tensors, ratio)
        assert all(bool((after[n] <= before[n]).all()) for n in tensors)
        before = after


def test_a_tensor_of_large_weights_is_spared_by_the_global_ranking_and_not_by_the_local_one():
    tensors = {"a": draw(20, 10), "b": 100 * draw(20, 10, seed=1)}
    tensors["b"] += 10 * tensors["b"].sign()
    at = global_magnitude_masks(tensors, 0.3)
    assert (zeros([at["a"]]), zeros([at["b"]])) == (120, 0)
    local = local_magnitude_masks(tensors, 0.3)
    assert (zeros([local["a"]]), zeros([local["b"]])) == (60, 60)


def test_a_list_gives_a_list_and_a_mapping_a_mapping():
    tensors = weights()
    by_name, in_order = global_magnitude_masks(tensors, 0.5), global_magnitude_masks(list(tensors.values()), 0.5)
    assert isinstance(in_order, list)
    assert all(torch.equal(a, b) for a, b in zip(by_name.values(), in_order, strict=True))


def test_random_masks_are_of_the_seed():
    one, two, other = (random_masks(weights(), 0.5, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


def test_the_fixed_names_are_in_the_method_file():
    for name in ("attention_penalty", "global_magnitude_masks", "neuron_scores", "remove_neurons", "remove_heads"):
        assert callable(getattr(method, name))
