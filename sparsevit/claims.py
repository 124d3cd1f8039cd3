"""What the paper claims, as code; what must hold by mathematics; and what we claim instead.

Of the paper only the abstract could be read: its tables are unknown, so no accuracy of theirs is quoted, only the
differences that the abstract states. They are one run each, without a seed.
"""

import math
from collections.abc import Mapping

from shared.claims import Claim, Comparison, Fact

ONE_RUN = "abstract, one run"
MEANS = {  # data set -> the abstract's gain, in points: a mean over (by all signs) five ratios of one pair of networks
    "cifar10": 0.568, "cifar100": 1.764, "imagenet100": 0.256,
}  # fmt: skip
SHOWN = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet100": "ImageNet-100"}
ALL_MEANS = ", ".join(f"+{MEANS[name]} ({SHOWN[name]})" for name in MEANS)


def all_claims(config_name: str, tokens: int) -> tuple[Claim, ...]:
    """Every claim for a study of one configuration; the paper's number is that of its data set, where it is one."""
    own = next((name for name in MEANS if config_name.startswith(f"{name}_")), None)
    pruned = f"+{MEANS[own]}, {ONE_RUN}" if own else f"{ALL_MEANS}, {ONE_RUN} each"
    dense = f"+0.12, {ONE_RUN}" if own != "cifar10" else "none stated"
    return (*published(dense, pruned), *instead(), *facts(tokens))


def published(dense: str, pruned: str) -> tuple[Comparison, ...]:
    """The paper's claims, and how our interval stands to its numbers."""
    return (
        Comparison("Unpruned, the network trained with the penalty is better than without", "abstract",
                   "paper/dense.accuracy", "none/dense.accuracy", dense, headline=True),
        Comparison("Pruned by 10 to 50 % (mean of five), it is better than without", "abstract",
                   "paper/global_l1.mean_10_50", "none/global_l1.mean_10_50", pruned, headline=True),
        Comparison("Sparse then prune: with the penalty less accuracy is lost by pruning 10 to 50 %", "abstract",
                   "none/global_l1.drop_10_50", "paper/global_l1.drop_10_50", headline=True),
        Comparison("The same by pruning 80 %, where something is lost at all", "abstract",
                   "none/global_l1.80.drop", "paper/global_l1.80.drop"),
        Comparison("What the penalty changes (10 to 50 %) is more than rounding does: |paper - none| > |null - none|",
                   "our control", "study/effect.paper", "study/effect.null", headline=True),
        *(
            Comparison(f"At this scale its gain (10 to 50 %) stays below the +{MEANS[name]} of {SHOWN[name]}",
                       "abstract, the other way round", f"study/below.{name}", 0.0)
            for name in MEANS
        ),
    )  # fmt: skip


def instead() -> tuple[Comparison, ...]:
    """What the penalty does to attention, and what does prepare a network for pruning."""
    lost, removed = "global_l1.80.drop", "neurons.75.drop"
    return (
        Comparison("The penalty makes the last attention map more uniform (its entropy rises, in nats)",
                   "Jensen's inequality", "paper/attention.entropy_last", "none/attention.entropy_last", percent=False,
                   headline=True),
        Comparison("Made strong, it makes the map more uniform", "Jensen's inequality",
                   "paper_strong/attention.entropy_last", "none/attention.entropy_last", percent=False),
        Comparison("Made strong, it lets pruning 80 % cost more", "our arm", f"paper_strong/{lost}", f"none/{lost}"),
        Comparison("A truly sparse last map lets pruning 80 % cost less", "our arm", f"none/{lost}",
                   f"attn_sparse/{lost}"),
        Comparison("L1 on the weights lets pruning 80 % cost less", "textbook", f"none/{lost}", f"l1/{lost}",
                   headline=True),
        Comparison("A group penalty on neurons lets pruning 80 % cost less", "our arm", f"none/{lost}",
                   f"group/{lost}", headline=True),
        Comparison("The paper's function on MLP activations prepares the removal of 75 % of the neurons",
                   "the formula where it is a sparsity prior", f"none/{removed}", f"ffn_log/{removed}", headline=True),
        Comparison("A group penalty prepares the removal of 75 % of the neurons", "our arm", f"none/{removed}",
                   f"group/{removed}", headline=True),
        Comparison("An epoch of training after it gives accuracy back to a network without 75 % of its neurons",
                   "our sweep", "none/neurons.75.recovered", "none/neurons.75.accuracy"),
        Comparison("One global ranking is better than one a tensor (70 % pruned)", "our sweep",
                   "none/global_l1.70.accuracy", "none/local_l1.70.accuracy"),
        Comparison("One global ranking is better than Wanda's rows (70 % pruned)", "our sweep",
                   "none/global_l1.70.accuracy", "none/wanda.70.accuracy"),
    )  # fmt: skip


def facts(tokens: int) -> tuple[Fact, ...]:
    """Counts, bounds and identities; and speed, measured after the runs, with nothing beside it."""
    low, high = math.log1p(1 / tokens**2), math.log(2) / tokens
    bound = 0.01 * math.log(2) / 577
    return (
        Fact("The penalty of the last map is not below that of uniform attention, ln(1 + 1/N^2)",
             "Jensen's inequality", "paper/attention.penalty_last", ">=", low, 1e-3 * low),
        Fact("... nor above that of one-hot attention, ln(2) / N", "Jensen's inequality",
             "paper/attention.penalty_last", "<=", high, 1e-3 * high),
        Fact("At 384 pixels the term cannot exceed 0.000012 of the loss", "closed form", "study/bound.term_384", "<=",
             bound, 1e-9, paper=f"{bound:.2g}"),
        Fact("ViT-B/16 at 384 pixels with 10 classes has 86,098,186 parameters", "authors' network",
             "study/vit_b16.parameters", "==", 86_098_186, paper="86,098,186"),
        Fact("... of which 85,550,592 are ranked for pruning", "authors' list of 98 tensors", "study/vit_b16.prunable",
             "==", 85_550_592, paper="85,550,592"),
        Fact("All arms of a seed saw the same batches (1: yes)", "protocol", "study/batches.same", "==", 1),
        Fact("Every global pruning made exactly round(ratio * n) zeros (largest miss)", "protocol", "study/zeros.miss",
             "==", 0),
        Fact("Masking half of the weights does not make the network faster (times as fast)", "measured",
             "study/speed.masked", "<=", 1.15),
        Fact("Removing half of the neurons does (times as fast)", "measured", "study/speed.neurons", ">=", 1.05),
        Fact("Removing half of the neurons and heads does more (times as fast)", "measured",
             "study/speed.neurons_heads", ">=", 1.2),
    )  # fmt: skip


def paired_figures(values: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
    """Figures of the study for each seed, from `method/metric` -> seed -> value: sizes of effects, shortfalls."""
    metric, found = "global_l1.mean_10_50", dict[str, dict[int, float]]()
    base = values.get(f"none/{metric}", {})
    for method in ("paper", "null"):
        other = values.get(f"{method}/{metric}", {})
        found[f"effect.{method}"] = {s: abs(other[s] - base[s]) for s in base if s in other}
    gain = {s: v - base[s] for s, v in values.get(f"paper/{metric}", {}).items() if s in base}
    for name, points in MEANS.items():
        found[f"below.{name}"] = {s: points / 100 - value for s, value in gain.items()}
    return found
