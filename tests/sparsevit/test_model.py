"""The network: shapes, counts, fused and explicit attention, first values."""

import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from shared.errors import CheckpointError, ConfigError
from sparsevit.method import prunable
from sparsevit.model import (
    ARCHS,
    BlockSize,
    Size,
    arch_size,
    build,
    count_macs,
    count_parameters,
    count_prunable,
    on_meta,
    size_from_dict,
    uniform_size,
)  # fmt: skip
from sparsevit.problem import load_problem
from sparsevit.start import empty_network


@pytest.mark.parametrize(
    ("image", "classes", "parameters", "set_size", "gmac"),
    [(384, 10, 86_098_186, 85_550_592, 55.484), (384, 100, 86_167_396, 85_619_712, 55.484),
     (224, 100, 85_875_556, 85_619_712, 17.563)],
)  # fmt: skip
def test_vit_b16_has_the_counts_of_the_papers_network(image, classes, parameters, set_size, gmac):
    size = arch_size("vit_b16", image, 3, classes)
    network = on_meta(size)
    assert count_parameters(size) == sum(p.numel() for p in network.parameters()) == parameters
    chosen = prunable(network, "authors")
    assert len(chosen) == 98
    assert count_prunable(size) == sum(p.numel() for p in chosen.values()) == set_size
    assert sum(p.numel() for n, p in chosen.items() if "norm" in n) == 18_432
    assert count_macs(size) / 1e9 == pytest.approx(gmac, abs=5e-4)


@pytest.mark.parametrize("arch", [a for a in ARCHS if a.startswith("vit")])
@pytest.mark.parametrize("layer_scale", [False, True])
def test_closed_forms_hold_for_every_named_network(arch, layer_scale):
    size = arch_size(arch, 224, 3, 1000, layer_scale=layer_scale)
    assert count_parameters(size) == sum(p.numel() for p in on_meta(size).parameters())


def test_s0_is_the_papers_small_setting():
    assert count_parameters(arch_size("s0", 28, 1, 10)) == 205_066
    assert arch_size("s0", 28, 1, 10).tokens == 17


def test_dropout_is_where_the_papers_network_has_it(lab, monkeypatch, tiny):
    """After the positions, after attention, after GELU and after the MLP; what is observed is before it."""
    network, seen = build(lab.small_size(), 0, dropout=0.5).train(), []
    block, original = network.layers[0], functional.dropout
    monkeypatch.setattr("sparsevit.model.functional.dropout", lambda x, p: seen.append((x, p)) or original(x, p))
    _, found = network.observe(lab.images())
    assert [(x.shape[-1], p) for x, p in seen] == [(12, 0.5), *[(12, 0.5), (20, 0.5), (12, 0.5)] * 2]
    assert torch.equal(found[0]["hidden"], functional.gelu(block.fc1(found[0]["mlp_in"])))
    config = tiny("none")
    assert empty_network(config, load_problem(config.data, torch.device("cpu")), torch.device("cpu")).dropout == 0.1


