"""Means over seeds, with intervals."""

import statistics
from typing import Any

from scipy.stats import t


def summarize(students: list[dict[str, float]]) -> dict[str, Any]:
    """Metric, its mean and interval, and mean proxies of the students of a dataset."""
    values = [figures["metric"] for figures in students]
    mean, half_width = interval(values)
    return {
        "metric": values,
        "mean": mean,
        "half_width": half_width,
        "proxies": {name: statistics.mean(figures[name] for figures in students) for name in students[0]},
    }


def paired_difference(first: list[dict[str, float]], second: list[dict[str, float]]) -> dict[str, float | None]:
    """Mean and interval of the differences between two datasets, from students with the same seeds."""
    mean, half_width = interval([one["metric"] - other["metric"] for one, other in zip(first, second, strict=True)])
    return {"mean": mean, "half_width": half_width}


def interval(values: list[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % confidence interval (Student's t). `None` for a single value."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return mean, None
    return mean, t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
