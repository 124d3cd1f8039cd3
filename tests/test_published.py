"""What `results/check.py` finds where a published study says other than its rows, or no longer all that they give."""

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from shared.errors import DataError
from shared.report import Row, read_rows, write_rows

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "results"))
check, recompute = (import_module(name) for name in ("check", "recompute"))
STUDIES = sorted(
    path.parent.relative_to(REPOSITORY / "results").as_posix()
    for path in (REPOSITORY / "results").glob("*/*/results.csv")
    if (path.parent / "methods.md").exists()
)
MDCS, FEDLOGE, SPARSEVIT = "mdcs/mini", "fedloge/mini", "sparsevit/mini"
FASHION = "lightcnn/fashion_mnist"  # of several commits


def copy_of(study: str, tmp_path: Path) -> Path:
    """A published study in a folder of its own."""
    folder = tmp_path / "results" / study
    shutil.copytree(REPOSITORY / "results" / study, folder, ignore=shutil.ignore_patterns("plots"))
    return folder


def problems_of(folder: Path) -> list[str]:
    """What the check says of a copy, without the file's name."""
    found, _, _ = check.check(folder.parents[1])
    return [problem.partition("results.csv: ")[2] for problem in found]


def drop_lines(path: Path, having: str) -> None:
    """Take the lines of a text away that have these words."""
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if having not in line]
    assert len(kept) < len(lines)
    path.write_text("".join(kept))


def told(folder: Path, rows: Sequence[Row]) -> list[str]:
    """The problems of a study's texts, or the one that keeps them from being made: a budget's command is in one."""
    try:
        return recompute.table_problems(folder, rows)
    except DataError as error:
        return [str(error)]


@pytest.mark.parametrize(("study", "name"), [
    (study, path.name) for study in STUDIES for path in sorted((REPOSITORY / "results" / study).glob("*.md"))
])  # fmt: skip
def test_every_text_of_a_study_must_be_there_and_be_what_the_rows_give(tmp_path, study, name):
    rows = read_rows(REPOSITORY / "results" / study / "results.csv")
    folder = tmp_path / study  # its name says which study it is
    folder.mkdir(parents=True)
    for path in (REPOSITORY / "results" / study).glob("*.*"):
        shutil.copy(path, folder / path.name)
    assert told(folder, rows) == []
    (folder / name).write_text((folder / name).read_text().rstrip("\n") + " or not\n")
    (problem,) = told(folder, rows)
    assert problem.startswith(f"{name}: ")
    (folder / name).unlink()
    assert told(folder, rows) == [f"{name}: is missing"]
    (folder / name).write_text("")
    assert len(told(folder, rows)) == 1


def test_claims_that_were_not_reproduced_cannot_be_left_out_with_the_summary_made_to_match(tmp_path):
    folder = copy_of(FEDLOGE, tmp_path)
    lost = {}
    for name in ("claims.md", "summary.md"):
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        lost[name] = next(line for line in lines if line.endswith("| not reproduced |")).strip("| ").split(" | ")
        drop_lines(folder / name, "| not reproduced |")
    first, second = problems_of(folder)
    assert first.startswith(f"claims.md: lacks '{lost['claims.md'][0]}"[:80])
    assert second.startswith(f"summary.md: lacks '{lost['summary.md'][0]} {lost['summary.md'][1]}"[:80])


def test_a_method_cannot_be_left_out_nor_put_elsewhere(tmp_path):
    path = copy_of(FEDLOGE, tmp_path) / "methods.md"
    whole = path.read_text()
    drop_lines(path, "| fedetf |")
    assert problems_of(path.parent) == ["methods.md: lacks 'fedetf'"]
    path.write_text(re.sub(r"(\| fedrod .*\n)(\| fedbabu .*\n)", r"\2\1", whole))
    assert problems_of(path.parent) == ["methods.md: fedbabu, method: says fedbabu; the rows give fedrod"]
    path.write_text(whole + "| ours | 99.9 ± 0.0 |\n")
    assert problems_of(path.parent) == ["methods.md: has 'ours', which the rows do not give"]


@pytest.mark.parametrize(("study", "name", "old", "new", "said"), [
    (MDCS, "claims.md", "| supplement, CIFAR-100-LT IF 100; theirs: a later re-run |", "| abstract |",
     "source: says abstract; the rows give suppl"),
    (MDCS, "claims.md", "| inconclusive |", "| reproduced |", "verdict: says reproduced; the rows give inconclusive"),
    (FASHION, "methods.md", "commits c37036e59f, bd09ed031c, ", "commits c37036e59f, ", "the rows give"),
    (FASHION, "methods.md", "fdd93cf35e", "fdd93cf35f", "fdd93cf35f"),
    (FEDLOGE, "methods.md", "last 10 evaluated", "best 10 evaluated", "the rows give"),
    (SPARSEVIT, "verdict.md", "not supported", "supported", "says \"The paper's claim is supported"),
    (SPARSEVIT, "cautions.md", "0.10 points", "0.01 points", "0.01 points in this mean"),
    (SPARSEVIT, "latency.md", "| 1.00 |", "| 2.00 |", "dense, times as fast: says 2.00; the rows give 1.00"),
])  # fmt: skip
def test_no_word_of_a_text_can_be_rewritten(tmp_path, study, name, old, new, said):
    path = copy_of(study, tmp_path) / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    (problem,) = problems_of(path.parent)
    assert problem.startswith(f"{name}: ")
    assert said in problem


