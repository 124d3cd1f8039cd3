"""The published texts, made again from the CSV beside them: what a study's files say must be what its rows give."""

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from csv_schema import REPOSITORY, format_problems, read_lines
from run_commands import command_problem

from shared.cli import find_config
from shared.config import load
from shared.errors import DataError
from shared.report import Row

if TYPE_CHECKING:
    from sparsevit.latency import Timing

WHOLE = "study"  # the method of the rows that are of the study as a whole
Table = list[list[str]]
CLASSES = {"sample": 10, "mnist": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100}
TEST_IMAGES = {"sample": 5000, "imagenet100": 5000} | dict.fromkeys(
    ("mnist", "fashion_mnist", "cifar10", "cifar100"), 10_000
)
SIDES = {"sample": 28, "mnist": 28, "fashion_mnist": 28, "cifar10": 32, "cifar100": 32, "imagenet100": 224}
CHANNELS = dict.fromkeys(("sample", "mnist", "fashion_mnist"), 1)  # of the others 3
NUMBER_OF_CLASSES = {"imagenet_lt": 1000, "inaturalist": 8142}  # of FedLoGe's data sets that are lists


def read_tables(text: str) -> list[Table]:
    """All tables of a Markdown text, each with its head first."""
    tables: list[Table] = []
    before = ""
    for line in text.splitlines():
        if line.startswith("| "):
            if not before.startswith("| "):
                tables.append([])
            if not re.fullmatch(r"\|(?: -+ \|)+", line):
                cells = re.split(r"(?<!\\)\|", line.strip()[1:-1])
                tables[-1].append([cell.strip().replace("\\|", "|") for cell in cells])
        before = line
    return tables


def table_of(path: Path) -> Table:
    """The first table of a file; empty where there is none."""
    found = read_tables(path.read_text(encoding="utf-8")) if path.exists() else []
    return found[0] if found else []


