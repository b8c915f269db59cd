"""The figures of a dataset's lengths."""

from typing import Any

import numpy as np

from ...length_target import LengthTargets
from .distances import distances
from .fitting import FORMS, MIN_SAMPLES, fit
from .measurement import Measured


LAYOUT = "trl-dpg lengths 1"
LEVELS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
NUM_BINS = 40
NUM_ACCURACY_BINS = 8
"""Bins with equally many samples, for the share of correct samples by length."""


def summarize(
    measured: Measured, reference: Measured | None = None
) -> tuple[dict[str, Any], dict[str, LengthTargets]]:
    """
    The figures, and the targets that follow the lengths.

    Targets are fitted to the correct samples where correctness is known, otherwise to all.

    Args:
        measured ([`Measured`]): The samples.
        reference ([`Measured`], *optional*): Samples to compare with.

    Returns:
        `tuple[dict, dict[str, LengthTargets]]`: The figures as JSON has them, and the targets by their form.
    """
    edges = histogram_edges(measured, reference)
    targets = fit_all(measured)
    figures: dict[str, Any] = {"layout": LAYOUT, "unit": measured.unit, "measure": measured.measure}
    figures |= {"difficulty": measured.difficulty_from, "histogram_edges": edges.tolist()}
    figures["overall"] = describe(measured, edges)
    figures["by_difficulty"] = {
        name: describe(measured.select(measured.difficulty == name), edges) for name in measured.names
    }
    if reference is not None:
        compared = {"overall": compare(measured, reference, edges)}
        for name in measured.names:
            own, other = (part.select(part.difficulty == name) for part in (measured, reference))
            compared[name] = compare(own, other, edges)
        figures["reference"] = compared
    figures["targets"] = {
        form: {
            name: target.as_json() | distances(usable(measured, name), target)
            for name, target in targets[form].items()
        }
        for form in ("lognormal", "quantiles")  # the empirical one is as long as the data
    }
    return figures, targets


def histogram_edges(*parts: Measured | None) -> np.ndarray:
    """Edges in equal steps of log-length, shared by all histograms."""
    lengths = np.concatenate([part.lengths for part in parts if part is not None])
    lengths = lengths[lengths > 0]
    low, high = (lengths.min(), lengths.max()) if len(lengths) else (1, 1)
    return np.geomspace(low * 0.999, max(high, low * 1.1) * 1.001, NUM_BINS + 1)


def usable(measured: Measured, name: str) -> np.ndarray:
    """The lengths that a target of a difficulty is fitted to, without those cut off."""
    mask = (measured.difficulty == name) & trusted(measured) & ~measured.truncated
    return measured.lengths[mask]


def trusted(measured: Measured) -> np.ndarray:
    """Samples with a length that are not known to be wrong. `[N]`"""
    right = measured.correct == 1.0
    return (measured.lengths > 0) & (right if right.any() else measured.correct != 0.0)


def fit_all(measured: Measured) -> dict[str, LengthTargets]:
    """Targets by form and difficulty. A difficulty with too few samples has none."""
    found = {form: LengthTargets() for form in FORMS}
    for name in measured.names:
        if len(usable(measured, name)) >= MIN_SAMPLES:
            rows = (measured.difficulty == name) & trusted(measured)
            for form in FORMS:
                found[form][name] = fit(form, measured.lengths[rows], measured.truncated[rows])
    return found


def describe(measured: Measured, edges: np.ndarray) -> dict[str, Any]:
    """Counts, quantiles, histograms and the share of correct samples by length."""
    lengths = measured.lengths[measured.lengths > 0]
    known = ~np.isnan(measured.correct)
    figures: dict[str, Any] = {
        "num_samples": len(measured.lengths),
        "num_empty": int((measured.lengths == 0).sum()),
        "share_truncated": mean(measured.truncated),
        "share_correct": mean(measured.correct[known]),
        "mean": mean(lengths),
        "quantiles": quantiles(lengths),
        "histogram": np.histogram(lengths, edges)[0].tolist(),
    }
    if known.any():
        for name, value in (("correct", 1.0), ("wrong", 0.0)):
            part = measured.lengths[(measured.correct == value) & (measured.lengths > 0)]
            figures[name] = {
                "num_samples": len(part),
                "mean": mean(part),
                "quantiles": quantiles(part),
                "histogram": np.histogram(part, edges)[0].tolist(),
            }
        figures["share_correct_by_length"] = share_correct_by_length(measured)
    return figures


def share_correct_by_length(measured: Measured) -> list[dict[str, float]]:
    """
    The share of correct samples in bins of length with about equally many samples.

    Returns:
        `list[dict[str, float]]`: Median length, number, share, and its 95 % interval (Wilson) of each bin.
    """
    from scipy.stats import binomtest  # takes a second to import

    rows = np.flatnonzero((measured.lengths > 0) & ~np.isnan(measured.correct))
    ordered = rows[np.argsort(measured.lengths[rows], kind="stable")]
    bins = []
    for part in np.array_split(ordered, min(NUM_ACCURACY_BINS, max(len(ordered) // 5, 1))):
        if len(part):
            right = int(measured.correct[part].sum())
            interval = binomtest(right, len(part)).proportion_ci(method="wilson")
            bins.append(
                {
                    "median_length": float(np.median(measured.lengths[part])),
                    "num_samples": len(part),
                    "share_correct": right / len(part),
                    "low": float(interval.low),
                    "high": float(interval.high),
                }
            )
    return bins


def compare(measured: Measured, reference: Measured, edges: np.ndarray) -> dict[str, Any]:
    """The reference's figures, and the distances between the two."""
    own, other = (part.lengths[part.lengths > 0] for part in (measured, reference))
    return describe(reference, edges) | distances(own, other)


def quantiles(lengths: np.ndarray) -> dict[str, float]:
    """Quantiles by their levels; none of no samples."""
    return {f"{level:g}": float(np.quantile(lengths, level)) for level in LEVELS} if len(lengths) else {}


def mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
