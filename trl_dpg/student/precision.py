"""The type a student computes in, and a copy of it that computes in another."""

import copy

import torch

from .checks import bnb_modules
from .student import Student


def in_precision(student: Student, dtype: torch.dtype) -> Student:
    """A copy of the student that computes in `dtype`: its weights cast, or the compute type of its 4-bit layers."""
    model = copy.deepcopy(student.model)
    quantized = bnb_modules(model, "Linear4bit")
    for layer in quantized.values():
        layer.compute_dtype = dtype
    if not quantized:
        model.to(dtype)
    return Student(model, student.processing_class)


def compute_dtype(student: Student) -> torch.dtype:
    """What the student computes in: its weights' type, or the compute type of its 4-bit layers."""
    quantized = bnb_modules(student.model, "Linear4bit")
    if quantized:
        return next(iter(quantized.values())).compute_dtype or torch.float32
    return next(parameter.dtype for parameter in student.model.parameters())
