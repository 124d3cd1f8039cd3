"""The arms of the study: what each adds to the loss, and what it needs to see of the network for that.

All arms of a seed have the same start, the same batches and the same number of steps; only the named term differs.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sparsevit.baselines import activation_l1, attention_l1, neuron_group_lasso, perturb, weight_l1
from sparsevit.config import Config
from sparsevit.method import activation_penalty, attention_entropy, attention_penalty, prunable
from sparsevit.model import Seen, Vit

Term = Callable[[Vit, list[Seen]], Tensor]  # the scalar added to the cross-entropy, coefficient included
MAP_METHODS = ("paper", "flip", "attn_l1", "paper_strong", "attn_sparse")


def mapped_blocks(config: Config, depth: int) -> tuple[int, ...]:
    """The blocks whose attention map the arm needs, and which so cannot use the fused kernel."""
    if config.method not in MAP_METHODS or build_term(config) is None:
        return ()
    return tuple(range(depth)) if config.coefficients.scope == "all" else (depth - 1,)


def build_term(config: Config) -> Term | None:
    """The arm's term; None where there is none, or its coefficient is 0: then the loss is cross-entropy to the bit."""
    method, weights = config.method, config.coefficients
    factor = {"none": 0.0, "null": 0.0, "flip": -weights.flip}.get(method)
    if factor is None:
        factor = float(getattr(weights, method))
    if factor == 0:
        return None

    def of_maps(function: Callable[[Tensor], Tensor]) -> Term:
        """The mean of a function of the maps, times the coefficient."""
        return lambda network, seen: factor * mean(function(s["attention"]) for s in seen if "attention" in s)

    def of_hidden(function: Callable[[Tensor], Tensor]) -> Term:
        """The mean of a function of the hidden activations, times the coefficient."""
        return lambda network, seen: factor * mean(function(s["hidden"]) for s in seen)

    terms: dict[str, Term] = {
        "paper": of_maps(attention_penalty),
        "flip": of_maps(attention_penalty),
        "paper_strong": of_maps(attention_penalty),
        "attn_l1": of_maps(attention_l1),
        "attn_sparse": of_maps(attention_entropy),
        "ffn_log": of_hidden(activation_penalty),
        "ffn_l1": of_hidden(activation_l1),
        "l1": lambda network, seen: factor * weight_l1(prunable(network, config.prune.set).values()),
        "group": lambda network, seen: factor * torch.stack(
            [neuron_group_lasso(block.fc1.weight, block.fc2.weight) for block in network.layers]
        ).sum(),
    }  # fmt: skip
    return terms[method]


def mean(values: Iterable[Tensor]) -> Tensor:
    """Mean over blocks."""
    return torch.stack(list(values)).mean()


def prepare(config: Config, network: Vit) -> None:
    """What an arm does to the start weights: only `null` does something."""
    if config.method == "null":
        perturb(network, config.coefficients.noise, config.seed)
