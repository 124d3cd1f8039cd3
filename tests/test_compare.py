"""A study that was made again is held against the published one, figure by figure."""

import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest

from shared.cli import run_main

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "results"))
compare = import_module("compare")


@pytest.fixture
def report(tmp_path) -> Path:
    """The published study of real CIFAR-10, as a report among runs."""
    folder = tmp_path / "mdcs" / "report-cifar10_lt_if100_cpu"
    folder.mkdir(parents=True)
    shutil.copy(REPOSITORY / "results" / "mdcs" / "cifar10_lt_if100_cpu" / "results.csv", folder)
    return folder


def test_the_same_figures_are_told_as_such(report, capsys):
    lines = (report / "results.csv").read_text().splitlines()
    assert run_main(compare.main, [str(report)]) == 0
    n = f"{len(lines) - 1:,}"
    assert capsys.readouterr().out.endswith(f": {n} of {n} published figures are the same to the last digit\n")


def test_a_part_of_a_study_is_compared_as_far_as_it_goes_and_another_figure_is_shown(report, capsys):
    part = report.rename(f"{report}-partial")
    head, first, second, *_ = (part / "results.csv").read_text().splitlines()
    cells = first.split(",")
    old, cells[7] = cells[7], "0.123"  # value
    (part / "results.csv").write_text("\n".join([head, ",".join(cells), second]) + "\n")
    assert run_main(compare.main, [str(part)]) == 1
    told, line = capsys.readouterr().out.splitlines()
    assert told.endswith(": 1 of 2 published figures are the same to the last digit")
    assert line.endswith(f": 0.123 here, {float(old)} published")


def test_a_measured_speed_is_not_compared(tmp_path, capsys):
    folder = tmp_path / "sparsevit" / "report-mini"
    folder.mkdir(parents=True)
    lines = (REPOSITORY / "results" / "sparsevit" / "mini" / "results.csv").read_text().splitlines()
    speeds = [number for number, line in enumerate(lines) if ",speed." in line]
    assert speeds
    for number in speeds:
        lines[number] = lines[number].replace(",speed.masked,1", ",speed.masked,9")
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    assert run_main(compare.main, [str(folder)]) == 0
    n = f"{len(lines) - 1 - len(speeds):,}"
    assert f": {n} of {n} published figures" in capsys.readouterr().out


def test_what_cannot_be_compared_is_one_line(report, tmp_path, capsys):
    assert run_main(compare.main, [str(tmp_path / "mdcs" / "report-gone")]) == 2
    assert "report-gone" in capsys.readouterr().err
    other = report.rename(report.with_name("report-mini"))
    assert run_main(compare.main, [str(other)]) == 2
    assert "has no figure that is published in" in capsys.readouterr().err
