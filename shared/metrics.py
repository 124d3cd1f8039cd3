"""Figures of merit: accuracy overall, a class and a shot group; means over seeds and paired differences.

Accuracies are fractions in 0..1. Tensors may live on any device; each function moves its result to the CPU once.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.longtail import ShotGroups


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of `predictions` [N] that equal `labels` [N] (class indices); nan where N is 0."""
    return float((predictions == labels).double().mean())


def per_class_accuracy(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Accuracy within each class, float64 [C] on the CPU; nan for a class without a test image."""
    total = torch.bincount(labels, minlength=num_classes)
    right = torch.bincount(labels[predictions == labels], minlength=num_classes)
    return (right.double() / total.double()).cpu()


def group_accuracy(per_class: Tensor, groups: ShotGroups) -> dict[str, float | None]:
    """Mean over the classes of each group (many, medium, few) that have a test image; None where there is none."""
    found = {name: per_class[list(classes)] for name, classes in groups._asdict().items()}
    return {name: None if v.isnan().all() else float(v[~v.isnan()].mean()) for name, v in found.items()}


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1 in the denominator); nan for fewer than one or two values."""
    n = len(values)
    mean = math.fsum(values) / n if n else math.nan
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1)) if n > 1 else math.nan


class PairedDifference(NamedTuple):
    """left - right over paired runs: mean, sample deviation, pairs, and the 95 % interval of the mean."""

    mean: float
    std: float
    n: int
    low: float
    high: float


def paired_difference(left: Sequence[float], right: Sequence[float]) -> PairedDifference:
    """Difference of two methods run on the same seeds, with the 95 % Student-t interval of its mean.

    Fewer than two pairs give an infinite interval. Raises ValueError where the two differ in length.
    """
    differences = [a - b for a, b in zip(left, right, strict=True)]
    n, (mean, std) = len(differences), mean_and_std(differences)
    if n < 2:
        return PairedDifference(mean, std, n, -math.inf, math.inf)
    half = t_quantile(0.975, n - 1) * std / math.sqrt(n)
    return PairedDifference(mean, std, n, mean - half, mean + half)


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution with `freedom` >= 1 degrees of freedom, for probability in [0.5, 1).

    In theta = atan(t / sqrt(nu)) the density is proportional to cos(theta) ** (nu - 1): bisects its integral from 0.
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        half = (low + high) / 4
        area = scale * half * float(weights @ np.cos(half * (nodes + 1)) ** (freedom - 1))
        low, high = (2 * half, high) if area < probability - 0.5 else (low, 2 * half)
    return math.sqrt(freedom) * math.tan(low)
