"""How fast networks are: variants interleaved in one process, medians and quartiles.

    python -m sparsevit.latency --make nets --arch vit_b16 --image 224
    python -m sparsevit.latency nets --threads 2 --batch 1 8

The first makes a network of random values, its masked and its smaller versions, and saves them; the second loads them
in a process of its own and times them.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared import report
from shared.checkpoint import atomic_write, write_json
from shared.cli import check_shared, run_main
from shared.errors import CheckpointError, ConfigError, RunError
from shared.gpu import describe, setup
from shared.run import command_line, environment
from sparsevit.baselines import can_run_two_four, to_two_four
from sparsevit.config import Config
from sparsevit.measure import independent, masked, percent
from sparsevit.method import global_magnitude_masks, keep_count, prunable, remove_heads, remove_neurons, zeros_to_prune
from sparsevit.model import ARCHS, Vit, arch_size, build, count_macs, count_parameters
from sparsevit.shrink import load_network, save_network

WARM_UPS, REPEATS = 10, 30


@dataclass(frozen=True)
class Timing:
    """Seconds a batch of one variant, and how many times as fast as the first variant, round by round."""

    name: str
    batch: int
    parameters: int
    macs: int
    median: float
    low: float  # first quartile
    high: float  # third quartile
    speedup: float  # median over rounds of first / this
    images_per_second: float


@torch.inference_mode()
def time_networks(networks: Mapping[str, Vit], batches: Sequence[int], device: torch.device, repeats: int = REPEATS,
                  warm_ups: int = WARM_UPS) -> list[Timing]:  # fmt: skip
    """Time all networks on one fixed input a batch size, each round one pass of every network in turn."""
    timings = []
    for batch in batches:
        first = next(iter(networks.values()))
        size, weight = first.size, first.patch.weight
        draws = torch.Generator().manual_seed(0)
        images = torch.randn(batch, size.channels, size.image, size.image, generator=draws).to(device, weight.dtype)
        rounds: dict[str, list[float]] = {name: [] for name in networks}
        names = list(networks)
        for number in range(warm_ups + repeats):
            turn = number % len(names)  # each network is first in turn: what runs before it has filled the caches
            for name in names[turn:] + names[:turn]:
                seconds = _seconds(networks[name].eval(), images)
                if number >= warm_ups:
                    rounds[name].append(seconds)
        base = rounds[next(iter(rounds))]
        for name, network in networks.items():
            low, median, high = _quartiles(rounds[name])
            speedup = statistics.median(a / b for a, b in zip(base, rounds[name], strict=True))
            timings.append(Timing(name, batch, count_parameters(network.size), count_macs(network.size), median, low,
                                  high, speedup, batch / median))  # fmt: skip
    return timings


def table(timings: Sequence[Timing]) -> list[list[str]]:
    """Head and one row a variant and batch size."""
    head = ["network", "batch", "parameters", "GMAC", "ms, median [quartiles]", "images/s", "times as fast"]
    return [head, *(
        [t.name, str(t.batch), f"{t.parameters:,}", f"{t.macs / 1e9:.3f}",
         f"{1e3 * t.median:.3g} [{1e3 * t.low:.3g}, {1e3 * t.high:.3g}]", f"{t.images_per_second:.4g}",
         f"{t.speedup:.2f}"] for t in timings
    )]  # fmt: skip


def write_timings(path: Path, timings: Sequence[Timing], rounds: int, where: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Write a CSV with one line a variant and batch size, and return its lines.

    Args:
        where: device, precision, torch, commit and command.
    """
    ends = {"n": rounds, **{key: where[key] for key in ("device", "precision", "torch", "commit", "command")}}
    lines = [
        {
            "network": t.name, "batch": t.batch, "parameters": t.parameters, "macs": t.macs, "seconds": t.median,
            "seconds_q1": t.low, "seconds_q3": t.high, "times_as_fast": t.speedup,
            "images_per_second": t.images_per_second, **ends,
        }
        for t in timings
    ]  # fmt: skip
    report.write_csv(path, list(lines[0]), lines)
    return lines


def timings_of(lines: Sequence[Mapping[str, Any]]) -> list[Timing]:
    """The timings in the lines of such a CSV."""
    counts, measured = ("batch", "parameters", "macs"), ("seconds", "seconds_q1", "seconds_q3", "times_as_fast",
                                                         "images_per_second")  # fmt: skip
    return [Timing(x["network"], *(int(x[c]) for c in counts), *(float(x[c]) for c in measured)) for x in lines]


def text_of(lines: Sequence[Mapping[str, Any]]) -> str:
    """What the Markdown beside such a CSV says: where it was measured, and the table."""
    one = lines[0]
    commit = f", commit {one['commit'][:10]}" if one["commit"] else ""
    about = (
        f"{one['device']}, {one['precision']}, torch {one['torch']}{commit}; {one['n']} rounds in turn, medians and "
        f"quartiles. Saved networks, loaded by `{one['command']}`."
    )
    return f"{about}\n\n{report.markdown(table(timings_of(lines)))}"


