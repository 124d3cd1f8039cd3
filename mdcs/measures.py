"""Measures of the paper's analysis: calibration, how far the experts differ, bias and variance over training sets."""

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15


def reliability(confidence: Tensor, right: Tensor, bins: int = BINS) -> list[tuple[int, float, float]]:
    """(images, mean confidence, accuracy) in each of `bins` equally wide bins of confidence; zeros where one is empty.

    Args: confidence [N] in 0..1 of the predicted class; right [N], whether the prediction is.
    """
    index = (confidence.double() * bins).ceil().long().clamp(1, bins) - 1  # bins (0, 1/15], (1/15, 2/15], ...
    count = torch.bincount(index, minlength=bins)
    sums = [torch.bincount(index, v.double(), minlength=bins) / count.clamp(min=1) for v in (confidence, right)]
    return list(zip(count.tolist(), sums[0].tolist(), sums[1].tolist(), strict=True))


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Expected calibration error: mean over images of |accuracy - confidence| of their bin (Guo et al. 2017)."""
    table = reliability(confidence, right, bins)
    return sum(n * abs(accuracy - sure) for n, sure, accuracy in table) / max(1, len(confidence))


def class_std(per_class: Tensor) -> float:
    """Mean over classes of the (population) deviation over experts of per-class accuracy [E, C]; a share."""
    return float(per_class.std(dim=0, correction=0).nanmean())


def pairwise_kl(logits: Tensor) -> Tensor:
    """Sum over images of KL(softmax(z_i) || softmax(z_j)), for all pairs of experts: logits [N, E, C] -> [E, E]."""
    log_p = logits.float().log_softmax(dim=-1)
    entropy = torch.einsum("nec,nec->e", log_p.exp(), log_p)
    return entropy[:, None] - torch.einsum("nic,njc->ij", log_p.exp(), log_p)


def mean_over_pairs(table: Tensor) -> float | None:
    """Mean of the entries [E, E] off the diagonal; None for a single expert."""
    experts = len(table)
    if experts < 2:
        return None
    return float((table.sum() - table.diagonal().sum()) / (experts * (experts - 1)))


def disagreement(predictions: Tensor) -> Tensor:
    """Share of images on which two experts predict different classes: predictions [N, E] -> [E, E]."""
    return (predictions[:, :, None] != predictions[:, None, :]).double().mean(dim=0)


@dataclass(frozen=True)
class BiasVariance:
    """Of models trained on K draws of the training set; shares. `variances` [K] are the models' own."""

    bias: float
    variance: float
    variances: tuple[float, ...]


def bias_variance(predictions: Tensor, labels: Tensor) -> BiasVariance:
    """Of predictions [K, N] by models of K independent training sets, after RIDE's analysis.

    The main prediction is the majority vote (ties: the lowest class). Bias: how often it is not the label. Variance:
    how often a single model differs from it.
    """
    main = torch.mode(predictions, dim=0).values
    differs = (predictions != main).double().mean(dim=1)
    return BiasVariance(float((main != labels).double().mean()), float(differs.mean()), tuple(differs.tolist()))
