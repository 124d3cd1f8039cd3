"""Figures of networks: accuracy of many in one pass over the images, calibration, what attention does, sizes."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.batches import Batches
from shared.gpu import Precision, autocast
from sparsevit.method import attention_entropy, attention_penalty, head_scores, prunable, scores_of_variance
from sparsevit.model import Vit, count_macs, count_parameters

SILENT = 0.05  # a neuron's output below this counts as silent, in absolute value
OBSERVED_IMAGES = 500  # test images on which attention and activations are looked at
MAPS_AT_ONCE = 2**28  # numbers in the attention maps of all blocks, which are held together: a GiB


def _no_check() -> None:
    """Nothing can stop this."""


@torch.no_grad()
def accuracies(networks: Sequence[Vit], source: Batches, batch_size: int, precision: Precision,
               check: Callable[[], None] = _no_check) -> list[float]:  # fmt: skip
    """Share of right answers of each network, on all images, in one pass that all share; dropout off."""
    modes = [network.training for network in networks]
    for network in networks:
        network.eval()
    device = source.labels.device
    right = torch.zeros(len(networks), dtype=torch.int64, device=device)
    for images, labels in source.evaluate(batch_size):
        check()
        with autocast(device, precision):
            predicted = torch.stack([network(images).argmax(dim=1) for network in networks])
        right += (predicted == labels).sum(dim=1)
    for network, mode in zip(networks, modes, strict=True):
        network.train(mode)
    return [count / len(source) for count in right.tolist()]


@dataclass(frozen=True)
class Calibration:
    """What scores and compensation need, for each block, measured on training images without augmentation."""

    hidden_mean: list[Tensor]  # [m], of GELU outputs over images and tokens
    hidden_var: list[Tensor]  # [m]
    mixed_mean: list[Tensor]  # [heads * head_dim]
    head_scores: list[Tensor]  # [heads]
    input_norms: dict[str, Tensor]  # of each matrix of a block: L2 norm [in] of every input over all tokens

    def neuron_scores(self, network: Vit) -> list[Tensor]:
        """For each block the scores [m] of its neurons."""
        blocks = zip(self.hidden_var, network.layers, strict=True)
        return [scores_of_variance(var, block.fc2.weight) for var, block in blocks]


@torch.no_grad()
def calibrate(network: Vit, source: Batches, count: int, batch_size: int) -> Calibration:
    """Pass the first `count` images (of a training set in class order: evenly spaced ones) and sum up, in float64."""
    count = min(count, len(source))
    chosen = torch.arange(count) * len(source) // count
    mode, depth = network.training, len(network.layers)
    network.eval()
    sums: dict[tuple[int, str], Tensor] = {}

    def add(block: int, name: str, value: Tensor) -> None:
        """Sum up over batches."""
        sums[block, name] = sums[block, name] + value if (block, name) in sums else value

    for images, _ in source.prefetch(torch.split(chosen, batch_size), None):
        _, seen = network.observe(images)
        for i, (values, block) in enumerate(zip(seen, network.layers, strict=True)):
            add(i, "heads", len(images) * head_scores(values["mixed"], block.attn.out.weight, block.attn.heads))
            for name, value in values.items():
                flat = value.flatten(0, -2).double()
                add(i, name, flat.sum(0))
                add(i, f"{name}^2", flat.square().sum(0))
    network.train(mode)
    tokens = count * network.size.tokens
    means = {key: value / tokens for key, value in sums.items()}
    norms: dict[str, Tensor] = {}
    readers = {
        "attn_in": ("attn.q", "attn.k", "attn.v"),
        "mixed": ("attn.out",),
        "mlp_in": ("fc1",),
        "hidden": ("fc2",),
    }
    for i in range(depth):
        for name, matrices in readers.items():
            norms |= {f"blocks.{i}.{matrix}.weight": sums[i, f"{name}^2"].sqrt() for matrix in matrices}
    return Calibration(
        [means[i, "hidden"] for i in range(depth)],
        [(means[i, "hidden^2"] - means[i, "hidden"].square()).clamp(min=0) for i in range(depth)],
        [means[i, "mixed"] for i in range(depth)],
        [sums[i, "heads"] / count for i in range(depth)],
        norms,
    )


@torch.no_grad()
def observations(network: Vit, source: Batches, batch_size: int) -> dict[str, list[float]]:
    """For each block, on evenly spaced images: entropy and penalty of its attention, share of silent neurons."""
    count = min(OBSERVED_IMAGES, len(source))
    chosen = torch.arange(count) * len(source) // count
    mode = network.training
    network.eval()
    depth, tokens = len(network.layers), network.size.tokens
    maps_of_one = sum(block.heads for block in network.size.blocks) * tokens**2
    batch_size = max(1, min(batch_size, MAPS_AT_ONCE // maps_of_one))
    sums = torch.zeros(3, depth, dtype=torch.float64)
    for images, labels in source.prefetch(torch.split(chosen, batch_size), None):
        _, seen = network.observe(images, range(depth))
        for i, values in enumerate(seen):
            maps, hidden = values["attention"], values["hidden"]
            silent = (hidden.abs() < SILENT).double().mean()
            rows = [attention_entropy(maps), attention_penalty(maps), silent]
            sums[:, i] += len(labels) * torch.stack([row.double().cpu() for row in rows])
    network.train(mode)
    entropy, penalty, silent_share = (sums / count).tolist()
    return {"entropy": entropy, "penalty": penalty, "silent": silent_share}


def masked(network: Vit, masks: Mapping[str, Tensor]) -> Vit:
    """A network with zeros where the masks are False. It shares every tensor that is not masked: read it only."""
    with torch.device("meta"):
        other = Vit(network.size, network.dropout)
    state = dict(network.state_dict())
    for name, mask in masks.items():
        state[name] = torch.where(mask, state[name], 0)
    other.load_state_dict(state, assign=True)
    return other.train(network.training)


def independent(network: Vit) -> Vit:
    """A copy that shares nothing, and can be trained."""
    return copy.deepcopy(network)


def sizes(network: Vit, set_name: str) -> dict[str, int]:
    """Parameters, those that are not zero, multiply-accumulates an image, bytes stored sparsely."""
    chosen = prunable(network, set_name)
    nonzero = {name: int(torch.count_nonzero(p.detach())) for name, p in network.named_parameters()}
    csr = 0
    for name, parameter in network.named_parameters():
        rows = parameter.shape[0] if parameter.dim() > 1 else 1
        # compressed rows: a float32 and an int32 index a value, and an int32 a row
        csr += 8 * nonzero[name] + 4 * (rows + 1) if name in chosen else 4 * parameter.numel()
    return {
        "parameters": count_parameters(network.size), "nonzero": sum(nonzero.values()),
        "macs": count_macs(network.size), "csr_bytes": csr,
    }  # fmt: skip


def percent(ratio: float) -> str:
    """A ratio as it stands in a figure's name: 0.3 is `30`."""
    return f"{100 * ratio:g}"


def ratio_figures(figures: Mapping[str, Any], pruner: str, dense: float) -> dict[str, float]:
    """What a whole curve gives: means over the ratios of the paper's grids, the drop at each, the area under it."""
    start, end = f"{pruner}.", ".accuracy"
    found = {
        float(name[len(start) : -len(end)]) / 100: float(value)
        for name, value in figures.items()
        if name.startswith(start) and name.endswith(end)
    }
    derived: dict[str, float] = {}
    for low, high in ((10, 50), (10, 80), (10, 90)):
        wanted = [r / 100 for r in range(low, high + 1, 10)]
        if all(any(abs(r - w) < 1e-9 for r in found) for w in wanted):
            inside = [value for r, value in found.items() if any(abs(r - w) < 1e-9 for w in wanted)]
            derived[f"{pruner}.mean_{low}_{high}"] = sum(inside) / len(inside)
            derived[f"{pruner}.drop_{low}_{high}"] = dense - sum(inside) / len(inside)
    derived |= {f"{pruner}.{percent(r)}.drop": dense - value for r, value in found.items()}
    curve = sorted({0.0: dense, **found}.items())
    if len(curve) > 1:
        area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(curve))
        derived[f"{pruner}.area"] = area / curve[-1][0]
    return derived
