"""A reward for completions that are similar to given texts in meaning."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..student.loading import loading_whole
from ..text import completion_text
from .base import reference_texts


if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


class EmbeddingSimilarityReward:
    """
    A TRL reward function: the cosine similarity of a completion's embedding with the mean of the references'
    embeddings. A baseline of the new-language experiment (Thrush et al., arXiv 2604.08423), with the benchmark's texts
    as references.

    Embeddings are scaled to unit length before they are averaged. So the reward is the completion's mean cosine
    similarity with the references, times a constant factor.

    Needs the `rewards` extra (sentence-transformers).

    Args:
        references (`Sequence[str]`):
            The reference texts. Their embeddings are computed once, when the reward is created.
        model ([`~sentence_transformers.SentenceTransformer`] or `str`):
            The model, or its path or Hub id. A path or Hub id is loaded onto this process's GPU if there is one.
        batch_size (`int`, *optional*, defaults to `32`):
            Texts per forward pass. It changes only memory and speed.

    Raises:
        `ValueError`: If there is no reference.
    """

    __name__ = "embedding_similarity"  # the reward's name in TRL's logs

    def __init__(
        self,
        references: Sequence[str],
        model: "SentenceTransformer | str" = "sentence-transformers/all-MiniLM-L6-v2",
        batch_size: int = 32,
    ):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise ImportError(
                "EmbeddingSimilarityReward needs sentence-transformers: pip install 'trl-dpg[rewards]'"
            ) from error
        references = reference_texts(references)
        with loading_whole():
            self.model = SentenceTransformer(model) if isinstance(model, str) else model
        self.batch_size = batch_size
        mean = self._embed(references).mean(axis=0)
        self.direction = mean / np.linalg.norm(mean)  # [D]

    def __call__(self, completions: list[str | list[dict[str, Any]]], **kwargs) -> list[float]:
        """
        Score completions. The trainer calls this.

        Args:
            completions (`list`): N completions, texts or messages.

        Returns:
            `list[float]`: N rewards from -1 to 1.
        """
        texts = [completion_text(completion) for completion in completions]
        return (self._embed(texts) @ self.direction).tolist()

    def _embed(self, texts: list[str]) -> np.ndarray:
        """Embeddings of unit length, shape `[N, D]`."""
        return self.model.encode(texts, batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False)
