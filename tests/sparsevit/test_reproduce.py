"""The study's plan, claims and pictures; the configurations' promises."""

import json
import math

import pytest
import yaml

from shared.claims import Comparison, Fact, judge
from shared.cli import find_config
from shared.config import load
from sparsevit.claims import MEANS, all_claims, paired_figures
from sparsevit.config import METHODS, Config
from sparsevit.plots import draw
from sparsevit.prune import groups_of
from sparsevit.reproduce import ARMS, COLUMNS, PLANS, jobs_of, largest_term, main, study_figures


def test_the_jobs_of_a_study_have_folders_of_their_own_and_commands_that_load(tmp_path):
    jobs = jobs_of(find_config("smoke", "sparsevit"), METHODS, 2, tmp_path)
    assert len({job.folder for job in jobs}) == len(jobs) == 2 * len(METHODS)
    assert [job.seed for job in jobs] == [0] * len(METHODS) + [1] * len(METHODS)
    for job in jobs:
        config = load(find_config(job.arguments[1], "sparsevit"), Config, job.arguments[4:])
        assert (config.method, config.seed) == (job.group, job.seed)


def test_the_small_study_has_every_arm_of_the_issue_and_seeds_enough():
    wanted = {"none", "paper", "null", "attn_l1", "paper_strong", "attn_sparse", "l1", "ffn_log", "group"}
    assert set(ARMS) == set(PLANS["mini"].methods) == wanted
    assert PLANS["mini"].seeds >= 4
    assert not PLANS["smoke"].statistics


@pytest.mark.parametrize("name", ["mini", "smoke", "s1", "s2", "cifar10_authors", "cifar100_authors", "cifar100_ours"])
def test_every_figure_that_a_claim_or_column_names_is_one_that_some_run_has(name):
    config = load(find_config(name, "sparsevit"), Config)
    groups = groups_of(config)
    known = {"dense.accuracy", "neurons.silent", "attention.entropy_last", "attention.penalty_last"}
    for group in groups:
        known |= {f"{group.name(r)}.{w}" for r in group.ratios
                  for w in (("recovered",) if group.recover else ("accuracy", "drop"))}  # fmt: skip
    known |= {"global_l1.mean_10_50", "global_l1.drop_10_50"}
    if name in ("mini", "smoke"):
        assert {metric for metric in COLUMNS.values() if metric not in known} <= {"neurons.75.recovered"}
        for claim in all_claims(name, 17):
            names = [claim.left, claim.right] if isinstance(claim, Comparison) else [claim.figure]
            for figure in (n for n in names if isinstance(n, str) and not n.startswith("study/")):
                method, _, metric = figure.partition("/")
                assert method in PLANS["mini"].methods
                assert metric in known | {"neurons.75.recovered"}, figure


def test_the_papers_numbers_stand_with_their_data_sets():
    def shown(name):
        published = [c for c in all_claims(name, 577) if isinstance(c, Comparison)][:2]
        return [c.paper for c in published]

    assert shown("cifar10_authors") == ["none stated", "+0.568, abstract, one run"]
    assert shown("cifar100_authors_without")[1] == "+1.764, abstract, one run"
    assert "+0.256" in shown("imagenet100_authors")[1]
    assert all(f"+{value}" in shown("mini")[1] for value in MEANS.values())
    assert len({claim.text for claim in all_claims("mini", 17)}) == len(all_claims("mini", 17))


def test_effects_are_paired_over_seeds():
    figures = {
        f"{m}/global_l1.mean_10_50": {0: v, 1: v + 0.1} for m, v in (("none", 0.5), ("paper", 0.48), ("null", 0.5))
    }
    found = paired_figures(figures)
    assert found["effect.paper"] == pytest.approx({0: 0.02, 1: 0.02})
    assert found["effect.null"] == pytest.approx({0: 0, 1: 0})
    assert found["below.cifar10"] == pytest.approx({0: 0.02568, 1: 0.02568})


def test_a_study_can_see_an_effect_and_its_absence():
    claims = {c.text: c for c in all_claims("mini", 17)}
    claim = next(c for text, c in claims.items() if text.startswith("L1 on the weights"))
    figures = {claim.left: {0: 0.16, 1: 0.18, 2: 0.14, 3: 0.17}, claim.right: {0: 0.02, 1: 0.03, 2: 0.01, 3: 0.02}}
    assert judge(claim, figures).verdict == "reproduced"
    dense = next(c for text, c in claims.items() if text.startswith("Unpruned"))
    figures = {dense.left: {0: 0.851, 1: 0.849, 2: 0.85}, dense.right: {0: 0.85, 1: 0.85, 2: 0.85}}
    assert judge(dense, figures).verdict == "inconclusive"


def test_the_largest_term_is_its_closed_form():
    assert largest_term(577) == pytest.approx(0.01 * math.log(2) / 577, rel=1e-5)
    assert largest_term(577) < 1.21e-5
    bound = next(c for c in all_claims("mini", 17) if isinstance(c, Fact) and "cannot exceed" in c.text)
    assert judge(bound, {bound.figure: {0: largest_term(577)}}).verdict == "reproduced"


def test_the_protocol_is_checked_from_the_results(tiny_run):
    from shared.report import rows_of

    result = json.loads((tiny_run / "results.json").read_text())
    found = study_figures(rows_of(result), {"a": result, "b": result}, {})
    assert found["batches.same", 0] == 1
    assert found["zeros.miss", 0] == 0
    other = {**result, "order_digest": "another"}
    assert study_figures(rows_of(result), {"a": result, "b": other}, {})["batches.same", 0] == 0
    for row in other["figures"]:
        if row["metric"] == "global_l1.30.nonzero":
            row["value"] -= 3
    assert study_figures(rows_of(result), {"a": result, "b": other}, {})["zeros.miss", 0] == 3


def test_the_pictures_are_drawn(tiny_run, tmp_path):
    from sparsevit.latency import Timing

    timings = [Timing(name, 64, 1, 1, 0.1, 0.09, 0.11, 1.0, 640.0) for name in ("dense", "50 % zeros, masked",
               "50 % neurons removed", "50 % neurons and heads removed")]  # fmt: skip
    draw([tiny_run], tmp_path, {tiny_run.name: timings})
    names = {path.stem for path in tmp_path.glob("*.png")}
    assert names == {"accuracy_by_ratio", "accuracy_by_latency", "attention_maps", "entropy_by_block", "neuron_scores"}
    assert {path.stem for path in tmp_path.glob("*.svg")} == names


def test_part_of_a_study_is_not_published_and_an_unknown_arm_is_refused(tmp_path, capsys):
    assert main(["--scale", "smoke", "--methods", "paper", "--publish", "--out", str(tmp_path)]) == 2
    assert "--publish" in capsys.readouterr().err
    assert main(["--scale", "smoke", "--methods", "papr", "--out", str(tmp_path)]) == 2
    assert "choose from none, paper" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_two_arms_of_a_data_set_differ_in_nothing_but_the_penalty(repository):
    for data in ("cifar10", "cifar100", "imagenet100"):
        folder = repository / "sparsevit" / "configs"
        arms = [yaml.safe_load((folder / f"{data}_authors{end}.yaml").read_text()) for end in ("", "_without")]
        assert [arm.pop("method") for arm in arms] == ["paper", "none"]
        assert arms[0] == arms[1]
