"""The networks and the merge: oracles T1 to T5 and T19."""

import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional

from lightcnn import fused
from lightcnn.method import GROUPS
from lightcnn.model import DROPOUT, MergedCNN, Submodel, feature_side, merge
from shared.errors import CheckpointError, ConfigError, DataError

SHAPES = [(1, 28, 6930, 14862, 5), (3, 32, 9310, 19622, 6)]
each_shape = pytest.mark.parametrize(("channels", "size", "single", "merged", "side"), SHAPES)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@each_shape
def test_the_networks_have_the_papers_parameters_and_no_buffer(channels, size, single, merged, side):
    branch, whole = Submodel(channels, size), MergedCNN(channels, size)
    assert (count(branch), count(whole)) == (single, merged)
    rows = [count(m) for m in (branch.conv1, branch.conv2, branch.fc)]
    assert rows == [100, 1820, 5010] if channels == 1 else rows == [280, 1820, 7210]
    assert [count(whole.fc1), count(whole.fc2), count(whole.head_a)] == [672, 330, rows[2]]
    for module in (branch, whole):
        assert list(module.buffers()) == []
        assert not [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@each_shape
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_shapes_and_empty_batches(channels, size, single, merged, side, batch):
    images = torch.rand(batch, channels, size, size)
    branch = Submodel(channels, size)
    sides = {28: [26, 13, 11, 5], 32: [30, 15, 13, 6]}[size]
    first = branch.conv1(images)
    second = branch.conv2(functional.max_pool2d(first, 2))
    assert [
        x.shape[-1] for x in (first, functional.max_pool2d(first, 2), second, functional.max_pool2d(second, 2))
    ] == sides
    assert feature_side(size) == side == sides[-1]
    assert branch.features(images).shape == (batch, 20, side, side)
    assert branch(images).shape == MergedCNN(channels, size)(images).shape == (batch, 10)


@pytest.mark.parametrize("shape", [(2, 1, 27, 27), (2, 2, 28, 28), (2, 1, 28, 27), (1, 28, 28)])
def test_images_that_do_not_fit_are_refused_with_a_message(shape):
    for network in (Submodel(1, 28), MergedCNN(1, 28)):
        with pytest.raises(DataError, match=r"takes images \[B, 1, 28, 28\], found"):
            network(torch.zeros(shape))


@pytest.mark.parametrize(("channels", "size"), [(0, 28), (1, 9)])
def test_images_that_no_network_takes_are_refused(channels, size):
    for kind in (Submodel, MergedCNN):
        with pytest.raises(ConfigError, match="do not fit the network"):
            kind(channels, size)
    assert Submodel(1, 10)(torch.rand(2, 1, 10, 10)).shape == (2, 10)


@pytest.mark.parametrize(("channels", "size", "weight_bytes"), [(1, 28, 59448), (3, 32, 78488)])
def test_weight_bytes(channels, size, weight_bytes):
    state = MergedCNN(channels, size).state_dict()
    assert sum(t.numel() * t.element_size() for t in state.values()) == weight_bytes
    assert weight_bytes < len(save(dict(state))) <= weight_bytes + 4096


@each_shape
def test_a_head_is_its_submodels_dense_layer_as_a_convolution(channels, size, single, merged, side):
    images = torch.rand(7, channels, size, size)
    a, b = Submodel(channels, size, seed=1), Submodel(channels, size, seed=2)
    whole = merge(a, b)
    for branch, head, found in zip((a, b), (whole.head_a, whole.head_b), whole.branches(images), strict=True):
        torch.testing.assert_close(head(branch.features(images)).flatten(1), branch(images), atol=1e-5, rtol=0)
        torch.testing.assert_close(found, branch(images), atol=1e-5, rtol=0)
        wrong = branch.fc.weight.view(10, side, side, 20).permute(0, 3, 1, 2)  # the order of NHWC
        other = functional.conv2d(branch.features(images), wrong, branch.fc.bias).flatten(1)
        assert (other - branch(images)).abs().max() > 0.05


@each_shape
@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_the_merged_model_is_its_definition(channels, size, single, merged, side, activation):
    images = torch.rand(5, channels, size, size)
    whole = merge(Submodel(channels, size, seed=1), Submodel(channels, size, seed=2), "both", activation).eval()
    w = whole.state_dict()
    outputs = []
    for s in "ab":
        h = images
        for layer in (f"conv_{s}1", f"conv_{s}2"):
            h = functional.max_pool2d(functional.conv2d(h, w[f"{layer}.weight"], w[f"{layer}.bias"]).relu(), 2)
        h = functional.conv2d(h, w[f"head_{s}.weight"], w[f"head_{s}.bias"]).flatten(1)
        outputs.append(h.relu() if activation == "relu" else h)
    h = functional.linear(torch.cat(outputs, 1), w["fc1.weight"], w["fc1.bias"]).relu()
    torch.testing.assert_close(whole(images), functional.linear(h, w["fc2.weight"], w["fc2.bias"]), atol=1e-5, rtol=0)


def test_with_a_summing_head_the_merged_model_gives_the_sum_of_the_branches_positive_logits():
    images = torch.rand(5, 1, 28, 28)
    a, b = Submodel(1, 28, seed=1), Submodel(1, 28, seed=2)
    whole = merge(a, b).eval()
    with torch.no_grad():
        for p in (*whole.fc1.parameters(), *whole.fc2.parameters()):
            p.zero_()
        for i in range(10):
            whole.fc1.weight[i, i] = whole.fc1.weight[i, 10 + i] = whole.fc2.weight[i, i] = 1
    torch.testing.assert_close(whole(images), a(images).relu() + b(images).relu(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("transfer", "copied"), [("both", "ab"), ("a_only", "a"), ("none", "")])
def test_head_transfer_says_which_heads_are_copied_and_convolutions_always_are(transfer, copied):
    branches = {"a": Submodel(1, 28, seed=1), "b": Submodel(1, 28, seed=2)}
    state = merge(branches["a"], branches["b"], transfer).state_dict()
    for side, branch in branches.items():
        own = branch.state_dict()
        assert torch.equal(state[f"head_{side}.weight"].flatten(1), own["fc.weight"]) == (side in copied)
        for n in "12":
            assert torch.equal(state[f"conv_{side}{n}.weight"], own[f"conv{n}.weight"])
            assert torch.equal(state[f"conv_{side}{n}.bias"], own[f"conv{n}.bias"])


def test_the_merged_model_holds_copies():
    a, b = Submodel(1, 28, seed=1), Submodel(1, 28, seed=2)
    before = [{n: p.clone() for n, p in branch.state_dict().items()} for branch in (a, b)]
    whole = merge(a, b)
    with torch.no_grad():
        for p in whole.parameters():
            p.add_(1)
    for branch, kept in zip((a, b), before, strict=True):
        assert all(torch.equal(p, kept[n]) for n, p in branch.state_dict().items())


def test_branches_of_different_data_sets_or_other_widths_are_not_merged():
    with pytest.raises(CheckpointError, match="trained on one data set"):
        merge(Submodel(1, 28), Submodel(3, 32))
    with pytest.raises(CheckpointError, match="other widths"):
        merge(Submodel(1, 28, filters=(4, 8)), Submodel(1, 28, filters=(4, 8)))


def test_the_seed_alone_makes_the_first_weights():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = MergedCNN(1, 28, seed=3).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    again, other = MergedCNN(1, 28, seed=3).state_dict(), MergedCNN(1, 28, seed=4).state_dict()
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["fc1.weight"], other["fc1.weight"])


def test_first_weights_have_keras_distributions():
    net = MergedCNN(1, 28, seed=0)
    fc1, head = net.fc1.weight, net.head_a.weight
    wanted = (2 / 20) ** 0.5
    assert abs(fc1.std() / wanted - 1) < 0.1
    assert fc1.abs().max() <= 2 * wanted / 0.8796 + 1e-6  # cut at two deviations of the normal
    bound = (6 / (25 * 20 + 25 * 10)) ** 0.5
    assert bound * 0.99 < head.abs().max() <= bound
    bound = (6 / (32 + 10)) ** 0.5
    assert bound * 0.95 < net.fc2.weight.abs().max() <= bound
    assert all(not bool(p.any()) for n, p in net.named_parameters() if n.endswith("bias"))


@pytest.mark.parametrize("seed", range(5))
def test_the_initial_loss_is_that_of_guessing(images, labels, seed):
    for network in (Submodel(1, 28, seed=seed), MergedCNN(1, 28, seed=seed)):
        with torch.no_grad():
            assert 2.2 < functional.cross_entropy(network.eval()(images), labels) < 3.3


@each_shape
@pytest.mark.parametrize("lanes", [1, 2, 5])
def test_the_fused_submodels_are_the_plain_ones(channels, size, single, merged, side, lanes):
    images = torch.rand(lanes, 6, channels, size, size)
    nets = [Submodel(channels, size, seed=s) for s in range(lanes)]
    stacked = {n: t.requires_grad_() for n, t in fused.stack([net.state_dict() for net in nets]).items()}
    found = fused.submodel_logits(stacked, images)
    wanted = torch.stack([net(x) for net, x in zip(nets, images, strict=True)])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    found.square().mean().backward()
    wanted.square().mean().backward()
    for s, net in enumerate(nets):
        for name, p in net.named_parameters():
            torch.testing.assert_close(stacked[name].grad[s], p.grad, atol=1e-5, rtol=1e-4)


@each_shape
@pytest.mark.parametrize("lanes", [1, 2, 5])
@pytest.mark.parametrize("activation", ["relu", "linear"])
def test_the_fused_merged_models_are_the_plain_ones(channels, size, single, merged, side, lanes, activation):
    from lightcnn.networks import Merged

    images = torch.rand(lanes, 6, channels, size, size)
    nets = [merge(Submodel(channels, size, seed=s), Submodel(channels, size, seed=9 + s), "both", activation, s).eval()
            for s in range(lanes)]  # fmt: skip
    stacked = fused.stack([fused.fuse(net.state_dict()) for net in nets])
    network = Merged(channels, size, 10, activation)
    wanted = torch.stack([net(x) for net, x in zip(nets, images, strict=True)])
    torch.testing.assert_close(network.forward(stacked, images, GROUPS), wanted, atol=1e-5, rtol=0)
    for cut in range(1, 5):  # the frozen part and the rest are the whole
        half = network.forward(stacked, images, GROUPS[:cut])
        torch.testing.assert_close(network.forward(stacked, half, GROUPS[cut:]), wanted, atol=1e-5, rtol=0)
    assert DROPOUT == 0.5
    kept = torch.rand(lanes, 6, 32) < 0.5
    joined = network.forward(stacked, images, GROUPS[:3])
    dropped = network.forward(stacked, images, GROUPS, kept)
    for s, net in enumerate(nets):
        again = net.fc2(net.fc1(joined[s]).relu() * kept[s] / (1 - DROPOUT))
        torch.testing.assert_close(dropped[s], again, atol=1e-5, rtol=0)
    for s, net in enumerate(nets):
        back = fused.unfuse(fused.unstack(stacked, s))
        assert back.keys() == net.state_dict().keys()
        assert all(torch.equal(back[n], t) for n, t in net.state_dict().items())
