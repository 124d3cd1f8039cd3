"""Write the ensemble or one expert for other programs: `python -m mdcs.export RUN --expert 2 --format onnx`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from mdcs.algorithm import architecture as architecture_of
from mdcs.config import Config
from mdcs.eval import load_network
from mdcs.model import Architecture, MultiExpert, build_model
from shared.checkpoint import load_model
from shared.cli import run_main
from shared.config import load
from shared.errors import ConfigError
from shared.export import Portable, export_command, source_of
from shared.run import read_run

PAPER = ("Zhao et al., MDCS: More Diverse Experts with Consistency Self-distillation for Long-tailed Recognition, "
         "ICCV 2023 (arXiv 2308.09922)")  # fmt: skip
CPU = torch.device("cpu")


class Ensemble(nn.Module):
    """The mean of the experts' raw logits: images [N, C, H, W] -> logits [N, K]."""

    def __init__(self, experts: MultiExpert) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K]."""
        return cast(Tensor, self.experts(images).mean(dim=1))


def options(parser: argparse.ArgumentParser) -> None:
    """Which network of the run."""
    parser.add_argument("--expert", metavar="K", type=int, help="one expert, counted from 1 (default: the ensemble)")


def take(asked: argparse.Namespace) -> Portable:
    """The network that the arguments choose; no image is needed for it.

    Raises:
        ConfigError: there is no such expert.
    """
    results = read_run(asked.run, "mdcs", data={"images": int, "class_counts": list[int]})
    config = load(asked.run / "config.yaml", Config)
    data, facts, said = config.data, results["data"], load_model(asked.run / "model")[1]
    model, epoch = load_network(asked.run, config, len(said["classes"]), said["channels"], CPU)
    model = model.to(memory_format=torch.contiguous_format)  # which float32 wants on a CPU
    architecture, name = architecture_of(config, len(said["classes"]), said["channels"]), "ensemble"
    if asked.expert is not None:
        if not 1 <= asked.expert <= config.experts:
            raise ConfigError(f"--expert {asked.expert}: there is no such expert; the run has 1 to {config.experts}")
        architecture, name = replace(architecture, experts=1), f"expert{asked.expert}"
        model = MultiExpert(model.trunk, [model.experts[asked.expert - 1]], [model.heads[asked.expert - 1]])
    who = "the ensemble" if asked.expert is None else f"expert {asked.expert}"
    side = data.image_size or source_of(data.name)["side"]
    rows = [row for row in results["figures"] if row["at"] == config.headline and row["metric"].startswith(f"{name}.")]
    return Portable(
        network=Ensemble(model), architecture=asdict(architecture), choice=name, data=data.name,
        image=(said["channels"], side, side), mean=data.mean, std=data.std, classes=said["classes"], results=results,
        seed=config.seed, figures=rows, moment=f"after epoch {epoch}, the last", paper=PAPER,
        tags=["long-tail", "mixture-of-experts"],
        title=f"MDCS, reproduced: {who} of {config.method.name}",
        about=f"A {config.model.name} with {config.experts} experts: {who}. Trained on {facts['images']:,} images, "
              f"{max(facts['class_counts']):,} to {min(facts['class_counts']):,} a class; judged on as many of each.",
        limits=limits_of(asked.expert), centre=0.875 if data.listed else 1.0,
        resample="bilinear" if data.listed else "box",
    )  # fmt: skip


def limits_of(expert: int | None) -> list[str]:
    """What not to expect of the network."""
    found = ["Trained for a study of methods, on one data set; nothing is known of it on other pictures."]
    if expert is not None:
        found.append("An expert leans towards some classes on purpose; the ensemble is what the paper predicts with.")
    return [*found, "Its probabilities are not calibrated: `ece` is the calibration error, where it was measured."]


def build(architecture: Mapping[str, Any]) -> Ensemble:
    """An untrained network of that architecture."""
    return Ensemble(build_model(Architecture(**architecture), seed=0))


def run_export(arguments: Sequence[str]) -> int:
    """The command: 0 if every file computes what the network does, 1 if not."""
    return export_command(__file__, arguments, options, take, build)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_export, arguments)


if __name__ == "__main__":
    sys.exit(main())
