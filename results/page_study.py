"""One published study, or the single runs or the benchmarks of a paper, on the report's page."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import page_parts as parts
import page_plots
from csv_schema import format_problems, read_lines
from recompute import read_tables, table_of

from shared.errors import DataError

LINES = Sequence[Mapping[str, str]]
# What a study's files of Markdown hold, in the order of the page; of others the name is the title.
FILES = {
    "verdict": "Verdict", "cautions": "Cautions", "claims": "Claims", "methods": "Methods",
    "paired": "Paired differences", "pruners": "Pruners", "latency": "Latency", "choice": "Choice of coefficients",
}  # fmt: skip
LEFT_OUT = ("summary", "report")  # shown elsewhere, or all of the others once more


class StudyPart:
    """What one CSV and the files beside it are on the page."""

    def __init__(self, path: Path, paper: str, titles: Mapping[str, str]) -> None:
        self.path, self.folder, self.titles = path, path.parent, titles
        self.single = path.name == "runs.csv"
        columns, lines = read_lines(path) if path.exists() else ([], [])
        if problems := format_problems(path.name, columns, lines) if path.exists() else []:
            raise DataError(f"{path}: {problems[0]}; `python results/check.py` names all")
        self.lines: LINES = lines
        summary = table_of(self.folder / "summary.md")[1:]
        known = f"{paper}, `{'single runs' if self.single else self.folder.name}`"
        self.name = summary[0][0] if summary and not self.single else known
        self.label = self.name.partition(", ")[2]
        place = path.relative_to(path.parents[1 if self.single else 2])
        self.identifier = parts.slug(*(place.with_suffix("") if self.single else place.parent).parts)
        self.claims = [] if self.single else table_of(self.folder / "claims.md")
        self.headlines = summary  # paper, claim, paper's number, ours, n, verdict

    @property
    def command(self) -> str | None:
        """What makes the study: the command of its rows of the whole or in its texts, else of its first run."""
        found = [line["command"] for line in self.lines if line["method"] == "study"]
        texts = [] if self.single else [text for _, text in self._texts()]
        found += [command for text in texts for command in re.findall(r"`(python -m \w+\.\w+ [^`]*)`", text)]
        return next(iter([*found, *(line["command"] for line in self.lines)]), None)

    def environment(self) -> list[list[str]]:
        """Rows of the table of environments: of, device, precision, torch, commit, command."""
        found = dict.fromkeys(
            (x["device"], x["precision"], x["commit"], x["command"] if self.single else self.command)
            for x in self.lines
        )
        return [[self.label, device, precision, "-", f"`{commit[:10]}`", f"`{command}`"]
                for device, precision, commit, command in found]  # fmt: skip

    def html(self) -> str:
        """The study's part of the page."""
        seeds = {line["seed"] for line in self.lines if line["method"] != "study"}
        methods = {line["method"] for line in self.lines} - {"study"}
        file = self.path.relative_to(self.path.parents[1 if self.single else 2])
        title = "Single runs" if self.single else f"Study {self.label}"
        lines = [f'<section class="study" id="{self.identifier}"><h3>{parts.inline(title)}</h3>']
        if self.lines:
            lines.append(
                f"<p>{_count(len(methods), 'method')}, {_count(len(seeds), 'seed')}, {len(self.lines):,} figures in "
                f'<a href="../{file.as_posix()}">{escape(file.as_posix())}</a>.</p>'
            )
        texts = [] if self.single else self._texts()
        lines += [self._text(name, text) for name, text in texts]
        if self.lines and not any(name == "methods" for name, _ in texts):
            lines.append(self._figures())
        plots = [] if self.single else sorted((self.folder / "plots").glob("*.svg"))
        if plots:
            lines += ["<h4>Plots</h4>", *(self._plot(path) for path in plots)]
        return "\n".join([*lines, "</section>"])

    def _texts(self) -> list[tuple[str, str]]:
        paths = {p.stem: p for p in sorted(self.folder.glob("*.md")) if p.stem not in LEFT_OUT and p.stem != "README"}
        order = [*(name for name in FILES if name in paths), *(name for name in paths if name not in FILES)]
        return [(name, paths[name].read_text(encoding="utf-8")) for name in order]

    def _text(self, name: str, text: str) -> str:
        title = FILES.get(name, name.replace("_", " ").capitalize())
        before = text.partition("\n| ")[0] if not text.startswith("| ") else ""
        label = f"{title} of {self.name}"
        lines = [f"<h4>{title}</h4>"]
        if read_tables(text):
            lines += [f'<div class="prose">{parts.prose(before, 5, "..")}</div>'] if before.strip() else []
            lines += [self._figure(name, table, label) for table in read_tables(text)]
            after = text.rpartition("\n| ")[2].partition("\n")[2]
            lines += [f'<div class="prose">{parts.prose(after, 5, "..")}</div>'] if after.strip() else []
        else:
            lines.append(f'<div class="prose">{parts.prose(text, 5, "..")}</div>')
        return "\n".join(lines)

    def _figure(self, name: str, table: Sequence[Sequence[str]], label: str) -> str:
        kind, extra = "methods", {}
        if name == "claims":
            kind, extra = "claims", {"interval": parts.interval_marks([row[-3] for row in table[1:]])}
            extra = extra if any(extra["interval"]) else {}
        note = "Intervals are drawn around a dashed zero; an arrow points to what is beyond the edge." if extra else ""
        return f"<figure>{parts.table(table, label.replace('`', ''), kind, extra)}{self._made(note)}</figure>"

    def _figures(self) -> str:
        """A table of the accuracies, where no report has made one."""
        rows = [["method", *(["config"] if self.single else []), "seed", "at", "split", "metric", "value"]]
        names = rows[0][:-1]
        rows[0] += ["command"] if self.single else []
        for line in self.lines:
            if line["metric"].endswith("accuracy"):
                value = f"{100 * float(line['value']):.1f} %"
                rows.append([*(line[name] for name in names), value, *([f"`{line['command']}`"] * self.single)])
        drawn = parts.table(rows, f"Accuracies of {self.label.replace('`', '')}", "figures")
        return f"<h4>Accuracies</h4><figure>{drawn}{self._made()}</figure>"

    def _plot(self, path: Path) -> str:
        text = page_plots.caption(path.stem, self.titles.get(f"{self.folder.name}/{path.stem}", ""))
        drawn = page_plots.plot(path, f"{self.identifier}-{parts.slug(path.stem)}", text)
        box = f"{parts.scroll_open(f'Plot: {text}')}{drawn}</div>"
        return f'<figure class="picture">{box}{self._made(text)}</figure>'

    def _made(self, text: str = "") -> str:
        said = f"{escape(text)} " if text else ""
        made = f"Made by <code>{escape(self.command)}</code>" if self.command else "Its command is not recorded."
        made = "Each made by the command in its row." if self.single else made
        return f"<figcaption>{said}{made}</figcaption>"


