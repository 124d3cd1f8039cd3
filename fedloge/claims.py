"""What the paper claims, as code; and the identities that need no statistics.

The paper's tables could not be read when this was written, so no accuracy of theirs is quoted. The numbers in the
column `paper` are from logs that the authors published, and say so.
"""

from dataclasses import replace

from shared.claims import Claim, Comparison, Fact

PERSONAL_BASELINES = ("fedavg_ft", "fedper", "fedrep", "ditto", "fedrod", "fedbabu", "fedetf")
GENERIC_BASELINES = ("fedavg", "fedprox", "fedrod", "fedbabu", "fedetf", "creff")

COMPARISONS: tuple[Comparison, ...] = (
    Comparison(
        "The generic model, realigned, is better than FedAvg's",
        "abstract",
        "fedloge/generic.accuracy",
        "fedavg/generic.accuracy",
        headline=True,
    ),
    Comparison(
        "The generic model before realignment (the frame's own predictions) is better than FedAvg's",
        "authors' logs of stage 1, one seed",
        "fedloge/generic_etf.accuracy",
        "fedavg/generic.accuracy",
        paper="+1.3 to +1.4 (CIFAR-10), +3.3 to +5.5 (CIFAR-100), logs",
        headline=True,
    ),
    Comparison(
        "The generic model is better than the best generic baseline",
        "abstract",
        "fedloge/generic.accuracy",
        tuple(f"{name}/generic.accuracy" for name in GENERIC_BASELINES),
        headline=True,
    ),
    Comparison(
        "Realignment lifts the few-shot classes of the generic model, against the frame's own predictions",
        "framework figure, stage 1 of GLA-FR; side-branch log, one seed",
        "fedloge/generic.few",
        "fedloge/generic_etf.few",
        paper="+7.3, log",
    ),
    Comparison(
        "Realignment lifts the few-shot classes of the generic model, against psi as trained",
        "framework figure, stage 1 of GLA-FR",
        "fedloge/generic.few",
        "fedloge/generic_raw.few",
        headline=True,
    ),
    Comparison(
        "Realignment lifts the generic model overall, against the frame's own predictions",
        "side-branch log, one seed",
        "fedloge/generic.accuracy",
        "fedloge/generic_etf.accuracy",
        paper="+1.0, log",
    ),
    Comparison(
        "The personal models (rule of the figure) are better than FedAvg's model",
        "abstract",
        "fedloge/personal.accuracy",
        "fedavg/personal.accuracy",
        headline=True,
    ),
    Comparison(
        "The personal models before realignment (psi + phi) are better than FedAvg's model",
        "authors' logs of stage 1, which mask classes for FedLoGe only",
        "fedloge/personal_stage1_sum.accuracy",
        "fedavg/personal.accuracy",
        paper="+0.8 to +3.1 (CIFAR-10), +8.4 to +9.6 (CIFAR-100), masked, logs",
    ),
    Comparison(
        "Realignment lifts the personal models (rule of the figure, against psi + phi)",
        "side-branch log, one seed",
        "fedloge/personal.accuracy",
        "fedloge/personal_stage1_sum.accuracy",
        paper="+2.9, log (rule and mask unknown)",
    ),
    Comparison(
        "Realignment lifts the personal models (rule of the authors' code, against psi + phi)",
        "side-branch log, one seed",
        "fedloge/personal_code.accuracy",
        "fedloge/personal_stage1_sum.accuracy",
        paper="+2.9, log (rule and mask unknown)",
    ),
    Comparison(
        "The personal models (rule of the figure) are better than the best personal baseline",
        "abstract",
        "fedloge/personal.accuracy",
        tuple(f"{name}/personal.accuracy" for name in PERSONAL_BASELINES),
        headline=True,
    ),
    Comparison(
        "The personal models (rule of the authors' code) are better than the best personal baseline",
        "abstract; evaluation script",
        "fedloge/personal_code.accuracy",
        tuple(f"{name}/personal.accuracy" for name in PERSONAL_BASELINES),
    ),
    Comparison(
        "The sparse frame gives a better generic model than the dense frame",
        "abstract: sparsity suppresses noisy features",
        "fedloge/generic.accuracy",
        "dense_etf/generic.accuracy",
        headline=True,
    ),
    Comparison(
        "The sparse frame gives better personal models than the dense frame",
        "abstract",
        "fedloge/personal.accuracy",
        "dense_etf/personal.accuracy",
    ),
    Comparison(
        "The sparse frame trains a better backbone than a frozen random head (both read with their own head)",
        "what a designed head adds to FedBABU",
        "fedloge/generic_etf.accuracy",
        "fedbabu/generic.accuracy",
    ),
    Comparison(
        "The sparse frame adds to realignment: better than FedAvg realigned in the same way",
        "our control",
        "fedloge/generic.accuracy",
        "fedavg_gla/generic.accuracy",
        headline=True,
    ),
    Comparison(
        "The sparse frame adds to the personal models: better than FedAvg realigned in the same way",
        "our control",
        "fedloge/personal.accuracy",
        "fedavg_gla/personal.accuracy",
    ),
    Comparison(
        "The length of psi's rows follows the class frequency (rank correlation above 0)",
        "framework figure; log on CIFAR-100: about 14 for head classes, 6 for tail classes",
        "fedloge/psi.length_by_frequency",
        0.0,
        percent=False,
        headline=True,
    ),
)


