"""The arms of the studies, as overrides of one configuration; and figures that several runs give together."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mdcs.measures import bias_variance
from mdcs.method import spaced_lambdas
from shared.checkpoint import load_model
from shared.claims import Figures

Arms = Mapping[str, tuple[str, ...]]

# The paper's ablation first, four arms that tell the strong views from the distillation.
MAIN: Arms = {
    "mdcs": (),
    "dl_both": ("method=dl", "method.views=both"),
    "dl_strong": ("method=dl", "method.views=strong"),
    "dl_weak": ("method=dl",),
    "mdcs_no_cis": ("method.confident=all",),
    "cs_plain": ("method.lambdas=[0.0, 0.0, 0.0]",),
    "cs_balanced": ("method.lambdas=[1.0, 1.0, 1.0]",),
    "plain_3_both": ("method=dl", "method.lambdas=[0.0, 0.0, 0.0]", "method.views=both"),
    "balanced_3_both": ("method=balanced_softmax", "method.experts=3", "method.views=both"),
    "balanced_3": ("method=balanced_softmax", "method.experts=3"),
    "ce": ("method=ce",),
    "ce_linear": ("method=ce", "method.classifier=linear"),
    "balanced_softmax": ("method=balanced_softmax",),
    "ldam_drw": ("method=ldam_drw",),
    "ride": ("method=ride",),
    "sade": ("method=sade",),
    "balpoe": ("method=balpoe",),
    "ncl": ("method=ncl",),
}
SMOKE: Arms = {
    name: MAIN[name] for name in MAIN if name not in ("mdcs_no_cis", "cs_plain", "cs_balanced", "plain_3_both")
}
SWEEPS: Arms = {
    "mdcs": (),
    "cis_on_raw_logits": ("method.confident=raw",),
    **{f"temperature_{t}": (f"method.temperature={t}.0",) for t in (2, 4)},
    **{f"alpha_{a}": (f"method.alpha={a}",) for a in ("0.0", "0.3", "1.0")},
    **{f"lambda3_{x}": (f"method.lambdas=[-0.5, 1.0, {x}]",) for x in (1.5, 3.5)},
    **{f"lambda1_{x}": (f"method.lambdas=[{x}, 1.0, 2.5]",) for x in ("-1.0", "0.0")},
    **{f"experts_{n}": (f"method.lambdas={list(spaced_lambdas(n))}",) for n in (2, 4)},
}
VIEWS: Arms = {  # the baselines on the strong view, and with both; NCL has the strong one anyway
    "mdcs": (),
    **{
        f"{name}_{views}": (*MAIN[name], f"method.views={views}")
        for name in ("dl_weak", "ce", "balanced_softmax", "balanced_3", "ldam_drw", "ride", "sade", "balpoe")
        for views in ("strong", "both")
    },
}
# Each seed with a long-tailed subset of its own draw, as an analysis of variance wants it. (`mini` has that anyway.)
VARIANCE: Arms = {
    name: (*MAIN[name], "data.subset_seed=null") for name in ("mdcs", "dl_both", "dl_weak", "balanced_3_both")
}
# The one question of the paper that the main study's few seeds leave open: what the distillation adds.
DISTILLATION: Arms = {name: MAIN[name] for name in ("mdcs", "dl_both")}
STUDIES: Mapping[str, Arms] = {
    "main": MAIN,
    "distillation": DISTILLATION,
    "views": VIEWS,
    "sweeps": SWEEPS,
    "variance": VARIANCE,
}
LEAST_SEEDS: Mapping[str, int] = {"variance": 5, "distillation": 12}


def variance_figures(folders: Mapping[int, Path], thirds: Mapping[str, Sequence[int]]) -> dict[int, dict[str, float]]:
    """How far each of a method's models is from their majority, seed -> metric -> share; nothing below three models.

    Over all test images, and over those of each third of the classes. It means something where each seed has a training
    set of its own draw (data.subset_seed: null).
    """
    import torch

    if len(folders) < 3:
        return {}
    loaded = {seed: load_model(folder / "predictions")[0] for seed, folder in folders.items()}
    labels = next(iter(loaded.values()))["labels"]
    columns = torch.stack([tensors["predictions"] for tensors in loaded.values()])  # [K, N, E + 1]
    names = [*(f"expert{e + 1}" for e in range(columns.shape[2] - 1)), "ensemble"]
    figures: dict[int, dict[str, float]] = {seed: {} for seed in loaded}
    parts = {"": torch.ones_like(labels, dtype=torch.bool)}
    parts |= {f"_{third}": torch.isin(labels, torch.tensor(classes)) for third, classes in thirds.items()}
    for column, name in enumerate(names):
        for part, rows in parts.items():
            found = bias_variance(columns[:, rows, column], labels[rows])
            for seed, own in zip(loaded, found.variances, strict=True):
                figures[seed][f"{name}.variance{part}"] = own
            figures[min(loaded)][f"{name}.bias{part}"] = found.bias  # of all models together
    return figures


def gain_figures(figures: Figures, metric: str = "ensemble.accuracy") -> dict[str, dict[int, float]]:
    """What the distillation adds on the same views, to diverse, balanced (lambda 1) and plain (lambda 0) experts.

    Returns name -> seed -> share.
    """
    pairs = {
        "cs_gain.diverse": ("mdcs", "dl_both"), "cs_gain.balanced": ("cs_balanced", "balanced_3_both"),
        "cs_gain.plain": ("cs_plain", "plain_3_both"),
    }  # fmt: skip
    gains: dict[str, dict[int, float]] = {}
    for name, (with_cs, without) in pairs.items():
        left, right = figures.get(f"{with_cs}/{metric}", {}), figures.get(f"{without}/{metric}", {})
        gains[name] = {seed: left[seed] - right[seed] for seed in sorted(set(left) & set(right))}
    return gains


def columns_of(arms: Iterable[str], figures: Figures) -> dict[str, str]:
    """Headings and metrics of a study's table: shot groups, or thirds of the classes where a group is empty."""
    experts = range(1, 5 if "experts_4" in arms else 4)
    measured = {name.partition("/")[2] for name in figures}
    shots = [f"ensemble.{group}" for group in ("many", "medium", "few")]
    groups = shots if set(shots) <= measured else [f"ensemble.{third}" for third in ("head", "middle", "tail")]
    columns = {
        "ensemble": "ensemble.accuracy", **{metric.partition(".")[2]: metric for metric in groups},
        **{f"E{e}": f"expert{e}.accuracy" for e in experts}, "ECE": "ensemble.ece",
        "class_std": "diversity.class_std", "variance": "ensemble.variance", "bias": "ensemble.bias",
        "best on test": "best.accuracy",
    }  # fmt: skip
    return {heading: metric for heading, metric in columns.items() if metric in measured}


def with_best(figures: Figures, best: Figures) -> Figures:
    """The figures of the last epoch and, as `best.accuracy`, the best epoch's on the test set: for comparison only."""
    end = "/ensemble.accuracy"
    chosen = {f"{name.removesuffix(end)}/best.accuracy": seeds for name, seeds in best.items() if name.endswith(end)}
    return {**figures, **chosen}
