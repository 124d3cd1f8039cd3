"""The arms of the studies are what their names say; figures that several runs give together, by hand."""

import json
import re
from pathlib import Path

import pytest
import torch

from mdcs.claims import ALL_CLAIMS, BASELINES
from mdcs.config import Config, MdcsConfig
from mdcs.study import (
    MAIN,
    SMOKE,
    STUDIES,
    SWEEPS,
    VARIANCE,
    VIEWS,
    columns_of,
    gain_figures,
    variance_figures,
    with_best,
)
from shared.checkpoint import save_model
from shared.claims import Comparison
from shared.cli import find_config
from shared.config import load

PAPER = (-0.5, 1.0, 2.5)
PLAIN = (0.0, 0.0, 0.0)
CONFIGS = find_config("mini", "mdcs").parent
# arm -> method, views, experts, and what else its name says
MEANT = {
    "mdcs": ("mdcs", "both", 3, {"lambdas": PAPER, "alpha": 0.6, "temperature": 1.0, "confident": "adjusted"}),
    "dl_both": ("dl", "both", 3, {"lambdas": PAPER}),
    "dl_strong": ("dl", "strong", 3, {"lambdas": PAPER}),
    "dl_weak": ("dl", "weak", 3, {"lambdas": PAPER}),
    "mdcs_no_cis": ("mdcs", "both", 3, {"lambdas": PAPER, "confident": "all", "alpha": 0.6}),
    "cs_plain": ("mdcs", "both", 3, {"lambdas": PLAIN, "confident": "adjusted", "alpha": 0.6}),
    "cs_balanced": ("mdcs", "both", 3, {"lambdas": (1.0, 1.0, 1.0), "confident": "adjusted", "alpha": 0.6}),
    "plain_3_both": ("dl", "both", 3, {"lambdas": PLAIN}),
    "balanced_3_both": ("balanced_softmax", "both", 3, {}),
    "balanced_3": ("balanced_softmax", "weak", 3, {}),
    "ce": ("ce", "weak", 1, {"classifier": "cosine"}),
    "ce_linear": ("ce", "weak", 1, {"classifier": "linear"}),
    "balanced_softmax": ("balanced_softmax", "weak", 1, {}),
    "ldam_drw": ("ldam_drw", "weak", 1, {}),
    "ride": ("ride", "weak", 3, {}),
    "sade": ("sade", "weak", 3, {"tau": None}),
    "balpoe": ("balpoe", "weak", 3, {"taus": (0.0, 1.0, 2.0)}),
    "ncl": ("ncl", "strong", 3, {}),
    "cis_on_raw_logits": ("mdcs", "both", 3, {"lambdas": PAPER, "confident": "raw"}),
    **{f"temperature_{t}": ("mdcs", "both", 3, {"lambdas": PAPER, "temperature": float(t)}) for t in (2, 4)},
    **{f"alpha_{a}": ("mdcs", "both", 3, {"lambdas": PAPER, "alpha": a}) for a in (0.0, 0.3, 1.0)},
    "lambda3_1.5": ("mdcs", "both", 3, {"lambdas": (-0.5, 1.0, 1.5)}),
    "lambda3_3.5": ("mdcs", "both", 3, {"lambdas": (-0.5, 1.0, 3.5)}),
    "lambda1_-1.0": ("mdcs", "both", 3, {"lambdas": (-1.0, 1.0, 2.5)}),
    "lambda1_0.0": ("mdcs", "both", 3, {"lambdas": (0.0, 1.0, 2.5)}),
    "experts_2": ("mdcs", "both", 2, {"lambdas": (-0.5, 2.5)}),
    "experts_4": ("mdcs", "both", 4, {"lambdas": (-0.5, 0.5, 1.5, 2.5)}),
    **{
        f"{arm}_{views}": (method, views, experts, {})
        for arm, method, experts in (
            ("dl_weak", "dl", 3), ("ce", "ce", 1), ("balanced_softmax", "balanced_softmax", 1),
            ("balanced_3", "balanced_softmax", 3), ("ldam_drw", "ldam_drw", 1), ("ride", "ride", 3),
            ("sade", "sade", 3), ("balpoe", "balpoe", 3),
        )
        for views in ("strong", "both")
    },
}  # fmt: skip
ARMS = {name: changes for arms in (MAIN, VIEWS, SWEEPS) for name, changes in arms.items()}


