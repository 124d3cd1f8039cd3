"""The study's plan, claims and pictures; the configurations' promises."""

import csv
import json
import math

import pytest
import yaml

from shared.claims import Comparison, Fact, judge
from shared.cli import find_config
from shared.config import load
from shared.study import Outcome
from sparsevit.choose import GRID, chosen, read_line
from sparsevit.claims import MEANS, all_claims
from sparsevit.config import METHODS, AuthorsRecipe, Config
from sparsevit.eval import derived
from sparsevit.plots import draw
from sparsevit.prune import groups_of
from sparsevit.reproduce import ARMS, PLANS, jobs_of, main, plan_elsewhere
from sparsevit.study import COLUMNS, PAIRED, largest_term, paired_figures, study_figures


def test_the_jobs_of_a_study_have_folders_of_their_own_and_commands_that_load(tmp_path):
    jobs = jobs_of(find_config("smoke", "sparsevit"), METHODS, 2, tmp_path)
    assert len({job.folder for job in jobs}) == len(jobs) == 2 * len(METHODS)
    assert [job.seed for job in jobs] == [0] * len(METHODS) + [1] * len(METHODS)
    for job in jobs:
        config = load(find_config(job.arguments[1], "sparsevit"), Config, job.arguments[4:])
        assert (config.method, config.seed) == (job.group, job.seed)


def test_the_small_study_has_every_arm_of_the_issue_and_seeds_enough():
    wanted = {"none", "paper", "null", "flip", "attn_l1", "paper_strong", "attn_sparse", "l1", "ffn_log", "group"}
    assert set(ARMS) == set(PLANS["mini"].methods) == wanted
    assert {"none", "paper", "null", "flip"} <= set(PLANS["paper"].methods)
    assert PLANS["mini"].seeds >= 4
    assert not PLANS["smoke"].statistics


def known_figures(config, methods):
    """`method/metric` of all that a study of these arms computes of its runs (final figures and those of a curve)."""
    metrics = {"dense.accuracy", "neurons.silent", "attention.entropy_last", "attention.penalty_last"}
    accuracies = {}
    for group in groups_of(config):
        for ratio in group.ratios:
            name = group.name(ratio)
            metrics.add(f"{name}.{'recovered' if group.recover else 'accuracy'}")
            accuracies |= {} if group.recover else {f"{name}.accuracy": 0.5}
    metrics |= set(derived({"dense.accuracy": 0.9, **accuracies}, config))
    return {f"{method}/{metric}" for method in methods for metric in metrics}


def test_every_claim_of_the_small_study_is_asked_of_figures_that_it_has():
    config = load(find_config("mini", "sparsevit"), Config)
    known = known_figures(config, PLANS["mini"].methods)
    own = set(paired_figures({name: {0: 0.5} for name in known}))
    own |= {"batches.same", "zeros.miss", "vit_b16.parameters", "vit_b16.prunable", "bound.term_384"}
    own |= {"speed.masked", "speed.neurons", "speed.neurons_heads"}
    known |= {f"study/{name}" for name in own}
    for claim in all_claims("mini", 17):
        sides = [claim.left, claim.right] if isinstance(claim, Comparison) else [claim.figure]
        assert [side for side in sides if isinstance(side, str) and side not in known] == [], claim.text
    for metric in (*COLUMNS.values(), *PAIRED.values()):
        assert f"none/{metric}" in known


@pytest.mark.parametrize("name", ["cifar10_authors", "cifar100_authors", "imagenet100_authors"])
def test_a_study_of_the_papers_data_has_the_figures_of_the_papers_claims(name):
    config = load(find_config(name, "sparsevit"), Config)
    known = known_figures(config, PLANS["paper"].methods)
    own = {f"study/{n}" for n in paired_figures({n: {0: 0.5} for n in known}, name.removesuffix("_authors"))}
    published = [c for c in all_claims(name, 577) if isinstance(c, Comparison) and c.source.startswith("abstract")]
    assert len(published) == (4 if name == "cifar10_authors" else 5)
    for claim in published:
        sides = {side for side in (claim.left, claim.right) if isinstance(side, str)}
        assert sides <= known | own, claim.text


def test_only_a_study_of_the_papers_data_is_held_against_the_papers_numbers():
    below = {name: [c.left for c in all_claims(name, 577) if isinstance(c, Comparison) and c.left.startswith("study/b")]
             for name in ("mini", "s1", "cifar10_authors", "cifar100_authors", "imagenet100_authors")}  # fmt: skip
    assert below == {
        "mini": [], "s1": [], "cifar10_authors": ["study/below.cifar10"],
        "cifar100_authors": ["study/below.cifar100", "study/below.dense"],
        "imagenet100_authors": ["study/below.imagenet100", "study/below.dense"],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["s1", "s2", "cifar100_ours"])
def test_elsewhere_no_arm_is_run_whose_coefficient_was_chosen_for_the_small_study(name):
    plan = plan_elsewhere(name)
    own = load(find_config(name, "sparsevit"), Config).method
    assert own in plan.methods
    assert not {"l1", "ffn_log", "attn_sparse", "group"} & set(plan.methods) - {own}
    assert {"none", "paper", "null", "flip"} <= set(plan.methods)


def test_the_papers_numbers_stand_with_their_data_sets():
    def shown(name):
        published = [c for c in all_claims(name, 577) if isinstance(c, Comparison)][:2]
        return [c.paper for c in published]

    assert shown("cifar10_authors") == ["none stated", "+0.568, abstract, one run"]
    assert shown("cifar100_authors_without")[1] == "+1.764, abstract, one run"
    assert "+0.256" in shown("imagenet100_authors")[1]
    assert shown("cifar100_ours") == shown("mini")  # another protocol on the same data
    assert all(f"+{value}" in shown("mini")[1] for value in MEANS.values())
    assert len({claim.text for claim in all_claims("mini", 17)}) == len(all_claims("mini", 17))


