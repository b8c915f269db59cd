"""Work that several processes share, such that an error on one of them is raised on all."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate.utils import gather_object


T = TypeVar("T")


def from_all_ranks(function: Callable[[], T], name: str) -> list[T]:
    """
    The results of a function on all ranks. An error on one rank is raised on all, so that no rank waits forever.

    Args:
        function (`Callable`): Called without arguments, on every rank.
        name (`str`): What fails, for the message on the other ranks.

    Raises:
        `RuntimeError`: If the function raised on another rank. Its own error is raised as it is.
    """
    result: Any = None
    error = None
    try:
        result = function()
    except Exception as raised:
        error = raised
    message = None if error is None else " ".join([repr(error), *getattr(error, "__notes__", [])])
    answers = gather_object([(result, message)])
    if error is not None:
        raise error
    for rank, (_, failure) in enumerate(answers):
        if failure is not None:
            raise RuntimeError(f"{name} failed on rank {rank}: {failure}")
    return [result for result, _ in answers]
