"""The study: methods x seeds, a table, a verdict for each claim, plots. `python -m lightcnn.reproduce --scale mini`."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import check_shared, check_study, find_config, run_main, shown, study_parser
from shared.errors import ConfigError
from shared.publish import publish

if TYPE_CHECKING:
    from lightcnn.config import Config
    from shared.claims import Figures
    from shared.report import Report, Row
    from shared.study import Job


@dataclass(frozen=True)
class Slice:
    """Some methods under one configuration, with so many seeds side by side in each run.

    config: a name in `lightcnn/configs/`, or the path of a file.
    epochs: of the methods `AS_LONG`: what `two_stage` took there, mean over seeds, rounded up (default: all it may).
    two_stage: seeds of the run whose branches the methods `SAME_STAGE1` take (default: as many).
    """

    config: str
    methods: tuple[str, ...]
    seeds: int
    epochs: int | None = None
    two_stage: int | None = None


CORE = ("two_stage", "scratch", "all_at_once", "two_clean", "bn_gap")
OTHERS = ("notebook", "submodel", "wide", "scratch_one_cycle", "lenet5")
ABLATIONS = ("literal", "a_only", "no_transfer", "linear_head", "combined_warp")
MORE = ("scratch_mild", "scratch_augmented", "wide_one_cycle")  # no claim needs them
# Trained in one go for as many epochs as the two stages: none of them stops early.
AS_LONG = ("scratch", "scratch_mild", "scratch_augmented", "submodel", "wide", "lenet5")
# Their stage 1 is that of `two_stage` to the bit; they take its branches.
SAME_STAGE1 = ("all_at_once", "literal", "notebook", "a_only", "no_transfer", "linear_head")
PEERS = ("squeezenet", "shufflenet_v2", "mobilenet_v2_010", "mobilenet_v2_025", "mobilenet_v2_035")
# What a scale runs.
PLANS: dict[str, tuple[Slice, ...]] = {
    "smoke": (Slice("smoke", (*CORE, *OTHERS, *ABLATIONS, *MORE), 2),),
    "mini": (Slice("mini", (*CORE, *OTHERS, *ABLATIONS), 5),),
    "paper": (
        Slice("fashion_mnist", CORE, 5, epochs=57),
        Slice("mnist", CORE, 5, epochs=46),
        Slice("cifar10", CORE, 5, epochs=77),
        Slice("fashion_mnist", (*OTHERS, *ABLATIONS, *MORE), 3, epochs=57, two_stage=5),
        Slice("fashion_mnist_peers", ("bn_gap", *PEERS), 3),
    ),
}
WITHOUT_STATISTICS = {"smoke"}
COLUMNS = {
    "test": "accuracy", "validation": "validation", "branch a": "branch_a.accuracy", "branch b": "branch_b.accuracy",
    "mean of a, b": "branches_mean.accuracy",
}  # fmt: skip


def jobs_of(part: Slice, path: Path, out: Path) -> "list[Job]":
    """One training command a method: all its seeds are trained side by side."""
    from lightcnn.config import Config
    from shared.config import load
    from shared.run import folder_name
    from shared.study import Job

    config, jobs = load(path, Config), []
    for method in part.methods:
        overrides = [f"method={method}"] if method != config.method.name else []
        overrides += [f"seeds={part.seeds}"] if part.seeds != config.seeds else []
        overrides += equal_epochs(method, config, part.epochs)
        branches = two_stage_job(part, path, out).folder if method in SAME_STAGE1 else None
        overrides += [f"stage1.branches={branches}"] if branches else []
        folder = out / "lightcnn" / folder_name(path.stem, method, config.seed, overrides)
        arguments = ("--config", shown(path), "--out", str(out), *overrides)
        jobs.append(Job(method, config.seed, folder, arguments, config.device, after=branches))
    return jobs


def two_stage_job(part: Slice, path: Path, out: Path) -> "Job":
    """The run that trains the branches which a part's methods take; its own, or that of another part."""
    (job,) = jobs_of(replace(part, methods=("two_stage",), seeds=part.two_stage or part.seeds), path, out)
    return job


