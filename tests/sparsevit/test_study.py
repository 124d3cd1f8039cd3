"""What a study says of its runs: noise floor, verdict and its rule, tables; and the mathematics behind a claim."""

import math

import pytest
import torch

from shared.claims import Comparison, judge
from sparsevit.claims import STATISTIC, all_claims
from sparsevit.latency import Timing
from sparsevit.study import (
    TIMED_BATCHES,
    cautions,
    floor_arms,
    paired_figures,
    paired_table,
    study_figures,
    two_runs,
    verdict,
)


def figures_of(metric=STATISTIC, **arms):
    """`method/metric` -> seed -> value, from each arm's values by seed."""
    return {f"{arm}/{metric}": dict(enumerate(values)) for arm, values in arms.items()}


BASE = (0.80, 0.81, 0.79, 0.82)


def shifted(*points):
    return [b + p / 100 for b, p in zip(BASE, points, strict=True)]


def study(paper, **controls):
    values = figures_of(none=BASE, paper=shifted(*paper), **{arm: shifted(*p) for arm, p in controls.items()})
    return values | {f"study/{name}": found for name, found in paired_figures(values).items()}


def test_each_speed_is_of_its_own_network_at_the_largest_batch():
    names = {"50 % zeros, masked": 1.1, "50 % neurons removed": 1.3, "50 % heads removed": 1.2,
             "50 % neurons and heads removed": 1.7}  # fmt: skip
    timings = [Timing(name, batch, 1, 1, 0.1, 0.1, 0.1, speed + (batch == 1), 1.0)
               for batch in TIMED_BATCHES for name, speed in names.items()]  # fmt: skip
    found = study_figures([], {}, {"a": timings})
    speeds = [found[f"speed.{name}", 0] for name in ("masked", "neurons", "heads", "neurons_heads")]
    assert speeds == list(names.values())


def test_the_floor_of_a_seed_is_the_largest_change_by_a_control():
    found = study((1, 1, 1, 1), null=(0.1, -0.3, 0, 0), attn_l1=(0, 0, 0.2, 0), flip=(-0.2, 0.1, 0.1, -0.4))
    assert found["study/effect.floor"] == pytest.approx({0: 0.002, 1: 0.003, 2: 0.002, 3: 0.004})
    assert found["study/effect.paper"] == pytest.approx(dict.fromkeys(range(4), 0.01))


def test_the_floor_takes_the_controls_that_were_run_and_the_seeds_that_all_have():
    values = figures_of(none=BASE, null=shifted(0.1, 0.1, 0.1, 0.1), flip=shifted(0.5, 0.5, 0.5, 0.5)[:2])
    assert floor_arms(values) == ["null", "flip"]
    assert paired_figures(values)["effect.floor"] == pytest.approx({0: 0.005, 1: 0.005})
    assert "effect.floor" not in paired_figures(figures_of(none=BASE))


@pytest.mark.parametrize(
    ("paper", "flip", "word", "where", "beside"),
    [
        ((1.0, 1.1, 0.9, 1.0), (0.1, -0.1, 0.1, 0.1), "supported", "excludes 0", "above"),
        ((1.0, 1.1, 0.9, 1.0), (1.2, 1.2, 1.2, 1.2), "not supported", "excludes 0", "not above"),
        ((3.0, -1.0, 2.0, -1.6), (0.1, 0.1, 0.1, 0.1), "not supported", "includes 0", "above"),
        ((0.1, -0.1, 0.0, 0.05), (0.3, 0.1, 0.2, 0.1), "not supported", "includes 0", "not above"),
        ((-1.0, -1.1, -0.9, -1.0), (0.1, 0.1, 0.1, 0.1), "contradicted", "excludes 0", "above"),
    ],
)
def test_the_verdict_follows_its_rule(paper, flip, word, where, beside):
    text = verdict(study(paper, flip=flip))
    assert text.startswith(f"The paper's claim is {word} here: ")
    assert f"the interval {where}, and in size the mean is {beside} the noise floor" in text
    assert text.count(". ") == 0
    assert text.endswith(".")
    assert f"{sum(paper) / 4:+.2f} ±" in text
    assert "4 paired seeds" in text


def test_there_is_no_verdict_without_statistics_controls_or_seeds():
    whole = study((1.0, 1.1, 0.9, 1.0), flip=(0, 0, 0, 0))
    assert verdict(whole, statistics=False).startswith("No verdict")
    assert verdict(study((1.0, 1.1, 0.9, 1.0))).startswith("No verdict")
    assert verdict({name: {0: v[0], 1: v[1]} for name, v in whole.items()}).startswith("No verdict")


