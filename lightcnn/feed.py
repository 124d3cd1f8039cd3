"""What a training step is fed with: each lane's own order, augmentation and dropout, prepared some batches at once.

Where layers are frozen from the bottom, their outputs are computed once a phase.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightcnn import fused
from lightcnn.algorithm import Step
from lightcnn.augment import augment, draw
from lightcnn.config import Config
from lightcnn.model import DROPOUT
from lightcnn.problem import Problem
from lightcnn.state import Training
from shared.batches import epoch_order, split_batches
from shared.gpu import autocast

AUGMENTED_AT_ONCE = 128  # on a CPU: few enough for the caches, a tenth off a step
CHUNK_IMAGES = 512  # a lane's images prepared at once; a constant, for the draws of dropout depend on it


def at_once(device: torch.device, networks: int) -> int:
    """Images of each network in one forward pass without gradient; on a CPU few enough for the caches."""
    return max(1, (128 if device.type == "cpu" else 8192) // networks)


def frozen_levels(step: Step) -> tuple[str, ...]:
    """The levels from the bottom that stand still in this phase and draw nothing: their outputs never change."""
    first = next((n for n, level in enumerate(step.network.levels) if level in step.phase.trains), 0)
    return step.network.steady[:first]


def live_levels(training: Training) -> tuple[str, ...]:
    """The levels that a step runs through."""
    frozen = 0 if training.inputs is None else len(frozen_levels(training.step))
    return training.step.network.levels[frozen:]


@torch.no_grad()
def frozen_outputs(training: Training, problem: Problem, config: Config) -> list[Tensor] | None:
    """For each lane the outputs [N, ...] of the frozen layers on all images, or None where they do not fit.

    The same computation as in every step, done once: they draw nothing, and the images of stage 2 are not
    augmented.
    """
    step, levels = training.step, frozen_levels(training.step)
    if not levels:
        return None
    one = fused.rows(training.weights, [0])
    sample = step.network.forward(one, pixels(problem.images[None, :1]), levels)
    needed = len(training.lanes) * len(problem.images) * sample.numel() * sample.element_size()
    if needed > config.stage2.cache_mib * 2**20:
        return None
    outputs = []
    for lane in range(len(training.lanes)):
        own, some = fused.rows(training.weights, [lane]), at_once(problem.images.device, 1)
        whole = sample.new_empty(len(problem.images), *sample.shape[2:])
        for images, place in zip(torch.split(problem.images, some), torch.split(whole, some), strict=True):
            with autocast(images.device, config.precision):
                place.copy_(step.network.forward(own, pixels(images[None]), levels)[0])
        outputs.append(whole)
    return outputs


def pixels(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]: the paper normalises in no other way."""
    return images.float() / 255


def gather(training: Training, problem: Problem, indices: Tensor) -> Tensor:
    """What the trained layers get of the images [A, B]: [A, B, ...], for A active lanes."""
    if training.inputs is None:
        return pixels(problem.images[indices])
    return torch.stack([training.inputs[lane][own] for lane, own in zip(training.active, indices, strict=True)])


def batch_positions(training: Training) -> list[Tensor]:
    """The batches of an epoch, as positions in a lane's order."""
    return split_batches(torch.arange(len(training.lanes[0].train)), training.step.batch_size)


def orders(training: Training) -> Tensor:
    """The order of this epoch: training images' indices [A, n], each lane's own."""
    chosen = [training.lanes[lane] for lane in training.active]
    name = training.step.phase.name
    return torch.stack(
        [lane.train[epoch_order(len(lane.train), lane.draws("order", name, training.epoch))] for lane in chosen]
    )


def warps(training: Training) -> dict[int, Tensor]:
    """Of each member that is augmented, the draws [A, n, 7] of this epoch, in the order of its images."""
    found, name, n = {}, training.step.phase.name, len(training.lanes[0].train)
    for member, images in enumerate(training.step.images):
        if images.ranges is not None:
            found[member] = torch.stack(
                [draw(n, images.ranges, training.lanes[lane].draws("augment", name, training.epoch, member))
                 for lane in training.active]
            )  # fmt: skip
    return found


class Batch(NamedTuple):
    """Inputs [L, B, ...], labels [L, B], units [L, B, width] that dropout keeps, a teacher's logits [L, B, K]."""

    inputs: Tensor
    labels: Tensor
    kept: Tensor | None
    soft: Tensor | None


def batches(training: Training, problem: Problem) -> Iterator[Batch]:
    """The batches of the epoch from `training.batch` on. Some are prepared at once; what each draws never changes."""
    order, drawn, positions = orders(training), warps(training), batch_positions(training)
    per_chunk = max(1, CHUNK_IMAGES // training.step.batch_size)
    for first in range(training.batch - training.batch % per_chunk, len(positions), per_chunk):
        chunk = positions[first : first + per_chunk]
        places = torch.cat(chunk)
        indices = order[:, places].to(problem.images.device)
        inputs = prepare(training, problem, indices, {m: d[:, places] for m, d in drawn.items()})
        labels = problem.labels[indices].repeat_interleave(training.members, dim=0)
        soft = None if training.soft is None else training.soft[indices].repeat_interleave(training.members, dim=0)
        kept = dropout_masks(training, len(places), first, problem.images.device)
        at = 0
        for number, batch in enumerate(chunk, first):
            part = slice(at, at + len(batch))
            at += len(batch)
            if number >= training.batch:
                some = (None if every is None else every[:, part] for every in (kept, soft))
                yield Batch(inputs[:, part], labels[:, part], *some)


def prepare(training: Training, problem: Problem, indices: Tensor, drawn: dict[int, Tensor]) -> Tensor:
    """Inputs [L, B, ...] of the images [A, B], each member's augmented in its own way."""
    clean = gather(training, problem, indices)
    if training.members == 1 and not drawn:
        return clean
    views = []
    for member, images in enumerate(training.step.images):
        if images.ranges is None:
            views.append(clean)
        else:
            rows = drawn[member].to(clean.device).flatten(0, 1)
            some = AUGMENTED_AT_ONCE if clean.device.type == "cpu" else max(1, len(rows))
            parts = zip(torch.split(clean.flatten(0, 1), some), torch.split(rows, some), strict=True)
            changed = [augment(part, own, images.ranges, images.warp) for part, own in parts]
            views.append(torch.cat(changed).view_as(clean))
    return torch.stack(views, dim=1).flatten(0, 1)


def dropout_masks(training: Training, n: int, first: int, device: torch.device) -> Tensor | None:
    """Which units dropout keeps in n images from batch `first` on: bool [A, n, width], or None without dropout."""
    width = training.step.network.dropout
    if not width:
        return None
    names = ("dropout", training.step.phase.name, training.epoch, first)
    masks = [torch.rand(n, width, generator=training.lanes[lane].draws(*names)) >= DROPOUT for lane in training.active]
    return torch.stack(masks).to(device)
