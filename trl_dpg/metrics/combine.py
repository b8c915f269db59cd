"""Several metrics as one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..student import FinetunedStudent, Student
from .base import Metric, metric_name
from .constraints import Constraint, Multiplier


class CombinedMetric(Metric):
    """
    Weighted sum of metrics. The student's fine-tuning may be forbidden to lower some of them.

    With `constraints`, a generator learns to raise the sum of the other parts while each constrained part stays within
    ε of its value at the student's start. The weight of a constrained part is its multiplier, which [`DPGReward`]
    updates after each reward step, see [`Constraint`]. So no single step is sure to keep a limit: the multiplier
    reacts to what the steps before did. Everything else ([`metagradient`], [`attribute`], [`verify`], [`tune`]) takes
    the multipliers as they are.

    Its proxies and readout are those of its parts. If an earlier part has a proxy or an entry of the same name, the
    part's index is appended to the name.

    Args:
        metrics (`Sequence[Callable]`):
            The metrics. They can be any callables.
        weights (`Sequence[float | None]`, *optional*):
            The weight of each metric. `None`, as a whole or of one: 1, but 0 for those with a constraint. The
            multiplier of a constrained part is added to its weight.
        score_parts (`bool`, *optional*):
            Whether [`metagradient`] and [`DPGReward`] score the samples by each part as well. When `None`, where this
            costs next to nothing: with one student step, and with `attribution="first_order"`, if `per_token` is off.
            Elsewhere, each part takes about a second derivative of its own.
        names (`Sequence[str]`, *optional*):
            What the parts are called in logs; when `None`, what their functions or classes are called. If an earlier
            part has the same name, the part's index is appended.
        constraints (`dict[str, Constraint]` or `dict[str, float]`, *optional*):
            Limits for parts, by their names. A number is the ε of a [`Constraint`].

    Attributes:
        constraints (`dict[str, Constraint]`): The limits.
        multipliers (`dict[str, Multiplier]`): Their multipliers now. The state of a training, which can be set.
        values (`dict[str, float]`): The parts' values in the last evaluation.

    Raises:
        `ValueError`: If there is no metric, if the number of weights or names is not that of the metrics, if parts
            have the same name, if a constraint is of no part, or if nothing but constrained parts has a weight.
    """

    def __init__(
        self,
        metrics: Sequence[Callable[[FinetunedStudent], Tensor]],
        weights: Sequence[float | None] | None = None,
        score_parts: bool | None = None,
        names: Sequence[str] | None = None,
        constraints: Mapping[str, Constraint | float] | None = None,
    ):
        if names is not None and len(names) != len(metrics):
            raise ValueError(f"A CombinedMetric needs as many names as metrics, got {len(names)} and {len(metrics)}.")
        self.metrics = list(metrics)
        self.score_parts = score_parts
        self.names: list[str] = []
        for index, name in enumerate(map(metric_name, self.metrics) if names is None else names):
            self.names.append(f"{name}_{index}" if name in self.names else name)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"The parts of a CombinedMetric need different names, got {self.names}. Give `names`.")
        self.constraints = {
            name: own if isinstance(own, Constraint) else Constraint(own) for name, own in (constraints or {}).items()
        }
        free = [float(name not in self.constraints) for name in self.names]
        given = [None] * len(metrics) if weights is None else list(weights)
        if not metrics or len(given) != len(metrics):
            raise ValueError(
                f"A CombinedMetric needs as many weights as metrics, got {len(given)} and {len(metrics)}."
            )
        self.weights = [own if weight is None else weight for own, weight in zip(free, given, strict=True)]
        strangers = [name for name in self.constraints if name not in self.names]
        if strangers:
            raise ValueError(f"A constraint is of {strangers[0]!r}, but the parts are {self.names}. Give `names`.")
        if self.constraints and not any(self.weights):
            raise ValueError(
                f"All parts {self.names} have constraints and none has a weight, so there is nothing to raise. Leave "
                "one of them without a constraint, or give `weights`."
            )
        self.multipliers = {name: Multiplier(own.multiplier) for name, own in self.constraints.items()}
        self._values: list[float] = []

    @property
    def multipliers(self) -> dict[str, Multiplier]:
        return dict(self._multipliers)

    @multipliers.setter
    def multipliers(self, multipliers: Mapping[str, Multiplier]) -> None:
        self._multipliers = dict(multipliers)

    @property
    def present_weights(self) -> list[float]:
        """The weight of each part now, with its multiplier."""
        weights = zip(self.names, self.weights, strict=True)
        return [
            weight + (self._multipliers[name].weight(self.constraints[name]) if name in self.constraints else 0.0)
            for name, weight in weights
        ]

    @property
    def values(self) -> dict[str, float]:
        return dict(zip(self.names, self._values, strict=False))

    def total(self, values: Mapping[str, float]) -> float:
        """The weighted sum of the parts' values, by name."""
        return sum(weight * values[name] for name, weight in zip(self.names, self.present_weights, strict=True))

    def react(self, changes: Mapping[str, float]) -> None:
        """Update the multipliers after a reward step, in which the parts changed by `changes`."""
        self.multipliers = {
            name: own.react(self.constraints[name], changes[name]) for name, own in self._multipliers.items()
        }

    def objective(self) -> "CombinedMetric":
        """What is to be raised: the same parts and constraints, with multipliers of 0."""
        constraints = {name: replace(own, multiplier=0.0) for name, own in self.constraints.items()}
        return CombinedMetric(self.metrics, self.weights, self.score_parts, self.names, constraints)

    def __call__(self, student: FinetunedStudent) -> Tensor:
        return self.combine([metric(student) for metric in self.metrics])

    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        """The weighted sum of the parts' values, with the multipliers."""
        for metric, part in zip(self.metrics, parts, strict=True):
            if not isinstance(part, Tensor) or part.dim() > 0:
                raise ValueError(
                    f"A part of a CombinedMetric, {metric!r}, returned {part!r}; it must return a scalar tensor."
                )
        self._values = [part.item() for part in parts]
        return torch.stack([weight * part for weight, part in zip(self.present_weights, parts, strict=True)]).sum()

    def proxies(self, student: FinetunedStudent, value: float) -> dict[str, float]:
        merged: dict[str, float] = {}
        for index, (metric, part) in enumerate(zip(self.metrics, self._values, strict=True)):
            if isinstance(metric, Metric):
                for name, proxy in metric.proxies(student, part).items():
                    merged[f"{name}_{index}" if name in merged else name] = proxy
        return merged

    def num_tokens(self, student: Student) -> int:
        return sum(metric.num_tokens(student) for metric in self.metrics if isinstance(metric, Metric))

    def draw(self, number: int | None, seed: Sequence[int] = ()) -> bool:
        """Read `number` of the texts of each part. Each part has a draw of its own."""
        found = False
        for index, metric in enumerate(self.metrics):
            found |= isinstance(metric, Metric) and metric.draw(number, [*seed, index])
        return found

    def readout(self, student: FinetunedStudent) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for index, metric in enumerate(self.metrics):
            if isinstance(metric, Metric):
                for name, entry in metric.readout(student).items():
                    merged[f"{name}_{index}" if name in merged else name] = entry
        return merged


def compared(metric: Any, before: Mapping[str, float]) -> dict[str, float]:
    """
    What became of the constrained parts of a metric, from their values before and in the last evaluation.

    Returns:
        `dict[str, float]`: For each of them, `change/<part>`, and `kept/<part>`: 1 if its limit is kept, otherwise 0.
    """
    found: dict[str, float] = {}
    for name, own in metric.constraints.items() if isinstance(metric, CombinedMetric) else ():
        change = metric.values[name] - before[name]
        found |= {f"change/{name}": change, f"kept/{name}": float(own.violation(change) <= 0)}
    return found


def part_values(metric: Any) -> dict[str, float]:
    """The values of a combined metric's parts in the last evaluation. Other metrics have no parts."""
    return metric.values if isinstance(metric, CombinedMetric) else {}
