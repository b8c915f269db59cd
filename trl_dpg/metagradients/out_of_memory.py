"""Out of memory in a fine-tuning: smaller micro-batches, and the same numbers."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.utils import logging

from ..student import Student


logger = logging.get_logger(__name__)
T = TypeVar("T")


class NotEnoughMemory(RuntimeError):
    """A single sample of the student's fine-tuning needs more memory than there is."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the host, had too little memory; on this rank, or as the only reason on another."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def within_memory(fine_tuning: Any, run: Callable[[], T], name: str) -> T:
    """
    Call `run`, and again with half of the micro-batch size each time that the memory does not suffice.

    The size that fits is kept in `student.micro_batch_size`, for all later fine-tunings of this student. It changes
    the numbers only by rounding. Of several ranks, all halve the size together if one of them is out of memory: the
    guard around `run` raises this error on all of them.

    Args:
        fine_tuning (`FineTuning`): Its micro-batches are planned again before each further call.
        run (`Callable`): Called without arguments. It must begin anew each time.
        name (`str`): What fails, for the message on other ranks.

    Raises:
        `NotEnoughMemory`: If a micro-batch of one sample is too large.
    """
    while True:
        config = fine_tuning.config
        size = min(config.micro_batch_size or config.batch_size, len(fine_tuning.samples))  # the same on all ranks
        try:
            with fine_tuning.ranks.guard(name):
                return run()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise NotEnoughMemory(
                    "There is not enough memory for one sample at a time. Set `memory_budget` to 0, a shorter "
                    "`max_length`, `checkpoint_interval`, `gradient_checkpointing`, or `load_in_4bit` with adapters, "
                    "or give the metric smaller batches. `trl-dpg memory` says what each of them saves."
                ) from error
            failure = str(error).partition("\n")[0]  # the error itself would hold what has to be freed
        clear_device_cache(garbage_collection=True)
        size //= 2
        logger.warning(
            f"Out of memory ({failure}). The student's micro-batch size is {size} from now on. This does not change "
            "the scores."
        )
        fine_tuning.student.micro_batch_size = size
        with fine_tuning.ranks.guard(name):
            fine_tuning.plan()


def size_that_fits(student: Student) -> dict[str, float]:
    """For logs: the micro-batch size of a student that was out of memory before. Otherwise empty."""
    return {} if student.micro_batch_size is None else {"student_micro_batch_size": float(student.micro_batch_size)}
