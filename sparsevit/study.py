"""What a study of many runs says that no single run does: paired effects, the noise floor, the verdict, its tables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shared.claims import Comparison, Figures, Judgement, judge, show_difference, show_mean
from shared.config import load
from shared.metrics import mean_and_std, paired_difference
from shared.report import Report, Row, claim_table, commits_of, figures_of, markdown, method_table
from sparsevit.claims import DENSE_GAIN, FLOOR_ARMS, MEANS, STATISTIC, all_claims, data_set_of
from sparsevit.config import Config
from sparsevit.measure import percent
from sparsevit.method import attention_penalty
from sparsevit.model import arch_size, count_parameters, count_prunable
from sparsevit.start import network_size

if TYPE_CHECKING:
    from sparsevit.latency import Timing

COLUMNS = {
    "dense": "dense.accuracy", "30 %": "global_l1.30.accuracy", "50 %": "global_l1.50.accuracy",
    "70 %": "global_l1.70.accuracy", "80 %": "global_l1.80.accuracy", "90 %": "global_l1.90.accuracy",
    "50 % neurons": "neurons.50.accuracy", "75 % neurons": "neurons.75.accuracy", "trained on": "neurons.75.recovered",
    "75 % neurons, heads": "neurons_heads.75.accuracy", "silent": "neurons.silent",
}  # fmt: skip
PAIRED = {
    "dense": "dense.accuracy", "mean 10-50 %": STATISTIC, "mean 10-80 %": "global_l1.mean_10_80",
    "70 %": "global_l1.70.accuracy", "80 %": "global_l1.80.accuracy", "75 % neurons": "neurons.75.accuracy",
}  # fmt: skip
TIMED_BATCHES = (1, 64)
TITLES = {  # of the tables, in the order of the report
    "paired": "accuracy after pruning, paired differences in points [95 %]",
    "methods": "accuracy in % (mean ± deviation over seeds)", "pruners": "pruners, arm none, accuracy in %",
    "latency": "latency", "claims": "claims",
}  # fmt: skip


@dataclass(frozen=True)
class StudyReport(Report):
    """A report with a verdict, cautions and further tables, by the names in `TITLES`."""

    config_name: str
    verdict: str
    cautions: str
    tables: dict[str, list[list[str]]]

    def texts(self) -> dict[str, str]:
        """As `Report.texts`, with a file for each table, `verdict.md`, `cautions.md`, and `report.md` of them all."""
        usual = super().texts()
        tables = {name: markdown(self.tables[name]) for name in TITLES if name in self.tables}
        tables["methods"] = usual["methods.md"]
        parts = [f"# SparseViT, {self.config_name}\n\n{self.verdict}\n\n{self.cautions}\n"]
        parts += [f"## {TITLES[name][0].upper()}{TITLES[name][1:]}\n\n{text}" for name, text in tables.items()]
        own = {f"{name}.md": text for name, text in tables.items()}
        own |= {"verdict.md": f"{self.verdict}\n", "cautions.md": f"{self.cautions}\n", "report.md": "\n".join(parts)}
        return own | usual


def report_of(config_path: Path, methods: Sequence[str], rows: Sequence[Row], data: Mapping[str, Any],
              timings: "Sequence[Timing]", statistics: bool, command: str) -> StudyReport:  # fmt: skip
    """All that is said of one configuration, from its rows and, where networks were timed, their latencies.

    Args:
        data: `test_images`, `image` and `channels` as in a run's `results.json`.
    """
    from sparsevit.latency import table as latency_table

    config, figures = load(config_path, Config), figures_of(rows, "final")
    tokens = network_size(config.model, data["image"], data["channels"], 10).tokens
    judgements = [judge(c, figures, statistics) for c in all_claims(config_path.stem, tokens)]
    judgements.sort(key=lambda item: item.verdict == "not run")
    tables = {
        "methods": method_table(figures, methods, COLUMNS), "pruners": pruner_table(figures, config),
        "claims": claim_table(judgements),
    }  # fmt: skip
    tables |= {"paired": paired_table(figures, methods)} if statistics else {}
    tables |= {"latency": latency_table(timings)} if timings else {}
    about = (
        f"Accuracy in %, mean ± deviation over seeds, on {data['test_images']:,} test images; columns in % are "
        f"`global_l1`, one shot, nothing trained after it. {rows[0].device}, {rows[0].precision}, "
        f"{commits_of(rows)}, `{command}`."
    )
    said = verdict(figures, statistics), cautions(figures, judgements)
    name = f"SparseViT, `{config_path.stem}`"
    return StudyReport(name, about, tables["methods"], judgements, config_path.stem, *said, tables)


def paired_figures(values: Figures, own: str | None = None) -> dict[str, dict[int, float]]:
    """Figures of the study for each seed, from `method/metric` -> seed -> value: sizes of effects, shortfalls.

    The noise floor of a seed is the largest change that one of the control arms of the study makes; `own` is the
    paper's data set that is studied, whose stated gains are then held against ours.
    """

    def gains(method: str, metric: str = STATISTIC) -> dict[int, float]:
        """A method's figure minus that of `none`, by seed."""
        base = values.get(f"none/{metric}", {})
        return {s: v - base[s] for s, v in values.get(f"{method}/{metric}", {}).items() if s in base}

    found = {"effect.paper": {s: abs(v) for s, v in gains("paper").items()}}
    controls = [gains(arm) for arm in floor_arms(values)]
    if controls:
        seeds = set.intersection(*(set(control) for control in controls))
        found["effect.floor"] = {s: max(abs(control[s]) for control in controls) for s in sorted(seeds)}
    if own:
        found[f"below.{own}"] = {s: MEANS[own] / 100 - v for s, v in gains("paper").items()}
    if own and own != "cifar10":
        found["below.dense"] = {s: DENSE_GAIN / 100 - v for s, v in gains("paper", "dense.accuracy").items()}
    return found


