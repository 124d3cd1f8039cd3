"""Size and speed of LightCNN's networks and of its peers: `python benchmarks/lightcnn_latency.py`.

All networks are measured by turns in one process, in eval mode and `inference_mode`, float32, after a warm-up: one
image (a turn's value is the mean of some calls), and a batch of 256 (one call). Medians and quartiles over the turns. A
network has the faster of torch's two layouts of memory, NCHW and channels_last, which its warm-up chooses for each of
the two sizes. Weights are random: no figure here depends on them.

bytes.int8   weights of 8 bits with a float32 scale an output channel, biases and what is left in float32, as torch's
             own static quantisation makes them (FX mode, x86): the numbers alone, without a file's overhead
"fused"      the merged network as it is trained here: both branches as one grouped convolution (`lightcnn/fused.py`)
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import torch
from bench_report import Report, now, smooth_images
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from lightcnn.baselines import BASELINES, ImageShape
from lightcnn.budget import LayoutNet
from lightcnn.config import BudgetConfig, Config
from lightcnn.eval import module_sizes
from lightcnn.fused import Stack, stack
from lightcnn.model import MergedCNN, Submodel
from lightcnn.networks import Merged
from shared.checkpoint import atomic_write
from shared.cli import REPOSITORY
from shared.config import load
from shared.gpu import setup
from shared.report import markdown, show, write_csv

CASES = {
    "28 x 28 grey": (ImageShape(1, 28, 10), "budget_mnist"),
    "32 x 32 colour": (ImageShape(3, 32, 10), "budget_cifar10"),
}
PEERS = ("lenet5", "mobilenet_v2_010", "mobilenet_v2_025", "mobilenet_v2_035", "squeezenet", "shufflenet_v2")
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
COUNTS = ("parameters", "bytes.weights", "bytes.safetensors", "bytes.int8", "multiply_adds")
BATCHES = {"one": "one image", "batch": "batch of 256"}
COLUMNS = (
    "images", "network", *COUNTS, *(f"{key}{end}" for key in BATCHES for end in (".layout", ".ms", ".ms_q1", ".ms_q3")),
    "n", "device", "threads", "torch", "commit",
)  # fmt: skip
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """How much is measured; `QUICK` only shows that it runs."""

    rounds: int = 15
    calls: int = 10  # with one image, in a turn
    batch: int = 256


FULL, QUICK = Sizes(), Sizes(1, 1, 2)


class Fused(nn.Module):
    """A merged network as training has it."""

    def __init__(self, shape: ImageShape) -> None:
        super().__init__()
        self.network = Merged(*shape, "relu")
        self.weights: Stack = stack([self.network.initial(0)])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Fused":
        """Moves the weights; their layout is the fused form's own."""
        self.weights = {name: tensor.to(fn(tensor).device) for name, tensor in self.weights.items()}
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, H]."""
        return self.network.forward(self.weights, images[None], self.network.levels)[0]


def networks(shape: ImageShape, budget: str) -> dict[str, nn.Module]:
    """All networks for images of one shape, in eval mode; the first is the one that the others are compared with."""
    method = load(REPOSITORY / "lightcnn" / "configs" / f"{budget}.yaml", Config).method
    assert isinstance(method, BudgetConfig)
    found: dict[str, nn.Module] = {
        "merged": MergedCNN(*shape), "merged, fused": Fused(shape), "submodel": Submodel(*shape),
        f"budget: {method.layout}": LayoutNet(method.layout, shape, 0),
    }  # fmt: skip
    for name in PEERS:
        network = BASELINES[name].build(shape)
        found[name] = network.to_module(network.initial(0))
    return {name: module.eval() for name, module in found.items()}


def quantised_bytes(module: nn.Module, images: Tensor) -> int:
    """Bytes of all numbers of a network after torch's static quantisation, calibrated on `images`."""
    # The check of an image's shape is a branch on data, which a symbolic trace cannot take.
    with warnings.catch_warnings(), mock.patch("lightcnn.model.check_batch"), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(module, get_default_qconfig_mapping("x86"), (images,))
        prepared(images)
        state = convert_fx(prepared).state_dict()
    total = 0
    for value in state.values():
        for tensor in value if isinstance(value, tuple) else (value,):
            if isinstance(tensor, Tensor):
                total += tensor.numel() * tensor.element_size()
                if tensor.is_quantized and tensor.qscheme() == torch.per_channel_affine:
                    total += 4 * len(tensor)
    return total


