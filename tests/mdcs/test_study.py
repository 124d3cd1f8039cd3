"""The arms of the studies are what their names say; figures that several runs give together, by hand."""

import json
from pathlib import Path

import pytest
import torch

from mdcs.claims import ALL_CLAIMS, BASELINES
from mdcs.config import Config, MdcsConfig
from mdcs.study import MAIN, SMOKE, STUDIES, SWEEPS, VIEWS, columns_of, gain_figures, variance_figures
from shared.checkpoint import save_model
from shared.cli import find_config
from shared.config import load

PAPER = (-0.5, 1.0, 2.5)
# arm -> method, views, experts, and what else its name says
MEANT = {
    "mdcs": ("mdcs", "both", 3, {"lambdas": PAPER, "alpha": 0.6, "temperature": 1.0, "confident": "adjusted"}),
    "dl_both": ("dl", "both", 3, {"lambdas": PAPER}),
    "dl_strong": ("dl", "strong", 3, {"lambdas": PAPER}),
    "dl_weak": ("dl", "weak", 3, {"lambdas": PAPER}),
    "mdcs_no_cis": ("mdcs", "both", 3, {"lambdas": PAPER, "confident": "all", "alpha": 0.6}),
    "cs_plain": ("mdcs", "both", 3, {"lambdas": (0.0, 0.0, 0.0), "confident": "adjusted", "alpha": 0.6}),
    "cs_balanced": ("mdcs", "both", 3, {"lambdas": (1.0, 1.0, 1.0), "confident": "adjusted", "alpha": 0.6}),
    "balanced_3_both": ("balanced_softmax", "both", 3, {}),
    "balanced_3": ("balanced_softmax", "weak", 3, {}),
    "ce": ("ce", "weak", 1, {"classifier": "cosine"}),
    "ce_linear": ("ce", "weak", 1, {"classifier": "linear"}),
    "balanced_softmax": ("balanced_softmax", "weak", 1, {}),
    "ldam_drw": ("ldam_drw", "weak", 1, {}),
    "ride": ("ride", "weak", 3, {}),
    "sade": ("sade", "weak", 3, {"tau": 2.0}),
    "balpoe": ("balpoe", "weak", 3, {"taus": (0.0, 1.0, 2.0)}),
    "ncl": ("ncl", "strong", 3, {}),
    "cis_on_raw_logits": ("mdcs", "both", 3, {"lambdas": PAPER, "confident": "raw"}),
    **{f"temperature_{t}": ("mdcs", "both", 3, {"lambdas": PAPER, "temperature": float(t)}) for t in (2, 4)},
    **{f"alpha_{a}": ("mdcs", "both", 3, {"lambdas": PAPER, "alpha": a}) for a in (0.0, 0.3, 1.0)},
    "lambda3_1.5": ("mdcs", "both", 3, {"lambdas": (-0.5, 1.0, 1.5)}),
    "lambda3_3.5": ("mdcs", "both", 3, {"lambdas": (-0.5, 1.0, 3.5)}),
    "lambda1_-1.0": ("mdcs", "both", 3, {"lambdas": (-1.0, 1.0, 2.5)}),
    "lambda1_0.0": ("mdcs", "both", 3, {"lambdas": (0.0, 1.0, 2.5)}),
    "experts_2": ("mdcs", "both", 2, {}),
    "experts_4": ("mdcs", "both", 4, {}),
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
ARMS = {name: changes for arms in STUDIES.values() for name, changes in arms.items()}


def test_every_arm_is_told_here_what_it_means():
    assert set(ARMS) == set(MEANT)


@pytest.mark.parametrize("study", STUDIES)
def test_an_arm_means_the_same_in_every_study(study):
    assert all(ARMS[name] == changes for name, changes in STUDIES[study].items())


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


def test_variance_and_bias_of_three_runs_by_hand(tmp_path):
    #         image:     0       1       2       3      columns: expert 1, ensemble
    folders = fabricated(tmp_path, [
        [[0, 0], [1, 1], [2, 2], [0, 0]],
        [[0, 0], [1, 0], [2, 1], [0, 0]],
        [[1, 0], [0, 0], [1, 2], [0, 0]],
    ], [0, 1, 1, 0])  # fmt: skip
    # expert 1: majorities 0, 1, 2, 0: wrong on image 2; the ensemble's 0, 0, 2, 0: wrong on images 1 and 2
    assert variance_figures(folders) == {
        0: {"expert1.variance": 0.0, "expert1.bias": 0.25, "ensemble.variance": 0.25, "ensemble.bias": 0.5},
        1: {"expert1.variance": 0.0, "expert1.bias": 0.25, "ensemble.variance": 0.25, "ensemble.bias": 0.5},
        2: {"expert1.variance": 0.75, "expert1.bias": 0.25, "ensemble.variance": 0.0, "ensemble.bias": 0.5},
    }


@pytest.mark.parametrize("models", [0, 1, 2])
def test_below_three_models_there_is_no_variance(tmp_path, models):
    assert variance_figures(fabricated(tmp_path, [[[0, 0]]] * models, [0])) == {}


def test_the_gain_of_distillation_is_paired_by_seed():
    figures = {
        "mdcs/ensemble.accuracy": {0: 0.75, 1: 0.5, 2: 0.25}, "dl_both/ensemble.accuracy": {0: 0.5, 2: 0.5},
        "cs_balanced/ensemble.accuracy": {1: 0.25}, "balanced_3_both/ensemble.accuracy": {1: 0.125},
    }  # fmt: skip
    assert gain_figures(figures) == {"cs_gain.diverse": {0: 0.25, 2: -0.25}, "cs_gain.balanced": {1: 0.125}}


def test_the_gain_is_of_the_metric_that_is_asked_for_and_empty_without_an_arm():
    figures = {"mdcs/expert1.accuracy": {0: 0.5}, "dl_both/expert1.accuracy": {0: 0.25}}
    assert gain_figures(figures, "expert1.accuracy") == {"cs_gain.diverse": {0: 0.25}, "cs_gain.balanced": {}}
    assert gain_figures({}) == {"cs_gain.diverse": {}, "cs_gain.balanced": {}}


def test_the_table_has_a_column_for_each_expert():
    assert [name for name in columns_of(MAIN) if name.startswith("E") and name[1].isdigit()] == ["E1", "E2", "E3"]
    assert columns_of(SWEEPS)["E4"] == "expert4.accuracy"
    assert {"variance", "bias"} <= set(columns_of(MAIN))


def test_no_two_claims_have_the_same_text_and_each_can_be_written_down():
    assert len({claim.text for claim in ALL_CLAIMS}) == len(ALL_CLAIMS)
    assert json.dumps([claim.text for claim in ALL_CLAIMS])
