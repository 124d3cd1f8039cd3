"""LightCNN's training as `lightcnn.train` runs it, for `lightcnn_step.py` to measure; its processes import no more."""

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from bench_report import now, smooth_images
from torch import Tensor

from lightcnn import feed, training
from lightcnn.algorithm import CARRY, plan
from lightcnn.config import Config
from lightcnn.fused import stack
from lightcnn.problem import Lane, Problem
from lightcnn.state import Training
from shared.config import parse
from shared.gpu import setup

CLASSES, SIDE, BATCH, SEEDS = 10, 28, 32, 5
DEALT = ((0, 1, 2), (3, 4))


@dataclass(frozen=True)
class Sizes:
    """How much is measured; `QUICK` only shows that it runs."""

    steps: int = 200
    rounds: int = 5
    threads: int = 2  # of the sides that say "two threads"


FULL, QUICK = Sizes(), Sizes(2, 1, threads=1)


class Ours:
    """One phase in training: some seeds side by side, on images of this file."""

    def __init__(self, seeds: tuple[int, ...], sizes: Sizes, device: torch.device, phase: int = 0, *set_: str) -> None:
        """Args: phase: of the plan of the method. set_: overrides of the configuration."""
        text = "paper: lightcnn\ndata: {name: mnist}\nstage1: {patience: 0}\n"
        self.config = parse(text, Config, [f"seeds={len(seeds)}", *set_], source="benchmark")
        count = sizes.steps * BATCH
        images = smooth_images(count + CLASSES, "train", 1, SIDE).to(device)
        labels = (torch.arange(len(images)) % CLASSES).to(device)
        places = torch.arange(len(images))
        lanes = tuple(Lane(seed, None, places[:count], places[count:]) for seed in seeds)
        self.problem = Problem(images, labels, places, tuple(map(str, range(CLASSES))), lanes, "")
        step = plan(self.config, self.problem)[phase]
        start = {} if phase == 0 else {CARRY: stack([step.network.initial(lane.init_seed("a")) for lane in lanes])}
        self.begin: Callable[[], Training] = lambda: training.begin(step, start, self.problem, self.config)
        self.training, self.device = self.begin(), device

    def run_pass(self) -> Tensor:
        """An epoch by the calls of `lightcnn.train`, without validation; returns each network's mean loss [L]."""
        training.train_epoch(self.training, self.problem, self.config)
        assert self.training.loss_sums is not None
        losses = self.training.loss_sums.cpu() / len(self.training.lanes[0].train)
        self.training.epoch, self.training.batch = self.training.epoch + 1, 0
        self.training.loss_sums = self.training.right = None
        return losses

    def seconds(self) -> float:
        """The time of a pass."""
        began = now(self.device)
        self.run_pass()
        return now(self.device) - began

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What the steps of the epoch are fed with, for one seed."""
        return ((batch.inputs, batch.labels[0]) for batch in feed.batches(self.training, self.problem))


def work(asked: Connection, deals: list[tuple[int, ...]], sizes: Sizes) -> None:
    """A process of one thread that runs a pass of one of its deals whenever it is asked, and answers with its losses.

    It ends when it is asked for `None`.
    """
    device = setup("cpu", 1)
    runs = [Ours(seeds, sizes, device) for seeds in deals]
    while (number := asked.recv()) is not None:
        asked.send(runs[number].run_pass().tolist())


class Processes:
    """Two processes beside this one, each with its deal of the seeds (0) and with all of them (1)."""

    def __init__(self, sizes: Sizes) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in DEALT]
        self.ends = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=work, args=(theirs, [deal, tuple(range(SEEDS))], sizes), daemon=True)
            for (_, theirs), deal in zip(pairs, DEALT, strict=True)
        ]
        for process in self.processes:
            process.start()

    def run_pass(self, number: int) -> Tensor:
        """A pass of both, side by side; returns the losses of both."""
        for end in self.ends:
            end.send(number)
        return torch.tensor([loss for end in self.ends for loss in end.recv()])

    def close(self) -> None:
        """End both."""
        for end, process in zip(self.ends, self.processes, strict=True):
            end.send(None)
            process.join()
