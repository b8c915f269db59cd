"""The effects of a dataset on a panel of metrics, against a control, by fresh students, and how sure they are."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import ttest_1samp
from torch import Tensor

from ..evaluation import evaluate_dataset, interval
from ..metagradients import InnerLoopConfig
from ..metagradients.config import SettingsError
from ..metagradients.fine_tuning import modes
from ..metagradients.goals import MetricFunction, check_metrics
from ..metrics import Metric
from ..student import Examples, FinetunedStudent, Student
from .config import AuditConfig


LoadStudent = Callable[[int], Student]
"""Maps a seed to a student that is not fine-tuned."""
EQUAL = 1e-6
"""Differences are equal if they differ by no more than this share: metrics are computed in float32."""


@dataclass
class Effect:
    """
    What a dataset does to a metric Φ that its control does not do.

    K fresh students are fine-tuned on K disjoint parts of the dataset, and K others on K parts of the control. The
    k-th of each share start, seed and number of rows. If the rows of both are drawn alike, the K differences are
    independent and symmetric about 0.

    Attributes:
        before (`float`): Φ of the student before fine-tuning.
        data (`list[float]`), control (`list[float]`): Φ after fine-tuning on each part, `[K]` each.
        mean (`float`), half_width (`float`): Mean of the K differences, data minus control; half of its 95 % interval.
        spread (`float`): Standard deviation of Φ over the parts of the control.
        p_value (`float`): Of the test that the mean of the differences is 0, see [`p_of_zero_mean`].
        adjusted_p (`float`): The p-value after Holm's adjustment for the number of metrics.
        wanted (`bool`): Whether the dataset is meant to have this effect.
        found (`bool`): Whether `adjusted_p` is at most the level of the audit.
        proxies (`dict[str, tuple[float, float]]`): Means of the metric's proxies, after data and after control.
    """

    before: float
    data: list[float]
    control: list[float]
    mean: float
    half_width: float
    spread: float
    p_value: float
    adjusted_p: float
    wanted: bool
    found: bool
    proxies: dict[str, tuple[float, float]]

    @property
    def in_spreads(self) -> float | None:
        """The mean as a multiple of the control's spread. `None` if the control has none."""
        return self.mean / self.spread if self.spread > 0 else None

    @property
    def direction(self) -> str:
        """`"higher"` or `"lower"`: Φ after the dataset, compared with Φ after the control."""
        return "higher" if self.mean > 0 else "lower"


def adjust_for_many(p_values: Sequence[float]) -> list[float]:
    """
    Holm's adjustment of p-values of several tests (Holm, Scandinavian Journal of Statistics 6, 1979).

    If all adjusted values up to α are called findings, the chance of a single false one is at most α, however the
    tests depend on each other.

    Args:
        p_values (`Sequence[float]`): The M p-values.

    Returns:
        `list[float]`: The adjusted values, in the same order.
    """
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values)
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)), 1.0)
    return adjusted.tolist()


def p_of_zero_mean(differences: Sequence[float]) -> float:
    """
    The two-sided p-value of Student's t test that K independent differences have the mean 0.

    It takes the differences as roughly normal. If they are equal, up to rounding, they say nothing of their spread.
    Then it is the p-value of the sign test: if each sign is a fair coin, all of them agree with the chance 2^(1-K).
    """
    if np.allclose(differences, differences[0], rtol=EQUAL, atol=0.0):
        return 2.0 ** (1 - len(differences)) if differences[0] else 1.0
    return float(ttest_1samp(differences, 0.0).pvalue)


def as_dataset(examples: Examples, field: str) -> Dataset:
    """Samples as a [`~datasets.Dataset`]. `field` is what an error calls them."""
    if isinstance(examples, Dataset):
        dataset = examples
    elif isinstance(examples, str) or len(examples) == 0:
        raise SettingsError(f"`{field}` must be a list of samples that is not empty, got {examples!r:.60}.")
    elif isinstance(examples[0], str):
        dataset = Dataset.from_dict({"text": list(examples)})
    else:
        dataset = Dataset.from_list(list(examples))  # type: ignore[arg-type]
    if len(dataset) == 0:
        raise SettingsError(f"`{field}` has no rows.")
    return dataset


def fresh(student: Student | LoadStudent) -> LoadStudent:
    """A function from seeds to fresh students. Copies of a given student are the same for all seeds."""
    if not isinstance(student, Student):
        return student
    return lambda seed: deepcopy(student)


class Look(NamedTuple):
    """
    Metrics of a student before fine-tuning.

    Attributes:
        before (`dict[str, float]`): Φ of each metric.
        differentiable (`list[str]`): The metrics with a finite gradient, by which rows can be scored.
        failed (`dict[str, str]`): The metrics that this student does not have, with the errors.
    """

    before: dict[str, float]
    differentiable: list[str]
    failed: dict[str, str]


