"""What a study leaves: rows in a CSV, and tables in Markdown and on the terminal."""

import csv
import io
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shared.checkpoint import atomic_write
from shared.claims import Figures, Judgement, show_mean
from shared.errors import DataError


@dataclass(frozen=True)
class Row:
    """One figure of one run; `at` says which round or epoch (or mean over which) it is from."""

    paper: str
    config: str
    method: str
    seed: int
    at: str
    split: str
    metric: str
    value: float
    device: str
    precision: str
    commit: str
    seconds: float
    command: str


def rows_of(results: Mapping[str, Any]) -> list[Row]:
    """The rows of one run's `results.json` (its key `figures`: a list of {at, split, metric, value})."""
    common: dict[str, Any] = {f.name: results[f.name] for f in fields(Row) if f.name in results}
    return [Row(**common, **figure) for figure in results["figures"] if figure["value"] is not None]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the CSV, one figure a line."""
    write_csv(path, [f.name for f in fields(Row)], (asdict(row) for row in rows))


def write_csv(path: Path, columns: Sequence[str], lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV with a head; what is None stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    atomic_write(path, text.getvalue().encode())


def read_rows(path: Path) -> list[Row]:
    """Read what `write_rows` wrote; DataError if the file is missing or a line is not a row."""
    rows, number = list[Row](), 1
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for number, line in enumerate(csv.DictReader(file), 2):  # noqa: B007 (named in the error)
                if None in line or None in line.values():
                    raise ValueError("it has too few or too many values")
                values: dict[str, Any] = {**line, "seed": int(line["seed"])}
                rows.append(Row(**values | {name: float(line[name]) for name in ("value", "seconds")}))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f"{path}:{number}: is not a row of results: {error}") from None
    return rows


def figures_of(rows: Iterable[Row], at: str) -> Figures:
    """`method/metric` -> seed -> value, of the rows taken `at` that moment and of those that do not change (`once`)."""
    figures: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.at in (at, "once"):
            figures.setdefault(f"{row.method}/{row.metric}", {})[row.seed] = row.value
    return figures


def commits_of(rows: Iterable[Row]) -> str:
    """Every commit that made a row, in their order: `commit 0123456789`, or `commits 0123456789, abcdef0123`."""
    found = list(dict.fromkeys(row.commit[:10] for row in rows))
    return f"commit{'s' if len(found) > 1 else ''} {', '.join(found)}"


def method_table(
    figures: Figures, methods: Sequence[str], columns: Mapping[str, str], digits: int = 1
) -> list[list[str]]:
    """Head and one row a method; `columns` maps a heading to a metric (shares, shown in per cent)."""
    rows = [["method", *columns, "n"]]
    for method in methods:
        found = [list(figures.get(f"{method}/{metric}", {}).values()) for metric in columns.values()]
        if any(found):
            cells = [show_mean(values, digits=digits) if values else "-" for values in found]
            rows.append([method, *cells, str(max(len(values) for values in found))])
    return rows


def claim_table(judgements: Sequence[Judgement], sources: bool = False) -> list[list[str]]:
    """Head and one row a claim; with `sources`, where each is from, for which a terminal is too narrow."""
    rows = [["claim", "source", "paper", "ours: paired difference [95 %]", "n", "verdict"]]
    rows += [[j.claim.text, j.claim.source, j.claim.paper, j.ours, str(j.n or "-"), j.verdict] for j in judgements]
    return rows if sources else [[row[0], *row[2:]] for row in rows]


def summary_table(paper: str, judgements: Sequence[Judgement]) -> list[list[str]]:
    """Head and one row a headline claim, for the one table of all papers."""
    head = ["paper", "claim", "paper's number", "ours", "n", "verdict"]
    told = [j for j in judgements if j.claim.headline]
    return [head, *([paper, j.claim.text, j.claim.paper, j.ours, str(j.n or "-"), j.verdict] for j in told)]


@dataclass(frozen=True)
class Report:
    """What a study says of its rows, by the rows alone, so that what is published can be made again from them.

    name: paper and configuration, as the table of all papers has them.
    about: the sentences above the table of methods.
    """

    name: str
    about: str
    table: list[list[str]]
    judgements: list[Judgement]

    def texts(self) -> dict[str, str]:
        """File -> text: `methods.md`, and with claims `claims.md` and `summary.md`."""
        found = {"methods.md": f"{self.about}\n\n{markdown(self.table)}"}
        if self.judgements:
            found["claims.md"] = markdown(claim_table(self.judgements, sources=True))
            found["summary.md"] = markdown(summary_table(self.name, self.judgements))
        return found


def write_report(folder: Path, rows: Iterable[Row], texts: Mapping[str, str]) -> None:
    """What every study leaves: `results.csv`, and the texts (file -> text) that are made from it."""
    write_rows(folder / "results.csv", rows)
    for name, text in texts.items():
        atomic_write(folder / name, text.encode())


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is the head."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in table]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *body])


def show(title: str, table: Sequence[Sequence[str]]) -> None:
    """Print a table on the terminal, verdicts in their colours."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"reproduced": "green", "not reproduced": "red", "inconclusive": "yellow"}
    drawn = Table(*table[0], title=title, title_justify="left", header_style="bold")
    for row in table[1:]:
        drawn.add_row(*(Text(cell, style=colours.get(cell, "")) for cell in row))
    Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160).print(drawn)
