"""A trained network to take away: pixels in, logits out, with a description, a model card and a check of each file."""

import argparse
import hashlib
import importlib.util
import io
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from safetensors.torch import save
from torch import Tensor, nn

from shared.checkpoint import atomic_write, load_model, sweep, write_json
from shared.cli import check_shared
from shared.errors import CheckpointError, ConfigError, RunError
from shared.gpu import setup
from shared.report import markdown

USE = {  # the formats, and how a file of each is used
    "safetensors": "python -m {package}.predict FOLDER image.png  # in a checkout of the repository",
    "pt2": 'torch.export.load("model.pt2").module()(images)  # torch alone',
    "onnx": 'onnxruntime.InferenceSession("model.onnx").run(None, {{"images": images}})',
}
BESIDE = Path(__file__).parent
ONNX = ("onnx", "onnxscript", "onnxruntime")  # the optional dependencies `export`
TOLERANCE = 1e-5
BATCHES = (1, 7)  # sizes that are checked; the files are made with another

Options = Callable[[argparse.ArgumentParser], None]
Build = Callable[[Mapping[str, Any]], nn.Module]


class Whole(nn.Module):
    """A network with its normalisation inside: images float32 [N, C, H, W] in [0, 1] -> logits [N, K]."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, K]."""
        return cast(Tensor, self.network((images - self.mean) / self.std))


@dataclass(frozen=True, eq=False, kw_only=True)
class Portable:
    """A trained network on the CPU, and all that another program or a reader must know of it.

    `network` takes normalised images; `architecture` is what the package's `build` makes it of again. `choice` names
    it among those of the run. A picture is prepared by cutting out the centre square of `centre` times its shorter
    side, and scaling that with PIL's `resample`. `figures` are rows of the results; `moment` says of when they are.
    """

    network: nn.Module
    architecture: Mapping[str, Any]
    choice: str
    data: str
    image: tuple[int, int, int]
    mean: Sequence[float]
    std: Sequence[float]
    classes: Sequence[str]
    results: Mapping[str, Any]
    seed: int
    figures: Sequence[Mapping[str, Any]]
    moment: str
    title: str
    paper: str
    about: str
    tags: Sequence[str]
    limits: Sequence[str]
    centre: float = 1.0
    resample: str = "bilinear"

    @property
    def whole(self) -> Whole:
        """The network that leaves the house."""
        return Whole(self.network, self.mean, self.std)

    @property
    def command(self) -> str:
        """What made the run, but for the folder that it went to and those of absolute paths: of one machine."""
        return re.sub(r" --out[= ]('[^']*'|\S+)|(?<![\w.])/(?:[^\s'/]+/)*", "", self.results["command"])

    def description(self) -> dict[str, Any]:
        """The content of `config.json`, but for the files beside it."""
        run = {name: self.results[name] for name in ("config", "method", "commit", "device", "model_digest")}
        return {
            "paper": self.results["paper"], "model": self.choice,
            "run": {**run, "seed": self.seed, "command": self.command},
            "architecture": dict(self.architecture), "channels": self.image[0], "image_size": self.image[1],
            "classes": list(self.classes),
            "normalisation": {"mean": list(self.mean), "std": list(self.std), "where": "inside the network"},
            "preparation": {"centre": self.centre, "resample": self.resample},
            "input": {"name": "images", "shape": ["N", *self.image], "dtype": "float32", "range": [0, 1]},
            "output": {"name": "logits", "shape": ["N", len(self.classes)], "dtype": "float32"},
        }  # fmt: skip

    def card(self, formats: Collection[str]) -> str:
        """The model card, in Markdown with front matter, for a folder with these formats."""
        source, text = source_of(self.data), (BESIDE / "card.md").read_text(encoding="utf-8")
        paper, names = self.results["paper"], ", ".join(self.classes)
        head = {"license": "mit", "pipeline_tag": "image-classification", "tags": [paper, *self.tags],
                "datasets": [source["hub"]] if "hub" in source else [], "metrics": ["accuracy"]}  # fmt: skip
        rows = [[row["metric"], row["split"], row["at"], f"{row['value']:.6g}"]
                for row in self.figures if row["value"] is not None]  # fmt: skip
        return text.format_map({
            **self.results, **vars(self), "head": yaml.safe_dump(head, sort_keys=False), "source": source["text"],
            "terms": source["terms"], "shape": ", ".join(map(str, self.image)), "mean": list(self.mean),
            "std": list(self.std), "count": len(self.classes),
            "names": names if len(self.classes) <= 20 else f"{len(self.classes)}, in `config.json`",
            "use": "\n".join(USE[name].format(package=paper) for name in USE if name in formats),
            "figures": markdown([["metric", "split", "of", "value"], *rows]),
            "command": self.command, "limits": "\n".join(f"- {limit}" for limit in self.limits),
        })  # fmt: skip


