"""What the published penalty, removed neurons and a sweep cost: `python benchmarks/sparsevit_step.py`.

All sides are measured by turns (A B A B ...), after turns that are not counted: medians, and quartiles of the ratios.
Random weights and pixels, for the time depends on neither.

step     a fine-tuning step of ViT-B/16 at 224 pixels, 8 images, with 0.01 R: ours (`sparsevit.fit`, with its batches
         and its look at the loss) against `published_forward` below, in both precisions. Target: 1.3 times as fast
memory   the same: what a step adds to the memory of a process that holds the weights, each side in a process of its
         own; and the bytes that the forward pass keeps for the backward pass. Target: 0.6 of the memory
removal  images a second without half of the neurons and half of the heads, against all. Target: 1.8 times as many
sweep    accuracy at 10 ratios on 2,000 images, the network of configs/mini.yaml, in a pass that all share, against a
         pass for each ratio. Target: 60 s

The published way has explicit attention in every block, and the penalty of every block, of which only the last one's is
used (model.py:93 and 150 of the authors' code, written anew here). It is the plain way, not a slow one: its batch is
ready, and its algorithms need not be deterministic. Before anything is timed, both ways must give the same loss and
penalty and the same gradients of both. Dropout is off on both sides. Measure on an idle machine.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from bench_report import Report
from torch import Tensor
from torch.nn import functional

from shared.batches import Resident
from shared.cli import find_config
from shared.config import load
from shared.gpu import Precision, autocast, peak_memory, setup, stream
from sparsevit.algorithm import build_term, mapped_blocks
from sparsevit.config import Config, OursRecipe
from sparsevit.fit import Fit, Plan
from sparsevit.measure import accuracies
from sparsevit.method import keep_count
from sparsevit.model import ARCHS, Vit, arch_size, build
from sparsevit.problem import load_problem
from sparsevit.prune import Group, Sweep
from sparsevit.shrink import remove_heads, remove_neurons
from sparsevit.start import empty_network

CLASSES, RATE, MOMENTUM, DECAY, COEFFICIENT = 100, 1e-3, 0.9, 1e-4, 0.01
BATCHES = 4  # of images that our side turns over
RATIOS = tuple(r / 10 for r in range(10))
SIDES = ("ours", "published")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
# Ours and the reference of a row, and how the row names their precisions.
PAIRS = (
    (("ours", "float32"), ("published", "float32"), "float32"),
    (("ours", "bfloat16"), ("published", "bfloat16"), "bfloat16"),
    (("ours", "bfloat16"), ("published", "float32"), "ours bfloat16, reference float32"),
)


@dataclass(frozen=True)
class Sizes:
    """How much is measured; `QUICK` only shows that it runs."""

    arch: str = "vit_b16"
    image: int = 224
    batch: int = 8
    rounds: int = 10
    warm_ups: int = 2
    processes: int = 3  # of each side, for its memory
    tests: int = 2000


FULL = Sizes()
QUICK = Sizes("s0", 28, 4, 2, 1, 1, 100)


def paper() -> Config:
    """The arm `paper`, for its term and for the network of the sweep."""
    return load(find_config("mini", "sparsevit"), Config, ["method=paper", "device=auto"])


def network_of(sizes: Sizes, device: torch.device) -> Vit:
    """A network of random weights."""
    return build(arch_size(sizes.arch, sizes.image, 3, CLASSES), 0).to(device)


def source_of(sizes: Sizes, device: torch.device) -> Resident:
    """Some batches of random images."""
    count = BATCHES * sizes.batch
    shape = (count, 3, sizes.image, sizes.image)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=stream(0, "images"))
    return Resident(images.to(device), torch.arange(count, device=device) % CLASSES, [0.5] * 3, [0.5] * 3)


def our_steps(network: Vit, sizes: Sizes, device: torch.device, precision: Precision = "float32") -> Iterator[int]:
    """Fine-tuning as `sparsevit.train` does it, one step at a time."""
    config = paper()
    recipe = OursRecipe(name="ours", lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, decay_all=True)
    plan = Plan(("benchmark",), 10_000, sizes.batch, recipe, 0, precision=precision)
    maps = mapped_blocks(config, len(network.layers))
    return Fit(network, source_of(sizes, device), plan, build_term(config), maps).steps()


def our_parts(network: Vit, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and term of our step."""
    config, depth = paper(), len(network.layers)
    logits, seen = network.observe(images, mapped_blocks(config, depth))
    term = build_term(config)
    assert term is not None
    return functional.cross_entropy(logits, labels), term(network, seen)


