"""The pictures of a study: accuracy by class, groups by epoch, confident instances, reliability."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared.plots import new_figure, save, use_style
from shared.run import read_metrics, read_results

OURS = "mdcs"
SHOWN = ("ce", "balanced_softmax", "dl_both", OURS)  # the arms of the pictures that cannot hold them all
COLOURS = {"ensemble": "black", "expert1": "C0", "expert2": "C1", "expert3": "C2", "expert4": "C3"}
Runs = dict[str, list[Path]]  # arm -> run folders, one a seed
Values = np.ndarray[Any, np.dtype[np.float64]]


def draw(folders: Sequence[tuple[str, Path]], out: Path) -> None:
    """Write all pictures that the finished runs (arm, folder) allow, as PNG and SVG."""
    use_style("mdcs")
    runs: Runs = {}
    for arm, folder in folders:
        runs.setdefault(arm, []).append(folder)
    out.mkdir(parents=True, exist_ok=True)
    arms_by_third(runs, out)
    if OURS in runs:
        accuracy_by_class(runs[OURS], out)
        groups_by_epoch(runs[OURS], out)
        confident_by_epoch(runs[OURS], out)
    if chosen := {arm: runs[arm] for arm in SHOWN if arm in runs}:
        reliability(chosen, out)


def arms_by_third(runs: Runs, out: Path) -> None:
    """Ensemble accuracy of every arm: overall, and of the head, middle and tail third of the classes."""
    figure, (axis,) = new_figure(1, 1, (9, 0.32 * len(runs) + 1.2))
    names = ("accuracy", "head", "middle", "tail")
    place = np.arange(len(runs))[::-1]
    for name, colour, marker in zip(names, ("black", "C0", "C1", "C2"), "Dosv", strict=True):
        values = [100 * figures_of(folders, f"ensemble.{name}") for folders in runs.values()]
        axis.errorbar([v.mean() for v in values], place, xerr=[deviation(v) for v in values], fmt=marker, color=colour,
                      markersize=5, capsize=2, label=name if name == "accuracy" else f"{name} third")  # fmt: skip
    axis.set_yticks(place, list(runs))
    axis.set(xlabel="accuracy of the ensemble, last epoch (%, mean and deviation over seeds)")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save(figure, out / "arms")


def accuracy_by_class(folders: Sequence[Path], out: Path) -> None:
    """Accuracy of each expert against the classes' training images."""
    figure, (axis,) = new_figure(1, 1, (7, 4))
    results = [read_results(folder) for folder in folders]
    counts = np.array(results[0]["data"]["class_counts"])
    order = np.argsort(-counts, kind="stable")
    for who in members(results[0]):
        values = 100 * np.array([result["details"][f"{who}.per_class"] for result in results], dtype=float)[:, order]
        # hundreds of classes: a mean over neighbours in frequency
        width = max(1, len(counts) // 25)
        x = smoothed(counts[order].astype(float), width)
        mean, spread = smoothed(values.mean(0), width), smoothed(deviation(values), width)
        style: dict[str, Any] = {"linewidth": 2.4 if who == "ensemble" else 1.4, "color": COLOURS.get(who)}
        axis.plot(x, mean, "o-" if width == 1 else "-", markersize=3, label=who, **style)
        axis.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.12, linewidth=0)
    axis.set(xscale="log", xlabel="training images of the class", ylabel="accuracy (%)",
             title=f"accuracy by class, {len(folders)} seed{'s' if len(folders) > 1 else ''}")  # fmt: skip
    axis.invert_xaxis()
    axis.legend(fontsize=8)
    save(figure, out / "accuracy_by_class")


