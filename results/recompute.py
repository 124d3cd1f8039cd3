"""The published tables, computed again from the CSV beside them: what a table says must be what the rows give."""

import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from csv_schema import REPOSITORY, read_lines

from shared.claims import Claim, Figures, Judgement, judge
from shared.cli import find_config
from shared.config import load
from shared.report import Row, figures_of, markdown, method_table, summary_table

Table = list[list[str]]
CLASSES = {"sample": 10, "mnist": 10, "fashion_mnist": 10, "cifar10": 10, "cifar100": 100}
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
    """The rows of one published study, with the figures that its tables are made of."""

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        self.folder, self.rows = folder, rows
        self.paper, self.config = rows[0].paper, rows[0].config
        self.methods = [row[0] for row in table_of(folder / "methods.md")[1:]]
        self.figures = self._figures()

    def _figures(self) -> Figures:
        if self.paper == "mdcs":
            from mdcs.study import with_best

            return with_best(figures_of(self.rows, "last_epoch"), figures_of(self.rows, "best_on_test"))
        headline = next((row.at for row in self.rows if row.at.startswith("last")), "final")
        return figures_of(self.rows, headline if self.paper == "fedloge" else "final")

    def settings(self) -> Any:
        """The configuration of the study, of whichever paper."""
        config_class = importlib.import_module(f"{self.paper}.config").Config
        return load(find_config(self.config, self.paper), config_class)

    def claims(self) -> Sequence[Claim]:
        """What the paper's package asks of such a study."""
        config = self.settings()
        if self.paper == "fedloge":
            from fedloge.claims import all_claims
            from fedloge.model import build_backbone

            width = build_backbone(config.model.name, len(config.data.mean), config.data.image_size or 32, seed=0)
            classes = CLASSES.get(config.data.name) or NUMBER_OF_CLASSES[self.config]
            sparsity = getattr(config.method, "sparsity", 0.0)
            return all_claims(classes, width.feature_dim, sparsity, "fedbn" in self.methods)
        if self.paper == "mdcs":
            from mdcs.claims import ALL_CLAIMS

            return ALL_CLAIMS
        if self.paper == "lightcnn":
            from lightcnn import claims

            channels = 3 if config.data.name == "cifar10" else 1
            asked = claims.budget_claims if self.config.startswith("budget") else claims.all_claims
            return asked(config.data.name, channels)
        from sparsevit.claims import all_claims as all_of_sparsevit

        return all_of_sparsevit(self.config, sparsevit_tokens(config))

    def judgements(self) -> dict[tuple[str, str], Judgement]:
        """(claim, paper's number) -> what the rows say of it now."""
        return {(c.text, c.paper): judge(c, self.figures) for c in self.claims()}

    def tables(self) -> dict[str, Table]:
        """Of each file of the study that holds figures of methods: the table that the rows give."""
        if self.paper == "fedloge":
            from fedloge.reproduce import COLUMNS

            return {"methods.md": method_table(self.figures, self.methods, COLUMNS)}
        if self.paper == "mdcs":
            from mdcs.study import columns_of

            return {"methods.md": method_table(self.figures, self.methods, columns_of(self.methods, self.figures))}
        if self.paper == "lightcnn":
            from lightcnn.reproduce import methods_table
            from lightcnn.study import ingredients

            budget = self.config.startswith("budget")
            return {"methods.md": ingredients(self.figures) if budget else methods_table(self.figures, self.methods)}
        from sparsevit import study

        return {
            "methods.md": method_table(self.figures, self.methods, study.COLUMNS),
            "pruners.md": study.pruner_table(self.figures, self.settings()),
            "paired.md": study.paired_table(self.figures, self.methods),
        }


def sparsevit_tokens(config: Any) -> int:
    """N of the network that a configuration of SparseViT asks for."""
    from sparsevit.model import arch_size
    from sparsevit.problem import FILE_IMAGE_SIZE

    native = {"cifar10": 32, "cifar100": 32, "imagenet100": FILE_IMAGE_SIZE}
    image = config.data.image_size or native.get(config.data.name, 28)
    return arch_size(config.model.arch, image, 3, 10).tokens


def table_problems(folder: Path, rows: Sequence[Row]) -> list[str]:
    """What a study's tables say that its rows do not, as `file: problem`; a folder without tables has none."""
    study = Study(folder, rows)
    problems = []
    for name, wanted in study.tables().items():
        path = folder / name
        if path.exists() and (found := table_of(path)) != [[cell.strip() for cell in row] for row in wanted]:
            problems.append(f"{name}: {first_difference(found, wanted)}")
    claims = table_of(folder / "claims.md")
    if claims:
        problems += claim_problems(study, claims)
    return problems


def claim_problems(study: Study, claims: Table) -> list[str]:
    """As `table_problems`, of `claims.md` and `summary.md`."""
    head, *lines = claims
    again, problems, judged = study.judgements(), list[str](), list[Judgement]()
    for line in lines:
        cells = dict(zip(head, line, strict=True))
        judgement = again.get((cells["claim"], cells["paper"]))
        if judgement is None:
            problems.append(f"claims.md: {cells['claim']!r} is no claim of {study.paper}/claims.py")
            continue
        judged.append(judgement)
        found = [cells[name] for name in head[-3:]]
        if found != (wanted := [judgement.ours, str(judgement.n or "-"), judgement.verdict]):
            problems.append(
                f"claims.md: {cells['claim']!r} says {' | '.join(found)}; the rows give {' | '.join(wanted)}"
            )
    path = study.folder / "summary.md"
    summary = table_of(path)
    label = summary[1][0] if len(summary) > 1 else ""
    wanted_text = markdown(summary_table(label, judged))
    headlines = any(j.claim.headline for j in judged)
    if not problems and headlines and (not path.exists() or path.read_text(encoding="utf-8") != wanted_text):
        problems.append(f"summary.md: is not {', '.join(head[-3:])} of the headline claims of claims.md")
    return problems


def first_difference(found: Table, wanted: Table) -> str:
    """Where two tables part, in a line."""
    for old, new in zip(found, wanted, strict=False):
        for column, (a, b) in enumerate(zip(old, new, strict=False)):
            if a != b:
                return f"{old[0]}, {found[0][column]}: says {a}; the rows give {b}"
        if len(old) != len(new):
            return f"{old[0]}: has {len(old)} cells; the rows give {len(new)}"
    return f"has {len(found)} lines; the rows give {len(wanted)}"


def benchmark_problems(path: Path) -> list[str]:
    """What `benchmarks.md` says that the CSV beside it does not."""
    _, lines = read_lines(path)
    numbers = ("ours", "reference", "ratio", "ratio_q1", "ratio_q3")
    rows: list[Mapping[str, Any]] = [
        {key: float(value) if key in numbers else value for key, value in line.items() if value} for line in lines
    ]
    return _text_problems(path, _benchmark("bench_report").ratios(rows))


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
