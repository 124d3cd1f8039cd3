"""Figures of merit: accuracy overall, a class and a shot group; calibration; means over seeds and paired differences.

Accuracies are fractions in 0..1. Tensors may live on any device; each function moves its result to the CPU once.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

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
    result: dict[str, float | None] = {}
    for name, classes in groups._asdict().items():
        values = per_class[list(classes)]
        values = values[~values.isnan()]
        result[name] = float(values.mean()) if len(values) else None
    return result


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal bins ((b-1)/B, b/B] of the confidence (Guo et al. 2017).

    Args:
        probabilities: [N, C], rows that sum to 1.
        labels: [N].
    """
    confidence, predictions = probabilities.double().max(dim=1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64, device=probabilities.device)
    gap.index_add_(0, index, (predictions == labels).double() - confidence)
    return float(gap.abs().sum() / len(labels))


def worst_decile(values: Sequence[float]) -> float:
    """Mean of the lowest tenth of the values (rounded up to whole values); nan where there is none."""
    worst = sorted(values)[: math.ceil(len(values) / 10)]
    return math.fsum(worst) / len(worst) if worst else math.nan


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1 in the denominator; nan for fewer than two values)."""
    n = len(values)
    if n == 0:
        return math.nan, math.nan
    mean = math.fsum(values) / n
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

    Fewer than two pairs tell nothing about the spread: the interval is then infinite. Raises ValueError where the two
    differ in length.
    """
    differences = [a - b for a, b in zip(left, right, strict=True)]
    n = len(differences)
    mean, std = mean_and_std(differences)
    half = t_quantile(0.975, n - 1) * std / math.sqrt(n) if n > 1 else math.inf
    low, high = (mean - half, mean + half) if n else (-math.inf, math.inf)
    return PairedDifference(mean, std, n, low, high)


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution with `freedom` >= 1 degrees of freedom, for probability in [0.5, 1).

    Bisects the closed form of the two-sided probability (Abramowitz & Stegun 26.7.3-4) in theta = atan(t / sqrt(nu)).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_two_sided(middle, freedom) < 2 * probability - 1 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _t_two_sided(theta: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) * tan(theta))."""
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    series = 0.0
    for k in range(odd, freedom - 1, 2):
        series += term
        term *= (k + 1) / (k + 2) * math.cos(theta) ** 2
    series *= math.sin(theta)
    return 2 / math.pi * (theta + series) if odd else series


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation in -1..1 (ties share their mean rank); nan where either side is constant or has under 2 values.

    Raises ValueError where the two differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}")
    x, y = _centred_ranks(a), _centred_ranks(b)
    scale = math.sqrt(sum(r * r for r in x) * sum(r * r for r in y))
    return sum(p * q for p, q in zip(x, y, strict=True)) / scale if scale else math.nan


def _centred_ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first: dict[float, int] = {}
    last: dict[float, int] = {}
    for rank, value in enumerate(ordered):
        first.setdefault(value, rank)
        last[value] = rank
    return [(first[v] + last[v] + 1 - len(values)) / 2 for v in values]
