"""Lengths of reasoning: `measurement` reads them, `fitting` makes targets of them, `summary` says how they are."""

from .distances import distances, effective_sample_size
from .fitting import fit
from .measurement import Measured, measure
from .summary import summarize


__all__ = ["Measured", "distances", "effective_sample_size", "fit", "measure", "summarize"]
