"""The pictures of a study: learning curves, clients, row lengths, the frame before and after its repair."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedloge.config import Config, FedLoGeConfig
from fedloge.method import sparse_etf
from shared.config import load
from shared.gpu import stream
from shared.plots import new_figure, save, use_style
from shared.run import read_metrics, read_results

OURS = "fedloge"
Runs = dict[str, list[Path]]  # method -> run folders, one a seed


def draw(folders: Sequence[Path], out: Path) -> None:
    """Write all pictures that the finished runs allow, as PNG and SVG."""
    use_style("fedloge")
    runs: Runs = {}
    for folder in folders:
        runs.setdefault(str(read_results(folder)["method"]), []).append(folder)
    out.mkdir(parents=True, exist_ok=True)
    learning_curves(runs, out)
    client_accuracies(runs, out)
    if OURS in runs:
        row_lengths(runs[OURS], out)
        frame_cosines(runs[OURS][0], out)


def learning_curves(runs: Runs, out: Path) -> None:
    """Generic and personal accuracy by round: mean over seeds, shaded by one deviation."""
    figure, axes = new_figure(1, 2, (11, 4))
    for axis, kind in zip(axes, ("generic", "personal"), strict=True):
        for number, (method, folders) in enumerate(runs.items()):
            curves = [curve(folder, f"{kind}.accuracy") for folder in folders]
            rounds = sorted(set.intersection(*(set(c) for c in curves)))
            values = 100 * np.array([[c[r] for r in rounds] for c in curves])
            style: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
            axis.plot(rounds, values.mean(0), label=method, linewidth=2.6 if method == OURS else 1.1,
                      zorder=3 if method == OURS else 2, **style)  # fmt: skip
            if len(folders) > 1:
                low, high = values.mean(0) - values.std(0, ddof=1), values.mean(0) + values.std(0, ddof=1)
                axis.fill_between(rounds, low, high, color=style["color"], alpha=0.1, linewidth=0)
        axis.set(xlabel="round", ylabel="accuracy (%)", title=f"{kind} model{'s' if kind == 'personal' else ''}")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, out / "learning_curves")


def curve(folder: Path, metric: str) -> dict[int, float]:
    """A figure by round, from the run's log."""
    return {row["round"]: row["figures"][metric] for row in read_metrics(folder, "evaluate")}


def client_accuracies(runs: Runs, out: Path) -> None:
    """How the personal models' accuracy spreads over clients (all seeds together), one box a method."""
    figure, (axis,) = new_figure(1, 1, (8, 4))
    values = {
        method: [100 * a for folder in folders for a in read_results(folder)["details"]["personal.clients"]]
        for method, folders in runs.items()
    }
    order = sorted(values, key=lambda method: -float(np.median(values[method])))
    axis.boxplot([values[method] for method in order], showmeans=True, medianprops={"color": "black"})
    axis.set_xticks(range(1, len(order) + 1), order, rotation=35, ha="right")
    axis.set(
        ylabel="accuracy on the client's own test set (%)",
        title="personal models: median, quartiles and mean (triangle) over clients",
    )
    save(figure, out / "client_accuracies")


def row_lengths(folders: Sequence[Path], out: Path) -> None:
    """The lengths of psi's and phi's rows against the classes' training images, each seed a line."""
    figure, axes = new_figure(1, 2, (9, 3.6))
    titles = {"psi": "psi, the shared head", "phi": "phi, the private heads (mean over clients)"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for folder in folders:
            results = read_results(folder)
            axis.plot(results["data"]["class_counts"], results["details"][f"{name}.lengths"], "o-", alpha=0.6,
                      label=f"seed {results['seed']}")  # fmt: skip
        axis.set(xscale="log", xlabel="training images of the class", ylabel="row length", title=title)
    axes[0].legend(fontsize=7)
    save(figure, out / "row_lengths")


def frame_cosines(folder: Path, out: Path) -> None:
    """Pairwise cosines of the frame's rows: with the zeros just set, and after the repair."""
    config = load(folder / "config.yaml", Config)
    assert isinstance(config.method, FedLoGeConfig)
    after = np.array(read_results(folder)["details"]["etf.cosines"])
    before = masked_cosines(config, folder)
    figure, axes = new_figure(1, 2, (9, 4))
    ideal = -1 / (len(after) - 1)
    for axis, values, title in zip(axes, (before, after), ("zeros set", "repaired"), strict=True):
        off = values[~np.eye(len(values), dtype=bool)]
        image = axis.imshow(values, cmap="RdBu_r", vmin=-0.5, vmax=0.5)
        axis.set(title=f"{title}\n{off.min():.3f} to {off.max():.3f}, ideal {ideal:.3f}", xlabel="class",
                 ylabel="class")  # fmt: skip
        axis.grid(visible=False)
    figure.colorbar(image, ax=axes, label="cosine", shrink=0.8)
    save(figure, out / "frame_cosines")


def masked_cosines(config: Config, folder: Path) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """The cosines of the run's frame before its repair: the same draws, no step."""
    import warnings

    method = config.method
    assert isinstance(method, FedLoGeConfig)
    width = json.loads((folder / "model" / "config.json").read_bytes())["feature_dim"]
    classes = len(read_results(folder)["data"]["class_counts"])
    seed = stream(config.seed, "init", "etf").initial_seed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the frame is broken is the point of the picture
        frame = sparse_etf(width, classes, method.sparsity, method.norm, seed, steps=0).double().numpy()
    unit = frame / np.linalg.norm(frame, axis=1, keepdims=True)
    return np.asarray(unit @ unit.T, dtype=np.float64)
