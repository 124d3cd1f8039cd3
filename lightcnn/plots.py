"""The pictures of a study: training curves by phase, accuracy against size, augmented images, the confusion matrix.

`python -m lightcnn.plots` draws the published ones of accuracy against size anew: they show other studies as well.
"""

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightcnn.algorithm import paper_ranges
from lightcnn.augment import augment, draw
from lightcnn.config import Config
from shared.claims import Figures
from shared.cli import REPOSITORY, shown
from shared.config import load
from shared.gpu import stream
from shared.plots import new_figure, save, use_style
from shared.report import figures_of, read_rows, rows_of
from shared.run import read_metrics, read_results

OURS = "two_stage"
# Published accuracies by (parameters, accuracy in %, who), self-reported and mostly the best epoch on the test set. The
# paper states fewer than 20,000 parameters for CIFAR-10; 19,622 are those of its network.
PUBLISHED: dict[str, tuple[tuple[int, float, str], ...]] = {
    "mnist": ((14862, 99.0, "paper"), (575, 98.0, "neural golfing (>)"), (1500, 99.2, "MLDS 2022 talk"),
              (7070, 99.4, "ERAv4S6 (>)"), (8640, 99.2, "MNIST-Challenge"), (8900, 99.5, "era-s7"),
              (15578, 99.43, "MNIST_99.4")),
    "fashion_mnist": ((14862, 89.0, "paper"), (100_000, 92.5, "2 conv, Zalando's list (<100k)"),
                      (113_000, 92.2, "2 conv, Zalando's list"), (85_000, 91.6, "residual + SE (about 85k)")),
    "cifar10": ((19622, 65.0, "paper"), (45420, 80.0, "Restricted_CNN (>)"), (72730, 83.1, "mummanajagadeesh"),
                (97530, 94.6, "tiniest"), (85_000, 72.0, "residual + SE (about 85k)")),
}  # fmt: skip


def draw_all(folders: Sequence[Path], out: Path) -> None:
    """Write all pictures that the finished runs allow, as PNG and SVG."""
    use_style("lightcnn")
    out.mkdir(parents=True, exist_ok=True)
    results = {folder: read_results(folder) for folder in folders}
    figures = figures_of([row for found in results.values() for row in rows_of(found)], "final")
    name = load(folders[0] / "config.yaml", Config).data.name
    size_and_accuracy(figures, [found["method"] for found in results.values()], name, out)
    for folder in folders:
        if results[folder]["method"] == OURS:
            training_curves(folder, out)
            confusion_matrix(results[folder], out)
            augmented_images(folder, out)


def draw_ladder(figures: Figures, arms: Sequence[str], out: Path) -> None:
    """Accuracy by arm of the budget study, each seed a point: validation, which chose the recipe, and test."""
    use_style("lightcnn")
    out.mkdir(parents=True, exist_ok=True)
    figure, (axis,) = new_figure(1, 1, (8, 4))
    for place, (metric, label) in enumerate((("validation", "validation"), ("accuracy", "test"))):
        for number, arm in enumerate(arms):
            values = [100 * value for value in figures.get(f"{arm}/{metric}", {}).values()]
            axis.plot([number + 0.2 * place - 0.1] * len(values), values, "os"[place], color=f"C{place}", ms=4,
                      alpha=0.8, label=None if number else label)  # fmt: skip
    axis.set_xticks(range(len(arms)), [arm.replace("_", "\n") for arm in arms], fontsize=7)
    axis.set(ylabel="accuracy (%)", title="one ingredient more in each column; the teacher is a larger network")
    axis.legend(fontsize=7)
    save(figure, out / "ladder")


