"""Several metrics as one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..student import FinetunedStudent, Student
from .base import Metric, metric_name


class CombinedMetric(Metric):
    """
    Weighted sum of metrics.

    Its proxies and readout are those of its parts. If an earlier part has a proxy or an entry of the same name, the
    part's index is appended to the name.

    Args:
        metrics (`Sequence[Callable]`):
            The metrics. They can be any callables.
        weights (`Sequence[float]`, *optional*):
            The weight of each metric; ones when `None`.
        score_parts (`bool`, *optional*):
            Whether [`metagradient`] and [`DPGReward`] score the samples by each part as well. When `None`, where this
            costs next to nothing: with one student step, and with `attribution="first_order"`, if `per_token` is off.
            Elsewhere, each part takes about a second derivative of its own.
        names (`Sequence[str]`, *optional*):
            What the parts are called in logs; when `None`, what their functions or classes are called. If an earlier
            part has the same name, the part's index is appended.

    Raises:
        `ValueError`: If there is no metric, if the number of weights or names is not that of the metrics, or if parts
            have the same name.
    """

    def __init__(
        self,
        metrics: Sequence[Callable[[FinetunedStudent], Tensor]],
        weights: Sequence[float] | None = None,
        score_parts: bool | None = None,
        names: Sequence[str] | None = None,
    ):
        weights = [1.0] * len(metrics) if weights is None else list(weights)
        if not metrics or len(weights) != len(metrics):
            raise ValueError(
                f"A CombinedMetric needs as many weights as metrics, got {len(weights)} and {len(metrics)}."
            )
        if names is not None and len(names) != len(metrics):
            raise ValueError(f"A CombinedMetric needs as many names as metrics, got {len(names)} and {len(metrics)}.")
        self.metrics = list(metrics)
        self.weights = weights
        self.score_parts = score_parts
        self.names: list[str] = []
        for index, name in enumerate(map(metric_name, self.metrics) if names is None else names):
            self.names.append(f"{name}_{index}" if name in self.names else name)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"The parts of a CombinedMetric need different names, got {self.names}. Give `names`.")
        self._values: list[float] = []

    def __call__(self, student: FinetunedStudent) -> Tensor:
        return self.combine([metric(student) for metric in self.metrics])

    def combine(self, parts: Sequence[Tensor]) -> Tensor:
        """The weighted sum of the parts' values."""
        for metric, part in zip(self.metrics, parts, strict=True):
            if not isinstance(part, Tensor) or part.dim() > 0:
                raise ValueError(
                    f"A part of a CombinedMetric, {metric!r}, returned {part!r}; it must return a scalar tensor."
                )
        self._values = [part.item() for part in parts]
        return torch.stack([weight * part for weight, part in zip(self.weights, parts, strict=True)]).sum()

    def proxies(self, student: FinetunedStudent, value: float) -> dict[str, float]:
        merged: dict[str, float] = {}
        for index, (metric, part) in enumerate(zip(self.metrics, self._values, strict=True)):
            if isinstance(metric, Metric):
                for name, proxy in metric.proxies(student, part).items():
                    merged[f"{name}_{index}" if name in merged else name] = proxy
        return merged

    def num_tokens(self, student: Student) -> int:
        return sum(metric.num_tokens(student) for metric in self.metrics if isinstance(metric, Metric))

    def readout(self, student: FinetunedStudent) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for index, metric in enumerate(self.metrics):
            if isinstance(metric, Metric):
                for name, entry in metric.readout(student).items():
                    merged[f"{name}_{index}" if name in merged else name] = entry
        return merged
