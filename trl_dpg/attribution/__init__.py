"""Scores the samples of a dataset by their effect on a metric of the student fine-tuned on them; see [`attribute`]."""

from .attribute import attribute
from .chunks import Chunk, plan_chunks
from .journal import Journal
from .reliability import rank_correlation
from .result import Attribution, write
from .students import combine_attributions


__all__ = [
    "Attribution",
    "Chunk",
    "Journal",
    "attribute",
    "combine_attributions",
    "plan_chunks",
    "rank_correlation",
    "write",
]
