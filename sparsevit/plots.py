"""The pictures of a study: accuracy by ratio, accuracy against latency, attention, entropy by block, neuron scores."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.config import load
from shared.plots import new_figure, save, use_style
from shared.run import read_results
from sparsevit.config import Config
from sparsevit.eval import HISTOGRAM
from sparsevit.latency import Timing
from sparsevit.problem import load_problem
from sparsevit.shrink import load_network

Runs = dict[str, list[Path]]  # arm -> run folders, one a seed
MAPPED = ("none", "paper", "paper_strong", "attn_sparse")  # arms whose attention is drawn
IMAGES = 4  # real images whose attention is drawn


def draw(folders: Sequence[Path], out: Path, timings: Mapping[str, Sequence[Timing]]) -> None:
    """Write all pictures that the finished runs allow, as PNG and SVG."""
    use_style("sparsevit")
    runs: Runs = {}
    for folder in folders:
        runs.setdefault(str(read_results(folder)["method"]), []).append(folder)
    out.mkdir(parents=True, exist_ok=True)
    accuracy_by_ratio(runs, out)
    entropy_by_block(runs, out)
    neuron_scores(runs, out)
    attention_maps(runs, out)
    for name, timed in timings.items():
        pareto(next(f for f in folders if f.name == name), timed, out)


def values_of(folder: Path) -> dict[str, float]:
    """A run's figures by name."""
    return {row["metric"]: row["value"] for row in read_results(folder)["figures"]}


def curve(folder: Path, pruner: str) -> dict[float, float]:
    """Accuracy in % by share pruned in %, from the dense network on."""
    values = values_of(folder)
    start, end = f"{pruner}.", ".accuracy"
    found = {float(n[len(start) : -len(end)]): 100 * v for n, v in values.items()
             if n.startswith(start) and n.endswith(end)}  # fmt: skip
    return {0.0: 100 * values["dense.accuracy"], **dict(sorted(found.items()))}


def accuracy_by_ratio(runs: Runs, out: Path) -> None:
    """Accuracy against the share pruned, for weights and for neurons: mean over seeds, shaded by one deviation."""
    panels = {"global_l1": "weights set to zero (one global ranking), one shot", "neurons": "neurons removed, one shot"}
    figure, axes = new_figure(1, 2, (11, 4.2))
    for axis, (pruner, title) in zip(axes, panels.items(), strict=True):
        for number, (method, folders) in enumerate(runs.items()):
            curves = [curve(folder, pruner) for folder in folders]
            ratios = list(curves[0])
            values = np.array([[c[r] for r in ratios] for c in curves])
            bold = method in ("none", "paper")
            line = axis.plot(ratios, values.mean(0), "o-", markersize=3, linewidth=2.4 if bold else 1.2, label=method,
                             color=f"C{number % 10}", zorder=3 if bold else 2)[0]  # fmt: skip
            if len(folders) > 1:
                spread = values.std(0, ddof=1)
                axis.fill_between(ratios, values.mean(0) - spread, values.mean(0) + spread, color=line.get_color(),
                                  alpha=0.12, linewidth=0)  # fmt: skip
        axis.set(xlabel="pruned (%)", ylabel="accuracy (%)", title=title)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, out / "accuracy_by_ratio")


def entropy_by_block(runs: Runs, out: Path) -> None:
    """Mean entropy of the attention rows of each block, and the ceiling, uniform attention."""
    figure, (axis,) = new_figure(1, 1, (6, 3.8))
    ceiling = 0.0
    for number, (method, folders) in enumerate(runs.items()):
        values = np.array([read_results(folder)["details"]["entropy"] for folder in folders])
        axis.plot(range(1, values.shape[1] + 1), values.mean(0), "o-", label=method, color=f"C{number % 10}")
        found = values_of(folders[0])
        ceiling = found["attention.entropy_last"] + found["attention.uniform_gap"]
    axis.axhline(ceiling, color="black", linestyle=":", linewidth=1)
    axis.set(xlabel="block", ylabel="entropy of attention (nats)", title="dotted: uniform attention, ln N")
    axis.set_xticks(range(1, values.shape[1] + 1))
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, out / "entropy_by_block")


