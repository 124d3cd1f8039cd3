"""Multi-expert networks: parameters, costs and shapes of the paper's."""

import contextlib
import functools

import pytest
import torch
from torch import nn

from mdcs.algorithm import architecture, build_method
from mdcs.config import Config
from mdcs.model import Architecture, build_model
from shared.cli import REPOSITORY
from shared.config import load

# architecture -> parameters, 10^9 multiply-accumulates an image, D
NETWORKS = [
    (Architecture("resnet_cifar", 10), 464_144, 0.0689, 64),
    (Architecture("resnet_cifar", 100), 469_904, 0.0689, 64),
    (Architecture("resnet_cifar", 10, classifier="linear"), 464_154, 0.0689, 64),
    (Architecture("resnet_cifar", 100, classifier="linear"), 470_004, 0.0689, 64),
    (Architecture("resnet_cifar", 10, reduced=True), 272_848, 0.0495, 48),
    (Architecture("resnet_cifar", 100, reduced=True), 277_168, 0.0495, 48),
    (Architecture("resnet_cifar", 10, 3, reduced=True), 770_896, 0.1004, 48),
    (Architecture("resnet_cifar", 100, 3, reduced=True), 783_856, 0.1004, 48),
    (Architecture("resnet_cifar", 100, 2, reduced=True), 530_512, 0.0749, 48),
    (Architecture("resnet_cifar", 100, 4, reduced=True), 1_037_200, 0.1258, 48),
    (Architecture("resnet_cifar", 100, 6, reduced=True), 1_543_888, 0.1767, 48),
    (Architecture("resnet_cifar", 10, 3), 1_344_784, 0.1585, 64),
    (Architecture("resnet_cifar", 100, 3), 1_362_064, 0.1585, 64),
    (Architecture("resnet_cifar", 100, 3, separate=True), 3 * 469_904, 3 * 0.06887, 64),
    (Architecture("resnet50", 1000, 3, reduced=True), 43_677_248, 5.77, 1536),
    (Architecture("resnet50", 8142, 3, reduced=True), 76_587_584, 5.80, 1536),
    (Architecture("resnext50", 1000, 3, reduced=True), 42_889_024, 6.05, 1536),
    (Architecture("resnet152", 365, 3), 171_543_616, 29.2, 2048),
    (Architecture("resnet152", 365, 3, share_stage3=True), 90_315_840, 13.1, 2048),
    (Architecture("resnet50", 1000, classifier="linear"), 25_557_032, 4.09, 2048),
    (Architecture("resnext50", 1000, classifier="linear"), 25_028_904, 4.23, 2048),
    (Architecture("resnet50", 1000, 2, classifier="linear", separate=True), 2 * 25_557_032, 2 * 4.09, 2048),
    (Architecture("resnet152", 365), 58_891_328, 11.5, 2048),
]


def on_meta(architecture):
    with torch.device("meta"):
        return build_model(architecture, seed=0)


@pytest.mark.parametrize(("architecture", "parameters", "cost", "width"), NETWORKS)
def test_parameters_multiplications_and_feature_width_are_the_papers(architecture, parameters, cost, width):
    model = on_meta(architecture).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters

    products = [head.weight.numel() for head in model.heads]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, _, y: products.append(m.weight[0].numel() * y[0].numel()))
    size = 32 if architecture.name == "resnet_cifar" else 224
    features = model.features(torch.empty(2, 3, size, size, device="meta"))
    assert features.shape == (2, architecture.experts, width)
    assert sum(products) / 1e9 == pytest.approx(cost, rel=3e-3)  # rounded, and one figure for C = 10 and 100


