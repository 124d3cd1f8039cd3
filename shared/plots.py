"""What the pictures of all studies have in common: style, figures, files that come out the same each time."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from shared.checkpoint import atomic_write

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

    for kind, dpi, key in (("png", 110, "Software"), ("svg", "figure", "Date")):
        figure.savefig(content := io.BytesIO(), format=kind, dpi=dpi, metadata={key: None})
        atomic_write(path.with_suffix(f".{kind}"), content.getvalue())
    pyplot.close(figure)
