"""What a study leaves: rows in a CSV, tables in Markdown and on the terminal, and the tables of the READMEs.

`python -m shared.report` writes `results/papers.md` and the tables between the markers of every README, anew from
`results/`; with `--check` it only says whether they are up to date.
"""

import argparse
import csv
import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shared.checkpoint import atomic_write
from shared.claims import Comparison, Figures, Judgement, show_mean
from shared.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"<!-- begin (?P<source>[\w./-]+) -->\n.*?<!-- end (?P=source) -->", re.DOTALL)


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
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    atomic_write(path, text.getvalue().encode())


def read_rows(path: Path) -> list[Row]:
    """Read what `write_rows` wrote.

    Raises:
        DataError: the file is missing, or a line is not a row.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path}: is not CSV text: {error}") from None
    rows = []
    for number, line in enumerate(lines, 2):
        try:
            numbers: dict[str, Any] = {"seed": int(line["seed"])}
            numbers |= {name: float(line[name]) for name in ("value", "seconds")}
            if None in line.values():
                raise ValueError("it is cut short")
            rows.append(Row(**{**line, **numbers}))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}:{number}: is not a row of results: {error}") from None
    return rows


def figures_of(rows: Iterable[Row], at: str) -> Figures:
    """`method/metric` -> seed -> value, of the rows taken `at` that moment and of those that do not change (`once`)."""
    figures: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.at in (at, "once"):
            figures.setdefault(f"{row.method}/{row.metric}", {})[row.seed] = row.value
    return figures


def method_table(figures: Figures, methods: Sequence[str], columns: Mapping[str, str]) -> list[list[str]]:
    """Head and one row a method; `columns` maps a heading to a metric (shares, shown in per cent)."""
    rows = [["method", *columns, "n"]]
    for method in methods:
        found = [list(figures.get(f"{method}/{metric}", {}).values()) for metric in columns.values()]
        if any(found):
            cells = [show_mean(values) if values else "-" for values in found]
            rows.append([method, *cells, str(max(len(values) for values in found))])
    return rows


def claim_table(judgements: Sequence[Judgement]) -> list[list[str]]:
    """Head and one row a claim."""
    rows = [["claim", "paper", "ours: paired difference [95 %]", "n", "verdict"]]
    for item in judgements:
        unit = " points" if isinstance(item.claim, Comparison) and item.claim.percent and item.n else ""
        rows.append([item.claim.text, item.claim.paper, item.ours + unit, str(item.n or "-"), item.verdict])
    return rows


def summary_table(paper: str, judgements: Sequence[Judgement]) -> list[list[str]]:
    """Head and one row a headline claim, for the one table of all papers."""
    rows = [["paper", "claim", "ours, n seeds", "verdict"]]
    for item in judgements:
        if isinstance(item.claim, Comparison) and item.claim.headline:
            difference = item.ours + (" points" if item.claim.percent and item.n else "")
            rows.append([paper, item.claim.text, f"{difference}, n = {item.n}", item.verdict])
    return rows


def papers_table(results: Path) -> str:
    """All studies' `summary.md` under the folder as one table."""
    texts = [path.read_text(encoding="utf-8").splitlines() for path in sorted(results.glob("*/*/summary.md"))]
    return "\n".join([*texts[0][:2], *(line for text in texts for line in text[2:])]) + "\n" if texts else ""


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; the first row is the head."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in table]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"


def show(title: str, table: Sequence[Sequence[str]]) -> None:
    """Print a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title, title_justify="left", header_style="bold")
    for heading in table[0]:
        drawn.add_column(heading)
    for row in table[1:]:
        drawn.add_row(*(colour(cell) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(drawn)


def colour(cell: str) -> str:
    """A verdict in its colour; other text with rich's brackets escaped."""
    from rich.markup import escape

    colours = {"reproduced": "green", "not reproduced": "red", "inconclusive": "yellow"}
    return f"[{colours[cell]}]{cell}[/]" if cell in colours else escape(cell)


def fill(readme: str, root: Path = REPOSITORY) -> str:
    """Replace what stands between `<!-- begin FILE -->` and `<!-- end FILE -->` by the file.

    Raises:
        DataError: a file that is named is missing.
    """

    def replacement(match: re.Match[str]) -> str:
        source = match["source"]
        try:
            text = (root / source).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"{source}: cannot be read: {error.strerror}; a README shows it") from None
        return f"<!-- begin {source} -->\n{text.rstrip()}\n<!-- end {source} -->"

    return MARKER.sub(replacement, readme)


def main(arguments: Sequence[str]) -> int:
    """Write or check the generated tables of the READMEs."""
    parser = argparse.ArgumentParser(prog="python -m shared.report", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="only say which are stale; exit code 1 if any is")
    check = parser.parse_args(arguments).check
    stale = []
    papers = REPOSITORY / "results" / "papers.md"
    for path in [papers, REPOSITORY / "README.md", *sorted(REPOSITORY.glob("*/README.md"))]:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        wanted = papers_table(papers.parent) if path == papers else fill(text, REPOSITORY)
        if wanted != text:
            stale.append(str(path.relative_to(REPOSITORY)))
            if not check:
                atomic_write(path, wanted.encode())
    print("\n".join(f"{'stale' if check else 'written'}: {name}" for name in stale) or "up to date")
    return 1 if stale and check else 0


if __name__ == "__main__":
    from shared.cli import run_main

    sys.exit(run_main(main))
