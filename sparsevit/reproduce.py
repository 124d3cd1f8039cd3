"""The study: arms x seeds, a verdict for each claim, tables, plots. `python -m sparsevit.reproduce --scale mini`."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import check_shared, check_study, find_config, publish, run_main, shown, study_parser
from shared.errors import ConfigError

if TYPE_CHECKING:
    from shared.report import Row
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

    own = load(config_path, Config).method
    jobs = []
    for seed in range(seeds):
        for method in methods:
            overrides = [f"seed={seed}", *([f"method={method}"] if method != own else [])]
            folder = out / "sparsevit" / folder_name(config_path.stem, method, seed, overrides)
            jobs.append(Job(method, seed, folder, ("--config", shown(config_path), "--out", str(out), *overrides)))
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


TITLES = {
    "paired": "accuracy after pruning, paired differences in points [95 %]",
    "methods": "accuracy in % (mean ± deviation over seeds)", "pruners": "pruners, arm none, accuracy in %",
    "latency": "latency", "claims": "the paper's claims, and others",
}  # fmt: skip


def report(config_path: Path, plan: Plan, jobs: "Sequence[Job]", folder: Path, command: str) -> None:
    """Write rows, verdict, tables and plots of the finished runs of one configuration, and print the tables."""
    from shared import report as shared_report
    from shared.checkpoint import atomic_write, write_json
    from shared.claims import judge
    from shared.config import load
    from shared.run import read_results
    from shared.study import finished
    from sparsevit import study
    from sparsevit.claims import all_claims
    from sparsevit.config import Config
    from sparsevit.latency import table as latency_table
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
    figures = shared_report.figures_of(rows, "final")
    judgements = [judge(c, figures, plan.statistics) for c in all_claims(config_path.stem, tokens_of(done[0].folder))]
    judgements.sort(key=lambda item: item.verdict == "not run at this scale")
    tables = {
        "methods": shared_report.method_table(figures, plan.methods, study.COLUMNS),
        "pruners": study.pruner_table(figures, config), "claims": shared_report.claim_table(judgements),
    }  # fmt: skip
    if plan.statistics:
        tables["paired"] = study.paired_table(figures, plan.methods)
    for name, timed in timings.items():
        tables["latency"] = latency_table(timed)
        write_json(
            folder / "latency.json", {"run": name, "device": one["device"], "timings": [asdict(t) for t in timed]}
        )
    shared_report.write_report(
        folder, rows, about(one, rows, command), tables["methods"], f"SparseViT, `{config_path.stem}`", judgements
    )
    texts = {"verdict": study.verdict(figures, plan.statistics) + "\n",
             "cautions": study.cautions(figures, judgements) + "\n"}  # fmt: skip
    texts |= {name: shared_report.markdown(table) for name, table in tables.items()}
    texts["methods"] = f"{about(one, rows, command)}\n\n{texts['methods']}"
    parts = [f"# SparseViT, {config_path.stem}\n\n{texts['verdict']}\n{texts['cautions']}"]
    parts += [f"## {TITLES[name][0].upper()}{TITLES[name][1:]}\n\n{texts[name]}" for name in TITLES if name in tables]
    own = {name: text for name, text in texts.items() if name not in ("methods", "claims")}
    for name, text in (own | {"report": "\n".join(parts)}).items():
        atomic_write(folder / f"{name}.md", text.encode())
    draw([job.folder for job in done], folder / "plots", timings)
    print(f"\n{texts['verdict']}\n{texts['cautions']}")
    for name in (n for n in TITLES if n in tables):
        shared_report.show(f"{config_path.stem}: {TITLES[name]}", tables[name])
    print(f"{len(done)} of {len(jobs)} runs; report in {folder}")


def about(result: Mapping[str, Any], rows: "Sequence[Row]", command: str) -> str:
    """What the table of accuracies is of."""
    from shared.report import commits_of

    return (
        f"Accuracy in %, mean ± deviation over seeds, on {result['data']['test_images']:,} test images; columns in % "
        f"are `global_l1`, one shot, nothing trained after it. {result['device']}, {result['precision']}, "
        f"{commits_of(rows)}, `{command}`."
    )


def tokens_of(folder: Path) -> int:
    """N of a run's network."""
    from sparsevit.shrink import load_network

    return load_network(folder / "model").size.tokens


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
    from shared.study import choose_scale, run_study
    from sparsevit.config import METHODS

    scale, why = choose_scale(asked.scale)
    print(why, flush=True)
    plan = PLANS[scale]
    if asked.config:  # a configuration keeps the plan of the scale that it belongs to
        stem = find_config(asked.config, "sparsevit").stem
        plan = next((p for p in PLANS.values() if stem in p.configs), plan_elsewhere(asked.config))
    partial = check_study(asked, METHODS)
    plan = Plan(plan.configs, tuple(asked.methods or plan.methods), asked.seeds or plan.seeds, plan.statistics)
    if asked.study == "choose":
        return run_choice(asked, plan)
    failed = 0
    for name in [asked.config] if asked.config else plan.configs:
        path = find_config(name, "sparsevit")
        jobs = jobs_of(path, plan.methods, plan.seeds, asked.out)
        failed += run_study("sparsevit.train", path.stem, jobs, asked.workers)
        folder = asked.out / "sparsevit" / f"report-{path.stem}{'-partial' if partial else ''}"
        report(path, plan, jobs, folder, command_line("sparsevit.reproduce", arguments))
        if asked.publish:
            publish(folder, "sparsevit", path.stem)
    return 1 if failed else 0


def run_choice(asked: argparse.Namespace, plan: Plan) -> int:
    """The command with `--study choose`."""
    from shared.run import command_line
    from sparsevit.choose import choose

    if asked.methods or asked.seeds:
        raise ConfigError("--study choose: has arms and seeds of its own; leave --methods and --seeds out")
    name = asked.config or plan.configs[0]
    path, what = find_config(name, "sparsevit"), ["--config", name, "--study", "choose"]
    folder = choose(path, shown(path), asked.out, asked.workers, command_line("sparsevit.reproduce", what))
    if asked.publish:
        publish(folder, "sparsevit", f"{path.stem}_choice")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_reproduce, arguments)


if __name__ == "__main__":
    sys.exit(main())
