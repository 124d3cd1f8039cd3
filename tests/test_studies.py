"""What the four studies have in common: what `--publish` refuses, and that one configuration does not stop the next."""

import importlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shared.study import Job, Outcome, finished
from shared.study import run_jobs as really_run_jobs

COMMIT = "c" * 40
PAPERS = ("fedloge", "mdcs", "lightcnn", "sparsevit")


class Studies:
    """The command of a package's study, whose runs and report are written at once."""

    def __init__(self, package: str, place: Path, patch: pytest.MonkeyPatch) -> None:
        self.module = importlib.import_module(f"{package}.reproduce")
        self.package, self.place, self.patch, self.dirty, self.seeds = package, place, patch, False, 3
        self.fails: Callable[[Job], bool] = lambda job: False
        real = self.module.report

        def report(*arguments: Any) -> None:
            jobs = next(a for a in arguments if isinstance(a, list) and all(isinstance(job, Job) for job in a))
            if not jobs:
                real(*arguments)
            folder = next((a for a in arguments if isinstance(a, Path) and "report-" in a.name), None)
            folder = folder or arguments[0].report_folder
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "methods.md").write_text(f"{len(finished(jobs))} of {len(jobs)}")

        patch.setattr(self.module, "report", report)
        patch.setattr("shared.study.run_jobs", self.run_jobs)
        patch.setattr("shared.publish.REPOSITORY", place / "repository")
        self.use("one")

    def use(self, *names: str, seeds: int = 3) -> None:
        """Let the scale smoke have these configurations, copies of `smoke`."""
        paths = [self.place / f"{name}.yaml" for name in names]
        for path in paths:
            path.write_text((Path(__file__).parents[1] / self.package / "configs" / "smoke.yaml").read_text())
        plan, self.seeds = self.module.PLANS["smoke"], seeds
        if self.package == "lightcnn":
            plan = tuple(self.module.Slice(str(path), plan[0].methods[:3], seeds) for path in paths)
        else:
            plan = replace(plan, configs=tuple(map(str, paths)), seeds=seeds)
        self.patch.setitem(self.module.PLANS, "smoke", plan)

    def run_jobs(self, module: str, jobs: Sequence[Job], workers: int) -> dict[str, Outcome]:
        self.jobs = len(jobs)
        for job in jobs:
            if not self.fails(job):
                self.write(job)
        return {job.name: Outcome(2 * self.fails(job), 0.1) for job in jobs}

    def write(self, job: Job) -> None:
        own = range(self.seeds) if self.package == "lightcnn" else [job.seed]
        figure = {"at": "final", "split": "test", "metric": "accuracy", "value": 0.5}
        results = {
            "paper": self.package, "config": "c", "method": job.group, "device": "d", "precision": "float32",
            "commit": COMMIT, "seconds": 1.0, "command": "-", "figures": [{**figure, "seed": seed} for seed in own],
        }  # fmt: skip
        job.folder.mkdir(parents=True, exist_ok=True)
        (job.folder / "results.json").write_text(json.dumps(results))
        (job.folder / "environment.json").write_text(json.dumps({"commit": COMMIT, "dirty": self.dirty}))

    def main(self, *arguments: str) -> int:
        return int(self.module.main(["--scale", "smoke", "--out", str(self.place / "runs"), *arguments]))

    def published(self) -> set[str]:
        return {path.name for path in (self.place / "repository").glob("results/*/*")}

    def reports(self) -> set[str]:
        return {path.name for path in (self.place / "runs" / self.package).glob("report-*")}


@pytest.fixture(params=PAPERS)
def studies(request, tmp_path, monkeypatch) -> Studies:
    return Studies(request.param, tmp_path, monkeypatch)


def refused(studies: Studies, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says that must not publish; its report stays."""
    assert studies.main("--publish") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --publish: ")
    assert error.count("\n") == 1
    assert studies.published() == set()
    assert studies.reports() == {"report-one"}
    return error


def test_a_whole_study_of_a_clean_commit_is_published(studies):
    assert studies.main("--publish") == 0
    assert studies.published() == {"one"}


def test_what_may_not_be_published_is_refused_and_the_report_stays(studies, capsys):
    studies.dirty = True
    assert "was made with changes that are in no commit" in refused(studies, capsys)
    studies.dirty = False
    studies.use("one", seeds=2)
    assert "has 2 seeds, and a published figure has at least 3" in refused(studies, capsys)
    studies.use("one")
    studies.main()
    studies.fails = lambda job: "-s0" in job.name and job.group != "two_stage"  # their results are there
    assert "runs failed" in refused(studies, capsys)
    said = (studies.place / "runs" / studies.package / "report-one" / "methods.md").read_text()
    assert re.fullmatch(r"(\d+) of \1", said), "what failed is not in the report, whatever its folder holds"
    assert int(said.split()[0]) < studies.jobs


def test_a_study_with_a_failed_run_reports_the_others_and_ends_with_1(studies):
    studies.fails = lambda job: "-s0" in job.name and job.group != "two_stage"
    assert studies.main() == 1
    assert studies.reports() == {"report-one"}


def test_another_study_of_a_configuration_is_published_beside_the_main_one(tmp_path, monkeypatch):
    studies = Studies("mdcs", tmp_path, monkeypatch)
    assert studies.main("--study", "distillation", "--publish") == 0
    assert studies.published() == {"one_distillation"}


def test_a_choice_of_coefficients_is_published_beside_the_study_it_is_for(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("sparsevit.choose.choose", lambda *given: (tmp_path, []))
    monkeypatch.setattr("sparsevit.reproduce.publish", lambda *given, **more: seen.append(given[1:3]))
    arguments = ["--scale", "mini", "--study", "choose", "--publish", "--out", str(tmp_path)]
    assert importlib.import_module("sparsevit.reproduce").main(arguments) == 0
    assert seen == [("sparsevit", "mini_choice")]


def test_a_configuration_without_a_finished_run_does_not_stop_the_next(studies, capsys):
    studies.use("absent", "there")
    studies.fails = lambda job: job.name.startswith("absent-")
    assert studies.main("--publish") == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert re.search(r"[ /]absent(\.yaml)?: no run of the study has finished; the lines above say why$", said)
    assert studies.reports() == {"report-there"}
    assert studies.published() == {"there"}


def test_a_configuration_that_may_not_be_published_does_not_stop_the_next(studies, capsys):
    studies.use("part", "whole")
    studies.fails = lambda job: job.name.startswith("part-") and "-s1" in job.name
    if studies.package == "lightcnn":  # all its seeds are one run
        studies.fails = lambda job: job.name.startswith("part-") and job.group != "two_stage"
    assert studies.main("--publish") == 1
    assert re.search(r"^failed: .*part(\.yaml)?: --publish: ", capsys.readouterr().err, re.MULTILINE)
    assert studies.reports() == {"report-part", "report-whole"}
    assert studies.published() == {"whole"}


def test_the_only_configuration_without_a_finished_run_is_one_line_and_exit_code_2(studies, capsys):
    studies.fails = lambda job: True
    assert studies.main() == 2
    assert capsys.readouterr().err == "error: no run of the study has finished; the lines above say why\n"
    assert studies.reports() == set()


def test_a_wrong_argument_is_not_told_once_a_configuration(studies, capsys, monkeypatch):
    studies.use("first", "second")
    monkeypatch.setattr("shared.study.run_jobs", really_run_jobs)
    assert studies.main("--workers", "-1") == 2
    assert capsys.readouterr().err == "error: --workers -1: give the number of runs side by side, or 0 for one a core\n"
