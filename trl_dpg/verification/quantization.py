"""What a student's 4-bit base does to the metric."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..metagradients.fine_tuning import modes
from ..metagradients.memory import free_memory
from ..student import FinetunedStudent, Student
from ..student.checks import bnb_modules
from ..student.precision import compute_dtype
from .result import Check


def without_quantization(student: Student, model_init_kwargs: dict[str, Any] | None = None) -> Student | None:
    """
    A student with the same adapters, and with its base in the `dtype` of `model_init_kwargs`, by default float32.

    Args:
        student (`Student`):
            A student with a 4-bit base that was quantised while it was loaded from a path or Hub id.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Those with which the student was loaded.

    Raises:
        `OSError`: If the base cannot be found any more, e.g. without a network.

    Returns:
        `Student` or `None`: `None` if the student has no 4-bit base, the stored base is quantised as well, or the
        base would take more than half of the free memory.
    """
    model: Any = student.model
    if not bnb_modules(model, "Linear4bit"):
        return None
    base = model.get_base_model()
    if 4 * base.num_parameters() > free_memory(student.device) / 2:
        return None
    config = model.peft_config[model.active_adapter]
    copy = Student(model.config._name_or_path, student.processing_class, config, model_init_kwargs=model_init_kwargs)
    if bnb_modules(copy.model, "Linear4bit"):
        return None
    with torch.no_grad():
        for parameter, own in zip(_trainable(copy), _trainable(student), strict=True):
            parameter.copy_(own)
    return copy


def quantization_check(
    student: Student,
    metric: Callable[[FinetunedStudent], Tensor],
    metric_before: float,
    metric_after: float,
    model_init_kwargs: dict[str, Any] | None = None,
) -> Check | None:
    """
    Whether the 4-bit base of a student moves the metric by more than the student's fine-tuning does.

    Takes memory for the base without quantisation, and one evaluation of the metric.

    Args:
        student (`Student`):
            The student before fine-tuning.
        metric (`Callable`):
            Φ.
        metric_before (`float`), metric_after (`float`):
            Φ before and after the student's fine-tuning.
        model_init_kwargs (`dict[str, Any]`, *optional*):
            Those with which the student was loaded.

    Returns:
        `Check` or `None`: A check that passes or warns. Its value is Φ in 4 bits minus Φ without. It is skipped if the
        base cannot be loaded without quantisation, or the memory is not enough. `None` if there is nothing to compare
        with, see [`without_quantization`], or Φ is not finite.
    """
    try:
        copy = without_quantization(student, model_init_kwargs) if math.isfinite(metric_after) else None
    except (OSError, MemoryError, RuntimeError) as error:  # no network, or no memory
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Check("quantization", None, None, "skip", f"the base could not be loaded without 4 bits: {reason}")
    if copy is None:
        return None
    try:
        unquantized = _at_start(copy, metric)
    except torch.OutOfMemoryError:
        return Check("quantization", None, None, "skip", "there is not enough memory for the base without 4 bits")
    dtype = str(compute_dtype(copy)).removeprefix("torch.")
    shift, change = metric_before - unquantized, abs(metric_after - metric_before)
    meaning = (
        f"what 4 bits change in the metric before fine-tuning, {unquantized:.4g} in {dtype}; fine-tuning: {change:.3g}"
    )
    if abs(shift) <= change:
        return Check("quantization", shift, change, "pass", meaning)
    advice = "leave out `load_in_4bit`, or keep the modules that suffer most: `bnb_4bit_skip_modules` v_proj down_proj"
    return Check("quantization", shift, change, "warn", meaning, advice)


def _at_start(student: Student, metric: Callable[[FinetunedStudent], Tensor]) -> float:
    """Φ before fine-tuning."""
    theta = student.initial_theta()
    finetuned = FinetunedStudent(student, theta, theta)
    with modes(student), torch.no_grad():
        return finetuned.evaluate(metric)[0].item()


def _trainable(student: Student) -> list[Tensor]:
    return [parameter for parameter in student.model.parameters() if parameter.requires_grad]
