"""The study's plan, its jobs, and whole studies on tiny runs."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mdcs import reproduce
from mdcs.claims import MAIN_CLAIMS
from mdcs.config import Config
from mdcs.reproduce import (
    CIFAR_ON_CPU,
    PLANS,
    Plan,
    Study,
    jobs_of,
    main,
    planned,
)
from mdcs.study import LEAST_SEEDS, MAIN, SMOKE, STUDIES, VARIANCE
from mdcs.train import main as train_main
from shared import report as shared_report
from shared.claims import Comparison
from shared.cli import find_config
from shared.config import load
from shared.errors import ConfigError
from shared.study import Job, Outcome
from tests.mdcs.studies import nothing_drawn, study_of

PICTURES = ("arms", "accuracy_by_class", "groups_by_epoch", "confident_by_epoch", "reliability")


def asked(*arguments: str) -> list[Study]:
    return planned(reproduce.parser().parse_args(arguments))


# The plan


def test_the_scales_are_their_configurations_seeds_and_arms():
    for scale in PLANS:
        studies = asked("--scale", scale)
        assert tuple(study.config_path.stem for study in studies) == PLANS[scale].configs
        assert {study.seeds for study in studies} == {PLANS[scale].seeds}
        assert {study.statistics for study in studies} == {scale != "smoke"}
        assert all(study.arms == (SMOKE if scale == "smoke" else MAIN) for study in studies)
        assert not any(study.partial for study in studies)


def test_scales_with_statistics_have_the_seeds_that_a_verdict_needs():
    assert all(plan.seeds >= 3 for plan in (*PLANS.values(), CIFAR_ON_CPU) if plan.statistics)


def test_every_configuration_of_a_plan_is_there_and_each_seed_draws_its_own_training_set_in_mini():
    for plan in (*PLANS.values(), CIFAR_ON_CPU):
        for name in plan.configs:
            load(find_config(name, "mdcs"), Config)
    assert load(find_config("mini", "mdcs"), Config).data.subset_seed is None


def test_cifar_on_a_cpu_has_its_own_few_arms_in_the_main_study_and_all_in_another():
    (study,) = asked("--scale", "mini", "--config", "cifar10_lt_if100_cpu")
    assert (tuple(study.arms), study.seeds, study.statistics) == (CIFAR_ON_CPU.arms, CIFAR_ON_CPU.seeds, True)
    assert {"ce", "balanced_softmax"} <= set(study.arms)
    (study,) = asked("--scale", "mini", "--config", "cifar10_lt_if100_cpu", "--study", "sweeps")
    assert study.arms == STUDIES["sweeps"]


def test_a_configuration_keeps_the_plan_of_its_scale_whatever_scale_is_asked(tiny_yaml):
    (study,) = asked("--scale", "paper", "--config", "smoke")
    assert (study.seeds, study.statistics, dict(study.arms)) == (1, False, SMOKE)
    (study,) = asked("--scale", "smoke", "--config", str(tiny_yaml))
    assert (study.seeds, study.statistics, dict(study.arms)) == (3, True, MAIN)


def test_arms_and_seeds_can_be_chosen():
    (study,) = asked("--scale", "smoke", "--methods", "cs_plain", "ce", "--seeds", "5")
    assert (list(study.arms), study.seeds, study.partial) == (["cs_plain", "ce"], 5, True)
    (study,) = asked("--scale", "mini", "--study", "views", "--methods", "ce_both")
    assert study.arms == {"ce_both": ("method=ce", "method.views=both")}


@pytest.mark.parametrize(("arguments", "said"), [
    (["--scale", "huge"], "--scale huge"),
    (["--scale", "smoke", "--study", "nothing"], "--study nothing: unknown; choose from main, distillation, views"),
    (["--scale", "smoke", "--methods", "mdcs", "alpha_0.3"], "--methods alpha_0.3: unknown; choose from mdcs, dl_both"),
    (["--scale", "smoke", "--study", "sweeps", "--methods", "ce"], "--methods ce: unknown; choose from mdcs, cis_on"),
    (["--scale", "smoke", "--seeds", "0"], "--seeds 0"),
    (["--scale", "smoke", "--seeds", "-2"], "--seeds -2"),
    (["--scale", "smoke", "--config", "nothing"], "nothing: there is no such configuration"),
    (["--scale", "smoke", "--methods", "mdcs", "--publish"], "--publish: "),
    (["--scale", "smoke", "--seeds", "1", "--publish"], "--publish: "),
    (["--scale", "smoke", "--workers", "-1"], "--workers -1: give the number of runs side by side"),
    (["--scale", "smoke", "--config", "cifar100_lt_if100_ride"], "has the method ride, but the arm mdcs is made of"),
    (["--config", "cifar100_lt_if100_baselines", "--methods", "ce", "cs_plain"], "sade, but the arm cs_plain is made"),
    (["--scale", "paper", "--config", "cifar100_lt_if100_ncl", "--study", "sweeps"], "has the method ncl, but the arm"),
])  # fmt: skip
def test_what_cannot_be_run_is_refused_with_exit_code_2_before_anything_is_written(arguments, said, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_two_kinds_of_study_write_the_same_report():
    folders = [
        study.report_folder
        for more in ((), ("--seeds", "2"))
        for name in STUDIES
        for study in asked("--scale", "paper", "--study", name, *more)
    ]
    assert len(set(folders)) == len(folders) == 2 * len(PLANS["paper"].configs) * len(STUDIES)
    assert folders[0] == Path("runs/mdcs/report-cifar100_lt_if100")


OTHERS = [path.stem for path in sorted(find_config("mini", "mdcs").parent.glob("*.yaml"))
          if load(path, Config).method.name != "mdcs"]  # fmt: skip


@pytest.mark.parametrize("config", OTHERS)
def test_a_configuration_of_another_method_is_refused_with_the_first_arm_that_is_made_of_mdcs(config):
    own = load(find_config(config, "mdcs"), Config).method.name
    for study, first in (("main", "mdcs"), ("views", "mdcs"), ("sweeps", "mdcs"), ("variance", "mdcs")):
        with pytest.raises(ConfigError, match=f"{config}: has the method {own}, but the arm {first} is made of mdcs; "):
            asked("--scale", "paper", "--config", config, "--study", study)
    with pytest.raises(ConfigError, match="the arm mdcs_no_cis is made of mdcs; choose --methods"):
        asked("--scale", "paper", "--config", config, "--methods", "ce", "mdcs_no_cis", "mdcs")


@pytest.mark.parametrize("config", OTHERS)
def test_a_configuration_of_another_method_takes_arms_that_name_theirs_each_in_a_folder_of_its_own(config):
    named = [arm for arm, changes in MAIN.items() if changes and changes[0].startswith("method=")]
    assert {"sade", "ce", "ce_linear", "dl_both"} <= set(named)
    for arms in (["sade", "ce"], named):
        (study,) = asked("--scale", "paper", "--config", config, "--methods", *arms)
        assert list(study.arms) == arms
        jobs = jobs_of(study)
        assert len({job.folder for job in jobs}) == len(jobs) == 3 * len(arms)
        for job in jobs:
            method = load(study.config_path, Config, job.arguments[4:]).method
            assert method.name == (MAIN[job.group][0]).removeprefix("method=")


def test_the_variance_study_has_a_training_set_of_its_own_draw_and_five_seeds_at_least():
    for scale in PLANS:
        for study in asked("--scale", scale, "--study", "variance"):
            assert study.arms == VARIANCE
            assert study.seeds == max(LEAST_SEEDS["variance"], PLANS[scale].seeds) >= 5
            for job in jobs_of(study):
                config = load(study.config_path, Config, job.arguments[4:])
                assert (config.data.subset_seed, config.seed) == (None, job.seed)
    (study,) = asked("--scale", "mini", "--study", "variance", "--seeds", "3")
    assert (study.seeds, study.partial) == (3, True)


def test_the_variance_study_has_more_seeds_where_its_plan_has(monkeypatch):
    monkeypatch.setitem(PLANS, "mini", replace(PLANS["mini"], seeds=7))
    assert asked("--scale", "mini", "--study", "variance")[0].seeds == 7


# The jobs


@pytest.mark.parametrize("name", STUDIES)
def test_the_jobs_have_folders_of_their_own_commands_that_load_and_seeds_outermost(name, tmp_path):
    (study,) = asked("--scale", "mini", "--study", name, "--seeds", "2", "--out", str(tmp_path))
    jobs = jobs_of(study)
    assert len({job.folder for job in jobs}) == len({job.name for job in jobs}) == len(jobs)
    assert [(job.seed, job.group) for job in jobs] == [(seed, arm) for seed in (0, 1) for arm in study.arms]
    for job in jobs:
        assert job.arguments[:4] == ("--config", "mdcs/configs/mini.yaml", "--out", str(tmp_path))
        config = load(find_config(job.arguments[1], "mdcs"), Config, job.arguments[4:])
        assert config == load(study.config_path, Config, [f"seed={job.seed}", *study.arms[job.group]])


def test_the_folder_of_a_job_is_the_one_that_its_command_writes(tmp_path, tiny_yaml, small_sample):
    study = study_of(tiny_yaml, tmp_path, ("cs_balanced",), seeds=1)
    (job,) = jobs_of(study)
    assert train_main(job.arguments) == 0
    assert (job.folder / "results.json").exists()
    assert [path.name for path in (tmp_path / "mdcs").iterdir()] == [job.folder.name]


def test_studies_that_share_an_arm_share_its_runs(tmp_path):
    main_study, views = (
        asked("--scale", "mini", "--study", name, "--out", str(tmp_path))[0] for name in ("main", "views")
    )
    strong = next(job.folder for job in jobs_of(main_study) if job.group == "dl_strong")
    assert strong == next(job.folder for job in jobs_of(views) if job.group == "dl_weak_strong")


@pytest.fixture
def in_this_process(monkeypatch, small_sample) -> list[Job]:
    """Jobs run here, one after the other, which costs less than a process each. Returns what has run."""
    ran: list[Job] = []

    def run_jobs(module: str, jobs: Sequence[Job], workers: int) -> dict[str, Outcome]:
        assert module == "mdcs.train"
        ran.extend(jobs)
        return {job.name: Outcome(train_main(job.arguments), 0.1) for job in jobs}

    monkeypatch.setattr("shared.study.run_jobs", run_jobs)
    return ran


def test_a_study_of_two_arms_and_three_seeds_leaves_table_verdicts_and_pictures(
    tmp_path, tiny_yaml, in_this_process, monkeypatch, capsys
):
    command = ["--scale", "mini", "--config", str(tiny_yaml), "--methods", "mdcs", "dl_both", "--seeds", "3",
               "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "tiny: 6 runs, 2 methods; 0 were finished before" in printed
    folder = tmp_path / "out" / "mdcs" / "report-tiny-partial"
    assert "6 of 6 runs, " in printed
    assert f"6 runs; report in {folder}" in printed
    assert {path.name for path in folder.iterdir()} == {
        "results.csv", "methods.md", "claims.md", "summary.md", "plots"
    }  # fmt: skip
    assert {path.name for path in (folder / "plots").iterdir()} == {
        f"{n}.{k}" for n in PICTURES for k in ("png", "svg")
    }
    figures = shared_report.figures_of(shared_report.read_rows(folder / "results.csv"), "last_epoch")
    assert set(figures["dl_both/ensemble.accuracy"]) == {0, 1, 2}
    assert set(figures["mdcs/ensemble.variance"]) == {0, 1, 2}, "each seed has its own training set"
    claims = (folder / "claims.md").read_text()
    (lifts,) = [line for line in claims.splitlines() if "lifts the ensemble, same views" in line]
    assert "| 3 |" in lifts
    assert "not run" not in claims, "a part of a study says nothing of what it was not asked"
    methods = (folder / "methods.md").read_text()
    assert [line.split("|")[1].strip() for line in methods.splitlines() if line.startswith("| ")][2:] == [
        "mdcs", "dl_both"
    ]  # fmt: skip
    (head,) = [line for line in methods.splitlines() if line.startswith("| method")]
    assert head.strip("| ").split(" | ") == [
        "method", "ensemble", "head", "middle", "tail", "E1", "E2", "E3", "ECE", "class_std", "variance", "bias",
        "best on test", "n",
    ]  # fmt: skip
    assert "`best on test` is the epoch that the test set would choose, for comparison only" in methods
    assert "| MDCS, `tiny` |" in (folder / "summary.md").read_text()

    before = (folder / "results.csv").read_bytes()
    monkeypatch.setattr("mdcs.plots.draw", nothing_drawn)
    assert main(command) == 0
    assert "6 were finished before" in capsys.readouterr().out
    assert (folder / "results.csv").read_bytes() == before


def test_a_study_with_a_failed_run_reports_the_others_and_ends_with_exit_code_1(
    tmp_path, tiny_yaml, in_this_process, monkeypatch, capsys
):
    real = train_main

    def failing(arguments: Sequence[str]) -> int:
        return 1 if "seed=1" in arguments else real(arguments)

    command = ["--scale", "mini", "--config", str(tiny_yaml), "--methods", "ce", "--out", str(tmp_path)]
    monkeypatch.setattr("mdcs.plots.draw", nothing_drawn)
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "train_main", failing)
        assert main([*command, "--seeds", "2"]) == 1
    assert "1 runs; report in" in capsys.readouterr().out
    assert main([*command, "--seeds", "2"]) == 0
    assert "2 runs; report in" in capsys.readouterr().out


def test_a_study_runs_in_processes_of_its_own(tmp_path, tiny_yaml, monkeypatch, capsys):
    monkeypatch.setattr("mdcs.plots.draw", nothing_drawn)
    command = ["--scale", "mini", "--config", str(tiny_yaml), "--methods", "ce", "dl_weak", "--seeds", "1"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    assert "2 runs; report in" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "mdcs" / "logs").iterdir()} == {"tiny-ce-s0.txt", "tiny-dl-s0.txt"}


def test_another_study_than_the_main_one_has_a_table_and_here_no_verdicts(
    tmp_path, tiny_yaml, in_this_process, monkeypatch
):
    monkeypatch.setattr("mdcs.plots.draw", nothing_drawn)
    command = ["--config", str(tiny_yaml), "--study", "sweeps", "--methods", "experts_4", "--seeds", "1"]
    assert main([*command, "--scale", "mini", "--out", str(tmp_path)]) == 0
    folder = tmp_path / "mdcs" / "report-tiny-sweeps-partial"
    assert {path.name for path in folder.iterdir()} == {"results.csv", "methods.md", "plots"}
    assert "| E4 |" in (folder / "methods.md").read_text()


def test_only_a_whole_study_is_published_and_under_its_configuration_s_name(
    tmp_path, tiny_yaml, in_this_process, monkeypatch
):
    monkeypatch.setattr("mdcs.plots.draw", nothing_drawn)
    monkeypatch.setattr("shared.publish.REPOSITORY", tmp_path / "repository")
    monkeypatch.setattr("shared.run._git", lambda what, *_: "c" * 40 if what == "rev-parse" else "")  # a clean commit
    monkeypatch.setitem(PLANS, "smoke", Plan((str(tiny_yaml),), 3, statistics=False))
    monkeypatch.setattr("mdcs.study.SMOKE", {"ce": MAIN["ce"]})
    assert main(["--scale", "smoke", "--publish", "--out", str(tmp_path / "out")]) == 0
    published = tmp_path / "repository" / "results" / "mdcs" / "tiny"
    assert {path.name for path in published.iterdir()} == {
        "results.csv", "methods.md", "claims.md", "summary.md", "plots"
    }  # fmt: skip
    text = (published / "claims.md").read_text()
    assert text.count("not run") == sum(isinstance(claim, Comparison) for claim in MAIN_CLAIMS)


def test_the_arguments_are_described(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--scale", "--study", "--methods", "--seeds", "--publish"))
    assert isinstance(reproduce.parser(), argparse.ArgumentParser)
