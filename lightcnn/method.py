"""The paper's ideas: two outputs and one loss, the unfreezing from the top, and when training stops and what it keeps.

Pure functions and data, no training code. The merge itself is `model.merge`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from torch.nn import functional

from shared.errors import ConfigError

# The merged model's groups of layers from the bottom to the top; branches a and b are one group: unfrozen together.
GROUPS = ("conv1", "conv2", "head", "fc1", "fc2")

Schedule = Literal["paper", "literal", "notebook", "all_at_once"]
Optimizer = Literal["nadam", "sgd"]
MIN_DELTA = 0.001  # of validation accuracy, everywhere (notebook)


@dataclass(frozen=True)
class Phase:
    """Some epochs in which the groups `trains` move and all others stand still, with a fresh optimiser.

    It ends after `epochs`, or after `patience` epochs without an improvement by `MIN_DELTA` (0: never); the epochs
    before the index `start` do not count.
    """

    name: str
    trains: tuple[str, ...]
    optimizer: Optimizer
    epochs: int
    patience: int
    start: int = 0


STAGE1 = Phase("stage1", ("conv1", "conv2", "fc"), "nadam", epochs=20, patience=5, start=3)  # notebook


def unfreezing_schedule(name: str) -> list[Phase]:
    """The phases of stage 2, each with the groups that it trains.

    paper         the new head, then the heads, the second and the first convolutions: from the last layer backwards
    literal       the same with the very last layer alone before all
    notebook      everything but the last layer, then everything (the author's notebook)
    all_at_once   everything, and again everything: what unfreezing is worth

    Raises:
        ConfigError: an unknown name.
    """
    top = {n: GROUPS[-n:] for n in range(1, 6)}
    first = Phase("P1", top[2], "nadam", epochs=10, patience=5)
    paper = [
        first,
        Phase("P2", top[3], "sgd", epochs=10, patience=5),
        Phase("P3", top[4], "sgd", epochs=10, patience=5),
        Phase("P4", top[5], "sgd", epochs=50, patience=10),
    ]
    last = Phase("2b", top[5], "sgd", epochs=50, patience=10)
    schedules = {
        "paper": paper,
        "literal": [replace(first, name="P0", trains=top[1]), *paper],
        "notebook": [Phase("2a", GROUPS[:-1], "nadam", epochs=10, patience=5), last],
        "all_at_once": [Phase("2a", top[5], "nadam", epochs=10, patience=5), last],
    }
    if name not in schedules:
        raise ConfigError(f"there is no unfreezing schedule {name!r}; choose from {', '.join(schedules)}")
    return schedules[name]


def fold_phases(folds: int) -> list[Phase]:
    """The notebook's "K-fold" (2c): one model goes on through all folds, without being reset."""
    return [Phase(f"fold{k + 1}", GROUPS, "sgd", epochs=10, patience=3) for k in range(folds)]


def dual_loss(logits: Sequence[Tensor], targets: Tensor) -> Tensor:
    """CE(branch a, y) + CE(branch b, y), each a mean over the batch, both with weight 1.

    Args:
        logits: of each output, [B, K].
        targets: [B], the class of the clean image and of its augmented version alike.
    """
    losses = [functional.cross_entropy(output, targets) for output in logits]
    return sum(losses[1:], losses[0])


def lane_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """`dual_loss` of many networks side by side, each loss for itself: [L, B, K] and [L, B] -> [L]."""
    losses = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(dim=1)


@dataclass
class EarlyStopping:
    """Keras' rule, and beside it Keras' checkpoint: the best epoch without any `min_delta`.

    `best_epoch` and `kept_epoch` are indices from 0, or -1 before the first; `kept` is what early stopping restores;
    `epochs` counts those that were seen.
    """

    patience: int
    start: int = 0
    min_delta: float = MIN_DELTA
    best: float = -math.inf
    best_epoch: int = -1
    kept: float = -math.inf
    kept_epoch: int = -1
    wait: int = 0
    epochs: int = 0
    stopped: bool = False

    def update(self, epoch: int, value: float) -> tuple[bool, bool]:
        """Take an epoch's validation accuracy; returns (is the best so far, is what early stopping would restore)."""
        self.epochs = epoch + 1
        is_best = value > self.best
        if is_best:
            self.best, self.best_epoch = value, epoch
        if epoch < self.start:
            return is_best, False
        self.wait += 1
        improved = value - self.min_delta > self.kept
        if improved:
            self.kept, self.kept_epoch, self.wait = value, epoch, 0
        elif self.patience and self.wait >= self.patience and epoch > 0:
            self.stopped = True
        return is_best, improved