def test_every_arm_is_told_here_what_it_means():
    assert set(ARMS) == set(MEANT)


@pytest.mark.parametrize("study", ["main", "views", "sweeps"])
def test_an_arm_means_the_same_in_every_study(study):
    assert all(ARMS[name] == changes for name, changes in STUDIES[study].items())


def test_an_arm_of_the_variance_study_is_that_of_the_main_one_with_a_training_set_of_each_seed():
    assert set(STUDIES) == {"main", "distillation", "views", "sweeps", "variance"}
    assert {"mdcs", "dl_both"} <= set(VARIANCE), "the pair of the claim about variance"
    fixed = "cifar100_lt_if100"
    assert load(find_config(fixed, "mdcs"), Config).data.subset_seed == 0
    for arm, changes in VARIANCE.items():
        own, same = (load(find_config(fixed, "mdcs"), Config, found) for found in (changes, MAIN[arm]))
        assert own.data.subset_seed is None
        assert own.model_copy(update={"data": same.data}) == same, arm
        assert own.data.model_copy(update={"subset_seed": 0}) == same.data, arm


LISTED = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml")) if load(path, Config).data.listed}


def test_there_are_list_configurations_of_all_large_sets_and_the_views_have_statistics_of_their_own():
    found = [load(path, Config) for path in LISTED.values()]
    assert {config.data.name for config in found} == {"imagenet_lt", "places_lt", "inaturalist18"}
    assert {config.bn_views for config in found} == {"split"}
    assert {config.schedule.name for config in found} == {"step", "cosine"}


@pytest.mark.parametrize("arm", MAIN)
@pytest.mark.parametrize("config", LISTED)
def test_every_list_configuration_trains_every_arm_of_the_main_study(config, arm):
    """Also those of one view, though the statistics are split."""
    plain = load(LISTED[config], Config)
    found = load(LISTED[config], Config, list(MAIN[arm]))
    method, views, experts, _ = MEANT[arm]
    assert (found.method.name, found.views, found.experts) == (method, views, experts)
    assert found.model_copy(update={"method": plain.method}) == plain


@pytest.mark.parametrize("config", ["mini", "smoke", "cifar100_lt_if100"])
@pytest.mark.parametrize("arm", MEANT)
def test_an_arm_is_the_method_the_views_and_the_exponents_of_its_name(arm, config):
    found = load(find_config(config, "mdcs"), Config, ARMS[arm])
    method, views, experts, others = MEANT[arm]
    assert (found.method.name, found.views, found.experts) == (method, views, experts)
    assert {key: getattr(found.method, key) for key in others} == others


@pytest.mark.parametrize("arm", MEANT)
def test_an_arm_changes_the_method_and_nothing_else(arm):
    plain, found = (load(find_config("mini", "mdcs"), Config, changes) for changes in ((), ARMS[arm]))
    assert found.model_copy(update={"method": plain.method}) == plain


@pytest.mark.parametrize("arm", [arm for arm in MEANT if MEANT[arm][0] == "mdcs"])
def test_arms_of_mdcs_keep_the_ramp_of_the_configuration(arm):
    plain, found = (load(find_config("mini", "mdcs"), Config, changes).method for changes in ((), ARMS[arm]))
    assert found.ramp_epochs == plain.ramp_epochs != MdcsConfig().ramp_epochs


@pytest.mark.parametrize("study", STUDIES)
def test_no_two_arms_of_a_study_are_the_same_run(study):
    found = [load(find_config("mini", "mdcs"), Config, changes) for changes in STUDIES[study].values()]
    assert all(found.count(config) == 1 for config in found)


