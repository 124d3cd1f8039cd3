"""What the paper claims, as code; what must hold by mathematics; and what we claim instead.

Of the paper only the abstract could be read: its tables are unknown, so no accuracy of theirs is quoted, only the
differences that the abstract states. They are one run each, without a seed.
"""

import math

from shared.claims import Claim, Comparison, Fact

ONE_RUN = "abstract, one run"
BEYOND = "our extension: beyond the ratios that the paper's means are of"
MEANS = {  # data set -> the abstract's gain, in points: a mean over (by all signs) five ratios of one pair of networks
    "cifar10": 0.568, "cifar100": 1.764, "imagenet100": 0.256,
}  # fmt: skip
DENSE_GAIN = 0.12  # points, unpruned: of CIFAR-100 and of ImageNet-100
SHOWN = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "imagenet100": "ImageNet-100"}
ALL_MEANS = ", ".join(f"+{MEANS[name]} ({SHOWN[name]})" for name in MEANS)
STATISTIC = "global_l1.mean_10_50"  # the paper's: accuracy as the mean over pruning by 10 to 50 %
FLOOR_ARMS = ("null", "attn_l1", "flip")  # what they change cannot be the penalty's doing
FIRST_ORDER = "first-order: one descent step on R in the logits raises the entropy; measured on trained networks"


def data_set_of(config_name: str) -> str | None:
    """The data set of a configuration that repeats the paper's protocol; None for another."""
    return next((name for name in MEANS if config_name in (f"{name}_authors", f"{name}_authors_without")), None)


def all_claims(config_name: str, tokens: int) -> tuple[Claim, ...]:
    """Every claim for a study of one configuration; the paper's number is that of its data set, where it is one."""
    own = data_set_of(config_name)
    return (*published(own), *controls(), *instead(), *facts(tokens))


def published(own: str | None) -> tuple[Comparison, ...]:
    """The paper's claims, and on the paper's own data how our interval stands to its numbers."""
    pruned = f"+{MEANS[own]}, {ONE_RUN}" if own else f"{ALL_MEANS}, {ONE_RUN} each"
    dense = f"+{DENSE_GAIN}, {ONE_RUN}" if own else f"+{DENSE_GAIN} (CIFAR-100, ImageNet-100), {ONE_RUN} each"
    found = [
        Comparison("Unpruned, the network trained with the penalty is better than without", "abstract",
                   "paper/dense.accuracy", "none/dense.accuracy", dense if own != "cifar10" else "none stated",
                   headline=True),
        Comparison("Pruned by 10 to 50 % (mean of five), it is better than without", "abstract", f"paper/{STATISTIC}",
                   f"none/{STATISTIC}", pruned, headline=True),
        Comparison("... that is: with the penalty less accuracy is lost by pruning 10 to 50 %", "abstract",
                   "none/global_l1.drop_10_50", "paper/global_l1.drop_10_50"),
        *first_and_drop("The penalty: pruned by 80 %, the network is better than without", BEYOND, "paper", "none",
                        "global_l1.80", headline=False),
    ]  # fmt: skip
    if own:
        found.append(Comparison(f"Its gain (10 to 50 %) stays below the +{MEANS[own]} of {SHOWN[own]}",
                                "abstract, the other way round", f"study/below.{own}", 0.0))  # fmt: skip
    if own and own != "cifar10":
        found.append(Comparison(f"Unpruned, its gain stays below the +{DENSE_GAIN} of {SHOWN[own]}",
                                "abstract, the other way round", "study/below.dense", 0.0))  # fmt: skip
    return tuple(found)


def controls() -> tuple[Comparison, ...]:
    """How much arms change that cannot prepare anything for pruning, with signs; and the penalty against that."""
    what = {"null": "rounding", "attn_l1": "a constant term", "flip": "the penalty subtracted"}
    return (
        Comparison("What the penalty changes (10 to 50 %) is above the noise floor: |paper - none| > the largest of "
                   "|null - none|, |attn_l1 - none|, |flip - none| (of those run)", "our control", "study/effect.paper",
                   "study/effect.floor", headline=True),
        Comparison("The penalty is better than its negative, flip (10 to 50 %)", "our control", f"paper/{STATISTIC}",
                   f"flip/{STATISTIC}"),
        *(
            Comparison(f"Control: {arm} ({what[arm]}) is better than none (10 to 50 %)", "our control; to be expected: "
                       "inconclusive", f"{arm}/{STATISTIC}", f"none/{STATISTIC}")
            for arm in FLOOR_ARMS
        ),
    )  # fmt: skip


