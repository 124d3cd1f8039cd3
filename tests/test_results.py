"""The published figures: what `results/check.py` finds, and what `results/add.py` takes."""

import csv
import json
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest

from shared.cli import run_main
from shared.errors import DataError
from shared.report import read_rows

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "results"))
add, check, csv_schema, recompute = (import_module(name) for name in ("add", "check", "csv_schema", "recompute"))
STUDY = "mdcs/cifar10_lt_if100_cpu"


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """A folder of results with one study, which the commands take for the repository's."""
    folder = tmp_path / "results"
    shutil.copytree(REPOSITORY / "results" / STUDY, folder / STUDY)
    monkeypatch.setattr(check, "RESULTS_FOLDER", folder)
    monkeypatch.setattr(add, "RESULTS_FOLDER", folder)
    return folder


def edit(path: Path, change) -> None:
    """Change a CSV as a list of lines that are mappings."""
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    lines = change(lines) or lines
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def test_what_is_published_is_whole(capsys):
    assert run_main(check.main, []) == 0, capsys.readouterr().out
    assert re.fullmatch(r"\d+ files with [\d,]+ rows: nothing is wrong\n", capsys.readouterr().out)


def test_the_readme_documents_every_column_in_order():
    text = (REPOSITORY / "results" / "README.md").read_text(encoding="utf-8")
    for name in set(csv_schema.SCHEMAS) - {"runs.csv", "clients.csv"}:
        section = text.partition(f"\n## `{name}`")[2].partition("\n## ")[0]
        first_cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        documented = [column for cell in first_cells for column in re.findall(r"`([\w.]+)`", cell)]
        assert documented == list(csv_schema.SCHEMAS[name])
    assert set(re.findall(r"`(\w+)`", text.partition("\n## `clients.csv`")[2])) == set(csv_schema.CLIENTS)


