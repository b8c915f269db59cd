"""Samples whose lengths follow a target, chosen from those at hand."""

from dataclasses import dataclass

import numpy as np

from ...length_target import LengthTarget
from ..lengths.distances import log_bins


@dataclass
class Hole:
    """
    Lengths of a target for which there were too few samples.

    Attributes:
        low (`float`), high (`float`): The range of lengths.
        wanted (`int`): Samples that the target has there.
        missing (`int`): How many of them there were not.
    """

    low: float
    high: float
    wanted: int
    missing: int


@dataclass
class Chosen:
    """
    The choice among samples of one difficulty.

    Attributes:
        rows (`np.ndarray` of shape `[n]`): Indices of the chosen samples, increasing.
        holes (`list[Hole]`): What could not be filled with samples of the right length.
        num_elsewhere (`int`): Samples that were taken from the nearest other lengths to fill holes.
    """

    rows: np.ndarray
    holes: list[Hole]
    num_elsewhere: int


def choose(
    lengths: np.ndarray,
    target: LengthTarget,
    number: int,
    rng: np.random.Generator,
    bin_width: float = 0.1,
    log_weights: np.ndarray | None = None,
    fill: bool = True,
) -> Chosen:
    """
    Choose samples without replacement such that their lengths follow a target.

    Lengths fall into bins of equal width in log-length. Each bin has a quota: how many of the target's quantiles at
    (i - 1/2) / `number` lie in it. Inside a bin, samples are drawn by Gumbel-top-k (Kool et al., arXiv 1903.06059):
    those with the largest sum of a log-weight and a Gumbel variable are a draw without replacement with probabilities
    proportional to the weights. If a bin has too few samples, those of the nearest bins with samples left over take
    their place.

    Args:
        lengths (`np.ndarray` of shape `[N]`): Lengths above 0.
        target ([`LengthTarget`]): The target.
        number (`int`): Samples to choose.
        rng ([`~numpy.random.Generator`]): The source of chance.
        bin_width (`float`, *optional*, defaults to `0.1`): Width of a bin in log-length: 0.1 is about 10 %.
        log_weights (`np.ndarray` of shape `[N]`, *optional*): Samples with a larger one are preferred inside a bin.
        fill (`bool`, *optional*, defaults to `True`): Whether other lengths take the place of missing ones.
    """
    keys = rng.gumbel(size=len(lengths)) + (0.0 if log_weights is None else log_weights)
    edges = log_bins(lengths, target, bin_width)
    bins = np.digitize(np.log(lengths), edges) - 1
    wanted = np.histogram(np.log(target.spread(number)), edges)[0]
    there = np.bincount(bins, minlength=len(wanted))
    taken = np.minimum(wanted, there)
    missing = wanted - taken
    if fill:
        taken = taken + _from_nearest(missing, there - taken)
    by_bin = np.lexsort((-keys, bins))  # the best keys of a bin first
    places = np.arange(len(lengths)) - np.repeat(np.cumsum(there) - there, there)
    rows = np.sort(by_bin[places < taken[bins[by_bin]]])
    return Chosen(rows, _holes(wanted, missing, np.exp(edges)), int((taken - np.minimum(wanted, there)).sum()))


def _from_nearest(missing: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """Samples that each bin gives to bins that lack some, the nearest first. All `[B]`."""
    missing, spare = missing.copy(), spare.copy()
    given = np.zeros_like(spare)
    for distance in range(1, len(spare)):
        for step in (-distance, distance):
            giver = np.arange(len(spare)) + step
            inside = (giver >= 0) & (giver < len(spare))
            part = np.minimum(missing[inside], spare[giver[inside]])
            missing[inside] -= part
            spare[giver[inside]] -= part
            given[giver[inside]] += part
        if not missing.any() or not spare.any():
            break
    return given


def _holes(wanted: np.ndarray, missing: np.ndarray, edges: np.ndarray) -> list[Hole]:
    """Neighbouring bins with missing samples, as one hole each."""
    holes: list[Hole] = []
    for k in np.flatnonzero(missing):
        low, high = float(edges[k]), float(edges[k + 1])
        if holes and np.isclose(holes[-1].high, low):
            holes[-1] = Hole(
                holes[-1].low, high, holes[-1].wanted + int(wanted[k]), holes[-1].missing + int(missing[k])
            )
        else:
            holes.append(Hole(low, high, int(wanted[k]), int(missing[k])))
    return holes


def shares_of(names: np.ndarray, given: dict[str, float] | None = None) -> dict[str, float]:
    """The share of each difficulty: as given, or as in the samples."""
    if given is None:
        found, counts = np.unique(names, return_counts=True)
        given = dict(zip(found.tolist(), counts.tolist(), strict=True))
    total = sum(given.values())
    return {name: share / total for name, share in given.items()}


def round_shares(shares: dict[str, float], number: int) -> dict[str, int]:
    """Whole numbers in the ratio of shares, whose sum is `number`. The largest remainders are rounded up."""
    exact = {name: share * number for name, share in shares.items()}
    whole = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: whole[name] - exact[name])
    for name in by_remainder[: number - sum(whole.values())]:
        whole[name] += 1
    return whole


def random_rows(number: int, among: int, rng: np.random.Generator) -> np.ndarray:
    """Indices of `number` different samples, in random order."""
    return rng.permutation(among)[:number]
