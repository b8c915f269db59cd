"""An HTML report of a run, or of several that differ in their seeds. `runs` reads, `figures` draws, `page` writes."""

from .page import write_report
from .runs import Run, read_runs


__all__ = ["Run", "read_runs", "write_report"]
