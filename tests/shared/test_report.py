import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.claims import Comparison, Fact, judge
from shared.errors import DataError
from shared.report import (
    Row,
    claim_table,
    commits_of,
    figures_of,
    markdown,
    method_table,
    read_rows,
    rows_of,
    show,
    write_rows,
)

ROW = Row(
    "p",
    "mini",
    "a",
    0,
    "last2",
    "test",
    "generic.accuracy",
    0.1 + 0.2,
    "CPU (x, y)",
    "float32",
    "abc",
    1.5,
    'run "x", y',
)
TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=8)


def test_rows_come_back_equal_from_the_file(tmp_path):
    rows = [ROW, replace(ROW, seed=7, value=1e-300, command="a\nb", device=""), replace(ROW, value=-0.0, seconds=0.0)]
    write_rows(tmp_path / "deep" / "r.csv", rows)
    assert read_rows(tmp_path / "deep" / "r.csv") == rows
    write_rows(tmp_path / "r.csv", [])
    assert read_rows(tmp_path / "r.csv") == []


def test_every_commit_of_the_rows_is_named_once_in_their_order():
    rows = [replace(ROW, commit=letter * 40) for letter in "babc"]
    assert commits_of(rows[:1]) == "commit bbbbbbbbbb"
    assert commits_of(rows) == "commits bbbbbbbbbb, aaaaaaaaaa, cccccccccc"


@settings(max_examples=60, deadline=None)
@given(value=st.floats(allow_nan=False), text=TEXTS, seed=st.integers(0, 2**63))
def test_any_value_and_text_comes_back_from_the_file(tmp_path_factory, value, text, seed):
    path = tmp_path_factory.mktemp("rows") / "r.csv"
    rows = [replace(ROW, value=value, command=text, method=text, seed=seed)]
    write_rows(path, rows)
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    "damage", [lambda line: line.rpartition(",")[0], lambda line: line + ",x", lambda line: line.replace("0.3", "x", 1),
               lambda line: "junk", lambda line: line.replace(",0,", ",1.5,", 1)],
)  # fmt: skip
def test_a_damaged_line_is_refused_with_its_number(tmp_path, damage):
    path = tmp_path / "r.csv"
    write_rows(path, [replace(ROW, command="c")] * 2)
    head, first, second = path.read_text().splitlines()
    path.write_text("\n".join([head, first, damage(second)]) + "\n")
    with pytest.raises(DataError, match=r"r.csv:3: is not a row of results"):
        read_rows(path)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"paper\n\xff"])
def test_a_file_that_is_no_text_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "r.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"r\.csv"):
        read_rows(tmp_path / "r.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "none.csv")


def test_the_rows_of_a_run_leave_out_figures_that_are_not_there():
    figures = [
        {"at": "final", "split": "test", "metric": "m", "value": 0.5},
        {"at": "final", "split": "test", "metric": "none", "value": None},
    ]
    results = {
        name: getattr(ROW, name)
        for name in ("paper", "config", "method", "seed", "device", "precision", "commit", "seconds", "command")
    }
    assert rows_of({**results, "figures": figures, "details": {}}) == [replace(ROW, at="final", metric="m", value=0.5)]


def test_figures_are_of_one_moment_and_of_what_never_changes():
    rows = [
        ROW,
        replace(ROW, at="final", value=9.0),
        replace(ROW, at="once", metric="size", value=3.0),
        replace(ROW, seed=1, value=0.5),
    ]
    assert figures_of(rows, "last2") == {"a/generic.accuracy": {0: ROW.value, 1: 0.5}, "a/size": {0: 3.0}}


def test_a_method_table_shows_means_and_a_dash_for_what_is_missing():
    figures = {"a/x": {0: 0.5, 1: 0.6}, "b/y": {0: 0.25}}
    assert method_table(figures, ("a", "b", "c"), {"X": "x", "Y": "y"}) == [
        ["method", "X", "Y", "n"], ["a", "55.0 ± 7.1", "-", "2"], ["b", "-", "25.0", "1"],
    ]  # fmt: skip


def test_a_claim_table_has_a_row_a_claim_with_the_verdict_last():
    figures = {"a/x": {0: 0.5, 1: 0.6, 2: 0.5}, "a/n": {0: 12.0}}
    claims = [Comparison("above", "-", "a/x", 0.1, paper="+3"), Fact("twelve", "-", "a/n", "==", 12)]
    head, first, second = claim_table([judge(claim, figures) for claim in claims])
    assert len(head) == len(first) == len(second) == 5
    assert (first[0], first[1], first[3], first[4]) == ("above", "+3", "3", "reproduced")
    assert first[2].endswith(" points")
    assert second == ["twelve", "-", "12", "1", "reproduced"]


def test_markdown_escapes_the_bars_of_cells():
    assert markdown([["a", "b"], ["x|y", "|z|"]]) == "| a | b |\n| --- | --- |\n| x\\|y | \\|z\\| |\n"


def test_the_terminal_shows_cells_as_they_are_even_with_brackets(capsys):
    show("title", [["head"], ["+1.00 [0.1, 0.2]"], ["[red]"], ["not reproduced"]])
    printed = capsys.readouterr().out
    for cell in ("+1.00 [0.1, 0.2]", "[red]", "not reproduced"):
        assert cell in printed


def test_a_value_that_is_not_a_number_is_not_lost_on_the_way(tmp_path):
    write_rows(tmp_path / "r.csv", [replace(ROW, value=math.nan)])
    assert math.isnan(read_rows(tmp_path / "r.csv")[0].value)
