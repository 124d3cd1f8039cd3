"""`make reproduce`: all studies, whatever becomes of one of them."""

import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.cli import run_main

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "results" / "reproduce_all.py"
sys.path.insert(0, str(SCRIPT.parent))
specification = importlib.util.spec_from_file_location("reproduce_all", SCRIPT)
script = importlib.util.module_from_spec(specification)
sys.modules["reproduce_all"] = script
specification.loader.exec_module(script)

HEADLINES = "| paper | claim | paper's number | ours | n | verdict |\n| --- | --- | --- | --- | --- | --- |\n"
CLAIMS = (
    "| claim | source | paper | ours: paired difference [95 %] | n | verdict |\n| --- | --- | --- | --- | --- | --- |\n"
)
STUDY = """
import json, sys
from pathlib import Path
out, paper, summary, claims, code = Path(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5])
folder = out / paper / "report-mini"
folder.mkdir(parents=True)
(out / paper / "progress.json").write_text(json.dumps({"done": 1, "total": 2, "text": "about 3 s left"}))
for name, text in (("methods", "x"), ("summary", summary), ("claims", claims)):
    (folder / f"{name}.md").write_text(text)
if code:
    print("failed: mdcs-s0: the disk is full", file=sys.stderr, flush=True)
    print("error: no run has finished", file=sys.stderr, flush=True)
print("the last line of", paper)
sys.exit(code)
"""


@pytest.fixture
def studies(monkeypatch):
    """Makes each paper's study a small program: paper -> (summary, claims, exit code)."""
    told: dict[str, tuple[str, str, int]] = {}

    def command_of(paper, asked, scale):
        summary, claims, code = told[paper]
        return [sys.executable, "-c", STUDY, str(asked.out), paper, summary, claims, str(code)]

    monkeypatch.setattr(script, "command_of", command_of)
    return told


def test_the_command_of_a_study_is_the_one_of_its_package(tmp_path):
    class Asked:
        workers, out = 0, Path("runs")

    assert script.command_of("mdcs", Asked, "mini") == [sys.executable, "-m", "mdcs.reproduce", "--scale", "mini"]
    Asked.workers, Asked.out = 3, tmp_path
    assert script.command_of("mdcs", Asked, "mini")[5:] == ["--workers", "3", "--out", str(tmp_path)]


def test_a_failure_stops_no_other_study_and_the_table_has_all_that_was_reported(tmp_path, studies, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    claims = CLAIMS + "| A first | s | - | - | - | not run |\n| B counts | s | 7 | 7 | 2 | reproduced |\n"
    nothing = HEADLINES + "| FedLoGe, `mini` | A first | - | - | - | not run |\n"
    judged = HEADLINES + "| MDCS, `mini` | C better | +5 | +1.00 ± 0.10 [+0.90, +1.10] | 4 | inconclusive |\n"
    studies |= {"fedloge": (nothing, claims, 0), "mdcs": (judged, claims, 1), "sparsevit": (judged, claims, 0)}
    arguments = ["--scale", "mini", "--out", str(tmp_path), "--papers", "fedloge", "mdcs", "sparsevit"]
    assert run_main(script.main, arguments) == 1
    printed = capsys.readouterr()
    assert "failed: MDCS: mdcs-s0: the disk is full\n" in printed.err
    assert f"all of it in {tmp_path / 'mdcs' / 'reproduce.txt'}; mended, the same command goes on\n" in printed.err
    assert "1 reproduced, 2 inconclusive, 0 not reproduced; 3 claims were not judged at this scale" in printed.out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.out.splitlines() if "│" in line]
    assert rows == [
        ["FedLoGe, mini", "B counts", "7", "7", "2", "reproduced"],
        ["MDCS, mini", "C better", "+5", "+1.00 ± 0.10 [+0.90, +1.10]", "4", "inconclusive"],
        ["MDCS, mini", "C better", "+5", "+1.00 ± 0.10 [+0.90, +1.10]", "4", "inconclusive"],
    ]
    assert (tmp_path / "fedloge" / "reproduce.txt").read_text() == "the last line of fedloge\n"
    assert (tmp_path / "mdcs" / "reproduce.txt").read_text().count("\n") == 3


def test_a_folder_that_cannot_be_written_is_one_line_for_all_studies(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run_main(script.main, ["--scale", "smoke", "--out", str(tmp_path / "file")]) == 2
    assert re.fullmatch(r"error: .*Not a directory: .*file/fedloge.*\n", capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_report_of_an_earlier_run_is_not_taken_for_this_one(tmp_path, studies):
    old = tmp_path / "mdcs" / "report-old"
    old.mkdir(parents=True)
    (old / "methods.md").write_text("x")

    os.utime(old / "methods.md", (time.time() - 60,) * 2)
    studies["mdcs"] = (HEADLINES, CLAIMS, 0)

    class Asked:
        workers, out = 0, tmp_path

    ending = script.run_paper("mdcs", Asked, "mini", script.Display(["mdcs"]))
    assert [path.name for path in ending.reports] == ["report-mini"]
    assert (ending.code, ending.last) == (0, "the last line of mdcs")
    assert script.said_by(tmp_path / "mdcs") == "about 3 s left"
    assert script.said_by(tmp_path) == ""


def test_an_unknown_paper_or_scale_is_told_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--papers", "resnet"])
    assert stop.value.code == 2
    assert run_main(script.main, ["--scale", "huge"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --scale huge: is not a scale")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_ends_it_lets_the_study_save_and_the_same_command_finishes(tmp_path, number):
    """The real thing: one paper's smoke study, stopped in the middle."""
    command = [sys.executable, str(SCRIPT), "--scale", "smoke", "--papers", "fedloge", "--out", str(tmp_path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("fedloge/*/results.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    if number == signal.SIGINT:  # as a terminal sends it: to all
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("fedloge/*/results.json")}
    assert finished
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(finished)} were finished before" in (tmp_path / "fedloge" / "reproduce.txt").read_text()
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert "FedLoGe: " in done.stdout
    assert "0 not reproduced" in done.stdout
    assert json.loads((tmp_path / "fedloge" / "progress.json").read_text())["text"]


def test_on_a_terminal_each_paper_has_a_bar_that_says_how_far_it_is_and_how_it_ended(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    display = script.Display(["mdcs", "lightcnn"])
    with display.bar:
        display.show("mdcs", 0.5, "about 20 s left")
        display.bar.refresh()
        display.end("mdcs", script.Ending(0, 41.0, "", ()), Path("log"))
        display.end("lightcnn", script.Ending(2, 3.0, "no data", ()), Path("runs/log"))
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    for told in ("MDCS", "about 20 s left", "41 s", "LightCNN", "failed after 3 s: no data (runs/log)"):
        assert told in drawn
    assert capsys.readouterr().out == "", "what a pipe is told is not told twice"