def look_at_panel(student: Student, metrics: Mapping[str, MetricFunction], skip_failed: bool = False) -> Look:
    """
    Evaluate all metrics of a student before fine-tuning.

    Args:
        student (`Student`), metrics (`dict[str, Callable]`): The student and the panel.
        skip_failed (`bool`, *optional*, defaults to `False`): Go on without metrics that raise an error.

    Raises:
        `ValueError`: If the panel is empty, or a metric is not a callable, or returns no finite scalar tensor.
    """
    check_metrics(metrics)
    initial_theta = student.initial_theta()
    start = FinetunedStudent(student, initial_theta.clone().requires_grad_(), initial_theta)
    look = Look({}, [], {})
    for name, metric in metrics.items():
        try:
            with modes(student):
                look.before[name], gradient = _before(name, metric, start)
        except Exception as error:  # of any callable
            if not skip_failed:
                raise
            look.failed[name] = f"{type(error).__name__}: {error}"
            continue
        if gradient is not None and gradient.isfinite().all():
            look.differentiable.append(name)
    return look


def _before(name: str, metric: MetricFunction, start: FinetunedStudent) -> tuple[float, Tensor | None]:
    value, gradient = start.evaluate(metric)
    if not isinstance(value, Tensor) or value.dim() > 0 or not value.isfinite():
        raise ValueError(
            f"The metric {name!r} of the student before fine-tuning is {value!r}; it must be a scalar tensor with a "
            "finite value."
        )
    return value.item(), gradient


@dataclass
class Values:
    """Φ and proxies of a fresh student, by the names of the metrics."""

    metrics: dict[str, float]
    proxies: dict[str, dict[str, float]]


Measure = Callable[[Dataset, Mapping[str, MetricFunction], int, str], Values]
"""Maps rows, metrics, a seed and what the rows are called to the [`values_after`] of a fresh student on the rows."""


def values_after(
    load_student: LoadStudent,
    rows: Dataset,
    metrics: Mapping[str, MetricFunction],
    config: InnerLoopConfig,
    seed: int,
    what: str,
) -> Values:
    """
    The panel's values of a fresh student, fine-tuned on rows by stock SFTTrainer; see [`evaluate_dataset`].

    Raises:
        `FloatingPointError`: If a metric is not finite. The message calls the rows `what`.
    """
    first = next(iter(metrics))
    result = evaluate_dataset(partial(load_student, seed), rows, metrics[first], config, seed)
    values = {name: result.metric if name == first else result.measure(metric) for name, metric in metrics.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"The metric {name!r} is {value} after the student's fine-tuning on {what}. Likely cause: "
                f"`learning_rate` ({config.learning_rate}) is too high."
            )
    proxies: dict[str, dict[str, float]] = {}
    with torch.no_grad(), result.finetuned.student.train_mode():
        for name, metric in metrics.items():
            own = metric.proxies(result.finetuned, values[name]) if isinstance(metric, Metric) else {}
            proxies[name] = {proxy: float(value) for proxy, value in own.items()}
    return Values(values, proxies)


def disjoint_parts(dataset: Dataset, num_rows: int, num_parts: int, seed: int) -> list[Dataset]:
    """`num_parts` random parts of equal size, of `num_rows` rows together at most."""
    order = np.random.default_rng(seed).permutation(len(dataset))[:num_rows]
    size = num_rows // num_parts
    return [dataset.select(order[k * size : (k + 1) * size].tolist()) for k in range(num_parts)]


def measure_effects(
    measure: Measure,
    before: Mapping[str, float],
    pairs: Iterable[tuple[Dataset, Dataset]],
    metrics: Mapping[str, MetricFunction],
    settings: AuditConfig,
    start: str = "",
) -> dict[str, Effect]:
    """The effects by the names of the metrics, from pairs of parts. `start` is what an error says of the start."""
    runs: dict[str, list[Values]] = {"dataset": [], "control": []}
    for k, pair in enumerate(pairs):
        for rows, (side, values) in zip(pair, runs.items(), strict=True):
            values.append(measure(rows, metrics, settings.seed + k, f"part {k + 1} of the {side}{start}"))
    return summarize_effects(before, runs["dataset"], runs["control"], settings.wanted, settings.alpha)


def summarize_effects(
    before: Mapping[str, float], data: list[Values], control: list[Values], wanted: Sequence[str], alpha: float
) -> dict[str, Effect]:
    """The effects from the values of the students. Wanted and other metrics are adjusted for apart."""
    effects = {}
    for name in before:
        ours, theirs = ([values.metrics[name] for values in run] for run in (data, control))
        differences = [one - other for one, other in zip(ours, theirs, strict=True)]
        mean, half_width = interval(differences)
        proxies = {proxy: (_mean(data, name, proxy), _mean(control, name, proxy)) for proxy in data[0].proxies[name]}
        numbers: dict[str, Any] = {"mean": mean, "half_width": half_width, "spread": statistics.stdev(theirs)}
        numbers |= {
            "p_value": p_of_zero_mean(differences),
            "adjusted_p": 1.0,
            "wanted": name in wanted,
            "found": False,
        }
        effects[name] = Effect(before=before[name], data=ours, control=theirs, proxies=proxies, **numbers)
    for kind in (True, False):
        family = [effect for effect in effects.values() if effect.wanted == kind]
        for effect, adjusted in zip(family, adjust_for_many([own.p_value for own in family]), strict=True):
            effect.adjusted_p = adjusted
            effect.found = adjusted <= alpha
    return effects


def _mean(run: list[Values], name: str, proxy: str) -> float:
    return statistics.mean(values.proxies[name][proxy] for values in run)
