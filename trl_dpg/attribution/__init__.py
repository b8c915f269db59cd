"""Scores the samples of a dataset by their effect on a metric of the student fine-tuned on them; see [`attribute`]."""

from .attribute import attribute
from .chunks import Chunk, plan_chunks
from .journal import Journal
from .reliability import rank_correlation
from .result import Attribution, write


__all__ = ["Attribution", "Chunk", "Journal", "attribute", "plan_chunks", "rank_correlation", "write"]