def test_the_exponents_of_every_number_of_experts_have_the_mean_one():
    for arm in ("mdcs", "experts_2", "experts_4"):
        lambdas = load(find_config("mini", "mdcs"), Config, ARMS[arm]).method.lambdas
        assert sum(lambdas) / len(lambdas) == 1.0


def test_the_four_of_the_control_come_first_and_stand_in_the_small_study_too():
    assert list(MAIN)[:4] == list(SMOKE)[:4] == ["mdcs", "dl_both", "dl_strong", "dl_weak"]


def test_every_baseline_is_an_arm_of_the_main_study_and_of_the_views():
    assert set(BASELINES) <= set(MAIN)
    assert {f"{arm}_both" for arm in BASELINES if arm != "ncl"} <= set(VIEWS)  # it is strong already


def test_the_sweeps_hold_the_paper_s_setting_once_and_vary_one_thing_at_a_time():
    plain = load(find_config("mini", "mdcs"), Config).method.model_dump()
    for arm, changes in SWEEPS.items():
        found = load(find_config("mini", "mdcs"), Config, changes).method.model_dump()
        assert len([key for key in plain if plain[key] != found[key]]) == (arm != "mdcs"), arm


def fabricated(tmp_path: Path, predictions: list[list[list[int]]], labels: list[int]) -> dict[int, Path]:
    """Run folders with these predictions: seed -> image -> column."""
    folders = {}
    for seed, found in enumerate(predictions):
        folders[seed] = tmp_path / str(seed)
        tensors = {"predictions": torch.tensor(found, dtype=torch.int32), "labels": torch.tensor(labels)}
        save_model(folders[seed] / "predictions", tensors, {"columns": []})
    return folders


def test_variance_and_bias_of_three_runs_by_hand_of_all_images_and_of_each_third(tmp_path):
    #         image:     0       1       2       3      columns: expert 1, ensemble
    folders = fabricated(tmp_path, [
        [[0, 0], [1, 1], [2, 2], [0, 0]],
        [[0, 0], [1, 0], [2, 1], [0, 0]],
        [[1, 0], [0, 0], [1, 2], [0, 0]],
    ], [0, 1, 1, 2])  # fmt: skip
    # expert 1: majorities 0, 1, 2, 0: wrong on images 2 and 3; the ensemble's 0, 0, 2, 0: on all but image 0
    thirds = {"head": (1,), "middle": (0,), "tail": (2,)}  # images 1 and 2; 0; 3
    own = {  # seed: variance of expert 1 and of the ensemble, of all images and of the thirds
        0: ((0.0, 0.0, 0.0, 0.0), (0.25, 0.5, 0.0, 0.0)),
        1: ((0.0, 0.0, 0.0, 0.0), (0.25, 0.5, 0.0, 0.0)),
        2: ((0.75, 1.0, 1.0, 0.0), (0.0, 0.0, 0.0, 0.0)),
    }
    parts, biases = ("", "_head", "_middle", "_tail"), ((0.5, 0.5, 0.0, 1.0), (0.75, 1.0, 0.0, 1.0))
    assert variance_figures(folders, thirds) == {
        seed: {
            f"{who}.{kind}{part}": value
            for who, variances, bias in zip(("expert1", "ensemble"), found, biases, strict=True)
            for kind, values in (("variance", variances), ("bias", bias))
            if kind == "variance" or seed == 0  # the bias is of all models together
            for part, value in zip(parts, values, strict=True)
        }
        for seed, found in own.items()
    }


