"""The rank correlation that the claim on row lengths is judged by."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedloge.eval import spearman


def test_spearman_by_hand_with_ties():
    # Ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5.
    assert spearman([10, 20, 20, 30], [1, 5, 4, 9]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(spearman([1], [2]))


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=30, unique=True))
def test_spearman_sees_only_the_order(values):
    assert spearman(values, [math.exp(v / 10) for v in values]) == pytest.approx(1)
    assert spearman(values, [-(v**3) for v in values]) == pytest.approx(-1)


def test_values_of_unequal_number_are_refused():
    with pytest.raises(ValueError, match="2 values against 1"):
        spearman([1.0, 2.0], [1.0])
