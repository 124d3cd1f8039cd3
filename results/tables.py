"""The tables of the READMEs, generated from the published results: `python results/tables.py`.

Writes the texts of every study from its rows (where a claim has been worded anew, say), `results/papers.md` (the
headline claims of all studies) and `results/overview.md` (a line a paper), then what stands between
`<!-- begin FILE -->` and `<!-- end FILE -->` in every README. With `--check` it writes nothing and only says what is
stale.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from posixpath import dirname, join, relpath

from recompute import Study, table_of, text_of

from shared.checkpoint import atomic_write
from shared.cli import run_main
from shared.errors import DataError
from shared.report import markdown, read_rows

REPOSITORY = Path(__file__).resolve().parents[1]
# Of each paper: its name, what is asked of it in one line, and the study and claim that answer it.
MAIN = {
    "fedloge": ("FedLoGe, ICLR 2024", "mini", "The generic model is better than the best generic baseline"),
    "mdcs": ("MDCS, ICCV 2023", "mini", "MDCS is better than the best baseline (of those on their own views)"),
    "lightcnn": ("LightCNN, 2025", "fashion_mnist cifar10",
                 "The two stages are better than training the same network in one go, for as many epochs"),
    "sparsevit": ("SparseViT, 2023", "mini", "Pruned by 10 to 50 % (mean of five), it is better than without"),
}  # fmt: skip
LINK = re.compile(r"\]\((\.\.?/[^)]+)\)")
VERDICTS = ("reproduced", "inconclusive", "not reproduced")
MARKER = re.compile(r"<!-- begin (?P<source>[\w./-]+) -->\n.*?<!-- end (?P=source) -->", re.DOTALL)


def study_texts(results: Path) -> dict[Path, str]:
    """Of every published study its files, and what its rows give for each; the wording of a claim may have changed."""
    studies = (Study(path.parent, read_rows(path)) for path in sorted(results.glob("*/*/results.csv")))
    return {study.folder / name: text for study in studies if not study.single for name, text in study.texts().items()}


def papers_table(results: Path) -> str:
    """All studies' `summary.md` under the folder as one table."""
    texts = [path.read_text(encoding="utf-8").splitlines() for path in sorted(results.glob("*/*/summary.md"))]
    return "\n".join([*texts[0][:2], *(line for text in texts for line in text[2:])]) + "\n" if texts else ""


def overview_table(results: Path) -> str:
    """What each paper claims first of all, what was found in a study or two, how its headline claims fare in all."""
    tally = f"deciding claims: {', '.join(VERDICTS)}"
    rows = [["paper", "its main claim", "paper's number", "ours", "n", "verdict", tally]]
    for paper, (name, studies, claim) in MAIN.items():
        lines = {p.parent.name: table_of(p)[1:] for p in sorted((results / paper).glob("*/summary.md"))}
        counts = [sum(row[-1] == verdict for own in lines.values() for row in own) for verdict in VERDICTS]
        tally = ", ".join(map(str, counts)) if lines else "-"
        ends = [f"[{name}](../{paper}/README.md)", tally]
        for study in studies.split():
            found = next((row[2:] for row in lines.get(study, ()) if row[1] == claim), None)
            if study in lines and found is None:
                raise DataError(f"results/{paper}/{study}/summary.md: lacks the claim {claim!r} of the overview")
            rows.append([ends[0], f"{claim} (`{study}`)", *(found or ("-", "-", "-", "not published")), ends[1]])
            ends = ["", ""]
    return markdown(rows)


def fill(readme: str, root: Path, fresh: dict[str, str], folder: str = ".") -> str:
    """Replace what stands between the markers of a file by the file, its links seen from the README's folder.

    `fresh` holds texts not written yet.

    Raises:
        DataError: a file that is named is missing.
    """

    def replacement(match: re.Match[str]) -> str:
        """The markers, and between them the file as it is now."""
        source = match["source"]
        try:
            text = fresh[source] if source in fresh else (root / source).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"{source}: cannot be read: {error.strerror}; a README shows it") from None
        text = LINK.sub(lambda link: f"]({relpath(join(dirname(source), link[1]), folder)})", text)
        return f"<!-- begin {source} -->\n{text.rstrip()}\n<!-- end {source} -->"

    return MARKER.sub(replacement, readme)


def main(arguments: Sequence[str]) -> int:
    """Write or check the generated tables of the READMEs."""
    parser = argparse.ArgumentParser(prog="python results/tables.py", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="only say which are stale; exit code 1 if any is")
    check = parser.parse_args(arguments).check
    results, stale = REPOSITORY / "results", list[str]()
    for path, wanted in study_texts(results).items():  # first: the tables of all papers are made of them
        if text_of(path) != wanted:
            stale.append(path.relative_to(REPOSITORY).as_posix())
            if not check:
                atomic_write(path, wanted.encode())
    fresh = {"results/papers.md": papers_table(results), "results/overview.md": overview_table(results)}
    readmes = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("*/README.md"))]
    for path in [*(REPOSITORY / name for name in fresh), *readmes]:
        name = path.relative_to(REPOSITORY).as_posix()
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        wanted = fresh[name] if name in fresh else fill(text, REPOSITORY, fresh, dirname(name) or ".")
        if wanted != text:
            stale.append(name)
            if not check:
                atomic_write(path, wanted.encode())
    print("\n".join(f"{'stale' if check else 'written'}: {name}" for name in stale) or "up to date")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
