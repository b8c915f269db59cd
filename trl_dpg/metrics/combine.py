"""Several metrics as one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..student import FinetunedStudent, Student
from .base import Metric


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

    Raises:
        `ValueError`: If there is no metric, or the number of weights is not that of the metrics.
    """

    def __init__(
        self, metrics: Sequence[Callable[[FinetunedStudent], Tensor]], weights: Sequence[float] | None = None
    ):
        weights = [1.0] * len(metrics) if weights is None else list(weights)
        if not metrics or len(weights) != len(metrics):
            raise ValueError(
                f"A CombinedMetric needs as many weights as metrics, got {len(weights)} and {len(metrics)}."
            )
        self.metrics = list(metrics)
        self.weights = weights
        self._values: list[float] = []

    def __call__(self, student: FinetunedStudent) -> Tensor:
        parts = [metric(student) for metric in self.metrics]
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
