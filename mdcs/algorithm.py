"""Which network and which loss a configured method has; the equations are in `method.py` and `baselines.py`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mdcs import baselines
from mdcs.config import (
    BalancedSoftmaxConfig,
    BalPoeConfig,
    CeConfig,
    Config,
    DlConfig,
    LdamDrwConfig,
    MdcsConfig,
    NclConfig,
    RideConfig,
    SadeConfig,
)
from mdcs.method import diversity_loss, mdcs_loss, ramp
from mdcs.model import Architecture

METHODS = ("mdcs", "dl", "ce", "balanced_softmax", "ldam_drw", "ride", "sade", "balpoe", "ncl")

Loss = Callable[[Tensor, Tensor, int], Tensor]  # logits [V, E, C], targets [B], epoch from 1 -> scalar


@dataclass(frozen=True)
class Method:
    """The loss of a step; and the prior exponents [E] of the experts, where the method has them."""

    loss: Loss
    lambdas: Tensor | None = None


def architecture(config: Config, num_classes: int, channels: int) -> Architecture:
    """The network of the method: experts on a shared trunk, one network, or (NCL) separate networks."""
    model, method = config.model, config.method
    separate = isinstance(method, NclConfig)
    linear = separate or (isinstance(method, CeConfig) and method.classifier == "linear")
    several = config.experts > 1 and not separate
    return Architecture(
        model.name, num_classes, config.experts, several if model.reduced is None else model.reduced,
        "linear" if linear else "cosine", channels, model.depth, model.width, separate, model.share_stage3,
    )  # fmt: skip


def build_method(config: Config, class_counts: Sequence[int], device: torch.device) -> Method:
    """The method that the configuration names, for these training counts."""
    method = config.method
    counts = torch.tensor(class_counts, dtype=torch.float32, device=device)
    log_counts, log_prior = counts.log(), (counts / counts.sum()).log()
    if isinstance(method, MdcsConfig):
        lambdas = torch.tensor(method.lambdas, device=device)
        return Method(lambda z, y, epoch: mdcs_loss(
            z, y, counts, lambdas, method.alpha, ramp(epoch, method.ramp_epochs), method.temperature, method.confident
        ), lambdas)  # fmt: skip
    if isinstance(method, DlConfig):
        lambdas = torch.tensor(method.lambdas, device=device)
        return Method(lambda z, y, epoch: diversity_loss(z, of_all_views(y, z), log_counts, lambdas), lambdas)
    if isinstance(method, CeConfig):
        zero = torch.zeros(config.experts, device=device)
        return Method(lambda z, y, epoch: diversity_loss(z, of_all_views(y, z), log_counts, zero))
    if isinstance(method, BalancedSoftmaxConfig):
        one = torch.ones(config.experts, device=device)
        return Method(
            lambda z, y, epoch: baselines.balanced_softmax_loss(z, of_all_views(y, z), log_counts),
            one if config.views == "both" else None,
        )
    if isinstance(method, LdamDrwConfig | RideConfig):
        return Method(deferred_loss(config, method, counts))
    if isinstance(method, SadeConfig):
        tau = config.sade_tau
        return Method(lambda z, y, epoch: baselines.sade_loss(z, of_all_views(y, z), log_prior, tau))
    if isinstance(method, BalPoeConfig):
        taus = torch.tensor(method.taus, device=device)
        return Method(lambda z, y, epoch: baselines.balpoe_loss(z, of_all_views(y, z), log_prior, taus))
    return Method(
        lambda z, y, epoch: baselines.ncl_loss(z, of_all_views(y, z), log_counts, method.hard_share, method.weight)
    )


def deferred_loss(config: Config, method: LdamDrwConfig | RideConfig, counts: Tensor) -> Loss:
    """LDAM or RIDE: without class weights and temperatures up to the deferred epoch, with them after it."""
    margins = baselines.ldam_margins(counts, method.largest_margin)
    weights = baselines.deferred_weights(counts, method.beta)
    last = config.deferred_epoch
    if isinstance(method, LdamDrwConfig):
        return lambda z, y, epoch: baselines.ldam_loss(
            z, of_all_views(y, z), margins, weights if epoch > last else None
        )
    even, tempered = torch.ones_like(counts), baselines.ride_temperatures(counts, method.gamma)
    return lambda z, y, epoch: baselines.ride_loss(
        z, of_all_views(y, z), margins, weights if epoch > last else None, tempered if epoch > last else even,
        method.diversity_weight,
    )  # fmt: skip


def of_all_views(targets: Tensor, logits: Tensor) -> Tensor:
    """The targets [V] of all rows of the logits [V, E, C]: those of the images, once for each view."""
    return targets.repeat(len(logits) // len(targets))
