"""The paper's two networks, plainly: the submodel and the merged model. `fused.py` computes the same numbers faster."""

import math
from typing import Literal, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from shared.errors import CheckpointError, ConfigError, DataError

HeadTransfer = Literal["both", "a_only", "none"]
HeadActivation = Literal["relu", "linear"]
FILTERS = (10, 20)
HIDDEN = 32  # width of the merged model's first dense layer
DROPOUT = 0.5
SMALLEST_IMAGE = 10  # pixels a side that leave one position after the second pool


class Submodel(nn.Module):
    """Conv 3x3, pool, conv 3x3, pool, dense (the notebook's layers): images [B, C, H, H] in [0, 1] -> logits [B, K].

    6,930 parameters for 1 x 28 x 28, 9,310 for 3 x 32 x 32. The paper's softmax is in the loss.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int = 10,
        filters: tuple[int, int] = FILTERS,
        seed: int = 0,
    ) -> None:
        """Initialise from `seed` alone; ConfigError for images that do not fit."""
        super().__init__()
        check_image(in_channels, image_size)
        self.in_channels, self.image_size = in_channels, image_size
        side = feature_side(image_size)
        self.conv1 = conv(in_channels, filters[0], 3)
        self.conv2 = conv(filters[0], filters[1], 3)
        self.fc = linear(filters[1] * side**2, num_classes)
        generator = Generator().manual_seed(seed)
        he_normal_(self.conv1, generator)
        he_normal_(self.conv2, generator)
        glorot_uniform_(self.fc, generator)

    def features(self, images: Tensor) -> Tensor:
        """Feature map [B, 20, k, k], k = 5 for 28 pixels and 6 for 32; DataError for images of another shape."""
        check_batch(images, self.in_channels, self.image_size)
        return conv_pool(self.conv2, conv_pool(self.conv1, images))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K]."""
        return cast(Tensor, self.fc(self.features(images).flatten(1)))


