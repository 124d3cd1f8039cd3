"""The multi-expert networks: a shared trunk, then branches that each end in a classifier of their own."""

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.errors import ConfigError
from shared.gpu import Precision, resolve_precision

_BLOCKS = {"resnet50": (3, 4, 6, 3), "resnext50": (3, 4, 6, 3), "resnet152": (3, 8, 36, 3)}  # of the four stages
_Parts = dict[str, Callable[[], nn.Module]]  # makers of a network's layers, in the order in which they run


@dataclass(frozen=True)
class Architecture:
    """What decides the shape of a network."""

    name: Literal["resnet_cifar", "resnet50", "resnext50", "resnet152"]
    num_classes: int
    experts: int = 1
    reduced: bool = False  # narrower late stages: 24/48 of 32/64 channels, 192/384 of 256/512 planes
    classifier: Literal["cosine", "linear"] = "cosine"
    in_channels: int = 3
    depth: int = 32  # of resnet_cifar: 6n + 2
    width: int = 16  # of resnet_cifar: channels of its first stage; the others have 2x and 4x, reduced 1.5x and 3x
    separate: bool = False  # no shared trunk: the experts are whole networks (NCL)
    share_stage3: bool = False  # of the big networks: stage 3 is in the trunk as well


class CosineClassifier(nn.Module):
    """Logits 30 cos(features, class vector), without bias."""

    scale = 30.0

    def __init__(self, feature_dim: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(functional.normalize(torch.empty(num_classes, feature_dim).uniform_(-1, 1)))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [N, C] of features [N, D]; in the weights' precision, whatever autocast is on."""
        # bfloat16 would round a cosine near 1 to 1/256, a logit to 1/8.
        with torch.autocast(features.device.type, enabled=False):
            directions = functional.normalize(features.to(self.weight.dtype), eps=1e-12)
            return self.scale * functional.linear(directions, functional.normalize(self.weight, eps=1e-12))


class LinearClassifier(nn.Linear):
    """Logits W features + b."""

    def forward(self, features: Tensor) -> Tensor:
        """Logits [N, C] of features [N, D]; in the weights' precision, as the cosine classifier's."""
        with torch.autocast(features.device.type, enabled=False):
            return functional.linear(features.to(self.weight.dtype), self.weight, self.bias)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut that has no parameters ("option A" of He et al., 2016)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.added = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        """[N, before, H, W] -> [N, after, ceil(H / stride), ceil(W / stride)]."""
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(self.bn2(self.conv2(y)).add_(self.shortcut(x)), inplace=True)

    def shortcut(self, x: Tensor) -> Tensor:
        """Every `stride`-th pixel, with channels of zeros before and after the old ones."""
        if self.stride == 1 and self.added == 0:
            return x
        first = self.added // 2
        # A pool of one pixel: the gradient of a slice is not channels_last, and slows down all that comes before it.
        pixels = functional.avg_pool2d(x, 1, self.stride)
        return functional.pad(pixels, (0, 0, 0, 0, first, self.added - first))


class GlobalAverage(nn.Module):
    """The mean over all pixels: [N, D, H, W] -> [N, D]."""

    def forward(self, x: Tensor) -> Tensor:
        """As AdaptiveAvgPool2d(1) and flatten, but the gradient keeps the layout of x."""
        return functional.avg_pool2d(x, x.shape[-2:]).flatten(1)


class MultiExpert(nn.Module):
    """E experts that share a trunk: images [N, channels, H, W] -> logits [N, E, C].

    The prediction is the largest of the logits' mean over E. Layers are named as in torchvision's ResNets:
    `trunk.layer1`, `experts.0.layer3`.
    """

    def __init__(self, trunk: nn.Module, experts: Iterable[nn.Module], heads: Iterable[nn.Module]) -> None:
        super().__init__()
        self.trunk = trunk
        self.experts = nn.ModuleList(experts)
        self.heads = nn.ModuleList(heads)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, E, C] of images [N, channels, H, W]."""
        branches = zip(self.heads, self._branches(images), strict=True)
        return torch.stack([head(features) for head, features in branches], dim=1)

    def features(self, images: Tensor) -> Tensor:
        """Features [N, E, D] of images [N, channels, H, W], all >= 0."""
        return torch.stack(self._branches(images), dim=1)

    def _branches(self, images: Tensor) -> list[Tensor]:
        shared = self.trunk(images)
        return [expert(shared) for expert in self.experts]


def build_model(architecture: Architecture, seed: int) -> MultiExpert:
    """Build a network, initialised from `seed` alone; torch's global generators are left as they were.

    resnet_cifar                      3x3 stem of stride 1, three stages of basic blocks; the trunk has the first
    resnet50, resnext50 (32x4d), 152  7x7 stem with max-pool, four stages of bottlenecks; the trunk has the first two

    Raises:
        ConfigError: numbers of which no network can be made, or settings that exclude each other.
    """
    _check(architecture)
    cifar = architecture.name == "resnet_cifar"
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would seed the accelerators too, which the fork does not restore.
        torch.default_generator.manual_seed(seed)
        parts, feature_dim = _cifar_parts(architecture) if cifar else _imagenet_parts(architecture)
        first = "conv1" if architecture.separate else "layer2" if cifar else "layer3"
        names = list(parts)
        split = names.index("layer4" if architecture.share_stage3 else first)

        def chain(chosen: list[str]) -> nn.Sequential:
            """The layers of these names, one after the other."""
            return nn.Sequential(OrderedDict((name, parts[name]()) for name in chosen))

        head = CosineClassifier if architecture.classifier == "cosine" else LinearClassifier
        model = MultiExpert(
            chain(names[:split]),
            [chain(names[split:]) for _ in range(architecture.experts)],
            [head(feature_dim, architecture.num_classes) for _ in range(architecture.experts)],
        )
        for module in model.modules():
            if isinstance(module, nn.Conv2d) or (cifar and isinstance(module, nn.Linear)):
                # N(0, 2 / (k k in)) or N(0, 2 / (k k out)); in and out channels, the latter of all groups together
                nn.init.kaiming_normal_(module.weight, mode="fan_in" if cifar else "fan_out")
    return model


def laid_out(images: Tensor, precision: Precision) -> Tensor:
    """Images [N, C, H, W] in the order of bytes that is quickest for the precision on their device."""
    return images.contiguous(memory_format=_memory_format(precision, images.device))


def place(model: MultiExpert, precision: Precision, device: torch.device) -> MultiExpert:
    """Move a network to the device, its weights in the same order of bytes as the images: it decides the last bits."""
    return model.to(device=device, memory_format=_memory_format(precision, device))  # type: ignore[call-overload,no-any-return]


def _memory_format(precision: Precision, device: torch.device) -> torch.memory_format:
    # On a CPU float32 wants the plain order: channels_last is ten times slower there.
    bfloat16 = resolve_precision(precision, device) == "bfloat16"
    return torch.channels_last if bfloat16 else torch.contiguous_format


@contextlib.contextmanager
def frozen_buffers(model: nn.Module) -> Iterator[None]:
    """Within it batch norms in training mode use the batch's statistics and leave their buffers alone."""
    # As momentum 0, but num_batches_tracked stands still too and an infinity in a batch does no harm.
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def forward_views(model: nn.Module, views: Tensor, split: bool) -> Tensor:
    """Logits [2B, E, C] of B weak views followed by the B strong views of the same images [2B, channels, H, W].

    Args:
        split: batch norm sees the weak and the strong views apart, and its buffers are of the weak ones only, as with
            the authors' four devices on the large data sets; otherwise it sees all together.
    """
    if not split:
        logits: Tensor = model(views)
        return logits
    weak, strong = views.chunk(2)
    first = model(weak)
    with frozen_buffers(model):
        return torch.cat([first, model(strong)])


