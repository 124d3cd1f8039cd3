"""The study: arms x seeds, a verdict for each claim, tables, plots. `python -m sparsevit.reproduce --scale mini`."""

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.cli import REPOSITORY, check_shared, find_config, run_main
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


ARMS = ("none", "paper", "null", "attn_l1", "paper_strong", "attn_sparse", "l1", "ffn_log", "group")
PLANS = {
    "smoke": Plan(("smoke",), (*ARMS, "flip", "ffn_l1"), 1, statistics=False),
    "mini": Plan(("mini",), ARMS, 5, statistics=True),
    "paper": Plan(tuple(f"{d}_authors" for d in ("cifar10", "cifar100", "imagenet100")), ("none", "paper", "null"), 5,
                  statistics=True),
}  # fmt: skip
COLUMNS = {
    "dense": "dense.accuracy", "30 %": "global_l1.30.accuracy", "50 %": "global_l1.50.accuracy",
    "70 %": "global_l1.70.accuracy", "80 %": "global_l1.80.accuracy", "90 %": "global_l1.90.accuracy",
    "50 % neurons": "neurons.50.accuracy", "75 % neurons": "neurons.75.accuracy", "trained on": "neurons.75.recovered",
    "75 % neurons, heads": "neurons_heads.75.accuracy", "silent": "neurons.silent",
}  # fmt: skip
TIMED_BATCHES = (1, 64)


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


def shown(path: Path) -> str:
    """A path from the repository, so that the recorded command works for others."""
    path = path.resolve()
    return str(path.relative_to(REPOSITORY)) if path.is_relative_to(REPOSITORY) else str(path)


def time_runs(jobs: "Sequence[Job]", config: "Config") -> "dict[str, list[Timing]]":
    """Latency of the dense, masked and smaller networks of one run without a penalty, with nothing beside it."""
    from shared.gpu import setup
    from sparsevit.latency import time_networks, variants_of_run

    device = setup(config.device, config.threads)
    chosen = [job for job in jobs if job.group == "none" and config.prune.removals][:1]
    return {job.name: time_networks(variants_of_run(job.folder, config, device), TIMED_BATCHES, device)
            for job in chosen}  # fmt: skip


def study_figures(
    rows: "Sequence[Row]", results: Mapping[str, Any], timings: "Mapping[str, Sequence[Timing]]"
) -> dict[tuple[str, int], float]:
    """Figures of the study itself, by name and seed: paired effects, protocol, counts, bounds, speed."""
    from shared.report import figures_of
    from sparsevit.claims import paired_figures
    from sparsevit.model import arch_size, count_parameters, count_prunable

    found = {(name, s): v for name, per_seed in paired_figures(figures_of(rows, "final")).items()
             for s, v in per_seed.items()}  # fmt: skip
    digests: dict[int, set[str]] = {}
    misses = [0.0]
    for result in results.values():
        digests.setdefault(result["seed"], set()).add(result["order_digest"])
        values = {row["metric"]: row["value"] for row in result["figures"]}
        n = int(values["dense.prunable"])
        for name, value in values.items():
            if name.startswith("global_l1.") and name.endswith(".nonzero"):
                ratio = float(name.removeprefix("global_l1.").removesuffix(".nonzero")) / 100
                misses.append(abs(values["dense.nonzero"] - value - round(ratio * n)))
    size = arch_size("vit_b16", 384, 3, 10)
    once = {
        "batches.same": float(all(len(seen) == 1 for seen in digests.values())), "zeros.miss": max(misses),
        "vit_b16.parameters": float(count_parameters(size)), "vit_b16.prunable": float(count_prunable(size)),
        "bound.term_384": largest_term(size.tokens),
    }  # fmt: skip
    names = {"50 % zeros, masked": "masked", "50 % neurons removed": "neurons", "50 % heads removed": "heads",
             "50 % neurons and heads removed": "neurons_heads"}  # fmt: skip
    for timed in timings.values():
        once |= {
            f"speed.{names[t.name]}": t.speedup for t in timed if t.batch == max(TIMED_BATCHES) and t.name in names
        }
    return found | {(name, 0): value for name, value in once.items()}


