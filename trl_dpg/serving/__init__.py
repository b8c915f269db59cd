"""The student behind HTTP: datasets that are collected sample by sample, and scored one at a time."""

from ..score_limits import Limits
from .app import make_app
from .engine import Engine


__all__ = ["Engine", "Limits", "make_app"]
