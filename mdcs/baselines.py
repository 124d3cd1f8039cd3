"""The losses that the paper compares with: balanced softmax, LDAM-DRW, RIDE, SADE, BalPoE and NCL.

Pure functions, notation and precision as in `mdcs.method`: logits [V, E, C], a sum over experts of means over views; a
single network is E = 1. Plain cross-entropy is `mdcs.method.expert_cross_entropy`. What depends on class counts alone
([C], float64) is made once, by the first group of functions; the losses bring it to the precision of the logits.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mdcs.method import (
    check_classes,
    check_rows,
    diversity_loss,
    expert_cross_entropy,
    full_precision,
    kl_divergence,
    positive_counts,
)
from shared.errors import ConfigError, DataError


def ldam_margins(class_counts: Tensor | Sequence[float], largest: float = 0.5) -> Tensor:
    """Margins that grow as a class gets rarer (Cao et al. 2019, LDAM).

    m_c = largest * n_c^(-1/4) / max_k n_k^(-1/4)          in units of the cosine

    Returns [C]; the rarest class has `largest`. Raises DataError for a count that is not positive.
    """
    margins = positive_counts(class_counts) ** -0.25
    return largest * margins / margins.max()


def deferred_weights(class_counts: Tensor | Sequence[float], beta: float = 0.9999) -> Tensor:
    """Class weights by the effective number of images (Cui et al. 2019), LDAM's after its first stage (DRW).

    w_c ~ (1 - beta) / (1 - beta^n_c),  scaled to sum to C

    Returns [C]. Raises DataError for a count that is not positive, ConfigError for a beta outside [0, 1).
    """
    if not 0 <= beta < 1:
        raise ConfigError(f"beta {beta} is outside [0, 1)")
    counts = positive_counts(class_counts)
    weights = (1 - beta) / (1 - beta**counts)
    return torch.mul(weights / weights.sum(), len(counts))


def ride_temperatures(class_counts: Tensor | Sequence[float], gamma: float = 0.05) -> Tensor:
    """RIDE's temperature of each class in the second stage; rare classes get the lower one (Wang et al. 2021).

    t_c = (gamma C pi_c + 1 - gamma) / max_k (gamma C pi_k + 1 - gamma)

    Returns [C], the largest class having 1. Raises DataError for a count that is not positive, ConfigError for a gamma
    outside [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ConfigError(f"gamma {gamma} is outside [0, 1]")
    counts = positive_counts(class_counts)
    temperatures = gamma * len(counts) * counts / counts.sum() + 1 - gamma
    return temperatures / temperatures.max()


def inverse_prior(prior: Tensor) -> Tensor:
    """Hand the priors out in reverse: the largest class gets the smallest, and so on (Zhang et al. 2022, SADE).

    Of equal classes the later one counts as the larger. Any values will do, log priors too. `prior`, result: [C].
    """
    ascending, order = torch.sort(prior, stable=True)
    rank = order.argsort()
    return ascending.flip(0)[rank]


def balanced_softmax_loss(logits: Tensor, targets: Tensor, log_counts: Tensor) -> Tensor:
    """Balanced softmax for every expert: cross-entropy of z + log n (Ren et al. 2020); the raw z predict.

    Args:
        logits: z [V, E, C], raw.
        targets: y [V] int64.
        log_counts: log n [C].

    Returns a scalar. Raises DataError for shapes that do not fit.
    """
    check_classes(logits, log_counts=log_counts)
    z = full_precision(logits)
    return expert_cross_entropy(z + log_counts.to(z), targets)


def ldam_loss(logits: Tensor, targets: Tensor, margins: Tensor, weights: Tensor | None, scale: float = 30.0) -> Tensor:
    """Cross-entropy that must win by a margin: of s (cos - m_y at the true class), s cos elsewhere (LDAM).

    Args:
        logits: s cos [V, E, C], as the cosine classifier gives them.
        targets: y [V] int64.
        margins: m [C], see `ldam_margins`.
        weights: w [C] as `deferred_weights` gives them, or None. An expert's mean is then torch's weighted one,
            sum_i w_yi l_i / sum_i w_yi.
        scale: s, the classifier's.

    Returns a scalar: the sum of the experts' losses. Raises DataError for shapes that do not fit.
    """
    check_rows(logits, targets)
    check_classes(logits, margins=margins)
    z = full_precision(logits)
    handicap = scale * margins.to(z) * _true_class(targets, logits.shape[-1])
    return expert_cross_entropy(z - handicap[:, None], targets, weights)


def ride_loss(
    logits: Tensor,
    targets: Tensor,
    margins: Tensor,
    weights: Tensor | None,
    temperatures: Tensor,
    diversity_weight: float = 0.45,
    scale: float = 30.0,
) -> Tensor:
    """Individual LDAM losses, and a reward for experts that differ from their mean (Wang et al. 2021, RIDE).

    L = sum_e [ LDAM_e  -  diversity_weight * tbar^2 * mean_v KL(p_mean || p_e) ]
    p_mean = softmax(sg(mean_e z_e) / t),  p_e = softmax(z_e / t)          sg: stop-gradient; tbar = mean_c t_c

    Without diversity weight this is the sum of the experts' losses; the authors' code then takes the loss of the mean
    logits instead, which is another method. The stopped gradient is 0 in any case: p_mean minimises sum_e KL(. || p_e).

    Args:
        logits: z = s cos [V, E, C].
        targets: y [V] int64.
        margins: m [C], see `ldam_margins`; `weights` and `scale` as in `ldam_loss`.
        temperatures: t [C], one a class: ones in the first stage, `ride_temperatures` in the second.

    Returns a scalar. Raises DataError for shapes that do not fit.
    """
    check_classes(logits, temperatures=temperatures)
    individual = ldam_loss(logits, targets, margins, weights, scale)
    z = full_precision(logits)
    t = temperatures.to(z)
    mean = torch.log_softmax(z.detach().mean(dim=1, keepdim=True) / t, dim=-1)
    divergence = kl_divergence(mean, torch.log_softmax(z / t, dim=-1)).mean(dim=0).sum()
    return individual - diversity_weight * t.mean().square() * divergence


def sade_loss(logits: Tensor, targets: Tensor, log_prior: Tensor, tau: float) -> Tensor:
    """Three experts: as the data are, balanced, and as if the tail were the head (Zhang et al. 2022, SADE).

    L = CE(z_1) + CE(z_2 + log pi) + CE(z_3 + log pi - tau log inv(pi))          inv: `inverse_prior`

    On an exponential profile expert 3 is trained under n^(1 + tau), so this is the diversity loss with (0, 1, 1 + tau).

    Args:
        logits: z [V, 3, C], raw.
        targets: y [V] int64.
        log_prior: log pi [C]; log counts do the same.
        tau: 2 on CIFAR and ImageNet, 1 on Places and iNaturalist.

    Returns a scalar. Raises ConfigError unless there are 3 experts, DataError for shapes that do not fit.
    """
    check_rows(logits, targets)
    check_classes(logits, log_prior=log_prior)
    if logits.shape[1] != 3:
        raise ConfigError(f"SADE has 3 experts, the logits have {logits.shape[1]}")
    z = full_precision(logits)
    prior = log_prior.to(z)
    offsets = torch.stack([torch.zeros_like(prior), prior, prior - tau * inverse_prior(prior)])
    return expert_cross_entropy(z + offsets, targets)


def balpoe_loss(
    logits: Tensor, targets: Tensor, log_prior: Tensor, taus: Tensor | Sequence[float] = (0.0, 1.0, 2.0)
) -> Tensor:
    """Logit-adjusted experts whose average is balanced (Sanchez Aimar et al. 2023, BalPoE).

    L = sum_e CE(z_e + tau_e log pi),          mean_e tau_e = 1

    Args:
        logits: z [V, E, C], raw.
        targets: y [V] int64.
        log_prior: log pi [C].
        taus: [E]; a tensor on the logits' device is not copied there in each call, nor are its values checked there.

    Returns a scalar. Raises ConfigError for taus whose mean is not 1 or that are not one an expert, DataError for
    shapes that do not fit.
    """
    exponents = torch.as_tensor(taus, dtype=torch.float64)
    if exponents.device.type == "cpu" and not math.isclose(exponents.mean().item(), 1, abs_tol=1e-6):
        raise ConfigError(f"the taus have a mean of {exponents.mean().item():g}; BalPoE's is 1")
    return diversity_loss(logits, targets, log_prior, exponents)


def ncl_hard_mask(logits_first: Tensor, targets: Tensor, share: float = 0.3) -> Tensor:
    """Each view's hard classes: the true one and those most mistaken for it by network 1 (Li et al. 2022, NCL).

    Args:
        logits_first: z_1 [V, C], raw.
        targets: y [V] int64.
        share: of the C classes, rounded down, the true one included; in (0, 1].

    Returns bool [V, C] with max(1, floor(share * C)) true values a row. Raises ConfigError for a share out of range,
    DataError for shapes that do not fit.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"the share of hard classes {share} is outside (0, 1]")
    if logits_first.ndim != 2 or targets.shape != logits_first.shape[:1]:
        found = f"logits {tuple(logits_first.shape)} and targets {tuple(targets.shape)}"
        raise DataError(f"{found}; the hard classes need [views, classes] and [views]")
    classes = logits_first.shape[1]
    number = max(1, math.floor(share * classes + 1e-9))  # 0.29 * 100 is 28.999...
    ranked = logits_first.detach().masked_fill(_true_class(targets, classes), math.inf)
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(1, ranked.topk(number, dim=1).indices, True)


def ncl_loss(
    logits: Tensor, targets: Tensor, log_counts: Tensor, hard_share: float = 0.3, weight: float = 0.6
) -> Tensor:
    """Networks that teach each other, over all classes and over the hard ones (Li et al. 2022, NCL; no MoCo branch).

    L = sum_i CE(a_i) + sum_i CE(h_i) + weight (D(a) + D(h)),          a_i = z_i + log n,  h_i = a_i 1[hard]
    D(x) = sum_{i != j} mean_v KL(softmax(x_j) || softmax(x_i)) / (K - 1),  gradients through both sides

    As in the authors' code the classes that are not hard have logit 0 in h; they are not left out of its softmax.

    Args:
        logits: z [V, K, C], raw, of K networks; with one network D is 0.
        targets: y [V] int64.
        log_counts: log n [C].
        hard_share: see `ncl_hard_mask`.

    Returns a scalar. Raises DataError for shapes that do not fit, ConfigError for a share out of range.
    """
    check_rows(logits, targets)
    check_classes(logits, log_counts=log_counts)
    z = full_precision(logits)
    adjusted = z + log_counts.to(z)
    hard = adjusted * ncl_hard_mask(logits[:, 0], targets, hard_share)[:, None]
    single = expert_cross_entropy(adjusted, targets) + expert_cross_entropy(hard, targets)
    return single + weight * (_disagreement(adjusted) + _disagreement(hard))


def _disagreement(logits: Tensor) -> Tensor:
    """D of NCL: KL of all ordered pairs of networks, batch means, summed; the pairs of a network with itself are 0."""
    log_p = torch.log_softmax(logits, dim=-1)
    pairs = kl_divergence(log_p[:, :, None], log_p[:, None])  # [V, K, K]
    return pairs.mean(dim=0).sum() / max(1, logits.shape[1] - 1)


def _true_class(targets: Tensor, classes: int) -> Tensor:
    """One-hot targets, bool [V, C]; torch's one_hot may look at the values, which waits for a GPU."""
    return torch.eq(targets[:, None], torch.arange(classes, device=targets.device))