def variants_of_run(folder: Path, config: Config, device: torch.device) -> dict[str, Vit]:
    """A run's dense network, its masked ones at 50 and 90 %, and the smaller ones that it saved."""
    dense = load_network(folder / "model").to(device)
    variants = {"dense": dense}
    for ratio in (0.5, 0.9):
        masks = global_magnitude_masks(dict(prunable(dense, config.prune.set)), ratio)
        variants[f"{percent(ratio)} % zeros, masked"] = masked(dense, masks)
    for name in config.prune.removals:
        for ratio in config.prune.removal_ratios:
            path = folder / "pruned" / f"{name}.{percent(ratio)}"
            variants[f"{percent(ratio)} % {name.replace('_', ' and ')} removed"] = load_network(path).to(device)
    return variants


def variants_of(dense: Vit, ratio: float = 0.5, multiple: int = 64) -> dict[str, Vit]:
    """A network's masked and smaller versions, which parts go being of no matter for their speed."""
    masks = {share: masked(dense, global_magnitude_masks(dict(prunable(dense, "matrices")), share))
             for share in (0.5, 0.9)}  # fmt: skip
    neurons = [torch.arange(keep_count(b.mlp, ratio, multiple)) for b in dense.size.blocks]
    heads = [torch.arange(keep_count(b.heads, ratio)) for b in dense.size.blocks]
    silent = independent(dense)
    with torch.no_grad():
        for block, kept in zip(silent.layers, neurons, strict=True):
            block.fc2.weight[:, len(kept) :] = 0
            block.fc1.weight[len(kept) :] = 0
            block.fc1.bias[len(kept) :] = 0
    share = percent(ratio)
    return {
        "dense": dense,
        "50 % zeros, masked": masks[0.5],
        "90 % zeros, masked": masks[0.9],
        f"{share} % neurons masked": silent,
        f"{share} % neurons removed": remove_neurons(dense, neurons),
        f"{share} % heads removed": remove_heads(dense, heads),
        f"{share} % neurons and heads removed": remove_heads(remove_neurons(dense, neurons), heads),
    }


def _seconds(network: Vit, images: Tensor) -> float:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    started = time.perf_counter()
    network(images)
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)
    return time.perf_counter() - started


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def make(folder: Path, arch: str, image: int, ratio: float) -> None:
    """Save a network of random values and its variants, each in a folder of its own."""
    zeros_to_prune(ratio, 1)  # refuses what is no ratio, before the work
    channels = 1 if arch == "s0" else 3
    for number, (name, network) in enumerate(
        variants_of(build(arch_size(arch, image, channels, 100), 0), ratio).items()
    ):
        save_network(folder / f"{number}", network, name=name)
        print(f"{name}: {count_parameters(network.size):,} parameters", flush=True)


def run_latency(arguments: Sequence[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m sparsevit.latency", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("folder", type=Path, nargs="?", help="time the networks in this folder")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="make networks of random values in this folder")
    parser.add_argument("--arch", default="vit_b16", help=f"with --make: one of {', '.join(ARCHS)} (vit_b16)")
    parser.add_argument("--image", type=int, default=224, help="with --make: pixels a side (224)")
    parser.add_argument(
        "--ratio", type=float, default=0.5, help="with --make: share of neurons and heads that go (0.5)"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64], help="batch sizes (1 64)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="timed rounds (30)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    parser.add_argument("--half", action="store_true", help="float16; adds 2:4 sparse MLPs where the GPU has kernels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the timings there as well")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the table there, and timings.csv beside it"
    )
    asked = parser.parse_args(arguments)
    check_shared(__file__)
    if (asked.make is None) == (asked.folder is None):
        raise ConfigError("give one of --make FOLDER and FOLDER; python -m sparsevit.latency --help shows an example")
    if min(*asked.batch, asked.repeats) < 1:
        raise ConfigError(f"--batch {asked.batch}, --repeats {asked.repeats}: each must be at least 1")
    if asked.threads < 0:
        raise ConfigError(f"--threads {asked.threads}: give the number of threads, or 0 for all cores")
    if asked.make is not None:
        make(asked.make, asked.arch, asked.image, asked.ratio)
        return 0
    device = setup(asked.device, asked.threads)
    paths = sorted(asked.folder.glob("*/config.json"), key=lambda path: (len(path.parent.name), path.parent.name))
    if not paths:
        raise RunError(f"{asked.folder}: has no networks; make some with --make")
    networks = {named(path.parent): load_network(path.parent).to(device) for path in paths}
    if asked.half:
        networks = {name: network.half() for name, network in networks.items()}
        if can_run_two_four(device):
            sparse = independent(next(iter(networks.values())))
            to_two_four(sparse)
            networks["2:4 sparse MLPs"] = sparse
    timings = time_networks(networks, asked.batch, device, asked.repeats)
    precision = "float16" if asked.half else "float32"
    shown = f"{describe(device)}, {precision}, torch {torch.__version__}"
    report.show(f"{shown}; {asked.repeats} rounds", table(timings))
    if asked.json:
        write_json(asked.json, {"where": shown, "timings": [asdict(t) for t in timings]})
    if asked.markdown:
        where = environment(command_line("sparsevit.latency", arguments))
        where |= {"device": describe(device), "precision": precision}
        lines = write_timings(asked.markdown.with_name("timings.csv"), timings, asked.repeats, where)
        atomic_write(asked.markdown, text_of(lines).encode())
    return 0


def named(folder: Path) -> str:
    """The name that a saved network was given; CheckpointError if its config.json cannot be read."""
    path = folder / "config.json"
    try:
        return str(dict(json.loads(path.read_bytes())).get("name", folder.name))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: is damaged: {error}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_latency, arguments)


if __name__ == "__main__":
    sys.exit(main())