def groups_by_epoch(folders: Sequence[Path], out: Path) -> None:
    """Many, medium and few-shot accuracy of the ensemble as it is trained (thirds where a group is empty)."""
    figure, (axis,) = new_figure(1, 1, (7, 4))
    logged = [read_metrics(folder, "evaluate") for folder in folders]
    groups = read_results(folders[0])["data"]["groups"]
    shots = [name for name, group in groups.items() if group]
    names = shots if len(shots) == 3 else ["head", "middle", "tail"]
    epochs = [entry["epoch"] for entry in logged[0]]
    for name, colour in zip(("accuracy", *names), ("black", "C0", "C1", "C2"), strict=True):
        values = 100 * np.array([[entry["figures"][f"ensemble.{name}"] for entry in log] for log in logged])
        label = "all classes" if name == "accuracy" else f"{name}-shot" if names == shots else f"{name} third"
        axis.plot(epochs, values.mean(0), "o-", markersize=3, color=colour, label=label)
        axis.fill_between(epochs, values.mean(0) - deviation(values), values.mean(0) + deviation(values), color=colour,
                          alpha=0.12, linewidth=0)  # fmt: skip
    axis.set(xlabel="epoch", ylabel="accuracy of the ensemble (%)", ylim=(0, None))
    axis.legend(fontsize=8)
    save(figure, out / "groups_by_epoch")


def confident_by_epoch(folders: Sequence[Path], out: Path) -> None:
    """Share of training images whose weak view an expert gets right, by adjusted logits (the mask) and by raw ones."""
    figure, axes = new_figure(1, 2, (10, 3.6))
    logged = [[entry for entry in read_metrics(folder, "epoch") if "confident" in entry] for folder in folders]
    titles = {"confident": "adjusted logits (the mask)", "confident_raw": "raw logits"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        values = 100 * np.array([[entry[key] for entry in log] for log in logged])  # [seeds, epochs, E]
        epochs = [entry["epoch"] for entry in logged[0]]
        for expert in range(values.shape[2]):
            who, mean = f"expert{expert + 1}", values[:, :, expert].mean(0)
            spread = deviation(values[:, :, expert])
            axis.plot(epochs, mean, color=COLOURS.get(who), label=who)
            axis.fill_between(epochs, mean - spread, mean + spread, color=COLOURS.get(who), alpha=0.12, linewidth=0)
        axis.set(xlabel="epoch", ylabel="confident images (%)", title=title, ylim=(0, 101))
    axes[0].legend(fontsize=8)
    save(figure, out / "confident_by_epoch")


def reliability(runs: Runs, out: Path) -> None:
    """Accuracy against confidence of the ensemble, in 15 bins over all seeds; the diagonal is perfect calibration."""
    figure, axes = new_figure(1, len(runs), (2.9 * len(runs), 3.2))
    for axis, (arm, folders) in zip(axes, runs.items(), strict=True):
        table = np.array([read_results(folder)["details"]["ensemble.reliability"] for folder in folders])
        count = table[:, :, 0].sum(0)
        known = count > 0
        confidence, accuracy = ((table[:, :, k] * table[:, :, 0]).sum(0)[known] / count[known] for k in (1, 2))
        edges = np.arange(len(count)) / len(count)
        axis.bar(edges[known], accuracy, 1 / len(count), align="edge", color="C0", alpha=0.35, edgecolor="C0")
        axis.plot(confidence, accuracy, "o", markersize=3, color="black")
        axis.plot([0, 1], [0, 1], "--", color="grey", linewidth=1)
        error = 100 * figures_of(folders, "ensemble.ece").mean()
        axis.set(xlim=(0, 1), ylim=(0, 1), title=f"{arm}\ncalibration error {error:.1f} %", xlabel="confidence")
        axis.set_aspect("equal")
    axes[0].set_ylabel("accuracy")
    save(figure, out / "reliability")


def figures_of(folders: Sequence[Path], metric: str) -> Values:
    """A figure of the last epoch, one a run."""
    found = []
    for folder in folders:
        rows = read_results(folder)["figures"]
        found += [row["value"] for row in rows if (row["at"], row["metric"]) == ("last_epoch", metric)]
    return np.array(found, dtype=float)


def members(results: dict[str, Any]) -> list[str]:
    """The experts of a run, and their ensemble."""
    names = [name.partition(".")[0] for name in results["details"] if name.endswith(".per_class")]
    return [*(name for name in names if name != "ensemble"), "ensemble"]


def deviation(values: Values) -> Values:
    """Sample deviation over the first axis; zero for a single run."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def smoothed(values: Values, width: int) -> Values:
    """Moving mean."""
    return np.convolve(values, np.ones(width) / width, mode="valid")
