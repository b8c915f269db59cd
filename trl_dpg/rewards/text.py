"""Rewards that look for strings in a text. With a reward weight of 0, they are only logged, as readable proxies."""

from collections.abc import Sequence

from ..text import completion_text


class ContainsReward:
    """
    A TRL reward function: 1.0 for completions that contain a string, else 0.0.

    Args:
        text (`str`): The string.
    """

    def __init__(self, text: str):
        if not text:
            raise ValueError("Every completion contains the empty string; `text` must not be empty.")
        self.__name__ = "contains"
        self.text = text

    def __call__(self, completions: list, **kwargs) -> list[float]:
        return [float(self.text in completion_text(completion)) for completion in completions]


class WordShareReward:
    """
    A TRL reward function: the share of a completion's words that are in a list; 0.0 for empty completions.

    Args:
        words (`Sequence[str]`): The list. Words of a completion are separated by white space.
    """

    def __init__(self, words: Sequence[str]):
        if not words:
            raise ValueError("`words` must not be empty.")
        self.__name__ = "word_share"
        self.words = frozenset(words)

    def __call__(self, completions: list, **kwargs) -> list[float]:
        texts = [completion_text(completion).split() for completion in completions]
        return [sum(word in self.words for word in words) / max(len(words), 1) for words in texts]
