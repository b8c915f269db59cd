"""Which samples of a dataset help a metric of the student that is fine-tuned on them? [`attribute`] scores them."""

from .attribute import attribute
from .chunks import Chunk, plan_chunks
from .journal import Journal
from .reliability import rank_correlation
from .result import Attribution


__all__ = ["Attribution", "Chunk", "Journal", "attribute", "plan_chunks", "rank_correlation"]
