"""Predicts the memory of a training from configurations, before anything is loaded."""

from .empty_models import empty_model, weight_bytes
from .estimate import Change, MemoryEstimate, Setup, estimate
from .generator_memory import GeneratorMemory, Sharding
from .student_memory import Phase, StudentMemory
from .student_traces import StudentTraces


__all__ = [
    "Change",
    "GeneratorMemory",
    "MemoryEstimate",
    "Phase",
    "Setup",
    "Sharding",
    "StudentMemory",
    "StudentTraces",
    "empty_model",
    "estimate",
    "weight_bytes",
]