def queue_of(parts: Sequence[tuple[Slice, Path]], out: Path) -> "list[Job]":
    """All runs of a plan, and those whose branches they take, whether these were asked for or not.

    The configurations go by turns: where the images of one are missing, the runs of another are not given up as well.
    The last of each is begun with, for `two_stage`, which is short, is its first: no core waits long at the end.
    """
    runs: dict[Path, dict[Path, Job]] = {}
    for part, path in parts:
        jobs = jobs_of(part, path, out)
        if any(job.after for job in jobs):
            jobs.append(two_stage_job(part, path, out))
        runs.setdefault(path, {}).update({job.folder: job for job in jobs})
    turns = zip_longest(*(list(own.values())[::-1] for own in runs.values()))
    return [job for turn in turns for job in turn if job is not None]


def equal_epochs(method: str, config: "Config", epochs: int | None) -> list[str]:
    """What makes a method's epochs in all as many as those of the two stages, where a comparison rests on that.

    `epochs` is a slice's. Where a configuration caps the phases, a schedule of fewer phases gets longer ones.
    """
    from lightcnn.algorithm import VARIANTS, nominal_epochs
    from lightcnn.method import unfreezing_schedule

    if method in AS_LONG:
        return [f"plain.epochs={epochs or nominal_epochs(config)}", "plain.patience=0"]
    schedule, cap = VARIANTS.get(method, {}).get("schedule"), config.stage2.max_epochs
    if schedule is None or cap is None:
        return []
    wanted, phases = len(unfreezing_schedule("paper")) * cap, unfreezing_schedule(schedule)
    return [f"stage2.max_epochs={max(1, wanted // len(phases))}"]


def study_rows(config_name: str, results: dict[str, Any], command: str) -> "list[Row]":
    """Figures of the study itself that no run is needed for."""
    from lightcnn.model import MergedCNN
    from shared.report import Row

    values = {
        f"parameters.{name}": sum(p.numel() for p in MergedCNN(channels, size).parameters())
        for name, channels, size in (("mnist", 1, 28), ("cifar10", 3, 32))
    }
    common = {key: results[key] for key in ("device", "precision", "commit")}
    return [
        Row(paper="lightcnn", config=config_name, method="study", seed=0, at="once", split="-", metric=metric,
            value=value, seconds=0.0, command=command, **common)
        for metric, value in values.items()
    ]  # fmt: skip


def methods_table(figures: "Figures", methods: Sequence[str]) -> list[list[str]]:
    """Accuracies in per cent (only those that some method has), then parameters, multiply-adds and epochs run."""
    from shared.report import method_table

    known = {key.split("/", 1)[1] for key in figures if key.split("/", 1)[0] in methods}
    columns = {heading: metric for heading, metric in COLUMNS.items() if metric in known}
    (head, *rows) = method_table(figures, methods, columns, digits=2)
    table = [[*head[:-1], "parameters", "multiply-adds", "epochs", "n"]]
    for row in rows:
        constant = [list(figures[f"{row[0]}/{metric}"].values()) for metric in ("parameters", "multiply_adds")]
        epochs = list(figures[f"{row[0]}/epochs.run"].values())
        shown_epochs = f"{sum(epochs) / len(epochs):.1f}"
        table.append([*row[:-1], *(f"{int(values[0]):,}" for values in constant), shown_epochs, row[-1]])
    return table