def floor_arms(values: Figures) -> list[str]:
    """The control arms that were run."""
    return [arm for arm in FLOOR_ARMS if values.get(f"{arm}/{STATISTIC}")]


def study_figures(
    rows: Sequence[Row], results: Mapping[str, Any], timings: "Mapping[str, Sequence[Timing]]", config_name: str = ""
) -> dict[tuple[str, int], float]:
    """Figures of the study itself, by name and seed: paired effects, protocol, counts, bounds, speed."""
    values = figures_of(rows, "final")
    found = {(name, s): v for name, per_seed in paired_figures(values, data_set_of(config_name)).items()
             for s, v in per_seed.items()}  # fmt: skip
    digests: dict[int, list[str]] = {}
    misses = [0.0]
    for result in results.values():
        digests.setdefault(result["seed"], []).append(result["order_digest"])
        misses += zeros_missed({row["metric"]: row["value"] for row in result["figures"]})
    size = arch_size("vit_b16", 384, 3, 10)
    once = {
        "zeros.miss": max(misses), "vit_b16.parameters": float(count_parameters(size)),
        "vit_b16.prunable": float(count_prunable(size)), "bound.term_384": largest_term(size.tokens),
    }  # fmt: skip
    if all(len(seen) > 1 for seen in digests.values()):  # one arm alone has nothing to agree with
        once["batches.same"] = float(all(len(set(seen)) == 1 for seen in digests.values()))
    spread = two_runs(values)
    once |= {} if spread is None else {"spread.two_runs": spread}
    names = {"50 % zeros, masked": "masked", "50 % neurons removed": "neurons", "50 % heads removed": "heads",
             "50 % neurons and heads removed": "neurons_heads"}  # fmt: skip
    for timed in timings.values():
        once |= {
            f"speed.{names[t.name]}": t.speedup for t in timed if t.batch == max(TIMED_BATCHES) and t.name in names
        }
    return found | {(name, 0): value for name, value in once.items()}


def zeros_missed(values: Mapping[str, float]) -> list[float]:
    """For each global pruning of a run, by how many the new zeros are not round(ratio * n)."""
    n, misses = int(values["dense.prunable"]), []
    for name, value in values.items():
        if name.startswith("global_l1.") and name.endswith(".nonzero"):
            ratio = float(name.removeprefix("global_l1.").removesuffix(".nonzero")) / 100
            misses.append(abs(values["dense.nonzero"] - value - round(ratio * n)))
    return misses


def largest_term(tokens: int) -> float:
    """0.01 R of the map with the largest penalty, one-hot rows, computed by the code that trains with it."""
    return 0.01 * float(attention_penalty(torch.eye(tokens)[None, None]))