def neuron_scores(runs: Runs, out: Path) -> None:
    """How the neurons' scores (deviation of the output times length of the column) spread: low ones can go."""
    figure, (axis,) = new_figure(1, 1, (6.5, 3.8))
    low, high, bins = HISTOGRAM
    edges = np.linspace(low, high, bins + 1)
    for number, (method, folders) in enumerate(runs.items()):
        counts = sum(np.array(read_results(folder)["details"]["neuron_scores"]) for folder in folders)
        axis.stairs(counts / np.sum(counts), edges, label=method, color=f"C{number % 10}", linewidth=1.3)
    axis.set(
        xlabel="log10 of score / mean score of the block", ylabel="share of neurons", title="scores of MLP neurons"
    )
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, out / "neuron_scores")


def attention_maps(runs: Runs, out: Path) -> None:
    """Where the class token of the last block looks (mean over heads), on real test images, arm by arm."""
    arms = [method for method in MAPPED if method in runs]
    if not arms:
        return
    config = load(runs[arms[0]][0] / "config.yaml", Config)
    problem = load_problem(config.data, torch.device("cpu"))
    chosen = torch.arange(IMAGES) * len(problem.test) // IMAGES
    images, _ = next(problem.test.prefetch([chosen], None))
    figure, axes = new_figure(IMAGES, len(arms) + 1, (1.9 * (len(arms) + 1), 1.8 * IMAGES))
    columns: list[tuple[str, list[Any]]] = [("image", [shown(image) for image in images])]
    for method in arms:
        network = load_network(runs[method][0] / "model")
        with torch.inference_mode():
            _, seen = network.observe(images, (len(network.layers) - 1,))
        maps, side = seen[-1]["attention"].mean(1)[:, 0, 1:], network.size.image // network.size.patch
        columns.append((method, list(maps.reshape(IMAGES, side, side).numpy())))
    top = max(float(np.max(values)) for _, column in columns[1:] for values in column)
    for number, (title, column) in enumerate(columns):
        for row, values in enumerate(column):
            axis = axes[row * len(columns) + number]
            axis.imshow(values, cmap="gray" if number == 0 else "viridis", vmin=0, vmax=1 if number == 0 else top)
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title)
    figure.suptitle("attention of the class token, last block", fontsize=9)
    save(figure, out / "attention_maps")


def shown(image: torch.Tensor) -> Any:
    """Pixels [H, W] or [H, W, 3] in 0..1 of a normalised image."""
    pixels = (image - image.min()) / (image.max() - image.min()).clamp(min=1e-6)
    return pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()


MARKS = {"zeros, masked": "s", "heads removed": "^", "neurons and heads removed": "D"}


def pareto(folder: Path, timed: Sequence[Timing], out: Path) -> None:
    """Accuracy against measured time, for the networks of one run: masked ones stand above the dense one."""
    values, batch = values_of(folder), max(t.batch for t in timed)
    figure, (axis,) = new_figure(1, 1, (6, 3.8))
    for number, timing in enumerate(t for t in timed if t.batch == batch):
        share, _, rest = timing.name.partition(" % ")
        kind = rest.removesuffix(" removed").replace(" and ", "_")
        metric = "dense.accuracy" if not rest else f"{'global_l1' if 'masked' in rest else kind}.{share}.accuracy"
        if metric not in values:
            continue
        milliseconds = 1e3 * timing.median
        errors = [[1e3 * (timing.median - timing.low)], [1e3 * (timing.high - timing.median)]]
        axis.errorbar(milliseconds, 100 * values[metric], xerr=errors, fmt=MARKS.get(rest, "o"),
                      color=f"C{number % 10}", label=timing.name)  # fmt: skip
    axis.set(xlabel=f"milliseconds a batch of {batch} (median, quartiles)", ylabel="accuracy (%)",
             title=f"{folder.name}: one shot, nothing trained after it")  # fmt: skip
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, out / "accuracy_by_latency")