def largest_term(tokens: int) -> float:
    """0.01 R of the map with the largest penalty, one-hot rows, computed by the code that trains with it."""
    import torch

    from sparsevit.method import attention_penalty

    return 0.01 * float(attention_penalty(torch.eye(tokens)[None, None]))


def report(config_path: Path, plan: Plan, jobs: "Sequence[Job]", folder: Path, command: str) -> None:
    """Write rows, tables, verdicts and plots of the finished runs of one configuration, and print the tables."""
    from shared import report as shared_report
    from shared.checkpoint import atomic_write, write_json
    from shared.claims import judge
    from shared.config import load
    from shared.run import read_results
    from sparsevit.claims import all_claims
    from sparsevit.config import Config
    from sparsevit.latency import table as latency_table
    from sparsevit.plots import draw

    done = [job for job in jobs if (job.folder / "results.json").exists()]
    if not done:
        raise ConfigError("no run of the study has finished; the lines above say why")
    config, results = load(config_path, Config), {job.name: read_results(job.folder) for job in done}
    one, timings = next(iter(results.values())), time_runs(done, config)
    rows = [row for result in results.values() for row in shared_report.rows_of(result)]
    common = {key: one[key] for key in ("device", "precision", "commit")}
    rows += [
        shared_report.Row(paper="sparsevit", config=config_path.stem, method="study", seed=seed, at="final", split="-",
                          metric=name, value=value, seconds=0.0, command=command, **common)
        for (name, seed), value in study_figures(rows, results, timings if plan.statistics else {}).items()
    ]  # fmt: skip
    figures = shared_report.figures_of(rows, "final")
    tokens = tokens_of(done[0].folder)
    judgements = [judge(claim, figures, plan.statistics) for claim in all_claims(config_path.stem, tokens)]
    judgements.sort(key=lambda item: item.verdict == "not run at this scale")
    tables = {"methods": shared_report.method_table(figures, plan.methods, COLUMNS),
              "pruners": pruner_table(figures, config), "claims": shared_report.claim_table(judgements)}  # fmt: skip
    for name, timed in timings.items():
        tables["latency"] = latency_table(timed)
        write_json(
            folder / "latency.json", {"run": name, "device": one["device"], "timings": [asdict(t) for t in timed]}
        )
    shared_report.write_rows(folder / "results.csv", rows)
    text = (
        f"Accuracy in %, mean ± deviation over seeds, on {one['data']['test_images']:,} test images; columns in % are "
        f"`global_l1`, one shot, nothing trained after it. {one['device']}, {one['precision']}, commit "
        f"{one['commit'][:10]}, `{command}`.\n\n"
    )
    for name, table in tables.items():
        atomic_write(
            folder / f"{name}.md", ((text if name == "methods" else "") + shared_report.markdown(table)).encode()
        )
    summary = shared_report.summary_table(f"SparseViT, `{config_path.stem}`", judgements)
    atomic_write(folder / "summary.md", shared_report.markdown(summary).encode())
    draw([job.folder for job in done], folder / "plots", timings)
    titles = {"methods": "accuracy in % (mean ± deviation over seeds)", "pruners": "pruners, arm none, accuracy in %",
              "latency": "latency", "claims": "the paper's claims, and others"}  # fmt: skip
    for name in (n for n in titles if n in tables):
        shared_report.show(f"{config_path.stem}: {titles[name]}", tables[name])
    print(f"{len(done)} of {len(jobs)} runs; report in {folder}")


