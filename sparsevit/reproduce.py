"""The study: arms x seeds, a verdict for each claim, tables, plots. `python -m sparsevit.reproduce --scale mini`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shared.cli import check_shared, check_study, find_config, run_main, shown, study_parser
from shared.errors import ConfigError
from shared.publish import publish

if TYPE_CHECKING:
    from shared.study import Job
    from sparsevit.config import Config
    from sparsevit.latency import Timing


@dataclass(frozen=True)
class Plan:
    """What a scale runs: configurations, arms, seeds, and whether its accuracies mean anything."""

    configs: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int
    statistics: bool


ARMS = ("none", "paper", "null", "flip", "attn_l1", "paper_strong", "attn_sparse", "l1", "ffn_log", "group")
# The coefficients of the other arms were chosen for `mini`; elsewhere they would be no fair opponents.
ARMS_ELSEWHERE = ("none", "paper", "null", "flip", "attn_l1", "paper_strong")
PLANS = {
    "smoke": Plan(("smoke",), (*ARMS, "ffn_l1"), 1, statistics=False),
    "mini": Plan(("mini",), ARMS, 5, statistics=True),
    "paper": Plan(tuple(f"{d}_authors" for d in ("cifar10", "cifar100", "imagenet100")),
                  ("none", "paper", "null", "flip"), 5, statistics=True),
}  # fmt: skip


def jobs_of(config_path: Path, methods: Sequence[str], seeds: int, out: Path) -> "list[Job]":
    """One training command an arm and seed; seeds outermost, so that an early stop leaves whole seeds."""
    from shared.config import load
    from shared.run import folder_name
    from shared.study import Job
    from sparsevit.config import Config

    config, jobs = load(config_path, Config), []
    for seed in range(seeds):
        for method in methods:
            overrides = [f"seed={seed}", *([f"method={method}"] if method != config.method else [])]
            folder = out / "sparsevit" / folder_name(config_path.stem, method, seed, overrides)
            arguments = ("--config", shown(config_path), "--out", str(out), *overrides)
            jobs.append(Job(method, seed, folder, arguments, config.device))
    return jobs


def time_runs(jobs: "Sequence[Job]", config: "Config") -> "dict[str, list[Timing]]":
    """Latency of the dense, masked and smaller networks of one run without a penalty, with nothing beside it."""
    from shared.gpu import setup
    from sparsevit.latency import time_networks, variants_of_run
    from sparsevit.study import TIMED_BATCHES

    device = setup(config.device, config.threads)
    chosen = [job for job in jobs if job.group == "none" and config.prune.removals][:1]
    return {job.name: time_networks(variants_of_run(job.folder, config, device), TIMED_BATCHES, device)
            for job in chosen}  # fmt: skip


def report(config_path: Path, plan: Plan, jobs: "Sequence[Job]", folder: Path, command: str) -> None:
    """Write rows, verdict, tables and plots of the finished runs of one configuration, and print the tables."""
    from shared import report as shared_report
    from shared.config import load
    from shared.run import environment, read_results
    from shared.study import finished
    from sparsevit import study
    from sparsevit.config import Config
    from sparsevit.latency import REPEATS, write_timings
    from sparsevit.plots import draw

    done = finished(jobs)
    config, results = load(config_path, Config), {job.name: read_results(job.folder) for job in done}
    one, timings = next(iter(results.values())), time_runs(done, config)
    rows = [row for result in results.values() for row in shared_report.rows_of(result)]
    common = {key: one[key] for key in ("device", "precision", "commit")}
    found = study.study_figures(rows, results, timings if plan.statistics else {}, config_path.stem)
    rows += [
        shared_report.Row(paper="sparsevit", config=config_path.stem, method="study", seed=seed, at="final", split="-",
                          metric=name, value=value, seconds=0.0, command=command, **common)
        for (name, seed), value in found.items()
    ]  # fmt: skip
    timed = next(iter(timings.values()), [])
    if timed:
        where = environment(command) | common | {"precision": "float32"}
        write_timings(folder / "timings.csv", timed, REPEATS, where)
    told = study.report_of(config_path, plan.methods, rows, one["data"], timed, plan.statistics, command)
    shared_report.write_report(folder, rows, told.texts())
    draw([job.folder for job in done], folder / "plots", timings)
    print(f"\n{told.verdict}\n\n{told.cautions}\n")
    for name in (n for n in study.TITLES if n in told.tables):
        shared_report.show(f"{config_path.stem}: {study.TITLES[name]}", told.tables[name])
    print(f"{len(done)} runs; report in {folder}")


def plan_of(config_name: str) -> Plan:
    """The plan of the scale that a configuration belongs to, or one of its own."""
    stem = find_config(config_name, "sparsevit").stem
    return next((plan for plan in PLANS.values() if stem in plan.configs), None) or plan_elsewhere(config_name)


def plan_elsewhere(config_name: str) -> Plan:
    """The plan of a configuration that is no scale's own: arms that need no choice, and its own."""
    from shared.config import load
    from sparsevit.config import Config

    path = find_config(config_name, "sparsevit")
    return Plan((path.stem,), tuple(dict.fromkeys((*ARMS_ELSEWHERE, load(path, Config).method))), 5, statistics=True)


def run_reproduce(arguments: Sequence[str]) -> int:
    """The command: 0 when all runs ended well, whatever the verdicts; 1 when a run failed."""
    parser = study_parser("sparsevit", __doc__, "arms")
    parser.add_argument("--study", default="main", choices=("main", "choose"),
                        help="main, or choose: the coefficients of our arms on held-out images, before it")  # fmt: skip
    asked = parser.parse_args(arguments)
    check_shared(__file__)
    from shared.run import command_line
    from shared.study import choose_scale, run_configurations, run_study
    from sparsevit.config import METHODS

    scale, why = choose_scale(asked.scale)
    print(why, flush=True)
    plan = plan_of(asked.config) if asked.config else PLANS[scale]
    partial = check_study(asked, METHODS)
    plan = Plan(plan.configs, tuple(asked.methods or plan.methods), asked.seeds or plan.seeds, plan.statistics)
    if asked.study == "choose":
        return run_choice(asked, plan)

    def one(name: str) -> int:
        """Run, report and publish one configuration; how many of its runs failed."""
        path = find_config(name, "sparsevit")
        jobs = jobs_of(path, plan.methods, plan.seeds, asked.out)
        good = run_study("sparsevit.train", path.stem, jobs, asked.workers)
        folder = asked.out / "sparsevit" / f"report-{path.stem}{'-partial' if partial else ''}"
        report(path, plan, good, folder, command_line("sparsevit.reproduce", arguments))
        if asked.publish:
            publish(folder, "sparsevit", path.stem, jobs, len(jobs) - len(good))
        return len(jobs) - len(good)

    return 1 if run_configurations([asked.config] if asked.config else plan.configs, one) else 0


def run_choice(asked: argparse.Namespace, plan: Plan) -> int:
    """The command with `--study choose`."""
    from shared.run import command_line
    from sparsevit.choose import choose

    if asked.methods or asked.seeds:
        raise ConfigError("--study choose: has arms and seeds of its own; leave --methods and --seeds out")
    name = asked.config or plan.configs[0]
    path, what = find_config(name, "sparsevit"), ["--config", name, "--study", "choose"]
    folder, jobs = choose(path, shown(path), asked.out, asked.workers, command_line("sparsevit.reproduce", what))
    if asked.publish:
        publish(folder, "sparsevit", f"{path.stem}_choice", jobs, failed=0)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_reproduce, arguments)


if __name__ == "__main__":
    sys.exit(main())
