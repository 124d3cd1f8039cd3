"""Write the generic model or one client's model for other programs: `python -m fedloge.export RUN --format onnx`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fedloge.config import Config
from fedloge.eval import load_generic, load_server, named
from fedloge.federated import Server, load_client
from fedloge.model import Backbone, Head, Shape, build_backbone
from shared.checkpoint import load_model
from shared.cli import run_main
from shared.config import load
from shared.errors import ConfigError
from shared.export import Portable, export_command, source_of
from shared.run import read_run

PAPER = "Xiao et al., FedLoGe: Joint Local and Generic Federated Learning under Long-tailed Data, ICLR 2024"
CPU = torch.device("cpu")
FACTS = {"images": int, "class_counts": list[int], "client_sizes": list[int], "local_test_sizes": list[int]}


class Classifier(nn.Module):
    """A backbone and one linear head: images [N, C, H, W] -> logits [N, K]."""

    def __init__(self, backbone: Backbone, num_classes: int, bias: bool) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.feature_dim, num_classes, bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K]."""
        return cast(Tensor, self.head(self.backbone(images)))


def options(parser: argparse.ArgumentParser) -> None:
    """Which model of the run."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="NAME", default="generic", help="generic (default), or a variant of its head")
    which.add_argument("--client", metavar="N", type=int, help="the personal model of a client, counted from 0")


def take(asked: argparse.Namespace) -> Portable:
    """The model that the arguments choose; no image is needed for it.

    Raises:
        ConfigError: there is no such model in the run.
    """
    own = {"details": {"personal.clients": list[float]}} if asked.client is not None else {}
    results = read_run(asked.run, "fedloge", data=FACTS, **own)
    config = load(asked.run / "config.yaml", Config)
    data, facts, classes = config.data, results["data"], load_model(asked.run / "model")[1]["classes"]
    side = data.image_size or source_of(data.name)["side"]
    counts = torch.zeros(config.clients.count, len(classes), dtype=torch.int64)
    counts[:, 0] = torch.tensor(facts["client_sizes"])  # of its clients a saved method asks no more than their sizes
    server = load_server(asked.run, config, Shape(len(data.mean), side, counts), CPU)
    backbone, head = generic(server, asked.model) if asked.client is None else personal(server, config, asked.client)
    architecture = {"backbone": config.model.name, "in_channels": len(data.mean), "image_size": side,
                    "num_classes": len(classes), "bias": head[1] is not None}  # fmt: skip
    network = Classifier(backbone, len(classes), head[1] is not None)
    network.head.load_state_dict({"weight": head[0], **({} if head[1] is None else {"bias": head[1]})})
    whose = f"{asked.model} model" if asked.client is None else f"personal model of client {asked.client}"
    listed = data.name == "list"
    return Portable(
        network=network, architecture=architecture, data=data.name, image=(len(data.mean), side, side),
        choice=asked.model if asked.client is None else f"client-{asked.client}", mean=data.mean, std=data.std,
        classes=classes, results=results, seed=config.seed, paper=PAPER, tags=["federated-learning", "long-tail"],
        title=f"FedLoGe, reproduced: the {whose} of {config.method.name}",
        about=f"A {config.model.name} with one linear head, trained by {config.clients.count} clients in "
              f"{config.rounds} rounds on {facts['images']:,} images, {max(facts['class_counts']):,} to "
              f"{min(facts['class_counts']):,} a class.",
        figures=figures_of(results, asked.model) if asked.client is None else own_figures(results, asked.client),
        moment=f"after round {server.round}, the last (figures of `{config.headline}` are means over the last rounds)",
        limits=limits_of(config, asked.client), centre=0.875 if listed else 1.0,
        resample="bilinear" if listed else "box",
    )  # fmt: skip


def generic(server: Server, name: str) -> tuple[Backbone, Head]:
    """The averaged backbone and a head of it; ConfigError if there is none of that name."""
    heads = {named("generic", variant): head for variant, head in server.method.generic_heads(server).items()}
    if name not in heads:
        raise ConfigError(f"--model {name}: there is no such model in this run; it has {', '.join(heads)}")
    load_generic(server)
    return cast(Backbone, server.network["backbone"]), heads[name]


def personal(server: Server, config: Config, client: int) -> tuple[Backbone, Head]:
    """A client's backbone and head; ConfigError if there is no such client, or its model was not saved."""
    if not 0 <= client < config.clients.count:
        raise ConfigError(f"--client {client}: there is no such client; the run has 0 to {config.clients.count - 1}")
    if server.method.fine_tuning():
        name = config.method.name
        raise ConfigError(f"--client {client}: {name} makes a client's model when it is tested, and the run keeps none")
    load_client(server, client)
    if server.method.whole_personal:
        own = "own_" if "own_backbone" in server.network else ""
        return cast(Backbone, server.network[f"{own}backbone"]), server.network.head(f"{own}classifier")
    weight, bias = server.method.personal_heads(server, slice(client, client + 1))[""]
    return cast(Backbone, server.network["backbone"]), (weight[0], None if bias is None else bias[0])


def figures_of(results: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """The rows of the results that are of a generic model."""
    return [row for row in results["figures"] if row["metric"].startswith(f"{name}.")]


def own_figures(results: Mapping[str, Any], client: int) -> list[Mapping[str, Any]]:
    """The accuracy of a client's model on the client's own test images, where it has any."""
    sizes = results["data"]["local_test_sizes"]
    if not sizes[client]:
        return []
    place = sum(1 for size in sizes[:client] if size)
    value = results["details"]["personal.clients"][place]
    split = f"test, the client's own {sizes[client]:,} images"
    return [{"metric": "personal.accuracy", "split": split, "at": "final", "value": value}]


def limits_of(config: Config, client: int | None) -> list[str]:
    """What not to expect of the model."""
    found = ["Trained for a study of methods, on one data set; nothing is known of it on other pictures."]
    if client is not None:
        found.append("It is for one client's mix of classes: those that the client lacks it hardly ever predicts.")
    if client is not None and config.evaluate.class_mask:
        found.append(
            "Its accuracy was measured with the classes ruled out that the client lacks; the network does not."
        )
    return found


def build(architecture: Mapping[str, Any]) -> Classifier:
    """An untrained network of that architecture."""
    a = architecture
    backbone = build_backbone(a["backbone"], a["in_channels"], a["image_size"], seed=0)
    return Classifier(backbone, a["num_classes"], a["bias"])


def run_export(arguments: Sequence[str]) -> int:
    """The command: 0 if every file computes what the network does, 1 if not."""
    return export_command(__file__, arguments, options, take, build)


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_export, arguments)


if __name__ == "__main__":
    sys.exit(main())
