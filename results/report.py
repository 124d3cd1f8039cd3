"""The one page of all results: `python results/report.py` writes `results/report/index.html`.

Static and self-contained: no script, no font, nothing from the network. Made from what is published in `results/` and
from the packages' READMEs (deviations and their like). With `--check` it only says whether the page is stale.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path

import page_parts as parts
from csv_schema import PAPERS
from page_study import BenchmarkPart, StudyPart

from shared.checkpoint import atomic_write
from shared.cli import run_main
from shared.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = Path("results/report/index.html")
LARGEST = 8 * 2**20
NOT_RUN = "not run"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
INTRODUCTION = ("The paper on one screen",)
PROTOCOL = ("Methods", "The budget", "Results", "Real ")
LIMITS, DEVIATIONS, SPEED = ("What is certain",), ("Deviations",), ("Speed",)


class PaperPart:
    """One paper on the page: its README's words, its published studies, its benchmarks."""

    def __init__(self, root: Path, paper: str) -> None:
        readme = _read(root / paper / "README.md")
        self.paper, self.base = paper, f"../../{paper}"
        self.texts = parts.sections(readme)
        self.title, self.citation = next(iter(self.texts.items()))
        self.name = self.title.partition(":")[0]
        titles, folder = parts.image_titles(readme), root / "results" / paper
        studies = sorted({path.parent for kind in ("csv", "md") for path in folder.glob(f"*/*.{kind}")})
        found = [*(study / "results.csv" for study in studies), *folder.glob("runs.csv")]
        self.studies = [StudyPart(path, self.name, titles) for path in found]
        self.studies.sort(key=lambda study: -len(study.headlines))  # what says most first
        self.benchmark = BenchmarkPart(folder) if (folder / "benchmarks.md").exists() else None

    @property
    def published(self) -> bool:
        """Whether there are figures of it; a choice made before a study has none."""
        return any(study.lines for study in self.studies)

    def verdicts(self) -> Counter[str]:
        """How many of its headline claims have which verdict."""
        return Counter(row[-1] for study in self.studies for row in study.headlines)

    def contents(self) -> list[tuple[str, str]]:
        """(identifier, name) of what the contents list below the paper."""
        listed = [(study.identifier, study.label) for study in self.studies]
        listed += [(f"{self.paper}-benchmarks", "Benchmarks")] if self.benchmark else []
        listed += [(f"{self.paper}-{key}", name) for key, name, starts in _KINDS if parts.section(self.texts, *starts)]
        return [*listed, (f"{self.paper}-environment", "Environment")] if self.published else listed

    def html(self) -> str:
        """The paper's part of the page."""
        lines = [f'<section class="paper" id="{self.paper}" aria-labelledby="{self.paper}-name">']
        lines += [f'<h2 id="{self.paper}-name">{parts.inline(self.title)}</h2>']
        lines += [f'<div class="lead">{parts.prose(self.citation, 3, self.base)}</div>']
        lines += [self._prose(text, 3) for _, text in parts.section(self.texts, *INTRODUCTION)]
        if not self.published:
            lines.append(f'<p class="note">{NOT_PUBLISHED.format(name=escape(self.name))}</p>')
        lines += [study.html() for study in self.studies]
        if self.benchmark:
            told = [self._prose(text) for _, text in parts.section(self.texts, *SPEED)]
            lines += [self.benchmark.html(self.paper), *told, "</section>"]
        for key, name, starts in _KINDS:
            lines += self._words(key, name, parts.section(self.texts, *starts))
        return "\n".join([*lines, self._environment(), "</section>"])

    def _words(self, key: str, name: str, found: Sequence[tuple[str, str]]) -> list[str]:
        if not found:
            return []
        lines = [f'<section id="{self.paper}-{key}"><h3>{name}</h3>']
        for heading, text in found:
            lines += [f"<h4>{parts.inline(heading)}</h4>"] if len(found) > 1 or key == "protocol" else []
            lines.append(self._prose(text))
        source = f'<p class="source">From <a href="{self.base}/README.md">{self.paper}/README.md</a>.</p>'
        return [*lines, source, "</section>"]

    def _prose(self, text: str, level: int = 4) -> str:
        return f'<div class="prose">{parts.prose(text, level, self.base)}</div>'

    def _environment(self) -> str:
        if not self.published:
            return ""
        rows = [["of", "device", "precision", "torch", "commit", "command"]]
        rows += [row for study in self.studies for row in study.environment()]
        rows += self.benchmark.environment(self.paper) if self.benchmark else []
        drawn = parts.table(rows, f"Environment of {self.name}", "environment")
        note = "From the CSVs of results and benchmarks; torch is recorded in those of benchmarks."
        return f'<section id="{self.paper}-environment"><h3>Environment</h3><p>{note}</p>{drawn}</section>'