def two_runs(values: Figures) -> float | None:
    """Deviation of the difference of two single runs of `none`, seeds apart: s.d. over seeds times sqrt(2)."""
    seen = list(values.get(f"none/{STATISTIC}", {}).values())
    return math.sqrt(2) * mean_and_std(seen)[1] if len(seen) > 1 else None


def verdict(values: Figures, statistics: bool = True) -> str:
    """The paper's claim in one sentence, by the rule that was set before the study.

    Supported only if the interval of paper - none is above 0 and its mean above the floor's; contradicted only if both
    hold the other way round. The floor is the mean over seeds of `study/effect.floor`.
    """
    paper, none, floor = (values.get(n, {}) for n in (f"paper/{STATISTIC}", f"none/{STATISTIC}", "study/effect.floor"))
    seeds = sorted(set(paper) & set(none) & set(floor))
    if not statistics or len(seeds) < 3:
        return "No verdict: at this scale, or with these arms and seeds, the paper's claim is not tested."
    found = paired_difference([paper[s] for s in seeds], [none[s] for s in seeds])
    limit = mean_and_std([floor[s] for s in seeds])[0]
    word = "not supported"
    if abs(found.mean) > limit and (found.low > 0 or found.high < 0):
        word = "supported" if found.mean > 0 else "contradicted"
    where = "includes 0" if found.low <= 0 <= found.high else "excludes 0"
    return (
        f"The paper's claim is {word} here: pruned by 10 to 50 % (mean of five ratios), the network trained with the "
        f"penalty differs from the one without by {show_difference(found)} points (mean ± deviation [95 % interval], "
        f"{len(seeds)} paired seeds); the interval {where}, and in size the mean is "
        f"{'above' if abs(found.mean) > limit else 'not above'} the noise floor of {100 * limit:.2f} points "
        f"(the largest change by {', '.join(floor_arms(values))}, mean over seeds)."
    )


def cautions(values: Figures, judgements: Sequence[Judgement]) -> str:
    """What must be known to read the intervals: the scale of single runs, one start, the number of comparisons."""
    text, spread = [], two_runs(values)
    if spread is not None:
        text.append(
            f"Two single runs without the penalty that differ in their seed alone differ by a deviation of "
            f"{100 * spread:.2f} points in this mean (deviation over seeds times √2): the scale for the paper's "
            f"+{MEANS['cifar10']}, +{MEANS['cifar100']} and +{MEANS['imagenet100']}, which are one run an arm."
        )
    text.append("All seeds start from the same pre-trained weights: the intervals hold for this one start.")
    compared = sum(isinstance(item.claim, Comparison) and item.verdict != "not run"
                   for item in judgements)  # fmt: skip
    if compared:
        text.append(
            f"{compared} comparisons are judged, each by its own 95 % interval and without a correction for their "
            "number: of those without an effect, one in twenty is expected to exclude 0."
        )
    return " ".join(text)


def paired_table(values: Figures, methods: Sequence[str]) -> list[list[str]]:
    """Head and one row an arm: its paired difference to `none` in points with the 95 % interval; last paper - flip."""
    pairs = [(method, "none") for method in methods if method != "none"]
    pairs += [("paper", "flip")] if {"paper", "flip"} <= set(methods) else []
    table = [["difference", *PAIRED, "n"]]
    for left, right in pairs:
        cells, counts = [], [0]
        for metric in PAIRED.values():
            a, b = values.get(f"{left}/{metric}", {}), values.get(f"{right}/{metric}", {})
            seeds = sorted(set(a) & set(b))
            counts.append(len(seeds))
            found = paired_difference([a[s] for s in seeds], [b[s] for s in seeds])
            cells.append(show_difference(found) if len(seeds) > 1 else "-")
        if max(counts) > 1:
            table.append([f"{left} - {right}", *cells, str(max(counts))])
    return table


def pruner_table(figures: Figures, config: Config) -> list[list[str]]:
    """Head and one row a pruner: accuracy of the arm without a penalty at every ratio."""
    ratios = sorted({*config.prune.ratios, *config.prune.removal_ratios})
    table = [["pruner", *(f"{percent(r)} %" for r in ratios)]]
    for pruner in (*config.prune.pruners, *config.prune.removals):
        found = [list(figures.get(f"none/{pruner}.{percent(r)}.accuracy", {}).values()) for r in ratios]
        if any(found):
            table.append([pruner, *(show_mean(values) if values else "-" for values in found)])
    return table
