"""Backbones and heads: sizes by formula and by number, non-negative features, seeds, refusals."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fedloge.model import Network, build_backbone, linear_head
from shared.errors import ConfigError

# name, channels, image size -> feature width, parameters
NETWORKS = [
    ("resnet18", 3, 32, 512, 11_168_832),
    ("resnet34", 3, 32, 512, 21_276_992),
    ("resnet50", 3, 64, 2048, 23_508_032),
    ("mlp", 1, 14, 64, 33_472),
    ("convnet", 3, 16, 64, 23_696),
    ("convnet", 1, 8, 64, 23_408),
]


def conv(before, after, kernel):
    return before * after * kernel**2 + 2 * after  # no bias, then batch norm's scale and shift


def resnet_size(depths, channels, bottleneck, stem):
    total, before = conv(channels, 64, stem), 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        after = 4 * width if bottleneck else width
        for _ in range(depth):
            if bottleneck:
                total += conv(before, width, 1) + conv(width, width, 3) + conv(width, after, 1)
            else:
                total += conv(before, width, 3) + conv(width, after, 3)
            total += conv(before, after, 1) if before != after else 0  # the shortcut
            before = after
    return total


def size_by_formula(name, channels, image_size):
    if name == "mlp":
        return (channels * image_size**2 + 1) * 128 + (128 + 1) * 64
    if name == "convnet":
        return conv(channels, 16, 3) + conv(16, 32, 3) + conv(32, 64, 3)
    depths = {"resnet18": (2, 2, 2, 2)}.get(name, (3, 4, 6, 3))
    return resnet_size(depths, channels, name == "resnet50", 7 if name == "resnet50" else 3)


@pytest.mark.parametrize(("name", "channels", "image_size", "width", "parameters"), NETWORKS)
def test_parameter_count_is_the_formula_and_the_pinned_number(name, channels, image_size, width, parameters):
    backbone = build_backbone(name, channels, image_size, seed=0)
    assert sum(p.numel() for p in backbone.parameters()) == parameters == size_by_formula(name, channels, image_size)


@pytest.mark.parametrize(("name", "channels", "image_size", "width", "parameters"), NETWORKS)
def test_features_are_non_negative_of_the_named_width_and_every_parameter_is_used(
    name, channels, image_size, width, parameters
):
    backbone = build_backbone(name, channels, image_size, seed=0)
    images = torch.randn(3, channels, image_size, image_size, generator=torch.Generator().manual_seed(0))
    features = backbone(images)
    assert features.shape == (3, width)
    assert backbone.feature_dim == width
    assert features.min() >= 0
    assert features.max() > 0
    features.square().sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    backbone.eval()
    with torch.no_grad():
        torch.testing.assert_close(backbone(images[:1]), backbone(images)[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "image_size"), [("resnet18", 8), ("resnet34", 8), ("resnet50", 32), ("convnet", 4)])
def test_the_smallest_image_works_and_a_smaller_one_is_refused(name, image_size):
    backbone = build_backbone(name, 3, image_size, seed=0).eval()
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, image_size, image_size)).isfinite().all()
    with pytest.raises(ConfigError, match=f"{name} needs images of at least {image_size} pixels"):
        build_backbone(name, 3, image_size - 1, seed=0)


def test_cifar_stem_keeps_the_resolution_and_the_imagenet_stem_quarters_it():
    shapes = {}
    for name in ("resnet18", "resnet50"):
        backbone = build_backbone(name, 1, 32, seed=0).eval()
        backbone.layers.layer1.register_forward_hook(lambda _, x, __, name=name: shapes.update({name: x[0].shape[-1]}))
        with torch.no_grad():
            backbone(torch.zeros(1, 1, 32, 32))
    assert shapes == {"resnet18": 32, "resnet50": 8}


@pytest.mark.parametrize("name", ["mlp", "convnet", "resnet18"])
def test_initialisation_depends_on_the_seed_alone_and_leaves_the_global_generator(name):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = build_backbone(name, 3, 16, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = (build_backbone(name, 3, 16, seed=seed).state_dict() for seed in (7, 8))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_unknown_backbone_is_refused_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        build_backbone("resnet-18", 3, 32, seed=0)
    with pytest.raises(ConfigError, match="choose from resnet18, resnet34, resnet50, mlp, convnet"):
        build_backbone("?", 3, 32, seed=0)
    with pytest.raises(ConfigError, match="at least 1 channel"):
        build_backbone("mlp", 0, 32, seed=0)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_head_fills_its_range_and_depends_on_the_seed_alone(bias):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    head = linear_head(512, 100, bias, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(head, nn.Linear)
    assert (head.bias is not None) == bias
    bound = 1 / math.sqrt(512)
    for parameter in head.parameters():
        assert parameter.requires_grad
        assert parameter.abs().max() <= bound
        assert parameter.abs().max() > 0.9 * bound
    assert head.weight.norm(dim=1).mean().item() == pytest.approx(1 / math.sqrt(3), rel=0.02)
    assert torch.equal(head.weight, linear_head(512, 100, bias, seed=0).weight)
    assert not torch.equal(head.weight, linear_head(512, 100, bias, seed=1).weight)


def test_importing_the_models_does_not_import_torchvision():
    program = "import sys, fedloge.model; sys.exit('torchvision' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0


def test_heads_are_computed_in_float32_also_under_autocast():
    network = Network({"backbone": build_backbone("mlp", 1, 14, 0), "classifier": linear_head(64, 10, True, 1)})
    images = torch.rand(16, 1, 14, 14)
    with torch.autocast("cpu", torch.bfloat16):
        features = network.features(images)
        logits = network.logits("classifier", features)
    assert features.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    assert torch.equal(logits, network.logits("classifier", features.float()))
