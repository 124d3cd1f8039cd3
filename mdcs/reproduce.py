"""The study: arms x seeds, a table, a verdict for each claim, plots. `python -m mdcs.reproduce --scale mini`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import check_shared, check_study, find_config, run_main, shown, study_parser
from shared.errors import ConfigError
from shared.publish import publish

if TYPE_CHECKING:
    from mdcs.study import Arms
    from shared.report import Report, Row
    from shared.study import Job


@dataclass(frozen=True)
class Plan:
    """What a scale runs: configurations, seeds, and whether its accuracies mean anything."""

    configs: tuple[str, ...]
    seeds: int
    statistics: bool
    arms: tuple[str, ...] = ()  # some of the study's, where not all are affordable


PLANS = {
    "smoke": Plan(("smoke",), 1, statistics=False),
    "mini": Plan(("mini",), 4, statistics=True),
    "paper": Plan(("cifar100_lt_if100", "cifar10_lt_if100"), 3, statistics=True),
}
# Real CIFAR-10-LT on a CPU: not a scale of its own, for it needs the data set and hours.
CIFAR_ON_CPU = Plan(("cifar10_lt_if100_cpu",), 3, True, ("mdcs", "balanced_softmax", "ce"))


@dataclass(frozen=True)
class Study:
    """One configuration, the arms that are run on it, and how often."""

    config_path: Path
    name: str
    arms: "Arms"
    seeds: int
    statistics: bool
    out: Path
    partial: bool
    chosen: bool = False  # its plan has some of the study's arms only

    @property
    def whole(self) -> bool:
        """Whether it asks all that the main study asks."""
        return self.name == "main" and not self.partial and not self.chosen

    @property
    def title(self) -> str:
        """Its name in the tables of all papers."""
        return self.config_path.stem + ("" if self.name == "main" else f", {self.name}")

    @property
    def report_folder(self) -> Path:
        """Where its report goes: one a study, and another for parts of one."""
        kind = ("" if self.name == "main" else f"-{self.name}") + ("-partial" if self.partial else "")
        return self.out / "mdcs" / f"report-{self.config_path.stem}{kind}"


def jobs_of(study: Study) -> "list[Job]":
    """One training command an arm and seed; seeds outermost, so that an early stop leaves whole seeds."""
    from mdcs.config import Config
    from shared.config import load
    from shared.run import folder_name
    from shared.study import Job

    jobs = []
    for seed in range(study.seeds):
        for arm, changes in study.arms.items():
            overrides = [f"seed={seed}", *changes]
            config = load(study.config_path, Config, overrides)
            folder = study.out / "mdcs" / folder_name(study.config_path.stem, config.method.name, seed, overrides)
            arguments = ("--config", shown(study.config_path), "--out", str(study.out), *overrides)
            jobs.append(Job(arm, seed, folder, arguments, config.device))
    return jobs


def collect(study: Study, jobs: "Sequence[Job]", command: str) -> "list[Row]":
    """The rows of all finished runs under their arms' names, and those that several runs give together."""
    from mdcs.study import gain_figures, variance_figures
    from shared.report import Row, figures_of, rows_of
    from shared.run import read_results
    from shared.study import finished

    done = [(job, read_results(job.folder)) for job in finished(jobs)]
    rows = [replace(row, method=job.group) for job, results in done for row in rows_of(results)]
    one: dict[str, Any] = {key: done[0][1][key] for key in ("paper", "config", "device", "precision", "commit")}

    def add(method: str, seed: int, at: str, split: str, values: dict[str, float]) -> None:
        """One row a value."""
        rows.extend(
            Row(**one, method=method, seed=seed, at=at, split=split, metric=name, value=value, seconds=0.0,
                command=command)
            for name, value in values.items()
        )  # fmt: skip

    own_draws = len({tuple(results["data"]["digests"].values()) for _, results in done}) > 1
    seeds = set.intersection(*({job.seed for job, _ in done if job.group == arm} for arm in study.arms))
    for arm in study.arms if own_draws else ():  # over the same draws for all arms
        folders = {job.seed: job.folder for job, _ in done if job.group == arm and job.seed in seeds}
        for seed, values in variance_figures(folders, done[0][1]["data"]["thirds"]).items():
            add(arm, seed, "last_epoch", "test", values)
    for name, gains in gain_figures(figures_of(rows, "last_epoch")).items():
        for seed, gain in gains.items():
            add("study", seed, "last_epoch", "test", {name: gain})
    add("study", 0, "once", "-", constants())
    return rows


def constants() -> dict[str, float]:
    """Figures of the study itself: counts, sizes and the worked example, for which nothing is trained."""
    import torch

    from mdcs.config import MdcsConfig
    from mdcs.method import mdcs_loss
    from mdcs.model import Architecture, build_model
    from shared.longtail import exponential_counts

    rows = torch.tensor([[2.0, 1, 0], [0, 1, 2], [0.5, 0.2, -0.1], [1, 0, 0]], dtype=torch.float64)
    logits, targets = rows[:, None].expand(4, 3, 3), torch.tensor([0, 2])
    lambdas = MdcsConfig().lambdas
    example = [float(mdcs_loss(logits, targets, [100, 10, 1], lambdas, 0.6, ramp, 1.0)) for ramp in (0.05, 1.0)]
    sizes = {
        f"parameters.cifar{classes}": sum(
            p.numel() for p in build_model(Architecture("resnet_cifar", classes, 3, reduced=True), 0).parameters()
        )
        for classes in (10, 100)
    }
    return {
        "images.cifar10_if100": sum(exponential_counts(5000, 10, 100)),
        "images.cifar100_if100": sum(exponential_counts(500, 100, 100)),
        "lambdas.mean": sum(lambdas) / len(lambdas), "example.epoch_1": example[0], "example.epoch_20": example[1],
        **sizes,
    }  # fmt: skip


