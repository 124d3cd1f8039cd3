"""Check what is published: `python results/check.py` reads every CSV below `results/` and makes its texts again.

One line a problem, exit code 1 if there is any. `results/README.md` documents what a CSV holds.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import recompute
from csv_schema import RESULTS, SCHEMAS, format_problems, read_lines
from run_commands import command_problem

from shared.cli import run_main
from shared.errors import DataError, UserError
from shared.publish import LEAST_SEEDS
from shared.report import read_rows

RESULTS_FOLDER = Path(__file__).resolve().parent
KEY = ("paper", "config", "method", "seed", "at", "split", "metric")
FEWER_SEEDS = "fewer seeds"  # a report that says so in methods.md may have arms with the first seeds only,
BUDGET = "budget_"  # and so may the studies of LightCNN's budget, whose last rung has more of them by design
TEACHER = "teacher"  # of that study
Lines = Sequence[Mapping[str, str]]
TEXTS = {  # what checks the text that is made of a CSV
    "benchmarks.csv": recompute.benchmark_problems, "latency.csv": recompute.latency_problems,
    "timings.csv": recompute.timings_problems, "choice.csv": recompute.choice_problems,
}  # fmt: skip


def duplicate_problems(lines: Lines) -> list[str]:
    """Figures that stand there twice, and runs of two methods that have one command."""
    counts = Counter(tuple(line[name] for name in KEY) for line in lines)
    problems = [f"{', '.join(key)}: stands there {n} times" for key, n in counts.items() if n > 1]
    owners: dict[str, set[str]] = {}
    for line in lines:
        if float(line["seconds"]) > 0:
            owners.setdefault(line["command"], set()).add(line["method"])
    problems += [f"{' and '.join(sorted(m))}: have one command, {c}" for c, m in owners.items() if len(m) > 1]
    return problems


def seed_problems(lines: Lines, fewer: bool = False) -> list[str]:
    """Methods that lack a seed of the study's, or figures of a run that lack one of their method's.

    Rows of no run (seconds 0) are calculated over seeds and need not have one each. With `fewer`, a method may have
    the first seeds only.
    """
    seeds: dict[str, set[int]] = {}
    figures: dict[tuple[str, str, str, str], set[int]] = {}
    for line in lines:
        if float(line["seconds"]) > 0:
            seeds.setdefault(line["method"], set()).add(int(line["seed"]))
            key = (line["method"], line["at"], line["split"], line["metric"])
            figures.setdefault(key, set()).add(int(line["seed"]))
    every, problems = set().union(*seeds.values()), []
    for method, own in seeds.items():
        missing = every - own
        if missing and not (fewer and max(own) < min(missing)):
            problems.append(f"{method}: lacks seed {', '.join(map(str, sorted(missing)))}")
    for (method, at, _, metric), found in figures.items():
        if missing := seeds[method] - found:
            problems.append(f"{method}, {at}, {metric}: lacks seed {', '.join(map(str, sorted(missing)))}")
    return problems


def number_problems(lines: Lines) -> list[str]:
    """Methods of a study with fewer seeds than a published figure has, or with a gap in them; a teacher has one run."""
    seeds: dict[str, set[int]] = {}
    for line in lines:
        if float(line["seconds"]) > 0 and line["method"] != TEACHER:
            seeds.setdefault(line["method"], set()).add(int(line["seed"]))
    problems = list[str]()
    for method, own in seeds.items():
        if len(own) < LEAST_SEEDS:
            problems.append(f"{method}: has {len(own)} of at least {LEAST_SEEDS} seeds")
        if gap := set(range(min(own), max(own))) - own:
            problems.append(f"{method}: lacks seed {', '.join(map(str, sorted(gap)))} between its others")
    return problems


def row_problems(path: Path, lines: Lines) -> list[str]:
    """What is wrong with the rows of a study or of single runs whose values have the right kinds."""
    problems = list[str]()
    seen: set[tuple[str, ...]] = set()
    paper = path.parent.name if path.name == "runs.csv" else path.parent.parent.name
    for number, line in enumerate(lines, 2):
        if line["paper"] != paper:
            problems.append(f"{number}: paper: {line['paper']} in the folder of {paper}")
        own = (line["command"], line["paper"], line["config"], line["method"], line["seed"])
        if own not in seen and (problem := command_problem(line)):
            problems.append(f"{number}: {problem}")
        seen.add(own)
    problems += duplicate_problems(lines)
    if path.name == "results.csv":
        if len({line["config"] for line in lines}) > 1:
            problems.append("holds several configurations; a study has one")
        methods = path.parent / "methods.md"
        said = methods.read_text(encoding="utf-8") if methods.exists() else ""
        problems += number_problems(lines) if methods.exists() else []  # else it is one run alone
        problems += seed_problems(lines, FEWER_SEEDS in said or lines[0]["config"].startswith(BUDGET))
    return problems


def file_problems(path: Path) -> list[str]:
    """All that is wrong with one CSV and the tables beside it, without the file's name."""
    columns, lines = read_lines(path)
    problems = format_problems(path.name, columns, lines)
    if problems:
        return problems
    if path.name in TEXTS:
        return TEXTS[path.name](path)
    if SCHEMAS[path.name] is not RESULTS:
        return []
    problems = row_problems(path, lines)
    if not problems and path.name == "results.csv":
        problems = recompute.table_problems(path.parent, read_rows(path))
    return problems


def orphans(folder: Path) -> list[Path]:
    """Published tables without a CSV that they could be made from."""
    beside = [path for path in folder.glob("*/*.md") if not path.with_suffix(".csv").exists()]
    studies = [path for path in folder.glob("*/*/*.md") if not any(path.parent.glob("*.csv"))]
    return sorted(beside + studies)


def check(folder: Path) -> tuple[list[str], int, int]:
    """Problems as `file: problem`, and how many files and lines were read.

    Raises:
        DataError: there is no CSV to check.
    """
    paths = sorted(folder.rglob("*.csv"))
    if not paths:
        raise DataError(f"{folder.name}: holds no CSV")
    problems, count = list[str](), 0
    for path in paths:
        name = path.relative_to(folder.parent).as_posix()
        try:
            problems += [f"{name}:{problem}" if problem[0].isdigit() else f"{name}: {problem}"
                         for problem in file_problems(path)]  # fmt: skip
            count += len(read_lines(path)[1])
        except UserError as error:
            problems.append(f"{name}: {error}")
    problems += [f"{path.relative_to(folder.parent).as_posix()}: has no CSV beside it" for path in orphans(folder)]
    return problems, len(paths), count


def main(arguments: Sequence[str]) -> int:
    """Check every published CSV and the tables made from it; exit code 1 if anything is wrong."""
    argparse.ArgumentParser(prog="python results/check.py", description=main.__doc__).parse_args(arguments)
    problems, files, lines = check(RESULTS_FOLDER)
    print("\n".join(problems) or f"{files} files with {lines:,} rows: nothing is wrong")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