def unequal_epochs(figures: "Figures") -> str:
    """A sentence where plain training had not as many epochs as the two stages, which claims say it had; else empty."""
    run = {method: figures.get(f"{method}/epochs.run", {}) for method in ("two_stage", *AS_LONG)}
    if not run["two_stage"]:
        return ""
    mean = sum(run["two_stage"].values()) / len(run["two_stage"])
    other = {method: max(found.values()) for method, found in run.items() if method in AS_LONG and found}
    wrong = [f"{method} {epochs:.0f}" for method, epochs in other.items() if epochs != math.ceil(mean)]
    return f"**Not as many epochs as two_stage ({mean:.1f}): {', '.join(wrong)}.** " if wrong else ""


def report_of(
    path: Path, methods: Sequence[str], rows: "Sequence[Row]", data: Mapping[str, Any], statistics: bool, command: str
) -> "Report":
    """Table and verdicts, from the rows of one configuration; `data` is of a run's `results.json`."""
    from lightcnn.claims import all_claims, peer_claims
    from lightcnn.config import Config
    from shared import report as shared_report
    from shared.claims import judge
    from shared.config import load

    figures = shared_report.figures_of(rows, "final")
    peers = [method for method in methods if method in PEERS]
    claimed = peer_claims(peers) if peers else all_claims(load(path, Config).data.name, data["image"][0])
    judgements = [judge(claim, figures, statistics) for claim in claimed]
    judgements.sort(key=lambda item: item.verdict == "not run")
    seeds = {len(figures[f"{method}/accuracy"]) for method in methods}
    fewer = "Rows of fewer seeds have the first ones; " if len(seeds) > 1 else ""
    about = (
        f"Accuracy in %, mean ± deviation over seeds, on {data['test_images']:,} test images that were read "
        f"once; epochs were chosen on {data['val_images']:,} validation images. {fewer}"
        f"`epochs` were run, not kept. {unequal_epochs(figures)}{rows[0].device}, "
        f"{rows[0].precision}, {shared_report.commits_of(rows)}, `{command}`."
    )
    return shared_report.Report(f"LightCNN, `{path.stem}`", about, methods_table(figures, methods), judgements)


def report(path: Path, jobs: "Sequence[Job]", statistics: bool, folder: Path, command: str) -> None:
    """Write rows, tables, verdicts and plots of the finished runs of one configuration, and print the tables."""
    from lightcnn.plots import draw_all
    from shared import report as shared_report
    from shared.run import read_results
    from shared.study import finished

    done = finished(jobs)
    results = [read_results(job.folder) for job in done]
    rows = [row for result in results for row in shared_report.rows_of(result)]
    rows += study_rows(path.stem, results[0], command)
    found = report_of(path, [job.group for job in done], rows, results[0]["data"], statistics, command)
    shared_report.write_report(folder, rows, found.texts())
    draw_all([job.folder for job in done], folder / "plots")
    shared_report.show(f"{path.stem}: accuracy in % (mean ± deviation over seeds)", found.table)
    shared_report.show(f"{path.stem}: claims", shared_report.claim_table(found.judgements))
    print(f"{len(done)} runs; report in {folder}")


def chosen_slices(asked: argparse.Namespace, scale: str) -> list[Slice]:
    """The scale's plan, narrowed to what was asked for; a configuration keeps the plan of its own name.

    Raises:
        ConfigError: there is no such configuration, or its method is not the paper's as the arms of a study are.
    """
    parts = list(PLANS[scale])
    if asked.config:
        stem = check_arms(find_config(asked.config, "lightcnn")).stem
        own = [part for plan in PLANS.values() for part in plan if part.config == stem] or [Slice(stem, CORE, 3)]
        parts = [replace(part, config=asked.config) for part in own]
    if asked.methods:
        parts = narrowed(parts, asked.methods, 3 if scale == "paper" else parts[0].seeds)
    if asked.seeds:
        parts = [replace(part, seeds=asked.seeds, two_stage=None) for part in parts]
    return parts