def pruner_table(figures: Mapping[str, Mapping[int, float]], config: "Config") -> list[list[str]]:
    """Head and one row a pruner: accuracy of the arm without a penalty at every ratio."""
    from shared.claims import show_mean
    from sparsevit.measure import percent

    ratios = sorted({*config.prune.ratios, *config.prune.removal_ratios})
    table = [["pruner", *(f"{percent(r)} %" for r in ratios)]]
    for pruner in (*config.prune.pruners, *config.prune.removals):
        found = [list(figures.get(f"none/{pruner}.{percent(r)}.accuracy", {}).values()) for r in ratios]
        if any(found):
            table.append([pruner, *(show_mean(values) if values else "-" for values in found)])
    return table


def tokens_of(folder: Path) -> int:
    """N of a run's network."""
    from sparsevit.shrink import load_network

    return load_network(folder / "model").size.tokens


def run_reproduce(arguments: Sequence[str]) -> int:
    """The command: 0 when all runs ended well, whatever the verdicts; 1 when a run failed."""
    parser = argparse.ArgumentParser(prog="python -m sparsevit.reproduce", description=__doc__)
    parser.add_argument("--scale", default="auto", help="auto, smoke (seconds), mini (minutes on a CPU), paper (a GPU)")
    parser.add_argument("--config", help="one configuration instead of the scale's own")
    parser.add_argument("--methods", nargs="+", metavar="ARM", help="some arms instead of the scale's own")
    parser.add_argument("--seeds", type=int, help="number of seeds instead of the scale's own")
    parser.add_argument("--workers", type=int, default=0, help="runs side by side (default: one a core)")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="runs and report go below it (runs)")
    parser.add_argument("--publish", action="store_true", help="copy the report to results/sparsevit/<config>")
    asked = parser.parse_args(arguments)
    check_shared(__file__)
    from shared.run import command_line
    from shared.study import choose_scale, run_jobs
    from sparsevit.config import METHODS

    scale, why = choose_scale(asked.scale)
    print(why, flush=True)
    plan = PLANS[scale]
    if asked.config:  # a configuration keeps the plan of the scale that it belongs to
        stem = find_config(asked.config, "sparsevit").stem
        plan = next((p for p in PLANS.values() if stem in p.configs), Plan((stem,), ARMS, 5, statistics=True))
    if strangers := [name for name in asked.methods or () if name not in METHODS]:
        raise ConfigError(f"--methods {strangers[0]}: unknown; choose from {', '.join(METHODS)}")
    if asked.seeds is not None and asked.seeds < 1:
        raise ConfigError(f"--seeds {asked.seeds}: at least one seed is needed")
    partial = bool(asked.methods or asked.seeds)
    if partial and asked.publish:
        raise ConfigError("--publish: a study of some arms or seeds is not published; leave --methods and --seeds out")
    plan = Plan(plan.configs, tuple(asked.methods or plan.methods), asked.seeds or plan.seeds, plan.statistics)
    failed = 0
    for name in [asked.config] if asked.config else plan.configs:
        started, path = time.monotonic(), find_config(name, "sparsevit")
        jobs = jobs_of(path, plan.methods, plan.seeds, asked.out)
        there = sum((job.folder / "results.json").exists() for job in jobs)
        print(f"{path.stem}: {len(jobs)} runs, {len(plan.methods)} arms; {there} were finished before", flush=True)
        failed += sum(outcome.code != 0 for outcome in run_jobs("sparsevit.train", jobs, asked.workers).values())
        folder = asked.out / "sparsevit" / f"report-{path.stem}{'-partial' if partial else ''}"
        report(path, plan, jobs, folder, command_line("sparsevit.reproduce", arguments))
        print(f"{time.monotonic() - started:.0f} s for {path.stem}")
        if asked.publish:
            shutil.copytree(folder, REPOSITORY / "results" / "sparsevit" / path.stem, dirs_exist_ok=True)
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Console entry point."""
    return run_main(run_reproduce, arguments)


if __name__ == "__main__":
    sys.exit(main())
