"""Audits a dataset: what it does to a student that a control does not, and which rows do it; see [`audit`]."""

from .audit import audit
from .config import AuditConfig
from .control import undirected_control
from .effects import Effect, adjust_for_many
from .panel import default_panel
from .result import Audit
from .rows import RowsBehind


__all__ = [
    "Audit",
    "AuditConfig",
    "Effect",
    "RowsBehind",
    "adjust_for_many",
    "audit",
    "default_panel",
    "undirected_control",
]