def report_of(study: Study, rows: "Sequence[Row]", command: str) -> "Report":
    """Table and verdicts, from the rows of one study."""
    from mdcs.claims import ALL_CLAIMS, MAIN_CLAIMS
    from mdcs.study import columns_of, with_best
    from shared import report as shared_report
    from shared.claims import Fact, judge

    figures = with_best(shared_report.figures_of(rows, "last_epoch"), shared_report.figures_of(rows, "best_on_test"))
    table = shared_report.method_table(figures, list(study.arms), columns_of(study.arms, figures))
    one = rows[0]
    about = (
        f"In %, mean ± deviation over seeds, of the last epoch on the balanced test set; `best on test` is the epoch "
        f"that the test set would choose, for comparison only. Equal epochs and batches for all arms. {one.device}, "
        f"{one.precision}, {shared_report.commits_of(rows)}, `{command}`."
    )
    claims_asked = MAIN_CLAIMS if study.name == "main" else ALL_CLAIMS
    judgements = [judge(claim, figures, study.statistics) for claim in claims_asked]
    if not study.whole:  # what it does not ask is not "not run"
        judgements = [j for j in judgements if j.verdict != "not run" and not isinstance(j.claim, Fact)]
    judgements.sort(key=lambda item: item.verdict == "not run")
    return shared_report.Report(f"MDCS, `{study.title}`", about, table, judgements)


def report(study: Study, jobs: "Sequence[Job]", command: str) -> None:
    """Write rows, tables, verdicts and plots of the finished runs of one configuration, and print the tables."""
    from mdcs.plots import draw
    from shared import report as shared_report

    rows, folder = collect(study, jobs, command), study.report_folder
    found = report_of(study, rows, command)
    shared_report.write_report(folder, rows, found.texts())
    shared_report.show(f"{study.title}: in % (mean ± deviation over seeds)", found.table)
    if found.judgements:
        shared_report.show(f"{study.title}: claims", shared_report.claim_table(found.judgements))
    done = {job: job.folder for job in jobs if (job.folder / "results.json").exists()}
    draw([(job.group, path) for job, path in done.items()], folder / "plots")
    print(f"{len(done)} runs; report in {folder}")


def plan_of(config_name: str) -> Plan:
    """The plan of the scale that a configuration belongs to, or one of its own."""
    plans = (*PLANS.values(), CIFAR_ON_CPU)
    return next((plan for plan in plans if config_name in plan.configs), Plan((config_name,), 3, statistics=True))


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = study_parser("mdcs", __doc__, "arms")
    studies = "main, distillation (what it adds, many seeds), views (baselines on the strong view and on both), "
    studies += "sweeps (lambda, alpha, temperature, number of experts), variance (a subset of its own for each seed)"
    parser.add_argument("--study", default="main", help=studies)
    return parser


def planned(asked: argparse.Namespace) -> list[Study]:
    """The studies that the arguments ask for.

    Raises:
        ConfigError: there is no such scale, study or arm, or what was asked cannot be published.
    """
    from mdcs.config import Config
    from mdcs.study import LEAST_SEEDS, MAIN, SMOKE, STUDIES
    from shared.config import load
    from shared.study import choose_scale

    scale, why = choose_scale(asked.scale)
    print(why, flush=True)
    plan = plan_of(find_config(asked.config, "mdcs").stem) if asked.config else PLANS[scale]
    if asked.study not in STUDIES:
        raise ConfigError(f"--study {asked.study}: unknown; choose from {', '.join(STUDIES)}")
    arms = SMOKE if asked.study == "main" and not plan.statistics else STUDIES[asked.study]
    partial = check_study(asked, STUDIES[asked.study])
    if plan.arms and asked.study == "main":
        arms = {name: MAIN[name] for name in plan.arms}
    if asked.methods:
        arms = {name: STUDIES[asked.study][name] for name in asked.methods}
    seeds = asked.seeds or max(plan.seeds, LEAST_SEEDS.get(asked.study, 1))
    names = [asked.config] if asked.config else plan.configs
    for name in names:
        own = load(find_config(name, "mdcs"), Config).method.name
        bare = [arm for arm, changes in arms.items() if not any(c.startswith("method=") for c in changes)]
        if own != "mdcs" and bare:
            raise ConfigError(f"{name}: has the method {own}, but the arm {bare[0]} is made of mdcs; choose --methods")
    return [
        Study(find_config(name, "mdcs"), asked.study, arms, seeds, plan.statistics, asked.out, partial, bool(plan.arms))
        for name in names
    ]


def run_reproduce(arguments: Sequence[str]) -> int:
    """The command: 0 when all runs ended well, whatever the verdicts; 1 when a run failed."""
    asked = parser().parse_args(arguments)
    check_shared(__file__)
    from shared.run import command_line
    from shared.study import run_configurations, run_study

    studies = {study.config_path.stem: study for study in planned(asked)}

    def one(stem: str) -> int:
        """Run, report and publish one study; how many of its runs failed."""
        study, jobs = studies[stem], jobs_of(studies[stem])
        good = run_study("mdcs.train", stem, jobs, asked.workers)
        report(study, good, command_line("mdcs.reproduce", arguments))
        if asked.publish:
            name = stem if study.name == "main" else f"{stem}_{study.name}"
            publish(study.report_folder, "mdcs", name, jobs, len(jobs) - len(good))
        return len(jobs) - len(good)

    return 1 if run_configurations(list(studies), one) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_reproduce, arguments)


if __name__ == "__main__":
    sys.exit(main())
