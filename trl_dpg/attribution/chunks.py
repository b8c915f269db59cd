"""Chunks of a dataset: the samples on which the student is fine-tuned together."""

import math
from typing import NamedTuple

import numpy as np

from ..metagradients.config import SettingsError


SAMPLES_PER_CHUNK = 256


class Chunk(NamedTuple):
    """
    Samples on which the student is fine-tuned together.

    Attributes:
        rows (`np.ndarray` of shape `[size]`): Their rows in the dataset, in the order of training.
        scored (`np.ndarray` of shape `[size]`, `bool`): Whether the sample's score in this chunk is used.
    """

    rows: np.ndarray
    scored: np.ndarray


def chunk_size(size: int | None, batch_size: int) -> int:
    """
    Number of samples in a chunk: `size`, or by default the smallest multiple of `batch_size` from 256 on.

    Raises:
        `ValueError`: If `size` is not a multiple of `batch_size`.
    """
    if size is None:
        return math.ceil(SAMPLES_PER_CHUNK / batch_size) * batch_size
    if size < 1 or size % batch_size:
        raise SettingsError(
            f"`chunk_size` ({size}) must be a multiple of `batch_size` ({batch_size}), so that every sample has "
            f"the same weight in its batch. E.g. {max(size // batch_size, 1) * batch_size}."
        )
    return size


def plan_chunks(num_samples: int, size: int, seed: int, num_repeats: int = 1) -> list[Chunk]:
    """
    The chunks of a dataset: first those of one random order, then those of the next.

    A row is scored in exactly one chunk of each order. The last chunk of an order is filled up with rows of other
    chunks, so that all chunks have the same size. These rows are not scored there. If the dataset fits into one chunk,
    the first order is that of the dataset. A larger `num_repeats` does not change the earlier orders.

    Args:
        num_samples (`int`): Rows of the dataset.
        size (`int`): Rows of a chunk.
        seed (`int`): Seed of the orders.
        num_repeats (`int`, *optional*, defaults to `1`): Number of orders.
    """
    rng = np.random.default_rng(seed)
    chunks = []
    for repeat in range(num_repeats):
        whole = num_samples <= size
        order = np.arange(num_samples) if whole and repeat == 0 else rng.permutation(num_samples)
        for start in range(0, num_samples, size):
            rows = order[start : start + size]
            scored = np.ones(len(rows), dtype=bool)
            if not whole and len(rows) < size:
                filled = rng.permutation(np.concatenate([rows, order[: size - len(rows)]]))
                rows, scored = filled, np.isin(filled, rows)
            chunks.append(Chunk(rows, scored))
    return chunks