def source_of(data: str) -> dict[str, Any]:
    """What is known of a data set by its name in a configuration: `text`, `terms`, `side` and, on hubs, `hub`."""
    return dict(yaml.safe_load((BESIDE / "sources.yaml").read_text(encoding="utf-8"))[data])


def parser_of(package: str, command: str, description: str, options: Options) -> argparse.ArgumentParser:
    """The arguments that `export` and `predict` share: the run, and which of its networks."""
    parser = argparse.ArgumentParser(prog=f"python -m {package}.{command}", description=description)
    parser.add_argument("run", type=Path, help=f"folder of a finished run, runs/{package}/...")
    options(parser)
    return parser


def export_command(
    file: str, arguments: Sequence[str], options: Options, take: Callable[[argparse.Namespace], Portable], build: Build
) -> int:
    """`<package>.export`: write the folder and check every file; 1 if one does not compute what the network does.

    Such a file is taken away again.

    Args:
        file: of the module, in its package's folder.
        options: adds the arguments by which one of a run's networks is chosen; `take` gets them all.
        build: makes a network of its `architecture`.
    """
    package = Path(file).resolve().parent.name
    parser = parser_of(package, "export", "Write a run's network for other programs, with its card.", options)
    parser.add_argument("--format", dest="formats", nargs="+", choices=USE, default=["safetensors"],
                        help="one or several (safetensors)")  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="what is written (RUN/export/<which network>)")
    asked = parser.parse_args(arguments)
    check_shared(file)
    setup("cpu", threads=1)  # small products on many threads wait for each other where the cores are busy
    if "onnx" in asked.formats and (missing := [name for name in ONNX if importlib.util.find_spec(name) is None]):
        raise ConfigError(f"--format onnx: {missing[0]} is not installed; uv pip install {' '.join(ONNX)}")
    taken, formats = take(asked), dict.fromkeys(asked.formats)
    folder = asked.out or asked.run / "export" / taken.choice
    write(taken, folder, formats)
    print(f"{taken.title}, in {folder}")
    if wrong := [name for name in formats if not check(taken, folder, name, build)]:
        for name in wrong:
            (folder / f"model.{name}").unlink()
        write(taken, folder, [name for name in formats if name not in wrong])
        print(f"taken away again: {', '.join(f'model.{name}' for name in wrong)}")
    return 1 if wrong else 0


