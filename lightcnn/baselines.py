"""What the paper's method is compared with: networks trained in one go."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightcnn.model import conv, glorot_uniform_, he_normal_, linear
from lightcnn.networks import Merged, Modules, Network, Submodels

WIDE = (18, 34)  # filters of a single submodel with 14,232 parameters for one channel, 18,296 for colour images


class ImageShape(NamedTuple):
    """What a network must know of the data."""

    in_channels: int
    image_size: int
    num_classes: int


@dataclass(frozen=True)
class Baseline:
    """A network, what its training images go through, and how it is optimised.

    images: "clean"; "paper" is the augmentation of the second branch on all images; "mild" is +-10 degrees and +-2
    pixels; "shift" is +-2 whole pixels, and flips but on digits.
    optimizer: "nadam" as in stage 1, "one_cycle" is SGD with a rate that rises and falls.
    peak_lr, max_epochs: in place of the configuration's.
    """

    build: Callable[[ImageShape], Network]
    images: Literal["clean", "paper", "mild", "shift"] = "clean"
    optimizer: Literal["nadam", "one_cycle"] = "nadam"
    peak_lr: float | None = None
    max_epochs: int | None = None


class LeNet5(nn.Module):
    """LeCun et al. 1998 with ReLU and max-pool: 5x5 convolutions 6 and 16, dense 120, 84, K; 61,706 parameters.

    28 pixels are padded to 32.
    """

    def __init__(self, shape: ImageShape, seed: int) -> None:
        super().__init__()
        self.padding = max(0, (32 - shape.image_size) // 2)
        side = ((shape.image_size + 2 * self.padding - 4) // 2 - 4) // 2
        self.conv1, self.conv2 = conv(shape.in_channels, 6, 5), conv(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = linear(16 * side**2, 120), linear(120, 84), linear(84, shape.num_classes)
        generator = torch.Generator().manual_seed(seed)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2):
            he_normal_(layer, generator)
        glorot_uniform_(self.fc3, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K]."""
        hidden = functional.pad(images, (self.padding,) * 4)
        hidden = functional.relu(functional.max_pool2d(self.conv1(hidden), 2))
        hidden = functional.relu(functional.max_pool2d(self.conv2(hidden), 2)).flatten(1)
        return cast(Tensor, self.fc3(functional.relu(self.fc2(functional.relu(self.fc1(hidden))))))


class BnGap(nn.Module):
    """A modern net of at most 14,862 parameters: 3x3 convolutions with batch norm, global average pooling.

    16, 16, pool, 24, 24, pool, 1x1 32, mean, dense K: 12,410 parameters for one channel.
    """

    def __init__(self, shape: ImageShape, seed: int) -> None:
        super().__init__()
        widths = (shape.in_channels, 16, 16, 24, 24)
        for number in range(1, 5):
            block = nn.Conv2d(widths[number - 1], widths[number], 3, padding=1, bias=False)
            self.add_module(f"conv{number}", block)
            self.add_module(f"norm{number}", nn.BatchNorm2d(widths[number]))
        self.mix, self.norm5, self.fc = (
            nn.Conv2d(24, 32, 1, bias=False),
            nn.BatchNorm2d(32),
            linear(32, shape.num_classes),
        )
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                he_normal_(module, generator)
        glorot_uniform_(self.fc, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K]."""
        hidden = images
        for number in range(1, 5):
            hidden = functional.relu(self.get_submodule(f"norm{number}")(self.get_submodule(f"conv{number}")(hidden)))
            if number in (2, 4):
                hidden = functional.max_pool2d(hidden, 2)
        hidden = functional.relu(self.norm5(self.mix(hidden)))
        return cast(Tensor, self.fc(hidden.mean((2, 3))))


class Peer(nn.Module):
    """One of torchvision's small networks, its first strides dropped for images of some 30 pixels.

    Grey images are given to it as three equal channels, so its parameters are the usual ones. Its dropout is off: it
    draws from torch's own generator, which no seed of ours resumes. SqueezeNet's logits are not cut off at zero: with
    that ReLU all of them die within 80 steps on such images.
    """

    def __init__(self, name: str, shape: ImageShape, seed: int, **options: Any) -> None:
        super().__init__()
        import torchvision  # type: ignore[import-untyped]  # here because it costs seconds

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.net = torchvision.models.get_model(name, weights=None, num_classes=shape.num_classes, **options)
        for module in self.net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if name == "mobilenet_v2":
            self.net.features[0][0].stride = (1, 1)
            self.net.features[2].conv[1][0].stride = (1, 1)
        elif name == "squeezenet1_1":
            self.net.features[0].stride, self.net.features[0].padding = (1, 1), (1, 1)
            self.net.classifier[2] = nn.Identity()
        else:
            self.net.conv1[0].stride, self.net.maxpool = (1, 1), nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K]."""
        return cast(Tensor, self.net(images.expand(-1, 3, -1, -1)))


def _submodel(shape: ImageShape) -> Network:
    return Submodels(*shape)


def _merged(shape: ImageShape) -> Network:
    return Merged(*shape, "relu")


def _wide(shape: ImageShape) -> Network:
    return Submodels(*shape, WIDE)


def _peer(name: str, optimizer: Literal["nadam", "one_cycle"] = "one_cycle", **options: Any) -> Baseline:
    """A network of torchvision in the recipe of `bn_gap`."""

    def build(shape: ImageShape) -> Network:
        """The network for images of this shape, one a seed."""
        return Modules(lambda seed: Peer(name, shape, seed, **options))

    return Baseline(build, "shift", optimizer, peak_lr=0.1, max_epochs=20)


BASELINES: dict[str, Baseline] = {
    "submodel": Baseline(_submodel),  # half of the network
    "scratch": Baseline(_merged),  # the merged network without the recipe
    "scratch_augmented": Baseline(_merged, "paper"),
    "scratch_mild": Baseline(_merged, "mild"),
    "wide": Baseline(_wide),  # as many parameters in one branch
    "scratch_one_cycle": Baseline(_merged, "clean", "one_cycle"),
    "wide_one_cycle": Baseline(_wide, "clean", "one_cycle"),
    "lenet5": Baseline(lambda shape: Modules(lambda seed: LeNet5(shape, seed))),
    "mobilenet_v2_010": _peer("mobilenet_v2", width_mult=0.1),
    "mobilenet_v2_025": _peer("mobilenet_v2", width_mult=0.25),
    "mobilenet_v2_035": _peer("mobilenet_v2", width_mult=0.35),
    "squeezenet": _peer("squeezenet1_1", "nadam"),  # without batch norm it does not train by the one-cycle SGD
    "shufflenet_v2": _peer("shufflenet_v2_x0_5"),
    "bn_gap": Baseline(  # untuned: a rate that suits batch norm, fewer epochs than the paper's method may take
        lambda shape: Modules(lambda seed: BnGap(shape, seed)), "shift", "one_cycle", peak_lr=0.1, max_epochs=20
    ),
}
