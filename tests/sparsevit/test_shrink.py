"""Removing for good: the smaller network computes what the masked one does."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from shared.checkpoint import load_model, save_model
from shared.errors import CheckpointError, ConfigError
from sparsevit.model import count_macs, count_parameters
from sparsevit.shrink import load_network, remove_heads, remove_neurons, save_network

TOLERANCES = [(torch.float32, 1e-5), (torch.float64, 1e-10)]
NEURONS = {0: [1, 4, 7, 19], 1: [0, 2, 3]}
HEADS = {0: [0, 2], 1: [1]}


def masked_logits(network, images, neurons=None, heads=None, means=None):
    """Logits with the removed neurons and heads stuck at their means, by hooks on the layers that read them."""
    handles = []

    def stick(layer, kept, mean):
        def hook(module, args):
            (x,) = args
            gone = torch.ones(x.shape[-1], dtype=torch.bool)
            gone[torch.tensor(kept)] = False
            return (torch.where(gone, mean.to(x.dtype), x),)

        handles.append(layer.register_forward_pre_hook(hook))

    for i, kept in (neurons or {}).items():
        stick(network.blocks[i].fc2, kept, means[0][i])
    e = network.size.blocks[0].head_dim
    for i, kept in (heads or {}).items():
        stick(network.blocks[i].attn.out, [h * e + j for h in kept for j in range(e)], means[1][i])
    with torch.no_grad():
        logits = network(images)
    for handle in handles:
        handle.remove()
    return logits


def means_of(network, images):
    with torch.no_grad():
        _, seen = network.observe(images)
    return [s["hidden"].mean((0, 1)) for s in seen], [s["mixed"].mean((0, 1)) for s in seen]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("what", ["neurons", "heads", "both"])
def test_a_shrunk_network_computes_what_the_masked_one_does(lab, dtype, tolerance, what):
    network, images = lab.network(dtype=dtype), lab.images(dtype=dtype)
    means = means_of(network, lab.images(seed=9, dtype=dtype))
    neurons, heads = NEURONS if what != "heads" else None, HEADS if what != "neurons" else None
    small = network
    if neurons:
        small = remove_neurons(small, neurons, means[0])
    if heads:
        small = remove_heads(small, heads, means[1])
    wanted = masked_logits(network, images, neurons, heads, means)
    assert torch.allclose(small(images), wanted, atol=tolerance, rtol=tolerance)
    assert not torch.allclose(network(images), wanted, atol=1e-2)
    without = remove_neurons(network, neurons) if neurons else remove_heads(network, heads)
    assert not torch.allclose(without(images), wanted, atol=1e-2), "the compensation must matter here"


def test_without_means_the_removed_parts_count_as_zero(lab):
    network, images = lab.network(dtype=torch.float64), lab.images(dtype=torch.float64)
    nothing = [torch.zeros(20)] * 2, [torch.zeros(12)] * 2
    wanted = masked_logits(network, images, NEURONS, HEADS, nothing)
    assert torch.allclose(remove_heads(remove_neurons(network, NEURONS), HEADS)(images), wanted, atol=1e-12)


def test_keeping_everything_changes_no_bit_and_the_original_stays_as_it_was(lab):
    network, images = lab.network(), lab.images()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    means = means_of(network, images)
    same = remove_heads(remove_neurons(network, [range(20)] * 2, means[0]), [range(3)] * 2, means[1])
    assert torch.equal(same(images), network(images))
    assert same.size == network.size
    remove_heads(remove_neurons(network, NEURONS, means[0]), HEADS, means[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert network.size == lab.small_size()


def test_the_order_of_what_is_kept_is_ascending_however_it_is_given(lab):
    network = lab.network()
    one = remove_neurons(network, {0: [7, 1, 4, 1]})
    mask = torch.zeros(20, dtype=torch.bool)
    mask[[1, 4, 7]] = True
    two = remove_neurons(network, {0: mask})
    assert torch.equal(one.blocks[0].fc1.weight, network.blocks[0].fc1.weight[[1, 4, 7]])
    assert torch.equal(one.blocks[0].fc1.weight, two.blocks[0].fc1.weight)
    assert one.blocks[1].fc1.weight.shape == network.blocks[1].fc1.weight.shape


@pytest.mark.parametrize("seed", range(5))
def test_the_counts_of_a_shrunk_network_are_the_closed_forms(lab, seed):
    draws = torch.Generator().manual_seed(seed)
    network = lab.network(depth=3)

    def some(total):
        return torch.randperm(total, generator=draws)[: 1 + int(torch.randint(total, (), generator=draws))]

    neurons, heads = [some(20) for _ in range(3)], [some(3) for _ in range(3)]
    small = remove_heads(remove_neurons(network, neurons), heads)
    assert [b.mlp for b in small.size.blocks] == [len(n) for n in neurons]
    assert [b.heads for b in small.size.blocks] == [len(h) for h in heads]
    assert [b.head_dim for b in small.size.blocks] == [4, 4, 4]
    assert count_parameters(small.size) == sum(p.numel() for p in small.parameters())
    linears = [m for m in small.modules() if isinstance(m, nn.Linear)]
    assert all(m.weight.shape == (m.out_features, m.in_features) for m in linears)
    macs = sum(m.in_features * m.out_features * (1 if m is small.head else 5) for m in linears)
    attention = sum(2 * 25 * len(h) * 4 for h in heads)
    assert count_macs(small.size) == macs + attention + 4 * 2 * 16 * 12


def test_a_shrunk_network_still_trains(lab):
    small = remove_heads(remove_neurons(lab.network(), NEURONS), HEADS)
    small(lab.images()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in small.named_parameters() if "attn.k.bias" not in n)


@pytest.mark.parametrize(
    ("remove", "keep", "message"),
    [(remove_heads, {0: []}, "block 0: all 3 heads would be removed"), (remove_neurons, {1: []}, "all 20 neurons"),
     (remove_neurons, {5: [1]}, "no block 5"), (remove_heads, {0: [3]}, "0: 3..3 of 3"),
     (remove_heads, {0: [-1]}, "of 3"), (remove_neurons, [[1]], "1 blocks, but the network has 2"),
     (remove_heads, {0: torch.zeros(4, dtype=torch.bool)}, "a mask of 4 for 3 heads"),
     (remove_heads, {0: torch.zeros(3, dtype=torch.bool)}, "all 3 heads")],
)  # fmt: skip
def test_what_cannot_be_removed_is_refused_in_one_line(lab, remove, keep, message):
    with pytest.raises(ConfigError, match=message) as found:
        remove(lab.network(), keep)
    assert "\n" not in str(found.value)


def test_a_shrunk_network_is_loaded_in_a_fresh_process(lab, tmp_path, repository):
    small = remove_heads(remove_neurons(lab.network(layer_scale=True), NEURONS), HEADS)
    images = lab.images()
    save_network(tmp_path / "small", small, note="x")
    save_model(tmp_path / "io", {"images": images, "logits": small(images)}, {})
    code = (
        "import sys, torch; from pathlib import Path; from shared.checkpoint import load_model\n"
        "from sparsevit.shrink import load_network\n"
        "folder = Path(sys.argv[1]); network = load_network(folder / 'small'); io, _ = load_model(folder / 'io')\n"
        "torch.set_num_threads(1)\n"
        "assert torch.equal(network(io['images']), io['logits']); print(network.size.blocks[1].mlp)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"
    tensors, config = load_model(tmp_path / "small")
    assert not [name for name in tensors if name.endswith(("_orig", "_mask"))]
    assert config["note"] == "x"


def test_a_network_that_is_not_as_its_config_says_is_refused(lab, tmp_path):
    network = lab.network()
    save_model(tmp_path / "a", network.state_dict(), {"size": lab.uneven_size().as_dict()})
    save_model(tmp_path / "b", {"x": torch.zeros(1)}, {})
    save_model(tmp_path / "c", {n: t for n, t in network.state_dict().items() if n != "cls"},
               {"size": network.size.as_dict()})  # fmt: skip
    for name, message in (("a", "is not as config.json describes"), ("b", "no 'size'"), ("c", "cls is not")):
        with pytest.raises(CheckpointError, match=message):
            load_network(tmp_path / name)
