"""Optimisers with Keras' semantics, which the notebook trains with, and the rates of the baselines."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightcnn.fused import Stack

LEARNING_RATE = 1e-3  # constant, of both optimisers (notebook)


class DecoupledSgd(torch.optim.SGD):
    """SGD with decoupled decay: w -= lr * decay * w, then Nesterov's step. torch's own decay goes into the gradient."""

    def __init__(
        self, params: Sequence[Tensor], lr: float, momentum: float, decay: float, decays: Sequence[bool] | None = None
    ) -> None:
        """Args: decays: which of the parameters do (default: all, as Keras')."""
        super().__init__(params, lr, momentum, nesterov=momentum > 0, foreach=True)
        self.decay, self.decays = decay, list(decays or [True] * len(params))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # no overloads
        """One update of every parameter that has a gradient."""
        if self.decay:
            (group,) = self.param_groups
            pairs = zip(group["params"], self.decays, strict=True)
            if moved := [p for p, decays in pairs if decays and p.grad is not None]:
                torch._foreach_mul_(moved, 1 - group["lr"] * self.decay)
        loss: float | None = super().step(closure)
        return loss


def build_optimizer(
    name: Literal["nadam", "sgd"], parameters: Sequence[Tensor], lr: float = LEARNING_RATE
) -> Optimizer:
    """A fresh optimiser, its moments at zero: Keras' Nadam(), or SGD with momentum 0.9, Nesterov and decay 1e-4 (2b).

    Keras' schedule of the first moment is torch's with `momentum_decay=1`; torch's default is another one.
    """
    if name == "nadam":
        return torch.optim.NAdam(parameters, lr=lr, eps=1e-7, momentum_decay=1.0, foreach=True)
    return DecoupledSgd(parameters, lr, momentum=0.9, decay=1e-4)


def one_cycle(step: int, steps: int, peak: float, warm_up: float = 0.2) -> float:
    """The rate at a step: linear from peak / 25 to `peak` over the first share, then a cosine down to peak / 1000."""
    rise = max(1.0, warm_up * steps)
    if step < rise:
        return peak * (1 / 25 + (1 - 1 / 25) * step / rise)
    share = min(1.0, (step - rise) / max(1.0, steps - 1 - rise))
    return peak * (1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * share)) / 2)


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """Change the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """What a checkpoint holds of an optimiser: its moments, by the parameter's number."""
    return {str(number): dict(values) for number, values in optimizer.state_dict()["state"].items()}


def restore_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Take up what `optimizer_state` gave."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {int(n): v for n, v in saved.items()}, "param_groups": groups})


def narrowed_state(saved: dict[str, Any], lanes: Sequence[int], before: int) -> dict[str, Any]:
    """The state for some networks of a stack of `before`: moments have their leading dimension, counters have none."""
    keep = list(lanes)

    def part(value: Any) -> Any:
        """The lanes' part of a moment; a counter as it is."""
        return value[keep] if isinstance(value, Tensor) and value.dim() > 0 and len(value) == before else value

    return {number: {name: part(value) for name, value in values.items()} for number, values in saved.items()}


def trainable(weights: Stack, names: Sequence[str]) -> list[Tensor]:
    """Switch gradients to the named tensors of a stack, off for all others; returns those."""
    for name, tensor in weights.items():
        tensor.grad = None
        tensor.requires_grad_(name in names)
    return [weights[name] for name in weights if name in names]
