"""What the paper claims, as code; and the counts that need no statistics.

Only the abstract's numbers are the paper's own: its tables could not be read when this was written.
"""

from collections.abc import Sequence

from shared.claims import Claim, Comparison, Fact

# Accuracies are printed as whole per cents: 99 % is what rounds to 99.
ACCURACIES = {"mnist": (0.985, "99 %"), "fashion_mnist": (0.885, "89 %"), "cifar10": (0.645, "65 %")}

COMPARISONS: tuple[Comparison, ...] = (
    Comparison(
        "Merging and fine-tuning is better than half of it: the clean branch alone after stage 1",
        "abstract: merging two models",
        "two_stage/accuracy",
        "two_stage/branch_a.accuracy",
        paper="+0.2 (MNIST, validation, notebook)",
        headline=True,
    ),
    Comparison(
        "The merged model is better than the mean of the two branches' probabilities",
        "what a learned head adds to an ensemble",
        "two_stage/accuracy",
        "two_stage/branches_mean.accuracy",
    ),
    Comparison(
        "Progressive unfreezing is better than training everything at once",
        "abstract: progressive unfreezing; everything at once has fewer phases, and both stop early",
        "two_stage/accuracy",
        "all_at_once/accuracy",
        headline=True,
    ),
    Comparison(
        "A branch trained on augmented images is better than a second clean one",
        "abstract: dual-input-output model",
        "two_stage/accuracy",
        "two_clean/accuracy",
        headline=True,
    ),
    Comparison(
        "The two stages are better than training the same network in one go, for as many epochs",
        "abstract",
        "two_stage/accuracy",
        "scratch/accuracy",
        headline=True,
    ),
    Comparison(
        "State of the art: better than a smaller network with batch norm and global pooling, in a usual recipe",
        "abstract; the recipe: one-cycle SGD, batches of 128, shifts of 2 pixels, flips except of digits",
        "two_stage/accuracy",
        "bn_gap/accuracy",
        headline=True,
    ),
    Comparison(
        "Better than LeNet-5, four times as large (colour images: three times), in one go for as many epochs",
        "what a well-known network reaches",
        "two_stage/accuracy",
        "lenet5/accuracy",
    ),
    Comparison(
        "The two stages with their best epoch on validation are better than training in one go with its best",
        "stage 2 keeps what early stopping restores, often an earlier epoch",
        "two_stage/best_epoch.accuracy",
        "scratch/accuracy",
    ),
    Comparison(
        "The two stages are better than one submodel trained for as many epochs",
        "half the parameters",
        "two_stage/accuracy",
        "submodel/accuracy",
    ),
    Comparison(
        "Two narrow branches and a head are better than one wide submodel, both in one go for as many epochs",
        "14,232 parameters in one branch (colour: 18,296)",
        "scratch/accuracy",
        "wide/accuracy",
    ),
    Comparison(
        "Unfreezing from the top with both heads transferred is better than the notebook's two phases with one",
        "the notebook freezes the last layer instead of the others, and forgets head b",
        "two_stage/accuracy",
        "notebook/accuracy",
    ),
    Comparison(
        "Stage 2 that begins with the whole new head is better than one that begins with its last layer",
        'a literal reading of "from the last layer"',
        "two_stage/accuracy",
        "literal/accuracy",
    ),
    Comparison(
        "Transferring both heads is better than one",
        "the notebook forgets head b",
        "two_stage/accuracy",
        "a_only/accuracy",
    ),
    Comparison("Transferring both heads is better than none", "merge", "two_stage/accuracy", "no_transfer/accuracy"),
    Comparison(
        "ReLU on the heads is better than passing the logits on",
        "the merge loses negative logits",
        "two_stage/accuracy",
        "linear_head/accuracy",
    ),
    Comparison(
        "One combined warp is better than three interpolations in a row",
        "ours: branch b learns blurred images",
        "combined_warp/accuracy",
        "two_stage/accuracy",
    ),
)


# On the other data sets no published network of at most the paper's parameters was found.
SMALLER_ON_MNIST = Comparison(
    "State of the art: above the best published network of fewer parameters that was found (points above 99.5 %)",
    "abstract; the other: era-s7, 8,900 parameters, self-reported",
    "two_stage/accuracy",
    0.995,
    paper="99 % (era-s7: 99.5 %)",
    headline=True,
)


def accuracy_claims(data_name: str) -> tuple[Comparison, ...]:
    """Limits that the accuracy on a data set should be above: the abstract's, and published ones; else none."""
    if data_name not in ACCURACIES:
        return ()
    value, shown = ACCURACIES[data_name]
    text = f"Accuracy rounds to {shown} or more (points above {100 * value:g} %)"
    stated = Comparison(text, "abstract", "two_stage/accuracy", value, paper=shown, headline=True)
    return (stated, SMALLER_ON_MNIST) if data_name == "mnist" else (stated,)


def facts(in_channels: int) -> tuple[Fact, ...]:
    """Counts and sizes, for grey images of 28 or colour images of 32 pixels."""
    grey = in_channels == 1
    parameters, adds = (14_862, 568_240) if grey else (19_622, 1_109_760)
    size, stated = (170_000, "abstract") if grey else (210_000, "a student's report of the paper, not the paper")
    return (
        Fact("The merged network has exactly the stated number of parameters", stated, "two_stage/parameters", "==",
             parameters, paper=f"{parameters:,}" + ("" if grey else " (a student's report)"), headline=True),
        Fact("The weights take four bytes a parameter", "computed", "two_stage/bytes.weights", "==", 4 * parameters),
        Fact("A file of the weights alone is at most half of the stated size",
             f"{stated}: {size / 1e6:.2f} MB; by the notebook a Keras archive with momentum, not measured here",
             "two_stage/bytes.safetensors", "<=", size // 2, paper=f"{size:,} bytes"),
        Fact("Multiply-adds of a forward pass", "computed", "two_stage/multiply_adds", "==", adds),
        Fact("The network for CIFAR-10 has fewer than 20,000 parameters", "abstract", "study/parameters.cifar10", "<=",
             19_999, paper="less than 20,00 (sic)", headline=not grey),
    )  # fmt: skip


def budget_claims(data_name: str, in_channels: int) -> tuple[Claim, ...]:
    """The aims of the budget track, which are this project's own: as large as the paper's network, and better."""
    limit = 14_862 if in_channels == 1 else 19_622
    aims = {"mnist": 0.995, "fashion_mnist": 0.925, "cifar10": 0.80}
    claims: tuple[Claim, ...] = (
        Fact("The network has no more parameters than the paper's", "ours", "distillation/parameters", "<=", limit),
    )
    if data_name in aims:
        text = f"Accuracy is above {100 * aims[data_name]:g} % (points above it)"
        claims = (Comparison(text, "ours", "distillation/accuracy", aims[data_name], headline=True), *claims)
    return claims


def all_claims(data_name: str, in_channels: int) -> tuple[Claim, ...]:
    """Every claim on a data set, those that need statistics first."""
    return (*accuracy_claims(data_name), *COMPARISONS, *facts(in_channels))


def peer_claims(peers: Sequence[str]) -> tuple[Comparison, ...]:
    """How a small modern network stands to well-known ones that are larger; no claim of the paper's."""
    return tuple(
        Comparison(f"`bn_gap` is better than `{peer}`, a larger network, in as many epochs", "ours", "bn_gap/accuracy",
                   f"{peer}/accuracy")
        for peer in peers
    )  # fmt: skip