def _check(architecture: Architecture) -> None:
    """Refuse what `build_model` says."""
    a = architecture
    if min(a.experts, a.num_classes, a.in_channels) < 1:
        raise ConfigError("a network needs at least 1 expert, 1 class and 1 channel of images")
    if a.separate and a.share_stage3:
        raise ConfigError("separate networks share no stage: take separate or share_stage3, not both")
    if a.name != "resnet_cifar":
        return
    if a.depth < 8 or a.depth % 6 != 2:
        raise ConfigError(f"resnet_cifar has a depth of 6n + 2 (8, 14, 20, 26, 32, ...), got {a.depth}")
    if a.width < 1 or (a.reduced and a.width % 2):
        raise ConfigError(f"resnet_cifar needs a width of at least 1, an even one if it is reduced; got {a.width}")
    if a.share_stage3:
        raise ConfigError("resnet_cifar has no stage 4 after a shared stage 3: leave share_stage3 out")


def _cifar_parts(architecture: Architecture) -> tuple[_Parts, int]:
    """The layers of a ResNet for small images, and D."""
    width, blocks = architecture.width, (architecture.depth - 2) // 6
    second, third = (width * 3 // 2, width * 3) if architecture.reduced else (width * 2, width * 4)
    return {
        "conv1": functools.partial(nn.Conv2d, architecture.in_channels, width, 3, padding=1, bias=False),
        "bn1": functools.partial(nn.BatchNorm2d, width),
        "relu": functools.partial(nn.ReLU, inplace=True),
        "layer1": functools.partial(_basic_stage, width, width, blocks, 1),
        "layer2": functools.partial(_basic_stage, width, second, blocks, 2),
        "layer3": functools.partial(_basic_stage, second, third, blocks, 2),
        "avgpool": GlobalAverage,
    }, third


def _imagenet_parts(architecture: Architecture) -> tuple[_Parts, int]:
    """The layers of a ResNet for large images, and D."""
    parts: _Parts = {
        "conv1": functools.partial(nn.Conv2d, architecture.in_channels, 64, 7, stride=2, padding=3, bias=False),
        "bn1": functools.partial(nn.BatchNorm2d, 64),
        "relu": functools.partial(nn.ReLU, inplace=True),
        "maxpool": functools.partial(nn.MaxPool2d, 3, stride=2, padding=1),
    }
    groups, base_width = (32, 4) if architecture.name == "resnext50" else (1, 64)
    late = (192, 384) if architecture.reduced else (256, 512)
    before = 64
    for stage, (planes, blocks) in enumerate(zip((64, 128, *late), _BLOCKS[architecture.name], strict=True), start=1):
        stride = 1 if stage == 1 else 2
        parts[f"layer{stage}"] = functools.partial(
            _bottleneck_stage, before, planes, blocks, stride, groups=groups, base_width=base_width
        )
        before = 4 * planes
    return {**parts, "avgpool": GlobalAverage}, before


def _basic_stage(before: int, after: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(before, after, stride), *(BasicBlock(after, after, 1) for _ in range(blocks - 1)))


def _bottleneck_stage(before: int, planes: int, blocks: int, stride: int, **kind: int) -> nn.Sequential:
    """`blocks` bottlenecks, the first with a projection; `kind`: the groups and base_width of ResNeXt."""
    from torchvision.models.resnet import Bottleneck  # type: ignore[import-untyped]  # here because it costs seconds

    after = 4 * planes
    shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
    first = Bottleneck(before, planes, stride, shortcut, **kind)
    return nn.Sequential(first, *(Bottleneck(after, planes, **kind) for _ in range(blocks - 1)))
