"""Random subsets of a metric's texts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import numpy as np

from .base import Metric, metric_name


def systematic_draw(sizes: Sequence[int], number: int, seed: Sequence[int]) -> np.ndarray:
    """
    How often each of N texts is in a draw of `number` texts: systematic sampling in a random order.

    Text i is drawn `number` · size_i / Σ sizes times in expectation, and at most one time more or less than that. So
    the mean of x_i / size_i over the draw has the expectation Σ x_i / Σ size_i, exactly, and long texts do not make it
    noisy (Madow, Annals of Mathematical Statistics 20, 1949).

    Args:
        sizes (`Sequence[int]`): N sizes > 0.
        number (`int`): Texts to draw.
        seed (`Sequence[int]`): Seed of numpy's generator.

    Returns:
        `np.ndarray` of shape `[N]`: Whole numbers whose sum is `number`.
    """
    rng = np.random.default_rng(list(seed))
    order = rng.permutation(len(sizes))
    ends = np.cumsum(np.asarray(sizes)[order])
    points = (np.arange(number) + rng.random()) * (ends[-1] / number)
    places = np.minimum(np.searchsorted(ends, points, side="right"), len(sizes) - 1)
    return np.bincount(order[places], minlength=len(sizes))


def standard_error(before: np.ndarray, after: np.ndarray, counts: np.ndarray, num_texts: int) -> float:
    """
    The standard error of a metric's change, from the change at each drawn text.

    Args:
        before (`np.ndarray` of shape `[n]`), after (`np.ndarray` of shape `[n]`): The metric at each drawn text.
        counts (`np.ndarray` of shape `[n]`): How often each is in the draw, in which there are at least two.
        num_texts (`int`): Number of all texts. A draw of most of them has little noise.
    """
    changes = np.repeat(after - before, counts)
    left = max(0.0, 1.0 - len(changes) / num_texts)
    return float(changes.std(ddof=1) * np.sqrt(left / len(changes)))


def check_samples(metric: Any, number: int | None) -> None:
    """
    Refuse a number of texts that cannot be drawn from a metric, or from each of several by name.

    Raises:
        `ValueError`: If it is no positive number, or if a metric has no texts.
    """
    if number is None:
        return
    if isinstance(number, bool) or not isinstance(number, Integral) or number < 1:
        raise ValueError(f"`metric_samples` must be a whole number of at least 1, got {number!r}.")
    for name, own in metric.items() if isinstance(metric, Mapping) else [(metric_name(metric), metric)]:
        if not (isinstance(own, Metric) and own.draw(None)):
            raise ValueError(
                f"`metric_samples` is {number}, but the metric {name!r} has no texts to draw from. Leave it out, or "
                "use a LanguageModelingMetric, alone or in a CombinedMetric."
            )


@contextmanager
def drawn(metric: Callable | Mapping[str, Callable], number: int | None, seed: Sequence[int]) -> Iterator[None]:
    """Context in which a metric, or each of several, reads `number` of its texts. `None`: all of them."""
    several = metric.values() if isinstance(metric, Mapping) else [metric]
    metrics = [] if number is None else [own for own in several if isinstance(own, Metric)]
    try:
        for own in metrics:
            own.draw(number, seed)
        yield
    finally:
        for own in metrics:
            own.draw(None)
