"""The budget track: the best network and recipe within the paper's number of parameters. None of it is the paper's.

Networks are layouts, so that a search is a change of one line; the recipe can add label smoothing and a teacher.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from lightcnn.baselines import ImageShape
from lightcnn.model import glorot_uniform_, he_normal_, linear
from shared.errors import ConfigError, RunError

if TYPE_CHECKING:
    from lightcnn.config import Config
    from lightcnn.problem import Problem

LAYOUT = r"([crps][1-9][0-9]{0,3}|P)( ([crps][1-9][0-9]{0,3}|P))*"  # what `LayoutNet` reads


class Convolution(nn.Module):
    """A k x k convolution to `after` channels, batch norm, ReLU; `residual` adds the input before the ReLU."""

    def __init__(self, before: int, after: int, kernel: int, residual: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
        self.norm, self.residual = nn.BatchNorm2d(after), residual

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, H, W]."""
        outputs = self.norm(self.conv(inputs))
        return functional.relu(inputs + outputs if self.residual else outputs)


class Separable(nn.Module):
    """3x3 a channel, 1x1 to `after` channels, norm, ReLU; then the input is added where the width stays.

    9 C + C C' weights for a convolution's 9 C C'.
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(before, before, 3, padding=1, groups=before, bias=False)
        self.pointwise = nn.Conv2d(before, after, 1, bias=False)
        self.norm, self.residual = nn.BatchNorm2d(after), before == after

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, before, H, W] -> [B, after, H, W]."""
        outputs = functional.relu(self.norm(self.pointwise(self.depthwise(inputs))))
        return inputs + outputs if self.residual else outputs


class LayoutNet(nn.Module):
    """A layout's blocks, global average pooling, a dense layer.

    A layout such as "c16 s32 P s48" names the blocks from the image on, with their output channels:

    c   3x3 convolution      p   1x1 convolution      r   3x3 convolution with its input added
    s   separable            P   2x2 max-pool
    """

    def __init__(self, layout: str, shape: ImageShape, seed: int) -> None:
        """Initialise from `seed` alone; ConfigError for a layout that cannot be built."""
        super().__init__()
        if not re.fullmatch(LAYOUT, layout):
            raise ConfigError(f"method.layout: {layout!r} cannot be read; write blocks such as 'c16 s32 P s48'")
        blocks, width = list[nn.Module](), shape.in_channels
        for token in layout.split():
            kind, after = token[0], int(token[1:] or width)
            if kind == "r" and after != width:
                raise ConfigError(f"method.layout: {token} adds its input, which has {width} channels; write r{width}")
            blocks.append({
                "P": lambda a, b: nn.MaxPool2d(2),
                "c": lambda a, b: Convolution(a, b, 3),
                "p": lambda a, b: Convolution(a, b, 1),
                "r": lambda a, b: Convolution(a, b, 3, residual=True),
                "s": Separable,
            }[kind](width, after))  # fmt: skip
            width = after
        if shape.image_size >> layout.split().count("P") < 1:
            raise ConfigError(
                f"method.layout: {layout.count('P')} pools leave nothing of {shape.image_size} pixels; take one out"
            )
        self.blocks, self.fc = nn.Sequential(*blocks), linear(width, shape.num_classes)
        generator = Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                he_normal_(module, generator)
        glorot_uniform_(self.fc, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, H] in [0, 1]."""
        return cast(Tensor, self.fc(self.blocks(2 * images - 1).mean((2, 3))))


@dataclass(frozen=True)
class Recipe:
    """How the loss and the decay of a budget run differ from the paper's.

    decay is decoupled, a share of the rate, and spares norms and biases. `teacher` is the folder of a finished run
    whose probabilities at `temperature` take `teacher_share` of the loss.
    """

    decay: float
    label_smoothing: float = 0.0
    teacher: Path | None = None
    teacher_share: float = 0.0
    temperature: float = 1.0


def recipe_losses(logits: Tensor, targets: Tensor, soft: Tensor | None, recipe: Recipe) -> Tensor:
    """The loss of each of L networks, [L]: cross-entropy, mixed with distillation (Hinton et al. 2015, equation 3).

    (1 - s) CE(logits, targets) + s T^2 CE(softmax(soft / T), softmax(logits / T)), means over the batch.

    Args:
        logits: [L, B, K].
        targets: [L, B].
        soft: the teacher's logits [L, B, K], None without a teacher.
    """
    flat = logits.flatten(0, 1)
    hard = functional.cross_entropy(flat, targets.flatten(), reduction="none", label_smoothing=recipe.label_smoothing)
    losses = hard.view(targets.shape).mean(dim=1)
    if soft is None:
        return losses
    share, t = recipe.teacher_share, recipe.temperature
    wanted = (soft / t).softmax(dim=-1)
    distilled = -(wanted * (logits / t).log_softmax(dim=-1)).sum(dim=-1).mean(dim=1)
    return (1 - share) * losses + share * t**2 * distilled


@torch.no_grad()
def teacher_logits(recipe: Recipe, problem: "Problem", config: "Config") -> Tensor | None:
    """The teacher's logits [N, K] of all images, each the mean with its mirror image's where the run flips images.

    One look at each image instead of one at each of its augmented versions: a teacher of any size costs seconds.

    Raises:
        CheckpointError, RunError: the teacher's run is missing or unfinished, or was not trained on the same images,
            or in folds.
    """
    from lightcnn.algorithm import final_point
    from lightcnn.config import BudgetConfig
    from lightcnn.eval import open_run
    from lightcnn.feed import pixels
    from shared.gpu import autocast

    if recipe.teacher is None:
        return None
    run = open_run(recipe.teacher, problem)
    if any(lane.fold is not None for lane in run.problem.lanes) or any(step.fold is not None for step in run.steps):
        raise RunError(
            f"{recipe.teacher}: trained in folds, so it saw validation images; name a run without method.kfold"
        )
    network, theirs = run.steps[-1].network, run.points[final_point(run.steps)]
    flips = isinstance(config.method, BudgetConfig) and config.method.flip
    found = []
    for images in torch.split(problem.images, 256):
        views = [pixels(images), pixels(images.flip(-1))][: 1 + flips]
        with autocast(images.device, run.config.precision):
            logits = [
                network.forward(theirs, v.expand(len(run.problem.lanes), *v.shape), network.levels) for v in views
            ]
        found.append(torch.stack([x.float() for x in logits]).mean(dim=(0, 1)))
    return torch.cat(found)
