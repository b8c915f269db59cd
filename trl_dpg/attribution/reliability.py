"""How much of a ranking by scores is chance."""

import math

import numpy as np
from scipy.stats import rankdata


RELIABLE = 0.8
"""Correlation of a ranking with another like it, from which on there is nothing to say against it."""


def rank_correlation(repeats: np.ndarray) -> float | None:
    """
    Spearman's correlation of the scores in several orders, the mean over all pairs of orders.

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
    Correlation that the mean of `num_repeats` orders would have with another such mean (Spearman-Brown).

    Scores that disagree (a negative correlation) are no more reliable than those of chance.
    """
    agreement = max(correlation, 0.0)
    return num_repeats * agreement / (1 + (num_repeats - 1) * agreement)


def repeats_needed(correlation: float, target: float = RELIABLE) -> int | None:
    """Orders whose mean reaches a reliability of `target`; `None` if the correlation is too small to say."""
    if correlation <= 0.01:
        return None
    return math.ceil(target / (1 - target) * (1 / correlation - 1) - 1e-9)