def first_and_drop(text: str, source: str, better: str, worse: str, pruned: str,
                   headline: bool = True) -> tuple[Comparison, Comparison]:  # fmt: skip
    """The accuracy after pruning, and as a second row what pruning costs.

    The cost alone would reward an arm for being worse before it is pruned.
    """
    return (
        Comparison(text, source, f"{better}/{pruned}.accuracy", f"{worse}/{pruned}.accuracy", headline=headline),
        Comparison(f"... and loses less by it ({better} against {worse}, {pruned})", source, f"{worse}/{pruned}.drop",
                   f"{better}/{pruned}.drop"),
    )  # fmt: skip


def instead() -> tuple[Comparison, ...]:
    """What the penalty does to attention, and what does prepare a network for pruning."""
    weights, neurons = "global_l1.80", "neurons.75"
    return (
        Comparison("The penalty makes the last attention map more uniform (its entropy rises, in nats)", FIRST_ORDER,
                   "paper/attention.entropy_last", "none/attention.entropy_last", percent=False, headline=True),
        Comparison("Made strong, it makes the map more uniform", FIRST_ORDER, "paper_strong/attention.entropy_last",
                   "none/attention.entropy_last", percent=False),
        *first_and_drop("Without a penalty a network pruned by 80 % is better than with the penalty made strong",
                        "our arm", "none", "paper_strong", weights, headline=False),
        *first_and_drop("A truly sparse last map: pruned by 80 %, better than without", "our arm", "attn_sparse",
                        "none", weights, headline=False),
        *first_and_drop("L1 on the weights: pruned by 80 %, better than without", "textbook", "l1", "none", weights),
        *first_and_drop("A group penalty on neurons: pruned by 80 %, better than without", "our arm", "group", "none",
                        weights),
        *first_and_drop("The paper's function on MLP activations: without 75 % of the neurons, better than without it",
                        "the formula where it is a sparsity prior", "ffn_log", "none", neurons),
        *first_and_drop("A group penalty: without 75 % of the neurons, better than without it", "our arm", "group",
                        "none", neurons),
        Comparison("An epoch of training after it gives accuracy back to a network without 75 % of its neurons",
                   "our sweep", "none/neurons.75.recovered", "none/neurons.75.accuracy"),
        Comparison("One global ranking of the blocks' matrices is better than one a tensor (70 % pruned)", "our sweep",
                   "none/global_l1_blocks.70.accuracy", "none/local_l1.70.accuracy"),
        Comparison("One global ranking of the blocks' matrices is better than Wanda's rows (70 % pruned)", "our sweep",
                   "none/global_l1_blocks.70.accuracy", "none/wanda.70.accuracy"),
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
        Fact("At 384 pixels the term adds at most about 0.000012 to the loss", "closed form", "study/bound.term_384",
             "<=", bound, 1e-9),
        Fact("ViT-B/16 at 384 pixels with 10 classes has 86,098,186 parameters", "authors' network",
             "study/vit_b16.parameters", "==", 86_098_186),
        Fact("... of which 85,550,592 are ranked for pruning", "authors' list of 98 tensors", "study/vit_b16.prunable",
             "==", 85_550_592),
        Fact("All arms of a seed saw the same batches (1: yes)", "protocol", "study/batches.same", "==", 1),
        Fact("Every global pruning made exactly round(ratio * n) zeros (largest miss)", "protocol", "study/zeros.miss",
             "==", 0),
        Fact("Masking half of the weights does not make the network faster (times as fast)", "measured",
             "study/speed.masked", "<=", 1.15),
        Fact("Removing half of the neurons does (times as fast)", "measured", "study/speed.neurons", ">=", 1.05),
        Fact("Removing half of the neurons and heads does more (times as fast)", "measured",
             "study/speed.neurons_heads", ">=", 1.2),
    )  # fmt: skip
