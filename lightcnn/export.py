"""Write the network of one seed for other programs: `python -m lightcnn.export RUN --seed 1 --format onnx`."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import nn

from lightcnn.algorithm import network_of
from lightcnn.baselines import ImageShape
from lightcnn.config import Config, MethodConfig
from shared.checkpoint import load_model
from shared.cli import run_main
from shared.config import load
from shared.errors import CheckpointError, ConfigError
from shared.export import Portable, export_command
from shared.run import read_run

PAPER = "Isong, Building Efficient Lightweight CNN Models, 2025 (arXiv 2501.15547)"


def options(parser: argparse.ArgumentParser) -> None:
    """Which network of the run."""
    parser.add_argument("--seed", metavar="S", type=int, help="the network of a seed (default: the run's first)")
    parser.add_argument(
        "--fold", metavar="K", type=int, help="of a run with kfold=honest: the network of a fold, from 1"
    )


def take(asked: argparse.Namespace) -> Portable:
    """The network that the arguments choose; no image is needed for it.

    Raises:
        ConfigError: there is no such network in the run.
        CheckpointError: it is missing, damaged, or not that of the configuration.
    """
    results = read_run(asked.run, "lightcnn", data={"train_images": int, "val_images": int})
    config = load(asked.run / "config.yaml", Config)
    seed = config.seed if asked.seed is None else asked.seed
    folder = folder_of(asked.run / "model", seed, asked.fold)
    tensors, said = load_model(folder)
    channels, side, _ = said["image"]
    method_of_run = config.method.model_dump(mode="json", exclude={"teacher"})  # a folder of one machine
    architecture = {"method": method_of_run, "in_channels": channels, "image_size": side,
                    "num_classes": len(said["classes"])}  # fmt: skip
    network = build(architecture)
    try:
        network.load_state_dict(tensors)
    except RuntimeError:
        raise CheckpointError(f"{folder}: holds another network than the run's configuration describes") from None
    facts, method = results["data"], config.method.name
    own = [row for row in results["figures"] if row["seed"] == seed and (asked.fold is None or row["at"] == "once")]
    in_folds = getattr(config.method, "kfold", None) == "notebook"
    wanted = {"accuracy", "parameters", "bytes.weights", "multiply_adds", "epochs.run"}
    chosen, how = "the validation images chose", f"{facts['val_images']:,} more chose its epoch"
    if not in_folds:
        wanted.add("validation")
    else:  # then a validation figure means nothing, and does not leave the house
        chosen = "the last fold's validation images chose"
        how = "as it went on through all folds, it saw most of the images that chose its epochs"
    return Portable(
        network=network, architecture={**architecture, "network": type(network).__name__}, choice=folder.name,
        data=config.data.name, image=(channels, side, side), mean=[0.0] * channels, std=[1.0] * channels,
        classes=said["classes"], results=results, seed=seed, figures=[row for row in own if row["metric"] in wanted],
        moment=f"the weights that {chosen}, tested once", paper=PAPER, tags=["lightweight", "cnn"],
        title=f"LightCNN: {method}, seed {seed}" + (f", fold {asked.fold}" if asked.fold else ""),
        about=f"A network of {sum(p.numel() for p in network.parameters()):,} parameters, trained on "
              f"{facts['train_images']:,} images; {how}.",
        limits=["Trained for a study of methods, on one data set; nothing is known of it on other pictures."],
    )  # fmt: skip


def folder_of(models: Path, seed: int, fold: int | None) -> Path:
    """Where a run keeps the network of a seed; ConfigError with a list of what there is."""
    name = f"s{seed}" if fold is None else f"s{seed}-fold{fold}"
    found = sorted(path.name for path in models.glob("s*") if path.is_dir())
    if name not in found:
        asked = f"--seed {seed}" if fold is None else f"--seed {seed} --fold {fold}"
        raise ConfigError(f"{asked}: there is no such network in the run; it has {', '.join(found) or 'none'}")
    return models / name


def build(architecture: Mapping[str, Any]) -> nn.Module:
    """An untrained network of that architecture."""
    a, methods = architecture, TypeAdapter[Any](MethodConfig)
    kind = network_of(
        methods.validate_json(json.dumps(a["method"])), ImageShape(a["in_channels"], a["image_size"], a["num_classes"])
    )
    return kind.to_module(kind.initial(0))


def run_export(arguments: Sequence[str]) -> int:
    """The command: 0 if every file computes what the network does, 1 if not."""
    return export_command(__file__, arguments, options, take, build)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_export, arguments)


if __name__ == "__main__":
    sys.exit(main())
