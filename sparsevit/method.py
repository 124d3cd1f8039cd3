"""The paper's regulariser and its pruning, and the scores by which neurons and heads are really removed.

What the published regulariser is, in closed form. For a softmax map A with N keys a row sums to 1, and ln(1 + a^2) is
convex on [0, 1]. So by Jensen the mean R(A) is smallest, ln(1 + 1/N^2), for *uniform* rows and largest, ln(2)/N, for
one-hot rows; and a small step down R in the logits makes every row more uniform, not sparse (`attention_penalty`). At
N = 577 it lies in [3.0e-6, 1.2e-3], and 0.01 R adds at most about 1.2e-5 to the loss. ln(1 + x^2) is a sparse-coding
prior only where x is not tied to a simplex, as the activations of an MLP are (`activation_penalty`).
"""

from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import Tensor, nn

from shared.errors import ConfigError
from sparsevit.shrink import remove_heads, remove_neurons

__all__ = [
    "activation_penalty",
    "at_least_float32",
    "attention_entropy",
    "attention_penalty",
    "global_magnitude_masks",
    "head_scores",
    "keep_count",
    "keep_highest",
    "neuron_scores",
    "prunable",
    "remove_heads",
    "remove_neurons",
    "zeros_to_prune",
]  # fmt: skip

SETS = ("authors", "matrices", "blocks", "mlp")


def attention_penalty(attention: Tensor) -> Tensor:
    """R(A) = mean over batch, heads, queries and keys of ln(1 + a^2)

    Descending it raises the entropy, to first order. For a row a = softmax(z), g_j = 2 a_j / (1 + a_j^2) and means < >
    under a, dR/dz_j ~ a_j (g_j - <g>) and dH/dz_j = -a_j (ln a_j - <ln a>), so a step of -eps dR/dz changes H by
    eps sum_j a_j^2 (g_j - <g>) (ln a_j - <ln a>), up to a positive factor. g and ln both rise with a: under the weights
    a^2 neither has a smaller mean than under a, and they are not negatively correlated (Chebyshev). So dH >= 0, and 0
    for uniform rows only. What training does to the entropy through the weights is measured, not proven.

    Args:
        attention: [B, H, N, N], rows sum to 1, before any dropout.

    Returns:
        A scalar in at least float32: in bfloat16 1 + a^2 is 1 for every a up to 0.0625.
    """
    a = at_least_float32(attention)
    return torch.log1p(a * a).mean()


def attention_entropy(attention: Tensor) -> Tensor:
    """Mean over rows of -sum a ln a in nats, from 0 (one-hot) to ln N (uniform); [B, H, N, N] -> scalar.

    The gradient is finite also where a softmax has run into 0, where that of `xlogy` is not.
    """
    a = at_least_float32(attention)
    return -(a * a.clamp_min(torch.finfo(a.dtype).tiny).log()).sum(-1).mean()


def activation_penalty(hidden: Tensor) -> Tensor:
    """Mean of ln(1 + h^2) over [B, N, m] GELU outputs: the paper's function where it does silence."""
    h = at_least_float32(hidden)
    return torch.log1p(h * h).mean()


def prunable(network: nn.Module, set_name: str) -> dict[str, nn.Parameter]:
    """The tensors that are ranked together, by name, in the order of the network.

    authors: patch embedding, in each block norm1, q, k, v, out, norm2, fc1, fc2, and the classifier: 98 for ViT-B.
    matrices: the same without the scales of the norms.  blocks: the six matrices of each block alone.
    mlp: fc1 and fc2 of each block alone.
    """
    if set_name not in SETS:
        raise ConfigError(f"there is no prune set {set_name!r}; choose from {', '.join(SETS)}")
    chosen = {}
    for name, parameter in network.named_parameters():
        in_block, is_weight = name.startswith("blocks."), name.endswith(".weight")
        matrix = is_weight and parameter.dim() > 1
        norm_of_block = in_block and is_weight and not matrix
        if set_name == "mlp":
            wanted = in_block and name.rpartition(".")[0].endswith((".fc1", ".fc2")) and is_weight
        else:
            wanted = (matrix and (in_block or set_name != "blocks")) or (norm_of_block and set_name == "authors")
        if wanted:
            chosen[name] = parameter
    return chosen


