"""Claims as code: what a paper says, what was measured, and a verdict that is computed, never written.

A figure is named `method/metric`, as in `fedavg/generic.accuracy`, and is looked up for each seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from shared.metrics import PairedDifference, mean_and_std, paired_difference

Verdict = Literal["reproduced", "not reproduced", "inconclusive", "not run"]
Figures = Mapping[str, Mapping[int, float]]  # "method/metric" -> seed -> value
Opponent = str | tuple[str, ...] | float
MIN_SEEDS = 3


@dataclass(frozen=True)
class Comparison:
    """`left` is above `right` (a figure, the best in mean of several, or a number), by paired differences over seeds.

    `percent`: the figures are shares, to be shown in per cent; `headline`: it stands in the one table of all papers.
    """

    text: str
    source: str
    left: str
    right: Opponent
    paper: str = "-"
    percent: bool = True
    headline: bool = False


@dataclass(frozen=True)
class Fact:
    """A figure that needs no statistics: it holds in every run or it does not; `headline` as in `Comparison`."""

    text: str
    source: str
    figure: str
    relation: Literal["==", "<=", ">="]
    value: float
    tolerance: float = 0.0
    paper: str = "-"
    headline: bool = False


Claim = Comparison | Fact


@dataclass(frozen=True)
class Judgement:
    """One row of a study's last table."""

    claim: Claim
    ours: str
    n: int
    verdict: Verdict


def judge(claim: Claim, figures: Figures, statistics: bool = True) -> Judgement:
    """Compare a claim with the figures; `statistics` is False at a scale whose accuracies mean nothing."""
    if isinstance(claim, Fact):
        return _judge_fact(claim, figures)
    if not statistics:
        return Judgement(claim, "-", 0, "not run")
    left = figures.get(claim.left, {})
    name, right = _opponent(claim.right, figures, left)
    seeds = sorted(set(left) & set(right))
    if len(seeds) < MIN_SEEDS:
        return Judgement(claim, f"{len(seeds)} paired seeds", len(seeds), "not run")
    difference = paired_difference([left[s] for s in seeds], [right[s] for s in seeds])
    ours = show_difference(difference, claim.percent) + (" points" if claim.percent else "")
    if isinstance(claim.right, tuple):
        method, _, metric = name.partition("/")
        ours += f" against {metric if claim.left.startswith(method + '/') else method}"
    verdict: Verdict = "reproduced" if difference.low > 0 else "inconclusive"
    return Judgement(claim, ours, len(seeds), "not reproduced" if difference.high < 0 else verdict)


def _opponent(right: Opponent, figures: Figures, left: Mapping[int, float]) -> tuple[str, Mapping[int, float]]:
    if isinstance(right, float | int):
        return "", dict.fromkeys(left, float(right))
    names = (right,) if isinstance(right, str) else right
    if not all(figures.get(name) for name in names):  # a missing opponent must not make a claim easier
        return "", {}
    best = max(names, key=lambda name: mean_and_std(list(figures[name].values()))[0])
    return best, figures[best]


def _judge_fact(claim: Fact, figures: Figures) -> Judgement:
    values = list(figures.get(claim.figure, {}).values())
    if not values:
        return Judgement(claim, "-", 0, "not run")
    below = all(value <= claim.value + claim.tolerance for value in values)
    above = all(value >= claim.value - claim.tolerance for value in values)
    holds = {"==": below and above, "<=": below, ">=": above}[claim.relation]
    low, high = min(values), max(values)
    ours = " to ".join(dict.fromkeys((number(low), number(high))))
    return Judgement(claim, ours, len(values), "reproduced" if holds else "not reproduced")


def number(value: float) -> str:
    """A figure as a person writes it: `12,406`, `0.6`, `8.4e-05`."""
    if math.isfinite(value) and value == int(value):
        return f"{int(value):,}"
    return f"{value:.2g}" if abs(value) < 0.01 else f"{value:.4g}"


def show_difference(difference: PairedDifference, percent: bool = True) -> str:
    """`+2.80 ± 0.90 [+0.60, +5.00]`: mean, deviation, 95 % interval of the paired difference."""
    scale, digits = (100, 2) if percent else (1, 3)
    mean, low, high = (f"{scale * v:+.{digits}f}" for v in (difference.mean, difference.low, difference.high))
    return f"{mean} ± {scale * difference.std:.{digits}f} [{low}, {high}]"


def show_mean(values: Sequence[float], percent: bool = True, digits: int | None = None) -> str:
    """`71.2 ± 0.9`: mean and deviation over seeds; without deviation for one seed."""
    mean, std = mean_and_std(list(values))
    scale, usual = (100, 1) if percent else (1, 3)
    digits = usual if digits is None else digits
    return f"{scale * mean:.{digits}f}" + (f" ± {scale * std:.{digits}f}" if len(values) > 1 else "")
