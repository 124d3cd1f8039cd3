"""Backbones that end in non-negative features, and the linear heads on top of them."""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.errors import ConfigError

Head = tuple[Tensor, Tensor | None]  # weight [C, d] (or [K, C, d] for K clients), bias [C] (or [K, C])


@dataclass(frozen=True)
class Shape:
    """What a method must know of the data: images [in_channels, image_size, image_size], training counts [K, C]."""

    in_channels: int
    image_size: int
    counts: Tensor

    @property
    def num_classes(self) -> int:
        """C."""
        return self.counts.shape[1]


class Backbone(nn.Module):
    """A feature extractor: images [B, channels, H, W] -> features [B, feature_dim], every feature >= 0.

    It owns no layer that its output does not depend on: no projection, no classifier.
    """

    def __init__(self, layers: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.layers = layers
        self.feature_dim = feature_dim

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, feature_dim] of images [B, channels, H, W]."""
        return cast(Tensor, self.layers(images))


class Network(nn.ModuleDict):
    """The named parts of a method's network: `backbone`, and heads on its features."""

    @property
    def feature_dim(self) -> int:
        """d, the width of the features."""
        return cast(Backbone, self["backbone"]).feature_dim

    def features(self, images: Tensor, backbone: str = "backbone") -> Tensor:
        """Features [B, d] of images [B, channels, H, W]."""
        return cast(Tensor, self[backbone](images))

    def head(self, part: str) -> Head:
        """The weight [C, d] and bias [C] (or None) of a part."""
        return cast(Tensor, self[part].weight), cast("Tensor | None", getattr(self[part], "bias", None))

    def logits(self, part: str, features: Tensor) -> Tensor:
        """Logits [B, C] of features [B, d], in float32 also under autocast: logits rounded to bfloat16 tie."""
        kind = features.device.type
        if not torch.is_autocast_enabled(kind):
            return functional.linear(features, *self.head(part))
        with torch.autocast(kind, enabled=False):
            return functional.linear(features.float(), *self.head(part))


def build_backbone(name: str, in_channels: int, image_size: int, seed: int) -> Backbone:
    """Build a backbone by name, initialised from `seed` alone; torch's global generators are left as they were.

    resnet18, resnet34   3x3 stem of stride 1 without max-pool, for 32x32 images; d = 512 (paper, CIFAR)
    resnet50             7x7 stem with max-pool, for images of some 224 pixels; d = 2048
    mlp                  pixels - 128 - 64 with ReLU; d = 64
    convnet              3x3 convolutions 16-32-64 (strides 1, 2, 2) with batch norm and ReLU, global average; d = 64

    Args:
        image_size: height and width in pixels.

    Raises:
        ConfigError: an unknown name, no channel, or images too small for the strides.
    """
    if name not in _BACKBONES:
        close = difflib.get_close_matches(name, _BACKBONES, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"choose from {', '.join(_BACKBONES)}"
        raise ConfigError(f"there is no backbone '{name}'; {hint}")
    kind = _BACKBONES[name]
    if in_channels < 1:
        raise ConfigError(f"a backbone needs images of at least 1 channel, got {in_channels}")
    if image_size < kind.smallest_image:
        raise ConfigError(
            f"{name} needs images of at least {kind.smallest_image} pixels a side, got {image_size}; "
            "take a smaller backbone or larger images"
        )
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the accelerators too, which the fork does not restore.
        torch.default_generator.manual_seed(seed)
        return Backbone(kind.build(in_channels, image_size), kind.feature_dim)


def linear_head(feature_dim: int, num_classes: int, bias: bool, seed: int) -> nn.Linear:
    """Make a classifier with weight (and bias) from U(-1/sqrt(d), 1/sqrt(d)), drawn by a generator of its own.

    That is a default linear layer's range: a row starts with a length of about 1/sqrt(3) = 0.577.
    """
    head = nn.Linear(feature_dim, num_classes, bias=bias, device="meta").to_empty(device="cpu")  # draws no numbers
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(feature_dim)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return head


def head_of(state: Mapping[str, Tensor], part: str) -> Head:
    """The linear head of that name: weight and bias (or None)."""
    return state[f"{part}.weight"], state.get(f"{part}.bias")


def for_all(head: Head, num_clients: int) -> Head:
    """One head for every client: [C, d] -> [K, C, d], without copying."""
    weight, bias = head
    return weight.expand(num_clients, -1, -1), None if bias is None else bias.expand(num_clients, -1)


def some_heads(head: Head, clients: slice) -> Head:
    """The heads of some clients: [K, C, d] -> [k, C, d], without copying."""
    weight, bias = head
    return weight[clients], None if bias is None else bias[clients]


def average_clients(values: Tensor, counts: Tensor) -> Tensor:
    """Mean over clients [K, ...] -> [...], weighted by their training images; integers: the largest."""
    if not values.is_floating_point():
        return values.amax(dim=0)
    sizes = counts.sum(dim=1).to(values)
    shares = (sizes / sizes.sum()).view(-1, *[1] * (values.dim() - 1))
    return (shares * values).sum(dim=0)


def _resnet(name: str, in_channels: int, *, cifar_stem: bool) -> nn.Module:
    """Take torchvision's network (its last block ends in ReLU, then comes the average) without the classifier."""
    import torchvision  # type: ignore[import-untyped]  # here because it costs seconds

    network = torchvision.models.get_model(name, weights=None)
    if cifar_stem:
        network.conv1 = nn.Conv2d(in_channels, 64, kernel_size=3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif in_channels != 3:
        network.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.fc = nn.Identity()
    return cast(nn.Module, network)


def _resnet18(in_channels: int, image_size: int) -> nn.Module:
    return _resnet("resnet18", in_channels, cifar_stem=True)


def _resnet34(in_channels: int, image_size: int) -> nn.Module:
    return _resnet("resnet34", in_channels, cifar_stem=True)


def _resnet50(in_channels: int, image_size: int) -> nn.Module:
    return _resnet("resnet50", in_channels, cifar_stem=False)


def _mlp(in_channels: int, image_size: int) -> nn.Module:
    pixels = in_channels * image_size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())


def _convnet(in_channels: int, image_size: int) -> nn.Module:
    def stage(before: int, after: int, stride: int) -> list[nn.Module]:
        """A 3x3 convolution with batch norm and ReLU."""
        # Strides rather than max-pools: on a CPU the pools took half of the forward pass.
        return [nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    return nn.Sequential(
        *stage(in_channels, 16, 1),
        *stage(16, 32, 2),
        *stage(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class _Kind(NamedTuple):
    build: Callable[[int, int], nn.Module]
    feature_dim: int
    smallest_image: int  # pixels a side: the product of the strides


_BACKBONES: dict[str, _Kind] = {
    "resnet18": _Kind(_resnet18, 512, 8),
    "resnet34": _Kind(_resnet34, 512, 8),
    "resnet50": _Kind(_resnet50, 2048, 32),
    "mlp": _Kind(_mlp, 64, 1),
    "convnet": _Kind(_convnet, 64, 4),
}
