"""Logits, labels and class counts for the losses of the compared methods."""

import torch

from mdcs.baselines import deferred_weights, ldam_margins, ride_temperatures
from tests.mdcs.expert_cases import gaussian

COUNTS = (90, 40, 15, 6, 2)
LOG_COUNTS = torch.tensor(COUNTS, dtype=torch.float64).log()
MARGINS, WEIGHTS, TEMPERATURES = (make(COUNTS) for make in (ldam_margins, deferred_weights, ride_temperatures))


def case(views=7, experts=3, classes=5, seed=0, spread=2.0):
    targets = torch.randint(classes, (views,), generator=torch.Generator().manual_seed(seed + 1))
    return gaussian(views, experts, classes, seed=seed, spread=spread), targets