@pytest.mark.parametrize("seed", range(4))
def test_macs_of_uneven_blocks_equal_counted_flops(seed):
    draws = torch.Generator().manual_seed(seed)

    def pick(high):
        return int(torch.randint(1, high, (), generator=draws))

    size = Size(8, 3, 4, 8, 7, tuple(BlockSize(pick(4), pick(5), pick(30)) for _ in range(3)))
    network = build(size, 0).eval()
    assert count_parameters(size) == sum(p.numel() for p in network.parameters())
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network.observe(torch.zeros(1, 3, 8, 8), maps=range(3))
    assert counter.get_total_flops() == 2 * count_macs(size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_explicit_attention_is_the_fused_one_and_its_map_changes_no_logit(lab, dtype):
    network, images = lab.network(dtype=dtype), lab.images(dtype=dtype)
    plain = network(images)
    logits, seen = network.observe(images, maps=(0, 1))
    assert torch.allclose(logits, plain, atol=1e-5 if dtype == torch.float32 else 1e-12)
    for block in seen:
        attention = block["attention"]
        assert attention.shape == (6, 3, 5, 5)
        assert torch.allclose(attention.sum(-1), torch.ones(6, 3, 5, dtype=dtype), atol=1e-6)
    only_last, seen = network.observe(images, maps=(1,))
    assert torch.allclose(only_last, plain, atol=1e-6)
    assert "attention" not in seen[0]
    assert torch.equal(network.observe(images)[0], plain)


def test_the_map_is_that_of_the_formula(lab):
    network, images = lab.network(dtype=torch.float64), lab.images(dtype=torch.float64)
    _, seen = network.observe(images, maps=(1,))
    attn, x = network.blocks[1].attn, seen[1]["attn_in"]
    q, k = (linear(x).unflatten(-1, (3, 4)).transpose(1, 2) for linear in (attn.q, attn.k))
    wanted = torch.softmax(q @ k.transpose(-1, -2) / 4**0.5, -1)
    assert torch.allclose(seen[1]["attention"], wanted, atol=1e-12)


def test_the_mlp_has_the_exact_gelu(lab):
    network, images = lab.network(dtype=torch.float64), lab.images(dtype=torch.float64)
    block, (_, seen) = network.blocks[0], network.observe(images)
    x = block.fc1(seen[0]["mlp_in"])
    assert torch.allclose(seen[0]["hidden"], x * 0.5 * (1 + torch.erf(x / 2**0.5)), atol=1e-12)


def test_patches_are_those_of_a_convolution_in_row_major_order(lab):
    network, images = lab.network(), lab.images()
    wanted = network.patch(images).flatten(2).transpose(1, 2)
    found = torch.nn.functional.linear(network.patches(images), network.patch.weight.flatten(1), network.patch.bias)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_dropout_acts_in_training_only_and_at_rate_zero_not_at_all(lab):
    network = lab.lively(build(lab.small_size(), 0, dropout=0.5))
    images = lab.images()
    assert torch.equal(network(images), network(images))
    network.train()
    assert not torch.equal(network(images), network(images))
    still = lab.network().train()
    assert torch.equal(still(images), still(images))


def test_layer_scale_multiplies_the_branches(lab):
    network = lab.network(layer_scale=True)
    images = lab.images()
    with torch.no_grad():
        before = network(images)
        for block in network.blocks:
            block.scale1.zero_()
            block.scale2.zero_()
        x = (
            torch.cat([network.cls.expand(6, -1, -1), network.patch(images).flatten(2).transpose(1, 2)], 1)
            + network.pos
        )
        assert torch.allclose(network(images), network.head(network.norm(x[:, 0])), atol=1e-6)
    assert not torch.allclose(before, network(images), atol=1e-3)


def test_first_values_come_from_the_seed_alone_and_leave_torchs_generator(lab):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = build(lab.small_size(), 5)
    assert torch.equal(torch.get_rng_state(), before)
    two, other = build(lab.small_size(), 5), build(lab.small_size(), 6)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.blocks[0].fc1.weight, other.blocks[0].fc1.weight)
    assert float(one.head.weight.detach().abs().max()) <= 12**-0.5
    assert float(one.head.weight.detach().abs().max()) > 0.5 * 12**-0.5
    assert not build(lab.small_size(), 5, head_init="zero").head.weight.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"heads": 5}, "5 heads do not divide a width of 12"), ({"heads": 0}, "0 heads do not"), ({"patch": 3}, "patches"),
     ({"depth": 0}, "no block"), ({"mlp": 0}, "at least 1"), ({"classes": 0}, "classes is 0")],
)  # fmt: skip
def test_a_size_that_cannot_be_is_refused(lab, change, message):
    with pytest.raises(ConfigError, match=message) as found:
        lab.small_size(**change)
    assert "\n" not in str(found.value)


def test_images_of_another_size_are_refused(lab):
    with pytest.raises(ConfigError, match="do not fit"):
        lab.network()(torch.zeros(1, 2, 12, 12))


def test_a_size_is_read_back_and_a_damaged_one_refused(lab):
    size = lab.uneven_size()
    assert size_from_dict(size.as_dict()) == size
    for damage in ({"blocks": 3}, {"blocks": [{"heads": 1}]}, {"width": "x"}):
        with pytest.raises(CheckpointError):
            size_from_dict(size.as_dict() | damage)
    assert uniform_size(8, 2, 4, 12, 2, 3, 20, 5).blocks[0].head_dim == 4