class BenchmarkPart:
    """The benchmarks of one paper, and the table of latencies where it has one."""

    def __init__(self, folder: Path) -> None:
        found = [folder / name for name in ("benchmarks.md", "latency.md") if (folder / name).exists()]
        self.texts = [path.read_text(encoding="utf-8") for path in found]
        self.lines: LINES = [line for path in found for line in read_lines(path.with_suffix(".csv"))[1]]

    def html(self, paper: str) -> str:
        """The part's beginning; the caller closes the section."""
        lines = [f'<section id="{paper}-benchmarks"><h3>Benchmarks</h3>']
        for whole in self.texts:
            about, *rest = re.split(r"^\*\*(.+)\*\*$", whole, flags=re.MULTILINE)
            lines.append(parts.prose(about, 4, ".."))
            for title, text in zip(rest[::2], rest[1::2], strict=True):
                lines.append(f"<h4>{parts.inline(title[0].upper() + title[1:])}</h4>")
                for table in read_tables(text):
                    drawn = parts.table(table, f"Benchmark: {title}", "methods")
                    lines.append(f"<figure>{drawn}<figcaption>Made by <code>make bench</code></figcaption></figure>")
        return "\n".join(lines)

    def environment(self, paper: str) -> list[list[str]]:
        """As `StudyPart.environment`."""
        found = dict.fromkeys((x["device"], x["torch"], x["commit"]) for x in self.lines)
        return [
            ["benchmarks", device, "-", torch, f"`{commit[:10]}`", "`make bench`"] for device, torch, commit in found
        ]


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
