"""TRL reward functions that go with Dataset Policy Gradients: the paper's baselines, and readable proxies."""

from .text import ContainsReward, WordShareReward


__all__ = ["ContainsReward", "WordShareReward"]
