"""The same networks as `model.py`, many of them as one: grouped convolutions for both branches and for all seeds.

A `Stack` holds L networks of one kind: name -> tensor [L, ...]. Inputs are [L, B, ...], outputs [L, B, K]: network l
sees its own images and gives its own outputs. One network alone is L = 1.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lightcnn.model import DROPOUT, HeadActivation

Stack = dict[str, Tensor]
SIDES = ("a", "b")
BRANCHES_AT_ONCE = 4  # of a batch of 32 on a CPU: their activations stay in the caches, which saves a fifth of a step


def stack(states: Sequence[Mapping[str, Tensor]]) -> Stack:
    """Several networks' states as one stack."""
    return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}


def unstack(stacked: Stack, lane: int) -> dict[str, Tensor]:
    """The state of one network of a stack."""
    return {name: tensor[lane].detach() for name, tensor in stacked.items()}


def rows(stacked: Mapping[str, Tensor], lanes: Sequence[int]) -> Stack:
    """Some networks of a stack, as copies."""
    return {name: tensor.detach()[list(lanes)] for name, tensor in stacked.items()}


def fuse(state: Mapping[str, Tensor]) -> Stack:
    """A `MergedCNN`'s state with both branches in one tensor: conv1, conv2 and head get a leading dimension of 2."""
    fused = {name: state[name] for name in state if name.startswith("fc")}
    for part in ("weight", "bias"):
        fused[f"conv1.{part}"] = torch.stack([state[f"conv_{side}1.{part}"] for side in SIDES])
        fused[f"conv2.{part}"] = torch.stack([state[f"conv_{side}2.{part}"] for side in SIDES])
        fused[f"head.{part}"] = torch.stack([state[f"head_{side}.{part}"] for side in SIDES])
    return fused


def unfuse(fused: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state that `MergedCNN.load_state_dict` takes, back from `fuse`."""
    state = {name: tensor for name, tensor in fused.items() if name.startswith("fc")}
    for number, side in enumerate(SIDES):
        for part in ("weight", "bias"):
            for plain, name in ((f"conv_{side}1", "conv1"), (f"conv_{side}2", "conv2"), (f"head_{side}", "head")):
                state[f"{plain}.{part}"] = fused[f"{name}.{part}"][number]
    return state


def grouped(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """G convolutions at once: inputs [B, G * in, H, W], weight [G, out, in, k, k], bias [G, out] -> [B, G * out, h, w].

    channels_last is three times faster here than NCHW on a CPU. `to` sets the strides that say so also for one channel,
    where `contiguous` leaves NCHW's.
    """
    kernel = weight.flatten(0, 1).to(memory_format=torch.channels_last)
    inputs = inputs.to(memory_format=torch.channels_last)
    return functional.conv2d(inputs, kernel, bias.flatten(), groups=weight.shape[0])


def conv_pool(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`grouped`, 2x2 max-pool, ReLU."""
    return functional.relu(functional.max_pool2d(grouped(inputs, weight, bias), 2))


def to_channels(inputs: Tensor) -> Tensor:
    """[L, B, C, H, W] -> [B, L * C, H, W]."""
    return inputs.transpose(0, 1).flatten(1, 2)


def to_lanes(outputs: Tensor, lanes: int) -> Tensor:
    """[B, L * C, ...] -> [L, B, C, ...]."""
    return torch.unflatten(outputs, 1, (lanes, -1)).transpose(0, 1)


def parts_of(inputs: Tensor, branches: int = 1) -> list[slice]:
    """Which networks of [L, B, ...] are computed together, where each has so many branches.

    On a GPU, and where no convolution is left to do, all of them.
    """
    cut = inputs.device.type == "cpu" and inputs.dim() == 5
    few = max(1, BRANCHES_AT_ONCE // branches) if cut else len(inputs)
    return [slice(first, first + few) for first in range(0, len(inputs), max(1, few))]


def submodel_logits(stacked: Stack, images: Tensor) -> Tensor:
    """`Submodel.forward` of L submodels: images [L, B, C, H, W] -> logits [L, B, K]."""
    parts = parts_of(images)
    if len(parts) > 1:
        return torch.cat([submodel_logits({n: t[part] for n, t in stacked.items()}, images[part]) for part in parts])
    lanes = len(images)
    hidden = conv_pool(to_channels(images), stacked["conv1.weight"], stacked["conv1.bias"])
    hidden = conv_pool(hidden, stacked["conv2.weight"], stacked["conv2.bias"])
    dense = stacked["fc.weight"]  # [L, K, 20 k k]: as the merge does, a convolution with the size of its input
    kernel = dense.view(lanes, dense.shape[1], -1, *hidden.shape[2:])
    return to_lanes(grouped(hidden, kernel, stacked["fc.bias"]).flatten(1), lanes)


def merged_layer(stacked: Stack, group: str, inputs: Tensor, activation: HeadActivation, kept: Tensor | None) -> Tensor:
    """One group of layers of L merged models, with what follows it up to the next group.

    conv1   [L, B, C, H, W] -> [L, B, 20, h, w], both branches
    conv2   -> [L, B, 40, k, k]
    head    -> [L, B, 20], concat(u, v)
    fc1     -> [L, B, 32], with dropout where `kept` (bool [L, B, 32]) is given
    fc2     -> [L, B, K]
    """
    weight, bias = stacked[f"{group}.weight"], stacked[f"{group}.bias"]
    lanes = len(inputs)
    if group == "fc1":
        hidden = functional.relu(torch.baddbmm(bias[:, None], inputs, weight.transpose(1, 2)))
        return hidden if kept is None else hidden * kept / (1 - DROPOUT)
    if group == "fc2":
        return torch.baddbmm(bias[:, None], inputs, weight.transpose(1, 2))
    if group == "conv1":  # one input for both branches: their filters are one convolution's
        return to_lanes(conv_pool(to_channels(inputs), weight.flatten(1, 2), bias.flatten(1, 2)), lanes)
    weight, bias = weight.flatten(0, 1), bias.flatten(0, 1)
    if group == "conv2":
        return to_lanes(conv_pool(to_channels(inputs), weight, bias), lanes)
    joined = to_lanes(grouped(to_channels(inputs), weight, bias).flatten(1), lanes)
    return functional.relu(joined) if activation == "relu" else joined
