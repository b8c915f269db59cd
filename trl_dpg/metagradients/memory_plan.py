"""How the memory is shared out to the states of the inner loop and to graphs. `trl_dpg.memory` predicts by it, too."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from .config import InnerLoopConfig


@dataclass(frozen=True)
class MemoryPlan:
    """
    The rules of `checkpoint_interval` and `memory_budget`, see [`InnerLoopConfig`].

    Args:
        config (`InnerLoopConfig`): The inner loop.
        vector (`int`): Bytes that a rank holds of a vector of P numbers.
        num_steps (`int`): T.
        num_metrics (`int`): M. The reverse sweep needs memory for each of them.
    """

    config: InnerLoopConfig
    vector: int
    num_steps: int
    num_metrics: int

    @property
    def step(self) -> int:
        """Bytes of what is kept of a step: θ, g and two moments."""
        return 4 * self.vector

    @property
    def cotangents(self) -> int:
        """Bytes of the metrics' cotangents. What is left free has room for those of one metric."""
        vectors = 4 if self.num_steps > 1 else 1  # λ, u and those of the moments, or λ alone
        return vectors * self.vector * (self.num_metrics - 1)

    def stretch(self, free: int, agreed: Callable[[bool], bool] = bool) -> int:
        """
        Steps in a stretch.

        Args:
            free (`int`): Bytes that are free where the states are kept.
            agreed (`Callable`, *optional*): Maps whether all states fit on this rank to whether they do on all ranks.
        """
        interval = self.config.checkpoint_interval
        if isinstance(interval, str):
            room = free if self.config.offload_trajectory else free - self.cotangents
            interval = 1 if agreed(self.step * self.num_steps <= room // 2) else math.isqrt(self.num_steps)
        # Stretches of one step would all be computed again. So interval 1 is one stretch, which keeps every state
        return self.num_steps if interval == 1 else min(interval, self.num_steps)

    def graphs(self, free: int, stretch: int, on_accelerator: bool) -> int:
        """
        Bytes for the graphs of a stretch.

        Args:
            free (`int`): Bytes that are free on the student's device.
            stretch (`int`): Steps in a stretch.
            on_accelerator (`bool`): Whether this is an accelerator. The generator uses the host's memory, too.
        """
        if not isinstance(self.config.memory_budget, str):
            return self.config.memory_budget
        states = 0 if self.config.offload_trajectory else self.step * (stretch + self.num_steps // stretch)
        return max(0, free - states - self.cotangents) // (2 if on_accelerator else 4)
