import math

import pytest

from shared.claims import Comparison, Fact, judge, number, show_difference, show_mean
from shared.metrics import paired_difference

BASE = dict(enumerate((0.50, 0.52, 0.48, 0.51, 0.49)))


def shifted(by: float, noise: float = 0.001) -> dict[int, float]:
    return {seed: value + by + noise * (-1) ** seed for seed, value in BASE.items()}


def verdict(left: dict[int, float], right: dict[int, float], **named) -> str:
    claim = Comparison("a above b", "Table 1", "a/x", "b/x")
    return judge(claim, {"a/x": left, "b/x": right}, **named).verdict


def test_the_verdict_follows_the_side_of_the_interval():
    assert verdict(shifted(0.05), BASE) == "reproduced"
    assert verdict(shifted(-0.05), BASE) == "not reproduced"
    assert verdict(shifted(0.01, noise=0.05), BASE) == "inconclusive"
    assert verdict(BASE, BASE) == "inconclusive"


def test_the_verdict_turns_where_the_interval_reaches_zero():
    noise = 0.01
    difference = paired_difference(list(shifted(0, noise).values()), list(BASE.values()))
    edge = (difference.high - difference.low) / 2 - difference.mean
    assert verdict(shifted(edge + 1e-6, noise), BASE) == "reproduced"
    assert verdict(shifted(edge - 1e-6, noise), BASE) == "inconclusive"


def test_differences_are_paired_by_seed_not_by_order():
    left = {seed: BASE[seed] + 0.01 for seed in reversed(BASE)}
    assert verdict(left, BASE) == "reproduced"


def test_fewer_than_three_pairs_or_a_scale_without_meaning_give_no_verdict():
    few = {0: 0.9, 1: 0.9, 7: 0.9}
    assert verdict(few, BASE) == "not run"
    assert verdict({}, BASE) == "not run"
    assert verdict(BASE, {}) == "not run"
    assert verdict(shifted(0.05), BASE, statistics=False) == "not run"
    assert verdict(dict.fromkeys(range(3), 0.9), dict.fromkeys(range(3), 0.1)) == "reproduced"


def test_of_several_opponents_the_best_is_taken_and_named():
    claim = Comparison("a above all", "Table 1", "a/x", ("b/x", "c/x"))
    figures = {"a/x": shifted(0.02), "b/x": BASE, "c/x": shifted(0.05)}
    found = judge(claim, figures)
    assert found.verdict == "not reproduced"
    assert found.ours.endswith("against c")
    assert judge(claim, {**figures, "c/x": shifted(-0.05)}).verdict == "reproduced"


@pytest.mark.parametrize("missing", [{}, {"c/x": {}}])
def test_a_missing_opponent_does_not_make_a_claim_easier(missing):
    claim = Comparison("a above all", "Table 1", "a/x", ("b/x", "c/x"))
    assert judge(claim, {"a/x": shifted(0.1), "b/x": BASE, **missing}).verdict == "not run"


def test_a_comparison_with_a_number_uses_it_for_every_seed():
    assert judge(Comparison("a above chance", "-", "a/x", 0.1), {"a/x": BASE}).verdict == "reproduced"
    assert judge(Comparison("a above one", "-", "a/x", 1), {"a/x": BASE}).verdict == "not reproduced"


@pytest.mark.parametrize(
    ("relation", "values", "expected"),
    [
        ("==", (10.0,), "reproduced"), ("==", (10.0, 10.5), "reproduced"), ("==", (10.0, 10.51), "not reproduced"),
        ("==", (9.49,), "not reproduced"), ("<=", (10.5, -99), "reproduced"), ("<=", (10.6,), "not reproduced"),
        (">=", (9.5, 99), "reproduced"), (">=", (9.4,), "not reproduced"), ("==", (math.nan,), "not reproduced"),
        ("==", (), "not run"),
    ],
)  # fmt: skip
def test_a_fact_holds_in_every_run_within_its_tolerance_or_it_does_not(relation, values, expected):
    fact = Fact("ten", "-", "a/x", relation, 10, tolerance=0.5)
    found = judge(fact, {"a/x": dict(enumerate(values))}, statistics=False)
    assert found.verdict == expected
    assert found.n == len(values)


def test_a_fact_whose_figure_is_missing_is_not_run():
    assert judge(Fact("ten", "-", "a/x", "==", 10), {}).verdict == "not run"


def test_a_fact_shows_the_range_of_its_values():
    assert judge(Fact("ten", "-", "a/x", "==", 10), {"a/x": {0: 10.0, 1: 10.0}}).ours == "10"
    assert judge(Fact("ten", "-", "a/x", "<=", 10), {"a/x": {0: 9.0, 1: 0.5}}).ours == "0.5 to 9"


def test_figures_are_shown_as_a_person_writes_them():
    assert show_difference(paired_difference([0.5, 0.6, 0.7], [0.5, 0.55, 0.6])) == "+5.00 ± 5.00 [-7.42, +17.42]"
    assert (
        show_difference(paired_difference([2.0, 3.0], [1.0, 2.0]), percent=False) == "+1.000 ± 0.000 [+1.000, +1.000]"
    )
    assert show_mean([0.701, 0.703]) == "70.2 ± 0.1"
    assert show_mean([0.701]) == "70.1"
    assert show_mean([1.5, 2.5], percent=False) == "2.000 ± 0.707"
    assert [number(v) for v in (12406.0, 0.6, 8.4e-05, 0.0, -3.0)] == ["12,406", "0.6", "8.4e-05", "0", "-3"]