def test_a_third_of_several_classes_takes_the_images_of_all_of_them_and_of_no_other(tmp_path):
    folders = fabricated(tmp_path, [[[k], [k], [0], [0]] for k in (0, 0, 1)], [4, 7, 5, 4])
    found = variance_figures(folders, {"head": (4, 5), "tail": (7, 6)})
    assert {name: value for name, value in found[2].items() if "variance" in name} == {
        "ensemble.variance": 0.5, "ensemble.variance_head": pytest.approx(1 / 3), "ensemble.variance_tail": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("models", [0, 1, 2])
def test_below_three_models_there_is_no_variance(tmp_path, models):
    assert variance_figures(fabricated(tmp_path, [[[0, 0]]] * models, [0]), {"head": (0,)}) == {}


def test_the_gain_of_distillation_is_paired_by_seed_for_diverse_balanced_and_plain_experts():
    figures = {
        "mdcs/ensemble.accuracy": {0: 0.75, 1: 0.5, 2: 0.25}, "dl_both/ensemble.accuracy": {0: 0.5, 2: 0.5},
        "cs_balanced/ensemble.accuracy": {1: 0.25}, "balanced_3_both/ensemble.accuracy": {1: 0.125},
        "cs_plain/ensemble.accuracy": {0: 0.5, 3: 0.25}, "plain_3_both/ensemble.accuracy": {3: 0.75, 1: 0.5},
    }  # fmt: skip
    assert gain_figures(figures) == {
        "cs_gain.diverse": {0: 0.25, 2: -0.25}, "cs_gain.balanced": {1: 0.125}, "cs_gain.plain": {3: -0.5}
    }  # fmt: skip


def test_the_gain_is_of_the_metric_that_is_asked_for_and_empty_without_an_arm():
    figures = {"mdcs/expert1.accuracy": {0: 0.5}, "dl_both/expert1.accuracy": {0: 0.25}}
    none = {"cs_gain.diverse": {}, "cs_gain.balanced": {}, "cs_gain.plain": {}}
    assert gain_figures(figures, "expert1.accuracy") == none | {"cs_gain.diverse": {0: 0.25}}
    assert gain_figures({}) == none


def test_the_arms_whose_difference_is_a_gain_differ_by_the_distillation_alone():
    for with_cs, without in (("mdcs", "dl_both"), ("cs_plain", "plain_3_both")):
        left, right = (load(find_config("mini", "mdcs"), Config, MAIN[arm]) for arm in (with_cs, without))
        assert (left.method.lambdas, left.views) == (right.method.lambdas, right.views)
        assert (left.method.name, right.method.name) == ("mdcs", "dl")


# The table

EVERYTHING = (
    *(f"ensemble.{name}" for name in ("accuracy", "many", "medium", "few", "head", "middle", "tail", "ece", "variance",
                                      "bias")),
    *(f"expert{e}.accuracy" for e in (1, 2, 3, 4)), "diversity.class_std", "best.accuracy",
)  # fmt: skip


def measured(*without: str) -> dict[str, dict[int, float]]:
    """Figures of one arm, of all that a column shows but these."""
    assert set(without) <= set(EVERYTHING)
    return {f"mdcs/{metric}": {0: 0.5} for metric in EVERYTHING if metric not in without}


def test_the_table_has_shot_groups_where_all_three_are_measured():
    assert columns_of(MAIN, measured()) == {
        "ensemble": "ensemble.accuracy", "many": "ensemble.many", "medium": "ensemble.medium", "few": "ensemble.few",
        "E1": "expert1.accuracy", "E2": "expert2.accuracy", "E3": "expert3.accuracy", "ECE": "ensemble.ece",
        "class_std": "diversity.class_std", "variance": "ensemble.variance", "bias": "ensemble.bias",
        "best on test": "best.accuracy",
    }  # fmt: skip


@pytest.mark.parametrize("empty", ["ensemble.many", "ensemble.medium", "ensemble.few"])
def test_the_table_has_thirds_of_the_classes_where_a_shot_group_is_empty(empty):
    columns = columns_of(MAIN, measured(empty))
    assert list(columns)[:5] == ["ensemble", "head", "middle", "tail", "E1"]
    assert {columns[third] for third in ("head", "middle", "tail")} == {
        f"ensemble.{third}" for third in ("head", "middle", "tail")
    }
    assert not {"many", "medium", "few"} & set(columns)


def test_the_table_has_a_column_of_a_fourth_expert_only_where_an_arm_has_four():
    assert columns_of(SWEEPS, measured())["E4"] == "expert4.accuracy"
    assert "E4" not in columns_of([arm for arm in SWEEPS if arm != "experts_4"], measured())
    assert "E4" not in columns_of(SWEEPS, measured("expert4.accuracy"))


@pytest.mark.parametrize(("metrics", "headings"), [
    (("ensemble.variance", "ensemble.bias"), {"variance", "bias"}), (("best.accuracy",), {"best on test"}),
    (("diversity.class_std", "expert2.accuracy", "expert3.accuracy"), {"class_std", "E2", "E3"}),
])  # fmt: skip
def test_what_was_not_measured_has_no_column(metrics, headings):
    everything, found = columns_of(MAIN, measured()), columns_of(MAIN, measured(*metrics))
    assert set(everything) - set(found) == headings
    assert found == {heading: metric for heading, metric in everything.items() if heading not in headings}


def test_a_column_stands_where_any_arm_has_its_figure():
    figures = {"ce/ensemble.accuracy": {0: 0.5}, "mdcs/expert3.accuracy": {0: 0.5}}
    assert columns_of(["ce", "mdcs"], figures) == {"ensemble": "ensemble.accuracy", "E3": "expert3.accuracy"}
    assert columns_of(["ce", "mdcs"], {}) == {}


def test_the_best_epoch_on_the_test_set_stands_beside_the_last_one_and_moves_nothing():
    last = {"mdcs/ensemble.accuracy": {0: 0.5, 1: 0.25}, "mdcs/expert1.accuracy": {0: 0.125}}
    best = {"mdcs/ensemble.accuracy": {0: 0.75, 1: 0.5}, "mdcs/ensemble.ece": {0: 0.0}, "ce/ensemble.accuracy": {0: 1}}
    assert with_best(last, best) == {**last, "mdcs/best.accuracy": {0: 0.75, 1: 0.5}, "ce/best.accuracy": {0: 1}}
    assert with_best(last, {}) == last
    assert columns_of(MAIN, with_best(last, best))["best on test"] == "best.accuracy"


# The claims


def test_every_comparison_says_what_it_is_from_and_a_number_of_the_paper_names_both_sides():
    assert all(claim.source.strip() for claim in ALL_CLAIMS)
    for claim in ALL_CLAIMS:
        if " against " in claim.paper:
            gain, left, right = re.fullmatch(r"([+-][\d.]+) \(.*?([\d.]+) against ([\d.]+)\)", claim.paper).groups()
            assert float(left) - float(right) == pytest.approx(float(gain), abs=0.051), claim.text


def test_the_gain_with_plain_experts_is_a_claim():
    (claim,) = [c for c in ALL_CLAIMS if isinstance(c, Comparison) and c.right == "study/cs_gain.plain"]
    assert (claim.left, claim.source) == ("study/cs_gain.diverse", "abstract")


def test_mdcs_is_compared_with_every_baseline_on_its_own_views_and_on_the_same():
    pairs = {c.right for c in ALL_CLAIMS if isinstance(c, Comparison) and c.left == "mdcs/ensemble.accuracy"}
    assert {f"{arm}/ensemble.accuracy" for arm in BASELINES if arm != "balanced_3"} <= pairs
    assert {f"{arm}_both/ensemble.accuracy" for arm in BASELINES if arm != "ncl"} <= pairs
    of_views = {name.partition("/")[0] for name in pairs if isinstance(name, str) and "_both/" in name}
    assert of_views <= set(VIEWS) | set(MAIN)


def test_no_two_claims_have_the_same_text_and_each_can_be_written_down():
    assert len({claim.text for claim in ALL_CLAIMS}) == len(ALL_CLAIMS)
    assert json.dumps([claim.text for claim in ALL_CLAIMS])
