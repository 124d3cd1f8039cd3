"""What changes while a network is trained, and how it is saved and restored to the bit; and how long it will take."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mdcs.algorithm import architecture
from mdcs.config import Config
from mdcs.method import adjusted_logits, confident_mask
from mdcs.model import MultiExpert, build_model, place
from mdcs.pretrained import load_pretrained
from mdcs.problem import Problem, in_data_root
from shared.gpu import LossMeter, stream

FORECAST_STEPS = 20  # after which the run's time is foretold; the first half warms up


@dataclass
class Training:
    """A network in training, between two steps. `step` counts within the epoch, `epoch` the finished ones.

    `confident` [2, E] sums over the epoch's images how many were confident by raw and by adjusted logits.
    """

    model: MultiExpert
    optimizer: torch.optim.Optimizer
    log_counts: Tensor
    meter: LossMeter
    confident: Tensor
    pretrained: str | None = None  # sha256 of the file that the weights started from
    epoch: int = 0
    step: int = 0
    first_unread: int = 0  # the step of the first loss that was not looked at
    images: int = 0  # trained on in this epoch
    images_here: int = 0  # the same, by this process
    losses: list[float] = field(default_factory=list)

    def set_rate(self, factor: float) -> None:
        """Set each group's learning rate to `factor` times its own."""
        for group in self.optimizer.param_groups:
            group["lr"] = factor * group["base_lr"]

    def update(self) -> None:
        """The optimiser's step; gradients are dropped."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def count_confident(self, logits: Tensor, targets: Tensor, lambdas: Tensor | None) -> None:
        """Add up what the weak views [the first B rows of logits 2B, E, C] say, where the method has both views."""
        self.images += len(targets)
        self.images_here += len(targets)
        if lambdas is None or len(logits) != 2 * len(targets):
            return
        weak = logits[: len(targets)].detach().float()
        adjusted = adjusted_logits(weak, self.log_counts, lambdas)
        self.confident += torch.stack([confident_mask(z, targets).sum(0) for z in (weak, adjusted)])

    def read_losses(self) -> None:
        """Look at the losses since the last look.

        Raises:
            NotFiniteError: one is NaN or infinite.
        """
        self.losses += self.meter.read()
        self.first_unread = self.step

    def finish_epoch(self, counted: bool) -> dict[str, Any]:
        """The epoch's loss and, if they were counted, the shares of confident images; the next epoch begins."""
        raw, adjusted = (self.confident / self.images).tolist()
        seen = {"confident_raw": raw, "confident": adjusted} if counted else {}
        facts = {
            "loss": sum(self.losses) / len(self.losses), "lr": self.optimizer.param_groups[0]["lr"],
            "images": self.images_here, **seen,
        }  # fmt: skip
        self.confident.zero_()
        self.losses.clear()
        self.epoch, self.step, self.first_unread, self.images, self.images_here = self.epoch + 1, 0, 0, 0, 0
        return facts

    def snapshot(self) -> dict[str, Any]:
        """All that `restore` needs."""
        buffers = [self.optimizer.state[p].get("momentum_buffer") for p in self.parameters()]
        return {
            "model": dict(self.model.state_dict()), "momentum": buffers, "confident": self.confident,
            "epoch": self.epoch, "step": self.step, "images": self.images, "losses": list(self.losses),
        }  # fmt: skip

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue from a snapshot."""
        self.model.load_state_dict(saved["model"])
        for parameter, buffer in zip(self.parameters(), saved["momentum"], strict=True):
            if buffer is not None:
                self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
        self.confident.copy_(saved["confident"])
        self.epoch, self.step, self.images = saved["epoch"], saved["step"], saved["images"]
        self.losses, self.first_unread = saved["losses"], self.step

    def parameters(self) -> list[Tensor]:
        """The optimiser's parameters, in its order."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]


def start(config: Config, problem: Problem, device: torch.device) -> Training:
    """A new network with its optimiser: classifiers at the learning rate, the rest at the backbone's."""
    shape = architecture(config, len(problem.classes), problem.channels)
    model = build_model(shape, stream(config.seed, "init").initial_seed())
    file = config.model.pretrained
    pretrained = load_pretrained(model, in_data_root(file)) if file else None
    place(model, config.precision, device)
    settings = config.optimizer
    heads = list(model.heads.parameters())
    known = set(heads)
    rest = [p for p in model.parameters() if p not in known]
    rates = (settings.lr, settings.backbone_lr or settings.lr)
    groups = [{"params": part, "lr": rate, "base_lr": rate} for part, rate in zip((heads, rest), rates, strict=True)]
    optimizer = torch.optim.SGD(
        groups, momentum=settings.momentum, nesterov=settings.nesterov, weight_decay=settings.weight_decay, fused=True
    )
    log_counts = torch.tensor(problem.class_counts, dtype=torch.float32, device=device).log()
    confident = torch.zeros(2, config.experts, dtype=torch.int64, device=device)
    return Training(model, optimizer, log_counts, LossMeter(device), confident, pretrained)


class Forecast:
    """Says once, after the first steps, how long the remaining ones will take; evaluations come on top."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps, self.began = device, 0, 0.0

    def tick(self, steps_left: int) -> None:
        """A step has ended, so many are left in the run."""
        self.steps += 1
        measured = FORECAST_STEPS // 2
        if self.steps not in (FORECAST_STEPS - measured, FORECAST_STEPS):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # else it would time how fast work is queued
        now = time.monotonic()
        if self.steps == FORECAST_STEPS:
            step = (now - self.began) / measured
            seconds = step * steps_left
            whole = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
            print(f"forecast: {1000 * step:.0f} ms a step, {whole} for the {steps_left:,} steps left", flush=True)
        self.began = now
