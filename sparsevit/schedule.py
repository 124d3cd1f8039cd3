"""The learning rate and momentum of a step, from the step's number alone, so that resuming needs nothing else."""

import math
from typing import NamedTuple

import torch
from torch import nn

from shared.errors import ConfigError
from sparsevit.config import AuthorsRecipe, OursRecipe


class Rates(NamedTuple):
    """What the optimiser uses in a step; `momentum` is SGD's."""

    lr: float
    momentum: float


def rates(recipe: AuthorsRecipe | OursRecipe, step: int, total: int) -> Rates:
    """OneCycle with cosines, as torch's OneCycleLR gives them.

    lr / div -> lr at the last warm-up step -> lr / div / final_div at the last step. In the authors' recipe the
    momentum mirrors it, 0.95 -> 0.85 -> 0.95: that is OneCycleLR's default, and overrides the 0.9 they asked for.
    """
    warm, rest = _phases(recipe, step, total)
    low = recipe.lr / recipe.div
    lr = _cosine(low, recipe.lr, warm) if rest is None else _cosine(recipe.lr, low / recipe.final_div, rest)
    if isinstance(recipe, OursRecipe):
        return Rates(lr, recipe.momentum)
    high, bottom = recipe.high_momentum, recipe.low_momentum
    return Rates(lr, _cosine(high, bottom, warm) if rest is None else _cosine(bottom, high, rest))


def check_length(recipe: AuthorsRecipe | OursRecipe, total: int) -> None:
    """ConfigError where the warm-up is longer than the training."""
    if isinstance(recipe, AuthorsRecipe) and recipe.warmup_steps >= total:
        raise ConfigError(
            f"recipe.warmup_steps: {recipe.warmup_steps} steps of warm-up in a training of {total}; "
            "train for more epochs or warm up for fewer steps"
        )


def build_optimizer(network: nn.Module, recipe: AuthorsRecipe | OursRecipe) -> torch.optim.Optimizer:
    """SGD or AdamW; which parameters decay is the recipe's."""
    decay_all = isinstance(recipe, AuthorsRecipe) or recipe.decay_all
    decayed, free = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in network.named_parameters():
        matrix = parameter.dim() > 1 and name not in ("cls", "pos")
        (decayed if decay_all or matrix else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if isinstance(recipe, OursRecipe) and recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, recipe.lr, fused=True)
    return torch.optim.SGD(groups, recipe.lr, momentum=0.9, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, now: Rates) -> None:
    """Put the step's rates into the optimiser."""
    for group in optimizer.param_groups:
        group["lr"] = now.lr
        if "momentum" in group:
            group["momentum"] = now.momentum


def _phases(recipe: AuthorsRecipe | OursRecipe, step: int, total: int) -> tuple[float, float | None]:
    """How far the warm-up is, 0..1, and how far the descent after it, or None while warming up."""
    share = recipe.warmup if isinstance(recipe, OursRecipe) else recipe.warmup_steps / total
    peak = share * total - 1  # torch's: the last step of the warm-up, not always whole
    if step <= peak:
        return (step / peak if peak > 0 else 1.0), None
    return 1.0, (step - peak) / (total - 1 - peak)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))