def published_networks(name: str, shown: Collection[str]) -> dict[str, tuple[float, list[float]]]:
    """Parameters and accuracies (%) by seed of what other studies of this data set have published, by its name here.

    `shown` are the methods that need not be shown twice.
    """
    studies = ((f"budget_{name}", ("distillation",)), (name, (OURS,)), (f"{name}_peers", None))
    found: dict[str, tuple[float, list[float]]] = {}
    for study, wanted in studies:
        path = REPOSITORY / "results" / "lightcnn" / study / "results.csv"
        figures = figures_of(read_rows(path), "final") if path.exists() else {}
        methods = [key.partition("/")[0] for key in figures if key.endswith("/accuracy")]
        for method in (m for m in methods if m not in shown and (wanted is None or m in wanted)):
            label = "our budget track" if method == "distillation" else method
            found[label] = size_and_accuracies(figures, method)
    return found


def size_and_accuracies(figures: Figures, method: str) -> tuple[float, list[float]]:
    """A method's parameters, and its accuracies in % by seed."""
    size = next(iter(figures[f"{method}/parameters"].values()))
    return size, [100 * value for value in figures[f"{method}/accuracy"].values()]


def training_curves(folder: Path, out: Path) -> None:
    """Train and validation accuracy by epoch, one line a seed (of its first fold), each phase shaded and named.

    Train accuracy is on the images as they are trained on: augmented for branch b, with dropout in stage 2.
    """
    figure, (axis,) = new_figure(1, 1, (9, 4.5))
    rows, results = read_metrics(folder, "epoch"), read_results(folder)
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    first, labelled = 0, set[str]()
    for number, phase in enumerate(phases):
        own = [row for row in rows if row["phase"] == phase]
        epochs = np.arange(first + 1, first + len(own) + 1)
        members = len(own[0]["lanes"][0]["train"])
        for member in range(members):
            name = f"branch {'ab'[member]}" if members > 1 else "merged"
            for kind, style in (("train", "--"), ("validation", "-")):
                of = {"branch b": ", augmented", "merged": ", with dropout"}.get(name, "") if kind == "train" else ""
                label = f"{name}, {kind}{of}"
                for seed in results["seeds"]:
                    lanes = [[x for x in row["lanes"] if x["seed"] == seed and not x["fold"]] for row in own]
                    values = [100 * found[0][kind][member] if found else np.nan for found in lanes]
                    axis.plot(epochs, values, style, color=f"C{member}" if members > 1 else "C2", lw=0.8, alpha=0.8,
                              label=None if label in labelled else label,
                              marker="." if len(own) == 1 else None)  # fmt: skip
                    labelled.add(label)
        axis.axvspan(first + 0.5, first + len(own) + 0.5, color="0.92" if number % 2 else "0.98", zorder=0)
        label = f"{phase}\n" + "\n".join(own[0]["trains"])
        axis.text(first + len(own) / 2 + 0.5, 1.01, label, transform=axis.get_xaxis_transform(), ha="center",
                  va="bottom", fontsize=7)  # fmt: skip
        first += len(own)
    axis.set(xlabel=f"epoch ({results['config']}, {len(results['seeds'])} seeds)", ylabel="accuracy (%)")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, out / "training_curves")


