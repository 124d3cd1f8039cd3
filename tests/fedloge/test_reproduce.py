"""The study's plan: which runs, under which settings, and what may be published."""

import re

import pytest

from fedloge.claims import GENERIC_BASELINES, PERSONAL_BASELINES, all_claims
from fedloge.config import Config
from fedloge.reproduce import PLANS, jobs_of, main, report_of
from shared.claims import Fact
from shared.cli import find_config
from shared.config import load
from shared.report import Row


@pytest.mark.parametrize(("method", "norm"), [("fedloge", 5.0), ("dense_etf", 5.0)])
def test_a_method_chosen_by_name_keeps_the_keys_that_it_shares_with_the_files_method(method, norm):
    config = load(find_config("mini", "fedloge"), Config, [f"method={method}"])
    assert config.method.name == method
    assert config.method.norm == norm


def test_a_method_that_lacks_the_files_keys_takes_none_of_them():
    config = load(find_config("mini", "fedloge"), Config, ["method=fedprox"])
    assert config.method.model_dump() == {"name": "fedprox", "mu": 0.01}


def test_the_jobs_of_a_study_have_folders_of_their_own_and_commands_that_load(tmp_path):
    jobs = jobs_of(find_config("smoke", "fedloge"), ["fedloge", "dense_etf", "ditto"], 2, tmp_path)
    assert len({job.folder for job in jobs}) == len(jobs) == 6
    assert [job.seed for job in jobs] == [0, 0, 0, 1, 1, 1]
    for job in jobs:
        path, overrides = job.arguments[1], job.arguments[4:]
        config = load(find_config(path, "fedloge"), Config, overrides)
        assert (config.method.name, config.seed) == (job.group, job.seed)


def test_part_of_a_study_is_not_published(tmp_path, capsys):
    assert main(["--scale", "smoke", "--methods", "fedloge", "--publish", "--out", str(tmp_path)]) == 2
    assert "--publish" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_fedbn_is_an_opponent_of_the_personal_models_wherever_it_is_run():
    def opponents(fedbn):
        claims = all_claims(10, 64, 0.6, fedbn=fedbn)
        return [c.right for c in claims if isinstance(getattr(c, "right", None), tuple) and "personal" in c.left]

    assert len(opponents(True)) == len(opponents(False)) == 2
    assert all("fedbn/personal.accuracy" in right for right in opponents(True))
    assert not any("fedbn/personal.accuracy" in right for right in opponents(False))


@pytest.mark.parametrize("own", ["{name: fedloge, heads_bias: true, scale: 1.7}", "{name: fedavg}"])
def test_facts_are_of_the_arm_of_the_papers_name_whatever_the_files_own_method(tmp_path, own):
    path = tmp_path / "own.yaml"
    text = find_config("smoke", "fedloge").read_text()
    path.write_text(re.sub(r"(?m)^method:.*$", f"method: {own}", text))
    config = load(path, Config)
    row = Row("fedloge", "own", "fedloge", 0, "once", "-", "sent.beyond_backbone", 0.0, "CPU", "float32", "0" * 40, 1.0,
              "python -m fedloge.train --config smoke")  # fmt: skip
    facts = {j.claim.figure: j.claim.value for j in report_of(path, ["fedloge"], [row], 10, False, "x").judgements
             if isinstance(j.claim, Fact)}  # fmt: skip
    assert facts["fedloge/sent.beyond_backbone"] == 10 * (64 + ("true" in own))
    assert facts["fedloge/etf.zero_share"] == pytest.approx(0.6)
    gla = load(path, Config, ["method=fedavg_gla"]).method
    assert getattr(gla, "scale", None) == getattr(config.method, "scale", 1.0)


def test_every_baseline_of_a_best_of_claim_runs_in_the_small_study():
    assert not {*GENERIC_BASELINES, *PERSONAL_BASELINES} & set(PLANS["mini"].left_out)
    assert len({claim.text for claim in all_claims(10, 64, 0.6)}) == len(all_claims(10, 64, 0.6))
