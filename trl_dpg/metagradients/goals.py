"""What is differentiated: metrics, and parts of combined metrics, evaluated before and after the fine-tuning."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..metrics.base import Metric
from ..metrics.combine import CombinedMetric, part_values
from ..ranks import ALONE, Ranks
from ..student import FinetunedStudent, Student
from .config import InnerLoopConfig
from .fine_tuning import modes


MetricFunction = Callable[[FinetunedStudent], Tensor]

_NO_GRADIENT = (
    "The metric (here {:.6g}) is not differentiable, or does not depend on what the student trains: it has no "
    "gradient in the student's trainable parameters. Do not use `detach`, `no_grad`, `argmax` or similar functions, "
    "and read outputs or weights that depend on these parameters."
)


@dataclass
class Goal:
    """
    A metric, and its rows among the cotangents of the reverse sweep.

    Attributes:
        name (`str` or `None`): What the user calls it. `None` for the only metric.
        metric (`Callable`): Φ.
        parts (`dict[str, Callable]`): Of a [`CombinedMetric`] whose parts have scores, too; otherwise empty.
        rows (`slice`): A row for the metric, or for each of its parts.
        value (`float`): Φ(θ_T), after [`Goal.evaluate`].
    """

    name: str | None
    metric: MetricFunction
    parts: dict[str, MetricFunction]
    rows: slice
    value: float = math.nan

    def evaluate(self, finetuned: FinetunedStudent, theta_bar: Tensor, config: InnerLoopConfig) -> None:
        """
        Φ(θ_T), and its gradients as rows of `theta_bar` `[M, P]`. One evaluation of the metric.

        Raises:
            `FloatingPointError`: If Φ is not finite.
            `ValueError`: If Φ has no gradient where one is needed.
        """
        values, found = [], False
        for metric, row in zip(self.parts.values() or [self.metric], theta_bar[self.rows], strict=True):
            value, gradient = finetuned.evaluate(metric)
            values.append(finetuned.ranks.first(value.to(row.device)))
            depends = finetuned.ranks.least(gradient is not None)  # on all ranks
            if gradient is not None and depends:
                row.copy_(finetuned.ranks.first(gradient))
                found = True
        with torch.no_grad():
            (value,) = values if not self.parts else [self.metric.combine(values)]  # type: ignore[attr-defined]
        self.value = value.item()
        if not math.isfinite(self.value):
            raise FloatingPointError(
                f"The metric{called(self.name)} of the fine-tuned student is {self.value}. Likely cause: the "
                f"student's learning rate ({config.learning_rate}) is too high."
            )
        if torch.is_grad_enabled() and not found:
            raise ValueError(_no_gradient(self.name, self.value))

    def figures(self, finetuned: FinetunedStudent) -> tuple[dict[str, float], dict[str, Any]]:
        """Proxies and readout of the fine-tuned student."""
        if not isinstance(self.metric, Metric):
            return {}, {}
        with torch.no_grad():
            return self.metric.proxies(finetuned, self.value), self.metric.readout(finetuned)

    def total(self, scores: Tensor) -> Tensor:
        """The metric's scores, from those of its rows: `[*]` of `[M, *]`."""
        own = scores[self.rows]
        if not self.parts:
            return own[0]
        return torch.tensordot(own.new_tensor(self.metric.present_weights), own, dims=1)  # type: ignore[attr-defined]


def plan_goals(metrics: Mapping[Any, MetricFunction], score_parts: bool, free: bool) -> list[Goal]:
    """
    The metrics in rows, one after the other.

    With `score_parts`, a combined metric has a row for each part if it asks for this, or if it does not say and
    further rows are `free`.
    """
    goals: list[Goal] = []
    for name, metric in metrics.items():
        # a subclass may combine its parts in another way
        parts: dict[str, MetricFunction] = {}
        if score_parts and type(metric) is CombinedMetric:
            asked = free if metric.score_parts is None else metric.score_parts
            parts = dict(zip(metric.names, metric.metrics, strict=True)) if asked else {}
        first = goals[-1].rows.stop if goals else 0
        goals.append(Goal(name, metric, parts, slice(first, first + max(1, len(parts)))))
    return goals


def values_of_parts(metric: MetricFunction, student: Student, ranks: Ranks = ALONE) -> dict[str, float]:
    """What the parts of a combined metric were in its last evaluation, as on the first rank. Of others, nothing."""
    found = part_values(metric)
    if ranks.alone or not found:
        return found
    values = torch.tensor(list(found.values()), dtype=torch.float64, device=student.device)
    return dict(zip(found, ranks.first(values).tolist(), strict=True))


def check_metrics(metric: Any) -> None:
    """
    Refuse what is neither a metric nor a mapping from names to metrics.

    Raises:
        `ValueError`: If it is not, or if the mapping is empty.
    """
    named = metric if isinstance(metric, Mapping) else {}
    if isinstance(metric, Mapping) and not named:
        raise ValueError("There is no metric: the mapping of metrics is empty. Give at least one, by a name.")
    wrong = [name for name in named if not isinstance(name, str) or not name]
    if wrong:
        raise ValueError(f"The names of metrics must be texts, got {wrong[0]!r}.")
    for name, own in named.items() or [(None, metric)]:
        if not callable(own):
            raise ValueError(
                f"The metric{called(name)} must be a callable from the fine-tuned student to a scalar tensor, got "
                f"{own!r}."
            )


def called(name: str | None) -> str:
    """What messages add to "the metric"."""
    return "" if name is None else f" {name!r}"


def _no_gradient(name: str | None, value: float) -> str:
    return _NO_GRADIENT.format(value).replace("The metric", f"The metric{called(name)}", 1)


def metric_at_start(metric: MetricFunction, student: Student, name: str | None = None, ranks: Ranks = ALONE) -> float:
    """Φ(θ_0), after checking that the metric is a finite, differentiable scalar that depends on the student."""
    with modes(student):
        student.verify_quantization()
        initial_theta = ranks.first(student.initial_theta())
        theta = initial_theta.clone().requires_grad_()
        value, gradient = FinetunedStudent(student, theta, initial_theta, ranks).evaluate(metric)
    own = called(name)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"The metric{own} returned {value!r}, a {type(value).__name__}; it must return a scalar tensor that is "
            "differentiable in the student (no `.item()`)."
        )
    if value.numel() != 1 or value.dim() > 0:
        raise ValueError(
            f"The metric{own} returned a tensor of shape {tuple(value.shape)}; it must return a scalar. Take e.g. its "
            "mean."
        )
    if not value.isfinite():
        raise ValueError(f"The metric{own} of the student before fine-tuning is {value.item()}; it must be finite.")
    if gradient is None:
        raise ValueError(_no_gradient(name, value.item()))
    if not gradient.isfinite().all():
        raise ValueError(
            f"The metric{own} of the student before fine-tuning has a gradient that is not finite. The usual cause is "
            "a square root or logarithm of zero. Add a small constant inside it."
        )
    return ranks.first(value.clone().to(theta.device)).item()