_KINDS = (
    ("protocol", "Protocol, and what it says", PROTOCOL),
    ("limits", "What is certain, and what is not", LIMITS),
    ("deviations", "Deviations", DEVIATIONS),
)
NOT_PUBLISHED = "No study of {name} is published yet: the package trains and is tested, and claims nothing here."


def build(root: Path) -> str:
    """The page as text.

    Raises:
        DataError: a README or a published file that the page shows is missing or damaged, or the page is too large.
    """
    papers = [PaperPart(root, paper) for paper in PAPERS]
    told = _read(root / "README.md")
    papers.sort(
        key=lambda paper: (not paper.published, told.find(f"{paper.paper}/README.md"))
    )  # first what shows something
    style = _read(Path(__file__).parent / "page.css")
    main = "\n".join([_summary(root, papers), *(paper.html() for paper in papers)])
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>four-papers: what holds</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">To the results</a>
<div class="page">
{_contents(papers)}
<main id="main">
{main}
<footer><p>Made by <code>make report</code>: figures, tables, verdicts and plots from the published files, the words
around them from the READMEs of the repository and the packages. What a CSV holds is in
<a href="../README.md">results/README.md</a>.</p></footer>
</main>
</div>
</body>
</html>
"""
    if len(page.encode()) > LARGEST:
        raise DataError(f"{PAGE}: {len(page.encode()):,} bytes are more than {LARGEST:,}; publish smaller plots")
    return page


def _contents(papers: Sequence[PaperPart]) -> str:
    lines = ['<nav aria-label="Contents"><ul>', '<li><a href="#summary">Summary</a></li>']
    for paper in papers:
        inner = "".join(f'<li><a href="#{key}">{parts.inline(name)}</a></li>' for key, name in paper.contents())
        below = f"<ul>{inner}</ul>" if inner else ""
        lines.append(f'<li><a href="#{paper.paper}">{escape(paper.name)}</a>{below}</li>')
    return "\n".join([*lines, "</ul></nav>"])


def _summary(root: Path, papers: Sequence[PaperPart]) -> str:
    told = _read(root / "README.md").partition("\n\n")[2].partition("\n\n")[0]
    lines = ['<section id="summary">', "<h1>four-papers: what holds</h1>"]
    lines += [f'<div class="lead">{parts.prose(told, 2, "../..")}</div>', '<ul class="tally">']
    for paper in papers:
        counts = paper.verdicts()
        shown = "".join(
            f"<li>{parts.badge(name)} <b>{counts[name]}</b></li>" for name in parts.VERDICTS if counts[name]
        )
        shown = f"<ul>{shown}</ul>" if shown else "<p>not published yet</p>"
        lines.append(f'<li><a href="#{paper.paper}">{escape(paper.name)}</a>{shown}</li>')
    rows = [["paper", "claim", "paper's number", "ours", "n", "verdict"]]
    rows += [row for paper in papers for study in paper.studies for row in study.headlines]
    lines += ["</ul>", "<h2>The headline claims</h2>"]
    lines.append(f"<p>{_judged(rows[1:])} Made by <code>make tables</code>.</p>")
    return "\n".join([*lines, parts.table(rows, "Headline claims of all papers", "claims headline"), "</section>"])


def _judged(rows: Sequence[Sequence[str]]) -> str:
    """How the claims of these rows are judged: comparisons have an interval, facts have none."""
    compared = sum("[" in row[3] for row in rows)
    facts = sum("[" not in row[3] and row[-1] != NOT_RUN for row in rows)
    said = (
        f"{len(rows)} verdicts, one for each claim of each study. {compared} are comparisons, judged by a difference "
        "over n seeds, paired where both sides are runs: reproduced where its 95 % interval is on the claim's side of "
        "zero, not reproduced where it is on the other, inconclusive where it spans zero."
    )
    if facts:
        said += f" {facts} {'is a fact' if facts == 1 else 'are facts'}, such as a count, without an interval: "
        said += "reproduced where it holds in every run, else not reproduced."
    return said


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read: {error.strerror}; the page shows it") from None


def main(arguments: Sequence[str]) -> int:
    """Write or check the page of all results."""
    parser = argparse.ArgumentParser(prog="python results/report.py", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether it is stale; exit code 1 if it is")
    check = parser.parse_args(arguments).check
    wanted, path = build(REPOSITORY), REPOSITORY / PAGE
    stale = not path.exists() or path.read_text(encoding="utf-8") != wanted
    if stale and not check:
        atomic_write(path, wanted.encode())
    print(f"{'stale' if check else 'written'}: {PAGE}" if stale else "up to date")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