def test_effects_are_paired_over_seeds():
    figures = {
        f"{m}/global_l1.mean_10_50": {0: v, 1: v + 0.1} for m, v in (("none", 0.5), ("paper", 0.48), ("null", 0.5))
    }
    figures |= {f"{m}/dense.accuracy": {0: v, 1: v} for m, v in (("none", 0.5), ("paper", 0.501))}
    found = paired_figures(figures, "cifar10")
    assert found["effect.paper"] == pytest.approx({0: 0.02, 1: 0.02})
    assert found["effect.floor"] == pytest.approx({0: 0, 1: 0})
    assert "below.dense" not in found
    assert paired_figures(figures, "cifar100")["below.dense"] == pytest.approx({0: 0.0002, 1: 0.0002})
    assert found["below.cifar10"] == pytest.approx({0: 0.02568, 1: 0.02568})


def test_a_study_can_see_an_effect_and_its_absence():
    claims = {c.text: c for c in all_claims("mini", 17)}
    claim = next(c for text, c in claims.items() if text.startswith("L1 on the weights"))
    figures = {claim.left: {0: 0.83, 1: 0.82, 2: 0.84, 3: 0.83}, claim.right: {0: 0.70, 1: 0.66, 2: 0.73, 3: 0.69}}
    assert judge(claim, figures).verdict == "reproduced"
    dense = next(c for text, c in claims.items() if text.startswith("Unpruned"))
    figures = {dense.left: {0: 0.851, 1: 0.849, 2: 0.85}, dense.right: {0: 0.85, 1: 0.85, 2: 0.85}}
    assert judge(dense, figures).verdict == "inconclusive"


def test_the_largest_term_is_its_closed_form():
    assert largest_term(577) == pytest.approx(0.01 * math.log(2) / 577, rel=1e-5)
    assert largest_term(577) < 1.21e-5
    bound = next(c for c in all_claims("mini", 17) if isinstance(c, Fact) and "adds at most" in c.text)
    assert judge(bound, {bound.figure: {0: largest_term(577)}}).verdict == "reproduced"


def test_the_protocol_is_checked_from_the_results(tiny_run):
    from shared.report import rows_of

    result = json.loads((tiny_run / "results.json").read_text())
    assert ("batches.same", 0) not in study_figures(rows_of(result), {"a": result}, {}), "one arm agrees with nothing"
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


def test_a_report_begins_with_the_verdict_and_has_the_paired_table(tmp_path, tiny, monkeypatch, capsys):
    from sparsevit import train

    short = ("prune={set: authors, pruners: [global_l1, wanda], removals: [neurons], removal_ratios: [0.5, 0.75], "
             "calibration_images: 20}",)  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny("paper", *short).model_dump(mode="json")))
    monkeypatch.setattr("shared.study.run_jobs", lambda module, jobs, workers: {
        job.name: Outcome(train.main(job.arguments), 0.0) for job in jobs
    })  # fmt: skip
    arguments = ["--config", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "runs"), "--scale", "mini"]
    assert main([*arguments, "--methods", "none", "paper", "flip", "null", "--seeds", "3"]) == 0
    folder = tmp_path / "runs" / "sparsevit" / "report-tiny-partial"
    text = (folder / "report.md").read_text()
    assert text.splitlines()[2] == (folder / "verdict.md").read_text().strip()
    assert text.splitlines()[2].startswith("The paper's claim is ")
    assert "the largest change by null, flip" in text.splitlines()[2]
    assert "comparisons are judged" in text.splitlines()[4]
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert [title.split()[1] for title in titles] == ["Accuracy", "Accuracy", "Pruners,", "Latency", "Claims"]
    rows = [line.split(" |")[0] for line in (folder / "paired.md").read_text().splitlines()[2:]]
    assert rows == ["| paper - none", "| flip - none", "| null - none", "| paper - flip"]
    printed = capsys.readouterr().out
    assert printed.index("The paper's claim is") < printed.index("paired differences in points")


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


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "imagenet100"])
def test_the_published_protocol_has_the_papers_settings(data):
    config = load(find_config(f"{data}_authors", "sparsevit"), Config)
    assert (config.epochs, config.batch_size, config.data.image_size, config.precision) == (20, 16, 384, "float32")
    assert (config.model.arch, config.model.dropout, config.prune.set) == ("vit_b16", 0.1, "authors")
    assert config.recipe == AuthorsRecipe(name="authors", lr=1e-3, weight_decay=1e-4, warmup_steps=500)
    assert (config.recipe.high_momentum, config.recipe.low_momentum) == (0.95, 0.85)
    assert config.data.mean == config.data.std == (0.5, 0.5, 0.5)
    assert (config.coefficients.paper, config.coefficients.scope, config.prune.recover) == (0.01, "last", None)


def test_the_arms_of_mini_have_the_coefficients_that_the_choice_on_held_out_images_gave(repository):
    with open(repository / "results" / "sparsevit" / "mini_choice" / "choice.csv", newline="") as file:
        picked = chosen([read_line(line) for line in csv.DictReader(file)])
    coefficients = load(find_config("mini", "sparsevit"), Config).coefficients
    assert picked == {arm: getattr(coefficients, arm) for arm in GRID}
    assert min(PLANS[scale].seeds for scale in ("mini", "paper")) >= 5
