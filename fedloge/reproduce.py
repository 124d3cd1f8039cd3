"""The study: methods x seeds, a table, a verdict for each claim, plots. `python -m fedloge.reproduce --scale mini`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from shared.cli import check_shared, check_study, find_config, run_main, shown, study_parser
from shared.publish import publish

if TYPE_CHECKING:
    from shared.report import Report, Row
    from shared.study import Job


@dataclass(frozen=True)
class Plan:
    """What a scale runs: configurations, seeds, and whether its accuracies mean anything."""

    configs: tuple[str, ...]
    seeds: int
    statistics: bool
    left_out: tuple[str, ...] = ()


CIFAR = tuple(f"cifar{n}_lt_if{f}_alpha{a}" for n in (10, 100) for f in (50, 100) for a in ("05", "1"))
PLANS = {
    "smoke": Plan(("smoke",), 1, statistics=False),
    # the network of `mini` has no batch norm, without which FedBN is FedAvg
    "mini": Plan(("mini",), 5, statistics=True, left_out=("fedbn",)),
    "paper": Plan(CIFAR, 3, statistics=True),
}
COLUMNS = {
    "GM": "generic.accuracy", "GM many": "generic.many", "GM medium": "generic.medium", "GM few": "generic.few",
    "PM": "personal.accuracy", "PM worst tenth": "personal.worst_decile", "PM balanced": "personal.balanced",
}  # fmt: skip


def jobs_of(config_path: Path, methods: Sequence[str], seeds: int, out: Path) -> "list[Job]":
    """One training command a method and seed; seeds outermost, so that an early stop leaves whole seeds."""
    from fedloge.config import Config
    from shared.config import load
    from shared.run import folder_name
    from shared.study import Job

    config, jobs = load(config_path, Config), []
    own = config.method.name
    for seed in range(seeds):
        for method in methods:
            overrides = [f"seed={seed}", *([f"method={method}"] if method != own else [])]
            folder = out / "fedloge" / folder_name(config_path.stem, method, seed, overrides)
            arguments = ("--config", shown(config_path), "--out", str(out), *overrides)
            jobs.append(Job(method, seed, folder, arguments, config.device))
    return jobs


def study_rows(config_name: str, results: dict[str, Any], command: str) -> "list[Row]":
    """Figures of the study itself: counts and sizes that no run is needed for."""
    from fedloge.model import build_backbone
    from shared.longtail import exponential_counts
    from shared.report import Row

    values = {
        "images.cifar10_if100": sum(exponential_counts(5000, 10, 100)),
        "images.cifar100_if100": sum(exponential_counts(500, 100, 100)),
        "parameters.resnet18": sum(p.numel() for p in build_backbone("resnet18", 3, 32, seed=0).parameters()),
    }
    common = {key: results[key] for key in ("device", "precision", "commit")}
    return [
        Row(paper="fedloge", config=config_name, method="study", seed=0, at="once", split="-", metric=metric,
            value=value, seconds=0.0, command=command, **common)
        for metric, value in values.items()
    ]  # fmt: skip


def report_of(
    config_path: Path, methods: Sequence[str], rows: "Sequence[Row]", classes: int, statistics: bool, command: str
) -> "Report":
    """Table and verdicts, from the rows of one configuration."""
    from fedloge.claims import all_claims
    from fedloge.config import Config, FedLoGeConfig
    from fedloge.model import build_backbone
    from shared import report as shared_report
    from shared.claims import judge
    from shared.config import load

    config = load(config_path, Config)
    figures = shared_report.figures_of(rows, config.headline)
    theirs = config.method
    if not isinstance(theirs, FedLoGeConfig):  # what the arm of that name has, whatever the file's own method is
        theirs = cast(FedLoGeConfig, load(config_path, Config, ["method=fedloge"]).method)
    width = build_backbone(config.model.name, len(config.data.mean), config.data.image_size or 32, seed=0).feature_dim
    judgements = [
        judge(claim, figures, statistics)
        for claim in all_claims(classes, width, theirs.sparsity, theirs.heads_bias, "fedbn" in methods)
    ]
    judgements.sort(key=lambda item: item.verdict == "not run")
    about = (
        f"Accuracy in %, mean ± deviation over seeds; each run's figure is the mean of its last {config.evaluate.last} "
        f"evaluated rounds on the balanced test set (GM) or the mean over clients on their own (PM). "
        f"{rows[0].device}, {rows[0].precision}, {shared_report.commits_of(rows)}, `{command}`."
    )
    table = shared_report.method_table(figures, methods, COLUMNS)
    return shared_report.Report(f"FedLoGe, `{config_path.stem}`", about, table, judgements)


def report(
    config_path: Path, methods: Sequence[str], jobs: "Sequence[Job]", statistics: bool, folder: Path, command: str
) -> None:
    """Write rows, tables, verdicts and plots of the finished runs of one configuration, and print the tables."""
    from fedloge.plots import draw
    from shared import report as shared_report
    from shared.run import read_results
    from shared.study import finished

    done = finished(jobs)
    results = [read_results(job.folder) for job in done]
    rows = [row for result in results for row in shared_report.rows_of(result)]
    rows += study_rows(config_path.stem, results[0], command)
    classes = len(results[0]["data"]["class_counts"])
    found = report_of(config_path, methods, rows, classes, statistics, command)
    shared_report.write_report(folder, rows, found.texts())
    draw([job.folder for job in done], folder / "plots")
    shared_report.show(f"{config_path.stem}: accuracy in % (mean ± deviation over seeds)", found.table)
    shared_report.show(f"{config_path.stem}: claims", shared_report.claim_table(found.judgements))
    print(f"{len(done)} runs; report in {folder}")


def plan_of(config_name: str) -> Plan:
    """The plan of the scale that a configuration belongs to, or one of its own."""
    own = Plan((config_name,), 3, statistics=True)
    return next((plan for plan in PLANS.values() if config_name in plan.configs), own)


def run_reproduce(arguments: Sequence[str]) -> int:
    """The command: 0 when all runs ended well, whatever the verdicts; 1 when a run failed."""
    asked = study_parser("fedloge", __doc__).parse_args(arguments)
    check_shared(__file__)
    from fedloge.algorithm import METHODS
    from shared.run import command_line
    from shared.study import choose_scale, run_configurations, run_study

    scale, why = choose_scale(asked.scale)
    print(why, flush=True)
    plan = plan_of(find_config(asked.config, "fedloge").stem) if asked.config else PLANS[scale]
    partial = check_study(asked, METHODS)
    methods = asked.methods or [name for name in METHODS if name not in plan.left_out]

    def one(name: str) -> int:
        """Run, report and publish one configuration; how many of its runs failed."""
        path = find_config(name, "fedloge")
        jobs = jobs_of(path, methods, asked.seeds or plan.seeds, asked.out)
        good = run_study("fedloge.train", path.stem, jobs, asked.workers)
        folder = asked.out / "fedloge" / f"report-{path.stem}{'-partial' if partial else ''}"
        report(path, methods, good, plan.statistics, folder, command_line("fedloge.reproduce", arguments))
        if asked.publish:
            publish(folder, "fedloge", path.stem, jobs, len(jobs) - len(good))
        return len(jobs) - len(good)

    return 1 if run_configurations([asked.config] if asked.config else plan.configs, one) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_reproduce, arguments)


if __name__ == "__main__":
    sys.exit(main())
