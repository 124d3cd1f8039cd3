"""Removing neurons and heads for good: a smaller network that computes what the masked one would.

Only inner dimensions are cut, so every tensor of the residual stream stays as it is. What the removed parts gave on
average is folded into the bias that follows them; without means they are taken to have given nothing.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.checkpoint import load_model, save_model
from shared.errors import CheckpointError, ConfigError
from sparsevit.model import Vit, resized, size_from_dict

Keep = Mapping[int, Tensor | Sequence[int]] | Sequence[Tensor | Sequence[int]]  # block -> indices (or a bool mask)
Means = Mapping[int, Tensor] | Sequence[Tensor]


def remove_neurons(model: Vit, keep: Keep, means: Means | None = None) -> Vit:
    """A new network without the MLP neurons that are not kept; `model` is untouched.

    b2 += W2[:, dropped] mean(h[dropped]); then fc1 rows and fc2 columns are cut. Equal to a network in which these
    neurons are stuck at their means.

    Args:
        keep: for each block the neurons that stay, as indices or a bool mask [m]; blocks not in a mapping stay whole.
        means: for each block the mean GELU output [m]; none means zero.

    Raises:
        ConfigError: no neuron would be left in a block, or an index does not fit.
    """
    small = copy.deepcopy(model)
    widths = [block.mlp for block in model.size.blocks]
    for i, (block, kept) in enumerate(zip(small.layers, _kept(keep, widths, "neuron"), strict=True)):
        if kept is None:
            continue
        _fold(block.fc2, kept, None if means is None else means[i])
        _cut(block.fc1, kept, rows=True)
        _cut(block.fc2, kept, rows=False)
        widths[i] = len(kept)
    small.size = resized(model.size, mlp=widths)
    return small


def remove_heads(model: Vit, keep: Keep, means: Means | None = None) -> Vit:
    """A new network without the attention heads that are not kept; `model` is untouched.

    Cuts the heads' rows of q, k, v and columns of out, and folds W_O,h mean(A_h V_h) into out's bias. The scale stays
    1/sqrt(head_dim).

    Args:
        keep: for each block the heads that stay, as indices or a bool mask [heads]; blocks a mapping leaves out stay.
        means: for each block the mean output of its heads, side by side [heads * head_dim]; none means zero.

    Raises:
        ConfigError: no head would be left in a block, or an index does not fit.
    """
    small = copy.deepcopy(model)
    counts = [block.heads for block in model.size.blocks]
    for i, (block, kept) in enumerate(zip(small.layers, _kept(keep, counts, "head"), strict=True)):
        if kept is None:
            continue
        e = model.size.blocks[i].head_dim
        rows = (kept[:, None] * e + torch.arange(e, device=kept.device)).flatten()
        _fold(block.attn.out, rows, None if means is None else means[i])
        for linear in (block.attn.q, block.attn.k, block.attn.v):
            _cut(linear, rows, rows=True)
        _cut(block.attn.out, rows, rows=False)
        counts[i] = block.attn.heads = len(kept)
    small.size = resized(model.size, heads=counts)
    return small


def save_network(folder: Path, network: Vit, **facts: object) -> None:
    """Write config.json (sizes block by block) and model.safetensors: enough to build it again anywhere."""
    save_model(folder, network.state_dict(), {"paper": "sparsevit", "size": network.size.as_dict(), **facts})


def load_network(folder: Path) -> Vit:
    """Build the network that `save_network` wrote; CheckpointError if it is missing, damaged or another's."""
    tensors, config = load_model(folder)
    if "size" not in config:
        raise CheckpointError(f"{folder / 'config.json'}: has no 'size', so it is not a network of this package")
    with torch.device("meta"):
        network = Vit(size_from_dict(config["size"]))
    wanted = network.state_dict()
    wrong = [n for n in {**wanted, **tensors} if n not in wanted or n not in tensors
             or wanted[n].shape != tensors[n].shape]  # fmt: skip
    if wrong:
        raise CheckpointError(f"{folder / 'model.safetensors'}: {wrong[0]} is not as config.json describes it")
    network.load_state_dict(tensors, assign=True)
    return network.eval()


def _kept(keep: Keep, totals: Sequence[int], what: str) -> list[Tensor | None]:
    """For each block the indices that stay, ascending, or None where the block stays whole."""
    found: list[Tensor | None] = [None] * len(totals)
    if not isinstance(keep, Mapping) and len(keep) != len(totals):
        raise ConfigError(f"{what}s to keep: given for {len(keep)} blocks, but the network has {len(totals)}")
    for block, chosen in keep.items() if isinstance(keep, Mapping) else enumerate(keep):
        if not 0 <= block < len(totals):
            raise ConfigError(f"{what}s to keep: there is no block {block}, only 0..{len(totals) - 1}")
        index, total = torch.as_tensor(chosen), totals[block]
        if index.dtype == torch.bool:
            if index.shape != (total,):
                raise ConfigError(f"{what}s to keep in block {block}: a mask of {len(index)} for {total} {what}s")
            index = index.nonzero().flatten()
        if not len(index):
            raise ConfigError(f"block {block}: all {total} {what}s would be removed; keep at least one")
        index = torch.unique(index.long())
        if int(index[0]) < 0 or int(index[-1]) >= total:
            raise ConfigError(f"{what}s to keep in block {block}: {int(index[0])}..{int(index[-1])} of {total}")
        found[block] = None if len(index) == total else index
    return found


def _fold(linear: nn.Linear, kept: Tensor, mean: Tensor | None) -> None:
    """Add what the dropped inputs give on average to the bias."""
    if mean is None:
        return
    dropped = torch.ones(linear.in_features, dtype=torch.bool, device=linear.weight.device)
    dropped[kept.to(dropped.device)] = False
    with torch.no_grad():  # summed in float64, or the rounding of thousands of terms would show
        shift = linear.weight[:, dropped].double() @ mean.to(linear.weight.device)[dropped].double()
        linear.bias.copy_((linear.bias.double() + shift).to(linear.bias.dtype))


def _cut(linear: nn.Linear, kept: Tensor, rows: bool) -> None:
    """Keep some rows (outputs, with their biases) or columns (inputs) of a linear layer."""
    kept = kept.to(linear.weight.device)
    weight = linear.weight.detach()
    linear.weight = nn.Parameter((weight[kept] if rows else weight[:, kept]).contiguous())
    if rows:
        linear.bias, linear.out_features = nn.Parameter(linear.bias.detach()[kept].clone()), len(kept)
    else:
        linear.in_features = len(kept)
