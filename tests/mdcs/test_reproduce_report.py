"""The study's rows, its claims and what it says of them, from small trained studies."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mdcs.claims import ALL_CLAIMS, MAIN_CLAIMS
from mdcs.reproduce import (
    Study,
    collect,
    constants,
    jobs_of,
    report,
)
from mdcs.study import MAIN, VIEWS
from mdcs.train import main as train_main
from shared import report as shared_report
from shared.checkpoint import load_model, save_model
from shared.claims import Comparison, Fact, judge
from shared.errors import RunError
from shared.study import Job
from tests.mdcs.studies import nothing_drawn, study_of

# The rows


Trained = Callable[[Study], list[Job]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_yaml, small_sample) -> Trained:
    """The jobs of a study, finished: seed 0 is trained, other seeds are its copies with their number in them."""
    known: dict[str, Path] = {}

    def finished(study: Study) -> list[Job]:
        jobs = jobs_of(study)
        for job in jobs:
            if job.group not in known:
                out = tmp_path_factory.mktemp("arm")
                (first,) = jobs_of(study_of(tiny_yaml, out, (job.group,), seeds=1))
                assert train_main(first.arguments) == 0
                known[job.group] = first.folder
            shutil.copytree(known[job.group], job.folder)
            path = job.folder / "results.json"
            results = json.loads(path.read_text())
            path.write_text(json.dumps(results | {"seed": job.seed}))
        return jobs

    return finished


def change_data(jobs: Sequence[Job]) -> None:
    """As if each seed had drawn its own training set."""
    for job in jobs:
        path = job.folder / "results.json"
        results = json.loads(path.read_text())
        results["data"]["digests"]["train"] = f"of seed {job.seed}"
        path.write_text(json.dumps(results))


def test_rows_carry_the_name_of_the_arm_and_not_of_the_method(tmp_path, tiny_yaml, trained):
    study = study_of(tiny_yaml, tmp_path)
    rows = collect(study, trained(study), "the command")
    assert {row.method for row in rows} == {"mdcs", "dl_both", "study"}
    assert {row.seed for row in rows if row.method == "dl_both"} == {0, 1}
    assert {(row.paper, row.config) for row in rows} == {("mdcs", "tiny")}


def test_the_gain_of_distillation_is_a_row_for_each_seed(tmp_path, tiny_yaml, trained):
    study = study_of(tiny_yaml, tmp_path)
    figures = shared_report.figures_of(collect(study, trained(study), ""), "last_epoch")
    left, right = (figures[f"{arm}/ensemble.accuracy"] for arm in ("mdcs", "dl_both"))
    assert figures["study/cs_gain.diverse"] == {seed: left[seed] - right[seed] for seed in (0, 1)}
    assert "study/cs_gain.balanced" not in figures
    assert "study/cs_gain.plain" not in figures


@pytest.mark.parametrize(("seeds", "own_draws", "has"), [(3, True, True), (3, False, False), (2, True, False)])
def test_variance_is_measured_where_three_seeds_or_more_have_their_own_training_sets(
    tmp_path, tiny_yaml, trained, seeds, own_draws, has
):
    study = study_of(tiny_yaml, tmp_path, seeds=seeds)
    jobs = trained(study)
    if own_draws:
        change_data(jobs)
    figures = shared_report.figures_of(collect(study, jobs, ""), "last_epoch")
    names = [f"{arm}/{who}.{kind}" for arm in study.arms for who in ("expert3", "ensemble")
             for kind in ("variance", "bias")]  # fmt: skip
    assert [name in figures for name in names] == [has] * len(names)
    if has:  # the three are copies: none differs from their majority
        assert figures["mdcs/ensemble.variance"] == {0: 0.0, 1: 0.0, 2: 0.0}


def predict(job: Job, ensemble: int) -> None:
    """As if the run's ensemble had predicted this class for every image."""
    tensors, description = load_model(job.folder / "predictions")
    tensors["predictions"][:, -1] = ensemble
    save_model(job.folder / "predictions", tensors, description)


