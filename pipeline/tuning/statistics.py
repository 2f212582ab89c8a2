"""Means, 95 % intervals and paired differences over seeds.

Intervals are Student's: with three seeds the "95 %" interval of a percentile bootstrap contains the
mean in 79 % of cases, Student's in 95 %. The unit is the seed: runs of one seed on several folds share
training images, so they are averaged before, and count once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
FEW_SEEDS = 5  # below it an interval is so wide that it seldom separates methods
INTERVAL = "95 % Student t interval over seeds"
COMPARISON = "paired by seed, Student t, p corrected by Holm for the number of comparisons; within noise: p above 0.05"


class Estimate(NamedTuple):
    """A mean over seeds.

    Attributes:
        mean: The mean, in the unit of the values.
        low, high: The ends of its Student interval; None with one seed, which says nothing of the spread.
        seeds: Number of seeds.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int


class Comparison(NamedTuple):
    """A method against the best one, over the seeds that both have.

    Attributes:
        reference: Label of the best method.
        difference: The method's value minus the best method's, seed by seed.
        p: Two-sided p of the paired t-test, corrected by Holm; None with fewer than two common seeds.
        won: Share of the common seeds in which the method was better; a tie counts half.
    """

    reference: str
    difference: Estimate
    p: float | None
    won: float

    @property
    def within_noise(self) -> bool | None:
        """The seeds do not tell the two apart; None where one seed can't say."""
        return None if self.p is None else self.p > 1 - CONFIDENCE


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student interval of independent values, one a seed.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("got no values, expected at least one")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, None, None, 1)
    error = _standard_error(values, mean)
    if error == 0:
        return Estimate(mean, mean, mean, len(values))
    from scipy.stats import t  # here: a command that only shows progress does without scipy

    low, high = t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=error)
    return Estimate(mean, float(low), float(high), len(values))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: each p times the number of hypotheses not yet rejected, never decreasing, at most 1."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def best_method(values: Mapping[str, Mapping[int, float]]) -> str | None:
    """The method with the highest mean, the first of equals; None if no method has a value."""
    means = {method: math.fsum(seeds.values()) / len(seeds) for method, seeds in values.items() if seeds}
    return max(means, key=lambda method: means[method]) if means else None


def compare_with_best(values: Mapping[str, Mapping[int, float]]) -> dict[str, Comparison]:
    """Each other method against the best one.

    Args:
        values: By method and seed, folds already averaged.

    Returns:
        By method, without the best one and those that share no seed with it.
    """
    best = best_method(values)
    if best is None:
        return {}
    pairs = {
        method: [(seeds[seed], values[best][seed]) for seed in sorted(seeds) if seed in values[best]]
        for method, seeds in values.items()
        if method != best
    }
    pairs = {method: common for method, common in pairs.items() if common}
    tested = [method for method, common in pairs.items() if len(common) > 1]
    corrected = dict(zip(tested, holm([_paired_p([a - b for a, b in pairs[m]]) for m in tested]), strict=True))
    return {
        method: Comparison(
            best,
            estimate([own - other for own, other in common]),
            corrected.get(method),
            sum((own > other) + (own == other) / 2 for own, other in common) / len(common),
        )
        for method, common in pairs.items()
    }


def _standard_error(values: Sequence[float], mean: float) -> float:
    """Standard error of the mean; exactly 0 for equal values, whatever rounding did to their mean."""
    if len(set(values)) == 1:
        return 0.0
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _paired_p(differences: Sequence[float]) -> float:
    """Two-sided p of the hypothesis that the mean difference is 0."""
    mean = math.fsum(differences) / len(differences)
    error = _standard_error(differences, mean)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    from scipy.stats import t

    return float(2 * t.sf(abs(mean) / error, len(differences) - 1))
