"""Measures how much of a ranking by scores is chance."""

import math

import numpy as np
from scipy.stats import rankdata


RELIABLE = 0.8
"""A ranking is reliable if its correlation with a ranking from other random orders is at least this."""


def rank_correlation(repeats: np.ndarray) -> float | None:
    """
    Spearman's correlation of the scores in different orders, averaged over all pairs of orders.

    Args:
        repeats (`np.ndarray` of shape `[R, N]`): Scores of N samples in R orders.

    Returns:
        `float` or `None`: `None` if there are fewer than two samples, or all scores of an order are equal.
    """
    if repeats.shape[1] < 2 or (repeats.max(axis=1) == repeats.min(axis=1)).any():
        return None
    ranks = rankdata(repeats, axis=1)
    return float(np.asarray(np.corrcoef(ranks))[np.triu_indices(len(repeats), k=1)].mean())


def reliability(correlation: float, num_repeats: int) -> float:
    """
    Expected correlation of the mean scores of `num_repeats` orders with those of as many other orders.

    This is the Spearman-Brown formula. A negative correlation counts as 0.
    """
    agreement = max(correlation, 0.0)
    return num_repeats * agreement / (1 + (num_repeats - 1) * agreement)


def repeats_needed(correlation: float, target: float = RELIABLE) -> int | None:
    """Number of orders whose mean has a reliability of `target`. `None` if the correlation is at most 0.01."""
    if correlation <= 0.01:
        return None
    return math.ceil(target / (1 - target) * (1 / correlation - 1) - 1e-9)