def test_variance_is_over_the_seeds_that_all_arms_have_finished(tmp_path, tiny_yaml, trained):
    study = study_of(tiny_yaml, tmp_path, seeds=5)
    jobs = trained(study)
    change_data(jobs)
    for job in jobs:
        if job.group == "mdcs":
            predict(job, int(job.seed >= 2))
    (last,) = [job for job in jobs if (job.group, job.seed) == ("dl_both", 4)]
    with_all = shared_report.figures_of(collect(study, jobs, ""), "last_epoch")
    (last.folder / "results.json").unlink()
    without = shared_report.figures_of(collect(study, jobs, ""), "last_epoch")
    for part in ("", "_head", "_middle", "_tail"):  # of five, the majority says 1; of four, the lower of two
        assert with_all[f"mdcs/ensemble.variance{part}"] == {0: 1.0, 1: 1.0, 2: 0.0, 3: 0.0, 4: 0.0}
        assert without[f"mdcs/ensemble.variance{part}"] == {0: 0.0, 1: 0.0, 2: 1.0, 3: 1.0}
        assert set(without[f"dl_both/expert2.bias{part}"]) == {0}
    assert set(without["mdcs/ensemble.accuracy"]) == {0, 1, 2, 3, 4}, "other figures are of all runs"


def test_below_three_seeds_in_common_no_arm_has_a_variance(tmp_path, tiny_yaml, trained):
    study = study_of(tiny_yaml, tmp_path, seeds=4)
    jobs = trained(study)
    change_data(jobs)
    for job in jobs:
        if (job.group, job.seed) in (("dl_both", 0), ("mdcs", 3)):
            (job.folder / "results.json").unlink()
    assert not [row for row in collect(study, jobs, "") if "variance" in row.metric]
    for job in jobs:
        if job.group == "mdcs":
            (job.folder / "results.json").unlink(missing_ok=True)
    assert not [row for row in collect(study, jobs, "") if "variance" in row.metric]


def test_runs_that_have_not_finished_are_left_out(tmp_path, tiny_yaml, trained):
    study = study_of(tiny_yaml, tmp_path)
    jobs = trained(study)
    (jobs[0].folder / "results.json").unlink()
    rows = collect(study, jobs, "")
    assert {row.seed for row in rows if row.method == "mdcs"} == {1}


def test_a_study_of_which_nothing_finished_says_so(tmp_path, tiny_yaml):
    study = study_of(tiny_yaml, tmp_path)
    with pytest.raises(RunError, match="no run of the study has finished"):
        collect(study, jobs_of(study), "")


def test_the_constants_are_the_numbers_of_the_brief():
    found = constants()
    assert {name: value for name, value in found.items() if not name.startswith("example")} == {
        "images.cifar10_if100": 12_406, "images.cifar100_if100": 10_847, "lambdas.mean": 1.0,
        "parameters.cifar10": 770_896, "parameters.cifar100": 783_856,
    }  # fmt: skip
    assert found["example.epoch_1"] == pytest.approx(8.686548, abs=1e-6)
    assert found["example.epoch_20"] == pytest.approx(8.808745, abs=1e-6)


def names_of(claim: Comparison | Fact) -> set[str]:
    """The figures that a claim compares."""
    if isinstance(claim, Fact):
        return {claim.figure}
    return {claim.left, *((claim.right,) if isinstance(claim.right, str) else claim.right)}


def test_every_figure_that_a_claim_names_is_measured_by_the_main_study_or_by_that_of_the_views(
    tmp_path, tiny_yaml, trained
):
    """A claim about a figure that nothing writes would say "not run" for ever."""
    named = set().union(*map(names_of, ALL_CLAIMS))
    of_views = [arm for arm in VIEWS if arm not in MAIN and f"{arm}/ensemble.accuracy" in named]
    assert len(of_views) == 6
    study = replace(study_of(tiny_yaml, tmp_path, (*MAIN, *of_views), seeds=3), partial=False)
    jobs = trained(study)
    change_data(jobs)
    figures = shared_report.figures_of(collect(study, jobs, ""), "last_epoch")
    assert named <= set(figures), named - set(figures)
    assert all(len(figures[name]) == 3 for name in named if "study/" not in name or "cs_gain" in name)
    assert all(judge(claim, figures).verdict != "not run" for claim in ALL_CLAIMS)
    assert all(judge(c, figures).verdict == "reproduced" for c in ALL_CLAIMS if isinstance(c, Fact))


# The verdicts


def lines_of(study: Study, jobs: list[Job]) -> list[list[str]]:
    """The rows of the table of claims that a report writes; without one, none."""
    report(study, jobs, "the command")
    path = study.report_folder / "claims.md"
    text = path.read_text() if path.exists() else ""
    return [[cell.strip() for cell in line.split(" | ")] for line in text.replace("| ---", "").splitlines()]


@pytest.fixture
def undrawn(monkeypatch) -> None:
    """A report has no pictures."""
    monkeypatch.setattr("mdcs.plots.draw", nothing_drawn)