@pytest.mark.parametrize(
    ("architecture", "size", "expected"),
    [
        (Architecture("resnet_cifar", 10, 1), 32, [(16, 32), (32, 16), (64, 8)]),
        (Architecture("resnet_cifar", 10, 1, reduced=True), 28, [(16, 28), (24, 14), (48, 7)]),
        (Architecture("resnet_cifar", 10, 1, reduced=True, width=8), 14, [(8, 14), (12, 7), (24, 4)]),
        (Architecture("resnet50", 10, 1, reduced=True), 224, [(256, 56), (512, 28), (768, 14), (1536, 7)]),
        (Architecture("resnet152", 10, 1), 224, [(256, 56), (512, 28), (1024, 14), (2048, 7)]),
    ],
)
def test_stages_have_the_papers_channels_and_halve_the_image(architecture, size, expected):
    model, shapes = on_meta(architecture).eval(), []
    for part in (model.trunk, *model.experts):
        for name, module in part.named_children():
            if name.startswith("layer"):
                module.register_forward_hook(lambda _, __, y: shapes.append((y.shape[1], y.shape[2])))
    model.features(torch.empty(1, 3, size, size, device="meta"))
    assert shapes == expected


def test_the_trunk_ends_before_stage_2_or_3_and_later_only_if_asked():
    def stages(**settings):
        model = on_meta(Architecture(num_classes=10, experts=2, **settings))
        assert len(model.experts) == len(model.heads) == 2
        return [[n for n, _ in part.named_children() if "layer" in n] for part in (model.trunk, model.experts[1])]

    assert stages(name="resnet_cifar") == [["layer1"], ["layer2", "layer3"]]
    assert stages(name="resnet50") == [["layer1", "layer2"], ["layer3", "layer4"]]
    assert stages(name="resnet152", share_stage3=True) == [["layer1", "layer2", "layer3"], ["layer4"]]
    assert stages(name="resnet_cifar", separate=True) == [[], ["layer1", "layer2", "layer3"]]
    assert stages(name="resnet50", separate=True) == [[], ["layer1", "layer2", "layer3", "layer4"]]


def test_resnext_has_32_groups_and_inner_widths_of_384_and_768():
    expert = on_meta(Architecture("resnext50", 10, reduced=True)).experts[0]
    for stage, width in ((expert.layer3, 384), (expert.layer4, 768)):
        assert all((b.conv2.out_channels, b.conv2.groups) == (width, 32) for b in stage)
        assert [b.conv2.stride for b in stage] == [(2, 2)] + [(1, 1)] * (len(stage) - 1)
        assert stage[0].conv1.stride == (1, 1)
        assert stage[0].downsample[0].stride == (2, 2)


COUNTS = {"cifar10": 10, "cifar100": 100, "imagenet_lt": 1000, "places_lt": 365, "inaturalist18": 8142, "sample": 10}


@functools.cache  # many files have one network
def shape_of_logits(network: Architecture, images: int, side: int) -> torch.Size:
    """Build the network as shapes alone, run it forwards and back; every part of it must get a gradient."""
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no meta device
        model = build_model(network, 0)
        logits = model(torch.zeros(images, network.in_channels, side, side))
        logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "every part is trained"
    return logits.shape


@pytest.mark.parametrize("path", sorted((REPOSITORY / "mdcs" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_builds_its_network_and_its_loss_has_a_gradient(path):
    """Two images, twice where the method wants both views; the loss on random logits of the network's shape."""
    config = load(path, Config)
    classes, channels, images = COUNTS[config.data.name], len(config.data.mean), 4 if config.views == "both" else 2
    side = config.data.image_size or (32 if config.data.name.startswith("cifar") else 224)
    shape = shape_of_logits(architecture(config, classes, channels), images, side)
    assert shape == (images, config.experts, classes)
    method = build_method(config, [500 // (c + 1) + 1 for c in range(classes)], torch.device("cpu"))
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for epoch in (1, config.epochs):
        (gradient,) = torch.autograd.grad(method.loss(logits, torch.tensor([0, 1]), epoch), logits)
        assert gradient.isfinite().all()
        assert gradient.abs().amax(2).amin() > 0, "every expert learns from every image"
