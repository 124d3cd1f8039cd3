"""The tables of the READMEs, generated from the published results: `python results/tables.py`.

Writes `results/papers.md` (the headline claims of all studies), then what stands between `<!-- begin FILE -->` and
`<!-- end FILE -->` in every README. With `--check` it writes nothing and only says what is stale.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.checkpoint import atomic_write
from shared.cli import run_main
from shared.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"<!-- begin (?P<source>[\w./-]+) -->\n.*?<!-- end (?P=source) -->", re.DOTALL)


def papers_table(results: Path) -> str:
    """All studies' `summary.md` under the folder as one table."""
    texts = [path.read_text(encoding="utf-8").splitlines() for path in sorted(results.glob("*/*/summary.md"))]
    return "\n".join([*texts[0][:2], *(line for text in texts for line in text[2:])]) + "\n" if texts else ""


def fill(readme: str, root: Path, fresh: dict[str, str]) -> str:
    """Replace what stands between the markers of a file by the file; `fresh` holds texts not written yet.

    Raises:
        DataError: a file that is named is missing.
    """

    def replacement(match: re.Match[str]) -> str:
        source = match["source"]
        try:
            text = fresh[source] if source in fresh else (root / source).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"{source}: cannot be read: {error.strerror}; a README shows it") from None
        return f"<!-- begin {source} -->\n{text.rstrip()}\n<!-- end {source} -->"

    return MARKER.sub(replacement, readme)


def main(arguments: Sequence[str]) -> int:
    """Write or check the generated tables of the READMEs."""
    parser = argparse.ArgumentParser(prog="python results/tables.py", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="only say which are stale; exit code 1 if any is")
    check = parser.parse_args(arguments).check
    papers, stale = "results/papers.md", []
    fresh = {papers: papers_table(REPOSITORY / "results")}
    for path in [REPOSITORY / papers, REPOSITORY / "README.md", *sorted(REPOSITORY.glob("*/README.md"))]:
        name = path.relative_to(REPOSITORY).as_posix()
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        wanted = fresh[name] if name in fresh else fill(text, REPOSITORY, fresh)
        if wanted != text:
            stale.append(name)
            if not check:
                atomic_write(path, wanted.encode())
    print("\n".join(f"{'stale' if check else 'written'}: {name}" for name in stale) or "up to date")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