def write(taken: Portable, folder: Path, formats: Collection[str]) -> None:
    """Write the files, each whole or not at all; RunError where something there is not of an export of this network."""
    description = taken.description()
    sums = made_before(folder, description)
    files = packed(taken, formats)
    files["README.md"] = taken.card([name for name in USE if f"model.{name}" in {**sums, **files}]).encode()
    sums |= {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    sweep(folder)  # and config.json first: it says whose the rest is
    for name in files:  # so that a file of an earlier export is not taken for a changed one, whatever happens next
        (folder / name).unlink(missing_ok=True)
    write_json(folder / "config.json", {**description, "files": sums, "weights_sha256": sums.get("model.safetensors")})
    for name, data in files.items():
        atomic_write(folder / name, data)


def made_before(folder: Path, description: Mapping[str, Any]) -> dict[str, str]:
    """The files (name -> sha256) that an export of the same network left; none where the folder is new or empty."""
    if not folder.exists() or (folder.is_dir() and all(path.match(".*.tmp") for path in folder.iterdir())):
        return {}
    try:
        found = dict(json.loads((folder / "config.json").read_bytes()))
        sums = dict(found.pop("files"))
        found.pop("weights_sha256", None)
    except (OSError, ValueError, TypeError, KeyError):
        found, sums = {}, {}
    if found != json.loads(json.dumps(description)):
        raise RunError(f"{folder}: is there and is no export of this network; choose another folder with --out")
    there = {
        path.name: path for name in (*(f"model.{f}" for f in USE), "README.md") if (path := folder / name).exists()
    }
    for name, path in there.items():
        if hashlib.sha256(path.read_bytes()).hexdigest() != sums.get(name):
            raise RunError(f"{path}: is not as it was exported; move it away, or choose another folder with --out")
    return {name: sums[name] for name in there}


def packed(taken: Portable, formats: Collection[str]) -> dict[str, bytes]:
    """The network in each format: file name -> content."""
    files: dict[str, bytes] = {}
    if "safetensors" in formats:
        tensors = {name: tensor.contiguous() for name, tensor in taken.whole.state_dict().items()}
        files["model.safetensors"] = save(tensors, {"format": "pt"})
    if not {"pt2", "onnx"} & set(formats):
        return files
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(taken.whole, (torch.zeros(2, *taken.image),), dynamic_shapes=shapes)
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes):
        node.meta.pop("stack_trace", None)  # it names folders of this machine
    program.example_inputs = None  # the archive would hold them as a pickle
    if "pt2" in formats:
        torch.export.save(program, content := io.BytesIO())
        files["model.pt2"] = content.getvalue()
    if "onnx" in formats:
        made = torch.onnx.export(program, dynamo=True, input_names=["images"], output_names=["logits"],
                                 dynamic_shapes=({0: "batch"},), verbose=False)  # fmt: skip
        assert made is not None
        files["model.onnx"] = made.model_proto.SerializeToString()
    return files


@torch.no_grad()
def check(taken: Portable, folder: Path, name: str, build: Build) -> bool:
    """Load a written file anew, print its largest difference from the network in memory, and say whether it will do.

    ONNX Runtime adds up in another order than torch, and float32 has seven digits: where its logits differ by more than
    TOLERANCE, that share of the largest logit is allowed.
    """
    run, draws = load(folder, name, taken.results["paper"], build), torch.Generator().manual_seed(0)
    batches = [torch.rand(count, *taken.image, generator=draws) for count in BATCHES]
    wanted, found = torch.cat([taken.whole(x) for x in batches]), torch.cat([run(x) for x in batches])
    worst, largest = float((found - wanted).abs().max()), max(1.0, float(wanted.abs().max()))
    allowed, why = TOLERANCE, "absolute"
    if name == "onnx" and worst > TOLERANCE:
        allowed, why = TOLERANCE * largest, f"{TOLERANCE:g} of the largest logit, {largest:.3g}"
    sizes, verdict = " and ".join(map(str, BATCHES)), "same" if worst <= allowed else "DIFFERS"
    print(f"{name:11} {verdict}: at most {worst:.2g} from eager in batches of {sizes}; allowed {allowed:.2g}, {why}")
    return worst <= allowed


def load(folder: Path, name: str, paper: str, build: Build) -> Callable[[Tensor], Tensor]:
    """The network in a file of an exported folder: images [N, C, H, W] in [0, 1] -> logits [N, K]."""
    if name == "safetensors":
        return load_exported(folder, paper, build)[0]
    if name == "pt2":
        return torch.export.load(folder / "model.pt2").module()
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def load_exported(folder: Path, paper: str, build: Build) -> tuple[Whole, dict[str, Any]]:
    """An exported folder's network and `config.json`; CheckpointError if it is damaged or of another paper."""
    tensors, config = load_model(folder)
    if config.get("paper") != paper or not {"model", "classes", "image_size", "preparation"} <= set(config):
        raise CheckpointError(f"{folder}: is not an exported network of {paper}, but of {config.get('paper')!r}")
    try:
        whole = Whole(build(config["architecture"]), config["normalisation"]["mean"], config["normalisation"]["std"])
        whole.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: holds another network than its config.json describes ({reason})") from None
    return whole, config
