"""TRL reward functions to use with Dataset Policy Gradients: the paper's baselines, and readable proxies."""

from .embedding import EmbeddingSimilarityReward
from .language_id import LanguageIDReward
from .levenshtein import LevenshteinReward
from .text import ContainsReward, WordShareReward


__all__ = ["ContainsReward", "EmbeddingSimilarityReward", "LanguageIDReward", "LevenshteinReward", "WordShareReward"]
