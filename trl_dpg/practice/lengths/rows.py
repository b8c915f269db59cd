"""Rows and columns of a dataset, read many at a time, and the error of data that do not fit."""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset


ROWS_PER_READ = 1000


class DataError(ValueError):
    """Data or settings that do not fit. Arguments are in backticks in the message."""


def column(dataset: Dataset, name: str) -> list[Any]:
    """All values of a column."""
    return dataset[name][:]


def pieces(dataset: Dataset) -> Iterator[list[dict[str, Any]]]:
    """The rows, some at a time."""
    for start in range(0, len(dataset), ROWS_PER_READ):
        batch = dataset[start : start + ROWS_PER_READ]
        yield [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