class MergedCNN(nn.Module):
    """Two submodels side by side, their softmax layers as convolutions, a new head 20 -> 32 -> 10 on top.

    One input [B, C, H, H] goes to both branches. 14,862 parameters for 1 x 28 x 28, 19,622 for 3 x 32 x 32.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int = 10,
        head_activation: HeadActivation = "relu",
        seed: int = 0,
    ) -> None:
        """Initialise everything from `seed` alone; ConfigError for images that do not fit."""
        super().__init__()
        check_image(in_channels, image_size)
        self.in_channels, self.image_size, self.head_activation = in_channels, image_size, head_activation
        side = feature_side(image_size)
        self.conv_a1, self.conv_b1 = (conv(in_channels, FILTERS[0], 3) for _ in range(2))
        self.conv_a2, self.conv_b2 = (conv(FILTERS[0], FILTERS[1], 3) for _ in range(2))
        self.head_a, self.head_b = (conv(FILTERS[1], num_classes, side) for _ in range(2))
        self.fc1, self.fc2 = linear(2 * num_classes, HIDDEN), linear(HIDDEN, num_classes)
        generator = Generator().manual_seed(seed)
        for layer in (self.fc1, self.conv_a1, self.conv_b1, self.conv_a2, self.conv_b2):
            he_normal_(layer, generator)
        for layer in (self.fc2, self.head_a, self.head_b):
            glorot_uniform_(layer, generator)

    def branches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The two heads' outputs before the activation, each [B, 10]: the logits of the submodels they come from."""
        check_batch(images, self.in_channels, self.image_size)
        a = self.head_a(conv_pool(self.conv_a2, conv_pool(self.conv_a1, images)))
        b = self.head_b(conv_pool(self.conv_b2, conv_pool(self.conv_b1, images)))
        return a.flatten(1), b.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K]: p = softmax(fc2(dropout(relu(fc1(concat(u, v))))))."""
        joined = torch.cat(self.branches(images), dim=1)
        if self.head_activation == "relu":
            joined = functional.relu(joined)
        hidden = functional.dropout(functional.relu(self.fc1(joined)), DROPOUT, self.training)
        return cast(Tensor, self.fc2(hidden))


def merge(
    branch_a: Submodel,
    branch_b: Submodel,
    head_transfer: HeadTransfer = "both",
    head_activation: HeadActivation = "relu",
    seed: int = 0,
) -> MergedCNN:
    """Unify two trained submodels; the merged model holds copies.

    Each dense layer [10, 20 k k] becomes a convolution [10, 20, k, k] with the same weights: the same pre-activation.

    Args:
        head_transfer: whose dense weights are copied; another head starts at random ("a_only": the notebook's defect).
        seed: of the new layers' initial weights.

    Raises:
        CheckpointError: the branches are not two submodels of one kind of image, or not of the paper's widths.
    """
    kinds = [{name: tuple(p.shape) for name, p in branch.named_parameters()} for branch in (branch_a, branch_b)]
    if kinds[0] != kinds[1]:
        names = [name for name in kinds[0] if kinds[0][name] != kinds[1].get(name)]
        raise CheckpointError(
            f"merge: {names[0]} is {kinds[0][names[0]]} in branch a but {kinds[1].get(names[0])} in branch b; "
            "both branches must be trained on one data set"
        )
    if (branch_a.conv1.out_channels, branch_a.conv2.out_channels) != FILTERS:
        raise CheckpointError(f"merge: the branches have other widths than the paper's {FILTERS}")
    merged = MergedCNN(
        branch_a.in_channels, branch_a.image_size, branch_a.fc.out_features, head_activation, seed
    )  # the seed fixes the random start of what is not copied
    with torch.no_grad():
        for branch, first, second, head, copied in (
            (branch_a, merged.conv_a1, merged.conv_a2, merged.head_a, head_transfer != "none"),
            (branch_b, merged.conv_b1, merged.conv_b2, merged.head_b, head_transfer == "both"),
        ):
            first.load_state_dict(branch.conv1.state_dict())
            second.load_state_dict(branch.conv2.state_dict())
            if copied:
                head.weight.copy_(branch.fc.weight.view_as(head.weight))  # flatten is (c, h, w), as in a convolution
                head.bias.copy_(branch.fc.bias)  # type: ignore[union-attr]
    return merged.to(branch_a.fc.weight.device)


def conv_pool(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Convolution, 2x2 max-pool (floor), ReLU: pooling first gives the same bits with a quarter of the ReLUs."""
    return functional.relu(functional.max_pool2d(layer(inputs), 2))


def feature_side(image_size: int) -> int:
    """k, positions a side after the second pool: 28 -> 26 -> 13 -> 11 -> 5, 32 -> 30 -> 15 -> 13 -> 6."""
    return ((image_size - 2) // 2 - 2) // 2


def check_image(in_channels: int, image_size: int) -> None:
    """ConfigError for images that the network cannot take."""
    if in_channels < 1 or image_size < SMALLEST_IMAGE:
        raise ConfigError(
            f"images of {in_channels} x {image_size} x {image_size} do not fit the network; it needs at least 1 "
            f"channel and {SMALLEST_IMAGE} pixels a side"
        )


def check_batch(images: Tensor, in_channels: int, image_size: int) -> None:
    """DataError for a batch of another shape than the network was made for."""
    if images.dim() != 4 or tuple(images.shape[1:]) != (in_channels, image_size, image_size):
        raise DataError(
            f"the network takes images [B, {in_channels}, {image_size}, {image_size}], found {list(images.shape)}"
        )


def conv(before: int, after: int, kernel: int) -> nn.Conv2d:
    """A valid convolution with bias that draws no random numbers (its weights are set afterwards)."""
    return nn.Conv2d(before, after, kernel, device="meta").to_empty(device="cpu")


def linear(before: int, after: int) -> nn.Linear:
    """A dense layer with bias that draws no random numbers."""
    return nn.Linear(before, after, device="meta").to_empty(device="cpu")


@torch.no_grad()
def he_normal_(layer: nn.Conv2d | nn.Linear, generator: Generator) -> None:
    """Keras' he_normal: a normal cut at two deviations, with variance 2 / fan in after the cut; bias 0."""
    std = math.sqrt(2 / layer.weight[0].numel()) / 0.87962566103423978
    nn.init.trunc_normal_(layer.weight, 0.0, std, -2 * std, 2 * std, generator)
    if layer.bias is not None:
        layer.bias.zero_()


@torch.no_grad()
def glorot_uniform_(layer: nn.Conv2d | nn.Linear, generator: Generator) -> None:
    """Keras' glorot_uniform, U(-l, l), l = sqrt(6 / (fan in + fan out)), bias 0. A convolution's fans have k * k."""
    fan_in = layer.weight[0].numel()
    fan_out = layer.weight.shape[0] * (layer.weight[0, 0].numel() if layer.weight.dim() > 2 else 1)
    bound = math.sqrt(6 / (fan_in + fan_out))
    layer.weight.uniform_(-bound, bound, generator=generator)
    if layer.bias is not None:
        layer.bias.zero_()
