"""Training runs without a command, and a small problem of synthetic images."""

from pathlib import Path
from typing import Any

import torch

from mdcs.config import Config
from mdcs.problem import Problem, thirds
from mdcs.train import train
from mdcs.views import ResidentViews
from shared.batches import Resident
from shared.gpu import stream
from shared.longtail import shot_groups
from shared.run import Run

CPU = torch.device("cpu")
STEPS = 4  # an epoch of the tiny run, which has two


def run_of(folder: Path, config: Config) -> dict[str, Any]:
    with Run(folder, config, "test") as run:
        return train(config, run)


def synthetic(counts: tuple[int, ...] = (100, 20, 4)) -> Problem:
    """Classes are bright bands in noise: easy, but not at once."""
    draws = stream(0, "synthetic")

    def images(labels: torch.Tensor) -> torch.Tensor:
        pixels = torch.randint(0, 160, (len(labels), 1, 14, 14), generator=draws)
        for k, label in enumerate(labels.tolist()):
            pixels[k, :, 4 * label : 4 * label + 4] += 20
        return pixels.byte()

    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    tests = torch.arange(len(counts)).repeat(40)
    return Problem(
        ResidentViews(images(labels), labels, (0.35,), (0.2,), "none"),
        Resident(images(tests), tests, (0.35,), (0.2,)),
        counts, tuple("abc"), shot_groups(counts), thirds(list(counts)), 1, None, {"train": "a", "test": "b"},
    )  # fmt: skip
