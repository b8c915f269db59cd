"""The type in which a student computes, and copies of it that compute in another type."""

import copy

import torch

from .checks import bnb_modules
from .student import Student


def in_precision(student: Student, dtype: torch.dtype) -> Student:
    """A copy of the student that computes in `dtype`: its weights are cast, or its 4-bit layers compute in it."""
    model = copy.deepcopy(student.model)
    quantized = bnb_modules(model, "Linear4bit")
    for layer in quantized.values():
        layer.compute_dtype = dtype
    if not quantized:
        model.to(dtype)
    made = Student(model, student.processing_class)
    made.tells_samples_apart = student.tells_samples_apart  # the layers are the same
    return made


def compute_dtype(student: Student) -> torch.dtype:
    """The type in which the student computes: that of its weights, or the compute type of its 4-bit layers."""
    quantized = bnb_modules(student.model, "Linear4bit")
    if quantized:
        return next(iter(quantized.values())).compute_dtype or torch.float32
    return next(parameter.dtype for parameter in student.model.parameters())