def facts(num_classes: int, feature_dim: int, sparsity: float, heads_bias: bool = False) -> tuple[Fact, ...]:
    """Claims of geometry, counts, identities and sizes, for a run with C classes and d features."""
    entries = num_classes * feature_dim
    zeros, sent = int(sparsity * entries) / entries, entries + num_classes * heads_bias
    return (
        Fact("The frame has exactly the asked share of zeros after the repair", "static sparse ETF",
             "fedloge/etf.zero_share", "==", zeros, 1e-12, f"{sparsity:g}"),
        Fact("The repair gives the simplex's mean angle back (error in degrees)", "authors' log: 0.0002 to 0.001",
             "fedloge/etf.angle_error", "<=", 0.05, paper="0.001, log"),
        Fact("The frame's rows have the asked length (relative error)", "authors' log: 0.0024 to 0.0057",
             "fedloge/etf.length_error", "<=", 0.05, paper="0.006, log"),
        Fact("The realigned generic head has rows of length one (largest error)", "framework figure, stage 1",
             "fedloge/gla.unit_row_error", "<=", 1e-5),
        Fact("Norm transfer multiplies the lengths of psi and phi (largest relative error)",
             "framework figure, stage 2", "fedloge/gla.norm_transfer_error", "<=", 1e-5),
        Fact("A client sends the backbone and one C x d head (values beyond the backbone)",
             "framework figure", "fedloge/sent.beyond_backbone", "==", sent, paper=f"{sent:,}"),
        Fact("Nothing of a private head is sent (entries)", "framework figure", "fedloge/sent.private", "==", 0,
             paper="0"),
        Fact("CIFAR-10-LT with IF 100 has 12,406 training images", "authors' log", "study/images.cifar10_if100", "==",
             12406, paper="12,406"),
        Fact("CIFAR-100-LT with IF 100 has 10,847 training images", "authors' log", "study/images.cifar100_if100",
             "==", 10847, paper="10,847"),
        Fact("The CIFAR ResNet-18 has 11,168,832 backbone parameters, no unused layer", "layer by layer",
             "study/parameters.resnet18", "==", 11168832),
    )  # fmt: skip


def all_claims(
    num_classes: int, feature_dim: int, sparsity: float, heads_bias: bool = False, fedbn: bool = False
) -> tuple[Claim, ...]:
    """Every claim, those that need statistics first; where FedBN is run, it is one of the personal baselines."""
    comparisons = COMPARISONS
    if fedbn:
        comparisons = tuple(
            replace(claim, right=(*claim.right, "fedbn/personal.accuracy"))
            if isinstance(claim.right, tuple) and claim.left.startswith("fedloge/personal")
            else claim
            for claim in COMPARISONS
        )
    return (*comparisons, *facts(num_classes, feature_dim, sparsity, heads_bias))