def published_forward(network: Vit, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and the last block's penalty, the published way, with the weights of our network."""
    x = network.patch(images).flatten(2).transpose(1, 2)
    x = torch.cat([network.cls.expand(len(x), -1, -1), x], dim=1) + network.pos
    penalty = x.new_zeros(())
    for block in network.layers:
        attend, y = block.attn, block.norm1(x)
        q, k, v = (
            linear(y).unflatten(-1, (attend.heads, -1)).permute(0, 2, 1, 3) for linear in (attend.q, attend.k, attend.v)
        )
        attention = torch.softmax(q @ k.transpose(-2, -1) / attend.head_dim**0.5, dim=-1)
        penalty = torch.mean(torch.log(1 + attention**2))
        x = x + attend.out((attention @ v).transpose(1, 2).flatten(2))
        x = x + block.fc2(functional.gelu(block.fc1(block.norm2(x))))
    return network.head(network.norm(x)[:, 0]), penalty


def published_parts(network: Vit, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and term of the published step."""
    logits, penalty = published_forward(network, images)
    return functional.cross_entropy(logits, labels), COEFFICIENT * penalty


def published_steps(
    network: Vit, sizes: Sizes, device: torch.device, precision: Precision = "float32"
) -> Iterator[int]:
    """Fine-tuning the published way, on one batch that is ready."""
    optimizer = torch.optim.SGD(network.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY)
    images, labels = batch_of(sizes, device)
    network.train()
    for step in range(1, 1_000_000):
        torch.use_deterministic_algorithms(False)
        optimizer.zero_grad()
        with autocast(device, precision):
            cross_entropy, term = published_parts(network, images, labels)
        (cross_entropy + term).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield step


def batch_of(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor]:
    """One batch of normalised images."""
    return next(source_of(sizes, device).evaluate(sizes.batch))


def same_gradients(sizes: Sizes, device: torch.device) -> float:
    """The largest difference of a gradient between the two ways, of the cross-entropy or of the term, in float32.

    In shares of the largest value of its tensor, or of 1e-4 of the largest of all: rounding is not zero.

    Raises:
        SystemExit: the two ways do not compute the same.
    """
    network, (images, labels) = network_of(sizes, device), batch_of(sizes, device)
    worst = 0.0
    for one, other in zip(*(way(network, images, labels) for way in (our_parts, published_parts)), strict=True):
        parameters = list(network.parameters())
        found = [torch.autograd.grad(x, parameters, retain_graph=True, materialize_grads=True) for x in (one, other)]
        floor = 1e-4 * max(float(g.abs().max()) for g in found[1])
        shares = [float((a - b).abs().max() / (b.abs().max() + floor)) for a, b in zip(*found, strict=True)]
        worst = max(worst, *shares, abs(float(one.detach() / other.detach()) - 1))
    if not worst < 1e-2:
        raise SystemExit(f"the two ways do not compute the same: they differ by {worst:.2g}")
    return worst


def now(device: torch.device) -> float:
    """The time in seconds when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def by_turns(works: Mapping[str, Callable[[], Any]], sizes: Sizes, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each work in every counted turn."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(sizes.warm_ups + sizes.rounds):
        for name, work in works.items():
            began = now(device)
            work()
            seconds[name] += [now(device) - began] if turn >= sizes.warm_ups else []
    return seconds


def measure_steps(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Steps of both sides by turns."""
    print(f"gradients differ by {same_gradients(sizes, device):.1g} of the largest of their tensor", file=sys.stderr)
    makers = {"ours": our_steps, "published": published_steps}
    sides = {f"{side}, {precision}": makers[side](network_of(sizes, device), sizes, device, precision)
             for precision in PRECISIONS for side in SIDES}  # fmt: skip
    seconds = by_turns({name: functools.partial(next, steps) for name, steps in sides.items()}, sizes, device)
    for ours, reference, precision in PAIRS:
        what = f"{sizes.arch}, {sizes.image} px, {sizes.batch} images, {precision}; target 1.3"
        report.add("step", what, "s", *(seconds[", ".join(side)] for side in (ours, reference)))


def resident_bytes(device: torch.device) -> int:
    """Bytes that this process holds now: on a GPU those of tensors."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # elsewhere than on Linux; nothing large has been freed yet
        return peak_memory(device)


def memory_of(side: str, precision: Precision, device: torch.device, sizes: Sizes) -> dict[str, int]:
    """What two steps add to this process (the second has momentum), and what a forward pass keeps for the backward."""
    network = network_of(sizes, device)
    parts = {"ours": our_parts, "published": published_parts}[side]
    steps = {"ours": our_steps, "published": published_steps}[side](network, sizes, device, precision)
    images, labels = batch_of(sizes, device)
    before = resident_bytes(device)
    for _ in range(2):
        next(steps)
    added = peak_memory(device) - before

    def forward() -> tuple[Tensor, Tensor]:
        """A forward pass of this side, in its precision."""
        with autocast(device, precision):
            return parts(network, images, labels)

    return {"added": added, "kept": kept_bytes(forward, network)}


def kept_bytes(forward: Callable[[], tuple[Tensor, Tensor]], network: Vit) -> int:
    """Bytes of the tensors that a forward pass leaves for the backward pass, each storage once, without weights."""
    holders: weakref.WeakSet[Any] = weakref.WeakSet()

    class Holder:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: Tensor) -> Holder:
        """Hold what the backward pass will want, so that it can be counted."""
        holders.add(holder := Holder(tensor))  # it lives as long as the graph that needs it
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        result = forward()
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages = [holder.tensor.untyped_storage() for holder in holders]
    kept = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in weights}
    assert all(part.requires_grad for part in result)  # and so the graph is alive until here
    return sum(kept.values())


def measure_memory(report: Report, device: torch.device, sizes: Sizes) -> None:
    """Both sides, each in processes of its own."""
    # glibc keeps freed blocks of up to 32 MiB; those with pages of their own go back: the peak is that of use.
    surroundings = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    sides = [(side, precision) for precision in PRECISIONS for side in SIDES]
    found: dict[tuple[str, str], list[dict[str, int]]] = {side: [] for side in sides}
    for side in sides * sizes.processes:
        command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", *side, "--device", str(device),
                   "--threads", str(torch.get_num_threads()), "--sizes", json.dumps(asdict(sizes))]  # fmt: skip
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"the process that measures memory failed:\n{done.stderr}")
        found[side].append(json.loads(done.stdout.splitlines()[-1]))
    for ours, reference, precision in PAIRS:
        what = f"{sizes.arch}, {sizes.image} px, {sizes.batch} images, {precision}"
        settings = {"added": f"{what}; a step, above the weights; target 0.6", "kept": f"{what}; kept for backward"}
        for key, setting in settings.items():
            sizes_of = ([max(0, item[key]) / 2**20 for item in found[side]] for side in (ours, reference))
            report.add("memory", setting, "MiB", *sizes_of)


