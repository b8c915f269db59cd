"""How far lengths are from a target."""

import numpy as np

from ...length_target import LengthTarget


NUM_LEVELS = 10_000
"""Quantiles that stand for a target."""


def distances(lengths: np.ndarray, target: LengthTarget | np.ndarray) -> dict[str, float]:
    """
    Distances of N samples to a target, or to other samples.

    Args:
        lengths (`np.ndarray` of shape `[N]`): Lengths above 0.
        target ([`LengthTarget`] or `np.ndarray`): The target, or the other samples' lengths above 0.

    Returns:
        `dict[str, float]`:
            `wasserstein`: the Wasserstein-1 distance in log-length, that is the mean of |log ℓ - log q| over matched
            quantiles, in nats. `ks`: the Kolmogorov-Smirnov distance, the largest difference of the two cumulative
            distributions, from 0 to 1. Both `nan` without samples.
    """
    others = target.spread(NUM_LEVELS) if isinstance(target, LengthTarget) else target
    if len(lengths) == 0 or len(others) == 0:
        return {"wasserstein": float("nan"), "ks": float("nan")}
    # Not by scipy.stats, whose import takes a second
    mine, theirs = np.sort(np.log(lengths)), np.sort(np.log(others))
    places = np.sort(np.concatenate([mine, theirs]))
    reached = (np.searchsorted(part, places, side="right") / len(part) for part in (mine, theirs))
    difference = np.abs(np.subtract(*reached))  # of the cumulative distributions
    return {"wasserstein": float(difference[:-1] @ np.diff(places)), "ks": float(difference.max())}


def log_bins(lengths: np.ndarray, target: LengthTarget, width: float) -> np.ndarray:
    """Edges of bins of equal width in log-length `[B + 1]`, which hold all lengths and the target's quantiles."""
    logs = np.log(np.concatenate([lengths, target.spread(NUM_LEVELS)]))
    first, last = np.floor(logs.min() / width), np.floor(logs.max() / width) + 1
    return np.arange(first, last + 1) * width


def effective_sample_size(lengths: np.ndarray, target: LengthTarget, width: float = 0.1) -> float:
    """
    How many samples of the target the lengths are worth, if each is weighted by what the target has more or less of
    its length: (Σ w)² / Σ w² (Kish, Survey Sampling, 1965), with weights by bins of log-length.

    Args:
        lengths (`np.ndarray` of shape `[N]`): Lengths above 0.
        target ([`LengthTarget`]): The target. What it has at lengths that no sample has cannot count.
        width (`float`, *optional*, defaults to `0.1`): Width of a bin in log-length.
    """
    if len(lengths) == 0:
        return 0.0
    edges = log_bins(lengths, target, width)
    counts = np.histogram(np.log(lengths), edges)[0]
    wanted = np.histogram(np.log(target.spread(NUM_LEVELS)), edges)[0] / NUM_LEVELS
    weights = np.divide(wanted, counts, out=np.zeros(len(counts)), where=counts > 0)
    total = (weights * counts).sum()
    return float(total**2 / (weights**2 * counts).sum()) if total else 0.0
