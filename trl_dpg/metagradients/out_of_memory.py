"""Out of memory in a fine-tuning: smaller micro-batches, and the same numbers."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache
from transformers.utils import logging

from ..ranks import is_out_of_memory
from ..student import Student


logger = logging.get_logger(__name__)
T = TypeVar("T")


class NotEnoughMemory(torch.OutOfMemoryError):
    """A single sample of the student's fine-tuning needs more memory than there is."""


def within_memory(fine_tuning: Any, run: Callable[[], T], name: str) -> T:
    """
    Call `run`, and again with half of the micro-batch size each time that the memory does not suffice.

    The size that fits is kept in `student.micro_batch_size`, for all later fine-tunings of this student. It changes
    the numbers only by rounding. If one of several ranks is out of memory, all of them halve the size.

    Args:
        fine_tuning (`FineTuning`): Its micro-batches are planned again before each further call.
        run (`Callable`): Called without arguments. It must begin anew each time.
        name (`str`): What fails, for messages.

    Raises:
        `NotEnoughMemory`: If a micro-batch of one sample is too large.
    """
    while True:
        try:
            with fine_tuning.ranks.guard(name):
                return run()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            own = max((len(micro_batch.samples) for step in fine_tuning.steps for micro_batch in step), default=1)
            size = -fine_tuning.ranks.least(-own)  # the largest of all ranks
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
