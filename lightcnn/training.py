"""One phase of training for many networks side by side: its start, its epochs, validation, what is kept, who stops."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lightcnn import fused
from lightcnn.algorithm import CARRY, Points, Step
from lightcnn.budget import recipe_losses, teacher_logits
from lightcnn.config import Config
from lightcnn.feed import at_once, batch_positions, batches, frozen_outputs, gather, live_levels
from lightcnn.method import EarlyStopping, lane_losses
from lightcnn.optim import one_cycle, set_rate
from lightcnn.problem import Problem
from lightcnn.state import Training, lane_of_fold, narrow, new_optimizer
from shared.gpu import LossMeter, autocast


@dataclass(frozen=True)
class Epoch:
    """What an epoch gave, for each lane that trained: its seed, and by network the loss and the accuracies."""

    lane: int
    loss: list[float]
    train: list[float]
    validation: list[float]


def begin(step: Step, points: Points, problem: Problem, config: Config) -> Training:
    """Start a phase: first weights, a fresh optimiser, and the frozen layers' outputs."""
    device = problem.images.device
    lanes = tuple(lane_of_fold(lane, step, config) for lane in problem.lanes)
    weights = {name: tensor.detach().clone().to(device) for name, tensor in step.begin(points, problem.lanes).items()}
    stops = [EarlyStopping(step.phase.patience, step.phase.start) for _ in range(len(lanes) * len(step.images))]
    best, kept = (fused.rows(weights, range(len(stops))) for _ in range(2))
    optimizer, everyone = new_optimizer(step, weights), list(range(len(lanes)))
    training = Training(step, lanes, everyone, weights, optimizer, stops, best, kept)
    training.inputs = frozen_outputs(training, problem, config)
    training.soft = None if step.recipe is None else teacher_logits(step.recipe, problem, config)
    return training


def train_epoch(
    training: Training, problem: Problem, config: Config, after_step: Callable[[LossMeter], None] = lambda losses: None
) -> None:
    """Train to the end of the epoch, from the batch where it stands; NotFiniteError as `LossMeter` says.

    `after_step` gets the losses, to read them before it saves anything.
    """
    device, levels, step = problem.images.device, live_levels(training), training.step
    meter, total = LossMeter(device), len(batch_positions(training))
    if training.loss_sums is None or training.right is None:
        training.loss_sums, training.right = torch.zeros(2, len(training.active) * training.members, device=device)
    for inputs, labels, kept, soft in batches(training, problem):
        if step.peak_lr is not None:
            done = training.epoch * total + training.batch
            set_rate(training.optimizer, one_cycle(done, total * step.phase.epochs, step.peak_lr))
        training.optimizer.zero_grad(set_to_none=True)
        with autocast(device, config.precision):
            logits = step.network.forward(training.weights, inputs, levels, kept, training=True)
        if step.recipe is None:
            losses = lane_losses(logits.float(), labels)
        else:
            losses = recipe_losses(logits.float(), labels, soft, step.recipe)
        loss = losses.sum()
        meter.add(loss)
        loss.backward()  # type: ignore[no-untyped-call]
        training.optimizer.step()
        with torch.no_grad():
            training.loss_sums += losses * labels.shape[1]
            training.right += (logits.argmax(-1) == labels).sum(1)
        training.batch += 1
        after_step(meter)
    meter.read()


@torch.no_grad()
def validate(training: Training, problem: Problem, config: Config) -> list[float]:
    """Accuracy of each active network on the clean validation images of its lane."""
    held = torch.stack([training.lanes[lane].validation for lane in training.active]).to(problem.images.device)
    levels, count = live_levels(training), len(training.active) * training.members
    right = torch.zeros(count, dtype=torch.int64, device=problem.images.device)
    for indices in torch.split(held, at_once(held.device, count), dim=1):
        inputs = gather(training, problem, indices).repeat_interleave(training.members, dim=0)
        with autocast(problem.images.device, config.precision):
            logits = training.step.network.forward(training.weights, inputs, levels)
        right += (logits.argmax(-1) == problem.labels[indices].repeat_interleave(training.members, dim=0)).sum(1)
    return [value / held.shape[1] for value in right.tolist()]


def end_epoch(training: Training, accuracies: Sequence[float]) -> list[Epoch]:
    """Take the validation accuracies: keep weights, stop lanes. Returns what the epoch gave, one entry a lane."""
    assert training.loss_sums is not None
    assert training.right is not None
    n, m = len(training.lanes[0].train), training.members
    losses, right = (training.loss_sums / n).tolist(), (training.right / n).tolist()
    networks = training.networks(training.active)
    for row, (network, accuracy) in enumerate(zip(networks, accuracies, strict=True)):
        is_best, improved = training.stops[network].update(training.epoch, accuracy)
        # Before early stopping has seen an epoch, it would restore the last one.
        for wanted, held in ((is_best, training.best), (improved or training.stops[network].kept_epoch < 0,
                                                        training.kept)):  # fmt: skip
            if wanted:
                for name, tensor in training.weights.items():
                    held[name][network] = tensor[row].detach()
    report = [
        Epoch(lane, losses[k * m : k * m + m], right[k * m : k * m + m], list(accuracies[k * m : k * m + m]))
        for k, lane in enumerate(training.active)
    ]
    going = [k for k, lane in enumerate(training.active)
             if not any(training.stops[network].stopped for network in training.networks([lane]))]  # fmt: skip
    training.epoch, training.batch, training.loss_sums, training.right = training.epoch + 1, 0, None, None
    if len(going) < len(training.active):
        narrow(training, going)
    return report


def end_phase(training: Training, points: Points) -> Points:
    """The points of before and those of this phase; `carry` is what the next step goes on from."""
    held = training.best if training.step.keep == "best" else training.kept
    found = {
        name: fused.rows(held, range(member, len(training.stops), training.members))
        for member, name in enumerate(training.step.points)
    }
    if training.step.best_point is not None:
        found[training.step.best_point] = fused.rows(training.best, range(len(training.stops)))
    return {**points, **found, CARRY: training.kept}
