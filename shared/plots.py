"""What the pictures of all studies have in common: style, figures, files that come out the same each time."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def use_style(salt: str) -> None:
    """Draw without a screen, in the house's style; `salt` makes an SVG's identifiers the same each time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({
        "svg.hashsalt": salt, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9,
        "axes.grid": True, "grid.alpha": 0.25, "figure.constrained_layout.use": True,
    })  # fmt: skip


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> "tuple[Figure, list[Axes]]":
    """A figure of so many inches and its axes as a flat list."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    return figure, list(axes.flat)


def save(figure: "Figure", path: Path) -> None:
    """Write PNG and SVG, the same bytes for the same picture."""
    from matplotlib import pyplot

    figure.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)
