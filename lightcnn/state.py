"""A phase of training in progress: all that changes in it, to be saved and taken up again.

A lane is one seed (or a fold of it) and trains one network an entry of `step.images`; network l of a stack of all lanes
belongs to lane l // members. All lanes take the same steps at the same time. A lane that has stopped leaves the stack.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightcnn import fused
from lightcnn.algorithm import Step, trained_names
from lightcnn.config import Config, TwoStageConfig
from lightcnn.fused import Stack
from lightcnn.method import EarlyStopping
from lightcnn.optim import (
    LEARNING_RATE,
    DecoupledSgd,
    build_optimizer,
    narrowed_state,
    optimizer_state,
    restore_optimizer,
    trainable,
)
from lightcnn.problem import Lane, folds_of


@dataclass
class Training:
    """A phase in progress. `best` and `kept` hold all lanes' networks, `weights` those of the lanes still `active`."""

    step: Step
    lanes: tuple[Lane, ...]
    active: list[int]
    weights: Stack
    optimizer: Optimizer
    stops: list[EarlyStopping]
    best: Stack
    kept: Stack
    inputs: list[Tensor] | None = None  # of each lane, what the frozen layers make of all images
    soft: Tensor | None = None  # a teacher's logits [N, K] of all images
    epoch: int = 0
    batch: int = 0
    loss_sums: Tensor | None = None
    right: Tensor | None = None

    @property
    def members(self) -> int:
        """Networks a lane."""
        return len(self.step.images)

    @property
    def done(self) -> bool:
        """Whether the phase is over."""
        return not self.active or self.epoch >= self.step.phase.epochs

    def networks(self, lanes: Sequence[int]) -> list[int]:
        """The positions of the lanes' networks in a stack of all lanes."""
        return [lane * self.members + member for lane in lanes for member in range(self.members)]


def lane_of_fold(lane: Lane, step: Step, config: Config) -> Lane:
    """The lane with the images of the step's fold, where it has one."""
    if step.fold is None:
        return lane
    assert isinstance(config.method, TwoStageConfig)
    folds = folds_of(lane.seed, lane.train, lane.validation, config.method.folds)
    return Lane(lane.seed, lane.fold, *folds[step.fold])


def new_optimizer(step: Step, weights: Stack) -> Optimizer:
    """The phase's optimiser of the tensors that the phase trains; all others get no gradient."""
    names = trained_names(step, weights)
    parameters = trainable(weights, names)
    if step.recipe is not None and step.phase.optimizer == "sgd":
        decays = [decays_in_recipe(name, weights[name]) for name in weights if name in names]
        return DecoupledSgd(parameters, LEARNING_RATE, momentum=0.9, decay=step.recipe.decay, decays=decays)
    return build_optimizer(step.phase.optimizer, parameters)


def decays_in_recipe(name: str, stacked: Tensor) -> bool:
    """Whether a tensor [L, ...] is what `budget.Recipe.decay` is for: weights of convolutions and dense layers."""
    return name.endswith("weight") and stacked.dim() > 2  # a norm's weight is [L, C]


def narrow(training: Training, going: Sequence[int]) -> None:
    """Go on with some of the active lanes: their weights and moments as they are."""
    before, state = len(training.active) * training.members, optimizer_state(training.optimizer)
    keep = training.networks(going)
    training.active = [training.active[k] for k in going]
    training.weights = fused.rows(training.weights, keep)
    if keep:
        training.optimizer = new_optimizer(training.step, training.weights)
        restore_optimizer(training.optimizer, narrowed_state(state, keep, before))


def snapshot(training: Training) -> dict[str, Any]:
    """What a checkpoint holds of a phase in progress."""
    return {
        "active": training.active, "weights": training.weights, "optimizer": optimizer_state(training.optimizer),
        "stops": [asdict(stop) for stop in training.stops],
        "best": training.best, "kept": training.kept, "epoch": training.epoch, "batch": training.batch,
        "loss_sums": training.loss_sums, "right": training.right,
    }  # fmt: skip


def restore(training: Training, saved: dict[str, Any]) -> None:
    """Take up what `snapshot` gave, in a phase that `begin` has just started."""
    device = next(iter(training.weights.values())).device

    def moved(stacked: dict[str, Tensor]) -> Stack:
        """A stack on this training's device."""
        return {name: tensor.to(device) for name, tensor in stacked.items()}

    training.active, training.weights = list(saved["active"]), moved(saved["weights"])
    training.best, training.kept = moved(saved["best"]), moved(saved["kept"])
    training.epoch, training.batch = saved["epoch"], saved["batch"]
    if training.active:
        training.optimizer = new_optimizer(training.step, training.weights)
        restore_optimizer(training.optimizer, saved["optimizer"])
    training.stops = [EarlyStopping(**stop) for stop in saved["stops"]]
    sums = saved["loss_sums"], saved["right"]
    training.loss_sums, training.right = (None if value is None else value.to(device) for value in sums)