def sizes_of(modules: dict[str, nn.Module], images: Tensor) -> dict[str, dict[str, Any]]:
    """The columns `COUNTS` of each network."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in modules.items():
        if isinstance(module, Fused):
            found[name] = found["merged"]  # the same numbers in other places
        else:
            found[name] = {**module_sizes(module, images[:1]), "bytes.int8": quantised_bytes(module, images)}
    return found


def milliseconds(module: Forward, images: Tensor, calls: int) -> float:
    """The mean of some calls."""
    began = now(images.device)
    for _ in range(calls):
        module(images)
    return 1000 * (now(images.device) - began) / calls


@torch.inference_mode()
def measure(
    modules: dict[str, nn.Module], images: Tensor, calls: int, rounds: int
) -> dict[str, tuple[str, list[float]]]:
    """Each network's layout, and its milliseconds turn by turn."""
    chosen: dict[str, str] = {}
    for name, module in modules.items():
        times = {}
        for layout, form in LAYOUTS.items():
            own = images.to(memory_format=form)
            module.to(memory_format=form)
            milliseconds(module, own, calls)
            times[layout] = min(milliseconds(module, own, calls) for _ in range(2))
        chosen[name] = min(times, key=lambda layout: times[layout])
        module.to(memory_format=LAYOUTS[chosen[name]])
    found: dict[str, tuple[str, list[float]]] = {name: (layout, []) for name, layout in chosen.items()}
    inputs = {layout: images.to(memory_format=form) for layout, form in LAYOUTS.items()}
    for _ in range(rounds):
        for name, (layout, times_) in found.items():
            times_.append(milliseconds(modules[name], inputs[layout], calls))
    return found


def rows_of(case: str, device: torch.device, sizes: Sizes, report: Report) -> list[dict[str, Any]]:
    """All rows for images of one shape."""
    shape, budget = CASES[case]
    modules = networks(shape, budget)
    images = smooth_images(sizes.batch, "latency", shape.in_channels, shape.image_size).float() / 255
    counts = sizes_of(modules, images[:32])
    modules = {name: module.to(device) for name, module in modules.items()}
    images = images.to(device)
    with torch.inference_mode():
        plain, fused = modules["merged"](images), modules["merged, fused"](images)
    torch.testing.assert_close(fused, plain, atol=1e-4, rtol=0)
    one = measure(modules, images[:1], sizes.calls, sizes.rounds)
    batch = measure(modules, images, 1, sizes.rounds)
    rows = []
    for name in modules:
        row: dict[str, Any] = {"images": case, "network": name, **counts[name]}
        for key, (layout, times) in (("one", one[name]), ("batch", batch[name])):
            low, middle, high = statistics.quantiles(times if len(times) > 1 else times * 2, method="inclusive")
            row |= {f"{key}.layout": layout, f"{key}.ms": middle, f"{key}.ms_q1": low, f"{key}.ms_q3": high}
        rows.append(row | {"n": sizes.rounds} | report.circumstances())
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Head and one row a network."""
    lines = [["network", "parameters", "weights, kB", "safetensors, kB", "int8, kB", "multiply-adds",
              *(f"{what}, ms [quartiles]" for what in BATCHES.values())]]  # fmt: skip
    for row in rows:
        kilobytes = (f"{int(row[name]) / 1000:.1f}" for name in COUNTS[1:4])
        times = [[float(row[f"{key}.{end}"]) for end in ("ms", "ms_q1", "ms_q3")] for key in BATCHES]
        shown = (f"{middle:.3g} [{low:.3g}, {high:.3g}]" for middle, low, high in times)
        counts = [f"{int(row[name]):,}" for name in ("parameters", "multiply_adds")]
        lines.append([row["network"], counts[0], *kilobytes, counts[1], *shown])
    return lines


def text_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown beside a CSV, from its rows: what was measured where, then a table for each kind of image."""
    one = rows[0]
    text = (
        f"{one['device']}, {one['threads']} thread{'s' if int(one['threads']) > 1 else ''}, torch {one['torch']}, "
        f"float32, commit {one['commit'][:10]}; medians of {one['n']} turns, all networks by turns, after a warm-up of "
        f"{FULL.calls} calls with one image and one with a batch. A turn of one image is the mean of {FULL.calls} "
        "calls. Weights are random, dropout is off, and the peers from torchvision have their first strides dropped, "
        "for small images. kB are 1,000 bytes.\n"
    )
    for case in dict.fromkeys(row["images"] for row in rows):
        text += f"\n**{case}**\n\n{markdown(table([row for row in rows if row['images'] == case]))}"
    return text


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, auto (a GPU where there is one), cuda or cuda:1")
    parser.add_argument("--threads", type=int, default=1, help="of torch's, on a CPU (default 1)")
    parser.add_argument("--quick", action="store_true", help="one turn of two images: no figures to keep")
    parser.add_argument("--out", type=Path, default=Path("results/lightcnn/latency.csv"))
    asked = parser.parse_args(arguments)
    sizes, device = QUICK if asked.quick else FULL, setup(asked.device, asked.threads)
    report, began, rows = Report(device), perf_counter(), list[dict[str, Any]]()
    for case in CASES:
        print(f"{perf_counter() - began:.0f} s: {case} ...", file=sys.stderr)
        rows += rows_of(case, device, sizes, report)
    for case in CASES:
        show(case, table([row for row in rows if row["images"] == case]))
    write_csv(asked.out, COLUMNS, rows)
    atomic_write(asked.out.with_suffix(".md"), text_of(rows).encode())
    print(f"written: {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
