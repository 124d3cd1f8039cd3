"""All four studies, one after the other: `python results/reproduce_all.py --scale smoke`, which is `make reproduce`.

Each is `python -m <paper>.reproduce` in a process of its own, so that none can stop the others; what it prints goes to
`runs/<paper>/reproduce.txt`. Finished runs are not made again: the same command goes on where it was stopped.
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from csv_schema import PAPERS
from recompute import Table, table_of
from tables import MAIN

from shared.cli import run_main
from shared.report import show
from shared.study import PROGRESS, choose_scale, progress_of

NAMES = {paper: said[0].partition(",")[0] for paper, said in MAIN.items()}
HEAD = ["paper", "claim", "paper's number", "ours", "n", "verdict"]
NOT_RUN = "not run"
OUT, LOG = Path("runs"), "reproduce.txt"
POLL_SECONDS, SAVING_SECONDS = 0.2, 60


@dataclass(frozen=True)
class Ending:
    """How one paper's study ended: exit code, seconds, the line that says why, and the reports it wrote."""

    code: int
    seconds: float
    last: str
    reports: tuple[Path, ...]


def command_of(paper: str, asked: argparse.Namespace, scale: str) -> list[str]:
    """The command of one paper's study."""
    options = {"--workers": asked.workers or None, "--out": asked.out if asked.out != OUT else None}
    given = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return [sys.executable, "-m", f"{paper}.reproduce", "--scale", scale, *given]


@contextlib.contextmanager
def stopped_with_us(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """What ends this process ends the study first, which saves the states of its runs."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    except KeyboardInterrupt:  # the study has had it too, and a second signal would cut its saving short
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SAVING_SECONDS)
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        signal.signal(signal.SIGTERM, before)


def run_paper(paper: str, asked: argparse.Namespace, scale: str, display: "Display") -> Ending:
    """Run one study to its end, whatever that is."""
    folder, began, started = asked.out / paper, time.time(), time.monotonic()
    log = folder / LOG
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROGRESS).unlink(missing_ok=True)
    with open(log, "wb") as file:
        process = subprocess.Popen(command_of(paper, asked, scale), stdout=file, stderr=subprocess.STDOUT)
        with stopped_with_us(process):
            while process.poll() is None:
                display.show(paper, progress_of(folder), said_by(folder))
                time.sleep(POLL_SECONDS)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    reports = tuple(sorted(p.parent for p in folder.glob("report-*/methods.md") if p.stat().st_mtime >= began - 1))
    ending = Ending(process.returncode, time.monotonic() - started, reason(lines), reports)
    display.end(paper, ending, log)
    return ending


def reason(lines: Sequence[str]) -> str:
    """Of what a study printed, the line that says why it failed: the first failed run, else an error, else the last."""
    told = [line.removeprefix(start) for start in ("failed: ", "error: ") for line in lines if line.startswith(start)]
    return (told or [*lines[-1:], ""])[0]


def said_by(folder: Path) -> str:
    """What the study says of how far it is; empty before its first run."""
    try:
        return str(json.loads((folder / PROGRESS).read_bytes())["text"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


class Display:
    """A bar for each paper on a terminal; elsewhere a line when a study ends."""

    def __init__(self, papers: Sequence[str]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TimeElapsedColumn

        columns = ("{task.fields[paper]:<10}", BarColumn(), TimeElapsedColumn(), "{task.description}")
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self.tasks = {p: self.bar.add_task("waiting", total=1, start=False, paper=NAMES[p]) for p in papers}

    def show(self, paper: str, share: float, text: str) -> None:
        """Say how far a study is."""
        self.bar.start_task(self.tasks[paper])
        self.bar.update(self.tasks[paper], completed=share, description=text or "starting")

    def end(self, paper: str, ending: Ending, log: Path) -> None:
        """Say how a study ended."""
        text = f"{ending.seconds:.0f} s"
        if ending.code:
            text = f"failed after {text}: {ending.last} ({log})"
        self.bar.update(self.tasks[paper], completed=0 if ending.code else 1, description=text)
        self.bar.stop_task(self.tasks[paper])
        if self.bar.disable:
            print(f"{NAMES[paper]}: {text}", flush=True)


def claims_of(paper: str, report: Path) -> tuple[list[list[str]], int]:
    """Rows under `HEAD` of one report, and how many claims it could not judge at its scale.

    They are the headline claims; where a scale compares nothing, all that it does judge: counts and identities.
    """
    head, *lines = table_of(report / "claims.md") or [[]]
    every = [dict(zip(head, line, strict=True)) for line in lines]
    headlines = [row for row in table_of(report / "summary.md")[1:] if row[-1] != NOT_RUN]
    left = sum(row["verdict"] == NOT_RUN for row in every)
    if any("[" in row[3] for row in headlines):  # an interval: a comparison was judged
        return headlines, left
    label = f"{NAMES[paper]}, `{report.name.removeprefix('report-')}`"
    rows = [[label, r["claim"], r["paper"], r[head[-3]], r["n"], r["verdict"]] for r in every]
    return [row for row in rows if row[-1] != NOT_RUN], left


def final_table(endings: dict[str, Ending]) -> tuple[Table, str]:
    """The last table, and the sentence below it."""
    found = [claims_of(paper, report) for paper, ending in endings.items() for report in ending.reports]
    rows = [[row[0].replace("`", ""), *row[1:]] for some, _ in found for row in some]
    counts, left = Counter(row[-1] for row in rows), sum(number for _, number in found)
    said = ", ".join(f"{counts[name]} {name}" for name in ("reproduced", "inconclusive", "not reproduced"))
    return [HEAD, *rows], said + (f"; {left} claims were not judged at this scale" if left else "")


def main(arguments: Sequence[str]) -> int:
    """Run the studies of all papers; exit code 1 if one failed, whatever the verdicts."""
    parser = argparse.ArgumentParser(prog="python results/reproduce_all.py", description=main.__doc__)
    parser.add_argument(
        "--scale", default="auto", help="smoke (seconds), mini (minutes a paper), paper (hours to months)"
    )
    parser.add_argument("--papers", nargs="+", choices=PAPERS, default=list(NAMES), help="some of them")
    parser.add_argument("--workers", type=int, default=0, help="runs side by side (default: one a core; on a GPU one)")
    parser.add_argument("--out", type=Path, default=OUT, help="runs and reports go below it (runs)")
    asked = parser.parse_args(arguments)
    scale, why = choose_scale(asked.scale)
    print(why, flush=True)
    started, endings = time.monotonic(), dict[str, Ending]()
    display = Display(asked.papers)
    with display.bar:
        for paper in dict.fromkeys(asked.papers):
            endings[paper] = run_paper(paper, asked, scale, display)
    table, said = final_table(endings)
    show(f"scale {scale}: what holds", table)
    print(f"{said}. {time.monotonic() - started:.0f} s; reports and plots in {asked.out}/<paper>/report-*")
    for paper in (failed := [paper for paper, ending in endings.items() if ending.code]):
        log = asked.out / paper / LOG
        print(f"failed: {NAMES[paper]}: {endings[paper].last}\n  all of it in {log}; mended, the same command goes on",
              file=sys.stderr)  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
