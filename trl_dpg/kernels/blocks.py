"""The block sizes of the kernels."""

from collections.abc import Iterator
from contextlib import contextmanager


BLOCK = 1 << 20
"""Elements that a kernel processes at a time. Intermediate results of this size stay in the cache."""

LOGITS = {"cpu": 1 << 22, "accelerator": 1 << 26}
"""Logits in memory at a time."""


@contextmanager
def of_an_accelerator() -> Iterator[None]:
    """Context in which tensors on the CPU are processed as if they were on an accelerator."""
    own = LOGITS["cpu"]
    LOGITS["cpu"] = LOGITS["accelerator"]
    try:
        yield
    finally:
        LOGITS["cpu"] = own