DAMAGE = {
    "a share above 1": (2, {"value": "1.2"}, "2: value: ensemble.accuracy is a share, but 1.2 is not in [0, 1]"),
    "a value that is no number": (3, {"value": "nan"}, "3: value: 'nan' does not fit"),
    "a seed below 0": (2, {"seed": "-1"}, "2: seed: '-1' does not fit"),
    "another paper's row": (2, {"paper": "fedloge"}, "2: paper: fedloge in the folder of mdcs"),
    "an unknown paper": (2, {"paper": "mdsc"}, "2: paper: 'mdsc' does not fit"),
    "a short commit": (2, {"commit": "200edbd"}, "2: commit: '200edbd' does not fit"),
    "an unresolved precision": (2, {"precision": "auto"}, "2: precision: 'auto' does not fit"),
    "an unknown moment": (2, {"at": "best"}, "2: at: 'best' does not fit"),
    "a module that is not there": (
        2, {"command": "python -m mdcs.trian --config mini"}, "2: command: there is no module mdcs.trian"),
    "an unknown configuration": (
        2, {"command": "python -m mdcs.train --config mdcs/configs/gone.yaml"}, "there is no such configuration"),
    "an unknown override": (
        2, {"command": "python -m mdcs.train --config cifar10_lt_if100_cpu lr=1"}, "lr: there is no such key"),
    "an unknown option": (
        2, {"command": "python -m mdcs.train --confg mini"}, "2: command: unrecognized arguments: --confg"),
    "a path of one machine": (
        2, {"command": "python -m mdcs.train --config cifar10_lt_if100_cpu --out /data/x"}, "is a path of one machine"),
    "a command of another seed": (
        2, {"command": "python -m mdcs.train --config cifar10_lt_if100_cpu seed=1"}, "trains seed 1, but"),
    "a command of another method": (
        2, {"command": "python -m mdcs.train --config cifar10_lt_if100_cpu method=ce"}, "trains ce, but the row has m"),
    "a command of another configuration": (
        2, {"command": "python -m mdcs.train --config mini"}, "has the configuration mini, but the row has cifar10_lt"),
    "a command that cannot be read": (
        2, {"command": "python -m mdcs.train --config 'mini"}, "cannot be read as a command: No closing quotation"),
    "a figure that stands there twice": (3, {"metric": "ensemble.accuracy"}, "ensemble.accuracy: stands there 2 times"),
    "a figure that the tables do not have": (
        2, {"value": "0.5"}, "methods.md: mdcs, ensemble: says 58.7 ± 0.5; the rows give"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "changes", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_wrong_row_is_named_with_its_line(results, capsys, line, changes, said):
    edit(results / STUDY / "results.csv", lambda lines: lines[line - 2].update(changes))
    assert run_main(check.main, []) == 1
    printed = capsys.readouterr().out
    assert said in printed
    assert all(problem.startswith(f"results/{STUDY}/results.csv:") for problem in printed.splitlines())


def test_a_missing_seed_is_named_and_fewer_first_seeds_are_allowed_where_the_report_says_so(results, capsys):
    def without(seed: str):
        return lambda lines: [x for x in lines if (x["method"], x["seed"]) != ("ce", seed)]

    path = results / STUDY / "results.csv"
    edit(path, without("2"))
    assert run_main(check.main, []) == 1
    assert f"results/{STUDY}/results.csv: ce: lacks seed 2\n" in capsys.readouterr().out
    lines = csv_schema.read_lines(path)[1]
    assert check.seed_problems(lines, fewer=True) == []
    edit(path, without("0"))
    assert check.seed_problems(csv_schema.read_lines(path)[1], fewer=True) == ["ce: lacks seed 0, 2"]


def test_a_study_has_three_seeds_without_a_gap(results, capsys):
    path = results / STUDY / "results.csv"
    lines = csv_schema.read_lines(path)[1]
    assert check.number_problems(lines) == []
    assert check.number_problems([line | {"method": "teacher"} for line in lines if line["seed"] == "0"]) == []
    edit(path, lambda lines: [line for line in lines if line["seed"] != "1"])
    assert run_main(check.main, []) == 1
    printed = capsys.readouterr().out
    for method in ("mdcs", "ce", "balanced_softmax"):
        assert f"{STUDY}/results.csv: {method}: has 2 of at least 3 seeds\n" in printed
        assert f"{STUDY}/results.csv: {method}: lacks seed 1 between its others\n" in printed


def test_a_figure_of_one_seed_only_is_named_but_not_one_that_is_calculated(results):
    path = results / STUDY / "results.csv"
    lines = csv_schema.read_lines(path)[1]
    extra = lines[0] | {"metric": "new"}
    assert check.seed_problems([*lines, extra]) == ["mdcs, last_epoch, new: lacks seed 1, 2"]
    assert check.seed_problems([*lines, extra | {"seconds": "0.0"}]) == []


def test_counts_are_whole_and_differences_of_shares_at_most_1():
    wrong = {"parameters": "12.5", "bytes.weights": "-1", "ensemble.drop": "1.2", "accuracy": "1.1"}
    right = {"parameters": "12", "bytes.weights": "0", "ensemble.drop": "-0.2", "accuracy": "1.0", "speed.masked": "2"}
    assert all(csv_schema.value_problem({"metric": metric, "value": value}) for metric, value in wrong.items())
    assert not any(csv_schema.value_problem({"metric": metric, "value": value}) for metric, value in right.items())


def test_a_study_of_two_configurations_is_named(results):
    path = results / STUDY / "results.csv"
    both = [*csv_schema.read_lines(path)[1], *csv_schema.read_lines(REPOSITORY / "results/mdcs/mini/results.csv")[1]]
    assert any("holds several configurations" in problem for problem in check.row_problems(path, both))


def test_two_methods_may_not_have_one_command(results):
    lines = csv_schema.read_lines(results / STUDY / "results.csv")[1]
    (problem,) = check.duplicate_problems([*lines, lines[0] | {"method": "other"}])
    assert problem.startswith("mdcs and other: have one command, python -m mdcs.train")


@pytest.mark.parametrize(("name", "old", "new", "said"), [
    ("methods.md", "44.1 ± 3.3", "44.2 ± 3.3", "methods.md: ce, ensemble: says 44.2 ± 3.3; the rows give 44.1 ± 3.3"),
    ("claims.md", "inconclusive", "reproduced", "(weak view), verdict: says reproduced; the rows give inconclusive"),
    ("claims.md", "The ensemble is", "The ensemble was", "every expert' but has 'The ensemble was better"),
    ("summary.md", "| 3 |", "| 4 |", "leads on the head classes, n: says 4; the rows give 3"),
])  # fmt: skip
def test_a_table_that_says_other_than_the_rows_is_named(results, capsys, name, old, new, said):
    path = results / STUDY / name
    path.write_text(path.read_text().replace(old, new))
    assert run_main(check.main, []) == 1
    assert said in capsys.readouterr().out


def test_benchmarks_that_say_other_than_their_csv_are_named(tmp_path):
    for name in ("benchmarks.csv", "benchmarks.md"):
        shutil.copy(REPOSITORY / "results" / "mdcs" / name, tmp_path / name)
    assert check.file_problems(tmp_path / "benchmarks.csv") == []
    (tmp_path / "benchmarks.md").write_text("1.95 times")
    assert check.file_problems(tmp_path / "benchmarks.csv") == ["benchmarks.md: is not what the CSV gives"]


def test_latencies_that_say_other_than_their_csv_are_named(tmp_path, load_benchmark):
    path, latency = tmp_path / "latency.csv", load_benchmark("lightcnn_latency")
    counts = dict.fromkeys(latency.COUNTS, 14_862)
    layouts = {f"{key}.layout": "NCHW" for key in latency.BATCHES}
    times = {f"{key}.{end}": 0.25 for key in latency.BATCHES for end in ("ms", "ms_q1", "ms_q3")}
    where = {"n": 15, "device": "CPU", "threads": 1, "torch": "2.15.0", "commit": "0" * 40}
    row = {"images": "28 x 28 grey", "network": "merged", **counts, **layouts, **times, **where}
    latency.write_csv(path, latency.COLUMNS, [row])
    path.with_suffix(".md").write_text(latency.text_of([row]))
    assert check.file_problems(path) == []
    latency.write_csv(path, latency.COLUMNS, [row | {"one.ms": 0.125}])
    assert check.file_problems(path) == ["latency.md: is not what the CSV gives"]
    latency.write_csv(path, latency.COLUMNS, [row | {"one.layout": "NHWC"}])
    assert check.file_problems(path) == ["2: one.layout: 'NHWC' does not fit (results/README.md)"]


@pytest.mark.parametrize(("text", "said"), [
    ("", "has the columns  instead of round,client"),
    ("a,b\n1,2\n", "has the columns a,b instead of round,client"),
    ("round,client,images,epochs,seconds,images_per_second,loss\n", "holds no line"),
    ("round,client,images,epochs,seconds,images_per_second,loss\n0,0,1,1,1,1\n", "2: loss: '' does not fit"),
    ("round,client,images,epochs,seconds,images_per_second,loss\n0,0,1,1,1,1,1,1\n", "2: has more values than columns"),
    ("round\n\xff", "has the columns round"),
])  # fmt: skip
def test_a_csv_that_is_not_of_its_kind_is_told_in_one_line(tmp_path, text, said):
    (tmp_path / "clients.csv").write_text(text)
    (problem,) = check.file_problems(tmp_path / "clients.csv")
    assert said in problem


def test_a_csv_of_no_kind_and_one_that_is_no_text_are_told(results, capsys):
    (results / "mdcs" / "other.csv").write_text("a\n1\n")
    (results / "mdcs" / "runs.csv").write_bytes(b"\xff\xfe\n")
    assert run_main(check.main, []) == 1
    printed = capsys.readouterr().out
    assert "results/mdcs/other.csv: has no documented schema" in printed
    assert "results/mdcs/runs.csv: runs.csv: cannot be read as CSV" in printed


def test_tables_are_read_as_they_were_written():
    from shared.report import markdown

    table = [["a", "b"], ["x | y", "2 ± 3"], ["z", "-"]]
    assert recompute.read_tables(f"text\n\n{markdown(table)}\nmore\n\n{markdown(table[:2])}") == [table, table[:2]]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_arguments) -> Path:
    """A finished run of FedAvg from a clean commit, as far as its files say."""
    out = tmp_path_factory.mktemp("runs")
    assert import_module("fedloge.train").main(tiny_arguments(out, "fedavg")) == 0
    (folder,) = (out / "fedloge").iterdir()
    set_json(folder / "environment.json", dirty=False, commit="a" * 40)
    set_json(folder / "results.json", commit="a" * 40)
    return folder


def set_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_finished_run_is_added_once_without_the_folder_it_was_made_in(results, run, capsys):
    assert run_main(add.main, [str(run)]) == 0
    assert "results/fedloge/runs.csv: " in capsys.readouterr().out
    path = results / "fedloge" / "runs.csv"
    rows = read_rows(path)
    assert {row.method for row in rows} == {"fedavg"}
    assert "--out" not in rows[0].command
    assert check.file_problems(path) == []
    before = path.read_bytes()
    assert run_main(add.main, [str(run)]) == 2
    assert capsys.readouterr().err.endswith(": is in results/fedloge/runs.csv already\n")
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["papier,config\nfedloge,mini\n", "", "\x00"])
def test_nothing_is_added_to_a_damaged_file(results, run, capsys, content):
    (results / "fedloge").mkdir()
    (results / "fedloge" / "runs.csv").write_text(content)
    assert run_main(add.main, [str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "runs.csv" in error
    assert (results / "fedloge" / "runs.csv").read_text() == content


def test_a_command_with_an_open_quote_is_told_and_not_added(results, run, tmp_path, capsys):
    changed = shutil.copytree(run, tmp_path / "changed")
    set_json(changed / "results.json", command="python -m fedloge.train --config 'smoke")
    assert run_main(add.main, [str(changed)]) == 2
    assert "cannot be read as a command: No closing quotation" in capsys.readouterr().err


def test_a_study_without_rows_is_one_line(results):
    path = results / STUDY / "results.csv"
    path.write_text(path.read_text().partition("\n")[0] + "\n")
    with pytest.raises(DataError, match="has no rows; take it back from git"):
        recompute.Study(path.parent, read_rows(path))


def test_a_run_with_other_settings_wants_a_name(results, run, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    set_json(other / "results.json", command=f"{json.loads((run / 'results.json').read_text())['command']} rounds=3")
    assert run_main(add.main, [str(run)]) == 0
    assert run_main(add.main, [str(other)]) == 2
    assert "--as NAME" in capsys.readouterr().err
    assert run_main(add.main, [str(other), "--as", "fedavg_3"]) == 0
    assert {row.method for row in read_rows(results / "fedloge" / "runs.csv")} == {"fedavg", "fedavg_3"}


def test_a_run_of_a_published_study_is_not_added_under_another_name(results, run, tmp_path, capsys):
    rows = read_rows(REPOSITORY / "results" / "fedloge" / "mini" / "results.csv")
    shutil.copytree(REPOSITORY / "results" / "fedloge" / "mini", results / "fedloge" / "mini")
    one = next(row for row in rows if row.metric == "generic.accuracy" and row.method == "fedavg" and row.at == "final")
    other = tmp_path / "published"
    shutil.copytree(run, other)
    figures = [{"at": one.at, "split": one.split, "metric": one.metric, "value": one.value}]
    set_json(other / "results.json", config="mini", seed=one.seed, figures=figures, command=one.command)
    assert run_main(add.main, [str(other), "--as", "other"]) == 2
    assert capsys.readouterr().err.endswith(": is in results/fedloge/mini/results.csv already\n")


REFUSED = {
    "dirty": ({"dirty": True}, {}, "was made with changes that are in no commit"),
    "not said whether dirty": ({"dirty": None}, {}, "was made with changes that are in no commit"),
    "another commit": ({}, {"commit": "b" * 40}, "name two commits"),
    "no commit": ({"commit": "unknown"}, {"commit": "unknown"}, "commit: 'unknown' does not fit"),
    "an unknown paper": ({}, {"paper": "other"}, "is a run of 'other'; the papers here are fedloge, lightcnn"),
    "no figures": ({}, {"figures": []}, "results.json holds no figure"),
    "damaged figures": ({}, {"figures": [{"value": 1}]}, "results.json: is damaged (figures.0.at: Field required)"),
    "a command of another seed": ({}, {"seed": 7}, "trains seed 0, but the row has 7"),
}


@pytest.mark.parametrize(("environment", "found", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_run_to_publish_is_refused_in_one_line(results, run, tmp_path, capsys, environment, found, said):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    set_json(other / "environment.json", **environment)
    set_json(other / "results.json", **found)
    assert run_main(add.main, [str(run), str(other)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    assert not (results / "fedloge").exists()  # all or nothing


@pytest.mark.parametrize("gone", ["results.json", "environment.json"])
def test_a_run_that_is_not_finished_or_not_whole_is_refused(results, run, tmp_path, capsys, gone):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / gone).unlink()
    assert run_main(add.main, [str(other)]) == 2
    assert gone in capsys.readouterr().err
    (other / gone).write_text("[1]")
    assert run_main(add.main, [str(other)]) == 2
    assert "is damaged" in capsys.readouterr().err
