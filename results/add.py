"""Add finished runs to the published figures: `python results/add.py RUN...`.

Writes the rows of each run to `results/<paper>/runs.csv`; where one cannot be added, none is. A study is published by
`python -m <paper>.reproduce ... --publish` instead; this is for a run that stands alone.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from check import KEY, duplicate_problems
from csv_schema import PAPERS, RESULTS, format_problems, read_lines
from run_commands import command_problem

from shared.cli import run_main
from shared.errors import DataError, RunError
from shared.report import Row, read_rows, rows_of, write_rows
from shared.run import read_mapping, read_results

RESULTS_FOLDER = Path(__file__).resolve().parent


def rows_of_run(folder: Path, name: str | None = None) -> list[Row]:
    """The rows of one finished run, its method under another name if one is given.

    Raises:
        RunError: it is not finished, was made by code that is in no commit, or is of no paper that is here.
    """
    results = read_results(folder)
    if results.get("paper") not in PAPERS:
        raise RunError(f"{folder}: is a run of {results.get('paper')!r}; the papers here are {', '.join(PAPERS)}")
    made = read_mapping(folder / "environment.json", "has no environment.json that says which commit made it")
    if made.get("dirty") is not False:
        raise RunError(f"{folder}: was made with changes that are in no commit; commit them and run it again")
    if results.get("commit") != made.get("commit"):
        raise RunError(f"{folder}: results.json and environment.json name two commits; run it again")
    try:
        rows = rows_of(results)
    except (KeyError, TypeError) as error:
        raise RunError(f"{folder}: results.json is damaged: {error}") from None
    if not rows:
        raise RunError(f"{folder}: results.json holds no figure")
    return [replace(row, method=name or row.method, command=without_folder(row.command)) for row in rows]


def without_folder(command: str) -> str:
    """A training command without its `--out`, which is of one machine and changes no figure; as it is if damaged."""
    try:
        words = shlex.split(command)
    except ValueError:  # an open quote; whoever checks the command tells of it
        return command
    kept = [word for word, before in zip(words, ["", *words], strict=False)
            if word != "--out" and before != "--out" and not word.startswith("--out=")]  # fmt: skip
    return " ".join([*kept[:3], shlex.join(kept[3:])])


def problems_of(rows: Sequence[Row]) -> list[str]:
    """What `results/check.py` would say of the rows, the kinds of value first."""
    lines = [{name: str(value) for name, value in asdict(row).items()} for row in rows]
    problems = [re.sub(r"^\d+: ", "", problem) for problem in format_problems("runs.csv", list(RESULTS), lines)]
    return problems or [found for line in lines if (found := command_problem(line))]


def published(paper: str) -> dict[tuple[str, ...], str]:
    """Where each figure of a paper stands already: its key, but for a study's own name of the method, and command.

    Raises:
        DataError: a published file is damaged.
    """
    found = {}
    for path in sorted([*(RESULTS_FOLDER / paper).glob("*/results.csv"), *(RESULTS_FOLDER / paper).glob("runs.csv")]):
        place, (columns, lines) = path.relative_to(RESULTS_FOLDER.parent).as_posix(), read_lines(path)
        if problems := format_problems(path.name, columns, lines):
            raise DataError(f"{place}: {problems[0]}; take it back from git, `python results/check.py` looks again")
        for line in lines:
            found[(*(line[name] for name in KEY if name != "method"), without_folder(line["command"]))] = place
    return found


def add(folders: Sequence[Path], name: str | None = None) -> dict[Path, list[Row]]:
    """What the files of single runs hold with these runs added; nothing is written.

    Raises:
        RunError: a run cannot be added, or its figures stand there already.
    """
    files: dict[Path, list[Row]] = {}
    known = {paper: published(paper) for paper in PAPERS}
    for folder in folders:
        rows = rows_of_run(folder, name)
        if problems := problems_of(rows):
            raise RunError(f"{folder}: {problems[0]}")
        path = RESULTS_FOLDER / rows[0].paper / "runs.csv"
        keys = [(*(str(getattr(row, column)) for column in KEY if column != "method"), row.command) for row in rows]
        if place := next((known[rows[0].paper][key] for key in keys if key in known[rows[0].paper]), None):
            raise RunError(f"{folder}: is in {place} already")
        known[rows[0].paper].update(dict.fromkeys(keys, path.relative_to(RESULTS_FOLDER.parent).as_posix()))
        files[path] = [*files.get(path, read_rows(path) if path.exists() else []), *rows]
        lines = [{column: str(value) for column, value in asdict(row).items()} for row in files[path]]
        if duplicate_problems(lines):
            one = f"{rows[0].config}, {rows[0].method}, seed {rows[0].seed}"
            raise RunError(f"{folder}: runs.csv has another run of {one}; --as NAME gives this one's method a name")
    return files


def main(arguments: Sequence[str]) -> int:
    """Add finished runs to results/<paper>/runs.csv: all, or none where one cannot be added."""
    example = "example: python results/add.py runs/lightcnn/smoke-two_stage-s0"
    parser = argparse.ArgumentParser(prog="python results/add.py", description=main.__doc__, epilog=example)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--as", dest="name", metavar="NAME", help="what to call the method, where settings differ")
    asked = parser.parse_args(arguments)
    files = add(asked.runs, asked.name)
    for path, rows in files.items():
        write_rows(path, rows)
        print(f"{path.relative_to(RESULTS_FOLDER.parent)}: {len(rows):,} rows; make report writes the page anew")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
