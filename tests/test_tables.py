"""The generated tables of the READMEs."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

from shared.cli import run_main
from shared.errors import DataError

SCRIPT = Path(__file__).resolve().parents[1] / "results" / "tables.py"
sys.path.insert(0, str(SCRIPT.parent))
specification = importlib.util.spec_from_file_location("tables", SCRIPT)
tables = importlib.util.module_from_spec(specification)
specification.loader.exec_module(tables)


def test_filling_replaces_what_stands_between_the_markers_and_nothing_else(tmp_path):
    (tmp_path / "t.md").write_text("| new |\n\n")
    (tmp_path / "u.md").write_text("\\1 and \\g<0>\n")
    text = "before\n<!-- begin t.md -->\nold\nold\n<!-- end t.md -->\nmiddle\n"
    text += "<!-- begin u.md -->\n<!-- end u.md -->\nafter\n"
    filled = tables.fill(text, tmp_path, {})
    assert filled == (
        "before\n<!-- begin t.md -->\n| new |\n<!-- end t.md -->\nmiddle\n"
        "<!-- begin u.md -->\n\\1 and \\g<0>\n<!-- end u.md -->\nafter\n"
    )
    assert tables.fill(filled, tmp_path, {}) == filled
    assert tables.fill("no markers", tmp_path, {}) == "no markers"
    with pytest.raises(DataError, match=r"gone\.md: cannot be read"):
        tables.fill("<!-- begin gone.md -->\n<!-- end gone.md -->", tmp_path, {})


def test_check_says_what_is_stale_and_writes_nothing_and_the_command_mends_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)
    monkeypatch.setattr(tables, "overview_table", lambda results: "")
    (tmp_path / "part").mkdir()
    (tmp_path / "results").mkdir()
    for name in ("papers.md", "overview.md"):
        (tmp_path / "results" / name).write_text("")
    (tmp_path / "t.md").write_text("| new |\n")
    old = "<!-- begin t.md -->\nold\n<!-- end t.md -->\n"
    for path in (tmp_path / "README.md", tmp_path / "part" / "README.md"):
        path.write_text(old)
    assert run_main(tables.main, ["--check"]) == 1
    assert capsys.readouterr().out == "stale: README.md\nstale: part/README.md\n"
    assert (tmp_path / "README.md").read_text() == old
    assert run_main(tables.main, []) == 0
    assert capsys.readouterr().out == "written: README.md\nwritten: part/README.md\n"
    assert "| new |" in (tmp_path / "part" / "README.md").read_text()
    assert run_main(tables.main, ["--check"]) == 0
    assert capsys.readouterr().out == "up to date\n"
    (tmp_path / "t.md").unlink()
    assert run_main(tables.main, ["--check"]) == 2
    assert capsys.readouterr().err.startswith("error: t.md: cannot be read")


def test_the_texts_of_a_study_are_written_from_its_rows_before_the_tables_of_all_papers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)
    monkeypatch.setattr(tables, "overview_table", lambda results: "")
    study = tmp_path / "results" / "mdcs" / "cifar10_lt_if100_cpu"
    shutil.copytree(SCRIPT.parent / "mdcs" / study.name, study)
    (tmp_path / "README.md").write_text("")
    texts = {path: path.read_text() for path in study.glob("*.md")}
    for path in texts:
        path.write_text(path.read_text().replace("head expert", "first expert"))
    assert run_main(tables.main, ["--check"]) == 1
    named = ("claims.md", "summary.md", "papers.md")
    assert [Path(line).name for line in capsys.readouterr().out.splitlines()] == list(named)
    assert run_main(tables.main, []) == 0
    assert {path: path.read_text() for path in texts} == texts
    assert (tmp_path / "results" / "papers.md").read_text() == (study / "summary.md").read_text()


@pytest.mark.parametrize("argument", ["--chek", "README.md", "--help"])
def test_a_mistyped_argument_writes_nothing(tmp_path, monkeypatch, argument, capsys):
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)
    (tmp_path / "t.md").write_text("new")
    (tmp_path / "README.md").write_text("<!-- begin t.md -->\n<!-- end t.md -->\n")
    with pytest.raises(SystemExit):
        tables.main([argument])
    assert "new" not in (tmp_path / "README.md").read_text()


def test_the_tables_of_the_readmes_are_those_of_the_results():
    assert tables.main(["--check"]) == 0


def test_the_table_of_papers_is_written_first_and_shown_though_it_was_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)
    for name in ("a", "b"):
        (tmp_path / "results" / name / "mini").mkdir(parents=True)
        (tmp_path / "results" / name / "mini" / "summary.md").write_text(f"| paper |\n| --- |\n| {name} |\n")
    (tmp_path / "README.md").write_text("<!-- begin results/papers.md -->\n<!-- end results/papers.md -->\n")
    assert run_main(tables.main, ["--check"]) == 1
    assert capsys.readouterr().out == "stale: results/papers.md\nstale: results/overview.md\nstale: README.md\n"
    assert not (tmp_path / "results" / "papers.md").exists()
    assert run_main(tables.main, []) == 0
    assert (tmp_path / "results" / "papers.md").read_text() == "| paper |\n| --- |\n| a |\n| b |\n"
    assert "| a |\n| b |\n" in (tmp_path / "README.md").read_text()
    assert run_main(tables.main, ["--check"]) == 0


def test_the_overview_has_a_line_a_paper_with_its_main_claim_and_a_tally(tmp_path, monkeypatch):
    head = "| paper | claim | paper's number | ours | n | verdict |\n| --- | --- | --- | --- | --- | --- |\n"
    monkeypatch.setattr(
        tables, "MAIN", {"a": ("A, 2020", "mini large", "it works"), "b": ("B, 2021", "mini", "so too")}
    )
    for study, rows in (("mini", "| A, `mini` | it works | +9 | +1.0 | 4 | inconclusive |\n"),
                        ("large", "| A, `large` | it works | +9 | +2.0 | 4 | reproduced |\n")):  # fmt: skip
        (tmp_path / "a" / study).mkdir(parents=True)
        (tmp_path / "a" / study / "summary.md").write_text(head + rows)
    _, _, first, more, second = tables.overview_table(tmp_path).splitlines()
    assert first == "| [A, 2020](../a/README.md) | it works (`mini`) | +9 | +1.0 | 4 | inconclusive | 1, 1, 0 |"
    assert more == "|  | it works (`large`) | +9 | +2.0 | 4 | reproduced |  |"
    assert second == "| [B, 2021](../b/README.md) | so too (`mini`) | - | - | - | not published | - |"
    monkeypatch.setitem(tables.MAIN, "a", ("A, 2020", "mini", "it flies"))
    with pytest.raises(DataError, match="lacks the claim 'it flies' of the overview"):
        tables.overview_table(tmp_path)


def test_every_paper_has_its_main_claim(papers):
    assert list(tables.MAIN) == list(papers)
