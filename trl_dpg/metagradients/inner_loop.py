"""Old import path of the contents of `config`, `batches`, `gradient` and `trajectory`."""

from .batches import MicroBatch, plan_steps
from .config import InnerLoopConfig
from .gradient import Gradient, micro_batch_gradient
from .trajectory import Step, Stretch, Trajectory


__all__ = [
    "Gradient",
    "InnerLoopConfig",
    "MicroBatch",
    "Step",
    "Stretch",
    "Trajectory",
    "micro_batch_gradient",
    "plan_steps",
]