def test_a_text_that_the_report_does_not_write_is_named(tmp_path):
    folder = copy_of(MDCS, tmp_path)
    (folder / "verdict.md").write_text("MDCS is the best.\n")
    assert problems_of(folder) == ["verdict.md: is no file of this report"]


def test_one_run_needs_no_tables_but_a_study_cannot_pass_for_one(tmp_path):
    single = copy_of("fedloge/cifar10_lt_if100_alpha05_2_rounds", tmp_path)
    assert problems_of(single) == []
    (single / "methods.md").write_text("| method |\n")
    assert problems_of(single) == ["fedloge: has 1 of at least 3 seeds"]
    (single / "methods.md").unlink()
    folder = copy_of(MDCS, tmp_path)
    for path in folder.glob("*.md"):
        path.unlink()
    assert problems_of(folder) == ["methods.md: is missing", "claims.md: is missing", "summary.md: is missing"]


def budget_rows(command: str = "python -m lightcnn.train --config budget_smoke") -> list[Row]:
    """Rows of a small study of the budget, which has none of the study as a whole."""
    figures = {"accuracy": 0.5, "validation": 0.6, "parameters": 1200.0, "multiply_adds": 9000.0, "epochs.run": 4.0}
    common = ("CPU", "float32", "c" * 40, 1.0)
    return [
        Row("lightcnn", "budget_smoke", arm, seed, "final", "test", metric, value, *common, f"{command} seed={seed}")
        for arm in ("teacher", "distillation", "plain") for seed in range(1 if arm == "teacher" else 3)
        for metric, value in figures.items()
    ]  # fmt: skip


def test_a_study_of_the_budget_is_made_again_with_the_command_that_its_table_names(tmp_path):
    from lightcnn.study import report_of

    folder, rows = tmp_path / "lightcnn" / "budget_smoke", budget_rows()
    path = REPOSITORY / "lightcnn" / "configs" / "budget_smoke.yaml"
    command = "python -m lightcnn.reproduce --study budget"
    data = {"image": [1, 28, 28], "val_images": 200, "test_images": 500}
    write_rows(folder / "results.csv", rows)
    for name, text in report_of(path, rows, data, command).texts().items():
        (folder / name).write_text(text)
    assert recompute.table_problems(folder, rows) == []
    assert [row[0] for row in recompute.table_of(folder / "methods.md")] == ["arm", "plain", "distillation", "teacher"]
    said = (folder / "methods.md").read_text()
    for wrong in ("python -m lightcnn.reproduce --scale mini", "python -m lightcnn.reproduce --study budget --fast"):
        (folder / "methods.md").write_text(said.replace(command, wrong))
        with pytest.raises(DataError, match=r"methods\.md: names no command of this study"):
            recompute.table_problems(folder, rows)


@pytest.mark.parametrize(("study", "csv_name", "name"), [
    ("sparsevit/mini_choice", "choice.csv", "choice.md"), ("sparsevit/vit_b16_224", "timings.csv", "latency.md"),
])  # fmt: skip
def test_a_table_beside_the_studies_says_what_its_csv_gives_and_none_is_without_one(tmp_path, study, csv_name, name):
    folder = copy_of(study, tmp_path)
    assert check.check(folder.parents[1])[0] == []
    text = (folder / name).read_text()
    (folder / name).write_text(re.sub(r"(\| [\d.e+]+) \[", r"\g<1>1 [", text).replace(" 85.7", " 86.7"))
    (problem,) = check.check(folder.parents[1])[0]
    assert re.match(rf"results/{study}/{csv_name}: {name}: .* says .*; the rows give ", problem)
    (folder / name).unlink()
    assert check.check(folder.parents[1])[0] == [f"results/{study}/{csv_name}: {name}: is missing"]
    (folder / name).write_text(text)
    copy_of(MDCS, tmp_path)
    (folder / csv_name).unlink()
    assert check.check(folder.parents[1])[0] == [f"results/{study}/{name}: has no CSV beside it"]


def test_benchmarks_without_their_csv_are_named(tmp_path):
    folder = copy_of(MDCS, tmp_path)
    shutil.copy(REPOSITORY / "results" / "mdcs" / "benchmarks.md", folder.parent)
    assert check.check(folder.parents[1])[0] == ["results/mdcs/benchmarks.md: has no CSV beside it"]


def test_rows_in_the_folder_of_a_study_that_is_none_and_damaged_latencies_are_told(tmp_path):
    rows = [replace(row, config="smoke") for row in read_rows(REPOSITORY / "results" / MDCS / "results.csv")]
    with pytest.raises(DataError, match=r"is in the folder of a study 'ablations'; mdcs has main, distillation"):
        recompute.table_problems(tmp_path / "mdcs" / "smoke_ablations", rows)
    folder = copy_of(SPARSEVIT, tmp_path)
    timings = folder / "timings.csv"
    timings.write_text(timings.read_text().replace(",0.0", ",-0.0", 1))
    first, second = check.check(folder.parents[1])[0]
    assert first == (
        "results/sparsevit/mini/results.csv: timings.csv: is damaged, and its texts cannot be made from it"
    )
    assert second.startswith("results/sparsevit/mini/timings.csv:2: seconds: '-0.0004676019962062128' does not fit")
