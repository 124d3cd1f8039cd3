"""Studies of tiny runs."""

from collections.abc import Sequence
from pathlib import Path

from mdcs.reproduce import Study
from mdcs.study import MAIN, VIEWS


def study_of(path: Path, out: Path, arms: Sequence[str] = ("mdcs", "dl_both"), seeds: int = 2) -> Study:
    return Study(path, "main", {arm: (MAIN | VIEWS)[arm] for arm in arms}, seeds, True, out, True)


def nothing_drawn(folders: Sequence[tuple[str, Path]], out: Path) -> None:
    """Instead of the pictures, which take a second."""
    out.mkdir(parents=True, exist_ok=True)