def size_and_accuracy(figures: Figures, methods: Sequence[str], name: str, out: Path) -> None:
    """Test accuracy (mean and range over seeds) against parameters, with published figures of the same data set."""
    figure, (axis,) = new_figure(1, 1, (9, 5))

    def draw_point(size: float, values: Sequence[float], label: str, **style: Any) -> None:
        """A network's mean, with the range over its seeds."""
        mean = float(np.mean(values))
        spread = [[mean - min(values)], [max(values) - mean]]
        axis.errorbar([size], [mean], yerr=spread, label=label, **style)

    sizes = {method: size_and_accuracies(figures, method)[0] for method in methods}
    for number, method in enumerate(methods):
        size, values = size_and_accuracies(figures, method)
        equal = [other for other in methods if sizes[other] == size]
        beside = size * 1.02 ** (equal.index(method) - (len(equal) - 1) / 2)
        marker, marker_size = ("*", 11) if method == OURS else ("osD^v"[number // 10 % 5], 4)
        draw_point(beside, values, method, color=f"C{number % 10}", fmt=marker, ms=marker_size)
    for number, (label, (size, values)) in enumerate(published_networks(name, methods).items()):
        draw_point(size, values, label, color="black", fmt="P*<>hdp"[number % 7], ms=9 if number < 2 else 5)
    best = 0.0
    for size, accuracy, who in PUBLISHED.get(name, ()):
        axis.plot([size], [accuracy], "x", color="black")
        across, side = (-4, "right") if size > 50_000 else (4, "left")  # the legend is at the right
        place = (across, 2 if accuracy > best else -8)  # neighbours do not write over each other
        axis.annotate(who, (size, accuracy), fontsize=7, xytext=place, ha=side, textcoords="offset points")
        best = max(best, accuracy)
    axis.set(
        xscale="log",
        xlabel="parameters (networks of equal size side by side)",
        ylabel="test accuracy (%)",
        title=f"{name}: mean and range over seeds (crosses: published, mostly the best epoch on the test set)",
    )
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, out / "size_and_accuracy")


def augmented_images(folder: Path, out: Path, count: int = 8) -> None:
    """Training images, and what the second branch sees of them under either warp."""
    from lightcnn.problem import load_problem

    config = load(folder / "config.yaml", Config)
    problem = load_problem(config, torch.device("cpu"))
    lane, ranges = problem.lanes[0], paper_ranges(config)
    spaced = torch.linspace(0, len(lane.train) - 1, count).long()
    images = problem.images[lane.train[spaced]].float() / 255
    draws = draw(count, ranges, stream(config.seed, "picture"))
    rows = {"original": images, "sequential": augment(images, draws, ranges, "sequential"),
            "combined": augment(images, draws, ranges, "combined")}  # fmt: skip
    figure, axes = new_figure(len(rows), count, (1.2 * count, 1.3 * len(rows)))
    for number, (title, row) in enumerate(rows.items()):
        for column, image in enumerate(row):
            axis = axes[number * count + column]
            axis.imshow(image.permute(1, 2, 0).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
            if column == 0:
                axis.set_title(title, loc="left", fontsize=8)
    save(figure, out / "augmented_images")


def confusion_matrix(results: dict[str, Any], out: Path) -> None:
    """Test images by class and prediction, of the first seed's final network."""
    table, classes = np.array(results["details"]["confusion"]), results["data"]["classes"]
    figure, (axis,) = new_figure(1, 1, (6, 5.2))
    shares = table / np.maximum(table.sum(1, keepdims=True), 1)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row in range(len(table)):
        for column in range(len(table)):
            if table[row, column]:
                axis.text(column, row, str(table[row, column]), ha="center", va="center", fontsize=6,
                          color="white" if shares[row, column] > 0.5 else "black")  # fmt: skip
    axis.set_xticks(range(len(classes)), classes, rotation=40, ha="right")
    axis.set_yticks(range(len(classes)), classes)
    axis.set(xlabel="predicted", ylabel="class", title=f"test images, seed {results['seeds'][0]}")
    axis.grid(visible=False)
    figure.colorbar(image, ax=axis, label="share of the class", shrink=0.8)
    save(figure, out / "confusion_matrix")


def redraw(studies: Path) -> list[Path]:
    """Draw accuracy against size anew for each published study of a data set, from its rows; returns the folders."""
    use_style("lightcnn")
    drawn = []
    for name, study in ((name, studies / f"{name}{end}") for name in PUBLISHED for end in ("", "_peers")):
        if not (study / "results.csv").exists():
            continue
        rows = [row for row in read_rows(study / "results.csv") if row.method != "study"]
        methods = list(dict.fromkeys(row.method for row in rows))
        size_and_accuracy(figures_of(rows, "final"), methods, name, study / "plots")
        drawn.append(study)
    return drawn


def main() -> int:
    """Draw what is published anew."""
    for study in redraw(REPOSITORY / "results" / "lightcnn"):
        print(f"written: {shown(study / 'plots')}/size_and_accuracy.*")
    return 0


if __name__ == "__main__":
    sys.exit(main())
