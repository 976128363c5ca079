"""How well what was predicted agrees with what came of it: rank correlations, slopes, and their
intervals over seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A number and its interval of 95 %, NaN where there is one seed only."""

    value: float
    low: float
    high: float


def rank_correlation(predicted: Sequence[float], actual: Sequence[float]) -> float:
    """Return Spearman's rank correlation: 0 for a predictor that says the same of all, NaN where
    nothing differs in what came of it.

    >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 15.0])
    0.5
    """
    if np.ptp(actual) == 0:
        return float("nan")
    if np.ptp(predicted) == 0:
        return 0.0
    return float(stats.spearmanr(predicted, actual).statistic)


def ratio_over_seeds(above: Sequence[float], below: Sequence[float]) -> Estimate:
    """Return a ratio of sums over seeds, with its bootstrap interval of 95 %.

    A mean over sets is one, of each seed's sum and its number of sets; a slope through the origin
    is one, of each seed's Σ said × came and its Σ said². Seeds are drawn with replacement, each
    whole: items of one seed share a network, and are no repeats of each other. With five seeds such
    an interval is too narrow rather than too wide.

    >>> ratio_over_seeds([1.0, 1.0], [2.0, 2.0])
    Estimate(value=0.5, low=0.5, high=0.5)
    """
    tops, bottoms = np.asarray(above, float), np.asarray(below, float)
    value = float(tops.sum() / bottoms.sum())
    if len(tops) == 1:
        return Estimate(value, float("nan"), float("nan"))
    rows = np.random.default_rng(0).integers(len(tops), size=(RESAMPLES, len(tops)))
    low, high = np.quantile(tops[rows].sum(1) / bottoms[rows].sum(1), [0.025, 0.975])
    return Estimate(value, float(low), float(high))


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """Return a mean and its interval of 95 % by Student's t.

    >>> mean_over_seeds([2.0, 2.0, 2.0])
    Estimate(value=2.0, low=2.0, high=2.0)
    """
    center = float(np.mean(values))
    if len(values) == 1:
        return Estimate(center, float("nan"), float("nan"))
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Estimate(center, center - half, center + half)
