"""Intervals and comparisons against numbers computed by hand and by independent implementations."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.tuning.statistics import Comparison, Estimate, best_method, compare_with_best, estimate, holm


def test_interval_of_three_values_by_hand() -> None:
    """1, 2, 6: mean 3, sd sqrt(7), error sqrt(7/3); the 0.975 quantile of t with 2 degrees of freedom is 4.302653."""
    half = 4.302653 * math.sqrt(7 / 3)
    found = estimate([1.0, 2.0, 6.0])
    assert found.mean == 3 and found.seeds == 3
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=1e-5)


def test_interval_of_five_values_by_hand() -> None:
    """10 to 14: mean 12, sd sqrt(2.5), error sqrt(0.5); t with 4 degrees of freedom: 2.776445."""
    found = estimate([10.0, 11.0, 12.0, 13.0, 14.0])
    assert (found.low, found.high) == pytest.approx(
        (12 - 2.776445 / math.sqrt(2), 12 + 2.776445 / math.sqrt(2)), abs=1e-5
    )


def test_one_value_has_no_interval_and_none_is_refused() -> None:
    assert estimate([7.5]) == Estimate(7.5, None, None, 1)
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def test_equal_values_have_an_interval_of_no_width() -> None:
    value = 0.1 + 0.2
    assert estimate([value] * 3) == (pytest.approx(value), pytest.approx(value), pytest.approx(value), 3)


def test_intervals_of_three_seeds_cover_the_mean() -> None:
    values = np.random.default_rng(0).normal(size=(2000, 3))
    found = [estimate(row.tolist()) for row in values]
    covered = np.mean([e.low is not None and e.high is not None and e.low <= 0 <= e.high for e in found])
    assert 0.935 <= covered <= 0.965  # a percentile bootstrap: 0.79


def test_holm_by_hand() -> None:
    """Smallest first: 4 x 0.01, 3 x 0.015, 2 x 0.03, 1 x 0.04, the last raised to the one before."""
    assert holm([0.03, 0.01, 0.04, 0.015]) == pytest.approx([0.06, 0.04, 0.06, 0.045])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_holm_rejects_as_its_step_down_procedure(p_values: list[float]) -> None:
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
            if (len(p_values) - rank) * p_values[index] > level:
                break
            rejected.add(index)
        assert {i for i, p in enumerate(holm(p_values)) if p <= level} == rejected


def test_comparison_is_paired_by_seed() -> None:
    best = {0: 50.0, 1: 60.0, 2: 70.0, 3: 65.0}
    other = {3: 64.0, 1: 59.2, 0: 49.1, 2: 69.3, 9: 99.0}  # another order, and a seed that the best lacks
    other.pop(9)
    found = compare_with_best({"other": other, "best": best})["other"]
    differences = [49.1 - 50, 59.2 - 60, 69.3 - 70, 64.0 - 65]
    assert found.difference == pytest.approx(estimate(differences))
    assert found.p == pytest.approx(stats.ttest_rel([49.1, 59.2, 69.3, 64.0], [50, 60, 70, 65]).pvalue)
    assert found.reference == "best" and found.won == 0 and found.within_noise is False
    # Unpaired, the spread between seeds would hide it.
    assert stats.ttest_ind(list(other.values()), list(best.values())).pvalue > 0.5


def test_only_common_seeds_are_compared() -> None:
    found = compare_with_best({"best": {0: 10.0, 1: 12.0}, "other": {1: 11.0, 2: 9.0}, "alone": {7: 1.0}, "none": {}})
    assert set(found) == {"other"}
    assert found["other"] == Comparison("best", Estimate(-1.0, None, None, 1), None, 0.0)
    assert found["other"].within_noise is None


def test_p_is_corrected_for_the_number_of_comparisons() -> None:
    values = {
        "best": {0: 10.0, 1: 11.0, 2: 12.0, 3: 13.0},
        "b": {0: 9.0, 1: 10.2, 2: 10.9, 3: 12.1},
        "c": {0: 9.7, 1: 9.9, 2: 11.9, 3: 12.4},
    }
    raw = [stats.ttest_rel(list(values[m].values()), list(values["best"].values())).pvalue for m in "bc"]
    found = compare_with_best(values)
    assert [found[m].p for m in "bc"] == pytest.approx([2 * raw[0], raw[1]]) and raw[0] < raw[1]


def test_a_difference_that_is_lost_by_correction_is_noise() -> None:
    values = {f"m{i}": {s: 10 - 0.5 + d for s, d in enumerate((0.0, 0.3, -0.25, 0.1))} for i in range(9)}
    one = {"best": dict.fromkeys(range(4), 10.0), "m0": values["m0"]}
    assert compare_with_best(one)["m0"].within_noise is False
    assert compare_with_best(one | values)["m0"].within_noise is True


def test_share_won_counts_ties_half() -> None:
    best = {0: 10.0, 1: 20.0, 2: 30.0, 3: 40.0}
    other = {0: 11.0, 1: 20.0, 2: 29.0, 3: 30.0}
    assert compare_with_best({"best": best, "other": other})["other"].won == pytest.approx(1.5 / 4)


def test_equal_and_shifted_methods() -> None:
    best = {0: 10.0, 1: 20.0}
    found = compare_with_best({"best": best, "same": dict(best), "shifted": {0: 9.0, 1: 19.0}})
    assert found["same"].p == 1 and found["same"].within_noise is True and found["same"].won == 0.5
    assert found["shifted"].p == 0 and found["shifted"].difference == (-1.0, -1.0, -1.0, 2)


def test_best_does_not_depend_on_order_unless_equal() -> None:
    values = {"a": {0: 1.0}, "b": {0: 3.0, 1: 2.0}, "c": {}}
    assert {best_method({k: values[k] for k in order}) for order in permutations("abc")} == {"b"}
    assert best_method({"c": {}}) is None and best_method({}) is None
    assert compare_with_best({"c": {}}) == {}
