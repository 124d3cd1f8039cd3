"""Hold studies of one's own against the published ones: `python results/compare.py runs/mdcs/report-mini`.

With the same seeds, code and kind of machine, every figure comes out again to the last digit, but for measured speeds.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from check import KEY

from shared.cli import run_main
from shared.errors import DataError
from shared.report import Row, read_rows

RESULTS_FOLDER = Path(__file__).resolve().parent
TIMED = "speed."  # metrics that no two runs have in common
SHOWN = 10


def published_of(report: Path) -> Path:
    """The published study of which a report is another making, by the paper's folder and the report's name."""
    name = report.name.removeprefix("report-").removesuffix("-partial")
    return RESULTS_FOLDER / report.parent.name / name / "results.csv"


def by_key(rows: Iterable[Row]) -> dict[tuple[str, ...], float]:
    """Value of each figure, measured speeds left out."""
    return {tuple(str(getattr(row, name)) for name in KEY): row.value for row in rows if TIMED not in row.metric}


def compare(report: Path) -> tuple[int, list[str]]:
    """How many figures of a report are published, and a line for each of these that is another.

    Raises:
        DataError: there is no such report or no such study, or they have no figure in common.
    """
    report = report.resolve()
    own, published = by_key(read_rows(report / "results.csv")), by_key(read_rows(published_of(report)))
    if not (common := [key for key in own if key in published]):
        raise DataError(f"{report}: has no figure that is published in {published_of(report)}")
    lines = [f"{', '.join(key[2:])}: {own[key]} here, {published[key]} published"
             for key in common if own[key] != published[key]]  # fmt: skip
    return len(common), lines


def main(arguments: Sequence[str]) -> int:
    """Say of each report how many figures are the published ones; exit code 1 if any is not."""
    parser = argparse.ArgumentParser(prog="python results/compare.py", description=main.__doc__)
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="runs/<paper>/report-<configuration>")
    found = {report: compare(report) for report in parser.parse_args(arguments).reports}
    for report, (common, lines) in found.items():
        print(f"{report}: {common - len(lines):,} of {common:,} published figures are the same to the last digit")
        print("".join(f"  {line}\n" for line in lines[:SHOWN]), end="")
        if len(lines) > SHOWN:
            print(f"  and {len(lines) - SHOWN:,} more")
    return 1 if any(lines for _, lines in found.values()) else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
