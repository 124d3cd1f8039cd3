"""Figures of a trained network: the ensemble and each expert. `python -m mdcs.eval runs/mdcs/<run>` recomputes them."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mdcs import measures
from mdcs.algorithm import architecture
from mdcs.config import Config
from mdcs.model import MultiExpert, build_model, laid_out, place
from mdcs.problem import Problem, load_problem
from shared import metrics
from shared.checkpoint import load_model
from shared.cli import check_shared, eval_parser, run_main
from shared.config import load
from shared.errors import CheckpointError, RunError
from shared.gpu import autocast, setup
from shared.longtail import ShotGroups
from shared.run import read_run, tell_changed

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Outputs:
    """What the test set gives; E experts, then the ensemble. On the CPU.

    predictions int32 [N, E + 1]; confidence [N, E + 1], the predicted class's probability; kl [E, E], the mean
    divergence between experts.
    """

    predictions: Tensor
    confidence: Tensor
    kl: Tensor


@dataclass(frozen=True)
class Evaluation:
    """`figures`: `<ensemble|expertK|diversity>.<metric>`, shares in [0, 1]; an empty group has None."""

    figures: Figures
    details: dict[str, Any]
    predictions: Tensor


@torch.no_grad()
def run_network(model: MultiExpert, problem: Problem, config: Config) -> Outputs:
    """One pass over the test set, batch by batch: no logits are kept, so thousands of classes fit."""
    model.eval()
    device, experts = problem.test.labels.device, len(model.heads)
    kl = torch.zeros(experts, experts, device=device)
    parts: list[tuple[Tensor, Tensor]] = []
    for images, _ in problem.test.evaluate(config.evaluate.batch_size):
        with autocast(device, config.precision):
            logits = model(laid_out(images, config.precision)).float()  # [n, E, C]
        kl += measures.pairwise_kl(logits)
        everyone = torch.cat([logits, logits.mean(dim=1, keepdim=True)], dim=1)  # the ensemble: mean of raw logits
        confidence, predictions = everyone.softmax(dim=-1).max(dim=-1)
        parts.append((predictions.int(), confidence))
    predictions, confidence = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Outputs(predictions, confidence, kl.cpu() / len(predictions))


def evaluate(model: MultiExpert, problem: Problem, config: Config) -> Evaluation:
    """All figures of a network on the balanced test set."""
    return figures_of(run_network(model, problem, config), problem.test.labels.cpu(), problem.groups, problem.thirds,
                      len(problem.classes))  # fmt: skip


def figures_of(
    outputs: Outputs, labels: Tensor, groups: ShotGroups, thirds: dict[str, tuple[int, ...]], num_classes: int
) -> Evaluation:
    """The figures of predictions; shot groups are by the training set's own counts."""
    figures: Figures = {}
    details: dict[str, Any] = {}
    experts = outputs.predictions.shape[1] - 1
    per_class, by_group = [], []
    for column, who in [(experts, "ensemble"), *((e, f"expert{e + 1}") for e in range(experts))]:
        predicted, confidence = outputs.predictions[:, column].long(), outputs.confidence[:, column]
        accuracies = metrics.per_class_accuracy(predicted, labels, num_classes)
        shots = metrics.group_accuracy(accuracies, groups)
        figures[f"{who}.accuracy"] = metrics.accuracy(predicted, labels)
        figures |= {f"{who}.{group}": value for group, value in shots.items()}
        figures |= {f"{who}.{third}": mean_of(accuracies[list(classes)]) for third, classes in thirds.items()}
        figures[f"{who}.ece"] = measures.calibration_error(confidence, predicted == labels)
        details[f"{who}.per_class"] = [None if math.isnan(v) else round(v, 6) for v in accuracies.tolist()]
        details[f"{who}.reliability"] = measures.reliability(confidence, predicted == labels)
        if who != "ensemble":
            per_class.append(accuracies)
            by_group.append([value for value in shots.values() if value is not None])
    if experts > 1:
        spread = torch.tensor(by_group, dtype=torch.float64)
        best = max(figures[f"expert{e + 1}.accuracy"] or 0.0 for e in range(experts))
        figures |= {
            "diversity.class_std": measures.class_std(torch.stack(per_class)),
            "diversity.group_std_sum": float(spread.std(dim=0, correction=0).sum()),
            "diversity.kl": measures.mean_over_pairs(outputs.kl),
            "diversity.disagreement": measures.mean_over_pairs(measures.disagreement(outputs.predictions[:, :-1])),
            "diversity.ensemble_gain": (figures["ensemble.accuracy"] or 0.0) - best,
        }
    return Evaluation(figures, details, outputs.predictions)


def mean_of(per_class: Tensor) -> float | None:
    """Mean over the classes that have a test image; None where none has."""
    known = per_class[~per_class.isnan()]
    return float(known.mean()) if len(known) else None


def load_network(
    folder: Path, config: Config, num_classes: int, channels: int, device: torch.device
) -> tuple[MultiExpert, int]:
    """The network that a run saved, and its epoch.

    Raises:
        CheckpointError: the model is missing, damaged, or not that of the configuration.
    """
    tensors, description = load_model(folder / "model")
    model = build_model(architecture(config, num_classes, channels), seed=0)
    wanted = model.state_dict()
    if set(wanted) != set(tensors) or any(wanted[name].shape != tensors[name].shape for name in wanted):
        raise CheckpointError(f"{folder / 'model'}: holds another network than the run's configuration describes")
    model.load_state_dict(tensors)
    return place(model, config.precision, device), int(description["epoch"])


def run_eval(arguments: Sequence[str]) -> int:
    """The command: 0 if every figure of the last epoch is what the run reported, 1 if not."""
    asked = eval_parser("mdcs", __doc__).parse_args(arguments)
    check_shared(__file__)
    results = read_run(asked.run, "mdcs", data={"class_counts": list[int], "digests": dict})
    config = load(asked.run / "config.yaml", Config)
    device = setup(asked.device if asked.device != "auto" else config.device, config.threads)
    problem = load_problem(config, device)
    if list(problem.class_counts) != results["data"]["class_counts"]:
        raise RunError(f"{asked.run}: was trained on other class counts than the data has now; groups would be wrong")
    if problem.digests != results["data"]["digests"]:
        raise RunError(f"{asked.run}: the data is not what the run was trained on")
    model, epoch = load_network(asked.run, config, len(problem.classes), problem.channels, device)
    figures = evaluate(model, problem, config).figures
    stated = {row["metric"]: row["value"] for row in results["figures"] if row["at"] == config.headline}
    print(f"the network after epoch {epoch}, on the test set; accuracies are shares in [0, 1]")
    for name, value in figures.items():
        print(f"{name:32} {'-' if value is None else f'{value:.6g}'}")
    return tell_changed(stated, figures, " of the last epoch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_eval, arguments)


if __name__ == "__main__":
    sys.exit(main())