@torch.inference_mode()
def measure_removal(report: Report, device: torch.device, sizes: Sizes) -> None:
    """The network without half of its neurons and heads, against all of it."""
    dense = network_of(sizes, device).eval()
    neurons = [torch.arange(keep_count(block.mlp, 0.5)) for block in dense.size.blocks]
    heads = [torch.arange(keep_count(block.heads, 0.5)) for block in dense.size.blocks]
    half, (images, _) = remove_heads(remove_neurons(dense, neurons), heads).eval(), batch_of(sizes, device)
    for batch in dict.fromkeys((1, sizes.batch)):
        chosen = images[:batch]
        seconds = by_turns({"half": lambda: half(chosen), "dense": lambda: dense(chosen)}, sizes, device)  # noqa: B023
        rates = {name: [batch / time for time in times] for name, times in seconds.items()}
        what = f"{sizes.arch}, {sizes.image} px, {batch} image{'s' if batch > 1 else ''}; target 1.8"
        report.add("removal", what, "images/s", rates["half"], rates["dense"])


def measure_sweep(report: Report, device: torch.device, sizes: Sizes) -> None:
    """All ratios in one pass over the images, against a pass for each."""
    config = paper()
    config = config.model_copy(update={"data": config.data.model_copy(update={"test_images": sizes.tests})})
    problem = load_problem(config.data, device)
    sweep = Sweep(config, empty_network(config, problem, device), problem, lambda: None)

    def each() -> None:
        """Every ratio of the sweep in a pass of its own."""
        for ratio in RATIOS:
            accuracies([sweep.pruned("global_l1", ratio)], problem.test, config.eval_batch_size, config.precision)

    seconds = by_turns({"shared": lambda: sweep.run(Group("global_l1", RATIOS)), "each": each}, sizes, device)
    what = f"{len(RATIOS)} ratios, {sizes.tests} images, configs/mini.yaml; target 60 s"
    report.add("sweep", what, "s", seconds["shared"], seconds["each"])


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:1")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU (default 2)")
    parser.add_argument("--arch", choices=list(ARCHS), help="a smaller network than vit_b16")
    parser.add_argument("--image", type=int, help="pixels a side, instead of 224")
    parser.add_argument("--batch", type=int, help="images a step, instead of 8")
    parser.add_argument("--quick", action="store_true", help="a small network and few turns: no figures to keep")
    parser.add_argument("--out", type=Path, default=Path("results/sparsevit/benchmarks.csv"))
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)  # a process of `measure_memory`
    parser.add_argument("--sizes", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    given = {name: value for name in ("arch", "image", "batch") if (value := getattr(asked, name)) is not None}
    sizes = Sizes(**asked.sizes) if asked.sizes else replace(QUICK if asked.quick else FULL, **given)
    device = setup(asked.device, asked.threads)
    if asked.memory_of:
        print(json.dumps(memory_of(*asked.memory_of, device, sizes)))
        return 0
    report, began = Report(device, ("step", "sweep")), perf_counter()
    for measure in (measure_steps, measure_memory, measure_removal, measure_sweep):
        print(f"{perf_counter() - began:.0f} s: {measure.__name__} ...", file=sys.stderr)
        measure(report, device, sizes)
    report.finish(asked.out)
    print(f"written: {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
