"""Write the dense or a smaller network for other programs: `python -m sparsevit.export RUN --pruned neurons.50`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.checkpoint import load_model
from shared.cli import run_main
from shared.config import load
from shared.errors import ConfigError
from shared.export import Portable, export_command
from shared.run import read_run
from sparsevit.config import Config
from sparsevit.model import Vit, count_parameters, size_from_dict
from sparsevit.shrink import load_network

PAPER = ("Prasetyo, Yudistira, Widodo, Sparse then Prune: Toward Efficient Vision Transformers, 2023 "
         "(arXiv 2307.11988)")  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    """Which network of the run."""
    parser.add_argument("--pruned", metavar="NAME", help="a pruned network of the run: neurons.50 (default: the dense)")


def take(asked: argparse.Namespace) -> Portable:
    """The network that the arguments choose; no image is needed for it.

    Raises:
        ConfigError: the run saved no such network.
    """
    results = read_run(asked.run, "sparsevit", data={"images": int})
    config = load(asked.run / "config.yaml", Config)
    classes = load_model(asked.run / "model")[1]["classes"]
    network = load_network(asked.run / "model" if asked.pruned is None else folder_of(asked.run, asked.pruned))
    size, data, name = network.size, config.data, asked.pruned or "dense"
    whose = "the dense network" if asked.pruned is None else f"pruned, {name}"
    moment = f"after epoch {config.epochs}" + ("" if config.select == "last" else ", the best on held-out images")
    if name.endswith(".recovered") and config.prune.recover:
        moment += f", then pruned and trained on ({config.prune.recover.epochs} more)"
    return Portable(
        network=network, architecture=size.as_dict(), choice=name, data=data.name,
        image=(size.channels, size.image, size.image), mean=data.mean, std=data.std, classes=classes, results=results,
        seed=config.seed, figures=figures_of(results, name), paper=PAPER, tags=["vision-transformer", "pruning"],
        moment=moment,
        title=f"Sparse then prune, reproduced: {whose}, arm {config.method}",
        about=f"A vision transformer of {count_parameters(size):,} parameters ({len(size.blocks)} blocks, patches of "
              f"{size.patch} x {size.patch} pixels), fine-tuned on {results['data']['images']:,} images.",
        limits=["Trained for a study of methods, on one data set; nothing is known of it on other pictures.",
                "Weights that were masked are zeros in a file of the same size; removed neurons and heads are gone."],
        centre=0.875 if data.name == "imagenet100" else 1.0,
    )  # fmt: skip


def folder_of(run: Path, name: str) -> Path:
    """Where a run keeps a pruned network; ConfigError with a list of what there is."""
    found = sorted(path.name for path in (run / "pruned").glob("*") if path.is_dir())
    if name not in found:
        raise ConfigError(f"--pruned {name}: the run saved no such network; it has {', '.join(found) or 'none'}")
    return run / "pruned" / name


def figures_of(results: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The rows of the results that are of a network; `neurons.50.recovered` is another one than `neurons.50`."""
    rows = [row for row in results["figures"] if name in (row["metric"], row["metric"].rpartition(".")[0])]
    return [row for row in rows if row["metric"] != f"{name}.recovered"]


def build(architecture: Mapping[str, Any]) -> Vit:
    """An untrained network of that architecture."""
    return Vit(size_from_dict(dict(architecture)))


def run_export(arguments: Sequence[str]) -> int:
    """The command: 0 if every file computes what the network does, 1 if not."""
    return export_command(__file__, arguments, options, take, build)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_export, arguments)


if __name__ == "__main__":
    sys.exit(main())