def test_the_scale_of_single_runs_and_the_number_of_comparisons_are_said():
    values = study((0.1, 0, 0, 0), flip=(0, 0, 0, 0))
    assert two_runs(values) == pytest.approx(math.sqrt(2) * math.sqrt(sum((b - 0.805) ** 2 for b in BASE) / 3))
    judgements = [judge(claim, values) for claim in all_claims("mini", 17)]
    compared = sum(isinstance(j.claim, Comparison) and j.n > 2 for j in judgements)
    assert compared == 4
    text = cautions(values, judgements)
    assert f"{100 * two_runs(values):.2f} points" in text
    assert "+0.568" in text
    assert "4 comparisons are judged" in text
    assert "same pre-trained weights" in text


def test_the_paired_table_holds_every_arm_against_none_and_the_penalty_against_its_negative():
    values = study((1.0, 1.1, 0.9, 1.0), null=(0, 0, 0, 0), flip=(0.5, 0.5, 0.5, 0.5))
    values |= figures_of("dense.accuracy", none=BASE, paper=shifted(2, 2, 2, 2))
    head, *body = paired_table(values, ("none", "paper", "null", "flip", "l1"))
    assert head == ["difference", "dense", "mean 10-50 %", "mean 10-80 %", "70 %", "80 %", "75 % neurons", "n"]
    rows = {row[0]: dict(zip(head, row, strict=True)) for row in body}
    assert list(rows) == ["paper - none", "null - none", "flip - none", "paper - flip"]
    assert rows["paper - none"]["mean 10-50 %"] == "+1.00 ± 0.08 [+0.87, +1.13]"
    assert rows["paper - none"]["dense"].startswith("+2.00 ± 0.00")
    assert rows["paper - flip"]["mean 10-50 %"].startswith("+0.50 ±")
    assert rows["paper - none"]["80 %"] == rows["null - none"]["dense"] == "-"
    assert rows["paper - none"]["n"] == "4"


def test_a_claim_about_an_arm_is_not_won_by_being_worse_before_pruning():
    """`l1` starts 6 points lower and ends 1 lower: it loses less, and is not better."""
    dense, pruned = (0.85, 0.86, 0.85), (0.70, 0.71, 0.70)
    values = figures_of("global_l1.80.accuracy", none=pruned, l1=[p - 0.01 for p in pruned])
    values |= figures_of("global_l1.80.drop", none=[a - b for a, b in zip(dense, pruned, strict=True)],
                         l1=[a - b - 0.05 for a, b in zip(dense, pruned, strict=True)])  # fmt: skip
    claims = [c for c in all_claims("mini", 17) if isinstance(c, Comparison)]
    claims = [c for c in claims if {c.left, c.right} <= set(values)]
    judged = {claim.headline: judge(claim, values).verdict for claim in claims}
    assert judged == {True: "not reproduced", False: "reproduced"}


def test_no_headline_is_about_a_drop():
    for name in ("mini", "cifar100_authors"):
        headlines = [c for c in all_claims(name, 17) if isinstance(c, Comparison) and c.headline]
        assert len(headlines) >= 6
        assert [c.text for c in headlines if "drop" in f"{c.left} {c.right}"] == []


def test_a_step_down_the_penalty_in_the_logits_raises_every_rows_entropy_to_first_order():
    for seed in range(300):
        n, scale = 2 + seed % 30, 0.2 + seed % 7
        draws = torch.Generator().manual_seed(seed)
        logits = (scale * torch.randn(20, n, generator=draws, dtype=torch.float64)).requires_grad_()
        a = torch.softmax(logits, -1)
        (down,) = torch.autograd.grad(torch.log1p(a * a).sum(), logits, retain_graph=True)
        (up,) = torch.autograd.grad(-torch.xlogy(a, a).sum(), logits)
        change = -(down * up).sum(-1)
        g, mean = 2 * a / (1 + a * a), lambda v, a=a: (a * v).sum(-1, keepdim=True)
        formula = (a.square() * (g - mean(g)) * (a.log() - mean(a.log()))).sum(-1)
        assert torch.allclose(change, formula, rtol=1e-6, atol=1e-14)
        assert bool((change > -1e-14).all())
        assert float(change.max()) > 0