def test_every_claim_stands_beside_its_source_in_the_file_and_not_on_the_terminal(
    tmp_path, tiny_yaml, trained, undrawn, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "400")
    study = replace(study_of(tiny_yaml, tmp_path, ("mdcs", "dl_both"), seeds=3), partial=False)
    head, _, *rows = lines_of(study, trained(study))
    assert [cell.strip("| ") for cell in head] == [
        "claim", "source", "paper", "ours: paired difference [95 %]", "n", "verdict"
    ]  # fmt: skip
    assert {row[0].removeprefix("| "): row[1] for row in rows} == {claim.text: claim.source for claim in MAIN_CLAIMS}
    printed = capsys.readouterr().out
    assert "paired difference" in printed
    assert "source" not in printed
    assert "later re-run" not in printed


def test_sources_are_in_the_order_of_the_judgements():
    judgements = [judge(claim, {}) for claim in reversed(ALL_CLAIMS)]
    table = shared_report.claim_table(judgements, sources=True)
    assert table[0][:2] == ["claim", "source"]
    assert [row[:3] for row in table[1:]] == [[c.text, c.source, c.paper] for c in reversed(ALL_CLAIMS)]
    assert {len(row) for row in table} == {6}


def test_a_whole_main_study_lists_all_claims_and_those_that_it_could_not_judge_come_last(
    tmp_path, tiny_yaml, trained, undrawn
):
    study = replace(study_of(tiny_yaml, tmp_path, ("mdcs", "dl_both"), seeds=3), partial=False)
    _, _, *rows = lines_of(study, trained(study))
    left_out = [row[-1] == "not run |" for row in rows]
    assert len(rows) == len(MAIN_CLAIMS)
    assert left_out == sorted(left_out)
    assert 0 < sum(left_out) < len(rows)


@pytest.mark.parametrize(("name", "arms", "partial"), [
    ("main", ("mdcs", "dl_both", "ce"), True), ("views", ("mdcs", "ce_both", "sade_both"), False),
    ("views", ("mdcs", "ce_both"), True), ("variance", ("mdcs", "dl_both"), False),
    ("main", ("mdcs", "dl_both", "cs_plain", "plain_3_both"), True),
])  # fmt: skip
def test_a_part_of_a_study_and_another_study_than_the_main_one_list_what_they_could_judge_and_nothing_else(
    tmp_path, tiny_yaml, trained, undrawn, name, arms, partial
):
    study = replace(study_of(tiny_yaml, tmp_path, arms, seeds=3), name=name, partial=partial)
    jobs = trained(study)
    change_data(jobs)
    figures = shared_report.figures_of(collect(study, jobs, ""), "last_epoch")
    wanted = [c.text for c in ALL_CLAIMS if isinstance(c, Comparison) and names_of(c) <= set(figures)]
    assert wanted
    _, _, *rows = lines_of(study, jobs)
    assert [row[0].removeprefix("| ") for row in rows] == wanted
    assert not [row for row in rows if "not run" in row[-1]]
    title = "tiny" if name == "main" else f"tiny, {name}"
    headlines = [c.text for c in ALL_CLAIMS if isinstance(c, Comparison) and c.headline and c.text in wanted]
    summary = (study.report_folder / "summary.md").read_text()
    assert [line for line in summary.splitlines() if line.startswith("| MDCS")] == [
        line for line in summary.splitlines() if line.startswith(f"| MDCS, `{title}` | ")
    ]
    assert [line.split(" | ")[1] for line in summary.splitlines()[2:]] == headlines
    plain = "Self-distillation needs diverse experts: it gains more with them than with plain ones (lambda 0)"
    assert (plain in wanted) == ("plain_3_both" in arms)


def test_what_can_judge_nothing_has_no_table_of_claims(tmp_path, tiny_yaml, trained, undrawn):
    for seeds, arms in ((2, ("mdcs", "dl_both")), (3, ("ce",))):
        study = study_of(tiny_yaml, tmp_path / str(seeds), arms, seeds)
        assert lines_of(study, trained(study)) == []
        assert not (study.report_folder / "summary.md").exists()
        assert (study.report_folder / "methods.md").exists()


def test_results_of_every_run_name_its_arm_in_the_report_s_order(tmp_path, tiny_yaml, trained):
    study = study_of(tiny_yaml, tmp_path, ("ce", "mdcs"), seeds=1)
    rows: list[Any] = collect(study, trained(study), "")
    assert list(dict.fromkeys(row.method for row in rows)) == ["ce", "mdcs", "study"]
