"""TRL reward functions to use with Dataset Policy Gradients: the paper's baselines, and readable proxies."""

from .embedding import EmbeddingSimilarityReward
from .language_id import LanguageIDReward
from .levenshtein import LevenshteinReward
from .target_language import TargetLanguageReward
from .text import ContainsReward, WordShareReward


__all__ = [
    "ContainsReward",
    "EmbeddingSimilarityReward",
    "LanguageIDReward",
    "LevenshteinReward",
    "TargetLanguageReward",
    "WordShareReward",
]
