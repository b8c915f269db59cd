"""The base class of this package's metrics. Your own metric does not need it: it can be any callable."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..student import FinetunedStudent, Student


def metric_name(metric: Callable[[FinetunedStudent], Tensor]) -> str:
    """What a metric is called in logs, cards and journals: the name of a function, otherwise that of its class."""
    return metric.__name__ if hasattr(metric, "__name__") else type(metric).__name__


class Metric(ABC):
    """A target metric Φ with readable proxies."""

    @abstractmethod
    def __call__(self, student: FinetunedStudent) -> Tensor:
        """Φ of a fine-tuned student: a differentiable scalar. Higher is better."""

    def proxies(self, student: FinetunedStudent, value: float) -> dict[str, float]:
        """
        Figures that are easier to interpret than Φ, by name.

        Args:
            student ([`FinetunedStudent`]): The fine-tuned student.
            value (`float`): Φ of this student, which need not be computed again.
        """
        return {}

    def num_tokens(self, student: Student) -> int:
        """The tokens that the metric runs a student on, for an estimate of its cost. 0 if it only reads weights."""
        return 0

    def draw(self, number: int | None, seed: Sequence[int] = ()) -> bool:
        """
        Read `number` of the texts from now on, drawn at random by a seed. `None`: all of them.

        The mean of Φ over the draws must be Φ of all texts.

        Returns:
            `bool`: Whether the metric has texts to draw from.
        """
        return False

    def readout(self, student: FinetunedStudent) -> dict[str, Any]:
        """
        What the metric reads in the fine-tuned student, for logs and summaries, as values that JSON can hold.

        An entry whose name begins with `picture` is logged as an image. Its rows are lists of 1 (black), 0 (grey) and
        -1 (white).
        """
        return {}