def zeros_to_prune(ratio: float, count: int) -> int:
    """round(ratio * count), half to even; ConfigError for a ratio outside [0, 1] or an integer.

    An integer is refused since torch's pruning takes `1` for one weight and `1.0` for all.
    """
    if not isinstance(ratio, float):
        raise ConfigError(f"ratio: {ratio!r} is a {type(ratio).__name__}; write a fraction such as 0.5 (all is 1.0)")
    if not 0 <= ratio <= 1:
        raise ConfigError(f"ratio: {ratio!r} is outside [0, 1]; it is the share of weights that become zero")
    return round(ratio * count)


@overload
def global_magnitude_masks(tensors: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """By name."""


@overload
def global_magnitude_masks(tensors: Sequence[Tensor], ratio: float) -> list[Tensor]:
    """In order."""


def global_magnitude_masks(
    tensors: Mapping[str, Tensor] | Sequence[Tensor], ratio: float
) -> dict[str, Tensor] | list[Tensor]:
    """The published pruning: one ranking of |w| over all tensors, exactly round(ratio * n) go.

    Of equal magnitudes the first ones go first, so what is pruned at a ratio is also pruned at a higher one.

    Args:
        tensors: by name, or a list; any shapes, one device.
        ratio: share to prune, a float in [0, 1].

    Returns:
        bool masks, True where the weight stays, in the shapes and the kind of container given.
    """
    items = list(tensors.values()) if isinstance(tensors, Mapping) else list(tensors)
    masks = lowest_masks([item.detach().abs() for item in items], ratio)
    return dict(zip(tensors, masks, strict=True)) if isinstance(tensors, Mapping) else masks


def lowest_masks(scores: Sequence[Tensor], ratio: float) -> list[Tensor]:
    """Masks that are False at the round(ratio * n) lowest of all scores together; the first ones of equal scores."""
    flat = torch.cat([at_least_float32(score).flatten() for score in scores]) if scores else torch.empty(0)
    count = zeros_to_prune(ratio, len(flat))
    keep = torch.ones_like(flat, dtype=torch.bool)
    if count:
        threshold = flat.kthvalue(count).values
        below, tied = flat < threshold, flat == threshold
        chosen = tied.nonzero().flatten()[: count - int(below.sum())]
        keep = ~below
        keep[chosen] = False
    parts = torch.split(keep, [score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def neuron_scores(hidden: Tensor, fc2_weight: Tensor) -> Tensor:
    """s_j = sqrt(var_j) * ||W2[:, j]||: what removing a neuron costs when its mean is folded away

    Variance, not magnitude: a neuron of constant output is free to remove.

    Args:
        hidden: GELU outputs [..., m] on calibration images; the variance is over all but the last dimension.
        fc2_weight: [d, m].
    """
    h = hidden.detach().flatten(0, -2).double()
    return scores_of_variance(h.var(dim=0, unbiased=False), fc2_weight)


def scores_of_variance(variance: Tensor, fc2_weight: Tensor) -> Tensor:
    """As `neuron_scores`, from the variances [m] themselves."""
    lengths: Tensor = torch.linalg.vector_norm(fc2_weight.detach().to(variance.dtype), dim=0)
    return variance.clamp(min=0).sqrt() * lengths


def head_scores(mixed: Tensor, out_weight: Tensor, heads: int) -> Tensor:
    """Mean over images and tokens of ||W_O,h A_h V_h||, what a head adds to the residual stream: [heads].

    Args:
        mixed: the heads' outputs side by side [..., heads * head_dim], before the output matrix.
        out_weight: [d, heads * head_dim].
    """
    z = mixed.detach().reshape(-1, heads, mixed.shape[-1] // heads)  # [tokens, H, e]
    w = out_weight.detach().to(z.dtype).reshape(len(out_weight), heads, -1)  # [d, H, e]
    return torch.stack([(z[:, h] @ w[:, h].T).norm(dim=-1).double().mean() for h in range(heads)])


def keep_count(total: int, ratio: float, multiple: int = 1) -> int:
    """How many of `total` stay when a share goes: the nearest multiple, never 0, never above `total`."""
    zeros_to_prune(ratio, total)  # refuses what is no ratio
    wanted = int((1 - ratio) * total / multiple + 0.5) * multiple
    return min(total, max(wanted, min(multiple, total)))


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores [m], ascending; of equal scores the first go first, as in pruning."""
    order = torch.sort(scores, stable=True).indices
    return order[len(scores) - count :].sort().values


def at_least_float32(values: Tensor) -> Tensor:
    """The values, in float32 where they are in half precision."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
