"""The budget study: what each ingredient brings within the paper's number of parameters, one added after the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightcnn.claims import budget_claims
from lightcnn.config import BudgetConfig, Config
from lightcnn.plots import draw_ladder
from shared import report as shared_report
from shared.claims import Figures, judge, show_difference, show_mean
from shared.cli import find_config, shown
from shared.config import load
from shared.errors import ConfigError
from shared.metrics import paired_difference
from shared.run import folder_name, read_results
from shared.study import Job, finished, run_jobs

if TYPE_CHECKING:
    from shared.report import Row

CONFIGS = {
    "smoke": ("budget_smoke",), "mini": ("budget_mini",),
    "paper": ("budget_fashion_mnist", "budget_mnist", "budget_cifar10"),
}  # fmt: skip
SEEDS, FINAL_SEEDS = 3, 5
SHORT = 3  # the lower rungs have a third of the final recipe's epochs
TEACHER = "teacher"
TEACHER_LAYOUTS = {1: "c16 c32 P c64 r64 P c96 r96", 3: "c32 c64 P c96 r96 P c128 r128"}  # by the images' channels
TEACHER_EPOCHS = 20
CONVOLUTIONS = "c16 c16 P c24 c24 P p32"  # `baselines.BnGap`: 12,410 parameters for one channel


@dataclass(frozen=True)
class Rung:
    """An arm of the study: what it adds to the one before, and the overrides that take away what comes after it."""

    name: str
    adds: str
    without: tuple[str, ...]


RUNGS = (
    Rung("plain", "the paper's merged network in one go: Nadam, batches of 32, clean images",
         ("method.optimizer=nadam", "method.batch_size=32")),
    Rung("one_cycle", "SGD whose rate rises and falls, batches of 128",
         ("method.layout=merged", "method.peak_lr=0.01", "method.decay=0.0001")),
    Rung("norm_and_pooling",
         "3x3 convolutions with batch norm, global pooling, no dropout, pixels in [-1, 1], other rate and decay",
         (f"method.layout={CONVOLUTIONS}",)),
    Rung("separable", "depthwise separable convolutions with residuals: deeper and wider",
         ("method.shift=0", "method.flip=false", "method.rotation=0.0", "method.zoom=0.0")),
    Rung("augmentation", "small shifts; flips, or on digits rotation and zoom", ("method.epochs=short",)),
    Rung("longer", f"{SHORT} times the epochs", ("method.teacher=null",)),
    Rung("distillation", "the probabilities of a larger network trained on the same images", ()),
)  # fmt: skip


def overrides_of(rung: Rung, method: BudgetConfig) -> list[str]:
    """The configuration's recipe without what the rungs above add."""
    values: dict[str, str] = {}
    for upper in reversed(RUNGS[RUNGS.index(rung) :]):
        values |= dict(change.split("=", 1) for change in upper.without)
    if "method.epochs" in values:
        values["method.epochs"] = str(max(1, method.epochs // SHORT))
    return [f"{key}={value}" for key, value in values.items()]


def teacher_job(path: Path, config: Config, out: Path) -> Job:
    """The one teacher that all seeds share."""
    epochs = min(TEACHER_EPOCHS, method_of(config).epochs)
    layout = TEACHER_LAYOUTS[3 if config.data.name == "cifar10" else 1]
    return job_of(TEACHER, 0, [f"method.layout={layout}", f"method.epochs={epochs}"], path, config, out)


def jobs_of(path: Path, config: Config, teacher: Path, out: Path, seeds: int | None) -> list[Job]:
    """One training command a rung and seed, the upper rungs first: they take longest."""
    jobs = []
    for rung in reversed(RUNGS):
        changes = overrides_of(rung, method_of(config))
        if not rung.without:
            changes = [f"method.teacher={teacher}"]
        count = seeds or (SEEDS if rung.without else FINAL_SEEDS)
        jobs += [job_of(rung.name, seed, changes, path, config, out) for seed in range(count)]
    return jobs


def job_of(arm: str, seed: int, changes: Sequence[str], path: Path, config: Config, out: Path) -> Job:
    """One training command."""
    overrides = [f"seed={seed}", *changes]
    folder = out / "lightcnn" / folder_name(path.stem, "budget", seed, overrides)
    return Job(arm, seed, folder, ("--config", shown(path), "--out", str(out), *overrides), config.device)


def method_of(config: Config) -> BudgetConfig:
    """The configuration's recipe; ConfigError where it is another method's."""
    if not isinstance(config.method, BudgetConfig):
        raise ConfigError(f"method: the budget study wants method budget, not {config.method.name}")
    return config.method


def run_budget(path: Path, out: Path, workers: int, seeds: int | None, command: str) -> tuple[Path, list[Job], int]:
    """The teacher, then all rungs, then the report; returns its folder, the runs and how many failed.

    Without its teacher the last rung is not run, and counts as failed.
    """
    config = load(path, Config)
    teacher = teacher_job(path, config, out)
    jobs = jobs_of(path, config, teacher.folder, out, seeds)
    print(f"{path.stem}: a teacher, then {len(jobs)} runs of {len(RUNGS)} rungs", flush=True)
    outcomes = run_jobs("lightcnn.train", [teacher], workers)
    taught = outcomes[teacher.name].code == 0
    possible = [job for job in jobs if taught or job.group != RUNGS[-1].name]
    outcomes |= run_jobs("lightcnn.train", possible, workers)
    done = finished([job for job in (teacher, *possible) if outcomes[job.name].code == 0])
    folder = out / "lightcnn" / f"report-{path.stem}{'-partial' if seeds else ''}"
    report(path, done, folder, command)
    return folder, [teacher, *jobs], 1 + len(jobs) - len(done)


def report_of(path: Path, rows: "Sequence[Row]", data: Mapping[str, Any], command: str) -> shared_report.Report:
    """The table of ingredients and the verdicts on the aims, from the rows; `data` is of a run's `results.json`."""
    figures = shared_report.figures_of(rows, "final")
    judgements = [judge(claim, figures, path.stem != "budget_smoke")
                  for claim in budget_claims(load(path, Config).data.name, data["image"][0])]  # fmt: skip
    about = (
        "Accuracy in %, mean ± deviation over seeds, of each run's best epoch on "
        f"{data['val_images']:,} validation images; {data['test_images']:,} test images were read once, after "
        "all training. The gain is that of a row over the one above it, on the test images, over the seeds that both "
        "rows have (n is of the accuracies), with its 95 % interval; all students have the same teacher, so the last "
        "gain's does not cover another one. "
        f"{rows[-1].device}, {rows[-1].precision}, {shared_report.commits_of(rows)}, `{command}`."
    )
    return shared_report.Report(f"LightCNN, `{path.stem}`", about, ingredients(figures), judgements)


def report(path: Path, done: Sequence[Job], folder: Path, command: str) -> None:
    """Write rows, the table of ingredients and the verdicts on the aims, and print both."""
    results = [read_results(job.folder) for job in done]
    rows: list[Row] = [
        replace(row, method=job.group)
        for job, one in zip(done, results, strict=True)
        for row in shared_report.rows_of(one)
    ]
    found = report_of(path, rows, results[-1]["data"], command)
    shared_report.write_report(folder, rows, found.texts())
    draw_ladder(shared_report.figures_of(rows, "final"), [rung.name for rung in RUNGS] + [TEACHER], folder / "plots")
    shared_report.show(f"{path.stem}: what each ingredient brings", found.table)
    shared_report.show(f"{path.stem}: the aims", shared_report.claim_table(found.judgements))
    print(f"{len(done)} runs; report in {folder}")


def ingredients(figures: Figures) -> list[list[str]]:
    """One row a rung, the teacher last."""
    table = [["arm", "adds", "parameters", "multiply-adds", "epochs", "validation", "test", "gain", "n"]]
    before: dict[int, float] = {}
    texts = {rung.name: rung.adds for rung in RUNGS} | {TEACHER: "the larger network itself"}
    for name, adds in texts.items():
        test = dict(figures.get(f"{name}/accuracy", {}))
        if not test:
            continue
        constant = ("parameters", "multiply_adds", "epochs.run")
        sizes = [f"{int(next(iter(figures[f'{name}/{metric}'].values()))):,}" for metric in constant]
        both = sorted(set(before) & set(test))
        gain = "-"
        if len(both) > 1 and name != TEACHER:
            gain = show_difference(paired_difference([test[s] for s in both], [before[s] for s in both]))
        means = [show_mean(list(v.values()), digits=2) for v in (figures[f"{name}/validation"], test)]
        table.append([name, adds, *sizes, *means, gain, str(len(test))])
        before = test
    return table


def configs_of(scale: str, asked: str | None) -> list[Path]:
    """The configurations of a scale, or the one that was asked for."""
    return [find_config(name, "lightcnn") for name in ([asked] if asked else CONFIGS[scale])]