class Study:
    """One published study: its rows, and from them alone what each of its files must say; DataError without rows."""

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        if not rows:
            raise DataError(f"{folder}/results.csv: has no rows; take it back from git")
        self.folder, self.rows = folder, rows
        self.paper, self.config = rows[0].paper, rows[0].config
        self.methods = list(dict.fromkeys(row.method for row in rows if row.method != WHOLE))  # as they were run
        self.path = find_config(self.config, self.paper)
        self.settings: Any = load(self.path, importlib.import_module(f"{self.paper}.config").Config)

    @property
    def single(self) -> bool:
        """Whether it is no study but one run, which has no tables."""
        return len({row.method for row in self.rows}) == 1

    def texts(self) -> dict[str, str]:
        """File -> text, as the paper's package writes its report.

        Raises:
            DataError: the rows are those of no study of the package.
        """
        if self.paper == "fedloge":
            from fedloge.reproduce import plan_of, report_of

            classes = CLASSES.get(self.settings.data.name) or NUMBER_OF_CLASSES[self.config]
            statistics = plan_of(self.config).statistics
            return report_of(self.path, self.methods, self.rows, classes, statistics, self._command()).texts()
        if self.paper == "mdcs":
            return self._texts_of_mdcs()
        if self.paper == "lightcnn":
            return self._texts_of_lightcnn()
        from sparsevit.reproduce import plan_of as plan_of_sparsevit
        from sparsevit.study import report_of as report_of_sparsevit

        plan, timings = plan_of_sparsevit(self.config), read_timings(self.folder / "timings.csv")
        said = self._data(), timings, plan.statistics, self._command()
        return report_of_sparsevit(self.path, self.methods, self.rows, *said).texts()

    def _texts_of_mdcs(self) -> dict[str, str]:
        from mdcs import reproduce
        from mdcs.study import STUDIES

        name = self.folder.name.removeprefix(self.config).removeprefix("_") or "main"
        if name not in STUDIES:
            raise DataError(f"is in the folder of a study {name!r}; mdcs has {', '.join(STUDIES)}")
        plan = reproduce.plan_of(self.config)
        arms = {method: STUDIES[name].get(method, ()) for method in self.methods}
        asked = plan.seeds, plan.statistics, Path("runs"), False, bool(plan.arms)
        study = reproduce.Study(self.path, name, arms, *asked)
        return reproduce.report_of(study, self.rows, self._command()).texts()

    def _texts_of_lightcnn(self) -> dict[str, str]:
        from lightcnn import reproduce, study

        if self.config.startswith("budget"):
            return study.report_of(self.path, self.rows, self._data(), self._command()).texts()
        statistics = self.config not in reproduce.WITHOUT_STATISTICS
        found = reproduce.report_of(self.path, self.methods, self.rows, self._data(), statistics, self._command())
        return found.texts()

    def _data(self) -> dict[str, Any]:
        """Of a run's `results.json` what the tables are told with: numbers of images, their size."""
        data = self.settings.data
        side = getattr(data, "image_size", None) or SIDES[data.name]
        found = {"test_images": TEST_IMAGES[data.name], "image": side, "channels": CHANNELS.get(data.name, 3)}
        if self.paper == "sparsevit":
            return found | {"test_images": data.test_images or found["test_images"]}
        classes = CLASSES[data.name]
        of_test = found["test_images"] if data.test_images is None else -(-data.test_images // classes) * classes
        held_out = data.val_images if data.val_from == "first" else data.val_images // classes * classes
        image = [found["channels"], side, side]
        return {"test_images": of_test, "val_images": held_out, "image": image}

    def _command(self) -> str:
        """The command of the study: of the rows that are of the study as a whole, else what `methods.md` says.

        Raises:
            DataError: neither has it.
        """
        if own := next((row.command for row in self.rows if row.method == WHOLE), None):
            return own
        text = text_of(self.folder / "methods.md")
        if text is None:
            raise DataError("methods.md: is missing")
        said = re.search(r"`(python -m \w+\.reproduce [^`\n]*)`", text)
        line = {"command": said[1] if said else "", "paper": self.paper, "config": self.config, "seed": "0"}
        if not said or "--study" not in said[1] or command_problem(line):
            raise DataError("methods.md: names no command of this study")
        return said[1]


def text_of(path: Path) -> str | None:
    """The text of a published file, None where there is none."""
    return path.read_text(encoding="utf-8") if path.exists() else None


def read_timings(path: Path) -> "list[Timing]":
    """The latencies beside a study; none where there are none.

    Raises:
        DataError: they are not of their kind.
    """
    from sparsevit.latency import timings_of

    if not path.exists():
        return []
    columns, lines = read_lines(path)
    if format_problems(path.name, columns, lines):
        raise DataError(f"{path.name}: is damaged, and its texts cannot be made from it")
    return timings_of(lines)


def table_problems(folder: Path, rows: Sequence[Row]) -> list[str]:
    """What a study's files say that its rows do not, as `file: problem`; one run alone needs no files."""
    study = Study(folder, rows)
    return folder_problems(folder, {} if study.single else study.texts())


def folder_problems(folder: Path, wanted: Mapping[str, str]) -> list[str]:
    """How the texts in a folder differ from those that it should hold (file -> text), as `file: problem`."""
    differences = {name: difference(text_of(folder / name), text) for name, text in wanted.items()}
    problems = [f"{name}: {what}" for name, what in differences.items() if what]
    strangers = sorted({path.name for path in folder.glob("*.md")} - set(wanted))
    return [*problems, *(f"{name}: is no file of this report" for name in strangers)]


def difference(found: str | None, wanted: str) -> str | None:
    """Where a published text parts from what the rows give, in a line; None where it does not."""
    if found == wanted:
        return None
    if found is None:
        return "is missing"
    for old, new in zip(read_tables(found), read_tables(wanted), strict=False):
        if old != new:
            return first_difference(old, new)
    pairs = zip_longest(found.splitlines(), wanted.splitlines(), fillvalue="")
    old_line, new_line = next(((a, b) for a, b in pairs if a != b), ("other ends of lines", "its own"))
    same = next((i for i, (a, b) in enumerate(zip(old_line, new_line, strict=False)) if a != b), len(new_line))
    start = max(0, same - 30)
    return f"says {old_line[start:][:80]!r}; the rows give {new_line[start:][:80]!r}"


def first_difference(found: Table, wanted: Table) -> str:
    """Where two tables part, in a line; a line is known by its first cell, or two where that is the paper's name."""
    names = [[" ".join(row[:2] if wanted[0][0] == "paper" else row[:1]) for row in table] for table in (found, wanted)]
    missing = next((name for name in names[1] if name not in names[0]), None)
    stranger = next((name for name in names[0] if name not in names[1]), None)
    if missing:
        return f"lacks {missing!r}" + (f" but has {stranger!r}" if stranger else "")
    if stranger:
        return f"has {stranger!r}, which the rows do not give"
    for name, old, new in zip(names[0], found, wanted, strict=False):
        for column, (a, b) in enumerate(zip(old, new, strict=False)):
            if a != b:
                return f"{name}, {found[0][column]}: says {a}; the rows give {b}"
        if len(old) != len(new):
            return f"{name}: has {len(old)} cells; the rows give {len(new)}"
    return f"has {len(found)} lines; the rows give {len(wanted)}"


def benchmark_problems(path: Path) -> list[str]:
    """What `benchmarks.md` says that the CSV beside it does not."""
    _, lines = read_lines(path)
    numbers = ("ours", "reference", "ratio", "ratio_q1", "ratio_q3")
    rows: list[Mapping[str, Any]] = [
        {key: float(value) if key in numbers else value for key, value in line.items() if value} for line in lines
    ]
    return _text_problems(path, _benchmark("bench_report").ratios(rows))


def timings_problems(path: Path) -> list[str]:
    """What `latency.md` says that SparseViT's `timings.csv` does not; beside a study it is one of the study's texts."""
    from sparsevit.latency import text_of as text_of_timings

    if path.with_name("results.csv").exists():
        return []
    return folder_problems(path.parent, {"latency.md": text_of_timings(read_lines(path)[1])})


def choice_problems(path: Path) -> list[str]:
    """What `choice.md` says that the CSV beside it does not."""
    from sparsevit.choose import read_line
    from sparsevit.choose import text_of as text_of_choice

    return folder_problems(path.parent, {"choice.md": text_of_choice([read_line(x) for x in read_lines(path)[1]])})


def latency_problems(path: Path) -> list[str]:
    """What `latency.md` says that the CSV beside it does not."""
    _benchmark("bench_report")  # which the other imports by its name
    return _text_problems(path, _benchmark("lightcnn_latency").text_of(read_lines(path)[1]))


def _text_problems(path: Path, wanted: str) -> list[str]:
    found = path.with_suffix(".md")
    if found.exists() and found.read_text(encoding="utf-8") == wanted:
        return []
    return [f"{found.name}: is not what the CSV gives"]


def _benchmark(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(name, REPOSITORY / "benchmarks" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(name, module)
    specification.loader.exec_module(module)
    return module