def narrowed(parts: Sequence[Slice], methods: Sequence[str], seeds: int) -> list[Slice]:
    """The parts with these methods only, whose runs are then the plan's own; what no part has takes so many `seeds`."""
    found = [replace(part, methods=tuple(method for method in methods if method in part.methods)) for part in parts]
    planned = {method for part in parts for method in part.methods}
    others = tuple(method for method in methods if method not in planned)
    for config in dict.fromkeys(part.config for part in parts):
        first = next(part for part in parts if part.config == config)
        found.append(replace(first, methods=others, seeds=seeds, two_stage=first.seeds))
    return [part for part in found if part.methods]


def check_arms(path: Path) -> Path:
    """The path; ConfigError for choices in `method` which every arm would take for the paper's."""
    from lightcnn.config import Config, TwoStageConfig
    from shared.config import load

    method = load(path, Config).method
    if isinstance(method, TwoStageConfig) and method != TwoStageConfig():
        changed = ", ".join(f"{key}: {value}" for key, value in method if value != getattr(TwoStageConfig(), key))
        raise ConfigError(f"{path.name}: method has {changed}, but a study's two_stage is the paper's; train it with "
                          "`python -m lightcnn.train`")  # fmt: skip
    return path


def reproduce_budget(asked: argparse.Namespace, scale: str, command: str) -> int:
    """The budget study of a scale's configurations, or of the one that was asked for."""
    from lightcnn.study import TEACHER, configs_of, run_budget
    from shared.study import run_configurations

    check_study(asked, ())
    if asked.methods:
        raise ConfigError("--study budget: leave --methods out")
    paths = {path.stem: path for path in configs_of(scale, asked.config)}

    def one(stem: str) -> int:
        """Run and publish the budget study of one configuration; how many of its runs failed."""
        folder, jobs, failed = run_budget(paths[stem], asked.out, asked.workers, asked.seeds, command)
        if asked.publish:
            publish(folder, "lightcnn", stem, jobs, failed, few_seeds={TEACHER})
        return failed

    return 1 if run_configurations(list(paths), one) else 0


def run_reproduce(arguments: Sequence[str]) -> int:
    """The command: 0 when all runs ended well, whatever the verdicts; 1 when a run failed."""
    parser = study_parser("lightcnn", __doc__)
    parser.add_argument(
        "--study",
        default="main",
        choices=("main", "budget"),
        help="main (the paper's claims), budget (the best network within its number of parameters)",
    )
    asked = parser.parse_args(arguments)
    check_shared(__file__)
    from lightcnn.algorithm import METHODS
    from shared.run import command_line
    from shared.study import choose_scale, run_configurations, run_study

    scale, why = choose_scale(asked.scale)
    print(why, flush=True)
    if asked.study == "budget":
        return reproduce_budget(asked, scale, command_line("lightcnn.reproduce", arguments))
    partial = check_study(asked, METHODS)
    parts = [(part, find_config(part.config, "lightcnn")) for part in chosen_slices(asked, scale)]
    jobs: dict[Path, list[Job]] = {}
    for part, path in parts:
        jobs.setdefault(path, []).extend(jobs_of(part, path, asked.out))
    good = run_study("lightcnn.train", scale, queue_of(parts, asked.out), asked.workers)
    paths = {path.stem: path for path in jobs}

    def one(stem: str) -> int:
        """Report and publish one configuration, whose runs have ended; how many of them failed."""
        path, own = paths[stem], jobs[paths[stem]]
        done = [job for job in own if job in good]
        failed = len(own) - len(done)
        folder = asked.out / "lightcnn" / f"report-{path.stem}{'-partial' if partial else ''}"
        statistics = path.stem not in WITHOUT_STATISTICS
        report(path, done, statistics, folder, command_line("lightcnn.reproduce", arguments))
        if asked.publish:
            publish(folder, "lightcnn", stem, own, failed)
        return failed

    return 1 if run_configurations(list(paths), one) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_reproduce, arguments)


if __name__ == "__main__":
    sys.exit(main())
