"""What the paper claims, as code; and the numbers that need no statistics.

The main text of the paper could not be read when this was written. Its figures quoted here are the supplement's, on
CIFAR-100-LT with IF 100; the baselines' are from their own pages and later re-runs, with the views and epochs of
these. `source` says which, and stands in the table.
"""

from shared.claims import Claim, Comparison, Fact

EXPERTS = ("expert1", "expert2", "expert3")
ENSEMBLE = "ensemble.accuracy"
SUPPLEMENT = "supplement, CIFAR-100-LT IF 100"
VIEWS_UNKNOWN = f"{SUPPLEMENT}; views of the row without it unknown"
BASELINES = ("ce", "balanced_softmax", "balanced_3", "ldam_drw", "ride", "sade", "balpoe", "ncl")

DIVERSITY = (
    Comparison(
        "The diversity loss makes experts more diverse (class_std) than SADE's spacing, same views",
        "abstract", "dl_weak/diversity.class_std", "sade/diversity.class_std", headline=True,
    ),
    Comparison(
        "The diversity loss makes experts more diverse (class_std) than three balanced experts, same views",
        "abstract", "dl_weak/diversity.class_std", "balanced_3/diversity.class_std", headline=True,
    ),
    Comparison(
        "Self-distillation makes experts more diverse (class_std), same views",
        f"{SUPPLEMENT}, a measure called sigma whose definition could not be read", "mdcs/diversity.class_std",
        "dl_both/diversity.class_std", "53.4 without, 60.4 with it",
    ),
    Comparison(
        "The diversity loss is better than three balanced experts on the same views (both)",
        "what diversity adds to an ensemble", f"dl_both/{ENSEMBLE}", f"balanced_3_both/{ENSEMBLE}", headline=True,
    ),
    Comparison(
        "The head expert leads on the head classes", "supplement; lambda below 0",
        "mdcs/expert1.head", ("mdcs/expert2.head", "mdcs/expert3.head"), headline=True,
    ),
    Comparison(
        "The tail expert leads on the tail classes", "supplement; lambda above 1",
        "mdcs/expert3.tail", ("mdcs/expert1.tail", "mdcs/expert2.tail"), headline=True,
    ),
    Comparison(
        "The ensemble is better than every expert", SUPPLEMENT,
        f"mdcs/{ENSEMBLE}", tuple(f"mdcs/{e}.accuracy" for e in EXPERTS), "+5.3 (56.1 against 50.8)", headline=True,
    ),
)  # fmt: skip
DISTILLATION = (
    Comparison(
        "Self-distillation lifts the ensemble, same views (against the diversity loss on both)",
        VIEWS_UNKNOWN, f"mdcs/{ENSEMBLE}", f"dl_both/{ENSEMBLE}",
        "+5.4 (56.1 against 50.7)", headline=True,
    ),
    *(
        Comparison(
            f"Self-distillation lifts expert {number}, same views", VIEWS_UNKNOWN,
            f"mdcs/{expert}.accuracy", f"dl_both/{expert}.accuracy", paper,
        )
        for number, (expert, paper) in enumerate(
            zip(EXPERTS, ("+1.8 (40.6 against 38.8)", "+5.6 (50.8 against 45.2)", "+4.6 (36.0 against 31.4)"),
                strict=True), 1)
    ),
    Comparison(
        "MDCS is better than the diversity loss on the weak view (distillation and strong view together)",
        VIEWS_UNKNOWN, f"mdcs/{ENSEMBLE}", f"dl_weak/{ENSEMBLE}",
        "+5.4 (56.1 against 50.7)", headline=True,
    ),
    Comparison(
        "MDCS is better than the diversity loss on the strong view", "our control",
        f"mdcs/{ENSEMBLE}", f"dl_strong/{ENSEMBLE}",
    ),
    Comparison(
        "The strong view alone lifts the diversity loss", "NCL's author: +5.2 to +5.4 for NCL, CIFAR-100-LT IF 100",
        f"dl_strong/{ENSEMBLE}", f"dl_weak/{ENSEMBLE}", "+5.2 (NCL, 54.42 against 49.22)",
    ),
    Comparison(
        "Self-distillation needs diverse experts: it gains more with them than with balanced ones",
        "abstract", "study/cs_gain.diverse", "study/cs_gain.balanced", headline=True,
    ),
    Comparison(
        "Self-distillation needs diverse experts: it gains more with them than with plain ones (lambda 0)",
        "abstract", "study/cs_gain.diverse", "study/cs_gain.plain",
    ),
    Comparison(
        "Distilling confident instances only is better than distilling all", "abstract",
        f"mdcs/{ENSEMBLE}", f"mdcs_no_cis/{ENSEMBLE}", headline=True,
    ),
    Comparison(
        "Self-distillation lowers the variance, same views (variance without less variance with it)",
        "abstract", "dl_both/ensemble.variance", "mdcs/ensemble.variance", headline=True,
    ),
)  # fmt: skip
# arm -> (name, its figure on CIFAR-100-LT IF 100, where that is from); the paper's is 56.1, strong and weak views
AGAINST = {
    "ce": ("cross-entropy", 38.3, "a later re-run"),
    "balanced_softmax": ("balanced softmax", 46.1, "SADE's table"),
    "ldam_drw": ("LDAM-DRW", 42.1, "a later re-run"),
    "ride": ("RIDE with three experts", 48.6, "RIDE's page, weak view, 200 epochs"),
    "sade": ("SADE", 49.8, "SADE's page, weak view, 200 epochs"),
    "balpoe": ("BalPoE's loss", 55.9, "an aggregator; strong view, mixup, 400 epochs"),
    "ncl": ("NCL without its contrastive branch", 54.4, "NCL's author; strong view, with that branch"),
}
BOTH = ("ce", "balanced_softmax", "ldam_drw", "ride", "sade", "balpoe")
COMPARISONS: tuple[Comparison, ...] = (
    *DIVERSITY,
    *DISTILLATION,
    *(
        Comparison(
            f"MDCS is better than {name} ({'strong' if arm == 'ncl' else 'weak'} view)",
            f"{SUPPLEMENT}; theirs: {source}",
            f"mdcs/{ENSEMBLE}", f"{arm}/{ENSEMBLE}", f"{56.1 - figure:+.1f} (56.1 against {figure})",
            headline=arm in ("ce", "balanced_softmax", "ride", "sade"),
        )
        for arm, (name, figure, source) in AGAINST.items()
    ),
    Comparison(
        "MDCS is better than three balanced experts on the same views", "our control",
        f"mdcs/{ENSEMBLE}", f"balanced_3_both/{ENSEMBLE}", headline=True,
    ),
    Comparison(
        "MDCS is better than the best baseline (of those on their own views)",
        "abstract: 1 to 2 points over the previous best", f"mdcs/{ENSEMBLE}",
        tuple(f"{arm}/{ENSEMBLE}" for arm in BASELINES), "+1 to +2", headline=True,
    ),
)  # fmt: skip
ON_BOTH_VIEWS = tuple(  # of the study `views`
    Comparison(
        f"MDCS is better than {arm} on the same views", "our control", f"mdcs/{ENSEMBLE}", f"{arm}_both/{ENSEMBLE}"
    )
    for arm in BOTH
)
FACTS = (
    Fact("Three experts on CIFAR-100 have 783,856 parameters", "layer by layer", "study/parameters.cifar100", "==",
         783856),
    Fact("Three experts on CIFAR-10 have 770,896 parameters", "layer by layer", "study/parameters.cifar10", "==",
         770896),
    Fact("CIFAR-100-LT with IF 100 has 10,847 training images", "authors' code", "study/images.cifar100_if100", "==",
         10847),
    Fact("CIFAR-10-LT with IF 100 has 12,406 training images", "authors' code", "study/images.cifar10_if100", "==",
         12406),
    Fact("The mean of the prior's exponents is 1: the averaged logits are balanced", "authors' code",
         "study/lambdas.mean", "==", 1.0),
    Fact("The loss of the worked example, epoch 1", "agrees with the authors' class to 1e-6", "study/example.epoch_1",
         "==", 8.686548, tolerance=1e-6),
    Fact("The loss of the worked example, epoch 20 and later", "agrees with the authors' class to 1e-6",
         "study/example.epoch_20", "==", 8.808745, tolerance=1e-6),
)  # fmt: skip
MAIN_CLAIMS: tuple[Claim, ...] = (*COMPARISONS, *FACTS)
ALL_CLAIMS: tuple[Claim, ...] = (*COMPARISONS, *ON_BOTH_VIEWS, *FACTS)
