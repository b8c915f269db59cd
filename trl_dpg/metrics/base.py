"""What the metrics of this package share. A user's metric needs none of it: any callable will do."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from ..student import FinetunedStudent


class Metric(ABC):
    """A target metric Φ with readable proxies."""

    @abstractmethod
    def __call__(self, student: FinetunedStudent) -> Tensor:
        """Φ of a fine-tuned student: a scalar, differentiable, higher is better."""

    def proxies(self, student: FinetunedStudent, value: float) -> dict[str, float]:
        """
        Figures a person can read.

        Args:
            student ([`FinetunedStudent`]): The fine-tuned student.
            value (`float`): Its metric, so that nothing is computed twice.
        """
        return {}

    def readout(self, student: FinetunedStudent) -> dict[str, Any]:
        """
        What stands in the fine-tuned student, for logs and summaries: anything JSON can hold.

        An entry whose name begins with `picture` is logged as an image: rows of 1 (ink), 0 and -1 (paper).
        """
        return {}
