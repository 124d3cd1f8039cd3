"""Pretrained weights: every expert equals the file, torchvision's network is reproduced, misfits are refused."""

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from mdcs.model import Architecture, build_model
from mdcs.pretrained import load_pretrained
from shared.errors import CheckpointError

SMALL = Architecture("resnet_cifar", 5, experts=3, depth=14, width=4)


def single(seed=3):
    """A single small network's weights under plain names, with buffers that are not the initial ones."""
    model = build_model(Architecture("resnet_cifar", 9, depth=14, width=4, classifier="linear"), seed)
    model(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))
    state = {**model.trunk.state_dict(), **model.experts[0].state_dict()}
    return {**state, "fc.weight": model.heads[0].weight.detach(), "fc.bias": model.heads[0].bias.detach()}


def assert_holds(model, weights):
    for part in (model.trunk, *model.experts):
        for key, value in part.state_dict().items():
            assert torch.equal(value, weights[key]), key


@pytest.mark.parametrize("separate", [False, True])
def test_trunk_and_every_expert_equal_the_file_and_classifiers_are_fresh(tmp_path, separate):
    weights, path = single(), tmp_path / "weights.pth"
    torch.save(weights, path)
    model = build_model(Architecture("resnet_cifar", 5, 3, depth=14, width=4, separate=separate), seed=0)
    heads = [head.weight.clone() for head in model.heads]
    assert load_pretrained(model, path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_holds(model, weights)
    assert all(torch.equal(head.weight, before) for head, before in zip(model.heads, heads, strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_experts_do_not_share_the_loaded_weights(tmp_path):
    torch.save(single(), tmp_path / "weights.pth")
    model = build_model(SMALL, seed=0)
    load_pretrained(model, tmp_path / "weights.pth")
    with torch.no_grad():
        model.experts[1].layer2[0].conv1.weight.zero_()
    assert model.experts[0].layer2[0].conv1.weight.abs().min() > 0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: {"state_dict": weights, "epoch": 90},
        lambda weights: {"model": weights, "args": {"lr": 0.1}},
        lambda weights: {f"module.{key}": value for key, value in weights.items()},
        lambda weights: {"epoch": 90, "state_dict": {f"module.{key}": value for key, value in weights.items()}},
        lambda weights: {key: value for key, value in weights.items() if not key.startswith("fc.")},
    ],
)
def test_wrappers_and_a_missing_classifier_make_no_difference(tmp_path, wrap):
    weights = single()
    torch.save(wrap(weights), tmp_path / "weights.pth")
    model = build_model(SMALL, seed=0)
    load_pretrained(model, tmp_path / "weights.pth")
    assert_holds(model, weights)


def test_safetensors_are_read_too(tmp_path):
    weights, path = single(), tmp_path / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in weights.items()}, path)
    model = build_model(SMALL, seed=0)
    assert load_pretrained(model, path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert_holds(model, weights)


def test_files_older_than_num_batches_tracked_are_read(tmp_path):
    weights = {key: value for key, value in single().items() if not key.endswith("num_batches_tracked")}
    torch.save(weights, tmp_path / "weights.pth", _use_new_zipfile_serialization=False)
    model = build_model(SMALL, seed=0)
    load_pretrained(model, tmp_path / "weights.pth")
    zero = {key: torch.tensor(0) for key in single() if key.endswith("num_batches_tracked")}
    assert_holds(model, {**weights, **zero})


def test_torchvisions_resnet50_gives_each_expert_torchvisions_features(tmp_path):
    import torchvision

    original = torchvision.models.resnet50(weights=None)
    original.fc = torch.nn.Identity()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        original(images)  # buffers of its own
        torch.save(original.state_dict(), tmp_path / "resnet50.pth")
        model = build_model(Architecture("resnet50", 10, experts=2, share_stage3=True), seed=0)
        load_pretrained(model, tmp_path / "resnet50.pth")
        features, expected = model.eval().features(images), original.eval()(images)
    assert torch.equal(features[:, 0], features[:, 1])
    torch.testing.assert_close(features[:, 0], expected)


@pytest.mark.parametrize(
    ("name", "torchvisions"),
    [("resnet50", "resnet50"), ("resnext50", "resnext50_32x4d"), ("resnet152", "resnet152")],
)
def test_large_networks_have_torchvisions_names_and_shapes_in_torchvisions_order(name, torchvisions):
    import torchvision

    with torch.device("meta"):
        model = build_model(Architecture(name, 10), seed=0)
        original = torchvision.models.get_model(torchvisions)
    ours = [*model.trunk.state_dict().items(), *model.experts[0].state_dict().items()]
    theirs = [item for item in original.state_dict().items() if not item[0].startswith("fc.")]
    assert [(key, value.shape) for key, value in ours] == [(key, value.shape) for key, value in theirs]
    own, other = ([(m.stride, m.padding, m.groups) for m in convolutions(net)] for net in (model, original))
    assert own == other


def convolutions(network):
    return [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]


def without(key):
    return lambda weights: {name: value for name, value in weights.items() if name != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("layer3.1.conv2.weight"),
            r"has no layer3.1.conv2.weight, expected one of shape \[16, 16, 3, 3\]; give",
        ),
        (without("bn1.running_var"), r"has no bn1.running_var, expected one of shape \[4\]; give"),
        (
            lambda weights: {**weights, "conv1.weight": torch.zeros(4, 1, 3, 3)},
            r"conv1.weight has the shape \[4, 1, 3, 3\], expected \[4, 3, 3, 3\]; give",
        ),
        (
            lambda weights: {**weights, "layer3.0.bn1.weight": torch.zeros(12)},
            r"layer3.0.bn1.weight has the shape \[12\], expected \[16\]; give",
        ),
        (
            lambda weights: {**weights, "layer4.0.bn1.bias": torch.zeros(4)},
            r"'layer4.0.bn1.bias' is in no stage.*; give",
        ),
        (lambda weights: {**weights, "fcc.bias": torch.zeros(4)}, r"'fcc.bias' is in no stage.*; give"),
        (lambda weights: {**weights, "epoch": 3}, r"is not a state dict of tensors; save"),
        (lambda weights: [*weights.values()], r"is not a state dict of tensors; save"),
        (lambda weights: {"state_dict": {}}, r"has no conv1.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line_and_change_nothing(tmp_path, change, message):
    path = tmp_path / "weights.pth"
    torch.save(change(single()), path)
    model = build_model(SMALL, seed=0)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(model, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    fresh = build_model(SMALL, seed=0).state_dict()
    assert all(torch.equal(value, fresh[key]) for key, value in model.state_dict().items())


def test_reduced_networks_refuse_the_full_width(tmp_path):
    torch.save(single(), tmp_path / "weights.pth")
    model = build_model(Architecture("resnet_cifar", 5, 3, reduced=True, depth=14, width=4), seed=0)
    with pytest.raises(CheckpointError, match=r"layer2.0.conv1.weight has the shape \[8, .*expected \[6, "):
        load_pretrained(model, tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize(
    "damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"<html>no</html>"]
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, name, damage):
    path = tmp_path / name
    if path.suffix == ".pth":
        torch.save(single(), path)
    else:
        save_file({key: value.contiguous() for key, value in single().items()}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"is damaged or holds more than weights \(\w+\); download") as caught:
        load_pretrained(build_model(SMALL, seed=0), path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"conv1.weight": Trap()}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match="holds more than weights"):
        load_pretrained(build_model(SMALL, seed=0), tmp_path / "weights.pth")
    assert not (tmp_path / "sprung").exists()


def test_a_missing_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent.pth: cannot be read: No such file or directory; download"):
        load_pretrained(build_model(SMALL, seed=0), tmp_path / "absent.pth")
