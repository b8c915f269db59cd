"""A reward for completions that are similar to given texts in edit distance."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from ..text import completion_text
from .base import reference_texts


class LevenshteinReward:
    """
    A TRL reward function: the similarity of a completion to reference texts in edit distance. A baseline of the
    new-language experiment (Thrush et al., arXiv 2604.08423), with the benchmark's texts as references.

    The similarity of texts a and b is 1 - d(a, b) / max(|a|, |b|), from 0 to 1. Here d is the Levenshtein distance,
    which is the smallest number of characters to insert, delete or replace. The reward is the mean similarity to the
    references.

    Needs the `rewards` extra (rapidfuzz).

    Args:
        references (`Sequence[str]`):
            R texts. A call with N completions compares N · R pairs. A pair of texts with 400 characters takes tens of
            microseconds on one core. The call needs 4 N · R bytes of memory.

    Raises:
        `ValueError`: If there is no reference.
    """

    __name__ = "levenshtein"  # the reward's name in TRL's logs

    def __init__(self, references: Sequence[str]):
        try:
            from rapidfuzz.distance import Levenshtein
            from rapidfuzz.process import cdist
        except ImportError as error:
            raise ImportError("LevenshteinReward needs rapidfuzz: pip install 'trl-dpg[rewards]'") from error
        # Maps N texts to their similarities `[N, R]`, on all cores
        self._similarities = partial(
            cdist, choices=reference_texts(references), scorer=Levenshtein.normalized_similarity, workers=-1
        )

    def __call__(self, completions: list[str | list[dict[str, Any]]], **kwargs) -> list[float]:
        """
        Score completions. The trainer calls this.

        Args:
            completions (`list`): N completions, texts or messages.

        Returns:
            `list[float]`: N rewards from 0 to 1.
        """
        texts = [completion_text(completion) for completion in completions]
        return self._similarities(texts).mean(axis=1, dtype=np.float64).tolist()
