"""The student behind HTTP: datasets that are collected sample by sample, and scored one at a time."""

from .app import make_app
from .engine import Engine
from .requests import Limits


__all__ = ["Engine", "Limits", "make_app"]
